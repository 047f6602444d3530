"""Where exchanges are planned, the ranks measure themselves at start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefill_service.cost_model.cost import ASSUMED
from prefill_service.cost_model.fitting import fit
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from tests.support.standalone_executor import standalone_executor


async def test_rank_0_tells_what_it_measured(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    async with standalone_executor(
        checkpoint("qwen3_vl"), tmp_path, 2, exchange="auto"
    ) as standalone:
        observed = standalone.supervisor.observed
        assert len(observed) == 3 + 3  # the device, the link
        assert sum(one.work.exposed_calls for one in observed) == 3
        model = fit(observed, ASSUMED, "probe")
        # What was measured beside other work may fit badly; it must be there, and usable.
        assert all(one.seconds > 0 for one in observed)
        assert 0 <= model.per_linear_flop < 1
        assert 0 <= model.per_byte < 1
        assert standalone.executor.exchange_of(standalone.executor.all_ranks) == ExchangeChoice()
        video = make_video(seconds=1.0, width=96, height=64)
        plan, _ = await standalone.plan(video)
        outcome = await standalone.prefill(standalone.task(video, plan))
        assert "probe" not in outcome.communication
