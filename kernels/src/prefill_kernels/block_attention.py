"""Block-sparse flash attention over a ragged block-CSR: causal, GQA, paged or contiguous keys.

A program owns ``BLOCK_M`` packed rows (query heads x tokens) of one (KV head, query tile) and
walks three key sets under one online softmax (FlashAttention-2, arXiv 2307.08691): the tile's
local region with the causal mask, the kept blocks of its CSR row, which lie wholly in the past and
need no mask, and optionally the summaries of the dropped blocks, each standing for its block as one
key with an additive logit bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.autotune import CONFIGS, TUNED_FROM, fallback, prune, suitable
from prefill_kernels.csr import BlockCSR
from prefill_kernels.formats import AttentionOptions, DroppedBlocks, Tiling
from prefill_kernels.inputs import (
    as_blocks,
    check_attention,
    check_rows,
    descriptor,
    tma_usable,
)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def attention_kernel(
    p_q,
    p_k,
    p_v,
    k_desc_64,
    v_desc_64,
    k_desc_128,
    v_desc_128,
    p_k_mean,
    p_v_mean,
    p_bias,
    p_row_ptr,
    p_col,
    p_table,
    p_order,
    p_out,
    p_lse,
    stride_q_head,
    stride_q_token,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table_head,
    queries,
    tiles,
    tile_tokens,
    q_offset,
    blocks,
    scale_log2,
    inverse_scale,
    skip_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGED: tl.constexpr,
    SUMMARIES: tl.constexpr,
    ORDERED: tl.constexpr,
    SKIP: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """``block_sparse_attention`` of BLOCK_M packed rows of one (KV head, query tile).

    Packed row r is query head r // tokens of the KV head, and token r % tokens of the tile.

    ALIGNED: there are tensor descriptors. It is part of the autotuner's key, so that what was
    tuned with them is not used without.
    """
    tl.static_assert(ALIGNED or not TMA, "TMA needs tensor descriptors")
    # The masked loops address every element; a narrower tile keeps them within the registers, a
    # still narrower one the local region's, which looks for values that are not finite as well.
    SIDE_N: tl.constexpr = min(BLOCK_N, 64 if BLOCK_D <= 128 else 32)
    LOCAL_N: tl.constexpr = min(BLOCK_N, 64 if BLOCK_D <= 64 else 32)

    m_blocks = tl.cdiv(GROUP * tl.minimum(tile_tokens, queries), BLOCK_M)
    i_m = tl.program_id(0) % m_blocks
    i_row = tl.program_id(0) // m_blocks
    if ORDERED:
        i_row = tl.load(p_order + i_row)
    else:  # per head from the last tile, which sees most keys, to the first
        i_row += tiles - 1 - 2 * (i_row % tiles)
    i_head = i_row // tiles
    i_tile = i_row % tiles
    tokens = tl.minimum(tile_tokens, queries - i_tile * tile_tokens)
    if i_m * BLOCK_M >= GROUP * tokens:
        return
    first = q_offset + i_tile * tile_tokens  # position of the tile's first query

    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < GROUP * tokens
    o_d = tl.arange(0, BLOCK_D)
    d_mask = o_d < HEAD_DIM
    o_q = (i_head * GROUP + rows // tokens).to(tl.int64) * stride_q_head
    o_q += (i_tile * tile_tokens + rows % tokens).to(tl.int64) * stride_q_token
    q_mask = valid[:, None] & d_mask[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=q_mask, other=0.0)  # [M, D]

    # Keys and values of the KV head: pointer, stride of blocks, stride of tokens.
    k = (p_k + i_head.to(tl.int64) * stride_k_head, stride_k_block, stride_k_token)
    v = (p_v + i_head.to(tl.int64) * stride_v_head, stride_v_block, stride_v_token)
    if PAGED:
        p_table += i_head * stride_table_head
    # The online softmax: weighted sum of values, largest score, sum of weights. A finite start
    # instead of -inf: rows and tiles without any key then need no special case.
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    softmax = (acc, m, total)

    if LOCAL:
        position = first + rows % tokens
        # The last key that any of the rows sees; rows of one head are neighbouring tokens.
        last_row = tl.minimum((i_m + 1) * BLOCK_M, GROUP * tokens) - 1
        one_head = i_m * BLOCK_M // tokens == last_row // tokens
        last = first + tl.where(one_head, last_row % tokens, tokens - 1)
        start = first // BLOCK_TOKENS * BLOCK_TOKENS
        softmax = _attend_local(
            softmax,
            b_q,
            k,
            v,
            p_table,
            position,
            start,
            last,
            scale_log2,
            HEAD_DIM,
            BLOCK_TOKENS,
            PAGED,
            VALUES,
            LOCAL_N,
        )

    begin = tl.load(p_row_ptr + i_row)
    kept = tl.load(p_row_ptr + i_row + 1) - begin
    softmax = _attend_kept(
        softmax,
        b_q,
        k,
        v,
        k_desc_64 if BLOCK_N == 64 else k_desc_128,
        v_desc_64 if BLOCK_N == 64 else v_desc_128,
        p_table,
        p_col + begin,
        kept,
        i_head,
        valid,
        scale_log2,
        skip_log2,
        HEAD_DIM,
        BLOCK_TOKENS,
        PAGED,
        SKIP,
        VALUES,
        BLOCK_N,
        TMA,
    )

    if SUMMARIES:
        softmax = _attend_summaries(
            softmax,
            b_q,
            p_k_mean + i_head.to(tl.int64) * blocks * HEAD_DIM,
            p_v_mean + i_head.to(tl.int64) * blocks * HEAD_DIM,
            p_bias + i_row.to(tl.int64) * blocks,
            first // BLOCK_TOKENS,
            scale_log2,
            inverse_scale,
            HEAD_DIM,
            VALUES,
            SIDE_N,
        )

    acc, m, total = softmax
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    lse = tl.where(empty, float("-inf"), lse)
    # The rows again, in a form (kept is never negative) that the compiler cannot merge with the
    # one above: kept alive through the loops they would cost more than 30 registers a thread.
    rows = i_m * BLOCK_M + tl.minimum(kept, 0) + tl.arange(0, BLOCK_M)
    valid = rows < GROUP * tokens
    o_row = (i_head * GROUP + rows // tokens).to(tl.int64) * queries
    o_row += i_tile * tile_tokens + rows % tokens
    if VALUES:
        p_tile = p_out + o_row[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=valid[:, None] & d_mask[None, :])
    tl.store(p_lse + o_row, lse, mask=valid)


@triton.jit
def _attend_local(
    softmax,
    b_q,
    k,
    v,
    p_table,
    position,
    start,
    last,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGED: tl.constexpr,
    VALUES: tl.constexpr,
    N: tl.constexpr,
):
    """Take in keys start to last, N a step, of which a row sees those up to its position [M]."""
    acc, m, total = softmax
    BLOCK_D: tl.constexpr = b_q.shape[1]
    d_mask = tl.arange(0, BLOCK_D) < HEAD_DIM
    for key in tl.range(start, last + 1, N):
        o_key = key + tl.arange(0, N)
        inside = (o_key <= last)[:, None] & d_mask[None, :]
        block = key // BLOCK_TOKENS
        if PAGED:
            block = tl.load(p_table + block)
        p_tile = _tile_pointers(k, block, key % BLOCK_TOKENS, N, BLOCK_D)
        b_k = tl.load(p_tile, mask=inside, other=0.0)  # [N, D]
        raw = dot(b_q, b_k.T)  # [M, N]
        b_v = b_k
        if VALUES:
            p_tile = _tile_pointers(v, block, key % BLOCK_TOKENS, N, BLOCK_D)
            b_v = tl.load(p_tile, mask=inside, other=0.0)  # [N, D]
            # A later key has weight 0, but 0 times what is not a number is not a number either:
            # such a value is 0, and makes NaN of its key's score, which later keys do not have.
            finite = tl.abs(b_v.to(tl.float32)) < float("inf")
            raw += tl.sum(tl.where(finite, 0.0, float("nan")), 1)[None, :]
            b_v = tl.where(finite, b_v, 0.0)
        raw = tl.where(o_key[None, :] <= position[:, None], raw, float("-inf"))
        acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)
    return acc, m, total


@triton.jit
def _attend_kept(
    softmax,
    b_q,
    k,
    v,
    k_desc,
    v_desc,
    p_table,
    p_col,
    kept,
    i_head,
    valid,
    scale_log2,
    skip_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PAGED: tl.constexpr,
    SKIP: tl.constexpr,
    VALUES: tl.constexpr,
    N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Take in the ``kept`` blocks listed at p_col, N keys a step.

    They lie wholly before all rows, so that no key is masked.
    """
    acc, m, total = softmax
    BLOCK_D: tl.constexpr = b_q.shape[1]
    STEPS: tl.constexpr = BLOCK_TOKENS // N  # of a block
    steps = kept * STEPS
    # The index of the next block (and, when paged, its page) is fetched a step ahead: the loads of
    # a step then wait for no other load, and the compiler can pipeline them.
    block = tl.load(p_col, mask=steps > 0, other=0)
    if PAGED:
        block = tl.load(p_table + block, mask=steps > 0, other=0)
        col = tl.load(p_col + 1 // STEPS, mask=steps > 1, other=0)
    for i in tl.range(0, steps):
        within = i % STEPS * N
        b_k = _load_tile(k, k_desc, block, i_head, within, HEAD_DIM, N, BLOCK_D, TMA)
        raw = dot(b_q, b_k.T)  # [M, N]
        b_v = b_k
        if VALUES:
            b_v = _load_tile(v, v_desc, block, i_head, within, HEAD_DIM, N, BLOCK_D, TMA)
        if SKIP:
            gap = tl.where(valid, tl.max(raw, 1) * scale_log2 - m, float("-inf"))
            if tl.max(gap, 0) >= skip_log2:
                acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)
        else:
            acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)
        if PAGED:
            block = tl.load(p_table + col)
            col = tl.load(p_col + (i + 2) // STEPS, mask=i + 2 < steps, other=0)
        else:
            block = tl.load(p_col + (i + 1) // STEPS, mask=i + 1 < steps, other=0)
    return acc, m, total


@triton.jit
def _attend_summaries(
    softmax,
    b_q,
    p_k_mean,
    p_v_mean,
    p_bias,
    candidates,
    scale_log2,
    inverse_scale,
    HEAD_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    N: tl.constexpr,
):
    """Take in the summaries of a tile's candidate blocks: a key each, with an additive logit.

    The logit is -inf where the block itself was taken in.
    """
    acc, m, total = softmax
    o_d = tl.arange(0, b_q.shape[1])
    for start in tl.range(0, candidates, N):
        o_block = start + tl.arange(0, N)
        inside = o_block < candidates
        o_mean = o_block[:, None] * HEAD_DIM + o_d[None, :]
        mask = inside[:, None] & (o_d < HEAD_DIM)[None, :]
        b_bias = tl.load(p_bias + o_block, mask=inside, other=float("-inf"))
        b_k = tl.load(p_k_mean + o_mean, mask=mask, other=0.0)  # [N, D]
        raw = dot(b_q, b_k.T) + (b_bias * inverse_scale)[None, :]  # [M, N]
        b_v = tl.load(p_v_mean + o_mean, mask=mask, other=0.0) if VALUES else b_k  # [N, D]
        acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)
    return acc, m, total


@triton.jit
def _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES: tl.constexpr):
    """Take N keys into the online softmax of M rows, to base two.

    acc: [M, D] weighted sum of values; m: [M] largest score; total: [M] sum of the weights;
    raw: [M, N] unscaled scores; b_v: [N, D].
    """
    m_new = tl.maximum(m, tl.max(raw, 1) * scale_log2)
    p = tl.exp2(raw * scale_log2 - m_new[:, None])  # [M, N]
    alpha = tl.exp2(m - m_new)
    if VALUES:
        acc = dot(p.to(b_v.dtype), b_v, acc * alpha[:, None])
    return acc, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def _load_tile(
    x,
    desc,
    block,
    i_head,
    within,
    HEAD_DIM: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    TMA: tl.constexpr,
):
    """[N, D] keys or values of a whole block, from its token ``within`` on."""
    if TMA:
        return desc.load([block, i_head, within, 0]).reshape(N, D)
    p_tile = _tile_pointers(x, block, within, N, D)
    if HEAD_DIM != D:
        return tl.load(p_tile, mask=(tl.arange(0, D) < HEAD_DIM)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def _tile_pointers(x, block, within, N: tl.constexpr, D: tl.constexpr):
    """[N, D] addresses in a block; x: its KV head's pointer, stride of blocks, of tokens."""
    p, stride_block, stride_token = x
    p += block.to(tl.int64) * stride_block + within * stride_token
    return p + (tl.arange(0, N)[:, None] * stride_token + tl.arange(0, D)[None, :])


@triton.jit
def dot(a, b, acc=None):
    """a [M, K] @ b [K, N] (+ acc) in float32; float32 operands in three tf32 products."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply the bits of bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return tl.dot(a, b, acc)


_tuned_kernel = triton.autotune(
    CONFIGS,
    key=["HEAD_DIM", "BLOCK_TOKENS", "PAGED", "SUMMARIES", "SKIP", "VALUES", "ALIGNED"],
    prune_configs_by={"early_config_prune": prune},
    cache_results=True,
)(attention_kernel)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: BlockCSR,
    *,
    tiling: Tiling,
    dropped: DroppedBlocks | None = None,
    options: AttentionOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query tile over its local region, kept blocks and block summaries.

    The host does not wait for the device.

    Args:
        q: [q_heads, queries, head_dim] float16, bfloat16 or float32; last dimension contiguous.
        k, v: [kv_heads, keys, head_dim] like ``q``, up to the last query's position at least; or
            pages, see ``Tiling``. What lies behind a query is never used, not even NaN. A value of
            the local region that is not finite makes NaN of those rows that see it.
        kept: the kept blocks of each (KV head, tile); only candidates of the tile may be listed.
        tiling: tiles, blocks and positions.
        dropped: summaries of other candidates; without it nothing stands for them.
        options: scale and what else a call may change.

    Returns:
        out [q_heads, queries, head_dim] like ``q`` and lse [q_heads, queries] float32, natural
        logarithm. A row without any key gives 0 and -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_attention(q, k, v, tiling)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[1]:
        launch = _Launch(tiling, options or AttentionOptions(), kept, dropped)
        launch.run(q, k, v, out=out, lse=lse)
    return out, lse


def block_sparse_lse(
    q: Tensor,
    k: Tensor,
    kept: BlockCSR,
    *,
    tiling: Tiling,
    dropped: DroppedBlocks | None = None,
    options: AttentionOptions | None = None,
) -> Tensor:
    """The log-sum-exp of ``block_sparse_attention`` alone, [q_heads, queries]; no value is read."""
    check_attention(q, k, k, tiling)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[1]:
        launch = _Launch(tiling, options or AttentionOptions(), kept, dropped)
        launch.run(q, k, k, out=None, lse=lse)
    return lse


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch of ``attention_kernel``: what its many arguments are made of."""

    tiling: Tiling
    options: AttentionOptions
    kept: BlockCSR
    dropped: DroppedBlocks | None

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor | None, lse: Tensor) -> None:
        """Write ``out`` and ``lse``; without ``out`` the values are not read."""
        tiling = self.tiling
        queries = q.shape[1]
        kv_heads = k.shape[0] if tiling.block_table is None else k.shape[2]
        tiles = tiling.num_tiles(queries)
        check_rows(
            self.kept,
            self.dropped,
            self.options.order,
            kv_heads=kv_heads,
            tiles=tiles,
            candidates=tiling.candidates(tiles - 1),
            head_dim=q.shape[2],
        )
        k_blocks = as_blocks(k, tiling.block_tokens, tiling.block_table is not None)
        v_blocks = as_blocks(v, tiling.block_tokens, tiling.block_table is not None)
        tma = tma_usable(k_blocks, v_blocks)
        arguments = {
            "p_q": q,
            "p_k": k,
            "p_v": v,
            "p_out": out,
            "p_lse": lse,
            "VALUES": out is not None,
            "ALIGNED": tma,
            **self._geometry(q, kv_heads),
            **_key_arguments(k_blocks, v_blocks, tma),
            **self._rows(q.dtype),
        }
        rows = arguments["GROUP"] * min(tiling.tile_tokens, queries)

        def grid(meta: dict[str, Any]) -> tuple[int]:
            return (kv_heads * tiles * triton.cdiv(rows, meta["BLOCK_M"]),)

        config = self.options.config
        if config is None and triton.knobs.runtime.interpret:
            config = fallback(tiling.block_tokens)  # there is nothing to time
        elif config is None and tiling.q_offset + queries < TUNED_FROM:
            config = suitable(q, arguments["BLOCK_D"], tiling.block_tokens, tma)[0]
        if config is None:
            _tuned_kernel[grid](**arguments, enable_fp_fusion=True)
        else:
            attention_kernel[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)

    def _geometry(self, q: Tensor, kv_heads: int) -> dict[str, Any]:
        """Sizes, positions and scale."""
        tiling = self.tiling
        table = tiling.block_table
        q_heads, queries, head_dim = q.shape
        scale = self.options.scale or head_dim**-0.5
        skip = self.options.skip_threshold
        return {
            "stride_q_head": q.stride(0),
            "stride_q_token": q.stride(1),
            "stride_table_head": table.stride(0) if table is not None and table.dim() == 2 else 0,
            "queries": queries,
            "tiles": tiling.num_tiles(queries),
            "tile_tokens": tiling.tile_tokens,
            "q_offset": tiling.q_offset,
            "scale_log2": scale * math.log2(math.e),
            "inverse_scale": 1 / scale,
            "skip_log2": math.log2(skip) if skip else 0.0,
            "GROUP": q_heads // kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_TOKENS": tiling.block_tokens,
            "LOCAL": self.options.local,
            "SKIP": skip is not None,
            "p_table": table,
            "PAGED": table is not None,
        }

    def _rows(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kept blocks and the summaries of each (KV head, tile)."""
        dropped = self.dropped
        return {
            "p_row_ptr": self.kept.row_ptr,
            "p_col": self.kept.col,
            "p_order": self.options.order,
            "ORDERED": self.options.order is not None,
            "p_k_mean": dropped.k_mean.to(dtype).contiguous() if dropped else None,
            "p_v_mean": dropped.v_mean.to(dtype).contiguous() if dropped else None,
            "p_bias": dropped.bias.contiguous() if dropped else None,
            "blocks": dropped.bias.shape[2] if dropped else 0,
            "SUMMARIES": dropped is not None,
        }


def _key_arguments(k_blocks: Tensor, v_blocks: Tensor, tma: bool) -> dict[str, Any]:
    """Strides of the blocks and, where they can be used, their tensor descriptors."""
    return {
        "k_desc_64": descriptor(k_blocks, 64) if tma else None,
        "v_desc_64": descriptor(v_blocks, 64) if tma else None,
        "k_desc_128": descriptor(k_blocks, 128) if tma else None,
        "v_desc_128": descriptor(v_blocks, 128) if tma else None,
        "stride_k_block": k_blocks.stride(0),
        "stride_k_head": k_blocks.stride(1),
        "stride_k_token": k_blocks.stride(2),
        "stride_v_block": v_blocks.stride(0),
        "stride_v_head": v_blocks.stride(1),
        "stride_v_token": v_blocks.stride(2),
    }


def longest_first(csr: BlockCSR) -> Tensor:
    """[rows] int32: row indices by falling number of kept blocks. No host synchronisation.

    For ``AttentionOptions.order``, where row lengths differ so much that the last
    programs would otherwise run alone.
    """
    return torch.argsort(csr.row_ptr.diff(), descending=True, stable=True).to(torch.int32)
