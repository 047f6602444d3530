from __future__ import annotations

import asyncio
import time

import pytest
from client_helpers import Api, until

from prefill.v1.prefill_service_pb2 import SampleBy
from prefill_client import (
    ArgumentError,
    CancelledError,
    ContextExceededError,
    DeadlineExceededError,
    IntakeProgress,
    InvalidRequestError,
    Message,
    SampledFrames,
    UnavailableError,
)

QUESTION = "What happens after the red car?"
ANSWER = "You asked: What happens after the red car? "


async def test_the_intake_of_a_long_prompt_is_reported(api: Api, server, clip):
    server.faults.intake = (250, 1000)
    seen = []
    await api.stream(api.client.ask(clip, QUESTION, on_intake=seen.append))
    assert seen == [IntakeProgress(250, 1000), IntakeProgress(1000, 1000)]
    server.faults.intake = ()
    await api.stream(api.client.ask(clip, QUESTION, on_intake=seen.append))
    assert len(seen) == 2


async def test_ask_a_path(api: Api, server, clip):
    jobs = []
    uploads = []
    stream = api.client.ask(
        clip,
        QUESTION,
        on_progress=jobs.append,
        on_upload=uploads.append,
        fps=1.0,
        max_frames=900,
        sample_by="time",
        stop="END",
        temperature=0.5,
        max_tokens=100,
        system_prompt="Be brief.",
    )
    assert stream.final is None
    pieces, _ = await api.stream(stream)
    assert "".join(pieces) == stream.text == ANSWER
    assert len(pieces) == 8
    assert stream.token_ids == tuple(range(8))
    final = stream.final
    assert (final.text, final.finish_reason, final.usage.video_tokens) == (ANSWER, "stop", 800)
    assert final.timings.total_s == 1.25
    assert final.frames == SampledFrames((0, 12, 25), (0.0, 0.48, 1.0))
    assert final.video_id in server.state.videos
    assert final.request_id == stream.request_id == server.state.asks[0].request_id
    assert jobs[-1].result is not None
    assert uploads
    request = server.state.asks[0]
    assert list(request.sampling_params.stop) == ["END"]
    assert not request.sampling_params.HasField("top_p")
    assert (request.spec.sampling.fps, request.spec.sampling.max_frames) == (1.0, 900)
    assert SampleBy.Name(request.spec.sampling.by) == "SAMPLE_BY_TIME"
    assert request.spec.system_prompt == "Be brief."


async def test_the_whole_answer_with_id_and_video(api: Api, server, clip):
    video = await api.call("upload", clip)
    first = await api.answer(video, QUESTION)
    second = await api.answer(video.video_id, "And then?", request_id=None)
    assert (first.text, second.text) == (ANSWER, "You asked: And then? ")
    assert server.state.prefills == 1
    assert server.state.calls["UploadChunks"] == 1


async def test_chat(api: Api, server, clip):
    turns = [
        {"role": "system", "content": "Be brief."},
        Message("user", "Who?"),
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Where?"},
    ]
    assert (await api.answer(clip, turns)).text == "You asked: Where? "
    request = server.state.asks[0]
    assert [(m.role, m.text) for m in request.messages] == [(1, "Who?"), (2, "Ann."), (1, "Where?")]
    assert request.spec.system_prompt == "Be brief."
    turns[2] = {"role": "tool", "content": "Ann."}
    with pytest.raises(ArgumentError, match=r"question\[2\]\.role = 'tool' is not accepted"):
        await api.answer(clip, turns)


async def test_errors_keep_their_metadata(api: Api, server, clip):
    with pytest.raises(InvalidRequestError) as caught:
        await api.answer(clip, "  ")
    assert caught.value.reason == "QUESTION_EMPTY"
    with pytest.raises(ContextExceededError) as caught:
        await api.answer(clip, "x" * 2000)
    assert caught.value.metadata == {"tokens": "1200", "limit": "1000"}


async def test_break_before_the_first_token_is_hidden(api: Api, server, clip):
    server.faults.ask_break_before = 2
    assert (await api.answer(clip, QUESTION)).text == ANSWER
    assert len(server.state.asks) == 3


async def test_an_answer_that_breaks_off_goes_on_where_it_was(api: Api, server, clip):
    server.faults.ask_break_after = 3
    stream = api.client.ask(clip, QUESTION)
    pieces, _ = await api.stream(stream)
    assert "".join(pieces) == stream.text == stream.final.text == ANSWER
    assert len(pieces) == 8
    assert stream.token_ids == tuple(range(8))
    first, second = server.state.asks
    assert first == second


async def test_an_answer_that_would_go_on_otherwise_fails_as_it_broke_off(api: Api, server, clip):
    server.faults.ask_break_after = 3
    server.faults.ask_sampled = True
    stream = api.client.ask(clip, QUESTION)
    with pytest.raises(UnavailableError, match="Connection reset by peer"):
        await api.stream(stream)
    assert stream.text == "You asked: What "
    assert stream.final is None
    assert len(server.state.asks) == 2
    await until(lambda: server.state.ask_active == 0)


async def test_dead_ranks_are_not_tried_over_and_over(api: Api, server, clip):
    server.faults.job_error = ("RANK_DIED", "rank 0 died")
    with pytest.raises(UnavailableError, match="rank 0 died"):
        await api.answer(clip, QUESTION)
    assert len(server.state.asks) == 1


async def test_missing_final_message_is_an_error(api: Api, server, clip):
    server.faults.ask_truncate = True
    with pytest.raises(UnavailableError) as caught:
        await api.answer(clip, QUESTION)
    assert caught.value.reason == "STREAM_TRUNCATED"
    assert caught.value.request_id == server.state.asks[0].request_id


@pytest.mark.parametrize("how", ["cancel", "with", "drop"])
async def test_leaving_the_stream_ends_the_work(api: Api, server, clip, how):
    server.faults.token_delay_s = 0.2
    stream = api.client.ask(clip, QUESTION)
    pieces, _ = await api.stream(stream, limit=2)
    assert pieces == ["You ", "asked: "]
    if how == "drop":
        del stream
    elif how == "cancel":
        stream.cancel()
    elif api.is_async:
        async with stream:
            pass
    else:
        with stream:
            pass
    await until(lambda: server.state.ask_cancelled == 1)
    if how != "drop":
        with pytest.raises(CancelledError):
            await api.stream(stream)


async def test_cancel_from_elsewhere(api: Api, server, clip):
    server.faults.token_delay_s = 30.0
    stream = api.client.ask(clip, QUESTION)
    reading = asyncio.ensure_future(api.stream(stream))
    await until(lambda: server.state.ask_active == 1)
    await asyncio.sleep(0.1)
    start = time.monotonic()
    stream.cancel()
    with pytest.raises(CancelledError):
        await reading
    assert time.monotonic() - start < 1
    await until(lambda: server.state.ask_active == 0)


async def test_cancelling_the_task_is_not_swallowed(server, clip):
    from prefill_client import AsyncClient

    server.faults.token_delay_s = 30.0
    async with AsyncClient(server.address) as client:
        task = asyncio.ensure_future(client.ask(clip, QUESTION).result())
        await until(lambda: server.state.ask_active == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: server.state.ask_cancelled == 1)


async def test_timeout(api: Api, server, clip):
    video = await api.call("upload", clip)
    server.faults.prefill_delay_s = 5.0
    with pytest.raises(DeadlineExceededError):
        await api.answer(video, QUESTION, timeout=0.3)
