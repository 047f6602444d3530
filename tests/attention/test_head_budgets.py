"""Head budgets: the file, what is refused, and that selection follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefill_service.attention.head_budgets import MAX_EPSILON, HeadBudgets, load_head_budgets
from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.errors import Reason, ServiceError
from tests.attention.layer import run
from tests.attention.oracle import rand

BUDGETS = HeadBudgets("f" * 64, 0.15, ((0.1, 0.3), (0.15, 0.0), (0.2, 0.05)), (1.0, 2.0, 0.5))


def load(path: Path) -> HeadBudgets:
    return load_head_budgets(path, BUDGETS.model_fingerprint, shape=(3, 2))


def test_budgets_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    BUDGETS.save(path)
    assert load(path) == BUDGETS
    assert [file.name for file in tmp_path.iterdir()] == ["budgets.json"]


def test_epsilons_follow_the_request_and_stay_below_1() -> None:
    half = BUDGETS.at(0.075)
    assert half[0] == pytest.approx((0.05, 0.15))
    assert BUDGETS.at(0.9)[0] == pytest.approx((0.6, MAX_EPSILON))
    assert BUDGETS.at(BUDGETS.epsilon)[2] == pytest.approx((0.2, 0.05))


def change(name: str, value: Any) -> dict[str, Any]:
    data = {
        "version": 1,
        "model_fingerprint": BUDGETS.model_fingerprint,
        "epsilon": 0.15,
        "head_epsilons": [[0.1, 0.3], [0.15, 0.0], [0.2, 0.05]],
        "layer_sensitivity": [],
    }
    return {**data, name: value} if name else data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON: Expecting value"),
        ("[]", "holds no head budgets: it holds list, expected an object"),
        (json.dumps({"version": 1}), "epsilon, head_epsilons, layer_sensitivity, model_finger"),
        (json.dumps(change("extra", 1)), "extra not known"),
        (json.dumps(change("version", 2)), "version = 2 is not accepted; expected 1"),
        (json.dumps(change("model_fingerprint", 3)), "model_fingerprint = 3; expected a string"),
        (json.dumps(change("epsilon", 0)), "epsilon = 0.0 is not accepted; expected 0 < epsilon"),
        (json.dumps(change("epsilon", "x")), "epsilon holds 'x'; expected numbers"),
        (json.dumps(change("head_epsilons", 1)), "head_epsilons = 1; expected a list of lists"),
        (json.dumps(change("head_epsilons", [1])), r"head_epsilons[0] = 1; expected a list of"),
        (json.dumps(change("head_epsilons", [[0.1], [0.1, 1.0]])), "layers of [1, 2] heads"),
        (
            json.dumps(change("head_epsilons", [[0.1, 0.99]])),
            "head_epsilons[0][1] = 0.99 is not accepted; expected 0 to 0.95",
        ),
        (json.dumps(change("head_epsilons", [[0.1, float("nan")]])), "[0][1] = nan is not accep"),
        (
            json.dumps(change("head_epsilons", [[0.1, 0.2]])),
            "has 1 layers of 2 KV heads; expected 3 of 2",
        ),
        (json.dumps(change("layer_sensitivity", [1.0])), "layer_sensitivity has 1 layers; expect"),
        (json.dumps(change("layer_sensitivity", [1.0, -1.0, 0.0])), "layer_sensitivity[1] = -1.0"),
        (
            json.dumps(change("model_fingerprint", "a" * 64)),
            "was made for the model aaaaaaaaaaaa, but this one is ffffffffffff",
        ),
    ],
)
def test_files_that_are_no_budgets_of_this_model(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "budgets.json"
    path.write_text(text)
    with pytest.raises(ServiceError) as error:
        load(path)
    assert error.value.reason is Reason.CONFIG_INVALID
    assert message in str(error.value)
    assert str(error.value).startswith(f"engine.head_budgets: {path} ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot be read: No such file") as error:
        load(tmp_path / "nothing.json")
    assert error.value.reason is Reason.CONFIG_INVALID


def test_unequal_budgets_have_unequal_names() -> None:
    policy = resolve_policy(Quality.BALANCED)
    other = HeadBudgets(BUDGETS.model_fingerprint, 0.15, ((0.1, 0.2),) * 3)
    names = {policy.with_budgets(budgets).attention_key for budgets in (None, BUDGETS, other)}
    assert len(names) == 3
    assert policy.with_budgets(None) == policy
    assert (
        policy.with_budgets(BUDGETS).attention_key
        == f"{policy.attention_key},budgets={BUDGETS.digest}"
    )
    exact = resolve_policy(Quality.EXACT)
    assert exact.with_budgets(BUDGETS) == exact  # there is nothing to share


def test_budgets_of_another_shape_are_refused() -> None:
    policy = resolve_policy(Quality.BALANCED).with_budgets(BUDGETS)
    with pytest.raises(ValueError, match=r"budgets are of \(3, 2\) .* expected \(2, 2\)"):
        policy.head_epsilons(2, 2)


def test_selection_follows_the_budgets() -> None:
    q = rand(4, 1500, 16)
    k = rand(2, 1500, 16, seed=1)
    v = rand(2, 1500, 16, seed=2)
    plain = AttentionPolicy(Quality.CUSTOM, 0.4, 0.0)
    same = HeadBudgets("", 0.2, ((0.2, 0.2),))
    base, report = run(q, k, v, plain)
    got, _ = run(q, k, v, plain.with_budgets(same))
    assert torch.equal(got, base)

    shared = HeadBudgets("", 0.2, ((0.2, 0.05),))
    got, uneven = run(q, k, v, plain.with_budgets(shared))
    assert torch.equal(got[:2], base[:2])
    assert uneven.layers[0].head_density[0] == report.layers[0].head_density[0]
    assert uneven.layers[0].head_density[1] > report.layers[0].head_density[1]


def test_what_misses_the_floor_is_computed_again_with_less_than_its_own() -> None:
    q = rand(4, 1500, 16)
    k = rand(2, 1500, 16, seed=1)
    v = rand(2, 1500, 16, seed=2)
    floor = AttentionPolicy(Quality.CUSTOM, 0.2, 0.75)
    shared = HeadBudgets("", 0.2, ((0.9, 0.2),))
    _, report = run(q, k, v, floor.with_budgets(shared))
    layer = report.layers[0]
    assert layer.tiles_redone > 0
    assert layer.kept_mass.mean(0) > 0.75
    assert len(layer.head_mass) == 4
    assert sum(layer.head_mass) == pytest.approx(layer.kept_mass.total)
