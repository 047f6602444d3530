"""`make demo`: a real video through the real system, then the same questions to vLLM alone.

Everything runs on this machine's CPU: a tiny random Qwen3-VL (its answers are gibberish, but
they are *its* answers, token for token), two ranks, one vLLM. The questions are asked with
quality ``exact``, which is what vLLM alone computes; one more prefill shows the default,
``balanced``. Ends with a line ``DEMO OK``, or with ``DEMO FAILED: reason`` and exit code 1.
Nothing is left running.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from prefill_client import Answer, Client, Job, PrefillError, Stage, UploadProgress, Video

from prefill_service.errors import ServiceError
from tools.make_tiny_checkpoint import build
from tools.make_video import write_video
from tools.progress import Line, Table, fraction
from tools.service_process import ServiceProcess
from tools.vllm_alone import Question, answer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "demo"
FAMILY = "qwen3_vl"
RANKS = 2
VIDEO_SECONDS = 130.0
MAX_TOKENS = 24
QUALITY = "exact"
"""Of what is compared with vLLM alone: approximate attention may choose other tokens."""

START_TIMEOUT_S = 600.0
QUESTIONS = ("What is happening in the video?", "Which colour does the shape at the end have?")
STAGES = (Stage.DECODE, Stage.VISION, Stage.PREFILL)


class DemoError(Exception):
    """The demo cannot go on, or its result is wrong."""


class Asked:
    """One answer, with what the client measured: seconds from the question to its first token."""

    def __init__(self, answer: Answer, first_token_s: float) -> None:
        self.answer = answer
        self.first_token_s = first_token_s


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
    FOLDER.mkdir(parents=True, exist_ok=True)
    model, path = _prepare()
    with tempfile.TemporaryDirectory(prefix="prefill-demo-") as data_dir:
        video, upload_s, asked, job = _ask_service(model, path, Path(data_dir))
    with Line("vLLM alone, with its vision tower, on the same frames") as line:
        questions = [Question(str(path), [("user", text)], MAX_TOKENS) for text in QUESTIONS]
        references = answer(model, questions, log=FOLDER / "vllm-alone.log")
        line.done("answered")
    _print_answers(asked)
    _table(asked, job, upload_s).print()
    for number, (one, reference) in enumerate(zip(asked, references, strict=True), 1):
        ours, alone = list(one.answer.token_ids), reference.token_ids
        if ours != alone:
            raise DemoError(f"answer {number} differs: tokens {ours}, from vLLM alone {alone}")
    first, second = asked
    print(f"\n{video.display_name}: everything took {time.monotonic() - start:.0f} s")
    return (
        f"DEMO OK ranks={RANKS} video_tokens={first.answer.usage.video_tokens} "
        f"first_token_s={first.first_token_s:.2f} second_first_token_s={second.first_token_s:.2f} "
        f"kv_tokens_moved_second={second.answer.usage.kv_tokens_moved} tokens_equal_vllm_alone=yes"
    )


def _prepare() -> tuple[Path, Path]:
    """The checkpoint, built if absent, and the video, written anew."""
    with Line(f"checkpoint (tiny random {FAMILY})") as line:
        model = build(FAMILY, ROOT / "build" / "checkpoints" / FAMILY)
        line.done(str(model.relative_to(ROOT)))
    with Line(f"video of {VIDEO_SECONDS:.0f} s, written with OpenCV") as line:
        path = write_video(FOLDER / "demo.mp4", VIDEO_SECONDS)
        line.done(f"{path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.1f} MB")
    return model, path


def _ask_service(model: Path, path: Path, data_dir: Path) -> tuple[Video, float, list[Asked], Job]:
    """Start the service, upload, ask; the service has stopped on return."""
    log = FOLDER / "service.log"
    arguments = ["--model", str(model), "--ranks", str(RANKS), "--device", "cpu"]
    with ServiceProcess([*arguments, "--data-dir", str(data_dir)], log) as service:
        with Line(f"service: {RANKS} ranks and vLLM, log in {log.relative_to(ROOT)}") as line:
            service.wait_ready(START_TIMEOUT_S, lambda seconds: line.show(f"{seconds:.0f} s"))
            line.done(f"serving on {service.address}")
        try:
            with Client(service.address) as client:
                video, upload_s = _upload(client, path)
                asked = [_ask(client, video, text) for text in QUESTIONS]
                job = client.job(asked[0].answer.job_id)
                _prefill_sparsely(client, video)
        except PrefillError:
            service.check()  # a dead service is the better reason
            raise
        with Line("stopping the service") as line:
            killed = service.stop()
            line.done("stopped")
        if killed:
            raise DemoError(f"the service left processes behind: {'; '.join(killed)}")
    return video, upload_s, asked, job


def _upload(client: Client, path: Path) -> tuple[Video, float]:
    """The video and the seconds it took, probing included."""
    begin = time.monotonic()
    with Line("upload") as line:
        video = client.upload(path, progress=lambda p: line.show(_upload_text(p)))
        line.done(f"{video.video_id}: {_describe(video)}")
    return video, time.monotonic() - begin


def _ask(client: Client, video: Video, text: str) -> Asked:
    begin = time.monotonic()
    first_token_s = 0.0
    with Line(f"question ({QUALITY}): {text}") as line:
        stream = client.ask(
            video,
            text,
            max_tokens=MAX_TOKENS,
            quality=QUALITY,
            on_progress=lambda job: line.show(_job_text(job)),
        )
        for _ in stream:
            first_token_s = first_token_s or time.monotonic() - begin
            line.show(f"{len(stream.token_ids)} tokens")
        answer = stream.result()
        line.done(f"{len(answer.token_ids)} tokens, the first after {first_token_s:.2f} s")
    if not answer.token_ids:
        raise DemoError(f"no token came for: {text}")
    return Asked(answer, first_token_s)


def _prefill_sparsely(client: Client, video: Video) -> None:
    """The same video once more, as it is done unless a request says otherwise."""
    with Line("prefill (balanced, the default)") as line:
        job = client.prefill(video, wait=True, on_progress=lambda job: line.show(_job_text(job)))
        report = job.result.attention if job.result else None
        if report is None:
            raise DemoError(f"job {job.job_id} has no attention report")
        total = report.total
        kept = (
            f"kept mass {total.kept_mass_mean:.3f}, measured"
            if total.sampled_rows
            else ("computed exactly: sparsity does not pay for a video as short as this")
        )
        line.done(f"density {total.density:.2f}, {kept}")


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
            done, total = sum(r.done for r in ranks), sum(r.total for r in ranks)
            parts.append(f"{stage.value.lower()} {fraction(done, total)}")
    return "  ".join(parts) or job.state.value.lower()


def _stage_seconds(job: Job, stage: Stage) -> float:
    """Of the slowest rank."""
    return max((entry.elapsed_s for entry in job.progress if entry.stage == stage), default=0.0)


def _print_answers(asked: Sequence[Asked]) -> None:
    for text, one in zip(QUESTIONS, asked, strict=True):
        print(f"\nQ: {text}\nA: {one.answer.text.strip()}")
    print()


def _table(asked: Sequence[Asked], job: Job, upload_s: float) -> Table:
    first, second = (one.answer for one in asked)
    usages, timings = [first.usage, second.usage], [first.timings, second.timings]
    table = Table("", "question 1", "question 2")
    table.row("prompt tokens", *(f"{u.prompt_tokens:,}" for u in usages))
    table.row("video tokens", *(f"{u.video_tokens:,}" for u in usages))
    table.row("upload", f"{upload_s:.2f} s", "-")
    for stage in STAGES:
        seconds = f"{_stage_seconds(job, stage):.2f} s"
        table.row(f"{stage.value.lower()} (slowest rank, stages overlap)", seconds, "-")
    table.row("hand-off", *(f"{t.handoff_s:.3f} s" for t in timings))
    table.row("KV tokens moved to vLLM", *(f"{u.kv_tokens_moved:,}" for u in usages))
    table.row("time to first token", *(f"{one.first_token_s:.2f} s" for one in asked))
    return table


if __name__ == "__main__":
    main()
