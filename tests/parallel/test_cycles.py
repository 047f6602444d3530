"""Hamiltonian cycles that share no link."""

from __future__ import annotations

import pytest

from prefill_service.parallel.exchanges.ring import hamiltonian_cycles


@pytest.mark.parametrize("ranks", [2, 3, 5, 7, 8, 9, 11, 15])
def test_every_link_is_used_once(ranks: int) -> None:
    cycles = hamiltonian_cycles(ranks)
    assert len(cycles) == ranks - 1
    assert all(sorted(cycle) == list(range(ranks)) for cycle in cycles)
    links = {(cycle[i - 1], cycle[i]) for cycle in cycles for i in range(ranks)}
    assert links == {(a, b) for a in range(ranks) for b in range(ranks) if a != b}


@pytest.mark.parametrize("ranks", [4, 6, 10])
def test_where_none_are_known_there_is_one_ring(ranks: int) -> None:
    assert hamiltonian_cycles(ranks) == [list(range(ranks))]


def test_one_rank_has_no_ring() -> None:
    with pytest.raises(ValueError, match="at least 2 ranks, got 1"):
        hamiltonian_cycles(1)
