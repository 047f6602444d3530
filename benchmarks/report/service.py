"""Blocks on speed: the service beside vLLM alone and transformers, load, profile and ingest."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.report.results import (
    LARGE_CHECKPOINT,
    NEEDLE_CHECKPOINT,
    Row,
    content,
    one,
    only,
    rows,
    seconds,
    settings,
    share,
    span,
)
from benchmarks.service import targets

_SYSTEMS = {"ours": "service", "ours-1": "service, one rank", "vllm": "vLLM alone"}
_TIMES = "\N{MULTIPLICATION SIGN}"
_STAGES = ("decode", "vision", "prefill", "handoff", "vllm")


def first_token() -> str:
    """Seconds from a question to its first token, by length."""
    header = (
        "checkpoint",
        "video tokens",
        "vLLM alone",
        "`exact`",
        "`balanced`",
        "density",
        "kept mass",
        "transformers",
    )
    lines = []
    for checkpoint, tokens in _lengths():
        found = only(rows("service-cpu"), checkpoint=checkpoint, video_tokens=tokens)
        balanced = one(found, system="ours", mode="balanced")
        lines.append(
            [
                checkpoint,
                f"{tokens:,}",
                _with_ratio(one(found, system="vllm")),
                _with_ratio(one(found, system="ours", mode="exact")),
                _with_ratio(balanced),
                "" if balanced is None else f"{balanced['density']:.2f}",
                "" if balanced is None else f"{balanced['kept_mass']:.2f}",
                _with_ratio(one(found, system="transformers")),
            ]
        )
    return tables.markdown(header, lines)


def aims() -> str:
    """Each aim, and the range of what was measured over the lengths that it is for."""
    header = ("checkpoint", "what", "mode", "video tokens", "aim", "measured", "met")
    lines = []
    for checkpoint in (LARGE_CHECKPOINT, NEEDLE_CHECKPOINT):
        found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for what, mode, tokens, aim, measured in targets.lines(rows("service-cpu"), checkpoint):
            if aim is not None:
                key = (str(what), str(mode), str(aim))
                found.setdefault(key, []).append((int(str(tokens)), float(str(measured))))
        for (what, mode, aim), pairs in found.items():
            values = [value for _, value in pairs]
            lines.append(
                [
                    checkpoint,
                    what,
                    f"`{mode}`",
                    span([tokens for tokens, _ in pairs], ",d"),
                    aim,
                    span(values, ".3f" if "<=" in aim and "0.0" in aim else ".2f"),
                    "yes" if all(_meets(value, aim) for value in values) else "no",
                ]
            )
    return tables.markdown(header, lines)


def stages() -> str:
    """Seconds of each stage of the service's first answers, and the second question."""
    header = ("checkpoint", "mode", "video tokens", *_STAGES, "second question", "of the first")
    lines = []
    for row in only(rows("service-cpu"), system="ours"):
        second = row["second_first_token_s"]
        lines.append(
            [
                row["checkpoint"],
                f"`{row['mode']}`",
                f"{row['video_tokens']:,}",
                *(seconds(row["stages"][name]) for name in _STAGES),
                seconds(second),
                share(second / row["first_token_s"]),
            ]
        )
    return tables.markdown(header, lines)


def readme() -> str:
    """Speed and quality against vLLM alone, with the larger checkpoint."""
    found = only(rows("service-cpu"), checkpoint=LARGE_CHECKPOINT)
    compared = [row for row in found if row["speedup_over_vllm"] is not None]
    exact = only(compared, system="ours", mode="exact")
    same = all(len(set(row["tokens_equal"].split("/"))) == 1 for row in exact)
    header = (
        "video tokens",
        "vLLM alone",
        "`exact`, the same tokens" if same else "`exact`",
        "`balanced`, the default",
        "keys attended",
        "second question (vLLM alone)",
    )
    lines = []
    for row in exact:
        at_length = only(compared, video_tokens=row["video_tokens"])
        vllm = one(at_length, system="vllm")
        balanced = one(at_length, system="ours", mode="balanced")
        assert vllm is not None
        assert balanced is not None
        lines.append(
            [
                f"{row['video_tokens']:,}",
                f"{seconds(vllm['first_token_s'])} s",
                _times_as_fast(row),
                _times_as_fast(balanced),
                share(balanced["density"]),
                f"{seconds(balanced['second_first_token_s'])} s "
                f"({seconds(vllm['second_first_token_s'])} s)",
            ]
        )
    lost = one(content("fidelity.meta")["losses"], quality="balanced", ranks=1)
    assert lost is not None
    return (
        f"{tables.markdown(header, lines)}\n\n"
        f"{machine()}\n"
        f"Accuracy of `balanced` on {lost['questions']:,} questions with known answers: "
        f"{-lost['points_lost']:+.1f} points against exact attention "
        f"(95 % interval {-lost['high']:+.1f} to {-lost['low']:+.1f})."
    )


def long_question() -> str:
    """Short questions beside a long one, over the same alone."""
    header = (
        "the long question's text is prefilled by",
        "its tokens",
        "short p50, beside / idle",
        "short p95, beside / idle",
        "short answers beside it",
        "it took",
    )
    names = {
        "ranks": "the ranks",
        "vllm": "vLLM, at the service's pace",
        "vllm-own": "vLLM, by its own scheduler",
    }
    limit_s = settings("long-question-cpu")["limit_s"]
    lines = []
    for row in rows("long-question-cpu"):
        lines.append(
            [
                names[row["way"]],
                f"{row['tokens']:,}",
                f"{row['p50_ratio']:.1f}",
                f"{row['p95_ratio']:.1f}",
                row["beside"],
                f"over {limit_s:.0f} s" if row["long_s"] is None else f"{row['long_s']:.0f} s",
            ]
        )
    return tables.markdown(header, lines)


def load() -> str:
    """Twenty clients: waiting times and memory of the service and of vLLM alone."""
    header = ("system", "videos", "questions", "failed", "p50, s", "p95, s", "worst, s", "right")
    lines: list[list[object]] = [
        [
            _SYSTEMS[row["system"]],
            row["videos"],
            row["questions"],
            row["failed"],
            *(seconds(row[name]) for name in ("p50_s", "p95_s", "worst_s")),
            share(row["right"]),
        ]
        for row in rows("load-cpu")
    ]
    memory = [
        [
            _SYSTEMS[row["system"]],
            *(f"{row[name] / 1024:.1f} GiB" for name in ("start_mib", "peak_mib", "end_mib")),
            f"{row['slope_mib_per_min']:.0f} MiB a minute",
        ]
        for row in content("load-cpu")["memory"]
    ]
    return (
        tables.markdown(header, lines)
        + "\n\n"
        + tables.markdown(
            ("system", "memory at start", "peak", "end", "growth in the second half"), memory
        )
    )


def profile() -> str:
    """Where a prefill's time goes, and how far each part is from its operator alone."""
    header = ("part", "seconds", "share", "TFLOP", "GFLOP/s", "alone", "of that")
    lines = []
    for row in rows("profile-cpu"):
        part = row["part"].replace("  ", "&nbsp;&nbsp;")
        flops = row["flops"]
        alone = row["alone_flop_s"]
        rates = ["", "", "", ""]
        if flops:
            rate = flops / row["seconds"]
            rates = [
                f"{flops / 1e12:.2f}",
                f"{rate / 1e9:.0f}",
                f"{alone / 1e9:.0f}",
                share(rate / alone),
            ]
        lines.append([part, f"{row['seconds']:.2f}", share(row["share"]), *rates])
    return tables.markdown(header, lines)


def ingest() -> str:
    """Decoding an hour of video, beside OpenCV reading it serially."""
    header = ("", "frames", "seconds", "CPU seconds", "memory above the start, MiB")
    names = {"ours": "service", "opencv": "OpenCV, every frame grabbed"}
    lines = [
        [
            names[row["contestant"]],
            row["frames"],
            seconds(row["decode_s"] + row.get("index_s", 0.0)),
            seconds(row["cpu_s"]),
            f"{row['memory_mib']:.0f}",
        ]
        for row in sorted(rows("ingest-cpu"), key=lambda row: str(row["contestant"]), reverse=True)
    ]
    summary = content("ingest-cpu")["summary"]
    return (
        f"{tables.markdown(header, lines)}\n\n"
        f"{summary['ratio']:.2f} times as fast as OpenCV by the clock, "
        f"{summary['ratio_of_cpu_time']:.2f} times by CPU time; the pixels are the same."
    )


def hour() -> str:
    """A question about an hour of video, through the whole service."""
    row = rows("hour-cpu")[0]
    return tables.markdown(
        ("what", "measured"),
        [
            ["video tokens", f"{row['video_tokens']:,}"],
            ["first token", f"{seconds(row['first_token_s'])} s"],
            [
                "bound: 1.15 x the longer of decoding and computing, and the hand-off",
                f"{seconds(row['bound_s'])} s",
            ],
            ["decoding", f"{seconds(row['decode_s'])} s"],
            ["vision tower and prefill", f"{seconds(row['compute_s'])} s"],
            ["of which hidden behind decoding", share(row["hidden"])],
            ["hand-off to vLLM", f"{row['handoff_s']:.2f} s"],
            ["attention density", f"{row['density']:.2f}"],
            ["memory above model and KV", f"{row['memory_mib']:.0f} MiB"],
        ],
    )


def _lengths() -> list[tuple[str, int]]:
    """(checkpoint, video tokens) of all rows, in the order measured."""
    return list(
        dict.fromkeys((row["checkpoint"], row["video_tokens"]) for row in rows("service-cpu"))
    )


def _with_ratio(row: Row | None) -> str:
    """Seconds, and in brackets vLLM alone's time over them."""
    if row is None or row["first_token_s"] is None:
        return ""
    text = seconds(row["first_token_s"])
    ratio = row["speedup_over_vllm"]
    return text if ratio is None or row["system"] == "vllm" else f"{text} ({ratio:.2f})"


def _times_as_fast(row: Row) -> str:
    return f"{seconds(row['first_token_s'])} s ({row['speedup_over_vllm']:.1f}{_TIMES})"


def _meets(value: float, aim: str) -> bool:
    sign, _, bound = aim.partition(" ")
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def machine() -> str:
    """One line on the machine and the versions of the comparison with vLLM."""
    noted = settings("service-cpu")
    return (
        f"{noted['cores']} cores of an {noted['cpu']}, {noted['dtype']}, torch {noted['torch']}, "
        f"vLLM {noted['vllm']}, transformers {noted['transformers']}, {noted['date']}."
    )
