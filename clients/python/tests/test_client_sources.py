"""What may be uploaded beside the path of a file, and what is refused before a call is made."""

from __future__ import annotations

import gc
import io
import os
import tempfile
import threading
from pathlib import Path

import pytest
from client_helpers import Api, write_clip
from fake_backend import MAGIC

from prefill_client import ArgumentError, UploadProgress

BYTES = MAGIC + bytes(range(256)) * 4000  # 1 MB: four chunks


def sent(server, video) -> bytes:
    return bytes(server.state.data[video.video_id])


class Stream(io.RawIOBase):
    """Can be read once, a few bytes at a time."""

    def __init__(self, data: bytes, most: int = 100_000) -> None:
        self._rest = memoryview(data)
        self._most = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self._rest[: min(self._most, len(buffer))]
        buffer[: len(piece)] = piece
        self._rest = self._rest[len(piece) :]
        return len(piece)


class Response:
    """As HTTP libraries have them: ``read``, and nothing else of a file."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


@pytest.mark.parametrize(
    "what",
    [
        BYTES,
        bytearray(BYTES),
        memoryview(b"xx" + BYTES)[2:],
        io.BytesIO(BYTES),
        Stream(BYTES),
        Response(BYTES),
    ],
    ids=lambda what: type(what).__name__,
)
async def test_bytes_and_files(kind, api: Api, server, what):
    if isinstance(what, io.BytesIO):
        what.seek(0)
    elif isinstance(what, Stream | Response):
        what = type(what)(BYTES)
    seen: list[UploadProgress] = []
    video = await api.call("upload", what, progress=seen.append)
    assert sent(server, video) == BYTES
    assert video.display_name == "upload"
    assert {p.phase for p in seen} == {"hash", "upload", "probe"}
    assert max(p.done for p in seen if p.phase == "hash") == len(BYTES)
    # The same bytes in another shape are the same video.
    assert (await api.call("upload", io.BytesIO(BYTES + b"more"))).video_id != video.video_id
    assert (await api.call("upload", bytes(BYTES))).video_id == video.video_id


async def test_an_open_file_is_read_from_where_it_stands(api: Api, server, tmp_path):
    path = tmp_path / "clip.bin"
    path.write_bytes(b"header" + BYTES)
    with path.open("rb") as file:
        file.seek(6)
        server.faults.break_upload_after = [1, 1]
        video = await api.call("upload", file, display_name=None)
        assert sent(server, video) == BYTES
        assert video.display_name == "clip.bin"
        assert not file.closed
        assert server.state.calls["UploadChunks"] == 3
        file.seek(6)
        assert (await api.answer(file, "Who?")).video_id == video.video_id


async def test_a_pipe_is_sent_and_resumed(api: Api, server):
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as pipe:
            pipe.write(BYTES)

    thread = threading.Thread(target=write)
    thread.start()
    server.faults.break_upload_after = [300_000]
    with os.fdopen(reading, "rb") as pipe:
        video = await api.call("upload", pipe)
    thread.join()
    assert sent(server, video) == BYTES
    assert server.state.calls["UploadChunks"] == 2


async def test_a_fifo_is_read_once(api: Api, server, tmp_path):
    path = tmp_path / "fifo.mp4"
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(BYTES,))
    thread.start()
    video = await api.call("upload", path)
    thread.join()
    assert (video.display_name, sent(server, video)) == ("fifo.mp4", BYTES)


@pytest.mark.parametrize("name", ["plain.mp4", "with space #1?.mp4", "ümläut%20.mp4"])
async def test_file_urls(api: Api, server, tmp_path, name):
    path = write_clip(tmp_path / name, 1)
    for url in (path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
        video = await api.call("upload", url)
        assert video.display_name == name
        assert (await api.answer(url, "Who?")).video_id == video.video_id
    assert server.state.calls["UploadChunks"] == 1


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("https://example.com/a.mp4", "URLs are not fetched; download it first, .* curl -LO"),
        ("HTTP://example.com/a.mp4", "URLs are not fetched; download it first"),
        (Path("https://example.com/a.mp4"), "https:/example.com/a.mp4' .* not fetched"),
        ("s3://bucket/a.mp4", "not fetched; download it first, for example with aws s3 cp"),
        ("gs://bucket/a.mp4", "gcloud storage cp"),
        ("rtsp://camera/1", "not fetched; fetch it first"),
        ("data:video/mp4;base64,AAAA", r"give upload\(\) the decoded bytes"),
        ("file://server/share/a.mp4", "a file:// URL of this machine"),
        ("file:///tmp/a#1.mp4", "%3F and %23"),
        ("file://localhost", "with an absolute path"),
        ("", "the path of a file"),
        ("a\0.mp4", "the path of a file"),
        ("half \ud83d.mp4", "the path of a file"),
        (io.StringIO("text"), r"open for bytes: open\(path, 'rb'\)"),
        (memoryview(b"abcdef")[::2], "contiguous bytes"),
    ],
    ids=range(15),
)
async def test_what_cannot_be_uploaded_is_refused(api: Api, server, what, named):
    with pytest.raises(ArgumentError, match=named):
        await api.call("upload", what)
    with pytest.raises(ArgumentError, match=named):
        await api.answer(what, "Who?")
    assert not server.state.calls


async def test_files_that_do_not_read_bytes_are_refused(api: Api, server, tmp_path):
    class Async:
        async def read(self, size: int = -1) -> bytes:
            return BYTES

    class Text:
        def read(self, size: int = -1) -> str:
            return "text"

    class Whole:
        """As httpx.Response: read() takes no size."""

        def read(self) -> bytes:
            return BYTES

    class WholeLater:
        """As aiohttp.ClientResponse."""

        async def read(self) -> bytes:
            return BYTES

    closed = io.BytesIO(BYTES)
    closed.close()
    for what, named in (
        (Async(), "returns bytes, not coroutine"),
        (Text(), "returns bytes, not str"),
        (closed, "this one is closed"),
        (Whole(), r"whose read\(\) takes a size; of an HTTP response .* give the bytes"),
        (WholeLater(), r"whose read\(\) takes a size"),
    ):
        with pytest.raises(ArgumentError, match=named):
            await api.call("upload", what)
    assert not server.state.calls


async def test_what_a_file_raises_is_raised(api: Api, server):
    class Broken(io.BytesIO):
        reads = 0

        def __init__(self, broken_at: int) -> None:
            super().__init__(BYTES)
            self._broken_at = broken_at

        def read(self, size=-1):
            self.reads += 1
            if self.reads == self._broken_at:
                raise RuntimeError("the cable is out")
            return super().read(size)

    for broken_at in (1, 4):  # while it is hashed, and while it is sent
        with pytest.raises(RuntimeError, match="the cable is out"):
            await api.call("upload", Broken(broken_at))


async def test_the_copy_of_a_stream_is_removed(api: Api, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened: list[object] = []
    original = tempfile.TemporaryFile

    def watched(*args, **kwargs):
        opened.append(original(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    await api.call("upload", Stream(BYTES))
    with pytest.raises(RuntimeError):
        await api.call("upload", Failing())
    gc.collect()
    assert [file.closed for file in opened] == [True, True]
    assert list(tmp_path.iterdir()) == []


class Failing(Stream):
    def __init__(self) -> None:
        super().__init__(BYTES)

    def readinto(self, buffer) -> int:
        if len(self._rest) < 500_000:
            raise RuntimeError("the stream broke")
        return super().readinto(buffer)


async def test_a_full_disk_says_where(api: Api, server, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left .* is copied to .* until it is sent"):
        await api.call("upload", Stream(BYTES))
    assert not server.state.calls
