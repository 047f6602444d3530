from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from dataclasses import replace

import pytest
from client_helpers import Api, make_client, until, write_clip

from prefill_client import InvalidVideoError, UnavailableError, UploadError, VideoState
from prefill_client._requests import upload_request_id
from prefill_client._retry import Backoff, Contact, RetryPolicy
from prefill_client.errors import PrefillError

CHUNK = 256 << 10


def test_upload_request_id_is_a_stable_uuid4():
    first = upload_request_id("ab" * 32, 5, "a.mp4")
    assert uuid.UUID(first).version == 4
    assert uuid.UUID(first).variant == uuid.RFC_4122
    assert first == upload_request_id("ab" * 32, 5, "a.mp4")
    others = [("ab" * 32, 6, "a.mp4"), ("cd" * 32, 5, "a.mp4"), ("ab" * 32, 5, "b.mp4")]
    assert len({first, *(upload_request_id(*other) for other in others)}) == 4


def test_giving_up_tells_what_the_server_said_last():
    backoff = Backoff(RetryPolicy(attempts=3))
    backoff.delay(PrefillError("SHUTTING_DOWN", "the service is stopping"))
    backoff.delay(PrefillError("INTERNAL", "Internal error from Core"))
    with pytest.raises(PrefillError, match="the service is stopping"):
        backoff.delay(PrefillError("INTERNAL", "Internal error from Core"))


def test_a_server_that_was_there_is_waited_for():
    away = PrefillError("UNAVAILABLE", "connection refused")
    policy = RetryPolicy(attempts=2, initial_delay_s=0.001, reconnect_s=60.0)
    contact = Contact()
    never_met = Backoff(policy, contact)
    never_met.delay(away)
    with pytest.raises(PrefillError, match="connection refused"):
        never_met.delay(away)
    Backoff(policy, contact).reset()  # another call of the same client has got an answer
    met = Backoff(policy, contact)
    for _ in range(20):
        met.delay(away)
    with pytest.raises(PrefillError, match="no vLLM"):  # the server is there: that is no restart
        met.delay(PrefillError("DECODER_UNAVAILABLE", "no vLLM"))
    with pytest.raises(PrefillError, match="connection refused"):
        Backoff(RetryPolicy(attempts=1), contact).delay(away)
    impatient = Backoff(replace(policy, reconnect_s=0.0), contact)
    impatient.delay(away)
    with pytest.raises(PrefillError, match="connection refused"):
        impatient.delay(away)


def test_without_a_word_of_the_server_its_absence_is_told():
    silent = Backoff(RetryPolicy(attempts=1))
    with pytest.raises(PrefillError, match="Internal error from Core"):
        silent.delay(PrefillError("INTERNAL", "Internal error from Core"))


async def test_upload(api: Api, server, clip):
    seen = []
    video = await api.call("upload", clip, progress=seen.append, display_name="Clip")
    assert video.state is VideoState.READY
    assert (video.display_name, video.size_bytes) == ("Clip", clip.stat().st_size)
    assert video.sha256 == hashlib.sha256(clip.read_bytes()).hexdigest()
    assert (video.info.frame_count, video.info.duration_s) == (100, 4.0)
    assert video.create_time.tzinfo is not None
    assert bytes(server.state.data[video.video_id]) == clip.read_bytes()
    phases = list(dict.fromkeys(p.phase for p in seen))
    assert phases == ["hash", "upload", "probe"]
    assert max(p.done for p in seen if p.phase == "upload") == clip.stat().st_size


async def test_same_file_is_not_sent_again(api: Api, server, clip, tmp_path):
    first = await api.call("upload", clip)
    received = server.state.bytes_received
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    assert (await api.call("upload", copy)).video_id == first.video_id
    assert server.state.bytes_received == received


@pytest.mark.parametrize("breaks", [[CHUNK], [1, CHUNK * 2, 1], [CHUNK] * 6])
async def test_broken_streams_are_resumed(api: Api, server, clip, breaks):
    server.faults.break_upload_after = list(breaks)
    video = await api.call("upload", clip)
    assert bytes(server.state.data[video.video_id]) == clip.read_bytes()
    # Nothing that was committed is sent twice, and more breaks than tries are no problem
    # as long as each try gets further.
    assert server.state.bytes_received == clip.stat().st_size
    assert server.state.calls["UploadChunks"] == len(breaks) + 1


async def test_upload_gives_up_when_nothing_gets_through(api: Api, server, clip):
    server.faults.unavailable["UploadChunks"] = 1000
    with pytest.raises(UnavailableError) as caught:
        await api.call("upload", clip)
    assert caught.value.reason == "SHUTTING_DOWN"
    assert server.state.calls["UploadChunks"] == 5


async def test_server_restart_in_mid_upload(kind, server, clip):
    """The process behind the port goes away and comes back with what it had on disk."""
    from prefill_client import RetryPolicy

    policy = RetryPolicy(attempts=2, initial_delay_s=0.1, max_delay_s=0.5)
    api = Api(make_client(kind, server.address, retry=policy, upload_retry=policy))
    server.faults.chunk_delay_s = 0.1
    upload = asyncio.ensure_future(api.call("upload", clip))
    await until(lambda: server.state.bytes_received >= 2 * CHUNK)
    await asyncio.to_thread(server.stop)
    server.faults.chunk_delay_s = 0.0
    await asyncio.sleep(0.3)
    await asyncio.to_thread(server.start)
    video = await upload
    assert bytes(server.state.data[video.video_id]) == clip.read_bytes()
    assert server.state.bytes_received == clip.stat().st_size


async def test_upload_left_by_an_earlier_client_is_found(kind, server, clip):
    server.faults.break_upload_after = [2 * CHUNK]
    first = make_client(kind, server.address, upload_retry=None)
    task = asyncio.ensure_future(_abandon(Api(first), clip))
    await task
    committed = server.state.bytes_received
    assert 0 < committed < clip.stat().st_size
    video = await Api(make_client(kind, server.address)).call("upload", clip)
    assert video.state is VideoState.READY
    assert server.state.bytes_received == clip.stat().st_size
    assert len(server.state.videos) == 1


async def _abandon(api: Api, clip) -> None:
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.phase == "upload" and progress.done:
            raise Stop

    with pytest.raises(Stop):
        await api.call("upload", clip, progress=stop)


async def test_unary_calls_of_an_upload_are_retried(api: Api, server, clip):
    for rpc in ("CreateUpload", "GetVideo", "GetUploadStatus", "FinishUpload"):
        server.faults.unavailable[rpc] = 2
        server.faults.unavailable_after[rpc] = 1
    video = await api.call("upload", clip)
    assert video.state is VideoState.READY
    assert len(server.state.videos) == 1


async def test_upload_again_after_deletion(api: Api, server, clip):
    """The repeated request id brings back the first result, a video that is gone."""
    first = await api.call("upload", clip)
    await api.call("delete_video", first.video_id)
    second = await api.call("upload", clip)
    assert second.video_id != first.video_id
    assert second.state is VideoState.READY


async def test_refused_file(api: Api, server, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    for _ in range(2):  # the second time is refused as well, not found to be "there"
        with pytest.raises(InvalidVideoError) as caught:
            await api.call("upload", text)
        assert caught.value.reason == "NOT_A_VIDEO"
        assert str(caught.value) == "text.mp4 is not a video [NOT_A_VIDEO]"


async def test_wrong_leftover_is_sent_anew(api: Api, server, clip):
    """An earlier process sent something else under this digest: the file had been changed."""
    server.faults.break_upload_after = [CHUNK]
    await _abandon(api, clip)
    (data,) = server.state.data.values()
    data[100] ^= 1
    video = await api.call("upload", clip)
    assert video.state is VideoState.READY
    assert bytes(server.state.data[video.video_id]) == clip.read_bytes()


async def test_file_that_shrinks(api: Api, server, clip):
    def shrink(progress):
        if progress.phase == "hash":
            clip.write_bytes(clip.read_bytes()[: 2 * CHUNK])

    with pytest.raises(UploadError) as caught:
        await api.call("upload", clip, progress=shrink)
    assert caught.value.reason == "FILE_CHANGED"
    assert f"{2 * CHUNK} of {3 * 2 * CHUNK + 17} bytes" in caught.value.message


async def test_stream_ended_early_by_the_server(api: Api, server, clip):
    server.faults.ack_short = 3
    video = await api.call("upload", clip)
    assert bytes(server.state.data[video.video_id]) == clip.read_bytes()


async def test_two_clients_upload_the_same_file(kind, server, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 2, 4 << 20)
    server.faults.chunk_delay_s = 0.005
    apis = [Api(make_client(kind, server.address)) for _ in range(2)]
    first, second = await asyncio.gather(*(api.call("upload", clip) for api in apis))
    assert first.video_id == second.video_id
    assert bytes(server.state.data[first.video_id]) == clip.read_bytes()


async def test_name_that_is_not_utf8(api: Api, server, tmp_path):
    clip = write_clip(tmp_path / os.fsdecode(b"caf\xe9.mp4"), 3, 100)
    assert (await api.call("upload", clip)).display_name == "caf\ufffd.mp4"


async def test_missing_file_and_known_digest(api: Api, server, clip):
    with pytest.raises(FileNotFoundError):
        await api.call("upload", clip.with_name("none.mp4"))
    with pytest.raises(IsADirectoryError):
        await api.call("upload", clip.parent)
    seen = []
    digest = hashlib.sha256(clip.read_bytes()).hexdigest()
    await api.call("upload", clip, sha256=digest, progress=seen.append)
    assert "hash" not in {p.phase for p in seen}
