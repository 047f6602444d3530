"""The ``gather`` exchange: each chunk's K and V travel once, to all ranks.

Every rank ends up with all keys and values (replicated KV), receiving
``2 * kv_heads * head_dim * bytes * tokens * (P-1)/P`` per layer, the minimum for exact
attention with replicated KV (LSS Transformer, arXiv 2311.02382; LASP-2H, arXiv 2502.07563).
A rank starts on the keys it has (past chunks, its own tokens) while the others' arrive.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial, attend, merge
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.delegation import (
    DelegatingKeys,
    LoadBalancer,
    make_balancer,
)
from prefill_service.parallel.kv_buffers import KVBuffers, ResidentKV
from prefill_service.parallel.process_group import PendingPart, SPGroup
from prefill_service.parallel.token_layout import Range, Share, chunk_range
from prefill_service.parallel.unit_attention import UnitAttention


class GatherExchange(Exchange):
    """Replicated K/V of one prompt and the attention over it.

    One buffer per layer, ``[tokens, 2, kv_heads, head_dim]``: a rank's run of tokens is one
    contiguous slice, K and V fused, so it is sent from and received into its final place.

    Where the layers are not all on the device, one is let go as soon as the next one's rows are on
    their way, and must be complete by then; otherwise slices that nobody here needs yet may take
    until the next chunk.

    Args:
        group: the ranks.
        shape: of the model's attention.
        buffers: of all layers; closed by ``finish``. Without them, all are on the device.
        balancer: evens out what ranks attend to; without it, none attends to another's blocks.
    """

    def __init__(
        self,
        group: SPGroup,
        shape: PromptShape,
        buffers: KVBuffers | None = None,
        balancer: LoadBalancer | None = None,
    ) -> None:
        self._group = group
        self._scale = shape.scale
        self._buffers = buffers or ResidentKV(shape)
        self._balancer = balancer
        self._pending: list[list[PendingPart]] = [[] for _ in range(shape.attending_layers)]
        self._ranges: list[Range] = []
        self._chunk = (0, 0)

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        group = setup.mesh.world
        shape = setup.shape
        balancer = make_balancer(
            group, shape, setup.settings, setup.units, limits=setup.balance_limits
        )
        return cls(group, shape, setup.buffers, balancer)

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        if self._ranges:
            self._let_go(len(self._pending) - 1)
        self._ranges = [share.contiguous for share in chunk]
        self._chunk = chunk_range(chunk)
        self._buffers.start_chunk(*self._chunk)

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        kv = self._buffers.acquire(layer)
        self._wait(layer)  # what the chunk before left under way
        start, end = self._ranges[self._group.rank]
        kv[start:end, 0] = k
        kv[start:end, 1] = v
        self._pending[layer] = self._group.all_gather_v([kv[a:b] for a, b in self._ranges])
        if layer:
            self._let_go(layer - 1)

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        """``q`` may also be that of the first tokens of the share."""
        if not q.shape[1]:
            return q
        start, _ = self._ranges[self._group.rank]
        end = start + q.shape[1]
        chunk_start, _ = self._chunk
        partials = [self._partial(layer, q, (start, end), causal=True)]
        if chunk_start:
            partials.append(self._partial(layer, q, (0, chunk_start)))
        if start > chunk_start:
            self._wait(layer, before_rank=self._group.rank)
            partials.append(self._partial(layer, q, (chunk_start, start)))
        return merge(partials).out

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        adaptive = attention.adaptive
        state = adaptive.layer_state(layer)
        (start, border), units = attention.split(*self._ranges[self._group.rank])
        parts: list[Tensor] = []
        clustered = state.clustered
        if border > start or not units:
            parts.append(self._attend_measured(layer, q[:, : border - start], start, attention))
        kv = self._complete(layer)
        delegating = self._delegating_keys(layer, kv, attention)
        for first, last in units:
            self._complete(layer, reorder_before=adaptive.recent_from(first))
            part = q[:, first - start : last - start]
            parts.append(adaptive.attend_unit(layer, part, kv, start=first, source=delegating))
        if delegating is not None:
            if not units:
                adaptive.advance_keys(layer, self._chunk[0], delegating)
            done = 0 if units else adaptive.stats.selected_pairs(layer)
            delegating.attend_for_others(done)
        self._note_reordered(layer, clustered, state.clustered)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @override
    def finish(self) -> None:
        for layer in range(len(self._pending)):
            self._wait(layer)
        self._buffers.close()

    def _attend_measured(
        self, layer: int, q: Tensor, start: int, attention: UnitAttention
    ) -> Tensor:
        """``attend_exact``, its time without waiting and its sampled rows noted."""
        comm_stats = self._group.comm_stats
        clock = Stopwatch(q.device)
        waited = comm_stats.seconds
        out = self.attend_exact(layer, q)
        clock.lap("attend")
        seconds = clock.seconds("attend") - (comm_stats.seconds - waited)
        attention.adaptive.stats.add_attend_seconds(layer, seconds)
        attention.adaptive.observe_exact(layer, q, self._complete(layer), start=start)
        return out

    def _delegating_keys(
        self, layer: int, kv: Tensor, attention: UnitAttention
    ) -> DelegatingKeys | None:
        """Keys whose blocks can be delegated, where some rank's queries of the chunk are sparse.

        ``None`` if evening out what ranks have to do would not be worth it.
        """
        adaptive = attention.adaptive
        balancer = self._balancer
        if balancer is None or not attention.split(*self._chunk)[1]:
            return None
        keys = DelegatingKeys(
            kv,
            adaptive.segments,
            balancer,
            common=adaptive.recent_from(self._chunk[0]),
            note_pairs=lambda pairs: adaptive.stats.add_delegated_pairs(layer, pairs),
        )
        if not keys.common:
            return None
        first = adaptive.stats.selected_pairs(0) if layer == 1 else None
        return keys if balancer.is_due(first) else None

    def _complete(self, layer: int, reorder_before: int = 0) -> Tensor:
        """The layer's buffer, complete up to this rank's last token of the chunk.

        Args:
            reorder_before: rows before this one may be reordered: nothing is received there any
                more, and what this rank has to send of them is gone.

        Returns:
            [tokens, 2, kv_heads, head_dim]; rows after this rank's share may still be arriving.
        """
        rank = self._group.rank
        # Own rows may be reordered only once the others have got them as they are.
        reorders_own = self._ranges[rank][0] < reorder_before
        self._wait(layer, before_rank=rank + 1 if reorders_own else rank)
        return self._buffers.layer(layer)

    def _note_reordered(self, layer: int, start: int, end: int) -> None:
        """Note that rows [start, end) of a layer's buffer were changed."""
        end = min(end, self._chunk[0])  # rows of this chunk are new anyway
        if end > start:
            self._buffers.touch(layer, start, end)

    def _partial(self, layer: int, q: Tensor, keys: Range, *, causal: bool = False) -> Partial:
        start, end = keys
        kv = self._buffers.layer(layer)[start:end]
        k, v = kv.permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        return attend(q, k, v, causal=causal, scale=self._scale)

    def _let_go(self, layer: int) -> None:
        if not self._buffers.resident:
            self._wait(layer)
            self._buffers.release(layer)

    def _wait(self, layer: int, before_rank: int | None = None) -> None:
        later = []
        for pending in self._pending[layer]:
            if before_rank is None or pending.source < before_rank:
                pending.wait()
            else:
                later.append(pending)
        self._pending[layer] = later
