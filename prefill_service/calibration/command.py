"""The command: videos in, head budgets and a table out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from prefill_service.attention.head_budgets import MAX_EPSILON, HeadBudgets, load_head_budgets
from prefill_service.calibration.encoded_video import (
    EncodedVideo,
    PlannedVideo,
    encode_video,
    plan_video,
)
from prefill_service.calibration.fit import fit, grid
from prefill_service.calibration.max_min import layer_weights
from prefill_service.calibration.measure import Bench, Measured
from prefill_service.config import EngineConfig
from prefill_service.engine.resolve import chunk_tokens, sparse_settings
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import (
    Checkpoint,
    open_checkpoint,
    resolve_device,
    resolve_dtype,
)
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_COLUMNS = ("layer", "worst kept mass", "mean kept mass", "density", "epsilon", "sensitivity")

_STRONG = 2.0
"""Sensitivity is measured at so many times the epsilon: coarse, but not beyond all use."""


def calibrate(args: argparse.Namespace) -> int:
    """Run ``prefill-service calibrate``; returns its exit code.

    Raises:
        ServiceError: CONFIG_INVALID for arguments; MODEL_INVALID; or what a video was refused for.
    """
    _check(args)
    try:
        with tempfile.TemporaryDirectory(prefix="prefill-calibrate-") as folder:
            _calibrate(args, Path(folder))
    except KeyboardInterrupt:
        print("\nprefill-service: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _calibrate(args: argparse.Namespace, folder: Path) -> None:
    messages: Any = transformers.utils.logging
    messages.disable_progress_bar()
    messages.set_verbosity_error()  # a prefill needs no lm_head: its absence is no news
    checkpoint = open_checkpoint(args.model)
    if checkpoint.shape.num_layers < 2:
        raise ServiceError(
            Reason.MODEL_INVALID,
            f"{args.model} has {checkpoint.shape.num_layers} layer; a prefill attends in all but "
            "the last, so that there is nothing to calibrate",
        )
    given = None
    if args.check:
        given = load_head_budgets(
            args.check,
            checkpoint.fingerprint,
            shape=(checkpoint.shape.attending_layers, checkpoint.shape.kv_heads),
            option="--check",
        )
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, checkpoint, device)
    engine = EngineConfig(
        chunk_tokens=args.chunk_tokens, sparse_block_tokens=args.sparse_block_tokens
    )
    sizes = sparse_settings(engine, args.sparse_from_tokens)
    settings = replace(sizes, verified_rows=args.rows)
    planned = _plan_videos(args, PrefixPlanner(checkpoint, dtype))  # before the weights are loaded
    _say(f"loading {args.model}, {dtype} on {device}")
    model = PrefillModel(checkpoint, getattr(torch, dtype), torch.device(device))
    videos = _encode_videos(planned, model, chunk_tokens(engine, device), folder)
    bench = Bench(model, videos, settings, _say)
    if given is not None:
        before = bench.measure(bench.uniform(given.epsilon), f"epsilon {given.epsilon:g}")
        budgets = np.array(given.head_epsilons)
        after = bench.measure(budgets, "the budgets")
        print(format_table(before, after, budgets, given.layer_sensitivity))
        return
    _write(args, bench, checkpoint)


def _plan_videos(args: argparse.Namespace, planner: PrefixPlanner) -> list[PlannedVideo]:
    sampling = FrameSampling(fps=args.fps, num_frames=args.num_frames, max_pixels=args.max_pixels)
    return [plan_video(path, planner, sampling, args.sparse_from_tokens) for path in args.videos]


def _encode_videos(
    planned: list[PlannedVideo], model: PrefillModel, chunk: int, folder: Path
) -> list[EncodedVideo]:
    videos = []
    for video in planned:
        _say(f"decoding {video.path.name}: {video.plan.num_tokens} tokens")
        videos.append(encode_video(video, model, chunk, folder))
    return videos


def _write(args: argparse.Namespace, bench: Bench, checkpoint: Checkpoint) -> None:
    measured = {
        point: bench.measure(bench.uniform(point), f"epsilon {point:g}")
        for point in grid(args.epsilon)
    }
    sensitivity = np.zeros(0)
    if args.sensitivity != "off":
        sensitivity = bench.sensitivity(min(_STRONG * args.epsilon, MAX_EPSILON)).round(6)
    weights = layer_weights(sensitivity) if args.sensitivity == "weigh" else None
    result = fit(
        args.epsilon, measured, lambda epsilons: bench.measure(epsilons, "checking"), weights
    )
    budgets = HeadBudgets(
        model_fingerprint=checkpoint.fingerprint,
        epsilon=args.epsilon,
        head_epsilons=tuple(tuple(row) for row in result.epsilons.tolist()),
        layer_sensitivity=tuple(sensitivity.tolist()),
    )
    try:
        budgets.save(args.out)
    except OSError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID, f"--out {args.out} cannot be written: {error.strerror}"
        ) from error
    print(format_table(result.before, result.after, result.epsilons, budgets.layer_sensitivity))
    print(f"{args.out}: head budgets {budgets.digest}")


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that could only fail after minutes."""

    def check(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise ServiceError(
                Reason.CONFIG_INVALID,
                f"{name} {value} is not accepted; expected {accepted}",
                name=name,
                value=value,
                accepted=accepted,
            )

    within = 0 < args.epsilon <= MAX_EPSILON
    check(within, "--epsilon", args.epsilon, f"more than 0 and at most {MAX_EPSILON}")
    check(args.rows > 0, "--rows", args.rows, "1 or more")
    check(args.sparse_from_tokens > 0, "--sparse-from-tokens", args.sparse_from_tokens, "1 or more")
    check(args.chunk_tokens >= 0, "--chunk-tokens", args.chunk_tokens, "0 or more")
    if args.out:
        writable = args.out.parent.is_dir() and not args.out.is_dir()
        check(writable, "--out", args.out, "a file in a folder that exists")


def _say(text: str) -> None:
    """Progress; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def format_table(
    before: Measured, after: Measured, epsilons: np.ndarray, sensitivity: Sequence[float]
) -> str:
    """What a calibration prints: per layer before and after, and the change in all.

    Args:
        before, after: with the uniform epsilon, and with the budgets.
        epsilons: [layers, kv_heads] the budgets.
        sensitivity: [layers], or empty.
    """
    rows = [_COLUMNS, *_layers(before, after, epsilons, sensitivity)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.append(
        f"worst head's kept mass {_change(before.worst, after.worst, 4)}, "
        f"mean {_change(before.kept_mass.mean(), after.kept_mass.mean(), 4)}, "
        f"attended keys {after.total / before.total:.4f} of before"
    )
    return "\n".join(lines)


def _layers(
    before: Measured, after: Measured, epsilons: np.ndarray, sensitivity: Sequence[float]
) -> Iterator[tuple[str, ...]]:
    for layer, row in enumerate(epsilons):
        mass = before.kept_mass[layer], after.kept_mass[layer]
        yield (
            str(layer),
            _change(mass[0].min(), mass[1].min()),
            _change(mass[0].mean(), mass[1].mean()),
            _change(before.density[layer].mean(), after.density[layer].mean()),
            f"{row.min():.3f} to {row.max():.3f}",
            f"{sensitivity[layer]:.4f}" if len(sensitivity) else "-",
        )


def _change(before: float, after: float, digits: int = 3) -> str:
    return f"{before:.{digits}f} -> {after:.{digits}f}"
