"""The dial and the report: SDK, command line, picture."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from client_helpers import PREFILL, Api, Cli, make_client

from prefill.v1 import prefill_service_pb2 as pb
from prefill_client import (
    BlockMap,
    Comparison,
    ComparisonMethod,
    Inspection,
    InvalidRequestError,
    LayerAttention,
    PatchAttention,
    Quality,
    to_dict,
)
from prefill_client.cli.picture import draw


async def test_options_and_report(api: Api, server, clip):
    job = await api.call("prefill", clip, wait=True, quality="fast", min_kept_mass=0.7)
    assert (job.spec.quality, job.spec.epsilon) == (Quality.FAST, None)
    assert job.spec.min_kept_mass == 0.7
    report = job.result.attention
    assert (report.quality, report.epsilon, report.sparse_from_tokens) == (Quality.FAST, 0.1, 512)
    assert report.floor_met
    assert (report.total.density, report.total.attend_s) == (0.25, 1.5)
    assert [layer.head_density for layer in report.layers] == [(0.375, 0.125)] * 2
    assert report.layers[1].measures.tiles_redone == 4
    video = job.spec.video_id
    await api.answer(video, "Who?", epsilon=0.05)
    await api.answer(video, "Who?", quality=Quality.EXACT)
    await api.answer(video, "Who?")
    attention = [ask.spec.attention for ask in server.state.asks]
    assert attention[0] == pb.AttentionSpec(epsilon=0.05)
    assert attention[1] == pb.AttentionSpec(quality=pb.QUALITY_EXACT)
    assert not server.state.asks[2].spec.HasField("attention")


async def test_inspection(api: Api, server, clip):
    job = await api.call("prefill", clip, wait=True)
    inspection = await api.call("inspect_job", job.job_id)
    assert inspection.job == job
    assert inspection.attention == job.result.attention
    assert inspection.block_map == BlockMap(1, 0, ((1.0, -1.0, -1.0), (0.5, 1.0, -1.0)))
    assert inspection.patches[1] == PatchAttention(2.0, 1.5)
    assert to_dict(inspection)["attention"]["quality"] == "balanced"
    queued = await api.call("prefill", clip, quality="exact")
    with pytest.raises(InvalidRequestError) as caught:
        await api.call("inspect_job", queued.job_id)
    assert caught.value.reason == "NO_ATTENTION_REPORT"


async def test_a_published_method(api: Api, server, clip):
    job = await api.call(
        "prefill", clip, wait=True, comparison="star", comparison_question="Who?", anchor_tokens=30
    )
    assert job.spec.comparison == Comparison(ComparisonMethod.STAR, "Who?", 30, None)
    await api.answer(job.spec.video_id, "Who?", comparison=ComparisonMethod.SPAVA)
    wanted = pb.ComparisonSpec(method=pb.COMPARISON_METHOD_SPAVA)  # the question is asked anyway
    assert server.state.asks[0].spec.comparison == wanted
    assert not server.state.asks[0].spec.HasField("attention")
    plain = await api.call("prefill", clip, wait=True)
    assert plain.spec.comparison is None


async def test_bad_options_are_named(api: Api, server, clip):
    with pytest.raises(ValueError, match="comparison = 'flash' is not accepted"):
        await api.call("prefill", clip, comparison="flash")
    with pytest.raises(ValueError, match=r"anchor_tokens = 3 .* without a comparison: spava"):
        await api.call("prefill", clip, anchor_tokens=3)
    with pytest.raises(ValueError, match="quality = 'best' is not accepted; expected one of exact"):
        await api.call("prefill", clip, quality="best")
    with pytest.raises(TypeError, match="epsilon = 'much' is not accepted"):
        await api.call("prefill", clip, epsilon="much")
    assert not server.state.calls


async def test_a_server_without_reports(kind, server, clip):
    api = Api(make_client(kind, server.address))
    job = await api.call("prefill", clip, wait=True)
    server.state.jobs[job.job_id].result.ClearField("attention")
    assert (await api.call("job", job.job_id)).result.attention is None


def test_command_line(cli: Cli, server, clip):
    run = cli.run("ask", clip, "Who?", "--quality", "high")
    assert "; attention high, density 0.25, kept mass 0.950 (5 % of the samples below" in run.stderr
    assert server.state.asks[0].spec.attention.quality == pb.QUALITY_HIGH
    run = cli.run("start", "--wait", clip, "--epsilon", "0.05", "--min-kept-mass", "0.9")
    assert "attention balanced, density 0.25" in run.stdout  # the fake's word
    spec = list(server.state.jobs.values())[-1].spec.attention
    assert (spec.epsilon, spec.min_kept_mass) == (0.05, 0.9)
    run = cli.run("ask", clip, "Who?", "--quality", "exact")
    assert "; attention exact, density 1.00; job_" in run.stderr
    run = cli.run(
        "start",
        clip,
        "--comparison",
        "apb",
        "--comparison-question",
        "Who?",
        "--passing-tokens",
        "7",
    )
    assert run.returncode == 0
    assert list(server.state.jobs.values())[-1].spec.comparison == pb.ComparisonSpec(
        method=pb.COMPARISON_METHOD_APB, question="Who?", passing_tokens=7
    )
    run = cli.run("ask", clip, "Who?", "--quality", "best")
    assert (run.returncode, "invalid choice: 'best'" in run.stderr) == (2, True)
    run = cli.run("start", clip, "--quality", "fast", "--epsilon", "0.1")
    assert (run.returncode, "not allowed with" in run.stderr) == (2, True)


def test_batch_defaults_are_for_lines_without_their_own(cli: Cli, server, clip, tmp_path):
    own = [{}, {"quality": "fast"}, {"epsilon": 0.05}, {"min_kept_mass": 0.5}, {"fps": 1.0}]
    lines = [
        {"custom_id": str(number), "body": {"video": str(clip), "question": "Who?", **options}}
        for number, options in enumerate(own)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = cli.run(
        "batch", "in.jsonl", "-o", "out.jsonl", "--quality", "exact", "--concurrency", "1"
    )
    assert run.returncode == 0, run.stderr
    exact = pb.AttentionSpec(quality=pb.QUALITY_EXACT)
    got = [ask.spec.attention for ask in server.state.asks]
    for expected in (
        pb.AttentionSpec(quality=pb.QUALITY_FAST),
        pb.AttentionSpec(epsilon=0.05),
        pb.AttentionSpec(min_kept_mass=0.5),
    ):
        assert got.count(expected) == 1
    assert got.count(exact) == 2
    run = cli.run("batch", "in.jsonl", "-o", "new.jsonl", "--quality", "best")
    assert run.returncode == 2


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_inspect(cli: Cli, server, clip, tmp_path):
    job_id = cli.run("start", "--wait", "-q", clip).stdout.split()[0]
    run = cli.run("inspect", job_id)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == job_id
    assert run.stdout.strip().endswith(f"{job_id}.png")
    assert png_size(tmp_path / f"{job_id}.png") > (800, 500)
    run = cli.run("inspect", job_id, "--json")
    record = json.loads(run.stdout)
    assert record["block_map"]["density"][1] == [0.5, 1.0, -1.0]
    assert record["attention"]["layers"][0]["measures"]["kept_mass_p5"] == 0.875
    assert len(list(tmp_path.glob("*.png"))) == 1  # --json alone draws nothing
    run = cli.run("inspect", job_id, "-o", "b.pdf")
    assert (run.returncode, "'b.pdf' is not the name of a .png file" in run.stderr) == (2, True)
    run = cli.run("inspect", "job_x")
    assert (run.returncode, run.stderr) == (1, "prefill: no job 'job_x' [UNKNOWN_JOB]\n")
    run = cli.run("inspect", job_id, "-o", "nowhere/b.png", "--json")
    assert (run.returncode, run.stdout, "No such file" in run.stderr) == (1, "", True)


def test_inspect_without_matplotlib(cli: Cli, server, clip, tmp_path):
    """A module of that name that cannot be imported stands before the real one."""
    (tmp_path / "path" / "matplotlib").mkdir(parents=True)
    (tmp_path / "path" / "matplotlib" / "__init__.py").write_text("raise ImportError('gone')\n")
    job_id = cli.run("start", "--wait", "-q", clip).stdout.split()[0]
    environment = {
        **os.environ,
        "PREFILL_ADDRESS": server.address,
        "PYTHONPATH": str(tmp_path / "path"),
    }
    run = subprocess.run(
        [PREFILL, "inspect", job_id],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "pip install 'prefill-client[inspect]'" in run.stderr
    assert run.stderr.count("\n") == 1
    run = subprocess.run(
        [PREFILL, "inspect", job_id, "--json"],
        env=environment,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0


@pytest.fixture
async def inspection(server, clip) -> Inspection:
    client = make_client("async", server.address)
    job = await client.prefill(clip, wait=True)
    found = await client.inspect_job(job.job_id)
    await client.close()
    return found


def test_pictures_of_all_kinds(inspection: Inspection, tmp_path):
    """Equal in size, unequal in content; nothing at all is drawable too."""
    layer = inspection.attention.layers[0]
    many = tuple(LayerAttention(n, layer.measures, (0.5,) * 32) for n in range(47))
    kinds = {
        "sparse": inspection,
        "big": replace(inspection, attention=replace(inspection.attention, layers=many)),
        "exact": replace(
            inspection,
            attention=replace(inspection.attention, layers=()),
            block_map=None,
            patches=inspection.patches[:1],
        ),
        "nothing": replace(
            inspection,
            attention=replace(inspection.attention, layers=()),
            block_map=None,
            patches=(),
        ),
    }
    for name, kind in kinds.items():
        draw(kind, tmp_path / f"{name}.png")
    assert len({png_size(tmp_path / f"{name}.png") for name in kinds}) == 1
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in kinds}) == len(kinds)
