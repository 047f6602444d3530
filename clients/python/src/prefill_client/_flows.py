"""What each method of the clients does, as flows (``_steps``) that both drivers execute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill.v1 import video_service_pb2 as video_pb
from prefill_client import _convert, _requests
from prefill_client._arguments import (
    INT32_MAX,
    check_integer,
    check_request_id,
    check_seconds,
    check_sha256,
    check_text,
)
from prefill_client._retry import Backoff, Contact, RetryPolicy, is_unavailable
from prefill_client._steps import Call, Emit, Flow, Next, Open, Sleep
from prefill_client._upload import UploadCallback, upload
from prefill_client.errors import NotFoundError, PrefillError, make_error
from prefill_client.types import (
    Answer,
    AskOptions,
    FrameOptions,
    Inspection,
    IntakeProgress,
    Job,
    JobState,
    QuestionLike,
    Video,
    VideoLike,
    VideoSource,
)

JobCallback = Callable[[Job], object]
IntakeCallback = Callable[[IntakeProgress], object]

# The service has run such a prefill twice already; a third time is the user's decision.
RETRIED_BY_SERVER = frozenset({"RANK_DIED", "RANK_STALLED"})


@dataclass(frozen=True)
class Callbacks:
    """Who is called while a call goes on.

    Args:
        on_progress: called with the ``Job`` while a video is prefilled.
        on_upload: called with ``UploadProgress`` while a path is uploaded.
        on_intake: called with ``IntakeProgress`` while vLLM takes in a long prompt.
    """

    on_progress: JobCallback | None = None
    on_upload: UploadCallback | None = None
    on_intake: IntakeCallback | None = None

    def report(self, progress: answer_pb.AskProgress) -> None:
        """Pass on how far an answer is before its first token."""
        if self.on_progress is not None:
            self.on_progress(_convert.job(progress.job))
        if self.on_intake is not None and progress.prompt_tokens:
            self.on_intake(_convert.intake(progress))


@dataclass(frozen=True)
class Settings:
    """Time limits in seconds and retry policies of a client, and what it has met so far."""

    timeout: float = 60.0
    finish_timeout: float = 600.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    upload_retry: RetryPolicy = field(default_factory=lambda: RetryPolicy(attempts=10))
    contact: Contact = field(default_factory=Contact)

    def backoff(self) -> Backoff:
        """Counts the failures of one call."""
        return Backoff(self.retry, self.contact)

    @classmethod
    def of(
        cls,
        timeout: float,
        finish_timeout: float,
        retry: RetryPolicy | None,
        upload_retry: RetryPolicy | None,
    ) -> Settings:
        """Make settings, with the defaults for what is None."""
        default = cls()
        check_seconds("timeout", timeout)
        check_seconds("finish_timeout", finish_timeout)
        return cls(
            timeout=timeout,
            finish_timeout=finish_timeout,
            retry=retry or default.retry,
            upload_retry=upload_retry or default.upload_retry,
        )


def call(settings: Settings, rpc: str, request: Any, timeout: float | None = None) -> Flow[Any]:
    """Make an idempotent unary call, again while the server is UNAVAILABLE."""
    backoff = settings.backoff()
    while True:
        try:
            response = yield Call(rpc, request, timeout or settings.timeout)
            backoff.reset()
            return response
        except PrefillError as error:
            if not is_unavailable(error):
                raise
            yield Sleep(backoff.delay(error))


def upload_video(
    settings: Settings,
    video: VideoSource,
    *,
    progress: UploadCallback | None = None,
    display_name: str | None = None,
    sha256: str | None = None,
    allow_truncated: bool = False,
) -> Flow[Video]:
    """Upload a file, or find it on the server already."""
    what = _requests.source_of("path", video)
    if display_name is not None:
        check_text("display_name", display_name)
    if sha256 is not None:
        sha256 = check_sha256(sha256)

    def unary(rpc: str, request: Any) -> Flow[Any]:
        timeout = settings.finish_timeout if rpc == "FinishUpload" else None
        return call(settings, rpc, request, timeout)

    message = yield from upload(
        unary,
        Backoff(settings.upload_retry, settings.contact),
        what,
        progress=progress,
        display_name=display_name,
        sha256=sha256,
        allow_truncated=allow_truncated,
    )
    return _convert.video(message)


def resolve_video(
    settings: Settings, video: VideoLike, progress: UploadCallback | None
) -> Flow[str]:
    """Return the id of a video; one that is not on the server is uploaded first."""
    video_id, what = _requests.split_video(video)
    if what is not None:
        video_id = (yield from upload_video(settings, what, progress=progress)).video_id
    assert video_id is not None
    return video_id


def import_video(
    settings: Settings, path: str, display_name: str | None, *, allow_truncated: bool
) -> Flow[Video]:
    """Let the server read one of its own files."""
    path = check_text("path", _requests.local_path("path", path))
    check_text("display_name", display_name or "")
    request = video_pb.ImportVideoRequest(
        path=path,
        display_name=display_name or "",
        request_id=_requests.new_request_id(),
        allow_truncated=allow_truncated,
    )
    response = yield from call(settings, "ImportVideo", request, settings.finish_timeout)
    return _convert.video(response.video)


def get_video(settings: Settings, video_id: str) -> Flow[Video]:
    """Return a video as it is now."""
    request = video_pb.GetVideoRequest(video_id=check_text("video_id", video_id))
    return _convert.video((yield from call(settings, "GetVideo", request)).video)


def list_videos(settings: Settings, page_size: int) -> Flow[None]:
    """Emit all videos, newest first."""
    check_integer("page_size", page_size, 0, INT32_MAX)
    token = ""
    while True:
        request = video_pb.ListVideosRequest(page_size=page_size, page_token=token)
        page = yield from call(settings, "ListVideos", request)
        for message in page.videos:
            yield Emit(_convert.video(message))
        token = page.next_page_token
        if not token:
            return


def delete_video(settings: Settings, video_id: str) -> Flow[None]:
    """Delete; a repeated try that finds nothing means that the one before worked."""
    backoff = settings.backoff()
    tried = False
    while True:
        try:
            request = video_pb.DeleteVideoRequest(video_id=check_text("video_id", video_id))
            yield Call("DeleteVideo", request, settings.timeout)
            return
        except PrefillError as error:
            if tried and isinstance(error, NotFoundError):
                return
            if not is_unavailable(error):
                raise
            tried = True
            yield Sleep(backoff.delay(error))


def prefill(
    settings: Settings,
    video: VideoLike,
    options: FrameOptions,
    *,
    wait: bool,
    callbacks: Callbacks,
) -> Flow[Job]:
    """Create a job, or get the one that holds the prefix; wait for it if asked to."""
    _requests.build_spec("", options)  # refuse bad options before anything is uploaded
    video_id = yield from resolve_video(settings, video, callbacks.on_upload)
    request = prefill_pb.CreatePrefillJobRequest(
        spec=_requests.build_spec(video_id, options), request_id=_requests.new_request_id()
    )
    job = _convert.job((yield from call(settings, "CreatePrefillJob", request)).job)
    if not wait:
        return job
    return (yield from wait_job(settings, job.job_id, callbacks.on_progress))


def get_job(settings: Settings, job_id: str) -> Flow[Job]:
    """Return a job as it is now."""
    request = prefill_pb.GetPrefillJobRequest(job_id=check_text("job_id", job_id))
    return _convert.job((yield from call(settings, "GetPrefillJob", request)).job)


def list_jobs(settings: Settings, page_size: int) -> Flow[None]:
    """Emit all jobs, newest first."""
    check_integer("page_size", page_size, 0, INT32_MAX)
    token = ""
    while True:
        request = prefill_pb.ListPrefillJobsRequest(page_size=page_size, page_token=token)
        page = yield from call(settings, "ListPrefillJobs", request)
        for message in page.jobs:
            yield Emit(_convert.job(message))
        token = page.next_page_token
        if not token:
            return


def inspect_job(settings: Settings, job_id: str) -> Flow[Inspection]:
    """Return all that was measured of a job's attention."""
    request = prefill_pb.InspectPrefillJobRequest(job_id=check_text("job_id", job_id))
    return _convert.inspection((yield from call(settings, "InspectPrefillJob", request)))


def trace_job(settings: Settings, job_id: str) -> Flow[str]:
    """Join the pieces of a job's trace; starts over if the stream breaks."""
    request = prefill_pb.TracePrefillJobRequest(job_id=check_text("job_id", job_id))
    backoff = settings.backoff()
    while True:
        try:
            stream = yield Open("TracePrefillJob", request, settings.timeout)
            pieces = []
            while (message := (yield Next(stream))) is not None:
                pieces.append(message.data)
            return b"".join(pieces).decode()
        except PrefillError as error:
            if not is_unavailable(error):
                raise
            yield Sleep(backoff.delay(error))


def cancel_job(settings: Settings, job_id: str) -> Flow[Job]:
    """Stop a job and return it as it is then."""
    request = prefill_pb.CancelPrefillJobRequest(job_id=check_text("job_id", job_id))
    return _convert.job((yield from call(settings, "CancelPrefillJob", request)).job)


def watch_job(
    settings: Settings, job_id: str, on_progress: JobCallback | None = None, emit: bool = True
) -> Flow[Job]:
    """Emit the job now and at each change until it has ended; return its last state."""
    backoff = settings.backoff()
    request = prefill_pb.WatchPrefillJobRequest(job_id=check_text("job_id", job_id))
    while True:
        try:
            stream = yield Open("WatchPrefillJob", request, None)
            while (message := (yield Next(stream))) is not None:
                backoff.reset()
                job = _convert.job(message.job)
                if on_progress is not None:
                    on_progress(job)
                if emit:
                    yield Emit(job)
                if job.state.ended:
                    return job
            raise make_error("STREAM_TRUNCATED", f"the server stopped reporting on {job_id}")
        except PrefillError as error:
            if not is_unavailable(error) and error.reason != "STREAM_TRUNCATED":
                raise
            yield Sleep(backoff.delay(error))


def wait_job(settings: Settings, job_id: str, on_progress: JobCallback | None) -> Flow[Job]:
    """Wait for the end of a job and raise if it is not a good one."""
    job = yield from watch_job(settings, job_id, on_progress, emit=False)
    if job.state is JobState.SUCCEEDED:
        return job
    if job.error is not None:
        raise make_error(job.error.reason, job.error.message, metadata=job.error.metadata)
    reason = "CANCELLED" if job.state is JobState.CANCELLED else str(job.state)
    raise make_error(reason, f"job {job_id} ended {job.state}", metadata={"job_id": job_id})


class AskState:
    """The part of an answer that has arrived; ``ask`` fills it while it runs.

    An answer that broke off is asked again, and repeats what has arrived before it goes on.

    Attributes:
        broken: what the attempt before this one failed with.
    """

    def __init__(self, request_id: str | None) -> None:
        self.request_id = check_request_id(request_id) if request_id else _requests.new_request_id()
        self.video_id = ""
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.broken: PrefillError | None = None
        self.final: Answer | None = None
        self._attempt = ""
        self._attempt_ids: list[int] = []

    def begin_attempt(self) -> None:
        """The answer starts from its first token, for the first time or once more."""
        self._attempt = ""
        self._attempt_ids = []

    def add_delta(self, delta: answer_pb.AskDelta) -> str | None:
        """Append what is new in a piece of the answer, and return its text.

        Returns:
            None if the answer is not the one that has arrived so far.
        """
        self._attempt += delta.text
        self._attempt_ids.extend(delta.token_ids)
        known = "".join(self.pieces)
        both = min(len(known), len(self._attempt))
        ids = min(len(self.token_ids), len(self._attempt_ids))
        same = known[:both] == self._attempt[:both]
        if not same or self.token_ids[:ids] != self._attempt_ids[:ids]:
            return None
        new = self._attempt[both:]
        if new:
            self.pieces.append(new)
        self.token_ids.extend(self._attempt_ids[ids:])
        return new

    def finish(self, final: answer_pb.AskFinal) -> None:
        """Set ``final`` from the last message of the answer."""
        self.final = Answer(
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=final.finish_reason,
            timings=_convert.timings(final.timings),
            usage=_convert.usage(final.usage),
            job_id=final.job_id,
            prefix_id=final.prefix_id,
            video_id=self.video_id,
            request_id=self.request_id,
            warnings=_convert.warnings(final.warnings),
            frames=_convert.frames(final),
        )


def ask(
    settings: Settings,
    state: AskState,
    video: VideoLike,
    question: QuestionLike,
    *,
    options: AskOptions,
    timeout: float | None,
    callbacks: Callbacks,
) -> Flow[None]:
    """Emit the pieces of an answer. One that broke off is asked again, and goes on where it was.

    The new attempt repeats the tokens that have arrived, if it is not sampled at random without a
    seed; they are compared. If it does not, the answer fails as it broke off.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)
    request = _requests.build_ask("", question, options, state.request_id)
    state.video_id = yield from resolve_video(settings, video, callbacks.on_upload)
    request.spec.video_id = state.video_id
    backoff = settings.backoff()
    while state.final is None:
        state.begin_attempt()
        try:
            stream = yield Open("Ask", request, timeout)
            while (message := (yield Next(stream))) is not None:
                event = message.WhichOneof("event")
                if event == "delta":
                    text = state.add_delta(message.delta)
                    if text is None:
                        break
                    if text:
                        backoff.reset()
                        yield Emit(text)
                elif event == "final":
                    state.finish(message.final)
                elif event == "progress":
                    callbacks.report(message.progress)
            if message is not None:
                assert state.broken is not None
                raise state.broken
            if state.final is None:
                raise make_error(
                    "STREAM_TRUNCATED",
                    "the answer ended without its final message",
                    request_id=state.request_id,
                )
        except PrefillError as error:
            if error is state.broken:
                raise
            if not is_unavailable(error) or error.reason in RETRIED_BY_SERVER:
                raise
            state.broken = error
            yield Sleep(backoff.delay(error))
