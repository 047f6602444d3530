"""The ``prefill`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from prefill_client import types
from prefill_client.attention import AttentionReport, Quality
from prefill_client.cli.batch import batch
from prefill_client.cli.options import (
    ask_options,
    client_arguments,
    frame_options,
    make_parser,
)
from prefill_client.cli.picture import PictureError, draw
from prefill_client.cli.progress import ProgressPrinter
from prefill_client.client import AnswerStream, Client
from prefill_client.errors import PrefillError

FAILURE = 1
USAGE = 2
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = make_parser().parse_args(argv)
    args.quiet = vars(args).get("quiet", False)
    try:
        arguments = client_arguments(args)
    except ValueError as error:
        return _fail(error, USAGE)
    except OSError as error:
        return _fail(error)
    try:
        if args.command == "batch":
            return batch(args, arguments)
        with Client(**arguments) as client:
            return _COMMANDS[args.command](client, args)
    except ValueError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:
        # The reader of our output has gone: there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (PrefillError, PictureError, OSError) as error:
        away = isinstance(error, PrefillError) and error.reason == "UNAVAILABLE"
        return _fail(error, what=f"cannot reach {arguments['address']}" if away else "")
    except KeyboardInterrupt:
        # Closing the client has cancelled its calls at the server.
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(error: Exception, status: int = FAILURE, what: str = "") -> int:
    prefix = f"{what}: " if what and what not in str(error) else ""
    print(f"prefill: {prefix}{error}", file=sys.stderr)
    return status


def _warn(warnings: Iterable[types.VideoWarning], shown: set[str]) -> None:
    """Print what the user should know of a video, each once."""
    for warning in warnings:
        if warning.message not in shown:
            shown.add(warning.message)
            print(f"prefill: warning: {warning.message}", file=sys.stderr)


def _video(text: str) -> Any:
    return sys.stdin.buffer if text == "-" else text


def _ask(client: Client, args: argparse.Namespace) -> int:
    progress = ProgressPrinter(sys.stderr, quiet=args.quiet)
    video = _video(args.video)
    several = len(args.questions) > 1
    reports: dict[str, AttentionReport] = {}
    shown: set[str] = set()

    def on_progress(job: types.Job) -> None:
        progress.show_job(job)
        if job.result is not None and job.result.attention is not None:
            reports[job.job_id] = job.result.attention

    for question in args.questions:
        stream = client.ask(
            video,
            question,
            on_progress=on_progress,
            on_upload=progress.show_upload,
            on_intake=progress.show_intake,
            **ask_options(args),
        )
        if several and not args.json:
            print(f"Q: {question}\nA: ", end="", flush=True)
        answer = _print_answer(stream, progress, silent=args.json)
        video = answer.video_id  # uploaded, or found, by the first question
        if args.json:
            _print_json({"question": question, **types.to_dict(answer)})
        elif several:
            print()
        _warn(answer.warnings, shown)
        if not args.quiet:
            print(_summary(answer, reports.get(answer.job_id)), file=sys.stderr)
    return 0


def _print_answer(stream: AnswerStream, progress: ProgressPrinter, silent: bool) -> types.Answer:
    try:
        for piece in stream:
            progress.finish()
            if not silent:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        progress.finish()
        if stream.text and not silent:
            print(flush=True)
    return stream.result()


def _summary(answer: types.Answer, report: AttentionReport | None) -> str:
    usage = answer.usage
    timings = answer.timings
    return (
        f"[{usage.completion_tokens} tokens, {answer.finish_reason}; "
        f"first after {timings.first_token_s:.2f} s, all after {timings.total_s:.2f} s; "
        f"{_frames(answer.frames)}{usage.video_tokens} video tokens, "
        f"KV of {usage.kv_tokens_moved} moved; "
        f"{_attention(report) + '; ' if report else ''}{answer.job_id}]"
    )


def _frames(frames: types.SampledFrames | None) -> str:
    if frames is None or not frames.times_s:
        return ""
    return f"{len(frames.times_s)} frames, {frames.times_s[0]:.1f} to {frames.times_s[-1]:.1f} s; "


def _attention(report: AttentionReport) -> str:
    total = report.total
    if not total.sampled_rows or report.quality is Quality.EXACT:
        return f"attention {report.quality}, density {total.density:.2f}"
    below = "" if report.floor_met else f", below the floor of {report.min_kept_mass:g}"
    return (
        f"attention {report.quality}, density {total.density:.2f}, kept mass "
        f"{total.kept_mass_mean:.3f} (5 % of the samples below {total.kept_mass_p5:.3f}){below}"
    )


def _chat(client: Client, args: argparse.Namespace) -> int:
    progress = ProgressPrinter(sys.stderr, quiet=args.quiet)
    video = args.video
    turns = list[types.Message]()
    shown: set[str] = set()
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if not question:
            continue
        turns.append(types.Message("user", question))
        stream = client.ask(
            video,
            turns,
            on_progress=progress.show_job,
            on_upload=progress.show_upload,
            on_intake=progress.show_intake,
            **ask_options(args),
        )
        answer = _print_answer(stream, progress, silent=False)
        video = answer.video_id
        _warn(answer.warnings, shown)
        turns.append(types.Message("assistant", answer.text))


def _start(client: Client, args: argparse.Namespace) -> int:
    def start(video: str) -> None:
        progress = ProgressPrinter(sys.stderr, quiet=args.quiet)
        job = client.prefill(
            _video(video),
            wait=args.wait,
            on_progress=progress.show_job,
            on_upload=progress.show_upload,
            **frame_options(args),
        )
        progress.finish()
        _print_job(job, args.json)

    return _each(args.videos, start)


def _upload(client: Client, args: argparse.Namespace) -> int:
    def upload(path: str) -> None:
        progress = ProgressPrinter(sys.stderr, quiet=args.quiet)
        try:
            video = client.upload(
                _video(path),
                progress=progress.show_upload,
                allow_truncated=args.allow_truncated,
            )
        finally:
            progress.finish()
        if args.json:
            _print_json(types.to_dict(video))
        else:
            print(f"{video.video_id}  {path}", flush=True)
        _warn(video.warnings, set())

    return _each(args.files, upload)


def _list(client: Client, args: argparse.Namespace) -> int:
    for video in client.videos():
        if args.json:
            _print_json(types.to_dict(video))
            continue
        info = video.info
        what = f"{info.width}x{info.height} {info.duration_s:.1f} s" if info else video.error_reason
        print(
            f"{video.video_id}  {video.state:<9}  {video.size_bytes:>12}  "
            f"{_local(video.create_time)}  {what:<20}  {video.display_name}"
        )
        _warn(video.warnings, set())
    return 0


def _delete(client: Client, args: argparse.Namespace) -> int:
    return _each(args.ids, client.delete_video)


def _jobs(client: Client, args: argparse.Namespace) -> int:
    for job in [client.job(args.job)] if args.job else client.jobs():
        _print_job(job, args.json)
    return 0


def _watch(client: Client, args: argparse.Namespace) -> int:
    progress = ProgressPrinter(sys.stderr, quiet=args.quiet)
    job = None
    for job in client.watch_job(args.job):
        if args.json:
            _print_json(types.to_dict(job))
        else:
            progress.show_job(job)
    progress.finish()
    assert job is not None, "a watch ends with the job's last state"
    if not args.json:
        _print_job(job, False)
    return 0 if job.state is types.JobState.SUCCEEDED else FAILURE


def _cancel(client: Client, args: argparse.Namespace) -> int:
    _print_job(client.cancel_job(args.job), False)
    return 0


def _inspect(client: Client, args: argparse.Namespace) -> int:
    inspection = client.inspect_job(args.job)
    output = args.output or (None if args.json else Path(f"{inspection.job.job_id}.png"))
    if output is not None:
        draw(inspection, output)
    if args.json:
        _print_json(types.to_dict(inspection))
    else:
        print(f"{inspection.job.job_id}  {_attention(inspection.attention)}  {output}")
    return 0


def _trace(client: Client, args: argparse.Namespace) -> int:
    trace = client.trace_job(args.job)
    output: Path = args.output or Path(f"{args.job}.json")
    if output == Path("-"):
        print(trace, flush=True)
        return 0
    output.write_text(trace)
    slices = sum(event["ph"] == "X" for event in json.loads(trace)["traceEvents"])
    print(f"{args.job}  {slices} slices  {output}")
    return 0


def _each(items: Iterable[str], action: Callable[[str], object]) -> int:
    """Apply ``action`` to all items, even if some fail; returns the exit status."""
    status = 0
    for item in items:
        try:
            action(item)
        except BrokenPipeError:
            raise
        except (PrefillError, OSError) as error:
            status = _fail(error, what=item)
    return status


def _print_job(job: types.Job, as_json: bool) -> None:
    if as_json:
        _print_json(types.to_dict(job))
        return
    error = f"  {job.error.message} [{job.error.reason}]" if job.error else ""
    report = job.result.attention if job.result else None
    attention = f"  {_attention(report)}" if report else ""
    print(
        f"{job.job_id}  {job.state:<9}  {job.spec.video_id}  {job.prefix_tokens:>8} tokens  "
        f"{_local(job.create_time)}{attention}{error}"
    )
    _warn(job.result.warnings if job.result else (), set())


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _local(time: datetime | None) -> str:
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "-"


_COMMANDS: dict[str, Callable[[Client, argparse.Namespace], int]] = {
    "ask": _ask,
    "chat": _chat,
    "start": _start,
    "upload": _upload,
    "list": _list,
    "delete": _delete,
    "jobs": _jobs,
    "watch": _watch,
    "cancel": _cancel,
    "inspect": _inspect,
    "trace": _trace,
}
