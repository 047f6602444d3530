"""Attention with its log-sum-exp on CPUs: oneDNN products around an online softmax of base two.

For float32 a strip of scores is a product, four passes over it while it is in the cache, and
another product; strips of keys are joined as in FlashAttention (arXiv 2205.14135, algorithm 1).
Scores are scaled to base two, since torch's ``exp2`` is several times as fast as its ``exp``.
Other dtypes go through torch's own kernel, which multiplies with MKL (see
``prefill_kernels.cpu.matmul``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefill_kernels.cpu.matmul import matmul_nt, uses_onednn
from prefill_kernels.cpu.threads import parallel_for

_ROWS = 2048
"""Most rows of a strip."""

_LEAST_ROWS = 256
"""A strip has fewer than ``_ROWS`` where there are threads to divide them, but at least these."""

_SCORES = 1 << 20
"""Scores that a strip holds at once (4 MiB of float32)."""


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of rows of queries, all of a batch entry with the same keys.

    Args:
        q: [batch, rows, head_dim], on a CPU.
        k, v: [batch, keys, head_dim]; any strides with a contiguous last dimension.
        scale: factor on the scores.
        hidden: [rows, last] bool, which of the last keys a row must not attend to. One of their
            values that is not finite makes NaN of the rows that see it, and of no other.

    Returns:
        Output [batch, rows, head_dim] and natural log-sum-exp [batch, rows], float32 (float64 for
        float64 inputs); 0 and -inf for a row without any key.
    """
    seen = None
    if hidden is not None:
        v, seen = _without_broken(v, hidden)
    out, lse = (_onednn if uses_onednn(q) else _torch_flash)(q, k, v, scale, hidden=hidden)
    return out if seen is None else out.masked_fill_(seen, torch.nan), lse


def _without_broken(x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Zeros for what is not finite of the last keys or values, since 0 times NaN is NaN.

    Args:
        x: [batch, keys, head_dim].
        hidden: as in ``attend_rows``.

    Returns:
        Like ``x``, and [batch, rows, head_dim] bool, which rows see what was replaced; ``x`` itself
        and ``None`` if all is finite.
    """
    start = x.shape[1] - hidden.shape[1]
    if torch.isfinite(x[:, start:].sum()):  # one pass, and nothing kept: the usual case
        return x, None
    broken = ~x[:, start:].isfinite()
    x = x.clone()
    x[:, start:].masked_fill_(broken, 0.0)
    return x, (~hidden).float() @ broken.float() > 0


def _onednn(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2])

    def strip(piece: tuple[int, slice], _: int) -> None:
        entry, rows = piece
        of_rows = None if hidden is None else hidden[rows]
        scaled = q[entry, rows] * (scale / math.log(2))
        out[entry, rows], lse[entry, rows] = _online_softmax(scaled, k[entry], v[entry], of_rows)

    each = -(-len(q) * q.shape[1] // torch.get_num_threads())
    size = min(_ROWS, max(_LEAST_ROWS, each))
    starts = range(0, q.shape[1], size)
    parallel_for(strip, [(entry, slice(at, at + size)) for entry in range(len(q)) for at in starts])
    return out, lse


def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[rows, head_dim] queries scaled to base two, over [keys, head_dim], strip by strip."""
    out = torch.zeros_like(q)
    total = q.new_zeros(len(q))
    top = q.new_full((len(q),), -torch.inf)
    visible = len(k) - (0 if hidden is None else hidden.shape[1])  # to all rows
    size = max(1, _SCORES // len(q))
    for start in range(0, len(k), size):
        keys = slice(start, start + size)
        scores = matmul_nt(q, k[keys])  # [rows, strip]
        if hidden is not None and start + size > visible:
            before = max(start - visible, 0)
            tail = scores[:, max(visible - start, 0) :]
            tail.masked_fill_(hidden[:, before : before + tail.shape[1]], -torch.inf)
        peak = torch.maximum(scores.amax(1), top)
        # -inf minus -inf is NaN: a row that has no key yet is measured from 0.
        peak = peak.masked_fill_(peak == -torch.inf, 0.0)
        scores.sub_(peak[:, None]).exp2_()
        fade = torch.exp2(top - peak)
        out = matmul_nt(scores, v[keys].T).addcmul_(out, fade[:, None])
        total = scores.sum(1).addcmul_(total, fade)
        top = peak
    lse = (top + total.log2()) * math.log(2)
    return out.div_(total.masked_fill(total == 0, 1.0)[:, None]), lse


def _torch_flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    mask = None
    seen = None
    if hidden is not None:
        k, seen = _without_broken(k, hidden)  # a mask is added to scores: NaN stays NaN
        shown = hidden.new_zeros(len(hidden), k.shape[1] - hidden.shape[1])
        mask = torch.zeros(len(hidden), k.shape[1], dtype=q.dtype)
        mask = mask.masked_fill_(torch.cat((shown, hidden), 1), -torch.inf)
        mask = mask.expand(len(q), 1, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, None], k[:, None], v[:, None], 0.0, False, attn_mask=mask, scale=scale
    )
    lse = lse[:, 0].to(torch.float64) if q.dtype == torch.float64 else lse[:, 0]
    if hidden is not None and hidden.shape[1] == k.shape[1]:
        lse[:, hidden.all(1)] = -torch.inf  # torch says 0
    if seen is not None:
        out[:, 0].masked_fill_(seen.any(-1, keepdim=True), torch.nan)
        lse = lse.masked_fill(seen.any(-1), torch.nan)
    return out[:, 0], lse
