"""Entry point of the sandboxed decoder: ``python -m prefill_service.video.decoder.child``.

Its argument is the parent's process id. One request comes through the socket on stdin, as two
descriptors: a file with the message (``wire``), and the video; no path reaches this process. It may
be a long time in coming, and never come (``spares``). Answers go to stdout. Nothing heavier than
PyAV and numpy is imported, so that a start costs a tenth of a second.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import av
import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import limit_exceeded, silence_ffmpeg
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.protocol import (
    Header,
    index_from_message,
    index_to_message,
    read_message,
    write_message,
)
from prefill_service.video.decoder.readers.base import reader_class
from prefill_service.video.decoder.rlimits import (
    ResourceLimits,
    confine_files,
    confine_resources,
    die_with,
)


def main() -> None:
    """Serve one request. An error is an answer too; the exit code is 0 for both."""
    die_with(int(sys.argv[1]))
    out = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not garble the answer
    with socket.socket(fileno=os.dup(0)) as requests:
        _, given, _, _ = socket.recv_fds(requests, 1, 2)
    if not given:  # not needed any more
        return
    with os.fdopen(given[0], "rb") as file:
        request, payload = read_message(file)
    os.chdir(request["folder"])
    confine_resources(ResourceLimits(**request["resources"]))
    limits = VideoConfig(**request["limits"])
    silence_ffmpeg()
    try:
        _serve(request, payload, given[1], limits, out)
    except BrokenPipeError:  # the parent has seen enough
        return
    except Exception as error:
        write_message(out, {"type": "error", "error": _to_service(error, limits).to_dict()})


def _serve(request: Header, payload: bytes, video: int, limits: VideoConfig, out: int) -> None:
    open_reader = reader_class(limits.reader)
    # PyAV and Python import some modules late, so their folders stay readable.
    confine_files(video, (Path(av.__file__).parents[1], Path(os.__file__).parent))
    path = f"/proc/self/fd/{video}"
    if request["type"] == "index":
        write_message(out, *index_to_message(build_index(path, limits)))
        return
    index, rest = index_from_message(request["index"], payload)
    targets = np.frombuffer(rest, np.int64).tolist()
    reader = open_reader(path, index, limits, request["threads"])
    for target, frame in zip(targets, reader.frames(targets), strict=True):
        write_message(out, {"type": "frame", "frame": target}, frame.data.cast("B"))


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
