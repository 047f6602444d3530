"""Entry point of the sandboxed decoder: ``python -m prefill_service.video.decoder_child``.

Reads one request on stdin, answers on stdout (``wire``). The file is an open descriptor that
the parent passed down; no path reaches this process. Nothing heavier than PyAV and numpy is
imported, so that a start costs a third of a second.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import av
import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.confine import ResourceLimits, confine_files, confine_resources
from prefill_service.video.container import limit_exceeded, silence_ffmpeg
from prefill_service.video.indexing import build_index
from prefill_service.video.readers import reader_class
from prefill_service.video.wire import (
    Header,
    index_from_message,
    index_to_message,
    read_message,
    write_message,
)


def main() -> None:
    """Serve one request. An error is an answer too; the exit code is 0 for both."""
    out = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not garble the answer
    request, payload = read_message(sys.stdin.buffer)
    confine_resources(ResourceLimits(**request["resources"]), request["parent_pid"])
    limits = VideoConfig(**request["limits"])
    silence_ffmpeg()
    try:
        _serve(request, payload, limits, out)
    except BrokenPipeError:  # the parent has seen enough
        return
    except Exception as error:
        write_message(out, {"type": "error", "error": _to_service(error, limits).to_dict()})


def _serve(request: Header, payload: bytes, limits: VideoConfig, out: int) -> None:
    open_reader = reader_class(limits.reader)
    # PyAV and Python import some modules late, so their folders stay readable.
    confine_files(request["fd"], (Path(av.__file__).parents[1], Path(os.__file__).parent))
    path = f"/proc/self/fd/{request['fd']}"
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
