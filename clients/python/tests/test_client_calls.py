from __future__ import annotations

import json
import time

import pytest
from client_helpers import Api, Cli, make_client, write_clip

import prefill_client
from prefill_client import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    JobState,
    NotFoundError,
    RetryPolicy,
    Stage,
    UnavailableError,
    to_dict,
)


async def test_videos_are_paged(api: Api, server, tmp_path):
    ids = [
        (await api.call("upload", write_clip(tmp_path / f"{n}.mp4", n, 100))).video_id
        for n in range(5)
    ]
    assert [v.video_id for v in await api.collect("videos", page_size=2)] == ids[::-1]
    assert server.state.calls["ListVideos"] == 3
    await api.call("delete_video", ids[0])
    with pytest.raises(NotFoundError):
        await api.call("delete_video", ids[0])
    assert len(await api.collect("videos")) == 4


async def test_delete_that_worked_though_its_answer_was_lost(api: Api, server, clip):
    video = await api.call("upload", clip)
    server.faults.unavailable_after["DeleteVideo"] = 1
    await api.call("delete_video", video.video_id)
    assert server.state.videos == {}
    assert server.state.calls["DeleteVideo"] == 2


async def test_import(api: Api):
    video = await api.call("import_video", "/allowed/a.mp4", display_name="A")
    assert video.display_name == "A"


async def test_prefill_and_wait(api: Api, server, clip):
    seen = []
    job = await api.call("prefill", clip, wait=True, on_progress=seen.append, fps=2.0)
    assert job.state is JobState.SUCCEEDED
    assert job.spec.fps == 2.0
    assert job.spec.num_frames is None
    assert job.result.grid_thw == (4, 20, 20)
    assert (job.result.shards[0].end_token, job.result.shards[0].rank) == (810, 1)
    assert [s.stage for s in job.progress] == [Stage.DECODE] * 2 + [Stage.VISION] * 2 + [
        Stage.PREFILL
    ] * 2
    assert job.progress[0].elapsed_s == 1.5
    assert seen[0].state is JobState.QUEUED
    assert to_dict(job)["state"] == "SUCCEEDED"
    again = await api.call("prefill", job.spec.video_id, fps=2.0)
    assert again.job_id == job.job_id
    assert [j.job_id for j in await api.collect("jobs")] == [job.job_id]
    assert (await api.call("job", job.job_id)) == job


async def test_failed_job_raises_its_reason(api: Api, server, clip):
    server.faults.job_error = ("RANK_DIED", "rank 1 was killed by signal 9")
    with pytest.raises(UnavailableError, match="rank 1 was killed") as caught:
        await api.call("prefill", clip, wait=True)
    assert caught.value.reason == "RANK_DIED"
    assert server.state.prefills == 1


async def test_watch_survives_breaks_and_cancel(api: Api, server, clip):
    job = await api.call("prefill", clip)
    server.faults.watch_break = 3
    states = [j.state for j in await api.collect("watch_job", job.job_id)]
    assert states[-1] is JobState.SUCCEEDED
    assert server.state.calls["WatchPrefillJob"] == 4
    other = await api.call("prefill", clip, fps=1.0)
    assert (await api.call("cancel_job", other.job_id)).state is JobState.CANCELLED
    with pytest.raises(CancelledError):
        await api.call("wait_job", other.job_id)
    with pytest.raises(NotFoundError):
        await api.collect("watch_job", "job_none")


async def test_unavailable_is_retried_within_bounds(api: Api, server, clip):
    video = await api.call("upload", clip)
    server.faults.unavailable["GetVideo"] = 4
    assert (await api.call("video", video.video_id)) == video
    server.faults.unavailable["GetVideo"] = 5
    with pytest.raises(UnavailableError):
        await api.call("video", video.video_id)


async def test_retry_info_is_honoured(api: Api, server, clip):
    video = await api.call("upload", clip)
    server.faults.unavailable["GetVideo"] = 1
    server.faults.retry_after_s = 0.5
    start = time.monotonic()
    await api.call("video", video.video_id)
    assert time.monotonic() - start >= 0.5
    # Longer than we are ready to wait: the caller is told at once.
    server.faults.unavailable["GetVideo"] = 1
    server.faults.retry_after_s = 30.0
    with pytest.raises(UnavailableError) as caught:
        await api.call("video", video.video_id)
    assert caught.value.retry_after_s == 30.0


async def test_other_errors_are_not_retried(api: Api, server):
    with pytest.raises(NotFoundError):
        await api.call("video", "vid_none")
    assert server.state.calls["GetVideo"] == 1


async def test_no_server(kind):
    api = Api(make_client(kind, "localhost:1", retry=RetryPolicy(2, 0.01)))
    with pytest.raises(UnavailableError) as caught:
        await api.call("video", "vid_1")
    assert caught.value.reason == "UNAVAILABLE"


async def test_timeout_of_a_call(kind, server, clip):
    server.faults.unary_delay_s = 5.0
    api = Api(make_client(kind, server.address, timeout=0.2))
    with pytest.raises(DeadlineExceededError):
        await api.call("video", "vid_1")


async def test_token_is_sent(kind, server, clip):
    api = Api(make_client(kind, server.address, token="s3cret"))
    await api.call("upload", clip)
    assert server.state.metadata["authorization"] == "Bearer s3cret"
    with pytest.raises(ValueError, match="one line of ASCII"):
        make_client(kind, server.address, token="a\nb")


async def test_unknown_option(api: Api, server, clip):
    with pytest.raises(TypeError, match="unknown option 'max_tokens'"):
        await api.call("prefill", clip, max_tokens=3)
    with pytest.raises(ValueError, match="sample_by = 'scene' is not accepted; expected one of f"):
        await api.call("prefill", clip, sample_by="scene")
    with pytest.raises(TypeError, match="fps = 'fast' is not accepted"):
        await api.call("prefill", clip, fps="fast")
    assert not server.state.calls  # refused before anything was sent


def test_both_clients_have_the_same_methods():
    import inspect

    def public(cls):
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(cls).items()
            if not name.startswith("_") and inspect.isfunction(member)
        }

    assert public(prefill_client.Client) == public(prefill_client.AsyncClient)
    assert public(prefill_client.AnswerStream) == public(prefill_client.AsyncAnswerStream)


async def test_trace_is_the_servers_text_also_after_a_break(api: Api, server, clip):
    job = await api.call("prefill", clip, wait=True)
    server.faults.trace_break = 1
    trace = json.loads(await api.call("trace_job", job.job_id))
    assert [event["ph"] for event in trace["traceEvents"]] == ["X", "M"]
    assert trace["traceEvents"][0]["name"] == "naïve"
    assert server.state.calls["TracePrefillJob"] == 2
    with pytest.raises(NotFoundError, match="no job 'job_x'") as caught:
        await api.call("trace_job", "job_x")
    assert caught.value.reason == "UNKNOWN_JOB"
    server.faults.prefill_delay_s = 30
    queued = await api.call("prefill", clip, fps=1.0)
    with pytest.raises(InvalidRequestError) as refused:
        await api.call("trace_job", queued.job_id)
    assert refused.value.reason == "NO_TRACE"


def test_command_writes_the_file_or_the_standard_output(cli: Cli, server, clip, tmp_path):
    job_id = cli.run("start", "--wait", "-q", clip).stdout.split()[0]
    run = cli.run("trace", job_id, "-o", "trace.json")
    assert (run.returncode, run.stdout) == (0, f"{job_id}  1 slices  trace.json\n"), run.stderr
    written = json.loads((tmp_path / "trace.json").read_text())
    assert len(written["traceEvents"]) == 2
    run = cli.run("trace", job_id)
    assert json.loads((tmp_path / f"{job_id}.json").read_text()) == written
    assert json.loads(cli.run("trace", job_id, "-o", "-").stdout) == written
    run = cli.run("trace", "job_x", "-o", "never.json")
    assert (run.returncode, run.stderr) == (1, "prefill: no job 'job_x' [UNKNOWN_JOB]\n")
    assert not (tmp_path / "never.json").exists()
