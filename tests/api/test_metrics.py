"""``/metrics`` over a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefill.v1 import prefill_service_pb2 as pb
from prefill.v1 import video_service_pb2
from prometheus_client.parser import text_string_to_metric_families

from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics
from tests.support.in_process_service import InProcessService, answer, serving

Serve = Callable[..., Any]
ON = {"metrics_address": "127.0.0.1:0"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(s: InProcessService) -> Callable[..., float | None]:
    """``value(name, **labels)`` of what the endpoint says now."""
    async with httpx.AsyncClient(trust_env=False) as client:
        reply = await client.get(f"http://127.0.0.1:{s.service.metrics_port}/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    samples: Samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    return lambda name, **labels: samples.get((f"prefill_{name}", frozenset(labels.items())))


async def test_jobs_attention_and_answers_are_counted(serve: Serve) -> None:
    async with serve(server=ON) as s:
        value = await scrape(s)
        assert value("jobs", state="SUCCEEDED") == 0
        assert value("queue_depth") == 0
        await s.ended((await s.create(frames=8)).job_id)
        await answer(s.ask(frames=8))
        spec = s.spec(frames=10)
        spec.attention.quality = pb.QUALITY_EXACT
        request = pb.CreatePrefillJobRequest(spec=spec)
        await s.ended((await s.prefills.CreatePrefillJob(request)).job.job_id)
        value = await scrape(s)
        assert value("layer_density", layer="0") is None  # the last job was exact
        await s.ended((await s.create(frames=12)).job_id)
        s.executor.step_s = 30
        await s.create(frames=14)
        await s.create(frames=16)
        await s.until(lambda: len(s.executor.started) == 4)

        value = await scrape(s)
        assert value("jobs", state="SUCCEEDED") == 3
        assert (value("jobs", state="RUNNING"), value("jobs", state="QUEUED")) == (1, 1)
        assert value("queue_depth") == 1
        assert value("jobs_ended_total", state="SUCCEEDED") == 3
        assert value("seconds_count", quality="balanced") == 2
        assert value("seconds_sum", quality="balanced") == pytest.approx(0.2)
        assert value("tokens_total", quality="balanced") == 16 * (8 + 12)
        assert value("tokens_total", quality="exact") == 160
        assert value("received_bytes_total") == 3
        assert value("offload_moved_bytes_total") == 3 * 11
        assert value("offload_stalled_seconds_total") == 3 * 0.5
        assert value("layer_density", layer="1") == pytest.approx(0.2)
        assert value("layer_kept_mass", layer="2", statistic="min") == pytest.approx(0.8)
        assert value("layer_output_error", layer="2", statistic="mean") == pytest.approx(0.05)
        assert value("density_count", quality="exact") == 1
        assert value("kept_mass_count", quality="balanced", statistic="p5") == 2
        assert value("kept_mass_count", quality="exact", statistic="p5") is None  # not measured
        assert value("output_error_sum", quality="balanced", statistic="mean") == (
            pytest.approx(0.1)
        )
        assert (value("tiles_total"), value("tiles_redone_total")) == (120, 12)
        assert (value("tiles_dense_total"), value("floor_missed_total")) == (6, 0)
        assert value("attention_seconds_total", phase="select") == 1.5
        assert value("answers_total", finish_reason="stop") == 1
        assert value("answer_tokens_total") == 4
        assert value("handoff_bytes_total") == 1000
        assert value("calls_total", method="AnswerService/Ask", code="OK") == 1


def test_the_documentation_lists_what_there_is() -> None:
    metrics = Metrics()
    metrics.watch_live(dict, lambda: 0, lambda: 0)
    ours = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in metrics.registry.collect()
        if family.name.startswith("prefill_")
    }
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(prefill_\w+)`", text, re.M)) == ours


async def test_ingest_is_counted(serve: Serve, make_video: Callable[..., Path]) -> None:
    data = make_video(seconds=1, seed=3).read_bytes()
    async with serve(server=ON) as s:
        create = video_service_pb2.CreateUploadRequest(
            display_name="a", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        video_id = (await s.videos.CreateUpload(create)).video.video_id

        async def chunks() -> Any:
            yield video_service_pb2.UploadChunksRequest(video_id=video_id, data=data)

        await s.videos.UploadChunks(chunks())
        value = await scrape(s)
        assert value("uploaded_bytes_total") == len(data)
        assert value("calls_total", method="VideoService/UploadChunks", code="OK") == 1


async def test_off_by_default_and_gone_after_the_stop(
    serve: Serve, tmp_path: Path, template: Any
) -> None:
    async with serve() as s:
        assert s.service.metrics_port == 0
    async with serve(server=ON) as s:
        port = s.service.metrics_port
        # A connection that is kept open must not hold up the stop.
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(f"http://127.0.0.1:{port}/metrics")
            other = serving(
                tmp_path / "b", template, server={"metrics_address": f"127.0.0.1:{port}"}
            )
            with pytest.raises(ServiceError, match=f"cannot serve metrics on .*{port}") as error:
                async with other:
                    pass
            assert error.value.reason is Reason.PORT_IN_USE
            s.service.shut_down()
            async with asyncio.timeout(5):
                await s.task
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
