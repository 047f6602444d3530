"""The command: videos in, a profile and a table out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from prefill_service.attention.head_budgets import MAX_EPSILON, HeadBudgetProfile, load_profile
from prefill_service.calibration.fit import fit, grid
from prefill_service.calibration.max_min import layer_weights
from prefill_service.calibration.measure import Bench
from prefill_service.calibration.prefix import EncodedVideo, encode_video, plan_video
from prefill_service.calibration.table import table
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
    if checkpoint.num_layers < 2:
        raise ServiceError(
            Reason.MODEL_INVALID,
            f"{args.model} has {checkpoint.num_layers} layer; a prefill attends in all but the "
            "last, so that there is nothing to calibrate",
        )
    given = None
    if args.check:
        given = load_profile(
            args.check, checkpoint.fingerprint, checkpoint.num_layers - 1,
            checkpoint.num_kv_heads, "--check",
        )  # fmt: skip
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, checkpoint, device)
    engine = EngineConfig(
        chunk_tokens=args.chunk_tokens, sparse_block_tokens=args.sparse_block_tokens
    )
    sizes = sparse_settings(engine, args.sparse_from_tokens)
    settings = replace(sizes, certify_rows=args.rows)
    model, videos = _load(args, checkpoint, device, dtype, chunk_tokens(engine, device), folder)
    bench = Bench(model, videos, settings, _say)
    if given is not None:
        before = bench.measure(bench.uniform(given.epsilon), f"epsilon {given.epsilon:g}")
        budgets = np.array(given.head_epsilons)
        after = bench.measure(budgets, "the profile")
        print(table(before, after, budgets, given.layer_sensitivity))
        return
    _write(args, bench, checkpoint)


def _load(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    chunk: int,
    folder: Path,
) -> tuple[PrefillModel, list[EncodedVideo]]:
    """The model and the videos; all of these are looked at before the weights are loaded."""
    planner = PrefixPlanner(checkpoint, dtype)
    sampling = FrameSampling(fps=args.fps, num_frames=args.num_frames, max_pixels=args.max_pixels)
    planned = [plan_video(path, planner, sampling, args.sparse_from_tokens) for path in args.videos]
    _say(f"loading {args.model}, {dtype} on {device}")
    model = PrefillModel(checkpoint, getattr(torch, dtype), torch.device(device))
    videos = []
    for video in planned:
        _say(f"decoding {video.path.name}: {video.plan.num_tokens} tokens")
        videos.append(encode_video(video, model, chunk, folder))
    return model, videos


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
    profile = HeadBudgetProfile(
        checkpoint.fingerprint,
        args.epsilon,
        tuple(tuple(row) for row in result.epsilons.tolist()),
        tuple(sensitivity.tolist()),
    )
    try:
        profile.save(args.out)
    except OSError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID, f"--out {args.out} cannot be written: {error.strerror}"
        ) from error
    print(table(result.before, result.after, result.epsilons, profile.layer_sensitivity))
    print(f"{args.out}: profile {profile.digest}")


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that could only fail after minutes."""

    def check(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise ServiceError(
                Reason.CONFIG_INVALID,
                f"{name} {value} is not accepted; expected {accepted}",
                name=name, value=value, accepted=accepted,
            )  # fmt: skip

    check(0 < args.epsilon <= MAX_EPSILON, "--epsilon", args.epsilon,
          f"more than 0 and at most {MAX_EPSILON}")  # fmt: skip
    check(args.rows > 0, "--rows", args.rows, "1 or more")
    check(args.sparse_from_tokens > 0, "--sparse-from-tokens", args.sparse_from_tokens, "1 or more")
    check(args.chunk_tokens >= 0, "--chunk-tokens", args.chunk_tokens, "0 or more")
    if args.out:
        check(args.out.parent.is_dir() and not args.out.is_dir(), "--out", args.out,
              "a file in a folder that exists")  # fmt: skip


def _say(text: str) -> None:
    """Progress; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)
