"""The dial and the report, from the request to the result and beyond a restart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.attention.head_budgets import HeadBudgets
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import AttentionReport, LayerReport
from prefill_service.kv.manifest import Manifest
from prefill_service.scheduling import attention_summary as attention
from tests.support.in_process_service import InProcessService, error_of

Serve = Callable[..., Any]
BALANCED = resolve_policy(Quality.BALANCED)


async def create(s: InProcessService, **fields: Any) -> pb.PrefillJob:
    spec = s.spec()
    spec.attention.CopyFrom(pb.AttentionSpec(**fields))
    return (await s.prefills.CreatePrefillJob(pb.CreatePrefillJobRequest(spec=spec))).job


async def inspect(s: InProcessService, job_id: str) -> pb.InspectPrefillJobResponse:
    return await s.prefills.InspectPrefillJob(pb.InspectPrefillJobRequest(job_id=job_id))


async def test_each_policy_is_a_prefix_of_its_own(serve: Serve) -> None:
    async with serve() as s:
        jobs = {}
        for name, fields in {
            "default": {},
            "balanced": {"quality": pb.QUALITY_BALANCED},
            "floor too": {"quality": pb.QUALITY_BALANCED, "min_kept_mass": BALANCED.min_kept_mass},
            # Of an explicit epsilon single rows may lose half, which is more than of the dial's.
            "epsilon of balanced": {"epsilon": BALANCED.epsilon},
            "fast": {"quality": pb.QUALITY_FAST},
            "floor": {"quality": pb.QUALITY_FAST, "min_kept_mass": 0.95},
            "custom": {"quality": pb.QUALITY_CUSTOM, "epsilon": 0.0625},
            "exact": {"quality": pb.QUALITY_EXACT},
            "zero": {"epsilon": 0.0},
            "custom zero": {"quality": pb.QUALITY_CUSTOM, "epsilon": 0.0, "min_kept_mass": 0.5},
            "exact zero": {"quality": pb.QUALITY_EXACT, "epsilon": 0.0},
        }.items():
            jobs[name] = (await s.ended((await create(s, **fields)).job_id))[-1]
        ids = {name: job.job_id for name, job in jobs.items()}
        assert ids["default"] == ids["balanced"] == ids["floor too"]
        assert ids["exact"] == ids["zero"] == ids["custom zero"] == ids["exact zero"]
        assert len(set(ids.values())) == len(s.executor.tasks) == 6
        keys = {
            name: Manifest.from_json(job.result.manifest_json).attention_key
            for name, job in jobs.items()
        }
        assert keys["exact"] == "exact"
        assert keys["default"] == BALANCED.attention_key
        assert keys["custom"] == "sparse:epsilon=0.0625,row_limit=0.03125,min_kept_mass=0.875"
        for task in s.executor.tasks:  # what the ranks are sent is what the id stands for
            assert task.policy.attention_key == task.manifest.attention_key
        assert len({task.plan.prefix_id for task in s.executor.tasks}) == 6
        for job in jobs.values():  # a spec can be sent as it came
            request = pb.CreatePrefillJobRequest(spec=job.spec)
            assert (await s.prefills.CreatePrefillJob(request)).job.job_id == job.job_id
        assert jobs["custom"].spec.attention.epsilon == 0.0625
        assert not jobs["default"].spec.attention.HasField("epsilon")


async def test_head_budgets_reach_the_ranks_and_the_prefix_id(serve: Serve) -> None:
    budgets = HeadBudgets("model", 0.15, ((0.1, 0.2),))
    async with serve() as s:
        plain = (await s.ended((await create(s)).job_id))[-1]
    async with serve(components={"budgets": budgets}) as s:
        job = (await s.ended((await create(s)).job_id))[-1]
        exact = (await s.ended((await create(s, quality=pb.QUALITY_EXACT)).job_id))[-1]
        shared, other = (task.policy for task in s.executor.tasks)
    assert job.result.prefix_id != plain.result.prefix_id
    key = Manifest.from_json(job.result.manifest_json).attention_key
    assert key == shared.attention_key == f"{BALANCED.attention_key},budgets={budgets.digest}"
    assert shared.budgets == budgets
    assert job.spec == plain.spec  # the request's own words
    assert other == resolve_policy(Quality.EXACT)
    assert Manifest.from_json(exact.result.manifest_json).attention_key == "exact"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"epsilon": 1.0}, "epsilon is 1.0; it must be 0 or more and less than 1"),
        ({"epsilon": -0.1}, "epsilon is -0.1; it must be"),
        ({"epsilon": float("nan")}, "epsilon is nan; it must be"),
        ({"min_kept_mass": 1.5}, "min_kept_mass is 1.5; it must be 0 to 1"),
        ({"quality": pb.QUALITY_CUSTOM}, "quality custom needs an epsilon"),
        ({"quality": pb.QUALITY_HIGH, "epsilon": 0.1}, "epsilon = 0.1 contradicts quality high"),
        ({"quality": pb.QUALITY_EXACT, "epsilon": 0.1}, "epsilon = 0.1 contradicts quality exact"),
        ({"quality": 17}, "quality is 17; it must be one of QUALITY_UNSPECIFIED, QUALITY_EXACT"),
    ],
)
async def test_attention_that_cannot_be_is_refused(
    serve: Serve, fields: dict[str, Any], named: str
) -> None:
    async with serve() as s:
        with pytest.raises(grpc.aio.AioRpcError, match=r"spec\.attention") as error:
            await create(s, **fields)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert named in error.value.details()


async def test_the_report_comes_with_the_result(serve: Serve) -> None:
    async with serve() as s:
        job = (await s.ended((await s.create(frames=12)).job_id))[-1]
        report = job.result.attention
        assert (report.quality, report.epsilon, report.min_kept_mass) == (
            pb.QUALITY_BALANCED,
            BALANCED.epsilon,
            BALANCED.min_kept_mass,
        )
        assert report.floor_met
        assert report.sparse_from_tokens == 64
        total = report.total
        assert total.density == pytest.approx(0.4 * (1 + 1 / 2 + 1 / 3) / 3)
        assert total.sampled_rows == 303
        assert total.kept_mass_mean == pytest.approx(0.9)
        assert total.kept_mass_min == pytest.approx(0.8)
        assert total.kept_mass_p5 == pytest.approx(0.81, abs=0.002)
        assert total.output_error_mean == pytest.approx(0.05)
        assert total.output_error_p95 == pytest.approx(0.095, abs=0.002)
        assert (total.tiles, total.tiles_redone, total.tiles_dense) == (60, 6, 3)
        assert [d.ToMilliseconds() for d in (total.select, total.attend, total.certify)] == [
            750,
            3000,
            375,
        ]
        assert [layer.layer for layer in report.layers] == [0, 1, 2]
        assert list(report.layers[1].head_density) == [0.25, 0.15]
        assert report.layers[1].measures.density == pytest.approx(0.2)
        assert report.layers[1].measures.attend.ToMilliseconds() == 1000

        detail = await inspect(s, job.job_id)
        assert detail.attention == report
        assert (detail.block_map.layer, detail.block_map.kv_head) == (2, 1)
        assert (detail.block_map.rows, detail.block_map.columns) == (4, 4)
        assert list(detail.block_map.density)[:6] == [1.0, -1.0, -1.0, -1.0, 0.25, 1.0]
        assert [patch.mass for patch in detail.patches] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
        seconds = [patch.time.ToNanoseconds() / 1e9 for patch in detail.patches]
        assert seconds[0] == 0
        assert seconds == sorted(set(seconds))
        assert detail.job.result.manifest_json == ""
        listed = (await s.prefills.ListPrefillJobs(pb.ListPrefillJobsRequest())).jobs[0]
        assert listed.result.attention.total == total
        assert not listed.result.attention.layers


async def test_exact_has_a_report_too(serve: Serve) -> None:
    async with serve() as s:
        job = (await s.ended((await create(s, quality=pb.QUALITY_EXACT)).job_id))[-1]
        report = job.result.attention
        assert (report.quality, report.epsilon, report.floor_met) == (pb.QUALITY_EXACT, 0, True)
        assert (report.total.density, report.total.kept_mass_mean) == (1, 1)
        assert (report.total.sampled_rows, len(report.layers)) == (0, 0)
        detail = await inspect(s, job.job_id)
        assert not detail.HasField("block_map")
        assert not detail.patches


async def test_policy_and_report_survive_a_restart(serve: Serve) -> None:
    async with serve() as s:
        done = (await s.ended((await s.create(frames=4)).job_id))[-1]
        before = await inspect(s, done.job_id)
        s.executor.step_s = 30
        running = await create(s, quality=pb.QUALITY_FAST)
        await s.until(lambda: len(s.executor.started) == 2)
        assert (await error_of(inspect(s, running.job_id)))[1] == "NO_ATTENTION_REPORT"
        assert (await error_of(inspect(s, "job_x")))[1] == "UNKNOWN_JOB"
    async with serve() as s:
        after = await inspect(s, done.job_id)
        assert after.job.state == pb.JOB_STATE_EVICTED
        assert (after.attention, after.block_map) == (before.attention, before.block_map)
        assert after.patches == before.patches
        resumed = (await s.ended(running.job_id))[-1]
        assert resumed.result.attention.quality == pb.QUALITY_FAST
        assert s.executor.tasks[0].policy == resolve_policy(Quality.FAST)


def test_the_documented_dial_is_the_real_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `QUALITY_(\w+)`[^|]*\| ([0-9.]+) \| ([0-9.]+) \|", text, re.M)
    documented = {name: (float(epsilon), float(floor)) for name, epsilon, floor in rows}
    policies = {q.name: resolve_policy(q) for q in Quality if q is not Quality.CUSTOM}
    assert documented == {n: (p.epsilon, p.min_kept_mass) for n, p in policies.items()}


def test_what_is_exact_in_every_sample_is_exact_in_all_statistics() -> None:
    layer = LayerReport(0, [1.0], 1.0)
    layer.kept_mass.add_values(torch.ones(50))
    total = attention.summarize(
        resolve_policy(Quality.EXACT), AttentionReport(layers=[layer])
    ).total
    assert (total.kept_mass_mean, total.kept_mass_p5, total.kept_mass_min) == (1, 1, 1)
    nothing = attention.summarize(resolve_policy(), AttentionReport()).total
    assert (nothing.sampled_rows, nothing.kept_mass_p5, nothing.kept_mass_min) == (0, 1, 1)


def test_a_missed_floor_is_said() -> None:
    policy = resolve_policy(epsilon=0.1, min_kept_mass=0.95)
    layers = [LayerReport(n, [1.0], 1.0) for n in range(2)]
    layers[0].kept_mass.add_values(torch.tensor([0.97, 0.93]))
    assert attention.summarize(policy, AttentionReport(layers=layers)).floor_met
    layers[1].kept_mass.add_values(torch.tensor([0.97, 0.92]))
    assert not attention.summarize(policy, AttentionReport(layers=layers)).floor_met


def test_what_is_kept_is_bounded() -> None:
    patches = 3 * attention.MAX_PATCHES
    frames = 2 * patches - 1  # the last patch is one frame short
    plan: Any = SimpleNamespace(
        frame_indices=np.arange(frames),
        frame_seconds=np.arange(frames) * 0.04,
        patch_grid=(patches, 2, 2),
    )
    report = AttentionReport(patch_mass=[float(i % 3) for i in range(patches)])
    summary = attention.summarize(resolve_policy(), report)
    detail = attention.detail(summary, report, plan)
    assert len(detail.patches) == attention.MAX_PATCHES
    assert detail.patches[:2] == ((0.0, 1.0), (0.24, 1.0))
    assert detail.patches[-1][0] == pytest.approx((patches - 3) * 0.08)
    assert attention.patch_seconds(plan)[-1] == pytest.approx((patches - 1) * 0.08)
