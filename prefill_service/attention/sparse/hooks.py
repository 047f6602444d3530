"""What a back end asks of whoever has the keys: bring blocks here, or attend to them elsewhere."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial
from prefill_service.attention.sparse.tiles import Tiles


class DelegatedBlocks(Protocol):
    """Kept blocks that other ranks attend to."""

    @property
    def here(self) -> Tensor:
        """[kv_heads, tiles, blocks] bool, those that this rank attends to itself."""

    @property
    def heads(self) -> Tensor:
        """Those KV heads, as indices of ``here``, of which others attend to some."""

    def merge_results(self, result: Partial) -> Partial:
        """Wait for the others' results, and merge them in; of packed rows, in place."""


class BlockHooks(Protocol):
    """Called between selection and attention."""

    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        """Have blocks here: ``wanted`` is [len(heads), blocks] bool, ``heads`` are KV heads."""

    def delegate(
        self, rows: Tensor, keep: Tensor, tiles: Tiles, pairs: Tensor, heads: Tensor
    ) -> DelegatedBlocks | None:
        """Have other ranks attend to a part of what was selected, if they have less to do.

        Args:
            rows: [n, tiles, queries_per_kv * tile_tokens, head_dim] packed queries.
            keep: [n, tiles, blocks] bool.
            tiles: of the queries.
            pairs: [n] all key columns attended, summed over the queries.
            heads: [n] KV heads that the others are of.
        """


class NoHooks(BlockHooks):
    """All keys are on this rank, and no other rank attends to them."""

    @override
    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        pass

    @override
    def delegate(
        self, rows: Tensor, keep: Tensor, tiles: Tiles, pairs: Tensor, heads: Tensor
    ) -> DelegatedBlocks | None:
        return None
