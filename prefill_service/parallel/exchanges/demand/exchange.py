"""The ``demand`` exchange: only selected blocks travel.

Each rank keeps the K and V of its segments (``owners``). Summaries of all blocks, always float32 at
least, go to all ranks: 1/32 of K and V in float32. Each rank selects for its own query tiles
against all keys, and requests from their owners the selected blocks that it does not have yet.
Sampled rows are verified where the keys are: the rows travel, not the keys (the pass-Q primitive
of ``pass_q``). What is selected, and therefore what comes out, is what one rank with all keys
selects.

Ranks of a chunk see clustered order up to different places (``owned_kv``), each its own queries'.

Exact attention fetches all blocks.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import attend_causal
from prefill_service.attention.settings import Segments
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.demand.block_cache import BlockCache
from prefill_service.parallel.exchanges.demand.chunk_routes import ChunkRoutes
from prefill_service.parallel.exchanges.demand.layer_keys import DemandLayerKeys, DemandSetup
from prefill_service.parallel.exchanges.demand.owners import OwnerMap
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.token_layout import ChunkLayout, Share
from prefill_service.parallel.unit_attention import UnitAttention


class DemandExchange(Exchange):
    """Attention over keys that are fetched from their owners, layer by layer.

    Args:
        group: the ranks.
        layout: of the whole prompt.
        shape: of the model's attention.
        segments: sizes of blocks and segments.
        cached: keep what was fetched for later chunks, in a cache for every layer: each block comes
            once, twice if it was wanted before its segment was clustered. Otherwise one layer's
            cache serves all, and a block comes once per chunk that wants it.
    """

    def __init__(
        self,
        group: SPGroup,
        layout: ChunkLayout,
        shape: PromptShape,
        segments: Segments,
        *,
        cached: bool = True,
    ) -> None:
        self._group = group
        self._shape = shape
        self._block_tokens = segments.block_tokens
        self._owners = OwnerMap(layout, group.size, segments)
        caches = [
            BlockCache(self._owners.num_blocks, segments.block_tokens, shape)
            for _ in range(shape.attending_layers if cached else 1)
        ]
        setup = DemandSetup(group=group, owners=self._owners, shape=shape, segments=segments)
        self._layers = [
            DemandLayerKeys(setup, caches[layer % len(caches)], cached=cached)
            for layer in range(shape.attending_layers)
        ]

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup.mesh.world, setup.layout, setup.shape, setup.settings.segments)

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        self._routes = ChunkRoutes(chunk, self._owners, self._group)

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        kv = torch.stack([k, v], 1)  # [tokens, 2, kv_heads, head_dim]
        self._layers[layer].store_share(kv, self._routes)

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        """Every block before the queries is fetched."""
        keys = self._layers[layer]
        out = self._attend_first(keys, q)
        keys.answer_until_done()
        return out

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        adaptive = attention.adaptive
        keys = self._layers[layer]
        routes = self._routes
        (start, border), units = attention.split(routes.start, routes.end)
        _, of_chunk = attention.split(routes.chunk_start, routes.chunk_end)
        if of_chunk:  # some rank has sparse units: then summaries are due
            oldest = adaptive.recent_from(routes.chunk_start)
            newest = adaptive.recent_from(of_chunk[-1][0])
            keys.publish_blocks(adaptive.layer_state(layer), oldest, newest)
        parts = []
        if border > start or not units:
            part = q[:, : border - start]
            parts.append(self._attend_first(keys, part))
            adaptive.observe_exact(layer, part, keys.kv, start=start)
        for first, last in units:
            part = q[:, first - start : last - start]
            parts.append(adaptive.attend_unit(layer, part, keys.kv, start=first, source=keys))
        keys.answer_until_done()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @override
    def finish(self) -> None:
        pass  # every transfer is waited for in the layer that started it

    def _attend_first(self, keys: DemandLayerKeys, q: Tensor) -> Tensor:
        """Exact attention of the share's first tokens."""
        start = self._routes.start
        end = start + q.shape[1]
        if end == start:
            return q
        blocks = -(-start // self._block_tokens)
        wanted = torch.ones(self._shape.kv_heads, blocks, dtype=torch.bool)
        keys.fetch_blocks(wanted, torch.arange(self._shape.kv_heads))
        k, v = keys.kv[:end].permute(1, 2, 0, 3)
        return attend_causal(q, k, v, q_offset=start, scale=self._shape.scale).out
