"""Which queries are measured: a few of every tile, others in each layer and chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.tiles import Tiles

_MIN_SAMPLES, _MAX_SAMPLES = 2, 8  # where a chunk has more tiles, one of each is certified
_CERTIFIED_EVERY, _OBSERVED_EVERY = 64, 256
_ONE_A_TILE_FROM = 8192
"""Keys from which one row of each tile is certified: a row costs as much as all keys, and prompts
of that length have many chunks to look at."""
_CLOSER = 3
"""A closer look is at so many times as many rows."""


def certified_rows(settings: SparseSettings, tiles: Tiles, layer: int) -> tuple[Tensor, Tensor]:
    """The queries that are certified, some of every tile, and those for a closer look."""
    if settings.certify_every_row:
        rows = torch.arange(tiles.queries)
        return rows, rows  # no closer look could add to these
    few = max(_MIN_SAMPLES, min(_MAX_SAMPLES, tiles.queries // _CERTIFIED_EVERY))
    if tiles.keys >= _ONE_A_TILE_FROM:
        few = max(_MIN_SAMPLES, min(few, tiles.count))
    wanted = min(settings.certify_rows, tiles.queries) or few
    per_tile, seed = -(-wanted // tiles.count), _seed(tiles, layer)
    closer = sample_tiles(tiles, _CLOSER * per_tile, seed + tiles.count)
    return sample_tiles(tiles, per_tile, seed), closer


def observed_rows(tiles: Tiles, layer: int) -> Tensor:
    """The queries of exact attention whose mass is noted."""
    samples = max(_MIN_SAMPLES, min(_MAX_SAMPLES, tiles.queries // _OBSERVED_EVERY))
    return sample_rows(tiles.queries, samples, _seed(tiles, layer))


def sample_rows(queries: int, samples: int, seed: int) -> Tensor:
    """Which queries to look at: evenly spaced, shifted by ``seed``, so that chunks differ.

    Returns:
        [min(samples, queries)] int64, ascending and distinct.
    """
    samples = min(samples, queries)
    shift = (seed * 0.6180339887) % 1  # the golden ratio leaves no stretch unvisited
    return ((torch.arange(samples) + shift) * (queries / samples)).long()


def sample_tiles(tiles: Tiles, per_tile: int, seed: int) -> Tensor:
    """The same for every tile by itself, so that none is left out; each has its own shift.

    Returns:
        [samples] int64, ascending and distinct.
    """
    return torch.cat([
        tile * tiles.tile_tokens + sample_rows(tiles.tokens(tile), per_tile, seed + tile)
        for tile in range(tiles.count)
    ])  # fmt: skip


def _seed(tiles: Tiles, layer: int) -> int:
    return tiles.q_offset // tiles.tile_tokens + 7 * layer
