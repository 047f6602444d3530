"""Many questions from a file: bounded concurrency, each file uploaded once, resumable."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from prefill_client._flows import RETRIED_BY_SERVER
from prefill_client._requests import (
    ATTENTION_NAMES,
    FRAME_NAMES,
    build_spec,
    check_names,
    split_video,
)
from prefill_client._retry import Backoff, RetryPolicy
from prefill_client.aio import AsyncClient
from prefill_client.batch._files import BadLine, BatchItem, ResultFile, read_input
from prefill_client.errors import (
    CancelledError,
    CapacityError,
    PrefillError,
    UnavailableError,
)
from prefill_client.types import Answer, UploadProgress, to_dict

# A full queue or pool empties again as answers come in, and a restarted server comes back; a
# broken answer may be asked for again here, for nothing of it was shown yet.
PATIENCE = RetryPolicy(attempts=7, initial_delay_s=0.5, max_delay_s=30.0)
# What every other line would meet too: the batch ends, to be gone on with later.
_FATAL = frozenset({"UNAVAILABLE", "UNAUTHENTICATED"})


class BadInputError(ValueError):
    """The input has bad lines and ``strict`` was asked for. ``lines`` are all of them."""

    def __init__(self, lines: list[BadLine]) -> None:
        first = lines[0].error.message
        more = f" (and {len(lines) - 1} more bad lines)" if len(lines) > 1 else ""
        super().__init__(first + more)
        self.lines = lines


@dataclass
class BatchProgress:
    """How far a batch is. ``total`` counts the lines that this run has to answer."""

    total: int = 0
    skipped: int = 0
    answered: int = 0
    failed: int = 0
    running: int = 0
    interrupted: bool = False
    uploads: dict[str, UploadProgress] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many lines are neither answered nor failed."""
        return self.total - self.answered - self.failed


class BatchOptions(TypedDict, total=False):
    """Options of ``run_batch``.

    Attributes:
        concurrency: questions at a time; 4 by default.
        strict: raise if any line is bad, before anything is asked; off by default.
        retry: how often a line is asked again that met a full or an absent server; ``PATIENCE``
            by default.
        defaults: ``quality``, ``epsilon`` and ``min_kept_mass`` for lines that have none of them.
        stop: when set, questions under way are cancelled and the batch returns.
        on_change: called at each change.
    """

    concurrency: int
    strict: bool
    retry: RetryPolicy
    defaults: Mapping[str, Any] | None
    stop: asyncio.Event | None
    on_change: Callable[[BatchProgress], object] | None


async def run_batch(
    client: AsyncClient,
    input_path: Path,
    output_path: Path,
    errors_path: Path,
    **options: Unpack[BatchOptions],
) -> BatchProgress:
    """Answer the lines of ``input_path`` that ``output_path`` does not answer yet.

    Args:
        client: where to ask.
        input_path: OpenAI-style JSON lines; see ``prefill batch --help``.
        output_path: one line per answer, appended and synced as they come.
        errors_path: one line per failure of this run; what it held before is dropped, for
            the lines it named are asked again.
        options: see ``BatchOptions``.

    Raises:
        BadInputError: ``strict``, and the input has bad lines.
        TypeError: a default is not one of these.
        ValueError: the output holds something else, two of the files are the same, or a default
            is not accepted.
        OSError: a file cannot be read or written.
        PrefillError: the server cannot be reached, or refuses the token.
    """
    paths = [path.resolve() for path in (input_path, output_path, errors_path)]
    if len(set(paths)) < len(paths):
        raise ValueError("input, output and errors must be three files")
    check_names(options, tuple(BatchOptions.__annotations__))
    defaults: Any = options.get("defaults") or {}
    check_names(defaults, ATTENTION_NAMES)
    build_spec("", defaults)  # refused before anything is asked
    items, bad = read_input(input_path)
    for item in items:
        if item.options.keys().isdisjoint((*ATTENTION_NAMES, "comparison")):
            item.options.update(defaults)
    with (
        ResultFile(output_path, resume=True) as output,
        ResultFile(errors_path, resume=False) as errors,
    ):
        for line in bad:
            errors.append(_failure(line.custom_id, line.line, line.error))
        if options.get("strict") and bad:
            raise BadInputError(bad)
        todo = _grouped([item for item in items if item.custom_id not in output.done])
        progress = BatchProgress(
            total=len(todo) + len(bad), skipped=len(items) - len(todo), failed=len(bad)
        )
        runner = _Runner(
            client,
            todo,
            output=output,
            errors=errors,
            progress=progress,
            retry=options.get("retry", PATIENCE),
            on_change=options.get("on_change"),
        )
        workers = min(options.get("concurrency", 4), len(todo))
        await runner.run(workers, options.get("stop") or asyncio.Event())
    return progress


def _grouped(items: list[BatchItem]) -> deque[BatchItem]:
    """Questions on the same video, and there on the same prefix, next to each other."""
    groups: dict[str, dict[str, list[BatchItem]]] = {}
    for item in items:
        prefix = repr([item.options.get(name) for name in FRAME_NAMES])
        groups.setdefault(item.video, {}).setdefault(prefix, []).append(item)
    return deque(item for video in groups.values() for same in video.values() for item in same)


class _Runner:
    def __init__(
        self,
        client: AsyncClient,
        todo: deque[BatchItem],
        *,
        output: ResultFile,
        errors: ResultFile,
        progress: BatchProgress,
        retry: RetryPolicy,
        on_change: Callable[[BatchProgress], object] | None,
    ) -> None:
        self._client = client
        self._todo = todo
        self._output = output
        self._errors = errors
        self._progress = progress
        self._retry = retry
        self._on_change = on_change
        self._paths: dict[str, asyncio.Task[str]] = {}
        self._digests: dict[str, asyncio.Task[str]] = {}

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self._progress)

    async def run(self, workers: int, stop: asyncio.Event) -> None:
        self._changed()
        stopping = asyncio.create_task(stop.wait())
        tasks = {asyncio.create_task(self._work()) for _ in range(workers)}
        running = set(tasks)
        try:
            while running and not stopping.done():
                await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
                for worker in [worker for worker in running if worker.done()]:
                    running.remove(worker)
                    worker.result()  # a result that could not be written ends the batch
            self._progress.interrupted = bool(running)
        finally:
            uploads = {*self._paths.values(), *self._digests.values()}
            for task in (stopping, *tasks, *uploads):
                task.cancel()
            await asyncio.gather(stopping, *tasks, *uploads, return_exceptions=True)
            self._progress.running = 0
            self._changed()

    async def _work(self) -> None:
        while self._todo:
            item = self._todo.popleft()
            self._progress.running += 1
            self._changed()
            try:
                answer = await self._answer(item)
            except (PrefillError, OSError) as error:
                if isinstance(error, PrefillError) and error.reason in _FATAL:
                    raise
                self._errors.append(_failure(item.custom_id, item.line, error))
                self._progress.failed += 1
            else:
                self._output.append(_success(item.custom_id, answer))
                self._progress.answered += 1
            finally:
                self._progress.running -= 1
            self._changed()

    async def _answer(self, item: BatchItem) -> Answer:
        options: Any = item.options
        backoff = Backoff(self._retry)
        video_id = await self._video_id(item.video)
        while True:
            try:
                return await self._client.ask(video_id, item.question, **options).result()
            except (CancelledError, CapacityError, UnavailableError) as error:
                # CANCELLED, but not by us: a server that stops ends its calls like that.
                if error.reason in RETRIED_BY_SERVER:
                    raise
                await asyncio.sleep(backoff.delay(error))

    async def _video_id(self, video: str) -> str:
        path = split_video(video)[1]
        if path is None:
            return video
        if path not in self._paths:
            self._paths[path] = asyncio.create_task(self._upload_path(path))
        # Shielded: the others who wait for the file do not want to be cancelled with us.
        return await asyncio.shield(self._paths[path])

    async def _upload_path(self, path: str) -> str:
        digest = await asyncio.to_thread(_sha256, path)
        if digest not in self._digests:
            self._digests[digest] = asyncio.create_task(self._upload(path, digest))
        return await asyncio.shield(self._digests[digest])

    async def _upload(self, path: str, digest: str) -> str:
        def report(progress: UploadProgress) -> None:
            self._progress.uploads[path] = progress
            self._changed()

        try:
            video = await self._client.upload(path, sha256=digest, progress=report)
        finally:
            self._progress.uploads.pop(path, None)
        return video.video_id


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _success(custom_id: str, answer: Answer) -> dict[str, Any]:
    body = to_dict(answer)
    if answer.frames is not None and answer.frames.times_s:  # thousands would swamp the line
        times_s = answer.frames.times_s
        body["frames"] = {"count": len(times_s), "first_s": times_s[0], "last_s": times_s[-1]}
    request_id = body.pop("request_id")
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": 200, "request_id": request_id, "body": body},
        "error": None,
    }


def _failure(custom_id: str | None, line: int, error: PrefillError | OSError) -> dict[str, Any]:
    if isinstance(error, PrefillError):
        reason = error.reason
        message = error.message
        metadata = error.metadata
        request_id = error.request_id
    else:
        reason = "FILE_UNREADABLE"
        message = str(error)
        metadata = {}
        request_id = ""
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": None,
        "error": {
            "reason": reason,
            "message": message,
            "metadata": metadata,
            "request_id": request_id,
            "line": line,
        },
    }
