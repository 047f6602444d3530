"""How a rank's queries of a chunk are attended to: exactly, or unit by unit through selection."""

from __future__ import annotations

import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.parallel.comm_stats import CommStats
from prefill_service.parallel.exchanges.base import Exchange
from prefill_service.parallel.exchanges.demand.exchange import DemandExchange
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.exchanges.ulysses_gather import UlyssesGatherExchange
from prefill_service.parallel.load_balance import BalancedKeys, Balancer
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import Range, Share, span


class ChunkAttention:
    """The attention of one prefill on one rank, over whatever exchange brings the keys.

    Args:
        exchange: of the prefill.
        attention: measures all of it, and computes what is sparse.
        units: of the prompt.
        meter: of the ranks' collectives.
        balancer: evens out what ranks attend to, of an exchange that brings all keys to all.
    """

    def __init__(
        self,
        exchange: Exchange,
        attention: AdaptiveAttention,
        units: SelectionUnits,
        meter: CommStats,
        balancer: Balancer | None = None,
    ) -> None:
        self._exchange, self._attention, self._units = exchange, attention, units
        self._meter, self._balancer = meter, balancer
        self._share, self._chunk = Share(()), (0, 0)

    def start_chunk(self, chunk: tuple[Share, ...], rank: int) -> None:
        """Announce a chunk, and whose share of it is computed here."""
        self._exchange.start_chunk(chunk)
        self._attention.start_chunk()
        self._chunk, self._share = span(chunk), chunk[rank]

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attention of this rank's queries [q_heads, tokens, head_dim] over all tokens before."""
        if isinstance(self._exchange, GatherExchange):
            return self._gathered(self._exchange, self._share, layer, q, scale)
        if isinstance(self._exchange, DemandExchange):
            return self._on_demand(self._exchange, layer, q, scale)
        if isinstance(self._exchange, UlyssesGatherExchange):
            return self._by_heads(self._exchange, layer, q, scale)
        for start, end in self._share.ranges:
            self._attention.count(layer, start, end - start)
        return self._exchange.attend(layer, q)

    def _gathered(
        self, exchange: GatherExchange, share: Share, layer: int, q: Tensor, scale: float
    ) -> Tensor:
        """Queries of ``share``, which is this rank's of a chunk of ``exchange``."""
        attention, state = self._attention, self._attention.state(layer)
        (start, border), units = self._split(*share.contiguous)
        parts, clustered = [], state.clustered
        if border > start or not units:
            part, clock, waited = q[:, : border - start], Stopwatch(q.device), self._meter.seconds
            parts.append(exchange.attend(layer, part))
            clock.lap("attend")
            attention.attended(layer, clock.seconds("attend") - (self._meter.seconds - waited))
            attention.observe(layer, part, exchange.complete(layer), start, scale)
        kv = exchange.complete(layer)
        balanced = self._balanced(layer, kv)
        for first, last in units:
            exchange.complete(layer, reorder_before=attention.recent(first))
            part = q[:, first - start : last - start]
            parts.append(attention.attend(layer, part, kv, first, scale, balanced))
        if balanced is not None:
            if not units:
                attention.catch_up(layer, self._chunk[0], balanced)
            balanced.close(0 if units else attention.pairs(layer))
        exchange.reordered(layer, clustered, state.clustered)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _balanced(self, layer: int, kv: Tensor) -> BalancedKeys | None:
        """Keys that are on every rank, where some rank's queries of the chunk are sparse.

        Nothing if evening out what ranks have to do would not be worth it.
        """
        attention, balancer = self._attention, self._balancer
        if balancer is None or not self._split(*self._chunk)[1]:
            return None
        keys = BalancedKeys(
            kv, attention.segments, balancer, attention.recent(self._chunk[0]),
            lambda pairs: attention.moved(layer, pairs),
        )  # fmt: skip
        if not keys.common:
            return None
        return keys if balancer.due(attention.pairs(0) if layer == 1 else None) else None

    def _on_demand(self, exchange: DemandExchange, layer: int, q: Tensor, scale: float) -> Tensor:
        attention, state = self._attention, self._attention.state(layer)
        (start, border), units = self._split(*self._share.contiguous)
        _, sparse = self._split(*self._chunk)
        if sparse:  # for some rank: then summaries are due
            oldest, newest = (attention.recent(at) for at in (self._chunk[0], sparse[-1][0]))
            exchange.advance(layer, state, oldest, newest)
        parts = []
        if border > start or not units:
            part = q[:, : border - start]
            parts.append(exchange.attend_first(layer, part))
            attention.observe(layer, part, exchange.kv, start, scale)
        for first, last in units:
            part = q[:, first - start : last - start]
            parts.append(attention.attend(layer, part, exchange.kv, first, scale, exchange))
        exchange.close()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _by_heads(
        self, exchange: UlyssesGatherExchange, layer: int, q: Tensor, scale: float
    ) -> Tensor:
        """Queries of the row's share, of the heads whose keys are here."""
        q = exchange.to_heads(q)
        if len(q):  # there may be more ranks in a row than KV heads
            q = self._gathered(exchange.gathered, exchange.share, layer, q, scale)
        return exchange.to_tokens(q)

    def _split(self, start: int, end: int) -> tuple[Range, list[Range]]:
        """Tokens [start, end): first those attended to exactly, then the units that are sparse."""
        units = [
            (first, last)
            for first, last in self._units.cut(start, end)
            if self._attention.is_sparse(first, last - first)
        ]
        return (start, units[0][0] if units else end), units


def heads_here(exchange: Exchange) -> slice | None:
    """KV heads of which this rank attends to all keys, if others attend to the rest."""
    return exchange.kv_heads if isinstance(exchange, UlyssesGatherExchange) else None
