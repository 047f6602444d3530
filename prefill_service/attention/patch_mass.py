"""What can be seen of a prefill's attention afterwards: mass per temporal patch, block maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.sparse.tiles import Tiles

MAX_GRID = 48
"""Rows and columns of a block map, at most."""

_CELL_TOKENS = 256  # two query tiles, so that no row of the map is without one


class PatchMass:
    """Attention that sampled rows pay to the temporal patches before their own.

    Args:
        patch_ends: [patches] one past each patch's last token.
        device: of the tensors to come.
    """

    def __init__(self, patch_ends: np.ndarray, device: torch.device) -> None:
        ends = torch.from_numpy(np.asarray(patch_ends, dtype=np.int64))
        self._starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        self._sizes = (ends - self._starts).double()
        tokens = torch.arange(int(ends[-1]))
        self._patch_of = torch.searchsorted(ends, tokens, right=True).to(device)
        self._mass = torch.zeros(len(ends), dtype=torch.float64, device=device)
        self._rows = torch.zeros(len(ends), dtype=torch.float64)

    def weights(self, position: Tensor, keys: int) -> Tensor:
        """What a row's probabilities count for: the keys it sees, or 0 from its own patch on.

        Args:
            position: [samples] of the queries.

        Returns:
            [samples, keys] float32.
        """
        # A row's own patch is left out: it is seen in part, and always holds much.
        own = self._starts[self._patch_of[position].cpu()].to(position.device)
        hidden = torch.arange(keys, device=position.device) >= own[:, None]
        return ((position + 1)[:, None] * ~hidden).float()

    def add_mass(
        self,
        weighted: Tensor,
        heads: int,
        position: Tensor,
        *,
        order: Tensor,
        stand_for: float = 1.0,
    ) -> None:
        """Add exact attention probabilities of sampled rows.

        Args:
            weighted: [kv_heads, keys] probabilities times ``weights``, summed over the rows.
            heads: query heads.
            position: [samples] of the queries.
            order: [kv_heads, keys] original position of the keys.
            stand_for: queries per sampled one: chunks may be sampled more or less densely.
        """
        weighted = weighted.flatten().double() * stand_for
        self._mass.index_add_(0, self._patch_of[order].flatten(), weighted)
        own = self._patch_of[position].cpu()
        earlier = torch.arange(len(self._rows)) < own[:, None]  # [samples, patches]
        self._rows += earlier.sum(0) * (heads * stand_for)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Mass relative to chance, summed over rows, and the number of rows; each [patches]."""
        return (self._mass.cpu() / self._sizes).numpy(), self._rows.numpy()


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What some tiles attend to whatever is selected; equal for all layers and heads.

    Attributes:
        row: [tiles] grid row of each tile.
        tokens: [tiles] queries of each tile.
        local, causal: [tiles, grid] (query, key) pairs of the local region, and of all keys.
    """

    row: np.ndarray
    tokens: np.ndarray
    local: np.ndarray
    causal: np.ndarray


class BlockGrids:
    """Attended (query, key) pairs of every layer and KV head on a coarse grid.

    Args:
        layers, kv_heads: how many.
        tokens: of the prompt; both axes span them.
    """

    def __init__(self, layers: int, kv_heads: int, tokens: int) -> None:
        self._grid = grid = min(MAX_GRID, max(1, tokens // _CELL_TOKENS))
        self.pairs = np.zeros((layers, kv_heads, grid, grid), np.float32)
        self.causal = np.zeros((grid, grid), np.float32)  # the same, had all been attended
        self._tokens = tokens
        self._last: tuple[Tiles, _Pairs] | None = None  # layers ask for the same tiles in turn

    def add_sparse(self, layer: int, tiles: Tiles, keep: Tensor, order: Tensor) -> None:
        """Count the pairs of one sparse attention.

        Args:
            layer: which.
            tiles: of the queries.
            keep: [kv_heads, tiles, blocks] bool.
            order: [kv_heads, keys] original position of the keys.
        """
        kv_heads, _, blocks = keep.shape
        cell = order[:, : blocks * tiles.block_tokens].long() * self._grid // self._tokens
        cell = cell.reshape(kv_heads, blocks, tiles.block_tokens)
        of_block = torch.zeros(kv_heads, blocks, self._grid, device=keep.device)
        of_block.scatter_add_(2, cell, torch.ones_like(cell, dtype=torch.float32))
        kept = (keep.float() @ of_block).cpu().numpy()  # [kv_heads, tiles, grid]
        fixed = self._pairs(tiles)
        self._put(layer, slice(None), fixed, kept * fixed.tokens[:, None] + fixed.local)

    def add_dense(self, layer: int, tiles: Tiles, heads: Sequence[int]) -> None:
        """Count the pairs of dense attention of some KV heads."""
        fixed = self._pairs(tiles)
        self._put(layer, list(heads), fixed, fixed.causal)

    def add_causal(self, tiles: Tiles) -> None:
        """Count the pairs that dense attention of the queries would attend to."""
        fixed = self._pairs(tiles)
        np.add.at(self.causal, fixed.row, fixed.causal)

    def _put(self, layer: int, heads: slice | list[int], fixed: _Pairs, pairs: np.ndarray) -> None:
        """Add [.., tiles, grid] to the rows of some heads; several tiles may share a row."""
        summed = np.zeros((*pairs.shape[:-2], self._grid, self._grid), np.float32)
        np.add.at(np.moveaxis(summed, -2, 0), fixed.row, np.moveaxis(pairs, -2, 0))
        self.pairs[layer, heads] += summed

    def _pairs(self, tiles: Tiles) -> _Pairs:
        if self._last is None or self._last[0] != tiles:
            self._last = tiles, self._count(tiles)
        return self._last[1]

    def _count(self, tiles: Tiles) -> _Pairs:
        grid = self._grid
        total = self._tokens
        edges = -(-np.arange(grid + 1) * total // grid)  # first token of each cell
        tokens = np.array([tiles.tokens(tile) for tile in range(tiles.count)])
        first = tiles.q_offset + np.arange(tiles.count) * tiles.tile_tokens
        row = np.minimum(first + tokens // 2, total - 1) * grid // total
        local = np.zeros((tiles.count, grid))
        causal = np.zeros((tiles.count, grid))
        for tile in range(tiles.count):
            start = tiles.local_start(tile)
            end = int(first[tile] + tokens[tile])
            keys = np.arange(start, end)
            queries = end - np.maximum(keys, first[tile])
            local[tile] = np.bincount(keys * grid // total, queries, grid)
            causal[tile] = local[tile] + np.diff(np.minimum(edges, start)) * tokens[tile]
        return _Pairs(row=row, tokens=tokens, local=local, causal=causal)
