"""Prefill by hand: walks who holds what, token by token and head by head, and counts what moves.

Of an exchange it takes its token order and mesh from the catalogue, but none of its formulas.
What it moves and keeps is its walk's (``WALKS``). Walks assert that each query met every key it
may see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.exchanges.catalog import ExchangeKind, MeshForm
from prefill_service.parallel.token_order import Order

Shares = list[list[int]]
"""[rank] positions of its tokens."""


@dataclass
class Moved:
    """Per layer, one chunk: bytes and operations of each rank, and its (head, query, key) count.

    ``buffered`` are those of the bytes that do not arrive where K and V are kept.
    """

    exposed: Counter[int] = field(default_factory=Counter)
    exposed_calls: Counter[int] = field(default_factory=Counter)
    hidden: Counter[int] = field(default_factory=Counter)
    hidden_calls: Counter[int] = field(default_factory=Counter)
    buffered: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    pairs: Counter[int] = field(default_factory=Counter)


def deal(tokens: int, ranks: int, chunk_tokens: int, zigzag: bool) -> list[list[list[int]]]:
    """Token positions, [chunk][rank]."""
    chunks = []
    for first in range(0, tokens, chunk_tokens * ranks):
        positions = list(range(first, min(tokens, first + chunk_tokens * ranks)))
        parts = 2 * ranks if zigzag else ranks
        pieces = []
        for part in range(parts):
            size = len(positions) // parts + (part < len(positions) % parts)
            start = sum(len(piece) for piece in pieces)
            pieces.append(positions[start : start + size])
        chunks.append([pieces[r] + (pieces[parts - 1 - r] if zigzag else []) for r in range(ranks)])
    return chunks


class Simulation:
    """One layer of one model on some ranks.

    Attributes:
        share: share of the visible keys elsewhere that queries select.
        block: tokens of a block of keys.
        kept: of each rank, the (token, KV head) pairs whose K and V it keeps.
        moving_shards: shards beside those kept for which one layer has room.
    """

    def __init__(
        self,
        exchange: ExchangeKind,
        shape: ModelShape,
        ranks: int,
        ulysses: int = 1,
        *,
        share: float = 1.0,
        block: int = 64,
    ) -> None:
        self.exchange = exchange
        self.shape = shape
        self.ranks = ranks
        self.ulysses = ranks if exchange.mesh is MeshForm.ROW else ulysses
        self.ring = ranks // self.ulysses
        self.share = share
        self.block = block
        group = shape.q_heads // shape.kv_heads
        # What stays together: single heads, or a KV head's.
        unit = group if exchange.whole_kv_heads else 1
        each, rest = divmod(shape.q_heads // unit, self.ulysses)
        heads = iter(range(shape.q_heads))
        self.q_heads = [
            [next(heads) for _ in range(unit * (each + (index < rest)))]
            for index in range(self.ulysses)
        ]
        self.kv_heads = [sorted({head // group for head in heads}) for heads in self.q_heads]
        self.element = shape.bytes_per_element
        self.vector = shape.head_dim * self.element
        self.kept: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        self.moving_shards = 0

    def row(self, rank: int) -> range:
        start = rank // self.ulysses * self.ulysses
        return range(start, start + self.ulysses)

    def columns(self) -> list[list[int]]:
        return [
            [r * self.ulysses + column for r in range(self.ring)] for column in range(self.ulysses)
        ]

    def keep(self, rank: int, tokens: Iterable[int]) -> None:
        """K and V of all KV heads."""
        new = [(token, head) for token in tokens for head in range(self.shape.kv_heads)]
        assert not set(new) & set(self.kept[rank]), "a token came twice"
        self.kept[rank] += new

    def kept_tokens(self, rank: int) -> set[int]:
        return {token for token, _ in self.kept[rank]}

    def run(self, tokens: int, chunk_tokens: int) -> list[Moved]:
        """Every chunk of a prompt."""
        zigzag = self.exchange.order is Order.ZIGZAG
        return [self.chunk(chunk) for chunk in deal(tokens, self.ranks, chunk_tokens, zigzag)]

    def chunk(self, shares: Shares) -> Moved:
        """One chunk: ``shares[rank]`` are its tokens' positions."""
        moved = Moved()
        for rank, mine in enumerate(shares):
            moved.tokens[rank] = len(mine)
            heads = self.q_heads[rank % self.ulysses]
            for member in self.row(rank):
                moved.pairs[rank] += len(heads) * sum(token + 1 for token in shares[member])
        walk_of(self.exchange)(self, shares, moved)
        return moved

    def memory(self, chunks: Iterable[Moved], layers: int) -> int:
        """Bytes of K, V and buffers on the fullest rank, once all chunks were walked."""
        kept = max(len(kept) for kept in self.kept) * 2 * self.vector
        buffers = max(max(moved.buffered.values(), default=0) for moved in chunks)
        return (layers + self.moving_shards) * kept + buffers

    def gather(self, shares: Shares, moved: Moved) -> None:
        for source, tokens in enumerate(shares):
            for rank in range(self.ranks):
                self.keep(rank, tokens)
                if rank != source and tokens:
                    moved.hidden[rank] += len(tokens) * self.shape.kv_heads * 2 * self.vector
                    moved.hidden_calls[rank] += 1
        for rank, mine in enumerate(shares):
            assert set(range(max(mine, default=-1) + 1)) <= self.kept_tokens(rank)

    def mesh_of_rings(self, shares: Shares, moved: Moved) -> None:
        self._swap_heads(shares, moved)
        for members in self.columns():
            self._circulate(members, moved, strides=[1])

    def multi_ring(self, shares: Shares, moved: Moved) -> None:
        self._swap_heads(shares, moved)
        for members in self.columns():
            self._circulate(members, moved, strides=range(1, len(members)))

    def mesh_that_gathers(self, shares: Shares, moved: Moved) -> None:
        self._swap_heads(shares, moved)
        for members in self.columns():
            self._spread(members, shares, moved)

    def _swap_heads(self, shares: Shares, moved: Moved) -> None:
        """In rows, tokens for heads; afterwards each rank keeps its heads of its row's tokens."""
        for rank, mine in enumerate(shares):
            index = rank % self.ulysses
            for member in self.row(rank):
                for token in shares[member]:
                    self.kept[rank] += [(token, head) for head in self.kv_heads[index]]
                    if member != rank:
                        arriving = len(self.q_heads[index]) + 2 * len(self.kv_heads[index])
                        moved.exposed[rank] += arriving * self.vector
                if member != rank:  # outputs of its tokens come back from who has the heads
                    back = len(self.q_heads[member % self.ulysses]) * len(mine)
                    moved.exposed[rank] += back * self.vector
            moved.buffered[rank] = moved.exposed[rank]
            if self.ulysses > 1:
                moved.exposed_calls[rank] = 3

    def _spread(self, members: list[int], shares: Shares, moved: Moved) -> None:
        """What each row has got of the chunk goes to all others of a column, once."""
        news = [
            {token for rank in self.row(member) for token in shares[rank]} for member in members
        ]
        for member in members:
            heads = self.kv_heads[member % self.ulysses]
            for source, new in zip(members, news, strict=True):
                if source != member and new:
                    arriving = [(token, head) for token in new for head in heads]
                    assert not set(arriving) & set(self.kept[member]), "a token came twice"
                    self.kept[member] += arriving
                    moved.hidden[member] += len(arriving) * 2 * self.vector
                    moved.hidden_calls[member] += 1
            known = {token for token, _ in self.kept[member]}
            assert known == set(range(max(known, default=-1) + 1))

    def _circulate(self, members: list[int], moved: Moved, strides: Sequence[int]) -> None:
        """On one ring, or cut in parts, each on a ring of its own (of a prime number of ranks)."""
        size = len(members)
        if size > 1:
            self.moving_shards = 2  # the one being attended to and the one arriving
        seen = {rank: set(self.kept[rank]) for rank in members}
        flying = {
            (place, stride): self.kept[rank][number :: len(strides)]
            for place, rank in enumerate(members)
            for number, stride in enumerate(strides)
        }
        for _ in range(size - 1):
            links = [(place, (place + stride) % size) for place, stride in flying]
            assert len(set(links)) == len(links), "two messages on one link"
            flying = {
                ((place + stride) % size, stride): part for (place, stride), part in flying.items()
            }
            for (place, _), part in flying.items():
                moved.hidden[members[place]] += len(part) * 2 * self.vector
                seen[members[place]] |= set(part)
            for rank in members:
                moved.hidden_calls[rank] += 1
        everything = set().union(*(self.kept[rank] for rank in members))
        assert all(found == everything for found in seen.values())

    def pass_q(self, shares: Shares, moved: Moved) -> None:
        for rank, mine in enumerate(shares):
            self.keep(rank, mine)
        met = [self.kept_tokens(rank) for rank in range(self.ranks)]
        query = self.shape.q_heads * self.vector
        result = self.shape.q_heads * (self.vector + max(4, self.element))
        for step in range(1, self.ranks):
            for owner, mine in enumerate(shares):
                at = (owner + step) % self.ranks
                moved.hidden[at] += len(mine) * query
                moved.hidden_calls[at] += 1
                met[owner] |= self.kept_tokens(at)
                last = step == self.ranks - 1
                received = moved.exposed if last else moved.hidden
                received[owner] += len(mine) * result
                (moved.exposed_calls if last else moved.hidden_calls)[owner] += 2
        moved.buffered = moved.exposed + moved.hidden
        everything = {token for kept in self.kept for token, _ in kept}
        assert all(found == everything for found in met)

    def demand(self, shares: Shares, moved: Moved) -> None:
        past = [self.kept_tokens(rank) for rank in range(self.ranks)]
        number = max(4, self.element)  # summaries are float32 at least
        vectors = self.shape.kv_heads * (4 * self.shape.head_dim + 1) * number
        for rank, mine in enumerate(shares):
            visible = 0
            for other in range(self.ranks):
                if other != rank:
                    visible += len(past[other])
                    visible += len(shares[other]) if other < rank else 0
                    moved.exposed[rank] += -(-len(shares[other]) // self.block) * vectors
            fetched = -int(-visible * self.share // 1)
            moved.exposed[rank] += fetched * self.shape.kv_heads * 2 * self.vector
            moved.exposed_calls[rank] = 3
            self.keep(rank, mine)


WALKS: dict[str, Callable[[Simulation, Shares, Moved], None]] = {
    "gather": Simulation.gather,
    "ring": Simulation.mesh_of_rings,
    "ulysses": Simulation.mesh_of_rings,
    "usp": Simulation.mesh_of_rings,
    "pass_q": Simulation.pass_q,
    "multi_ring": Simulation.multi_ring,
    "demand": Simulation.demand,
    "ulysses_gather": Simulation.mesh_that_gathers,
}
"""How one chunk goes from rank to rank, by exchange: moves and keeps every token of it."""


def walk_of(exchange: ExchangeKind) -> Callable[[Simulation, Shares, Moved], None]:
    if exchange.name not in WALKS:
        raise LookupError(f"{exchange} has no walk: add one to WALKS in {__file__}")
    return WALKS[exchange.name]


def prime(number: int) -> bool:
    return number > 1 and all(number % low for low in range(2, number))
