"""Which heads a rank of a Ulysses group computes. Imports no torch: the cost model asks, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Query heads in ``parts`` runs as even as possible, with the KV heads that each run reads.

    KV heads that two runs read are replicated: where there are more parts than KV heads, and where
    a run ends inside a group.

    Attributes:
        q_heads, kv_heads: of the model; the first is a multiple of the second.
        parts: ranks that share them.
        whole_kv_heads: a KV head stays with all its query heads, which select blocks together. Then
            nothing is replicated, runs differ by up to a group, and parts may have none.
    """

    q_heads: int
    kv_heads: int
    parts: int
    whole_kv_heads: bool = False

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(f"{self.q_heads} query heads are no multiple of {self.kv_heads}")
        if self.parts > self.q_heads:
            raise ValueError(
                f"a Ulysses degree of {self.parts} exceeds the model's {self.q_heads} query heads"
            )

    @property
    def queries_per_kv(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def queries(self, part: int) -> slice:
        """Query heads of a part."""
        unit = self.queries_per_kv if self.whole_kv_heads else 1
        each, rest = divmod(self.q_heads // unit, self.parts)
        bounds = [unit * (index * each + min(index, rest)) for index in (part, part + 1)]
        return slice(*bounds)

    def keys(self, part: int) -> slice:
        """KV heads that they read."""
        queries = self.queries(part)
        return slice(queries.start // self.queries_per_kv, -(-queries.stop // self.queries_per_kv))

    def runs(self, part: int) -> Iterator[tuple[slice, slice]]:
        """The part cut where the query heads per KV head change.

        Yields:
            Query heads and KV heads, counted within the part; the first a multiple of the second.
        """
        queries = self.queries(part)
        keys = self.keys(part)
        group = self.queries_per_kv
        counts = [
            min(queries.stop, (head + 1) * group) - max(queries.start, head * group)
            for head in range(keys.start, keys.stop)
        ]
        q = k = 0
        while k < len(counts):
            more = next((i for i in range(k, len(counts)) if counts[i] != counts[k]), len(counts))
            size = counts[k] * (more - k)
            yield slice(q, q + size), slice(k, more)
            q, k = q + size, more
