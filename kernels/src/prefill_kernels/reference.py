"""The specification: what each kernel computes, naively, in float64 and without Triton.

Arguments, shapes and results are those of the function whose name a reference has, less
``_reference``; keys are contiguous unless a reference takes a block table.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from prefill_kernels.constants import LEVELS, LEVELS_PER_OCTAVE, ROW_STEP, largest_of_normals
from prefill_kernels.csr import BlockCSR
from prefill_kernels.formats import BlockLoss, DroppedBlocks, Summaries, Tiling


def summarize_blocks_reference(k: Tensor, v: Tensor, *, block_tokens: int) -> Summaries:
    """Mean, variance and outliers of each block's keys, and the mean of its values."""
    kv_heads, keys, head_dim = k.shape
    blocks = keys // block_tokens
    shape = (kv_heads, blocks, block_tokens, head_dim)
    k = k[:, : blocks * block_tokens].double().reshape(shape)
    v = v[:, : blocks * block_tokens].double().reshape(shape)
    mean = k.mean(2)
    far = torch.empty_like(mean)
    far_count = torch.empty(mean.shape[:2], dtype=torch.float64, device=k.device)
    for head, block in itertools.product(range(kv_heads), range(blocks)):
        of_block = k[head, block]
        away = of_block - mean[head, block]
        farthest = away[away.norm(dim=1).argmax()]
        outliers = of_block[away @ farthest > 0.5 * farthest @ farthest]
        if not len(outliers):  # all keys are equal
            outliers = of_block[:1]
        far[head, block] = outliers.mean(0)
        far_count[head, block] = len(outliers)
    return Summaries(mean, k.var(2, correction=0), v.mean(2), far, far_count)


def estimate_block_loss_reference(
    q: Tensor, k: Tensor, summaries: Summaries, *, tiling: Tiling, scale: float | None = None
) -> BlockLoss:
    """Loss, peak and bias of every (KV head, tile, block)."""
    q_heads, queries, head_dim = q.shape
    kv_heads, blocks, _ = summaries.k_mean.shape
    tiles = tiling.num_tiles(queries)
    scale = scale or head_dim**-0.5
    log_block = math.log(tiling.block_tokens)
    edge = largest_of_normals(tiling.block_tokens)
    loss = torch.zeros((kv_heads, tiles, blocks), dtype=torch.float64)
    peak = torch.zeros_like(loss)
    bias = torch.full_like(loss, -torch.inf)
    q = q.double()
    k = k.double()
    k_mean, k_var, _, k_far, far_count = (x.double() for x in summaries)
    for h, t in itertools.product(range(kv_heads), range(tiles)):
        heads = slice(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads)
        tokens = torch.arange(t * tiling.tile_tokens, min((t + 1) * tiling.tile_tokens, queries))
        n = tiling.candidates(t)
        rows = q[heads, tokens] * scale  # [queries of a KV head, tokens, d]
        keys = torch.arange(n * tiling.block_tokens, tiling.q_offset + int(tokens[-1]) + 1)
        local = rows @ k[h, keys].T
        local = local.masked_fill(keys > (tiling.q_offset + tokens)[:, None], -torch.inf)
        variance = k_var[h, :n] @ rows.square().mean((0, 1))
        frozen = edge * variance.sqrt() - edge**2 / 2
        lift = torch.where(variance <= edge**2, variance / 2, frozen)
        bias[h, t, :n] = log_block + lift
        scores = rows @ k_mean[h, :n].T + bias[h, t, :n]
        lse = torch.cat([scores, local], -1).logsumexp(-1)  # [queries of a KV head, tokens]
        mass = (scores - lse[..., None]).exp()  # [queries of a KV head, tokens, blocks]
        mass = mass * (1 - (-variance / (2 * math.pi)).exp()).sqrt()
        far = (rows @ k_far[h, :n].T - lse[..., None]).exp().clamp(max=1)
        loss[h, t, :n] = (mass + far)[:, ::ROW_STEP].mean((0, 1))
        far = (far * far_count[h, :n]).clamp(max=1)
        peak[h, t, :n] = torch.maximum(mass.amax((0, 1)), far.amax((0, 1)))
    return BlockLoss(loss, peak, bias)


def select_blocks_reference(
    loss: Tensor, bias: Tensor, forced: Tensor, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """The kept blocks as a mask, and the bias of the dropped ones: [kv_heads, tiles, blocks]."""
    candidate = bias != -torch.inf
    must = candidate & (forced | ~loss.isfinite())
    free = torch.where(candidate & ~must, loss, 0.0)
    largest = free.amax(-1, keepdim=True).clamp(min=1e-38)
    level = (-LEVELS_PER_OCTAVE * torch.log2(free / largest)).floor()
    level = level.clamp(0, LEVELS - 1)
    keep = must.clone()
    for h, t in itertools.product(*map(range, loss.shape[:2])):
        for kept_levels in range(LEVELS + 1):
            if free[h, t, level[h, t] >= kept_levels].sum() <= epsilon[h]:
                keep[h, t] |= (level[h, t] < kept_levels) & (free[h, t] > 0)
                break
    return keep, bias.masked_fill(keep, -torch.inf)


def block_sparse_attention_reference(  # noqa: PLR0913 - the two options that it has, by name
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: BlockCSR,
    *,
    tiling: Tiling,
    dropped: DroppedBlocks | None = None,
    scale: float | None = None,
    local: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, float64; key tiles are never skipped.

    A value of the local region that is not finite makes NaN of the rows that see it, and of no
    other, although 0 times NaN is NaN.
    """
    if tiling.block_table is not None:
        k = gather_pages(k, tiling.block_table)
        v = gather_pages(v, tiling.block_table)
    q_heads, queries, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    scale = scale or head_dim**-0.5
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    row_ptr = kept.row_ptr.tolist()
    position = torch.arange(keys, device=q.device)
    for h, t in itertools.product(range(kv_heads), range(tiling.num_tiles(queries))):
        row = h * tiling.num_tiles(queries) + t
        heads = slice(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads)
        tokens = slice(t * tiling.tile_tokens, min((t + 1) * tiling.tile_tokens, queries))
        own = torch.arange(tokens.start, tokens.stop, device=q.device)
        own = tiling.q_offset + own
        candidates = tiling.candidates(t)
        of_row = kept.col[row_ptr[row] : row_ptr[row + 1]]
        visible = torch.isin(position // tiling.block_tokens, of_row)[None]  # [1, keys]
        if local:
            inside = position >= candidates * tiling.block_tokens
            visible = visible | (inside[None] & (position[None] <= own[:, None]))
        visible = visible.expand(len(own), keys)
        used = visible.any(0)
        q_tile = q[heads, tokens].double()  # [queries of a KV head, tokens, head_dim]
        scores = q_tile @ k[h, used].double().T * scale
        scores = scores.masked_fill(~visible[:, used], -torch.inf)
        values = v[h, used].double()
        inside = (position >= candidates * tiling.block_tokens)[used, None]
        broken = inside & ~values.isfinite()  # [keys, head_dim]
        poisoned = (visible[:, used] & broken.any(1)).any(1)  # [tokens]
        values = values.masked_fill(broken, 0.0)
        if dropped is not None:
            k_mean = dropped.k_mean[h, :candidates].double()
            summary = q_tile @ k_mean.T * scale + dropped.bias[h, t, :candidates]
            scores = torch.cat([scores, summary], -1)
            values = torch.cat([values, dropped.v_mean[h, :candidates].double()])
        if scores.shape[-1]:
            lse[heads, tokens] = scores.logsumexp(-1).masked_fill(poisoned, torch.nan)
            empty = (scores == -torch.inf).all(-1, keepdim=True)
            weights = scores.softmax(-1).masked_fill(empty, 0.0)
            out[heads, tokens] = (weights @ values).masked_fill(poisoned[:, None], torch.nan)
    return out, lse


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """[pages, page_tokens, kv_heads, head_dim] -> [kv_heads, blocks * page_tokens, head_dim]."""
    kv_heads = pages.shape[2]
    table = block_table.expand(kv_heads, -1)
    heads = torch.arange(kv_heads, device=pages.device)[:, None]
    return pages[table, :, heads].flatten(1, 2)
