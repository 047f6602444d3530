"""Token-adaptive attention of one prefill on one rank: exact while short, then sparse, measured.

Keys and values live in one buffer per layer. Once a segment lies before all that a query keeps by
place, its rows are put in clustered order, in place; dense attention may go on using it, since it
needs no mask there. Each sparse attention is verified on sampled rows, and KV heads that miss
the floor are computed again with a smaller epsilon, then densely.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.fallback import FallbackAttention
from prefill_service.attention.key_source import (
    KeySource,
    LayerState,
    ReplicatedKeys,
    all_heads,
)
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.settings import Segments, SparseSettings
from prefill_service.attention.sparse.backends import make_backend
from prefill_service.attention.sparse.problem import SparseProblem
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.selection import forced_blocks, previous_patch
from prefill_service.attention.sparse.summaries import empty_summaries
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stats import AttentionStats
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention.verification import SampledRows, choose_rows
from prefill_service.attention_shape import PromptShape


class AdaptiveAttention:
    """Attention for all layers of one prefill.

    Args:
        settings: sizes.
        policy: the request's epsilon and floor, and how heads share the epsilon.
        shape: of the model's attention and of the prompt.
        patch_ends: [patches] one past each temporal patch's last token.
        heads: KV heads that are attended to here, where others have the rest.

    Attributes:
        stats: what was measured.

    Raises:
        ValueError: the policy's budgets are those of other layers or heads.
    """

    def __init__(
        self,
        settings: SparseSettings,
        policy: AttentionPolicy,
        shape: PromptShape,
        patch_ends: np.ndarray,
        *,
        heads: slice | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._patch_ends = patch_ends
        self._shape = shape
        heads = slice(0, shape.kv_heads) if heads is None else heads
        epsilons = policy.head_epsilons(shape.attending_layers, shape.kv_heads)
        self._epsilons = [torch.tensor(layer[heads], device=shape.device) for layer in epsilons]
        self._row_limits = [
            torch.tensor([policy.row_limit(value) for value in layer[heads]], device=shape.device)
            for layer in epsilons
        ]
        self.stats = AttentionStats(settings, shape, patch_ends, heads=heads)
        self._backend = make_backend(shape.device)
        self._scratch = ScratchBuffers()
        self._states = self._unclustered(heads.stop - heads.start)

    @property
    def segments(self) -> Segments:
        """How past keys are cut."""
        return self._settings.segments

    def advance_keys(self, layer: int, start: int, source: KeySource) -> None:
        """Bring this rank's view of the keys to where queries from ``start`` on want it."""
        tiles = self._settings.tiles(start, 1)
        source.prepare_keys(layer, self._states[layer], self.recent_from(start), tiles)

    def is_sparse(self, start: int, queries: int) -> bool:
        """Whether queries [start, start + queries) are to go through ``attend_unit``."""
        return queries > 0 and self._sparse_at(start + queries)

    def layer_state(self, layer: int) -> LayerState:
        """How far a layer's keys are clustered, and their summaries."""
        return self._states[layer]

    def recent_from(self, start: int) -> int:
        """Token from which on queries from ``start`` on keep all by place: the patch before."""
        return int(previous_patch(self._patch_ends, start))

    def attend_unit(
        self, layer: int, q: Tensor, kv: Tensor, *, start: int, source: KeySource | None = None
    ) -> Tensor:
        """Sparse causal attention of queries [start, start + queries), a unit.

        What is selected depends on the unit and on the keys, not on what else this rank computes.

        Args:
            layer: which.
            q: [q_heads, queries, head_dim].
            kv: [tokens, 2, kv_heads, head_dim], complete up to the last query; rows before
                ``recent_from(start)`` may be reordered, and no later call may have a query there.
            start: position of the first query.
            source: brings into ``kv`` what is not there; without it all is.

        Returns:
            [q_heads, queries, head_dim].
        """
        source = source or ReplicatedKeys(kv, self._settings.segments, self._scratch)
        tiles = self._settings.tiles(start, q.shape[1])
        state = self._states[layer]
        clock = Stopwatch(kv.device)
        # What is kept by place stays in place: the sinks, and the patch before this unit.
        source.prepare_keys(layer, state, self.recent_from(start), tiles)
        clock.lap("cluster")
        rows, recheck = choose_rows(self._settings, tiles, layer)
        position = start + rows.to(kv.device)
        attention = FallbackAttention(
            backend=self._backend,
            source=source,
            sampled=SampledRows(rows, self.stats.patch_weights(position, tiles.keys)),
            recheck=recheck,
            min_kept_mass=self._policy.min_kept_mass,
        )
        used = attention.attend_verified(self._problem(layer, q, kv, tiles))
        self.stats.record_sparse(layer, tiles, used, position=position, order=state.order)
        clock.lap("sparse")
        self.stats.record_seconds(layer, used, clock)
        return used.out

    def observe_exact(self, layer: int, q: Tensor, kv: Tensor, *, start: int) -> None:
        """Note queries that were attended to exactly elsewhere; see ``attend_unit``."""
        self.stats.observe_exact(layer, q, kv, start=start, order=self._states[layer].order)

    def _problem(self, layer: int, q: Tensor, kv: Tensor, tiles: Tiles) -> SparseProblem:
        """The attention of queries to be computed; arguments as in ``attend_unit``."""
        k, v = kv[: tiles.keys].permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        return SparseProblem(
            q=q,
            k=k,
            v=v,
            heads=all_heads(k),
            summaries=self._states[layer].summaries,
            tiles=tiles,
            epsilon=self._epsilons[layer],
            row_limit=self._row_limits[layer],
            forced=self._forced(tiles),
            scale=self._shape.scale,
        )

    def _unclustered(self, heads: int) -> list[LayerState]:
        """States of all layers before any key is known, of ``heads`` KV heads."""
        tokens = self._shape.num_tokens
        blocks = tokens // self._settings.block_tokens if self._sparse_at(tokens) else 0
        raster = torch.arange(tokens, device=self._shape.device).expand(heads, -1)
        shape = (heads, blocks, self._shape.head_dim)
        return [
            LayerState(empty_summaries(shape, self._shape.torch_dtype, self._shape.device), raster)
            for _ in range(self._shape.attending_layers)
        ]

    def _sparse_at(self, keys: int) -> bool:
        return not self._policy.exact and keys >= self._settings.from_tokens

    def _forced(self, tiles: Tiles) -> Tensor:
        """[tiles, blocks] bool, blocks that are kept by place."""
        first = [tiles.q_offset + t * tiles.tile_tokens for t in range(tiles.count)]
        recent = previous_patch(self._patch_ends, first)
        return forced_blocks(tiles, self._settings.sink_blocks, recent.tolist())
