"""The asyncio client: the same methods as ``Client``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Self, Unpack

from prefill_client import _flows
from prefill_client._async import AsyncCancellation, AsyncDriver
from prefill_client._channel import TLS, make_endpoint
from prefill_client._flows import AskState, Callbacks, IntakeCallback, JobCallback, Settings
from prefill_client._retry import RetryPolicy
from prefill_client._upload import UploadCallback
from prefill_client.errors import CancelledError
from prefill_client.types import (
    Answer,
    AskOptions,
    FrameOptions,
    Inspection,
    Job,
    QuestionLike,
    Video,
    VideoLike,
    VideoSource,
)


class AsyncAnswerStream:
    """An answer as it is made: iterate to get its pieces of text.

    The work starts with the first iteration. ``cancel``, the end of an ``async with`` block,
    or dropping the stream ends the call, and with it the work on the server.

    Attributes of interest: ``text`` and ``token_ids`` so far; ``final``, the ``Answer`` once
    the stream has ended; ``request_id``, for the server's logs.
    """

    def __init__(
        self, pieces: AsyncGenerator[str, None], state: AskState, cancellation: AsyncCancellation
    ) -> None:
        self._pieces = pieces
        self._state = state
        self._cancellation = cancellation

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._state.pieces)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids received so far."""
        return tuple(self._state.token_ids)

    @property
    def final(self) -> Answer | None:
        """The whole answer once the stream has ended, None before."""
        return self._state.final

    @property
    def request_id(self) -> str:
        """The id under which the server's logs have the request."""
        return self._state.request_id

    def cancel(self) -> None:
        """End the call; a task that iterates gets CancelledError. Without effect at the end."""
        self._cancellation.cancel()

    async def result(self) -> Answer:
        """Wait for the end and return the whole answer."""
        async for _ in self:
            pass
        if self.final is None:
            raise CancelledError(
                "CANCELLED", "the answer was abandoned", request_id=self.request_id
            )
        return self.final


class AsyncClient:
    """Talks to a prefill-service from one event loop; close it after use.

    Args:
        address: ``host:port`` of the server, or any gRPC target.
        token: bearer token, if the server wants one.
        tls: True for TLS with the system's CAs, a ``TLS`` for anything else, None for none.
        timeout: seconds for each unary call. Probing an upload may take ``finish_timeout``,
            and answers, job watching and the sending of bytes have no limit of their own.
        finish_timeout: seconds for FinishUpload and ImportVideo, which probe the file.
        retry: how often idempotent calls are made again while the server is UNAVAILABLE.
        upload_retry: the same for an upload, counted since it last got any further.

    Every method raises ``PrefillError``: its subclasses and ``reason`` say why.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        timeout: float = 60.0,
        finish_timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        upload_retry: RetryPolicy | None = None,
    ) -> None:
        self._settings = Settings.of(timeout, finish_timeout, retry, upload_retry)
        self._driver = AsyncDriver(make_endpoint(address, token, tls))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._driver.close()

    async def upload(
        self,
        path: VideoSource,
        *,
        progress: UploadCallback | None = None,
        display_name: str | None = None,
        sha256: str | None = None,
        allow_truncated: bool = False,
    ) -> Video:
        """Upload a file and wait until it is READY.

        A file the server has already is not sent again (by sha256), broken connections are
        resumed, and so is an upload that an earlier process left unfinished.

        Args:
            path: the path or ``file://`` URL of a file, bytes, or a file open for reading bytes,
                which is read from where it stands. One that cannot be read twice, such as a
                pipe or an HTTP response, is copied to a temporary file first.
            progress: called now and then with an ``UploadProgress``.
            display_name: name for people; the file's name by default.
            sha256: the file's digest if known (hexadecimal); saves reading it twice.
            allow_truncated: take what can be read of a file that is cut, with a warning.

        Raises:
            OSError: the file cannot be read.
            ArgumentError: it is another URL, or open for text.
            InvalidVideoError: the server refused the file.
        """
        return await self._driver.run(
            _flows.upload_video(
                self._settings,
                path,
                progress=progress,
                display_name=display_name,
                sha256=sha256,
                allow_truncated=allow_truncated,
            )
        )

    async def import_video(
        self, path: str, *, display_name: str | None = None, allow_truncated: bool = False
    ) -> Video:
        """Let the server read ``path``, a file of its own below one of its import roots."""
        flow = _flows.import_video(
            self._settings, path, display_name, allow_truncated=allow_truncated
        )
        return await self._driver.run(flow)

    async def video(self, video_id: str) -> Video:
        """Return a video as it is now."""
        return await self._driver.run(_flows.get_video(self._settings, video_id))

    def videos(self, *, page_size: int = 0) -> AsyncIterator[Video]:
        """Iterate over all videos, newest first; ``page_size`` a call, 0: as the server likes."""
        return self._driver.iterate(_flows.list_videos(self._settings, page_size))

    async def delete_video(self, video_id: str) -> None:
        """Remove a video and its file."""
        await self._driver.run(_flows.delete_video(self._settings, video_id))

    async def prefill(
        self,
        video: VideoLike,
        *,
        wait: bool = False,
        on_progress: JobCallback | None = None,
        on_upload: UploadCallback | None = None,
        **options: Unpack[FrameOptions],
    ) -> Job:
        """Start the prefill of a video, so that later questions are quick.

        Args:
            video: a ``Video``, the id of one, or what to ``upload`` first.
            wait: return when the job has succeeded, raise if it does not.
            on_progress: called with the ``Job`` at each change, if waiting.
            on_upload: called with ``UploadProgress`` while a path is uploaded.
            options: which frames, the system prompt, and the quality of the attention.
        """
        return await self._driver.run(
            _flows.prefill(
                self._settings,
                video,
                options,
                wait=wait,
                callbacks=Callbacks(on_progress, on_upload),
            )
        )

    async def job(self, job_id: str) -> Job:
        """Return a prefill job as it is now."""
        return await self._driver.run(_flows.get_job(self._settings, job_id))

    def jobs(self, *, page_size: int = 0) -> AsyncIterator[Job]:
        """Iterate over all jobs, newest first; ``page_size`` a call, 0: as the server likes."""
        return self._driver.iterate(_flows.list_jobs(self._settings, page_size))

    async def inspect_job(self, job_id: str) -> Inspection:
        """Return all that was measured of a job's attention, also once it is EVICTED."""
        return await self._driver.run(_flows.inspect_job(self._settings, job_id))

    async def trace_job(self, job_id: str) -> str:
        """Return the timeline of a job that has ended, as JSON that Perfetto opens.

        Chrome's Trace Event Format: a process per rank and one for the service, slices for chunks
        and layers. The server keeps the traces of its latest jobs.
        """
        return await self._driver.run(_flows.trace_job(self._settings, job_id))

    async def cancel_job(self, job_id: str) -> Job:
        """Stop a job; returns it CANCELLED, or as it had ended before."""
        return await self._driver.run(_flows.cancel_job(self._settings, job_id))

    def watch_job(self, job_id: str) -> AsyncIterator[Job]:
        """Iterate over the job now and at each change until it ends; reconnects where needed."""
        return self._driver.iterate(_flows.watch_job(self._settings, job_id))

    async def wait_job(self, job_id: str, *, on_progress: JobCallback | None = None) -> Job:
        """Wait until a job has succeeded; raises the job's error if it does not."""
        return await self._driver.run(_flows.wait_job(self._settings, job_id, on_progress))

    def ask(
        self,
        video: VideoLike,
        question: QuestionLike,
        *,
        on_progress: JobCallback | None = None,
        on_upload: UploadCallback | None = None,
        on_intake: IntakeCallback | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[AskOptions],
    ) -> AsyncAnswerStream:
        """Ask about a video; iterate over the result to get the answer as it is made.

        ``await client.ask(...).result()`` waits for the whole ``Answer`` instead.

        Args:
            video: a ``Video``, the id of one, or what to ``upload`` first.
            question: text, or a chat: ``Message``s or ``{"role": ..., "content": ...}``, user
                and assistant in turn, first and last of the user.
            on_progress: called with the ``Job`` while the video is prefilled.
            on_upload: called with ``UploadProgress`` while a path is uploaded.
            on_intake: called with ``IntakeProgress`` while vLLM takes in a long prompt.
            timeout: seconds for the answer, prefill included; no limit by default.
            request_id: UUID4 for the server's logs; a random one by default.
            options: what is prefilled (``FrameOptions``), and how to decode.
        """
        state = AskState(request_id)
        cancellation = AsyncCancellation()
        flow = _flows.ask(
            self._settings,
            state,
            video,
            question,
            options=options,
            timeout=timeout,
            callbacks=Callbacks(on_progress, on_upload, on_intake),
        )
        return AsyncAnswerStream(self._driver.iterate(flow, cancellation), state, cancellation)
