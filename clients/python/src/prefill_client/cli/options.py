"""The command line: what ``prefill --help`` shows."""

from __future__ import annotations

import argparse
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from prefill_client._channel import TLS
from prefill_client._requests import (
    ASK_NAMES,
    ATTENTION_NAMES,
    COMPARISONS,
    FRAME_NAMES,
    QUALITIES,
    SAMPLED_BY,
)

DESCRIPTION = """\
Ask questions about long videos. A video is uploaded once, prefilled once, and then
answers any number of questions.

  prefill ask holiday.mp4 "Who opens the door?" "What happens next?"
  prefill upload *.mp4
  prefill batch questions.jsonl -o answers.jsonl --errors failed.jsonl
  prefill inspect job_01K9... -o attention.png
"""
EPILOG = """\
VIDEO is the path or file:// URL of a file, or - for the standard input, which is uploaded
unless the server has it already; or the id of a video on the server (vid_...).

environment: PREFILL_ADDRESS (--address), PREFILL_TOKEN_FILE (--token-file)
exit status: 0 success, 1 failure, 2 wrong usage, 3 a batch with failed lines, 130 interrupted
"""
BATCH_EPILOG = """\
input, one JSON object per line:
  {"custom_id": "1", "method": "POST", "url": "/v1/ask",
   "body": {"video": "a.mp4", "question": "Who opens the door?", "max_tokens": 64}}
"video" is a path (relative to the current folder), a file:// URL or an id. Instead of
"question" there may be "messages": [{"role": "user", "content": "..."}]. The other keys of
"body" are the options of "prefill ask" with underscores: fps, num_frames, max_frames,
max_pixels, system_prompt, quality, comparison, max_tokens, temperature, top_p, top_k,
seed, stop, ...

Each answer is appended to the output and synced to the disk at once. Run the same command
again to go on after an interruption: lines that are in the output are skipped, lines that
failed are asked again.
"""


def _connection() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("connection")
    group.add_argument("--address", metavar="HOST:PORT", help="server (default localhost:50051)")
    group.add_argument("--token-file", metavar="FILE", help="file with the bearer token")
    group.add_argument("--tls", action="store_true", help="TLS with the system's CAs")
    group.add_argument("--tls-ca", metavar="PEM", help="TLS with this CA")
    group.add_argument("--tls-cert", metavar="PEM", help="client certificate, for mTLS")
    group.add_argument("--tls-key", metavar="PEM", help="client key, for mTLS")
    group.add_argument("--tls-server-name", metavar="NAME", help="name in the certificate")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds per call (default 60)")
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    return parser


def _add_frames(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("frames (default: the model family's own)")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--fps", type=float, metavar="N", help="frames per second")
    rate.add_argument("--num-frames", type=int, metavar="N", help="frames, evenly spread")
    group.add_argument("--max-frames", type=int, metavar="N", help="frames at most, at any rate")
    group.add_argument(
        "--sample-by",
        choices=SAMPLED_BY,
        help="what is evenly spaced (default: time where the file's rate varies)",
    )
    group.add_argument("--max-pixels", type=int, metavar="N", help="processor's longest_edge")
    group.add_argument("--min-pixels", type=int, metavar="N", help="processor's shortest_edge")
    group.add_argument(
        "--cap-pixels-per-frame",
        action="store_true",
        default=None,
        help="apply the family's ceiling for one frame",
    )
    group.add_argument(
        "--square-pixels",
        action="store_true",
        default=None,
        help="ignore the file's sample aspect ratio, as vLLM does",
    )
    group.add_argument("--system-prompt", metavar="TEXT", help="system message before the video")

    _add_attention(parser)


def _add_comparison(parser: argparse.ArgumentParser, asks: bool) -> None:
    group = parser.add_argument_group("comparison, for research (instead of attention's options)")
    group.add_argument(
        "--comparison",
        choices=COMPARISONS,
        help="a published method computes the prefix, for one question",
    )
    if not asks:
        group.add_argument("--comparison-question", metavar="TEXT", help="the question it consults")
    group.add_argument("--anchor-tokens", type=int, metavar="N", help="default: as published")
    group.add_argument("--passing-tokens", type=int, metavar="N", help="default: as published")


def _add_attention(parser: argparse.ArgumentParser, note: str = "default: balanced") -> None:
    group = parser.add_argument_group(f"attention ({note})")
    dial = group.add_mutually_exclusive_group()
    dial.add_argument(
        "--quality",
        choices=[q for q in QUALITIES if q != "custom"],
        help="how much attention mass may be misplaced for speed",
    )
    dial.add_argument(
        "--epsilon", type=float, metavar="E", help="the same as a number, 0 (exact) to below 1"
    )
    group.add_argument(
        "--min-kept-mass",
        type=float,
        metavar="M",
        help="compute again what measurably keeps less, 0 (off) to 1",
    )


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens at most (default 256)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling")
    group.add_argument("--top-k", type=int, metavar="K", help="top-k sampling")
    group.add_argument("--seed", type=int, metavar="N", help="seed for sampling")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before TEXT; may be repeated"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is none")
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="go on after the end of the answer (for measurements)",
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of the ``prefill`` command."""
    connection = _connection()
    parser = argparse.ArgumentParser(
        prog="prefill",
        description=DESCRIPTION,
        epilog=EPILOG,
        parents=[connection],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = metadata.version("prefill-client")
    parser.add_argument("--version", action="version", version=f"prefill {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **kwargs: Any) -> Any:
        return commands.add_parser(
            name, help=text, description=text, parents=[connection], **kwargs
        )

    def json_flag(target: Any, text: str) -> None:
        target.add_argument("--json", action="store_true", help=text)

    ask = command("ask", "ask one or more questions about a video")
    _add_frames(ask)
    _add_comparison(ask, asks=True)
    _add_decoding(ask)
    ask.add_argument("video", metavar="VIDEO")
    ask.add_argument("questions", metavar="QUESTION", nargs="+")
    json_flag(ask, "one JSON object per answer instead of text")
    chat = command("chat", "talk about a video; each turn remembers the ones before")
    _add_frames(chat)
    _add_decoding(chat)
    chat.add_argument("video", metavar="VIDEO")
    start = command("start", "prefill videos now, so that questions are quick later")
    _add_frames(start)
    _add_comparison(start, asks=False)
    start.add_argument("videos", metavar="VIDEO", nargs="+")
    start.add_argument("--wait", action="store_true", help="wait until the prefill has ended")
    json_flag(start, "one JSON object per job")
    upload = command("upload", "upload videos; goes on with what was interrupted")
    upload.add_argument("files", metavar="FILE", nargs="+")
    upload.add_argument(
        "--allow-truncated", action="store_true", help="take what can be read of a cut file"
    )
    json_flag(upload, "one JSON object per video")
    json_flag(command("list", "list the videos on the server, newest first"), "one object per line")
    delete = command("delete", "delete videos from the server")
    delete.add_argument("ids", metavar="ID", nargs="+")
    jobs = command("jobs", "list prefill jobs, newest first, or show one")
    jobs.add_argument("job", metavar="JOB", nargs="?")
    json_flag(jobs, "one JSON object per job")
    watch = command("watch", "follow a prefill job until it has ended")
    watch.add_argument("job", metavar="JOB")
    json_flag(watch, "one JSON object per change")
    command("cancel", "cancel a prefill job").add_argument("job", metavar="JOB")
    inspect = command("inspect", "draw what a prefill's attention did, and how good it was")
    inspect.add_argument("job", metavar="JOB")
    inspect.add_argument(
        "-o",
        "--output",
        type=_png,
        metavar="FILE.png",
        help="picture to write (default: JOB.png, none with --json)",
    )
    json_flag(inspect, "the whole report as one JSON object")
    trace = command("trace", "write when what was done for a prefill, for ui.perfetto.dev")
    trace.add_argument("job", metavar="JOB")
    trace.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.json",
        help="file to write (default: JOB.json; - for stdout)",
    )
    _add_batch(command)
    return parser


def _add_batch(command: Any) -> None:
    batch = command(
        "batch",
        "answer a file of questions, many at a time",
        epilog=BATCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("input", type=Path, metavar="IN.jsonl")
    batch.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT.jsonl",
        help="answers; appended to if it exists",
    )
    batch.add_argument(
        "--errors",
        type=Path,
        metavar="ERR.jsonl",
        help="failed lines of this run (default: OUT.errors.jsonl)",
    )
    batch.add_argument(
        "--concurrency",
        type=_positive,
        default=4,
        metavar="N",
        help="questions at a time (default 4)",
    )
    _add_attention(batch, "for lines that have no option of it; default: balanced")
    batch.add_argument(
        "--strict", action="store_true", help="ask nothing if any line of the input is bad"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png file")
    return Path(text)


def client_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Client`` that the options amount to.

    Raises:
        OSError: the token file cannot be read.
        ValueError: options contradict each other.
    """
    given = vars(args)
    token_file = given.get("token_file") or os.environ.get("PREFILL_TOKEN_FILE")
    files = {name: given.get(f"tls_{name}") for name in ("ca", "cert", "key", "server_name")}
    tls = TLS(**files) if given.get("tls") or any(files.values()) else None
    return {
        "address": given.get("address") or os.environ.get("PREFILL_ADDRESS") or "localhost:50051",
        "token": Path(token_file).read_text().strip() if token_file else None,
        "tls": tls,
        "timeout": given.get("timeout", 60.0),
    }


def frame_options(args: argparse.Namespace) -> Any:
    """Return the frame options that were given."""
    return _given(args, FRAME_NAMES)


def attention_options(args: argparse.Namespace) -> Any:
    """Return the attention options that were given."""
    return _given(args, ATTENTION_NAMES)


def ask_options(args: argparse.Namespace) -> Any:
    """Return the options of ``Client.ask`` that were given."""
    return _given(args, ASK_NAMES)


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> Any:
    # A command has not all of them: chat, say, no comparison.
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}
