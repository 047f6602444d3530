"""Prefill by hand: walks who holds what, token by token and head by head, and counts what moves.

Knows nothing of the package's formulas. Walks assert that each query met every key it may see.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from prefill_service.cost_model.model_shape import ModelShape

ZIGZAG = {"ring", "multi_ring", "usp", "pass_q"}


@dataclass
class Moved:
    """Per layer, one chunk: bytes and operations of each rank, and its (head, query, key) count."""

    exposed: Counter[int] = field(default_factory=Counter)
    exposed_calls: Counter[int] = field(default_factory=Counter)
    hidden: Counter[int] = field(default_factory=Counter)
    hidden_calls: Counter[int] = field(default_factory=Counter)
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
    """One layer of one model on some ranks."""

    def __init__(self, exchange: str, shape: ModelShape, ranks: int, ulysses: int = 1) -> None:
        self.exchange = exchange
        self.shape = shape
        self.ranks = ranks
        self.ulysses = ranks if exchange == "ulysses" else ulysses
        self.ring = ranks // self.ulysses
        group = shape.q_heads // shape.kv_heads
        # What stays together: single heads, or a KV head's.
        unit = group if exchange == "ulysses_gather" else 1
        each, rest = divmod(shape.q_heads // unit, self.ulysses)
        heads = iter(range(shape.q_heads))
        self.q_heads = [
            [next(heads) for _ in range(unit * (each + (index < rest)))]
            for index in range(self.ulysses)
        ]
        self.kv_heads = [sorted({head // group for head in heads}) for heads in self.q_heads]
        self.element = shape.bytes_per_element
        self.vector = shape.head_dim * self.element
        self.kept: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]  # (token, KV head)
        self.replicated: list[set[int]] = [set() for _ in range(ranks)]

    def row(self, rank: int) -> range:
        start = rank // self.ulysses * self.ulysses
        return range(start, start + self.ulysses)

    def run(
        self, tokens: int, chunk_tokens: int, share: float = 1.0, block: int = 64
    ) -> list[Moved]:
        """Every chunk of a prompt."""
        chunks = deal(tokens, self.ranks, chunk_tokens, self.exchange in ZIGZAG)
        return [self.chunk(chunk, share, block) for chunk in chunks]

    def chunk(self, shares: list[list[int]], share: float, block: int) -> Moved:
        """One chunk: ``shares[rank]`` are its tokens' positions."""
        moved = Moved()
        for rank, mine in enumerate(shares):
            moved.tokens[rank] = len(mine)
            heads = self.q_heads[rank % self.ulysses]
            for member in self.row(rank):
                moved.pairs[rank] += len(heads) * sum(token + 1 for token in shares[member])
        match self.exchange:
            case "gather":
                self._gather(shares, moved)
            case "pass_q":
                self._pass_q(shares, moved)
            case "demand":
                self._demand(shares, moved, share, block)
            case _:
                self._mesh(shares, moved)
        return moved

    def _gather(self, shares: list[list[int]], moved: Moved) -> None:
        for source, tokens in enumerate(shares):
            for rank in range(self.ranks):
                assert not self.replicated[rank] & set(tokens), "a token came twice"
                self.replicated[rank] |= set(tokens)
                if rank != source and tokens:
                    moved.hidden[rank] += len(tokens) * self.shape.kv_heads * 2 * self.vector
                    moved.hidden_calls[rank] += 1
        for rank, mine in enumerate(shares):
            assert set(range(max(mine, default=-1) + 1)) <= self.replicated[rank]

    def _mesh(self, shares: list[list[int]], moved: Moved) -> None:
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
            if self.ulysses > 1:
                moved.exposed_calls[rank] = 3
        for column in range(self.ulysses):
            members = [r * self.ulysses + column for r in range(self.ring)]
            if self.exchange == "ulysses_gather":
                self._spread(members, shares, moved)
            else:
                self._circulate(members, moved)

    def _spread(self, members: list[int], shares: list[list[int]], moved: Moved) -> None:
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

    def _circulate(self, members: list[int], moved: Moved) -> None:
        """On one ring, or cut in parts, each on a ring of its own (of a prime number of ranks)."""
        size = len(members)
        steps = range(1, size) if self.exchange == "multi_ring" else [1]
        seen = {rank: set(self.kept[rank]) for rank in members}
        flying = {
            (place, stride): self.kept[rank][number :: len(steps)]
            for place, rank in enumerate(members)
            for number, stride in enumerate(steps)
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

    def _pass_q(self, shares: list[list[int]], moved: Moved) -> None:
        for rank, mine in enumerate(shares):
            self.kept[rank] += [(token, 0) for token in mine]
        met: list[set[int]] = [{token for token, _ in kept} for kept in self.kept]
        query = self.shape.q_heads * self.vector
        result = self.shape.q_heads * (self.vector + max(4, self.element))
        for step in range(1, self.ranks):
            for owner, mine in enumerate(shares):
                at = (owner + step) % self.ranks
                moved.hidden[at] += len(mine) * query
                moved.hidden_calls[at] += 1
                met[owner] |= {token for token, _ in self.kept[at]}
                last = step == self.ranks - 1
                received = moved.exposed if last else moved.hidden
                received[owner] += len(mine) * result
                (moved.exposed_calls if last else moved.hidden_calls)[owner] += 2
        everything = {token for kept in self.kept for token, _ in kept}
        assert all(found == everything for found in met)

    def _demand(self, shares: list[list[int]], moved: Moved, share: float, block: int) -> None:
        past = [[token for token, _ in kept] for kept in self.kept]
        number = max(4, self.element)  # summaries are float32 at least
        vectors = self.shape.kv_heads * (4 * self.shape.head_dim + 1) * number
        for rank, mine in enumerate(shares):
            visible = 0
            for other in range(self.ranks):
                if other != rank:
                    visible += len(past[other])
                    visible += len(shares[other]) if other < rank else 0
                    moved.exposed[rank] += -(-len(shares[other]) // block) * vectors
            fetched = -int(-visible * share // 1)
            moved.exposed[rank] += fetched * self.shape.kv_heads * 2 * self.vector
            moved.exposed_calls[rank] = 3
            self.kept[rank] += [(token, 0) for token in mine]


def prime(number: int) -> bool:
    return number > 1 and all(number % low for low in range(2, number))
