"""The dial: what it resolves to, and what it refuses."""

from __future__ import annotations

import pytest

from prefill_service.attention.quality import Quality, QualityDial, QualityStep, resolve_policy
from tests.attention.layer import error, run
from tests.attention.oracle import rand


def test_the_default_is_balanced() -> None:
    policy = resolve_policy()
    assert policy == resolve_policy(Quality.BALANCED)
    assert policy.epsilon == Quality.BALANCED.step.epsilon
    assert policy.min_kept_mass == pytest.approx(1 - 2 * policy.epsilon)


@pytest.mark.parametrize("spelling", [{"quality": Quality.EXACT}, {"epsilon": 0.0}])
def test_exact_has_one_key(spelling: dict[str, object]) -> None:
    policy = resolve_policy(**spelling)  # type: ignore[arg-type]
    assert policy.exact
    assert policy.attention_key == "exact"
    assert resolve_policy(Quality.EXACT, min_kept_mass=0.3).attention_key == "exact"


def test_keys_tell_all_that_changes_the_kv() -> None:
    policies = [resolve_policy(quality) for quality in list(Quality)[:4]]
    policies += [resolve_policy(epsilon=0.11), resolve_policy(epsilon=0.11, min_kept_mass=0.5)]
    assert len({policy.attention_key for policy in policies}) == 6
    assert (
        resolve_policy(epsilon=Quality.HIGH.step.epsilon).attention_key == policies[1].attention_key
    )
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


class ToyDial(QualityDial):
    """One more step is one more row."""

    SKETCH = "sketch", QualityStep(epsilon=0.6, row_limit=0.2)


def test_one_more_step_is_one_row() -> None:
    policy = resolve_policy(ToyDial.SKETCH)
    assert policy.attention_key == "sparse:epsilon=0.6,row_limit=0.2,min_kept_mass=0.0"
    q = rand(4, 1500, 16)
    k = rand(2, 1500, 16, seed=1)
    v = rand(2, 1500, 16, seed=2)
    exact, _ = run(q, k, v, resolve_policy(Quality.EXACT))
    fast, of_fast = run(q, k, v, resolve_policy(Quality.FAST, min_kept_mass=0))
    sketch, of_sketch = run(q, k, v, policy)
    assert of_sketch.density < of_fast.density < 1
    assert 0.01 < error(fast, exact) < error(sketch, exact) < 1
    assert of_sketch.layers[0].kept_mass.mean(1) < of_fast.layers[0].kept_mass.mean(1)
