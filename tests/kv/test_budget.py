"""What fits, and what is said of what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import KVLayout

LAYOUT = KVLayout(num_layers=5, kv_heads=2, head_dim=8, dtype="bfloat16", page_tokens=16)
ROW = 2 * 2 * 8 * 2  # bytes of K and V of a token in a layer
ROOMY = KVBudget(LAYOUT, pool_bytes=1 << 40, working_bytes=1 << 40)


def test_the_last_layer_needs_no_working_set() -> None:
    assert ROOMY.layer_bytes(100) == 100 * ROW
    assert ROOMY.working_set(100) == 400 * ROW
    assert replace(ROOMY, kv_shards=3).working_set(100) == 4 * 34 * ROW
    assert replace(ROOMY, offload=True).least_working_bytes(100) == 200 * ROW


@pytest.mark.parametrize(
    ("budget", "fitting"),
    [
        (replace(ROOMY, working_bytes=400 * ROW), 100),
        (replace(ROOMY, working_bytes=404 * ROW - 1), 100),
        (replace(ROOMY, working_bytes=400 * ROW, offload=True), 200),
        (replace(ROOMY, working_bytes=400 * ROW, kv_shards=3), 300),
        (replace(ROOMY, pool_bytes=500 * ROW), 100),
        (replace(ROOMY, pool_bytes=500 * ROW, working_bytes=40 * ROW), 10),
        (KVBudget(replace(LAYOUT, num_layers=1), 70 * ROW, 1), 70),  # nothing is attended to
    ],
)
def test_fitting_tokens_fit_and_one_more_does_not(budget: KVBudget, fitting: int) -> None:
    assert budget.fitting_tokens == fitting
    budget.check(fitting)
    with pytest.raises(ServiceError) as caught:
        budget.check(fitting + 1)
    error = caught.value
    assert error.reason is Reason.KV_POOL_FULL
    assert int(error.metadata["needed_bytes"]) > int(error.metadata["pool_bytes"])
    assert error.metadata["fitting_tokens"] == str(fitting)


def test_a_refusal_names_bytes_limit_and_remedies() -> None:
    budget = replace(ROOMY, working_bytes=400 * ROW)
    error = budget.refusal(101, "num_frames=18 would fit.")
    assert error.message == (
        f"the video makes 101 tokens, which need {404 * ROW} bytes of working KV on each rank; "
        f"engine.kv_working_bytes is {400 * ROW}, and 100 tokens would fit. Raise "
        'engine.kv_working_bytes or set engine.kv_offload = "host"; or: num_frames=18 would fit'
    )
    assert error.metadata["option"] == "engine.kv_working_bytes"
    assert "kv_offload" not in replace(budget, offload=True).refusal(201).message
    pool = replace(ROOMY, pool_bytes=500 * ROW).refusal(101)
    assert pool.message == (
        f"the video makes 101 tokens, which need {505 * ROW} bytes of KV pages; "
        f"engine.kv_pool_bytes is {500 * ROW}, and 100 tokens would fit. Raise "
        "engine.kv_pool_bytes; or: look at fewer or smaller frames"
    )
