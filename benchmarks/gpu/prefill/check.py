"""One layer of every mode against float32, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.prefill.device import Device
from benchmarks.gpu.prefill.inputs import AttentionInputs, Frames, Heads, video_attention
from benchmarks.gpu.prefill.model import RandomModel
from benchmarks.gpu.prefill.runs import DENSE, MODES, DenseKernel, Run, Settings, Workload, prefill
from benchmarks.gpu.prefill.shapes import PublishedModel
from prefill_service.attention.dense import Partial

LAYERS = 2  # one that attends, and the keys and values of the next, which are its result
EXACT = (DENSE, "exact")
ATTENTION_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYER_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the difference's norm over the norm."""
VERIFIED_SHARE = 0.3
VERIFIED_SLACK = 0.01
"""Verification samples: a sparse mode's true error may exceed the verified one by so much."""

COLUMNS = ("model", "mode", "attention_error", "limit", "kv_error", "kv_limit", "kept_mass", "ok")
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Wanted:
    """In float32.

    Attributes:
        attended: [q_heads, tokens, head_dim] of the layer.
        stored: [tokens, 2, kv_heads, head_dim] of the next.
    """

    attended: Tensor
    stored: Tensor


def written_out(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
    """Attention as its formula says, some rows at a time; one chunk, so always causal."""
    assert causal, "the reference has one chunk"
    group = len(q) // len(k)
    out = torch.empty_like(q)
    position = torch.arange(q.shape[1], device=q.device)
    for head in range(len(q)):
        keys = k[head // group]
        values = v[head // group]
        for start in range(0, q.shape[1], _ROWS):
            scores = (q[head, start : start + _ROWS] @ keys.T) * scale
            scores.masked_fill_(position > position[start : start + _ROWS, None], -torch.inf)
            out[head, start : start + _ROWS] = scores.softmax(-1) @ values
    return Partial(out, out.new_zeros(q.shape[:2]))


def problem(
    device: Device, shape: PublishedModel, video_tokens: int, mlp_chunk_tokens: int
) -> Workload:
    """A model of two layers, a plan and inputs."""
    plan = shape.plan(video_tokens)
    model = RandomModel(
        shape, LAYERS, device.dtype, device=device.device, mlp_chunk_tokens=mlp_chunk_tokens
    )
    inputs = video_attention(
        Frames(plan.num_tokens, shape.patch_tokens),
        Heads(shape.heads, shape.kv_heads, shape.head_dim),
        dtype=device.dtype,
        device=device.device,
    )
    return Workload(model, plan, inputs)


def reference(device: Device, workload: Workload, settings: Settings) -> Wanted:
    """The same weights and inputs in float32, in one chunk."""
    model = workload.model
    plan = workload.plan
    inputs = workload.inputs
    exact = RandomModel(
        model.preset,
        LAYERS,
        torch.float32,
        device=device.device,
        mlp_chunk_tokens=0,
        drawn=model.dtype,
    )
    exact_inputs = AttentionInputs(inputs.q.float(), inputs.k.float(), inputs.v.float())
    whole = Settings(settings.chunk_tokens, 2 * plan.num_tokens, settings.sparse)
    run = prefill(
        device,
        Workload(exact, plan, exact_inputs),
        mode=DENSE,
        settings=whole,
        kernel=written_out,
        capture=True,
    )
    assert run.attended is not None
    return Wanted(run.attended, run.stored[LAYERS - 1])


def check(
    device: Device,
    shape: PublishedModel,
    video_tokens: int,
    *,
    settings: Settings,
    kernels: Mapping[str, DenseKernel],
    mlp_chunk_tokens: int,
) -> list[dict[str, Any]]:
    """A row for each mode, and each dense kernel.

    A kernel that raises fails its row, and nothing else.
    """
    workload = problem(device, shape, video_tokens, mlp_chunk_tokens)
    wanted = reference(device, workload, settings)
    # Two chunks of the dense baseline, so that partial results are merged.
    halves = Settings(settings.chunk_tokens, workload.plan.num_tokens // 2, settings.sparse)
    contestants = [(f"{DENSE} {name}", DENSE, kernel) for name, kernel in kernels.items()]
    some = next(iter(kernels.values()))
    contestants += [(mode, mode, some) for mode in MODES if mode != DENSE]
    rows = []
    for name, mode, kernel in contestants:
        row: dict[str, Any] = {"model": shape.name, "mode": name}
        try:
            run = prefill(device, workload, mode=mode, settings=halves, kernel=kernel, capture=True)
            row |= compare(
                run, wanted, mode, dtype=device.dtype, sparse_from=settings.sparse.from_tokens
            )
        except Exception as error:
            if mode != DENSE:
                raise
            print(f"{name} cannot: {type(error).__name__}: {str(error).splitlines()[0]}")
            row["ok"] = False
        rows.append(row)
    return rows


def compare(
    run: Run, wanted: Wanted, mode: str, *, dtype: torch.dtype, sparse_from: int
) -> dict[str, Any]:
    """Errors of one run, with what they may be."""
    assert run.attended is not None
    out = run.attended.float()
    exact = wanted.attended
    stored = run.stored[LAYERS - 1].float()
    kv_error = float((stored - wanted.stored).norm() / wanted.stored.norm())
    if mode in EXACT:
        error = float((out - exact).norm() / exact.norm())
        limit = ATTENTION_LIMIT[dtype]
        kv_limit = LAYER_LIMIT[dtype]
        kept = None
    else:
        # As verification has it: each row's error over the row, the mean of all rows that
        # came after the first sparse chunk (all verified ones did).
        rows = (out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
        report = run.reports[0]
        error = float(rows[:, sparse_from:].mean())
        verified = report.output_error.mean(0.0)
        limit = verified * (1 + VERIFIED_SHARE) + VERIFIED_SLACK
        kv_limit = None
        kept = report.kept_mass.mean(1.0)
    within = error <= limit and (kv_limit is None or kv_error <= kv_limit)  # NaN is not
    return {
        "attention_error": error,
        "limit": limit,
        "kv_error": kv_error,
        "kv_limit": kv_limit,
        "kept_mass": kept,
        "ok": within,
    }
