"""``engine.exchange = "auto"``: chosen per prefix, from a probe and from what prefills took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import AttentionReport, LayerReport
from prefill_service.cost_model.fitting import Observation
from prefill_service.cost_model.presets import PRESETS
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.work import Work, prefill_work
from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.kv.manifest import Manifest, ShardRun
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.chunking import chunking_of
from prefill_service.parallel.exchanges.catalog import (
    DEMAND,
    GATHER,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
    ExchangeKind,
)
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.parallel.token_layout import deal_patches
from prefill_service.scheduling.exchange_chooser import ExchangeChooser
from prefill_service.scheduling.placement import assumed_seconds
from tests.support.simulated_backends import LAYOUT, SimulatedExecutor

SHAPE = PRESETS["qwen3-vl-8b"]
EXACT = resolve_policy(Quality.EXACT)
BALANCED = resolve_policy(Quality.BALANCED)
ROOM = 1 << 40
RANKS = 4


def prefix(tokens: int) -> PrefixPlan:
    ends = np.arange(128, tokens + 1, 128)
    return SimpleNamespace(num_tokens=tokens, patch_ends=ends)  # type: ignore[return-value]


def machine(link: float) -> list[Observation]:
    """400 and 300 TFLOP/s, no overhead, ``link`` bytes per second."""
    return [
        Observation(Work(linear_flops=400e12), 1.0),
        Observation(Work(attention_flops=300e12), 1.0),
        Observation(Work(passes=1.0), 1e-9),
        Observation(Work(exposed_bytes=link), 1.0),
        Observation(Work(exposed_calls=1.0), 1e-6),
    ]


def chooser_for(link: float, kv_bytes: int = ROOM, chunk: int = 4096) -> Any:
    return ExchangeChooser(SHAPE, chunk, kv_bytes, lambda: machine(link))


def outcome(seconds: float, density: float = 1.0) -> PrefillOutcome:
    layers = [LayerReport(0, [density], 1.0, 1, 0, 0)] if density < 1 else []
    report = AttentionReport(layers=layers)
    return PrefillOutcome({"decode": 9.0, "prefill": seconds}, {}, seconds + 9.0, report)


def task(
    plan: PrefixPlan, policy: AttentionPolicy, exchange: ExchangeChoice, *, ranks: int
) -> PrefillTask:
    manifest = Manifest(
        prefix_id="prefix",
        engine_id="test",
        epoch=0,
        model_fingerprint="model",
        layout=LAYOUT,
        num_tokens=plan.num_tokens,
        runs=(ShardRun(0, plan.num_tokens, 0, 0),),
        endpoints=("unix:/r0",),
        token_ids_hash="hash",
        position_delta=0,
    )
    return PrefillTask(
        job_id="job_1",
        plan=plan,
        manifest=manifest,
        video_path="",
        index_path="",
        subgroup=Subgroup(0, ranks),
        policy=policy,
        exchange=exchange,
        whole_units=exchange.kind.sparse and not policy.exact,
    )


def test_the_regimes() -> None:
    """Chunks: a ring moves the past again with each; what is replicated needs room."""
    slow = chooser_for(1e9).choose(prefix(262_144), EXACT, RANKS)
    assert slow.kind in (GATHER, ULYSSES)  # the fewest bytes
    alike = chooser_for(1e13, chunk=512).choose(prefix(131_072), EXACT, RANKS)
    assert alike.kind == GATHER  # no exchange is faster by more than the tolerance
    gather_takes = 262_144 * SHAPE.row_bytes * SHAPE.attending_layers
    tight = chooser_for(350e9, kv_bytes=gather_takes // 2).choose(prefix(262_144), EXACT, RANKS)
    assert tight.kind != GATHER
    assert tight.kind != DEMAND


def test_where_nothing_fits_it_is_gather(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chooser_for(1e9, kv_bytes=1).choose(prefix(4096), EXACT, RANKS) == ExchangeChoice()
    assert "the least that K/V take" in caplog.text


@pytest.mark.parametrize("chunk", [2048, 65_536])
def test_sparse_attention_keeps_what_selects(chunk: int) -> None:
    """Once it is known what a quality attends to, exact exchanges no longer compete."""
    chooser = chooser_for(350e9, chunk=chunk)
    plan = prefix(1 << 20)
    before = chooser.choose(plan, BALANCED, RANKS)
    assert before == chooser.choose(plan, EXACT, RANKS)
    chooser.learn(task(plan, BALANCED, ExchangeChoice(), ranks=RANKS), outcome(20.0, density=0.1))
    # Dealt shares of large chunks are uneven; shares of the heads are not.
    wanted = GATHER if chunk == 2048 else ULYSSES
    assert chooser.choose(plan, BALANCED, RANKS).kind is wanted
    assert chooser.choose(plan, EXACT, RANKS).kind is (GATHER if chunk == 2048 else before.kind)


def test_jobs_refine_the_model() -> None:
    chooser = chooser_for(350e9)
    plan = prefix(65_536)
    probed = chooser.model
    assert probed.provenance == "probe of the ranks"
    chooser.learn(task(plan, EXACT, ExchangeChoice(), ranks=RANKS), outcome(0.0))
    assert chooser.model == probed  # nothing was measured
    for _ in range(8):
        chooser.learn(task(plan, EXACT, ExchangeChoice(), ranks=RANKS), outcome(100.0))
    assert chooser.model.provenance == "probe of the ranks; refined by 8 jobs"
    assert chooser.model.per_linear_flop + chooser.model.per_attention_flop > 2 * (
        probed.per_linear_flop + probed.per_attention_flop
    )


@pytest.mark.parametrize("kind", [ULYSSES, ULYSSES_GATHER])
def test_a_job_that_took_what_was_predicted_changes_nothing(kind: ExchangeKind) -> None:
    """Sparse, on a mesh whose three ranks of a row have 12, 12 and 8 of 32 query heads."""
    chooser = chooser_for(350e9)
    plan = prefix(65_536)
    density = 0.1
    layout = deal_patches(plan.patch_ends, 3, 4096, whole_units=True)
    chunking = chunking_of([[share.ranges for share in chunk] for chunk in layout.shares])
    strategy = Strategy(kind, 3, 3, sparse=True)
    before = chooser.model
    seconds = before.prefill_seconds(prefill_work(strategy, SHAPE, chunking, density=density))
    for _ in range(4):
        chooser.learn(
            task(plan, BALANCED, ExchangeChoice(kind, 3), ranks=3), outcome(seconds, density)
        )
    assert chooser.model.per_attention_flop == pytest.approx(before.per_attention_flop, rel=1e-3)
    assert chooser.model.per_linear_flop == pytest.approx(before.per_linear_flop, rel=1e-3)


class TimedExecutor(SimulatedExecutor):
    """Knows how long its prefills took."""

    async def prefill(
        self, task: PrefillTask, on_progress: Any, preempts: str = ""
    ) -> PrefillOutcome:
        found = await super().prefill(task, on_progress, preempts)
        return replace(found, stage_seconds={**found.stage_seconds, "prefill": 0.5})


class Recorder(ExchangeChooser):
    """A chooser that has made up its mind."""

    learned: list[ExchangeChoice]

    def choose(self, plan: PrefixPlan, policy: Any, ranks: int) -> ExchangeChoice:
        super().choose(plan, policy, ranks)
        return ExchangeChoice(USP, 2)

    def learn(self, task: PrefillTask, outcome: PrefillOutcome) -> None:
        super().learn(task, outcome)
        self.learned.append(task.exchange)


async def test_a_job_takes_the_chosen_exchange(serve: Callable[..., Any], tmp_path: Path) -> None:
    chooser = Recorder(SHAPE, 32, ROOM, lambda: machine(1e9))
    chooser.learned = []
    async with serve(executor=TimedExecutor(), components={"exchanges": chooser}) as s:
        (*_, job) = await s.ended((await s.create(8)).job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED
        assert job.result.communication.exchange == "usp 2"
        assert s.executor.tasks[-1].exchange == ExchangeChoice(USP, 2)
        assert chooser.learned == [ExchangeChoice(USP, 2)]
        assert chooser.model.provenance == "probe of the ranks; refined by 1 job"


def test_the_model_says_what_more_ranks_bring() -> None:
    """On a slow link several ranks lose, on a fast one they gain."""
    slow = chooser_for(1e7)
    fast = chooser_for(350e9)
    assert slow.predict_seconds(4096, 2) > slow.predict_seconds(4096, 1)
    assert 3 < fast.predict_seconds(65_536, 1) / fast.predict_seconds(65_536, 4) <= 4
    unmeasured = ExchangeChooser(SHAPE, 4096, ROOM, list)
    assert unmeasured.predict_seconds(1000, 2) == assumed_seconds(1000, 2)


def test_jobs_change_what_more_ranks_bring() -> None:
    chooser = chooser_for(350e9)
    before = chooser.predict_seconds(65_536, 2)
    for _ in range(4):
        chooser.learn(task(prefix(65_536), EXACT, ExchangeChoice(), ranks=2), outcome(100.0))
    assert chooser.predict_seconds(65_536, 2) > 2 * before
