"""FlexAttention on CPU with the same blocks as ours, as a contestant."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.attention.problem import SETTINGS, Estimates, Problem


class Flex:
    """One prompt length. Keys are there twice: in clustered order, then in the prompt's order.

    A chunk's blocks before its first segment boundary are taken from the former, the rest and the
    local regions from the latter, so that one call does all that our chunks do (but for the
    summaries of dropped blocks, which block masks cannot express).
    """

    def __init__(self, problem: Problem, estimates: Estimates) -> None:
        self._estimates = estimates
        self._problem = problem
        tokens = problem.tokens
        block = SETTINGS.block_tokens
        if tokens % SETTINGS.tile_tokens:
            raise ValueError(f"{tokens} tokens are no whole number of tiles")
        self._q = problem.q[None]
        self._k = torch.cat([estimates.k, problem.k], 1)[None]
        self._v = torch.cat([estimates.v, problem.v], 1)[None]
        self._group = len(problem.q) // len(estimates.k)
        self._blocks = tokens // block

        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key - tokens

        self._causal = causal
        self._call: Any = torch.compile(flex_attention, dynamic=False)

    def mask(self, epsilon: float) -> BlockMask:
        """Block mask of [1, q_heads, tiles, 2 * blocks]."""
        tiles = sum(chunk.tiles.count for chunk in self._estimates.chunks)
        heads = len(self._estimates.k)
        full = torch.zeros(heads, tiles, 2, self._blocks, dtype=torch.bool)
        local = torch.zeros(tiles, 2, self._blocks, dtype=torch.bool)
        row = 0
        for chunk in self._estimates.chunks:
            keep = chunk.keep(epsilon)
            ordered = chunk.clustered // SETTINGS.block_tokens
            rows = slice(row, row + chunk.tiles.count)
            full[:, rows, 0, :ordered] = keep[..., :ordered]
            full[:, rows, 1, ordered : keep.shape[-1]] = keep[..., ordered:]
            for tile in range(chunk.tiles.count):
                begin = chunk.tiles.candidates(tile)
                width = SETTINGS.tile_tokens // SETTINGS.block_tokens
                local[row + tile, 1, begin : begin + width] = True
            row += chunk.tiles.count
        full = full.flatten(2).repeat_interleave(self._group, 0)[None]
        partial = local.flatten(1).expand(full.shape)
        return BlockMask.from_kv_blocks(
            *_lists(partial),
            *_lists(full),
            BLOCK_SIZE=(SETTINGS.tile_tokens, SETTINGS.block_tokens),
            mask_mod=self._causal,
            seq_lengths=(self._problem.tokens, 2 * self._problem.tokens),
            compute_q_blocks=False,
        )

    def run(self, mask: BlockMask) -> Tensor:
        """[q_heads, tokens, head_dim]; the first call compiles."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out: Tensor = self._call(
                self._q,
                self._k,
                self._v,
                block_mask=mask,
                scale=self._problem.scale,
                enable_gqa=True,
            )
        return out[0]


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices, chosen ones first, of a bool mask [..., blocks]."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int().contiguous()
