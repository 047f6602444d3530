"""The dial: what it resolves to, and what it refuses."""

from __future__ import annotations

import pytest

from prefill_service.attention.quality import EPSILON, Quality, resolve_policy


def test_the_default_is_balanced() -> None:
    policy = resolve_policy()
    assert policy == resolve_policy(Quality.BALANCED)
    assert policy.epsilon == EPSILON[Quality.BALANCED]
    assert policy.min_kept_mass == pytest.approx(1 - 2 * policy.epsilon)


@pytest.mark.parametrize("spelling", [{"quality": Quality.EXACT}, {"epsilon": 0.0}])
def test_exact_has_one_profile(spelling: dict[str, object]) -> None:
    policy = resolve_policy(**spelling)  # type: ignore[arg-type]
    assert policy.exact
    assert policy.profile == "exact"
    assert resolve_policy(Quality.EXACT, min_kept_mass=0.3).profile == "exact"


def test_profiles_tell_all_that_changes_the_kv() -> None:
    policies = [resolve_policy(quality) for quality in list(Quality)[:4]]
    policies += [resolve_policy(epsilon=0.11), resolve_policy(epsilon=0.11, min_kept_mass=0.5)]
    assert len({policy.profile for policy in policies}) == 6
    assert resolve_policy(epsilon=EPSILON[Quality.HIGH]).profile == policies[1].profile
    assert resolve_policy(epsilon=0.11).quality is Quality.CUSTOM


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": -0.1}, "epsilon = -0.1 .* 0 <= epsilon < 1"),
        ({"epsilon": 1.0}, "epsilon = 1.0 .* 0 <= epsilon < 1"),
        ({"epsilon": float("nan")}, "epsilon = nan .* 0 <= epsilon < 1"),
        ({"min_kept_mass": 1.5}, "min_kept_mass = 1.5 .* 0 <= min_kept_mass <= 1"),
        ({"min_kept_mass": float("nan")}, "min_kept_mass = nan"),
        ({"quality": Quality.FAST, "epsilon": 0.1}, "epsilon = 0.1 contradicts quality fast"),
        ({"quality": Quality.CUSTOM}, "quality custom needs an epsilon"),
    ],
)
def test_refusals_name_the_value(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_policy(**given)  # type: ignore[arg-type]
