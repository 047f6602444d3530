"""Ranks that attend to some of each other's selected blocks, where keys are on every rank.

What travels are the queries of a tile and the numbers of kept blocks; output and log-sum-exp come
back and are merged with what the tile's own rank computed. Only blocks that all ranks of the chunk
hold in the same order can be delegated: those before what the chunk's first unit keeps by place.
``load_balance.py`` decides which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial
from prefill_service.attention.key_source import ReplicatedKeys
from prefill_service.attention.settings import Segments, SparseSettings
from prefill_service.attention.sparse.gathered_attention import PackedTiles, attend_listed
from prefill_service.attention.sparse.hooks import DelegatedBlocks, SelectedBlocks
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import PromptShape, accumulation_dtype
from prefill_service.parallel.load_balance import (
    BalanceLimits,
    Delegation,
    Load,
    choose_delegations,
    imbalance,
)
from prefill_service.parallel.process_group import SPGroup, Transfer
from prefill_service.parallel.selection_units import SelectionUnits

NotePairs = Callable[[int], None]
"""Called with the (query, key) pairs that this rank attends to for others; negative if they do."""


@dataclass(frozen=True, slots=True)
class BalanceRound:
    """What ranks agreed on before they attend to what one selection unit of each has selected.

    Attributes:
        delegations: of all ranks.
        loads: of every rank.
        any_load: whether any rank had one; if not, it is the last round of the layer.
    """

    delegations: list[Delegation]
    loads: list[Load]
    any_load: bool

    def pairs_gained(self, rank: int) -> int:
        """(query, key) pairs that a rank attends to for others; negative if they do for it."""
        pairs = 0
        for one in self.delegations:
            size = one.count * self.loads[one.from_rank].pairs[one.tile]
            pairs += size * ((one.to_rank == rank) - (one.from_rank == rank))
        return pairs


@dataclass(slots=True, kw_only=True)
class LoadBalancer:
    """One rank's part in evening out what ranks attend to.

    All ranks call ``agree`` equally often in a layer: with a load for each selection unit, and
    then without one until no rank has any (``DelegatingKeys.attend_for_others``).

    Attributes:
        group, shape: of the prefill.
        tile_tokens, block_tokens: of queries and keys.
        max_tiles: tiles of the longest unit.
        limits: when to do so.
    """

    group: SPGroup
    shape: PromptShape
    tile_tokens: int
    block_tokens: int
    max_tiles: int
    limits: BalanceLimits
    scratch: ScratchBuffers = field(default_factory=ScratchBuffers)
    _due: bool = True

    def is_due(self, first: int | None) -> bool:
        """Whether to even out a layer; every rank finds the same.

        It takes two agreements in the midst of the layer, whether or not anything is delegated.
        Layers of a chunk are alike, so ranks compare once a chunk, in the second layer, what each
        had to do in the first one, which is treated as the chunk before was.

        Args:
            first: (query, key) pairs of this rank's queries in the first layer, to compare now.
        """
        if first is not None:
            totals = [row[0] for row in self.group.all_gather_ints([first])]
            flops = 4 * self.shape.head_dim * self.shape.queries_per_kv
            gain = (max(totals) - sum(totals) / len(totals)) * flops
            self._due = imbalance(totals) > self.limits.above and gain >= self.limits.least_gain
        return self._due

    def agree(self, mine: Load | None, pairs: int = 0) -> BalanceRound:
        """Agree on what every rank has to do, and who attends to what of it for whom.

        Args:
            mine: what this rank has to do; ``None`` if all of that is done.
            pairs: then, what it attended to since the last round.
        """
        width = self.shape.kv_heads * self.max_tiles
        row = [0, pairs, *[0] * (width + self.max_tiles)]
        if mine is not None:
            row[:2] = 1, mine.fixed
            for head, counts in enumerate(mine.blocks):
                at = 2 + head * self.max_tiles
                row[at : at + len(counts)] = counts
            row[2 + width : 2 + width + len(mine.pairs)] = mine.pairs
        rows = self.group.all_gather_ints(row)
        loads = [
            Load(
                row[1],
                [row[at : at + self.max_tiles] for at in range(2, 2 + width, self.max_tiles)],
                row[2 + width :],
            )
            for row in rows
        ]
        any_load = any(row[0] for row in rows)
        chosen = choose_delegations(loads, self.limits.above) if any_load else []
        return BalanceRound(chosen, loads, any_load)

    def send_queries(
        self,
        delegations: list[Delegation],
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        heads: Sequence[int] = (),
    ) -> PendingDelegations:
        """Send the queries and block numbers of what this rank delegates, and receive others'.

        Args:
            delegations: of all ranks.
            rows: [n, tiles, rows, head_dim] packed queries.
            keep: [n, tiles, blocks] bool, what can be delegated.
            heads: [n] KV heads that those are of.
        """
        rank = self.group.rank
        device = self.shape.device
        queries_per_kv = self.shape.queries_per_kv
        sent: dict[int, list[Delegation]] = {}
        received: dict[int, list[Delegation]] = {}
        for one in delegations:
            if one.from_rank == rank:
                sent.setdefault(one.to_rank, []).append(one)
            if one.to_rank == rank:
                received.setdefault(one.from_rank, []).append(one)
        queries = {}
        blocks = {}
        for to_rank, some in sent.items():
            assert rows is not None, "only a rank with a load delegates"
            assert keep is not None, "only a rank with a load delegates"
            queries[to_rank] = torch.stack([rows[heads.index(d.head), d.tile] for d in some])
            lists = [_block_numbers(keep[heads.index(d.head), d.tile], d) for d in some]
            blocks[to_rank] = torch.cat(lists).int()
        size = (queries_per_kv * self.tile_tokens, self.shape.head_dim)
        their_queries = {
            from_rank: torch.empty((len(some), *size), dtype=self.shape.torch_dtype, device=device)
            for from_rank, some in received.items()
        }
        their_blocks = {
            from_rank: torch.empty(sum(d.count for d in some), dtype=torch.int32, device=device)
            for from_rank, some in received.items()
        }
        transfers = [
            self.group.send_recv(queries, their_queries, "balance"),
            self.group.send_recv(blocks, their_blocks, "balance"),
        ]
        return PendingDelegations(
            _balancer=self,
            _sent=sent,
            _received=received,
            _queries=their_queries,
            _blocks=their_blocks,
            _transfers=transfers,
        )

    def attend_delegated(
        self, delegations: list[Delegation], q: Tensor, blocks: Tensor, kv: Tensor
    ) -> Tensor:
        """Attend to what one other rank delegated to this one.

        Args:
            delegations: those of that rank.
            q: [delegations, rows, head_dim].
            blocks: [sum of the delegations' counts], one delegation's after the other.
            kv: [tokens, 2, kv_heads, head_dim].

        Returns:
            [delegations, rows, head_dim + 1] output and log-sum-exp.
        """
        k, v = kv.permute(1, 2, 0, 3)
        lists = torch.split(blocks, [one.count for one in delegations])
        dtype = accumulation_dtype(q.dtype)
        found = torch.empty((*q.shape[:2], q.shape[2] + 1), dtype=dtype, device=q.device)
        for head in sorted({one.head for one in delegations}):
            which = [i for i, one in enumerate(delegations) if one.head == head]
            only = slice(head, head + 1)
            queries = len(which) * self.tile_tokens
            packed = PackedTiles(
                rows=q[which][None],
                k=k[only],
                v=v[only],
                tiles=Tiles(queries, 0, self.tile_tokens, self.block_tokens),
                scale=self.shape.scale,
            )
            part = attend_listed(packed, [lists[i] for i in which], self.scratch)
            found[which, :, :-1] = part.out.to(dtype)
            found[which, :, -1] = part.lse.to(dtype)
        return found


def make_balancer(
    group: SPGroup,
    shape: PromptShape,
    settings: SparseSettings,
    units: SelectionUnits,
    *,
    limits: BalanceLimits | None,
) -> LoadBalancer | None:
    """A balancer for ranks that have all keys, where they can delegate and may.

    They need the back end that attends to local region, kept blocks and summaries one by one,
    which is that of CPUs.
    """
    if limits is None or not limits.above or group.size == 1 or shape.device.type != "cpu":
        return None
    longest = max(b - a for a, b in pairwise(units.tokens))
    return LoadBalancer(
        group=group,
        shape=shape,
        tile_tokens=settings.tile_tokens,
        block_tokens=settings.block_tokens,
        max_tiles=-(-longest // settings.tile_tokens),
        limits=limits,
    )


@dataclass(slots=True, kw_only=True)
class PendingDelegations:
    """Delegations of one round under way: this rank's to others, and others' to this one."""

    _balancer: LoadBalancer
    _sent: dict[int, list[Delegation]]
    _received: dict[int, list[Delegation]]
    _queries: dict[int, Tensor]
    _blocks: dict[int, Tensor]
    _transfers: list[Transfer]

    def exchange_results(self, kv: Tensor) -> list[tuple[Delegation, Tensor]]:
        """Attend for the others, and receive what they attended to for this rank.

        Args:
            kv: [tokens, 2, kv_heads, head_dim].

        Returns:
            Each delegation of this rank with its [rows, head_dim + 1] output and log-sum-exp.
        """
        for transfer in self._transfers:
            transfer.wait()
        balancer = self._balancer
        done = {
            from_rank: balancer.attend_delegated(
                some, self._queries[from_rank], self._blocks[from_rank], kv
            )
            for from_rank, some in self._received.items()
        }
        shape = balancer.shape
        rows = shape.queries_per_kv * balancer.tile_tokens
        dtype = accumulation_dtype(shape.torch_dtype)
        back = {
            to_rank: torch.empty(
                (len(some), rows, shape.head_dim + 1), dtype=dtype, device=shape.device
            )
            for to_rank, some in self._sent.items()
        }
        balancer.group.send_recv(done, back, "balance").wait()
        return [
            (one, part)
            for to_rank, some in self._sent.items()
            for one, part in zip(some, back[to_rank], strict=True)
        ]


class DelegatingKeys(ReplicatedKeys):
    """The keys of one layer on every rank of the chunk, so that ranks can delegate blocks.

    Args:
        kv, segments: see ``ReplicatedKeys``.
        balancer: of the prefill.
        common: what the first unit of the chunk keeps by place begins here.
        note_pairs: called with the pairs of each round.
    """

    def __init__(
        self,
        kv: Tensor,
        segments: Segments,
        balancer: LoadBalancer,
        *,
        common: int,
        note_pairs: NotePairs,
    ) -> None:
        super().__init__(kv, segments, balancer.scratch)
        self._buffer = kv
        self._balancer = balancer
        self._note_pairs = note_pairs
        self.common = common // segments.segment_tokens * segments.segment_tokens
        """Tokens before this one are in the same order on every rank."""

    @override
    def delegate_blocks(self, selected: SelectedBlocks) -> DelegatedTiles:
        keep = selected.keep
        tiles = selected.tiles
        heads = selected.heads.tolist()
        blocks = min(self.common // tiles.block_tokens, keep.shape[2])
        common = keep[:, :, :blocks]
        counts = torch.zeros(self._buffer.shape[2], tiles.count, dtype=torch.long)
        counts[selected.heads] = common.sum(-1)
        of_block = [tiles.tokens(tile) * tiles.block_tokens for tile in range(tiles.count)]
        load = Load(0, counts.tolist(), of_block)
        load = replace(load, fixed=int(selected.pairs.sum()) - load.total)
        agreed = self._balancer.agree(load)
        rank = self._balancer.group.rank
        self._note_pairs(agreed.pairs_gained(rank))
        pending = self._balancer.send_queries(agreed.delegations, selected.rows, common, heads)
        mine = [one for one in agreed.delegations if one.from_rank == rank]
        kept_here = keep.clone() if mine else keep
        for one in mine:
            at = heads.index(one.head), one.tile
            kept_here[at][_block_numbers(common[at], one)] = False
        delegated = sorted({heads.index(one.head) for one in mine})
        return DelegatedTiles(
            kept_here=kept_here,
            delegated_heads=torch.tensor(delegated, dtype=torch.long),
            _heads=heads,
            _pending=pending,
            _kv=self._buffer,
        )

    def attend_for_others(self, pairs: int = 0) -> None:
        """Attend to what others delegate, until none has a load any more.

        Args:
            pairs: that this rank attended to otherwise, since the last round.
        """
        while True:
            agreed = self._balancer.agree(None, pairs)
            if not agreed.any_load:
                return
            self._note_pairs(agreed.pairs_gained(self._balancer.group.rank))
            self._balancer.send_queries(agreed.delegations).exchange_results(self._buffer)
            pairs = 0


@dataclass(slots=True, kw_only=True)
class DelegatedTiles(DelegatedBlocks):
    """Tiles of this rank's queries with kept blocks that other ranks attend to."""

    kept_here: Tensor
    delegated_heads: Tensor
    _heads: Sequence[int]  # KV heads of ``kept_here``
    _pending: PendingDelegations
    _kv: Tensor

    @override
    def merge_results(self, result: Partial) -> Partial:
        for one, part in self._pending.exchange_results(self._kv):
            at = self._heads.index(one.head), one.tile
            out = result.out[at]
            lse = result.lse[at]
            total = torch.logaddexp(lse.to(part.dtype), part[:, -1])
            mine = torch.exp(lse - total)
            theirs = torch.exp(part[:, -1] - total)
            merged = out.to(part.dtype) * mine[:, None] + part[:, :-1] * theirs[:, None]
            out.copy_(merged)
            lse.copy_(total)
        return result


def _block_numbers(keep: Tensor, delegation: Delegation) -> Tensor:
    """Blocks of a delegation, of the [blocks] bool that its tile keeps."""
    end = delegation.first + delegation.count
    return keep.nonzero()[:, 0][delegation.first : end]
