"""What a back end needs of the rank that has the keys: blocks brought, or attended to there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial
from prefill_service.attention.sparse.tiles import Tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedBlocks:
    """What a rank is about to attend to.

    Attributes:
        rows: [n, tiles, queries_per_kv * tile_tokens, head_dim] packed queries.
        keep: [n, tiles, blocks] bool.
        tiles: of the queries.
        pairs: [n] all key columns attended, summed over the queries.
        heads: [n] KV heads that the others are of.
    """

    rows: Tensor
    keep: Tensor
    tiles: Tiles
    pairs: Tensor
    heads: Tensor


class DelegatedBlocks(Protocol):
    """Selected blocks of which other ranks attend to a part.

    Attributes:
        kept_here: [n, tiles, blocks] bool, those that this rank attends to itself.
        delegated_heads: those KV heads, as indices of ``kept_here``, of which others attend to
            some blocks.
    """

    kept_here: Tensor
    delegated_heads: Tensor

    def merge_results(self, result: Partial) -> Partial:
        """Wait for the others' results, and merge them in; of packed rows, in place."""


class BlockHooks(Protocol):
    """Called between selection and attention."""

    def fetch_blocks(self, wanted: Tensor, heads: Tensor) -> None:
        """Have blocks here: ``wanted`` is [len(heads), blocks] bool, ``heads`` are KV heads."""

    def delegate_blocks(self, selected: SelectedBlocks) -> DelegatedBlocks | None:
        """Have other ranks attend to a part of what was selected, if they have less to do."""


class NoHooks(BlockHooks):
    """All keys are on this rank, and no other rank attends to them."""

    @override
    def fetch_blocks(self, wanted: Tensor, heads: Tensor) -> None:
        pass

    @override
    def delegate_blocks(self, selected: SelectedBlocks) -> DelegatedBlocks | None:
        return None
