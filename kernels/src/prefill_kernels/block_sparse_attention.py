"""Block-sparse flash attention over a ragged block-CSR: causal, GQA, paged or contiguous keys.

A program owns ``BLOCK_M`` packed rows (query heads x tokens) of one (KV head, query tile) and
walks three key sets under one running softmax (FlashAttention-2, arXiv 2307.08691): the tile's
local region with the causal mask, the kept blocks of its CSR row, which lie wholly in the past and
need no mask, and optionally the summaries of the dropped blocks, each standing for its block as one
key with an additive logit bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.autotune import CONFIGS, TUNED_FROM, fallback, prune, suitable
from prefill_kernels.csr import BlockCSR
from prefill_kernels.dot import dot
from prefill_kernels.inputs import (
    as_blocks,
    check_attention,
    check_rows,
    descriptor,
    gather_pages,
    tma_usable,
)


@triton.jit
def _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES: tl.constexpr):
    """Take one key tile in. raw: [M, N] unscaled scores; b_v: [N, D]; m: [M] running maximum."""
    m_new = tl.maximum(m, tl.max(raw, 1) * scale_log2)
    p = tl.exp2(raw * scale_log2 - m_new[:, None])  # [M, N]
    alpha = tl.exp2(m - m_new)
    if VALUES:
        acc = dot(p.to(b_v.dtype), b_v, acc * alpha[:, None])
    return acc, m_new, total * alpha + tl.sum(p, 1)


@triton.jit
def _load_tile(desc, p_tile, o_tile, d_mask, block, i_head, within, TMA: tl.constexpr,
               PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """[N, D] keys or values of one kept block, whole by contract."""
    if TMA:
        return desc.load([block, i_head, within, 0]).reshape(N, D)
    if PADDED:
        return tl.load(p_tile + o_tile, mask=d_mask[None, :], other=0.0)
    return tl.load(p_tile + o_tile)


# fmt: off
@triton.jit
def attention_kernel(
    p_q, p_k, p_v, k_desc_64, v_desc_64, k_desc_128, v_desc_128,
    p_k_mean, p_v_mean, p_bias, p_row_ptr, p_col, p_table, p_order, p_out, p_lse,
    stride_q_head, stride_q_token,
    stride_k_block, stride_k_head, stride_k_token,
    stride_v_block, stride_v_head, stride_v_token,
    stride_table_head, queries, tiles, tile_tokens, q_offset, blocks,
    scale_log2, inverse_scale, skip_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, LOCAL: tl.constexpr, PAGED: tl.constexpr,
    SUMMARIES: tl.constexpr, ORDERED: tl.constexpr, SKIP: tl.constexpr, VALUES: tl.constexpr,
    QUERY_STEP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    # fmt: on
    """See ``block_sparse_attention``. Packed row r: head r // tokens, token r % tokens.

    ALIGNED: there are tensor descriptors. It is part of the autotuner's key, so that what was
    tuned with them is not used without.
    """
    tl.static_assert(ALIGNED or not TMA, "TMA needs tensor descriptors")
    PADDED: tl.constexpr = HEAD_DIM != BLOCK_D
    STEPS: tl.constexpr = BLOCK_TOKENS // BLOCK_N  # inner steps per block
    # The masked loops address every element; a narrower tile keeps them within the registers.
    SIDE_N: tl.constexpr = min(BLOCK_N, 64 if BLOCK_D <= 128 else 32)

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
    first = q_offset + i_tile * tile_tokens * QUERY_STEP  # position of the tile's first query

    rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < GROUP * tokens
    o_token = rows % tokens
    o_d = tl.arange(0, BLOCK_D)
    d_mask = o_d < HEAD_DIM
    o_q = (i_head * GROUP + rows // tokens).to(tl.int64) * stride_q_head
    o_q += (i_tile * tile_tokens + o_token).to(tl.int64) * stride_q_token
    q_mask = valid[:, None] & d_mask[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=q_mask, other=0.0)  # [M, D]

    p_k += i_head.to(tl.int64) * stride_k_head
    p_v += i_head.to(tl.int64) * stride_v_head
    if PAGED:
        p_table += i_head * stride_table_head
    # A finite start instead of -inf: rows and tiles without any key then need no special case.
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if LOCAL:
        o_n = tl.arange(0, SIDE_N)
        o_k = o_n[:, None] * stride_k_token + o_d[None, :]
        o_v = o_n[:, None] * stride_v_token + o_d[None, :]
        last_row = tl.minimum((i_m + 1) * BLOCK_M, GROUP * tokens) - 1
        one_head = i_m * BLOCK_M // tokens == last_row // tokens
        last = first + tl.where(one_head, last_row % tokens, tokens - 1) * QUERY_STEP
        position = first + o_token * QUERY_STEP
        for start in tl.range(first // BLOCK_TOKENS * BLOCK_TOKENS, last + 1, SIDE_N):
            block = start // BLOCK_TOKENS
            within = start % BLOCK_TOKENS
            if PAGED:
                block = tl.load(p_table + block)
            o_key = start + o_n
            inside = (o_key <= last)[:, None] & d_mask[None, :]
            p_tile = p_k + block.to(tl.int64) * stride_k_block + within * stride_k_token
            b_k = tl.load(p_tile + o_k, mask=inside, other=0.0)  # [N, D]
            raw = dot(b_q, b_k.T)
            raw = tl.where(o_key[None, :] <= position[:, None], raw, float("-inf"))
            p_tile = p_v + block.to(tl.int64) * stride_v_block + within * stride_v_token
            b_v = tl.load(p_tile + o_v, mask=inside, other=0.0) if VALUES else b_k
            acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)

    begin = tl.load(p_row_ptr + i_row)
    steps = (tl.load(p_row_ptr + i_row + 1) - begin) * STEPS
    p_col += begin
    # The index of the next block (and, when paged, its page) is fetched a step ahead: the loads of
    # a step then wait for no other load, and the compiler can pipeline them.
    block = tl.load(p_col, mask=steps > 0, other=0)
    if PAGED:
        block = tl.load(p_table + block, mask=steps > 0, other=0)
        col = tl.load(p_col + 1 // STEPS, mask=steps > 1, other=0)
    o_b = tl.arange(0, BLOCK_N)
    o_k = o_b[:, None] * stride_k_token + o_d[None, :]
    o_v = o_b[:, None] * stride_v_token + o_d[None, :]
    k_desc = k_desc_64 if BLOCK_N == 64 else k_desc_128
    v_desc = v_desc_64 if BLOCK_N == 64 else v_desc_128
    for i in tl.range(0, steps):
        within = i % STEPS * BLOCK_N
        p_tile = p_k + block.to(tl.int64) * stride_k_block + within * stride_k_token
        b_k = _load_tile(k_desc, p_tile, o_k, d_mask, block, i_head, within,
                         TMA, PADDED, BLOCK_N, BLOCK_D)  # fmt: skip
        raw = dot(b_q, b_k.T)
        p_tile = p_v + block.to(tl.int64) * stride_v_block + within * stride_v_token
        b_v = b_k
        if VALUES:
            b_v = _load_tile(v_desc, p_tile, o_v, d_mask, block, i_head, within,
                             TMA, PADDED, BLOCK_N, BLOCK_D)  # fmt: skip
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

    if SUMMARIES:
        o_n = tl.arange(0, SIDE_N)
        p_bias += i_row.to(tl.int64) * blocks
        p_k_mean += i_head.to(tl.int64) * blocks * HEAD_DIM
        p_v_mean += i_head.to(tl.int64) * blocks * HEAD_DIM
        candidates = first // BLOCK_TOKENS
        for start in tl.range(0, candidates, SIDE_N):
            o_block = start + o_n
            inside = o_block < candidates
            o_mean = o_block[:, None] * HEAD_DIM + o_d[None, :]
            mean_mask = inside[:, None] & d_mask[None, :]
            b_bias = tl.load(p_bias + o_block, mask=inside, other=float("-inf"))
            b_k = tl.load(p_k_mean + o_mean, mask=mean_mask, other=0.0)
            raw = dot(b_q, b_k.T)
            raw += (b_bias * inverse_scale)[None, :]
            b_v = tl.load(p_v_mean + o_mean, mask=mean_mask, other=0.0) if VALUES else b_k
            acc, m, total = _softmax_step(acc, m, total, raw, b_v, scale_log2, VALUES)

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    lse = tl.where(empty, float("-inf"), lse)
    # The rows again, in a form (steps is never negative) that the compiler cannot merge with the
    # one above: kept alive through the loops they would cost more than 30 registers a thread.
    rows = i_m * BLOCK_M + tl.minimum(steps, 0) + tl.arange(0, BLOCK_M)
    valid = rows < GROUP * tokens
    o_row = (i_head * GROUP + rows // tokens).to(tl.int64) * queries
    o_row += i_tile * tile_tokens + rows % tokens
    if VALUES:
        p_tile = p_out + o_row[:, None] * HEAD_DIM + o_d[None, :]
        tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=valid[:, None] & d_mask[None, :])
    tl.store(p_lse + o_row, lse, mask=valid)


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
    csr: BlockCSR,
    *,
    block_tokens: int,
    tile_tokens: int,
    q_offset: int,
    scale: float,
    block_table: Tensor | None = None,
    summaries: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    skip_threshold: float | None = None,
    local: bool = True,
    order: Tensor | None = None,
    query_step: int = 1,
    lse_only: bool = False,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query tile over its local region, kept blocks and block summaries.

    Query i stands at position ``q_offset + query_step * i``. Tile t holds ``tile_tokens`` of them,
    from position p0 = ``q_offset + query_step * tile_tokens * t`` on; its local region is
    [floor(p0 / B) * B, own position] with B = ``block_tokens``. No host synchronisation.

    Args:
        q: [q_heads, queries, head_dim] float16, bfloat16 or float32; last dimension contiguous.
        k, v: [kv_heads, keys, head_dim] like ``q``, up to the last query's position at least; or,
            with a block table, pages [pages, block_tokens, kv_heads, head_dim]. What lies behind
            the last query is never used, not even NaN. A NaN inside the local region reaches all
            rows of its tile, later keys of a row having weight 0 there rather than no part.
        csr: kept blocks; only blocks below floor(p0 / B) may be listed.
        block_tokens: a power of two, 16 or more.
        tile_tokens: queries of a tile; the last tile may be shorter.
        q_offset: position of the first query.
        scale: factor on the scores, positive.
        block_table: [blocks] or [kv_heads, blocks] int32, page of each logical block.
        summaries: (k_mean, v_mean), both [kv_heads, blocks, head_dim]; comes with ``bias``.
        bias: [kv_heads, tiles, blocks] float32, added to the score of a block's mean key; -inf
            leaves the summary out. Only blocks below floor(p0 / B) are read; those of the last
            tile there must be.
        skip_threshold: in (0, 1); leaves out a key tile of a kept block if its largest score lies
            so far below every row's running maximum that exp(difference) < threshold (BLASST,
            arXiv 2512.12087). Such keys are missing from the LSE, too.
        local: attend the local region. Without it a row may see no key at all.
        order: [kv_heads * tiles] int32, the order in which rows are started (``longest_first``);
            default: per KV head from the last tile, which sees most keys, to the first.
        query_step: distance between the positions of neighbouring queries.
        lse_only: read no values (``v`` may be ``k``) and return ``out`` without any query.
        config: launch configuration. Default: the best measured for this kind of call, found
            at its first call with 8192 keys or more and cached on disk; below, a likely one.

    Returns:
        out [q_heads, queries, head_dim] like ``q`` and lse [q_heads, queries] float32, natural
        logarithm. A row without any key gives 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    check_attention(q, k, v, block_tokens, tile_tokens, q_offset, query_step, scale, block_table)
    if skip_threshold is not None and not 0 < skip_threshold < 1:
        raise ValueError(f"skip_threshold = {skip_threshold} is not accepted; expected 0 to 1")
    q_heads, queries, head_dim = q.shape
    paged = block_table is not None
    kv_heads = k.shape[2] if paged else k.shape[0]
    tiles = triton.cdiv(queries, tile_tokens)
    candidates = (q_offset + max(tiles - 1, 0) * tile_tokens * query_step) // block_tokens
    check_rows(csr, kv_heads, tiles, candidates, head_dim, summaries, bias, order)
    out = torch.empty_like(q[:, :0] if lse_only else q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if queries == 0:
        return out, lse
    table_stride = 0 if block_table is None or block_table.dim() == 1 else block_table.stride(0)
    k_blocks, v_blocks = as_blocks(k, block_tokens, paged), as_blocks(v, block_tokens, paged)
    k_mean, v_mean = (x.to(q.dtype).contiguous() for x in summaries) if summaries else (None, None)
    tma = tma_usable(k_blocks, v_blocks)
    arguments: dict[str, Any] = {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "k_desc_64": descriptor(k_blocks, 64) if tma else None,
        "v_desc_64": descriptor(v_blocks, 64) if tma else None,
        "k_desc_128": descriptor(k_blocks, 128) if tma else None,
        "v_desc_128": descriptor(v_blocks, 128) if tma else None,
        "p_k_mean": k_mean,
        "p_v_mean": v_mean,
        "p_bias": bias.contiguous() if bias is not None else None,
        "p_row_ptr": csr.row_ptr,
        "p_col": csr.col,
        "p_table": block_table,
        "p_order": order,
        "p_out": out,
        "p_lse": lse,
        "stride_q_head": q.stride(0),
        "stride_q_token": q.stride(1),
        "stride_k_block": k_blocks.stride(0),
        "stride_k_head": k_blocks.stride(1),
        "stride_k_token": k_blocks.stride(2),
        "stride_v_block": v_blocks.stride(0),
        "stride_v_head": v_blocks.stride(1),
        "stride_v_token": v_blocks.stride(2),
        "stride_table_head": table_stride,
        "queries": queries,
        "tiles": tiles,
        "tile_tokens": tile_tokens,
        "q_offset": q_offset,
        "blocks": bias.shape[2] if bias is not None else 0,
        "scale_log2": scale * math.log2(math.e),
        "inverse_scale": 1 / scale,
        "skip_log2": math.log2(skip_threshold) if skip_threshold else 0.0,
        "GROUP": q_heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_TOKENS": block_tokens,
        "LOCAL": local,
        "PAGED": paged,
        "SUMMARIES": bias is not None,
        "ORDERED": order is not None,
        "SKIP": skip_threshold is not None,
        "VALUES": not lse_only,
        "QUERY_STEP": query_step,
        "ALIGNED": tma,
    }
    rows = q_heads // kv_heads * min(tile_tokens, queries)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (kv_heads * tiles * triton.cdiv(rows, meta["BLOCK_M"]),)

    if config is None and triton.knobs.runtime.interpret:
        config = fallback(block_tokens)  # there is nothing to time
    elif config is None and q_offset + query_step * queries < TUNED_FROM:
        config = suitable(q, arguments["BLOCK_D"], block_tokens, tma)[0]
    if config is None:
        _tuned_kernel[grid](**arguments, enable_fp_fusion=True)
    else:
        attention_kernel[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)
    return out, lse


def longest_first(csr: BlockCSR) -> Tensor:
    """[rows] int32: row indices by falling number of kept blocks. No host synchronisation.

    An ``order`` for ``block_sparse_attention`` where row lengths differ so much that the last
    programs would otherwise run alone.
    """
    return torch.argsort(csr.row_ptr.diff(), descending=True, stable=True).to(torch.int32)


def block_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    csr: BlockCSR,
    *,
    block_tokens: int,
    tile_tokens: int,
    q_offset: int,
    scale: float,
    block_table: Tensor | None = None,
    summaries: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    local: bool = True,
    query_step: int = 1,
) -> tuple[Tensor, Tensor]:
    """What ``block_sparse_attention`` computes (without skipping), naively and in float64."""
    if block_table is not None:
        k, v = (gather_pages(x, block_table) for x in (k, v))
    q_heads, queries, _ = q.shape
    kv_heads, keys, _ = k.shape
    tiles = triton.cdiv(queries, tile_tokens)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    row_ptr = csr.row_ptr.tolist()
    position = torch.arange(keys, device=q.device)
    for row in range(kv_heads * tiles):
        h, t = divmod(row, tiles)
        heads = slice(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads)
        tokens = slice(t * tile_tokens, min((t + 1) * tile_tokens, queries))
        own = q_offset + query_step * torch.arange(tokens.start, tokens.stop, device=q.device)
        candidates = int(own[0]) // block_tokens
        kept = csr.col[row_ptr[row] : row_ptr[row + 1]]
        seen = torch.isin(position // block_tokens, kept)[None]  # [1, keys]
        if local:
            seen = seen | (
                (position >= candidates * block_tokens)[None] & (position[None] <= own[:, None])
            )
        seen = seen.expand(len(own), keys)
        used = seen.any(0)
        q_tile = q[heads, tokens].double()  # [group, tokens, head_dim]
        scores = q_tile @ k[h, used].double().T * scale
        scores = scores.masked_fill(~seen[:, used], -torch.inf)
        values = v[h, used].double()
        if summaries is not None and bias is not None:
            k_mean, v_mean = (x[h, :candidates].double() for x in summaries)
            scores = torch.cat([scores, q_tile @ k_mean.T * scale + bias[h, t, :candidates]], -1)
            values = torch.cat([values, v_mean])
        if scores.shape[-1]:
            lse[heads, tokens] = scores.logsumexp(-1)
            out[heads, tokens] = scores.softmax(-1).nan_to_num() @ values
    return out, lse
