"""What each exchange makes a rank receive per layer, chunk by chunk, to the byte.

With N tokens in one chunk, P ranks, e bytes per element and even shares, a rank receives

* ``gather``, ``ring``, ``multi_ring``: ``2 h_kv d e N (P-1)/P`` (LSS Transformer, arXiv 2311.02382;
  Ring Self-Attention, 2105.13120; TASP, 2509.26541),
* ``ulysses``: ``(2 h_q + 2 h_kv) d e N (P-1)/P^2`` (2309.14509),
* ``usp`` and ``ulysses_gather`` U x R:
  ``(2 h_q + 2 h_kv) d e (N/P) (U-1)/U + 2 h_kv d e N (R-1)/P`` (2405.07719),
* ``pass_q``: ``h_q (2d+1) e N (P-1)/P`` (TokenRing, 2412.20501); the 1 has 4 bytes at least.

In several chunks they part: ``gather``, ``ulysses`` and both together move each token once, whereas
K and V that stay where they were computed have to come round again for every chunk (``ring``,
``multi_ring``, ``usp``'s rings, ``demand`` for what it selects), or the chunk's queries go to them
(``pass_q``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_service.cost_model.chunking import Chunking, Ints
from prefill_service.cost_model.model_shape import ModelShape
from prefill_service.cost_model.schemes import Exchange, Scheme, split_heads

BLOCK_TOKENS = 64
_SUMMARY_VECTORS = 4  # of a block and KV head: mean key, variance, mean value, mean outlier
_SUMMARY_NUMBERS = 1  # the outliers' count


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
    """Per layer.

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
    """

    demand_share: float = 1.0


DEFAULT_OPTIONS = TrafficOptions()


def summary_bytes(shape: ModelShape) -> int:
    """Bytes of the summaries of one block of keys in one layer."""
    numbers = _SUMMARY_VECTORS * shape.head_dim + _SUMMARY_NUMBERS
    return numbers * shape.kv_heads * max(4, shape.bytes_per_element)  # at least float32


def traffic(
    scheme: Scheme,
    shape: ModelShape,
    chunking: Chunking,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> Traffic:
    """What a scheme moves per layer.

    Args:
        chunking: shares of the scheme's ranks.
        options: see there.

    Raises:
        ValueError: the chunking has other ranks than the scheme.
    """
    if chunking.ranks != scheme.ranks:
        raise ValueError(f"shares of {chunking.ranks} ranks for a scheme on {scheme.ranks}")
    calculate = _Calculation(scheme, shape, chunking, options)
    match scheme.exchange:
        case Exchange.GATHER:
            return Traffic(calculate.nothing, calculate.gather())
        case Exchange.RING:
            return Traffic(calculate.nothing, calculate.ring())
        case Exchange.MULTI_RING:
            return Traffic(calculate.nothing, calculate.ring(scheme.ranks - 1))
        case Exchange.ULYSSES | Exchange.USP:
            return Traffic(calculate.heads_to_all(), calculate.ring())
        case Exchange.ULYSSES_GATHER:
            return Traffic(calculate.heads_to_all(), calculate.columns())
        case Exchange.PASS_Q:
            return Traffic(calculate.last_results(), calculate.queries())
        case Exchange.DEMAND:
            return Traffic(calculate.selected(), calculate.nothing)


@dataclass(frozen=True, slots=True)
class _Calculation:
    scheme: Scheme
    shape: ModelShape
    chunking: Chunking
    options: TrafficOptions

    @property
    def tokens(self) -> Ints:
        return self.chunking.tokens

    @property
    def nothing(self) -> Stream:
        return Stream(np.zeros_like(self.tokens), np.zeros_like(self.tokens))

    @property
    def elsewhere(self) -> Ints:
        """Tokens of the chunk that other ranks have."""
        others: Ints = self.tokens.sum(1, keepdims=True) - self.tokens
        return others

    @property
    def heads(self) -> tuple[Ints, Ints]:
        """[ulysses] query heads and KV heads of the ranks of a row."""
        return split_heads(self.shape, self.scheme.ulysses, self.scheme.whole_groups)

    def gather(self) -> Stream:
        """Each other rank's share, in one broadcast."""
        busy = (self.tokens > 0).astype(np.int64)
        return Stream(self.elsewhere * self.shape.kv_bytes, busy.sum(1, keepdims=True) - busy)

    def ring(self, rings: int = 1) -> Stream:
        """All K and V so far of the other ring positions, those of this rank's heads."""
        ulysses, ring = self.scheme.ulysses, self.scheme.ring
        held = self.chunking.rows(ulysses).held.repeat(ulysses, 1)
        others = held[:, ::ulysses].sum(1, keepdims=True) - held
        _, kv_heads = self.heads
        per_head = 2 * self.shape.head_dim * self.shape.bytes_per_element
        received = others * np.tile(kv_heads, ring) * per_head
        return Stream(received, np.full_like(received, ring - 1), rings)

    def columns(self) -> Stream:
        """The chunk's K and V of the other rows, those of this rank's heads, a broadcast each."""
        ulysses, ring = self.scheme.ulysses, self.scheme.ring
        row = self.chunking.rows(ulysses).tokens.repeat(ulysses, 1)
        others = row[:, ::ulysses].sum(1, keepdims=True) - row
        busy = (row > 0).astype(np.int64)
        _, kv_heads = self.heads
        per_head = 2 * self.shape.head_dim * self.shape.bytes_per_element
        calls = busy[:, ::ulysses].sum(1, keepdims=True) - busy
        return Stream(others * np.tile(kv_heads, ring) * per_head, calls)

    def heads_to_all(self) -> Stream:
        """K and V, then Q, of this rank's heads; then outputs of its tokens' other heads."""
        ulysses, ring = self.scheme.ulysses, self.scheme.ring
        row = self.chunking.rows(ulysses).tokens.repeat(ulysses, 1)
        q_heads, kv_heads = (np.tile(h, ring) for h in self.heads)
        heads_in = (row - self.tokens) * (q_heads + 2 * kv_heads)
        heads_out = self.tokens * (self.shape.q_heads - q_heads)
        per_head = self.shape.head_dim * self.shape.bytes_per_element
        return Stream(
            (heads_in + heads_out) * per_head, np.full_like(self.tokens, 3), max(1, ulysses - 1)
        )

    def queries(self) -> Stream:
        """Other ranks' queries, and results of its own from all other ranks but the last."""
        shape, others = self.shape, self.scheme.ranks - 1
        query = shape.q_heads * shape.head_dim * shape.bytes_per_element
        received = self.elsewhere * query + self.tokens * (others - 1) * shape.partial_bytes
        # Queries, outputs and log-sum-exps travel separately.
        return Stream(received, np.full_like(received, others + 2 * (others - 1)))

    def last_results(self) -> Stream:
        """Results from the last rank its queries came to: nothing is left to compute meanwhile."""
        return Stream(self.tokens * self.shape.partial_bytes, np.full_like(self.tokens, 2))

    def selected(self) -> Stream:
        """Summaries of the chunk's blocks once; then, of what it may see, what was selected."""
        shape = self.shape
        past = self.chunking.held - self.tokens
        before = self.tokens.cumsum(1) - self.tokens  # earlier ranks' tokens of this chunk
        visible = past.sum(1, keepdims=True) - past + before
        fetched = np.ceil(visible * self.options.demand_share).astype(np.int64)
        blocks = -(-self.tokens // BLOCK_TOKENS)
        others = blocks.sum(1, keepdims=True) - blocks
        received = fetched * shape.kv_bytes + others * summary_bytes(shape)
        # Summaries, then which blocks are wanted (a few bytes), then the blocks.
        return Stream(received, np.full_like(received, 3), self.scheme.ranks - 1)
