"""Which key blocks a query tile attends to exactly: the fewest that leave at most epsilon to guess.

Every other candidate is represented by its summary, so what a dropped block costs is not its
attention mass but the share of it that the summary misplaces. Both are estimated from the
summaries alone, for every query row of the tile, and the blocks that would misplace most are kept
until the rest misplaces at most epsilon. That is a mean over rows, in which a few rows that look
for one thing (an object's nine tokens for an earlier object) are lost; so a block that is estimated
to cost any one row of the tile more than a limit of its own is kept as well. In contrast to a fixed
threshold (FlashPrefill, arXiv 2603.06199) the result has a stated error, in contrast to top-p
(XAttention, arXiv 2503.16428) it needs no sort. docs/attention.md derives the formulas, says what
the estimate does not see, and compares it with the field's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from prefill_kernels.constants import LEVELS, LEVELS_PER_OCTAVE, ROW_STEP
from prefill_kernels.cpu.matmul import matmul_nt
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.sparse.summaries import BlockSummaries, lift, misplaced_share
from prefill_service.attention.sparse.summary_attention import SummaryAttention, attend_summaries
from prefill_service.attention.sparse.tiles import Tiles


def previous_patch(patch_ends: np.ndarray, position: int | list[int]) -> np.ndarray:
    """First token of the temporal patch before the one that ``position`` lies in; 0 if none is.

    Args:
        patch_ends: [patches] one past each patch's last token.
        position: of one token or several.
    """
    own = np.searchsorted(patch_ends, position, side="right")
    starts: np.ndarray = np.where(own > 1, patch_ends[np.maximum(own, 2) - 2], 0)
    return starts


def forced_blocks(tiles: Tiles, sink_blocks: int, recent_from: list[int]) -> Tensor:
    """Blocks that every tile keeps: attention sinks and the temporal patch before its own.

    Args:
        tiles: of the queries.
        sink_blocks: the first blocks of the prompt (StreamingLLM, arXiv 2309.17453).
        recent_from: [tiles] first token of the previous temporal patch.

    Returns:
        [tiles, blocks] bool; candidates only.
    """
    forced = torch.zeros(tiles.count, tiles.blocks, dtype=torch.bool)
    for tile in range(tiles.count):
        end = tiles.candidates(tile)
        forced[tile, : min(sink_blocks, end)] = True
        forced[tile, min(recent_from[tile] // tiles.block_tokens, end) : end] = True
    return forced


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is known of each (KV head, tile, candidate block).

    Attributes:
        loss: [kv_heads, tiles, blocks] attention mass that representing the block by its summary
            misplaces, mean over rows of the tile; 0 where a block is no candidate of the tile.
        peak: [kv_heads, tiles, blocks] the largest value that either of a loss's two parts has in
            any row of the tile; 0 likewise.
        bias: [kv_heads, tiles, blocks] logit added to the block's summary key; -inf where it is no
            candidate.
        attention: of every row over all summaries and its local region.
    """

    loss: Tensor
    peak: Tensor
    bias: Tensor
    attention: SummaryAttention

    def of_heads(self, index: Tensor) -> Estimate:
        """The part of the KV heads at ``index``."""
        return Estimate(
            loss=self.loss[index],
            peak=self.peak[index],
            bias=self.bias[index],
            attention=SummaryAttention(self.attention.shares[index], self.attention.lse[index]),
        )


def estimate(
    rows: Tensor, local_lse: Tensor, summaries: BlockSummaries, *, tiles: Tiles, scale: float
) -> Estimate:
    """Estimate the loss of every candidate block in the tile's rows.

    Args:
        rows: [kv_heads, tiles, rows, head_dim] packed queries (``Tiles.pack``).
        local_lse: [kv_heads, tiles, rows] natural log-sum-exp of each row over its local region.
        summaries: of the first ``tiles.blocks`` blocks (at least).
        tiles: of the queries.
        scale: factor on the scores.
    """
    work = summaries.k_mean.dtype
    known = summaries.first(tiles.blocks)
    q = rows.to(work)
    local_lse = local_lse.to(work)
    broken = _broken(q, local_lse)  # [kv_heads, tiles, rows], or nothing
    if broken is not None:
        q = q.masked_fill(broken[..., None], 0.0)
        local_lse = local_lse.masked_fill(broken, 0.0)
    weights = tiles.row_weights(rows.shape[2] // tiles.tile_tokens, q)  # [tiles, rows]
    # Rows without a query are 0 and add nothing; weights tell how many there are with one.
    squared = q.square().sum(2) * weights.amax(1)[:, None]  # [kv_heads, tiles, head_dim]
    variance = (squared * scale**2) @ known.k_var.transpose(1, 2)  # [kv_heads, tiles, blocks]
    bias = lift(variance, tiles.block_tokens) + math.log(tiles.block_tokens)
    hidden = tiles.hidden(q.device)  # [tiles, blocks]
    bias.masked_fill_(hidden, -torch.inf)
    attention = attend_summaries(q, local_lse, known.k_mean, bias=bias, scale=scale)
    if broken is not None:  # they look for nothing
        attention.lse.masked_fill_(broken, torch.inf)
        attention.shares.masked_fill_(broken[..., None], 0.0)
    loss, peak = _losses(
        q,
        attention,
        known,
        tiles=tiles,
        misplaced=misplaced_share(variance),
        scale=scale,
    )
    if broken is not None:
        attention.lse.masked_fill_(broken, torch.nan)
    return Estimate(loss=loss, peak=peak, bias=bias, attention=attention)


def _broken(q: Tensor, local_lse: Tensor) -> Tensor | None:
    """Rows whose query or local region is not all numbers; ``None`` if there is no such row.

    One of them would otherwise decide what its tile keeps and, through the mean variance, reach
    all of its rows. The estimate takes zeros for it; its result is NaN.

    Args:
        q: [..., rows, head_dim].
        local_lse: [..., rows].
    """
    if torch.isfinite(q.sum() + local_lse.sum()):  # one pass, and nothing kept: the usual case
        return None
    broken = ~torch.isfinite(q).all(-1) | local_lse.isnan()
    return broken if broken.any() else None


def _losses(
    q: Tensor,
    attention: SummaryAttention,
    known: BlockSummaries,
    *,
    tiles: Tiles,
    misplaced: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Mean loss and its peak, each [kv_heads, tiles, blocks]; 0 for blocks that are no candidates.

    A row loses the misplaced share of a block's mass, and the mass of an outlier: mean and variance
    hide a few keys among many (an object's), their own score does not. The mean is over every
    fourth token's rows, as neighbours want the same blocks. The peak, the largest value that either
    part has, is over all of them, since one row alone may look for a block. Of several outliers one
    counts in the mean, as the variance has the others; the peak counts all, so that no row loses
    more than twice the peak.

    Args:
        q: [kv_heads, tiles, rows, head_dim].
        misplaced: [kv_heads, tiles, blocks].
    """
    kv_heads, _, row_count, _ = q.shape
    grouped = (row_count // tiles.tile_tokens, tiles.tile_tokens)
    far_keys = known.k_far * (scale / math.log(2))  # torch's exp2 is far faster than its exp
    lse = attention.lse / math.log(2)
    mean = torch.zeros_like(misplaced)
    peak = torch.zeros_like(misplaced)
    for head, tile in itertools.product(range(kv_heads), range(tiles.count)):
        blocks = slice(tiles.candidates(tile))
        if not blocks.stop:
            continue
        at = (head, tile, blocks)
        tokens = tiles.tokens(tile)
        mass = attention.shares[head, tile, :, blocks].view(*grouped, -1)[:, :tokens]
        # Rows last: reductions then run along memory.
        far = matmul_nt(far_keys[head, blocks], q[head, tile]).sub_(lse[head, tile])
        far = far.view(-1, *grouped)[..., :tokens]
        of_mass = mass[:, ::ROW_STEP].mean((0, 1))
        of_far = far[..., ::ROW_STEP].exp2().clamp_(max=1).mean((1, 2))
        mean[at] = of_mass * misplaced[at] + of_far
        outliers = far.amax((1, 2)).exp2_() * known.far_count[head, blocks]
        peak[at] = torch.maximum(mass.amax((0, 1)) * misplaced[at], outliers.clamp_(max=1))
    return mean, peak


def force_keep(loss: Tensor, peak: Tensor, row_limit: Tensor) -> Tensor:
    """``loss``, infinite where the peak is above the limit.

    ``select`` then keeps the block, and counts its loss no more.

    Args:
        loss, peak: [kv_heads, tiles, blocks].
        row_limit: [kv_heads].
    """
    return torch.where(peak > row_limit[:, None, None], torch.inf, loss)


def select(loss: Tensor, forced: Tensor, epsilon: Tensor) -> Tensor:
    """Keep the forced blocks, and of the others the most lossy until the rest loses <= epsilon.

    The threshold is relative to the tile's largest loss and falls in sixteenths of an octave. A
    loss that is not a number keeps its block: NaN and infinities come out as dense attention has
    them.

    Args:
        loss: [kv_heads, tiles, blocks], 0 for blocks that are no candidates.
        forced: [tiles, blocks] bool, kept in any case.
        epsilon: [kv_heads].

    Returns:
        [kv_heads, tiles, blocks] bool; never more than what ``loss`` or ``forced`` named.
    """
    if not loss.shape[-1]:
        return torch.zeros_like(loss, dtype=torch.bool)
    unknown = ~torch.isfinite(loss)
    free = torch.where(unknown | forced, 0.0, loss)
    largest = free.amax(-1, keepdim=True).clamp(min=torch.finfo(loss.dtype).tiny)
    octaves = torch.log2(free / largest)  # 0 and below; -inf, the last level, where nothing is lost
    level = (-LEVELS_PER_OCTAVE * octaves).clamp(0, LEVELS - 1).long()
    at_level = torch.zeros(*loss.shape[:-1], LEVELS, dtype=loss.dtype, device=loss.device)
    at_level.scatter_add_(-1, level, free)
    # left[i]: loss of the blocks at level i and beyond, which a threshold above level i drops.
    left = at_level.flip(-1).cumsum(-1).flip(-1)
    kept_levels = (left > epsilon[:, None, None]).sum(-1, keepdim=True)
    return (level < kept_levels) & (free > 0) | unknown | forced


def to_csr(keep: Tensor) -> BlockCSR:
    """Ragged block lists of a [kv_heads, tiles, blocks] mask (host side; reads the mask)."""
    counts = keep.sum(-1).flatten()
    row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=keep.device)
    torch.cumsum(counts, 0, out=row_ptr[1:])
    return BlockCSR(row_ptr, keep.nonzero()[:, -1].to(torch.int32))
