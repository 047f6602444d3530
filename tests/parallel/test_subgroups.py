"""The family of teams: nested or disjoint, down to single ranks."""

from __future__ import annotations

import itertools

import pytest

from prefill_service.parallel.subgroups import Subgroup, form_subgroups


@pytest.mark.parametrize("ranks", [*range(1, 18), 64])
def test_two_teams_are_disjoint_or_one_holds_the_other(ranks: int) -> None:
    teams = form_subgroups(ranks)
    assert teams[0] == Subgroup(0, ranks)
    assert {Subgroup(rank, 1) for rank in range(ranks)} <= set(teams)
    assert len(set(teams)) == len(teams) == 2 * ranks - 1
    assert [team.size for team in teams] == sorted((team.size for team in teams), reverse=True)
    for one, other in itertools.combinations(teams, 2):
        common = set(one.members) & set(other.members)
        assert one.overlaps(other) == other.overlaps(one) == bool(common)
        assert one.contains(other) == (set(other.members) <= set(one.members))
        assert one.contains(other) or other.contains(one) or not common
    assert form_subgroups(ranks, elastic=False) == (Subgroup(0, ranks),)


def test_names() -> None:
    assert [str(team) for team in form_subgroups(3)] == [
        "ranks 0-2", "ranks 0-1", "rank 0", "rank 1", "rank 2",
    ]  # fmt: skip
