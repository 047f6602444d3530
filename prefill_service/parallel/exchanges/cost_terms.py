"""What the formulas of exchanges are made of: bytes of each chunk and rank, to the byte.

With N tokens in one chunk, P ranks, e bytes per element and even shares, a rank receives per layer
what ``catalog`` says beside each exchange. In several chunks exchanges part: what is broadcast or
swapped for heads moves once, whereas K and V that stay where they were computed have to come round
again for every chunk, or the chunk's queries go to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_service.attention_shape import BLOCK_TOKENS, AttentionShape, summary_width
from prefill_service.parallel.chunking import Chunking, Ints
from prefill_service.parallel.head_partition import HeadSplit


@dataclass(frozen=True, slots=True)
class Stream:
    """What one phase of an exchange brings to each rank.

    Attributes:
        received: [chunks, ranks] bytes.
        calls: [chunks, ranks] operations that a rank waits for, one after another.
        links: links of a rank that carry them at once, where the topology has as many.
    """

    received: Ints
    calls: Ints
    links: int = 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an exchange moves per layer.

    Attributes:
        exposed: transfers that the rank can only wait for.
        hidden: transfers under which it attends to the keys that it has.
    """

    exposed: Stream
    hidden: Stream

    @property
    def received(self) -> Ints:
        """[ranks] bytes over all chunks."""
        total: Ints = (self.exposed.received + self.hidden.received).sum(0)
        return total


@dataclass(frozen=True, slots=True)
class TrafficOptions:
    """What formulas leave open.

    Attributes:
        demand_share: share of the keys that a rank may see elsewhere which its queries select.
        block_tokens: keys of a block, which has one summary.
    """

    demand_share: float = 1.0
    block_tokens: int = BLOCK_TOKENS


def summary_bytes(shape: AttentionShape) -> int:
    """Bytes of the summaries of one block of keys in one layer."""
    numbers = shape.kv_heads * summary_width(shape.head_dim)
    return numbers * max(4, shape.bytes_per_element)  # at least float32


def partial_bytes(shape: AttentionShape) -> int:
    """Bytes of one token's partial attention result in one layer, its log-sum-exp included."""
    lse = max(4, shape.bytes_per_element)  # sums of exponentials do not survive bfloat16
    return shape.q_heads * (shape.head_dim * shape.bytes_per_element + lse)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTerms:
    """One prompt on some ranks, as the formulas of an exchange see it.

    Attributes:
        shape: of the model.
        chunking: tokens of each chunk and rank.
        ulysses: ranks of a row of the mesh, which split heads.
        whole_kv_heads: they split them between KV heads.
        options: what formulas leave open.
    """

    shape: AttentionShape
    chunking: Chunking
    ulysses: int
    whole_kv_heads: bool
    options: TrafficOptions

    # ---- traffic ---------------------------------------------------------------------------

    def traffic(self, *, exposed: Stream | None = None, hidden: Stream | None = None) -> Traffic:
        """Both phases of an exchange; one that is left out moves nothing."""
        nothing = Stream(np.zeros_like(self.tokens), np.zeros_like(self.tokens))
        return Traffic(exposed or nothing, hidden or nothing)

    def heads_to_all(self) -> Stream:
        """In rows, K and V, then Q, of a rank's heads; then outputs of its tokens' other heads."""
        row = self._of_each_rank(self.chunking.by_rows(self.ulysses).tokens)
        q_heads, kv_heads = self.heads_of_ranks()
        heads_in = (row - self.tokens) * (q_heads + 2 * kv_heads)
        heads_out = self.tokens * (self.shape.q_heads - q_heads)
        per_head = self.shape.head_dim * self.shape.bytes_per_element
        return Stream(
            received=(heads_in + heads_out) * per_head,
            calls=np.full_like(self.tokens, 3 if self.ulysses > 1 else 0),
            links=max(1, self.ulysses - 1),
        )

    def broadcasts(self) -> Stream:
        """In columns, the chunk's K and V of the other rows, a broadcast each."""
        row = self._of_each_rank(self.chunking.by_rows(self.ulysses).tokens)
        busy = (row > 0).astype(np.int64)
        return Stream(self._elsewhere(row) * self._kv_bytes_of_heads(), self._elsewhere(busy))

    def circulation(self, rings: int = 1) -> Stream:
        """In columns, all K and V so far of the other rows, step by step."""
        held = self._of_each_rank(self.chunking.by_rows(self.ulysses).held)
        received = self._elsewhere(held) * self._kv_bytes_of_heads()
        return Stream(received, np.full_like(received, self.ring - 1), rings)

    def queries(self) -> Stream:
        """Other ranks' queries, and results of its own from all other ranks but the last."""
        shape = self.shape
        others = self.ranks - 1
        elsewhere = self.tokens.sum(1, keepdims=True) - self.tokens
        query = shape.q_heads * shape.head_dim * shape.bytes_per_element
        received = elsewhere * query + self.tokens * (others - 1) * partial_bytes(shape)
        # Queries, outputs and log-sum-exps travel separately.
        return Stream(received, np.full_like(received, others + 2 * (others - 1)))

    def last_results(self) -> Stream:
        """Results from the last rank its queries came to: nothing is left to compute meanwhile."""
        return Stream(self.tokens * partial_bytes(self.shape), np.full_like(self.tokens, 2))

    def selected_blocks(self) -> Stream:
        """Summaries of the chunk's blocks once; then, of what it may see, what was selected."""
        past = self.chunking.held - self.tokens
        before = self.tokens.cumsum(1) - self.tokens  # earlier ranks' tokens of this chunk
        visible = past.sum(1, keepdims=True) - past + before
        fetched = np.ceil(visible * self.options.demand_share).astype(np.int64)
        blocks = self._blocks()
        others = blocks.sum(1, keepdims=True) - blocks
        received = fetched * self.shape.row_bytes + others * summary_bytes(self.shape)
        # Summaries, then which blocks are wanted (a few bytes), then the blocks.
        return Stream(received, np.full_like(received, 3), self.ranks - 1)

    # ---- memory ----------------------------------------------------------------------------

    def all_keys_bytes(self) -> int:
        """K and V of all tokens in one layer, of the most KV heads that a rank has."""
        return int(self.tokens.sum()) * int(self._kv_bytes_of_heads().max())

    def own_keys_bytes(self) -> int:
        """K and V of the fullest row's tokens in one layer, of the most KV heads of a rank."""
        held = int(self.chunking.by_rows(self.ulysses).held[-1].max())
        return held * int(self._kv_bytes_of_heads().max())

    def summaries_bytes(self) -> int:
        """Summaries of all blocks in one layer."""
        return int(self._blocks().sum()) * summary_bytes(self.shape)

    # ---- sizes -----------------------------------------------------------------------------

    @property
    def tokens(self) -> Ints:
        """[chunks, ranks] tokens of each share."""
        return self.chunking.tokens

    @property
    def ranks(self) -> int:
        """Ranks of the mesh."""
        return self.chunking.ranks

    @property
    def ring(self) -> int:
        """Ranks of a column of the mesh."""
        return self.ranks // self.ulysses

    def heads_of_ranks(self) -> tuple[Ints, Ints]:
        """[ranks] query heads and KV heads that each rank computes.

        KV heads that two ranks of a row read are replicated.
        """
        split = HeadSplit(
            self.shape.q_heads, self.shape.kv_heads, self.ulysses, self.whole_kv_heads
        )
        queries, keys = (
            np.array([part.stop - part.start for part in map(of, range(self.ulysses))], np.int64)
            for of in (split.queries, split.keys)
        )
        return np.tile(queries, self.ring), np.tile(keys, self.ring)

    def _blocks(self) -> Ints:
        """[chunks, ranks] blocks of each share."""
        return -(-self.tokens // self.options.block_tokens)

    def _kv_bytes_of_heads(self) -> Ints:
        """[ranks] bytes of one token's K and V, of each rank's heads."""
        _, kv_heads = self.heads_of_ranks()
        found: Ints = kv_heads * 2 * self.shape.head_dim * self.shape.bytes_per_element
        return found

    def _of_each_rank(self, of_rows: Ints) -> Ints:
        """[chunks, ring] to [chunks, ranks]: what is true of a row is of its ranks."""
        return of_rows.repeat(self.ulysses, 1)

    def _elsewhere(self, of_row: Ints) -> Ints:
        """[chunks, ranks] sums over all other rows; a row's value is repeated at its ranks."""
        others: Ints = of_row[:, :: self.ulysses].sum(1, keepdims=True) - of_row
        return others
