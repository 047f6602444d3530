"""Exact attention in pieces: partial results with their log-sum-exp, and the merge.

A rank attends to its keys as they become available (past chunks, its own tokens, earlier ranks'
tokens) and merges the partial results, which is exact: softmax over a union of key sets is the
LSE-weighted mean of the softmaxes over the parts (Milakov & Gimelshein, arXiv 1805.02867;
FlashAttention, arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prefill_kernels.cpu.attention import attend_rows
from torch import Tensor

from prefill_service.attention_shape import accumulation_dtype

_CAUSAL_ROWS = 128
"""Queries of a strip of causal attention on CPUs: half of its last keys are computed in vain."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of the keys.

    Attributes:
        out: [q_heads, queries, head_dim].
        lse: [q_heads, queries] float32 (float64 for float64 inputs), natural log; -inf where a
            query saw no key, and there ``out`` is 0.
    """

    out: Tensor
    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
    """Dense attention of ``q`` over ``k``, ``v``.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, keys, head_dim]; any strides with a contiguous last dimension.
            ``q_heads`` is a multiple of ``kv_heads`` (GQA; arXiv 2305.13245).
        causal: query i sees keys 0..i; needs as many keys as queries. If not, all keys.
        scale: factor on the scores.

    Raises:
        ValueError: head counts or lengths that do not fit.
    """
    q_heads, queries, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are no multiple of {kv_heads} KV heads")
    if causal and keys != queries:
        raise ValueError(f"causal attention needs as many keys as queries, got {keys}, {queries}")
    if keys == 0 or queries == 0:
        return empty_partial(q)
    queries_per_kv = q_heads // kv_heads
    if q.device.type == "cpu":
        return _attend_on_cpu(q, k, v, causal=causal, scale=scale)
    if causal:
        # Packed rows would break the causal diagonal, so repeat K and V; this part is short.
        v, seen = hide_broken(v)
        k, v, seen = (x.repeat_interleave(queries_per_kv, 0) for x in (k, v, seen))
        out, lse = _flash(q[None], k[None], v[None], causal=True, scale=scale)
        return Partial(out[0].masked_fill_(seen, torch.nan), lse[0])
    packed = q.reshape(1, kv_heads, queries_per_kv * queries, head_dim)
    out, lse = _flash(packed, k[None], v[None], causal=False, scale=scale)
    return Partial(out.reshape(q_heads, queries, head_dim), lse.reshape(q_heads, queries))


def attend_causal(q: Tensor, k: Tensor, v: Tensor, *, q_offset: int, scale: float) -> Partial:
    """Dense attention of queries that stand at ``q_offset`` and after, to all keys up to each.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, q_offset + queries, head_dim]; the first ``q_offset`` in any order.
        q_offset: position of the first query.
        scale: factor on the scores.
    """
    parts = [attend(q, k[:, q_offset:], v[:, q_offset:], causal=True, scale=scale)]
    if q_offset:
        before = slice(0, q_offset)
        parts.append(attend(q, k[:, before], v[:, before], causal=False, scale=scale))
    return merge(parts)


def empty_partial(q: Tensor) -> Partial:
    """The partial result over no key: zero output, LSE -inf."""
    lse_dtype = accumulation_dtype(q.dtype)
    return Partial(torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype))


def merge(partials: list[Partial]) -> Partial:
    """Combine partial results over disjoint key sets. A row without any key stays 0, -inf."""
    if len(partials) == 1:
        return partials[0]
    lse = torch.stack([p.lse for p in partials])  # [parts, q_heads, queries]
    total = torch.logsumexp(lse, 0)
    # -inf minus -inf is NaN: a row that saw no key at all keeps weight 0 in every part.
    weights = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))
    out = torch.zeros_like(partials[0].out, dtype=lse.dtype)
    for partial, weight in zip(partials, weights, strict=True):
        out += partial.out * weight[..., None]
    return Partial(out.to(partials[0].out.dtype), total)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
    """``attend``: the query heads of a KV head are rows that share their keys."""
    grouped = q.reshape(len(k), -1, *q.shape[1:])  # [kv_heads, queries_per_kv, queries, head_dim]
    queries = q.shape[1]
    size = min(queries, _CAUSAL_ROWS) if causal else queries
    outs = []
    lses = []
    for start in range(0, queries, size):
        part = grouped[:, :, start : start + size]
        queries_per_kv, count = part.shape[1:3]
        end = k.shape[1]
        hidden = None
        if causal:  # what lies before the strip is seen by all of it
            end = start + count
            hidden = torch.ones(count, count, dtype=torch.bool).triu(1).repeat(queries_per_kv, 1)
        out, lse = attend_rows(part.flatten(1, 2), k[:, :end], v[:, :end], scale, hidden=hidden)
        outs.append(out.view(part.shape))
        lses.append(lse.view(part.shape[:3]))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in (outs, lses))
    return Partial(out.reshape(q.shape), lse.reshape(q.shape[:2]))


def hide_broken(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values of causal attention for kernels that give later keys weight 0: 0 times NaN is NaN.

    Args:
        v: [kv_heads, keys, head_dim].

    Returns:
        The values with 0 for what is not finite, and bool of the same shape: where the query of the
        same number sees something that was replaced. Nothing here waits for the device.
    """
    broken = ~v.isfinite()
    return v.masked_fill(broken, 0.0), broken.cumsum(1) > 0


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's own CUDA kernels that return the LSE. All of [1, heads, length, head_dim]."""
    aten = torch.ops.aten
    if q.dtype in (torch.float16, torch.bfloat16):
        heads = q.shape[1] // k.shape[1]
        assert heads == 1, "GQA is packed or repeated before the kernel"
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    # The kernel pads the row count of the LSE.
    return out, lse[..., : q.shape[2]]
