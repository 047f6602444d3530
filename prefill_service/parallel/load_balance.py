"""Keys that are on every rank, and ranks that attend to some of each other's selected blocks.

After selection every rank knows how much all have to attend to, and which rank computes which kept
blocks is decided by all alike (db-SP, 2511.23113). The paper assigns whole blocks of queries
greedily, with a reward for those that stay. Here results over disjoint keys are merged anyway, so
what moves is a run of kept blocks of one query tile, of whatever length evens out two ranks: few
tiles move, and the largest ones first.

What travels are the queries of a tile and the numbers of kept blocks; output and log-sum-exp come
back and are merged with what the tile's own rank computed. Only blocks that all ranks of the chunk
hold in the same order can be attended to elsewhere: those before what the chunk's first unit keeps
by place.
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
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.process_group import SPGroup, Transfer
from prefill_service.parallel.selection_units import SelectionUnits

_EVEN_ENOUGH = 1.02
"""Busiest rank over the mean that is good enough."""

_PRICE_BLOCKS = 2
"""A moved tile costs both ranks as much as so many blocks: its queries and results travel."""

_FEWEST_BLOCKS = 2 * _PRICE_BLOCKS
"""Fewer blocks are not worth it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank has to compute.

    Attributes:
        fixed: (query, key) pairs that it computes itself in any case.
        blocks: [kv_heads][tiles] kept blocks that others could attend to.
        pairs: [tiles] (query, key) pairs of one block.
    """

    fixed: int
    blocks: Sequence[Sequence[int]]
    pairs: Sequence[int]

    @property
    def total(self) -> int:
        """The number of (query, key) pairs."""
        return self.fixed + sum(
            count * pairs
            for head in self.blocks
            for count, pairs in zip(head, self.pairs, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Move:
    """Kept blocks ``first`` to ``first + count`` of one tile are another rank's to attend to."""

    giver: int
    taker: int
    head: int
    tile: int
    first: int
    count: int


def imbalance(totals: Sequence[float]) -> float:
    """Busiest rank over the mean; 1 where there is nothing to do."""
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0


def choose_moves(loads: Sequence[Load], above: float) -> list[Move]:
    """Even out what ranks have to compute; every rank finds the same.

    Args:
        loads: of every rank.
        above: imbalance up to which nothing moves.

    Returns:
        At most one move for a tile and taker. No rank both gives and takes, and none becomes
        busier than the busiest was.
    """
    totals = [load.total for load in loads]
    if imbalance(totals) <= above:
        return []
    mean = sum(totals) / len(totals)
    left = [
        {
            (h, t): count
            for h, head in enumerate(load.blocks)
            for t, count in enumerate(head)
            if count
        }
        for load in loads
    ]
    moves: list[Move] = []
    while True:
        giver = totals.index(max(totals))
        taker = totals.index(min(totals))
        if totals[giver] <= _EVEN_ENOUGH * mean or not left[giver]:
            return moves
        (head, tile), there = max(left[giver].items(), key=lambda item: item[1])
        pairs = loads[giver].pairs[tile]
        room = int(min(totals[giver] - mean, mean - totals[taker] - _PRICE_BLOCKS * pairs) // pairs)
        count = min(there, room)
        if count < _FEWEST_BLOCKS:
            return moves
        left[giver][head, tile] -= count
        if count == there:
            del left[giver][head, tile]
        moves.append(
            Move(
                giver=giver,
                taker=taker,
                head=head,
                tile=tile,
                first=there - count,
                count=count,
            )
        )
        totals[giver] -= count * pairs
        totals[taker] += (count + _PRICE_BLOCKS) * pairs


NotePairs = Callable[[int], None]
"""Called with the (query, key) pairs that this rank attends to for others; negative if they do."""


@dataclass(frozen=True, slots=True)
class Balancing:
    """When ranks even out what they attend to.

    Attributes:
        above: imbalance up to which nothing moves; 0: it never does.
        least_gain: floating-point operations that the busiest rank of a layer has to be spared.
    """

    above: float
    least_gain: float = 0.0


@dataclass(slots=True)
class Balancer:
    """This rank's side of the exchange of work.

    All ranks call ``exchange_loads`` equally often, with a load or in ``close``, which goes on for
    as long as any rank has one.

    Attributes:
        group, shape: of the prefill.
        tile_tokens, block_tokens: of queries and keys.
        max_tiles: tiles of the longest unit.
        balancing: when to do so.
    """

    group: SPGroup
    shape: PromptShape
    tile_tokens: int
    block_tokens: int
    max_tiles: int
    balancing: Balancing
    scratch: ScratchBuffers = field(default_factory=ScratchBuffers)
    _due: bool = True

    def due(self, first: int | None) -> bool:
        """Whether to even out a layer; every rank finds the same.

        It takes two agreements in the midst of the layer, whether or not anything moves. Layers
        of a chunk are alike, so ranks compare once a chunk, in the second layer, what each had to
        do in the first one, which is treated as the chunk before was.

        Args:
            first: (query, key) pairs of this rank's queries in the first layer, to compare now.
        """
        if first is not None:
            totals = [row[0] for row in self.group.all_gather_ints([first])]
            flops = 4 * self.shape.head_dim * self.shape.queries_per_kv
            gain = (max(totals) - sum(totals) / len(totals)) * flops
            limits = self.balancing
            self._due = imbalance(totals) > limits.above and gain >= limits.least_gain
        return self._due

    def exchange_loads(
        self, mine: Load | None, pairs: int = 0
    ) -> tuple[list[Move], list[Load], bool]:
        """What every rank has to do, and who does what of it for whom.

        Args:
            mine: what this rank has to do; nothing if it only helps.
            pairs: of the latter, what it has done in the meantime.

        Returns:
            The moves, the ranks' loads, and whether any rank had something to do.
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
        any_work = any(row[0] for row in rows)
        return choose_moves(loads, self.balancing.above) if any_work else [], loads, any_work

    def begin(
        self,
        moves: list[Move],
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        heads: Sequence[int] = (),
    ) -> Help:
        """Send off what others do for this rank.

        Args:
            rows: [n, tiles, rows, head_dim] packed queries.
            keep: [n, tiles, blocks] bool, what can be moved.
            heads: [n] KV heads that those are of.
        """
        rank = self.group.rank
        device = self.shape.device
        group = self.shape.queries_per_kv
        given: dict[int, list[Move]] = {}
        taken: dict[int, list[Move]] = {}
        for move in moves:
            if move.giver == rank:
                given.setdefault(move.taker, []).append(move)
            if move.taker == rank:
                taken.setdefault(move.giver, []).append(move)
        queries = {}
        blocks = {}
        for taker, some in given.items():
            assert rows is not None, "only who has work gives some"
            assert keep is not None, "only who has work gives some"
            queries[taker] = torch.stack([rows[heads.index(m.head), m.tile] for m in some])
            lists = [_numbers(keep[heads.index(m.head), m.tile], m) for m in some]
            blocks[taker] = torch.cat(lists).int()
        size = (group * self.tile_tokens, self.shape.head_dim)
        coming = {
            giver: torch.empty((len(some), *size), dtype=self.shape.torch_dtype, device=device)
            for giver, some in taken.items()
        }
        numbers = {
            giver: torch.empty(sum(m.count for m in some), dtype=torch.int32, device=device)
            for giver, some in taken.items()
        }
        transfers = [
            self.group.send_recv(queries, coming, "balance"),
            self.group.send_recv(blocks, numbers, "balance"),
        ]
        return Help(self, given, taken, coming, numbers, transfers)

    def compute(self, moves: list[Move], q: Tensor, blocks: Tensor, kv: Tensor) -> Tensor:
        """[moves, rows, head_dim + 1] output and log-sum-exp of what another rank asked for.

        Args:
            q: [moves, rows, head_dim].
            blocks: [sum of the moves' counts], one move's after the other.
            kv: [tokens, 2, kv_heads, head_dim].
        """
        k, v = kv.permute(1, 2, 0, 3)
        lists = torch.split(blocks, [move.count for move in moves])
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = torch.empty((*q.shape[:2], q.shape[2] + 1), dtype=work, device=q.device)
        for head in sorted({move.head for move in moves}):
            which = [i for i, move in enumerate(moves) if move.head == head]
            one = slice(head, head + 1)
            queries = len(which) * self.tile_tokens
            packed = PackedTiles(
                rows=q[which][None],
                k=k[one],
                v=v[one],
                tiles=Tiles(queries, 0, self.tile_tokens, self.block_tokens),
                scale=self.shape.scale,
            )
            part = attend_listed(packed, [lists[i] for i in which], self.scratch)
            found[which, :, :-1] = part.out.to(work)
            found[which, :, -1] = part.lse.to(work)
        return found


def make_balancer(
    group: SPGroup,
    shape: PromptShape,
    settings: SparseSettings,
    units: SelectionUnits,
    *,
    balancing: Balancing | None,
) -> Balancer | None:
    """A balancer for ranks that have all keys, where they can help each other and may.

    They need the back end that attends to local region, kept blocks and summaries one by one,
    which is that of CPUs.
    """
    if balancing is None or not balancing.above or group.size == 1 or shape.device.type != "cpu":
        return None
    longest = max(b - a for a, b in pairwise(units.tokens))
    return Balancer(
        group=group,
        shape=shape,
        tile_tokens=settings.tile_tokens,
        block_tokens=settings.block_tokens,
        max_tiles=-(-longest // settings.tile_tokens),
        balancing=balancing,
    )


@dataclass(slots=True)
class Help:
    """Work under way: this rank's on others, and others' on this one."""

    _of: Balancer
    _given: dict[int, list[Move]]
    _taken: dict[int, list[Move]]
    _queries: dict[int, Tensor]
    _blocks: dict[int, Tensor]
    _transfers: list[Transfer]

    def finish(self, kv: Tensor) -> list[tuple[Move, Tensor]]:
        """Do what others asked for, and have what they did: [rows, head_dim + 1] of each move."""
        for transfer in self._transfers:
            transfer.wait()
        done = {
            giver: self._of.compute(moves, self._queries[giver], self._blocks[giver], kv)
            for giver, moves in self._taken.items()
        }
        shape = self._of.shape
        rows = shape.queries_per_kv * self._of.tile_tokens
        work = torch.float64 if shape.torch_dtype == torch.float64 else torch.float32
        back = {
            taker: torch.empty(
                (len(moves), rows, shape.head_dim + 1), dtype=work, device=shape.device
            )
            for taker, moves in self._given.items()
        }
        self._of.group.send_recv(done, back, "balance").wait()
        return [
            (move, part)
            for taker, moves in self._given.items()
            for move, part in zip(moves, back[taker], strict=True)
        ]


class BalancedKeys(ReplicatedKeys):
    """The keys of one layer, on every rank of the chunk.

    Args:
        kv, segments: see ``ReplicatedKeys``.
        balancer: of the prefill.
        common: what the first unit of the chunk keeps by place begins here.
        note_pairs: called with the pairs of each agreement.
    """

    def __init__(
        self,
        kv: Tensor,
        segments: Segments,
        balancer: Balancer,
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
    def delegate_blocks(self, selected: SelectedBlocks) -> MovedBlocks:
        keep = selected.keep
        tiles = selected.tiles
        heads = selected.heads
        blocks = min(self.common // tiles.block_tokens, keep.shape[2])
        movable = keep[:, :, :blocks]
        of = heads.tolist()
        counts = torch.zeros(self._buffer.shape[2], tiles.count, dtype=torch.long)
        counts[heads] = movable.sum(-1)
        of_block = [tiles.tokens(tile) * tiles.block_tokens for tile in range(tiles.count)]
        load = Load(0, counts.tolist(), of_block)
        load = replace(load, fixed=int(selected.pairs.sum()) - load.total)
        moves, loads, _ = self._balancer.exchange_loads(load)
        self._note(moves, loads)
        help_ = self._balancer.begin(moves, selected.rows, movable, of)
        here = keep
        given = [move for move in moves if move.giver == self._balancer.group.rank]
        if given:
            here = keep.clone()
            for move in given:
                at = of.index(move.head), move.tile
                here[at][_numbers(movable[at], move)] = False
        mine = torch.tensor(sorted({of.index(move.head) for move in given}), dtype=torch.long)
        return MovedBlocks(here, mine, of, help_, self._buffer)

    def close(self, pairs: int = 0) -> None:
        """Help the others until none has anything to give any more.

        Args:
            pairs: that this rank attended to otherwise, since the last agreement.
        """
        while True:
            moves, loads, any_work = self._balancer.exchange_loads(None, pairs)
            if not any_work:
                return
            self._note(moves, loads)
            self._balancer.begin(moves).finish(self._buffer)
            pairs = 0

    def _note(self, moves: list[Move], loads: list[Load]) -> None:
        rank = self._balancer.group.rank
        pairs = 0
        for move in moves:
            size = move.count * loads[move.giver].pairs[move.tile]
            pairs += size * ((move.taker == rank) - (move.giver == rank))
        self._note_pairs(pairs)


@dataclass(slots=True)
class MovedBlocks(DelegatedBlocks):
    """Kept blocks of this rank's queries that other ranks attend to."""

    kept_here: Tensor
    delegated_heads: Tensor
    _of: Sequence[int]  # KV heads of ``kept_here``
    _help: Help
    _kv: Tensor

    @override
    def merge_results(self, result: Partial) -> Partial:
        for move, part in self._help.finish(self._kv):
            at = self._of.index(move.head), move.tile
            out = result.out[at]
            lse = result.lse[at]
            total = torch.logaddexp(lse.to(part.dtype), part[:, -1])
            mine = torch.exp(lse - total)
            theirs = torch.exp(part[:, -1] - total)
            merged = out.to(part.dtype) * mine[:, None] + part[:, :-1] * theirs[:, None]
            out.copy_(merged)
            lse.copy_(total)
        return result


def _numbers(keep: Tensor, move: Move) -> Tensor:
    """Blocks of a move, of the [blocks] bool that its tile keeps."""
    return keep.nonzero()[:, 0][move.first : move.first + move.count]
