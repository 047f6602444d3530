"""`make demo`: a real video through the real system, then the same questions to vLLM alone.

Everything runs on this machine's CPU: a Qwen3-VL of 1.1 M parameters, trained to answer questions
about shapes that flash for a second in a generated video; two ranks; one vLLM. Three questions
are asked with quality ``exact``, which is what vLLM alone computes, so their answers have to be
the same, token for token; and again with ``balanced``, the default. What is wrong is printed as
wrong: a model as small as this may err. A picture shows where the attention went.

Ends with a line ``DEMO OK``, or with ``DEMO FAILED: reason`` and exit code 1. Nothing is left
running.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from prefill_client import (
    Answer,
    Client,
    Inspection,
    Job,
    PrefillError,
    Stage,
    UploadProgress,
    Video,
)

from prefill_service.errors import ServiceError
from tools.demo.picture import contrast, draw
from tools.demo.progress import Line, Table, fraction
from tools.demo.story import FPS, QUESTIONS, SEED, STORY, is_right, marked
from tools.needle.videos import write_mp4
from tools.service_process import ServiceProcess
from tools.vllm_alone import Question, Reference, answer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "demo"
MODEL = ROOT / "assets" / "needle-qwen3-vl"
RANKS = 2
MAX_TOKENS = 8
EXACT = "exact"
BALANCED = "balanced"
"""Only ``exact`` is compared with vLLM alone: approximate attention may choose other tokens."""

SPARSE_FROM_TOKENS = 1024
START_TIMEOUT_S = 600.0
STAGES = (Stage.DECODE, Stage.VISION, Stage.PREFILL)


class DemoError(Exception):
    """The demo cannot go on, or its result is wrong."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One answer, with what the client measured: seconds from the question to its first token."""

    answer: Answer
    first_token_s: float


@dataclass(frozen=True, slots=True)
class Session:
    """What came out of one run of the service; answers in the order of ``QUESTIONS``.

    Attributes:
        exact, balanced: by quality.
        inspections: of the two prefills, by quality.
    """

    video: Video
    upload_s: float
    exact: list[Asked]
    balanced: list[Asked]
    inspections: dict[str, Inspection]


def main() -> None:
    """Run the demo and end the process with its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    try:
        line = _demo()
    except KeyboardInterrupt:
        _fail("interrupted")
    except (DemoError, PrefillError, ServiceError, RuntimeError, TimeoutError, OSError) as error:
        _fail(str(error))
    print(line, flush=True)


def _stop_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise DemoError(f"stopped by {signal.Signals(number).name}")


def _fail(reason: str) -> NoReturn:
    """The reason goes last, also when a log follows its first line."""
    summary, _, details = reason.partition("\n")
    print(f"\n{details}", flush=True)
    sys.exit(f"DEMO FAILED: {summary}")


def _demo() -> str:
    start = time.monotonic()
    path = _prepare()
    with tempfile.TemporaryDirectory(prefix="prefill-demo-") as data_dir:
        session = _ask_service(path, Path(data_dir))
    with Line("vLLM alone, with its vision tower, on the same frames") as line:
        questions = [Question(str(path), [("user", q.text)], MAX_TOKENS) for q in QUESTIONS]
        references = answer(MODEL, questions, log=FOLDER / "vllm-alone.log")
        line.done("answered")
    _draw(path, session)
    print()
    _answers(session, references).print()
    print()
    _timings(session).print()
    print(f"\n{session.video.display_name}: everything took {time.monotonic() - start:.0f} s")
    return verdict(session.exact, references)


def verdict(exact: Sequence[Asked], references: Sequence[Reference]) -> str:
    """The demo's last line.

    Raises:
        DemoError: a token differs from vLLM alone.
    """
    for number, (one, reference) in enumerate(zip(exact, references, strict=True), 1):
        ours = list(one.answer.token_ids)
        alone = reference.token_ids
        if ours != alone:
            raise DemoError(f"answer {number} differs: tokens {ours}, from vLLM alone {alone}")
    right = [is_right(q, one.answer.text) for q, one in zip(QUESTIONS, exact, strict=True)]
    first, second = exact[:2]
    return (
        f"DEMO OK ranks={RANKS} video_tokens={first.answer.usage.video_tokens} "
        f"first_token_s={first.first_token_s:.2f} second_first_token_s={second.first_token_s:.2f} "
        f"kv_tokens_moved_second={second.answer.usage.kv_tokens_moved} "
        f"tokens_equal_vllm_alone=yes right={sum(right)}/{len(right)}"
    )


def _prepare() -> Path:
    """The video, written anew."""
    if not (MODEL / "config.json").is_file():
        raise DemoError(f"{MODEL} is no checkpoint: it belongs to the repository, check it out")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Line(f"video of {STORY.patches} s in which shapes flash for a second each") as line:
        path = write_mp4(FOLDER / "demo.mp4", STORY, SEED, fps=FPS)
        line.done(f"{path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.1f} MB")
    return path


def _ask_service(path: Path, data_dir: Path) -> Session:
    """Start the service, upload, ask; the service has stopped on return."""
    log = FOLDER / "service.log"
    arguments = ["--model", str(MODEL), "--ranks", str(RANKS), "--device", "cpu"]
    arguments += ["--engine-sparse-from-tokens", str(SPARSE_FROM_TOKENS)]
    with ServiceProcess([*arguments, "--data-dir", str(data_dir)], log) as service:
        with Line(f"service: {RANKS} ranks and vLLM, log in {log.relative_to(ROOT)}") as line:
            service.wait_ready(START_TIMEOUT_S, lambda seconds: line.show(f"{seconds:.0f} s"))
            line.done(f"serving on {service.address}")
        try:
            with Client(service.address) as client:
                video, upload_s = _upload(client, path)
                exact = [_ask(client, video, q.text, EXACT) for q in QUESTIONS]
                balanced = [_ask(client, video, q.text, BALANCED) for q in QUESTIONS]
                inspections = {
                    quality: client.inspect_job(asked[0].answer.job_id)
                    for quality, asked in ((EXACT, exact), (BALANCED, balanced))
                }
        except PrefillError:
            service.check()  # a dead service is the better reason
            raise
        with Line("stopping the service") as line:
            killed = service.stop()
            line.done("stopped")
        if killed:
            raise DemoError(f"the service left processes behind: {'; '.join(killed)}")
    return Session(
        video=video,
        upload_s=upload_s,
        exact=exact,
        balanced=balanced,
        inspections=inspections,
    )


def _upload(client: Client, path: Path) -> tuple[Video, float]:
    """The video and the seconds it took, probing included."""
    begin = time.monotonic()
    with Line("upload") as line:
        video = client.upload(path, progress=lambda p: line.show(_upload_text(p)))
        line.done(f"{video.video_id}: {_describe(video)}")
    return video, time.monotonic() - begin


def _ask(client: Client, video: Video, text: str, quality: str) -> Asked:
    begin = time.monotonic()
    first_token_s = 0.0
    with Line(f"{quality}: {text}") as line:
        stream = client.ask(
            video,
            text,
            max_tokens=MAX_TOKENS,
            quality=quality,
            on_progress=lambda job: line.show(_job_text(job)),
        )
        for _ in stream:
            first_token_s = first_token_s or time.monotonic() - begin
        answer = stream.result()
        line.done(f"{answer.text.strip()}, after {first_token_s:.2f} s")
    if not answer.token_ids:
        raise DemoError(f"no token came for: {text}")
    return Asked(answer, first_token_s)


def _draw(path: Path, session: Session) -> None:
    """The picture, and what it shows in figures."""
    picture = FOLDER / "demo.png"
    patches = {quality: found.patches for quality, found in session.inspections.items()}
    total = session.inspections[BALANCED].attention.total
    print(
        f"balanced: {total.density:.0%} of the keys attended, {total.kept_mass_mean:.1%} of the "
        f"attention mass kept, measured on {total.sampled_rows} rows\n"
        f"  (sparse from {SPARSE_FROM_TOKENS:,} tokens on, to show it: left to itself the service "
        "measures from where\n  on sparse is faster, and computes shorter videos exactly)"
    )
    with Line("picture") as line:
        draw(picture, path, STORY, fps=FPS, masses=patches)
        line.done(str(picture.relative_to(ROOT)))
    for quality, masses in patches.items():
        print(f"  attention mass, {quality}: {contrast(STORY, masses)}")


def _upload_text(progress: UploadProgress) -> str:
    return f"{progress.phase} {fraction(progress.done, progress.total)}"


def _describe(video: Video) -> str:
    info = video.info
    if info is None:
        raise DemoError(f"the service says nothing of video {video.video_id}")
    return (
        f"{info.codec} {info.width}x{info.height}, {info.frame_count} frames, "
        f"{info.duration_s:.0f} s at {info.fps:g} fps"
    )


def _job_text(job: Job) -> str:
    """All ranks together, per stage."""
    parts = []
    for stage in STAGES:
        ranks = [entry for entry in job.progress if entry.stage == stage]
        if ranks:
            done = sum(r.done for r in ranks)
            total = sum(r.total for r in ranks)
            parts.append(f"{stage.value.lower()} {fraction(done, total)}")
    return "  ".join(parts) or job.state.value.lower()


def _stage_seconds(job: Job, stage: Stage) -> float:
    """Of the slowest rank."""
    return max((entry.elapsed_s for entry in job.progress if entry.stage == stage), default=0.0)


def _answers(session: Session, references: Sequence[Reference]) -> Table:
    table = Table("question", "truth", "exact", "balanced", "vLLM alone")
    rows = zip(QUESTIONS, session.exact, session.balanced, references, strict=True)
    for question, exact, balanced, reference in rows:
        texts = (exact.answer.text, balanced.answer.text, reference.text)
        table.row(question.text, question.answer, *(marked(question, text) for text in texts))
    return table


def _timings(session: Session) -> Table:
    columns = [*session.exact[:2], session.balanced[0]]
    jobs = [session.inspections[quality].job for quality in (EXACT, BALANCED)]
    usages, timings = zip(*((c.answer.usage, c.answer.timings) for c in columns), strict=True)
    table = Table("", "exact, question 1", "question 2", "balanced, question 1")
    table.row("prompt tokens", *(f"{u.prompt_tokens:,}" for u in usages))
    table.row("video tokens", *(f"{u.video_tokens:,}" for u in usages))
    table.row("upload", f"{session.upload_s:.2f} s", "-", "-")
    for stage in STAGES:
        first, other = (f"{_stage_seconds(job, stage):.2f} s" for job in jobs)
        table.row(f"{stage.value.lower()} (slowest rank, stages overlap)", first, "-", other)
    table.row("hand-off", *(f"{t.handoff_s:.3f} s" for t in timings))
    table.row("KV tokens moved to vLLM", *(f"{u.kv_tokens_moved:,}" for u in usages))
    table.row("time to first token", *(f"{one.first_token_s:.2f} s" for one in columns))
    return table


if __name__ == "__main__":
    main()
