"""Every exchange through the rank processes: KV as transformers computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.plan import FrameSampling
from prefill_service.parallel.exchanges import ExchangeKind, choose_exchange
from tests.engine.harness import running_group
from tests.oracles.transformers_forward import prefix_kv, processor_inputs

VIDEOS = [
    {"seconds": 0.2, "fps": 5, "width": 96, "height": 64},  # one frame: idle ranks
    {"seconds": 15.0, "fps": 10, "width": 160, "height": 120},  # several chunks
]
HEADS = 4


def kinds(ranks: int) -> list[ExchangeKind]:
    """Those that so many ranks and heads allow, but for ``gather``: test_group.py has that."""
    others = [kind for kind in ExchangeKind if kind is not ExchangeKind.GATHER]
    return others if ranks <= HEADS else [ExchangeKind.MULTI_RING]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
async def test_kv_equals_transformers(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path, ranks: int
) -> None:
    # Families take turns: what they differ in is no matter of the exchange.
    model = checkpoint("qwen3_vl" if ranks % 2 else "qwen2_5_vl")
    async with running_group(model, tmp_path, ranks, chunk_tokens=70) as harness:
        for arguments in VIDEOS:
            video = make_video(**arguments)
            plan, index = await harness.plan(video, FrameSampling(fps=4.0))
            text = harness.planner._prefix_text("")
            inputs = processor_inputs(model, harness.frames(video, plan), plan, index, text)
            expected = prefix_kv(model, inputs, plan)
            for kind in kinds(ranks):
                task = harness.task(video, plan, choose_exchange(kind, ranks, HEADS, 0))
                outcome = await harness.prefill(task)
                error = (harness.read_kv(task) - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, f"{kind}, {arguments}, {plan.num_tokens} tokens"
                assert outcome.attention.density == 1.0
                # On demand, a rank that has all the keys asks nobody.
                alone = ranks == 1 or (kind is ExchangeKind.DEMAND and arguments is VIDEOS[0])
                assert (outcome.bytes_received > 0) != alone
                assert ("agree" in outcome.communication) == (ranks > 1)
                harness.group.drop(plan.prefix_id)


async def test_more_ranks_than_query_heads_is_refused_at_start(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match="degree of 5 exceeds the model's 4 query heads") as info:
        async with running_group(checkpoint("qwen3_vl"), tmp_path, 5, exchange="ulysses"):
            pass
    assert info.value.reason is Reason.CONFIG_INVALID
