"""Entry point of the sandboxed decoder: ``python -m prefill_service.video.decoder.child``.

Its argument is the parent's process id. One request comes through the socket on stdin, as two
descriptors: a file with the message (``protocol``), and the video; no path reaches this process.
In a ``DecoderPool`` it waits long for the request, which may never come. Answers go to stdout.
Nothing heavier than PyAV and numpy is imported, so that a start costs a tenth of a second.

The request's header has, beside ``folder``, ``limits`` and ``resources``, a ``type``:

* ``index``, with ``allow_truncated``: the answer is one ``index_to_message``.
* ``frames``, with ``index`` and ``threads``: the payload is the index's and then the wanted frames
  as int64; the answers are one message a frame, [height, width, 3] uint8 RGB. ``unlisted`` in
  its header counts the frames up to it whose size the index does not list.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.parent_death import die_with_parent
from prefill_service.video.decoder.container import limit_exceeded, silence_ffmpeg
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.protocol import (
    Header,
    index_from_message,
    index_to_message,
    read_message,
    write_message,
)
from prefill_service.video.decoder.readers.base import load_reader_class
from prefill_service.video.decoder.readers.pyav import PyAVReader
from prefill_service.video.decoder.sandbox.landlock import confine_files
from prefill_service.video.decoder.sandbox.resource_limits import (
    ResourceLimits,
    confine_resources,
    forgo_privileges,
)
from prefill_service.video.decoder.sandbox.seccomp import confine_system_calls


def main() -> None:
    """Serve one request. An error is an answer too; the exit code is 0 for both."""
    die_with_parent(int(sys.argv[1]))
    forgo_privileges()
    out = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not garble the answer
    with socket.socket(fileno=os.dup(0)) as requests:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 2)
    if not descriptors:  # the parent closed its end: no request will come
        return
    with os.fdopen(descriptors[0], "rb") as file:
        request, payload = read_message(file)
    os.chdir(request["folder"])
    confine_resources(ResourceLimits(**request["resources"]))
    limits = VideoConfig(**request["limits"])
    silence_ffmpeg()
    try:
        for header, data in _answers(request, payload, descriptors[1], limits):
            write_message(out, header, data)
    except BrokenPipeError:  # the parent has closed the session
        return
    except Exception as error:
        write_message(out, {"type": "error", "error": _to_service(error, limits).to_dict()})


def _answers(
    request: Header, payload: bytes, video_fd: int, limits: VideoConfig
) -> Iterator[tuple[Header, bytes | memoryview]]:
    reader_class = load_reader_class(limits.reader)
    # PyAV and Python import some modules late, so their folders stay readable.
    confine_files(video_fd, (Path(av.__file__).parents[1], Path(os.__file__).parent))
    confine_system_calls()
    path = f"/proc/self/fd/{video_fd}"
    if request["type"] == "index":
        allow = request["allow_truncated"]
        yield index_to_message(build_index(path, limits, allow_truncated=allow))
        return
    index, rest = index_from_message(request["index"], payload)
    targets = np.frombuffer(rest, np.int64).tolist()
    # OpenCV scales all frames to the size of the first, and of raw DV it shows the first only.
    if len(index.geometry.sizes) > 1 or index.container == "dv":
        reader_class = PyAVReader
    reader = reader_class.open(path, index, limits, request["threads"])
    for target, frame in zip(targets, reader.frames(targets), strict=True):
        header = {"type": "frame", "frame": target, "unlisted": reader.unlisted}
        yield header, frame.data.cast("B")


def _to_service(error: Exception, limits: VideoConfig) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, MemoryError) or "OutOfMemory" in str(error):  # the latter is OpenCV's
        limit = limits.max_memory_bytes
        return limit_exceeded("max_memory_bytes", limit, limit, "it needs more memory than that")
    traceback.print_exc()  # the parent logs it
    if isinstance(error, av.FFmpegError):
        return ServiceError(Reason.DECODE_FAILED, f"the file cannot be decoded: {error.strerror}")
    return ServiceError(Reason.INTERNAL, f"decoder process failed: {error!r}")


if __name__ == "__main__":
    main()
