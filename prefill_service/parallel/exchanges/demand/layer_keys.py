"""The keys of one layer, of which every rank owns a part and fetches what it selects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.key_source import KeySource, LayerState
from prefill_service.attention.settings import Segments
from prefill_service.attention.sparse.hooks import SelectedBlocks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import SampledRows, Verification
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.demand.block_cache import BlockCache
from prefill_service.parallel.exchanges.demand.chunk_routes import ChunkRoutes
from prefill_service.parallel.exchanges.demand.owned_kv import OwnedKV
from prefill_service.parallel.exchanges.demand.owners import OwnerMap
from prefill_service.parallel.exchanges.demand.remote_verification import VerificationRequest
from prefill_service.parallel.exchanges.demand.request_server import RequestServer
from prefill_service.parallel.exchanges.demand.rpc import (
    CollectiveRpc,
    RequestHeader,
    RequestKind,
)
from prefill_service.parallel.exchanges.demand.summary_publisher import SummaryPublisher
from prefill_service.parallel.process_group import SPGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandSetup:
    """What all layers have in common.

    Attributes:
        group: the ranks.
        owners: of the prompt.
        shape: of the model's attention.
        segments: sizes of blocks and segments.
    """

    group: SPGroup
    owners: OwnerMap
    shape: PromptShape
    segments: Segments


class DemandLayerKeys(KeySource):
    """One layer's blocks as one rank owns, fetches and sees them.

    Args:
        setup: what all layers have in common.
        cache: of the blocks that this rank attends to.
        cached: ``cache`` is the layer's own, so that it is still valid in later chunks.
    """

    def __init__(self, setup: DemandSetup, cache: BlockCache, *, cached: bool) -> None:
        self._group = setup.group
        self._owners = setup.owners
        self._shape = setup.shape
        self._segments = setup.segments
        self._cache = cache
        self._cached = cached
        self._owned = OwnedKV(setup.owners, setup.group.rank, setup.shape, setup.segments)
        self._publisher = SummaryPublisher(setup.group, setup.owners, self._owned, setup.shape)
        self._server = RequestServer(self._owned, setup.shape, setup.segments.block_tokens)
        self._rpc = CollectiveRpc(setup.group, self._server)
        self._state: LayerState | None = None
        self._computed_until = 0

    @property
    def kv(self) -> Tensor:
        """[tokens, 2, kv_heads, head_dim]; what was not fetched is stale."""
        return self._cache.token_rows

    # ---- what every rank calls in every chunk ----------------------------------------------

    def store_share(self, kv: Tensor, routes: ChunkRoutes) -> None:
        """Take in this rank's share of a chunk, and what it owns of the others' shares.

        Args:
            kv: [tokens, 2, kv_heads, head_dim] of this rank's share.
            routes: of the chunk.
        """
        # The chunk before may have ended within a block, which now has more tokens.
        unchanged = routes.chunk_start // self._segments.block_tokens if self._cached else 0
        self._cache.invalidate(unchanged)
        self._cache.store_run(routes.start, kv)
        self._computed_until = routes.chunk_end
        self._server.block_ids = self._computed_blocks(self._group.rank)
        routes.send_to_owners(kv, self._owned)

    def publish_blocks(self, state: LayerState, oldest: int, newest: int) -> None:
        """Have owners cluster the segments that have become old; tell all ranks what is new.

        Every rank calls it after ``store_share``, once a query of the chunk may be sparse.

        Args:
            state: of the layer, updated.
            oldest, newest: of the chunk's first and last unit, the token from which on their
                queries keep all by place.
        """
        block = self._segments.block_tokens
        publisher = self._publisher
        self._state = state
        self._server.summaries = state.summaries
        clustered_until = publisher.clustered_blocks * block
        oldest = self._segment_start(oldest)
        newest = max(clustered_until, self._segment_start(newest))
        # Every query of this chunk sees all that was clustered for the chunk before.
        self._see_clustered(clustered_until)
        self._owned.cluster_segments(clustered_until, newest)
        first_raster = max(publisher.raster_blocks, oldest // block)
        raster = range(first_raster, self._computed_until // block)
        clustered = range(publisher.clustered_blocks, newest // block)
        publisher.publish(state.summaries, raster, clustered)
        self._owned.drop_prompt_order(oldest)
        self._see_clustered(oldest)

    def answer_until_done(self) -> None:
        """Answer the other ranks until none needs more of the layer."""
        self._rpc.answer_until_done()

    # ---- KeySource -------------------------------------------------------------------------

    @override
    def prepare_keys(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        # Most of it is done in ``publish_blocks``.
        self._see_clustered(self._segment_start(recent))
        first = tiles.local_start(0)
        if first < tiles.q_offset:  # the block in which the first query stands began before it
            kv_heads = self._shape.kv_heads
            wanted = torch.zeros(kv_heads, self._owners.num_blocks, dtype=torch.bool)
            wanted[:, first // self._segments.block_tokens] = True
            self.fetch_blocks(wanted, torch.arange(kv_heads))

    @override
    def fetch_blocks(self, wanted: Tensor, heads: Tensor) -> None:
        missing = self._cache.take_missing(wanted, heads)
        rank = self._group.rank
        own = self._computed_blocks(rank)
        clustered_until = self._clustered_until
        kv = self._owned.select_blocks(missing[:, own], clustered_until)
        self._cache.store_blocks(own, missing[:, own], kv)
        ids = {r: self._computed_blocks(r) for r in self._others()}
        missing_of = {r: missing[:, ids[r]] for r in ids}
        if not any(bool(part.any()) for part in missing_of.values()):
            return
        blocks = self._cache.blocks
        replies = {
            r: blocks.new_empty((int(part.sum()), *blocks.shape[1:3], self._shape.head_dim))
            for r, part in missing_of.items()
        }
        # What is missing is known on the host; NCCL takes requests from the device.
        requests = {r: part.to(self._shape.device, torch.uint8) for r, part in missing_of.items()}
        header = RequestHeader(kind=RequestKind.BLOCKS, clustered_until=clustered_until)
        self._rpc.exchange_requests(header, requests, replies)
        for r, part in missing_of.items():
            self._cache.store_blocks(ids[r], part, replies[r])

    @override
    def delegate_blocks(self, selected: SelectedBlocks) -> None:
        """Nothing is delegated: other ranks do not have the blocks."""

    @override
    def verify_rows(
        self, problem: SparseProblem, result: SparseResult, sampled: SampledRows
    ) -> Verification:
        # The sampled rows are attended to where the keys are.
        ranks = range(self._group.size)
        owned_blocks = [self._computed_blocks(rank) for rank in ranks]
        request = VerificationRequest(problem, result, sampled.rows, owned_blocks)
        rows = request.attention_request()
        attention = self._request_all(
            self._verification_header(RequestKind.ATTENTION, problem, sampled),
            dict.fromkeys(ranks, rows),
            {rank: request.attention_buffer() for rank in self._others()},
        )
        request.merge_attention(attention)
        kept = self._request_all(
            self._verification_header(RequestKind.KEPT_MASS, problem, sampled),
            {rank: request.kept_mass_request(rank) for rank in ranks},
            {rank: request.kept_mass_buffer() for rank in self._others()},
        )
        return request.measure(kept)

    # ---- steps -----------------------------------------------------------------------------

    @property
    def _clustered_until(self) -> int:
        """Tokens before this one are seen in clustered order by the queries at hand."""
        return self._state.clustered if self._state else 0

    def _see_clustered(self, until: int) -> None:
        """See segments before a token in clustered order; cached blocks of them are in another."""
        state = self._state
        assert state is not None, "clustered order is seen once it is published"
        if until <= state.clustered:
            return
        first = state.clustered // self._segments.block_tokens
        end = until // self._segments.block_tokens
        self._cache.invalidate(first, end)
        self._publisher.copy_clustered(state.summaries, first, end)
        state.clustered = until

    def _request_all(
        self, header: RequestHeader, requests: dict[int, Tensor], replies: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """Every rank's reply; this rank's own request is answered here.

        Args:
            header: of the requests.
            requests: per rank.
            replies: per other rank, filled with its reply.
        """
        rank = self._group.rank
        self._rpc.exchange_requests(header, {r: requests[r] for r in self._others()}, replies)
        return {**replies, rank: self._server.answer_request(rank, header, requests[rank])}

    def _verification_header(
        self, kind: RequestKind, problem: SparseProblem, sampled: SampledRows
    ) -> RequestHeader:
        return RequestHeader(
            kind=kind,
            heads=sum(1 << int(head) for head in problem.heads.tolist()),
            samples=len(sampled.rows),
            clustered_until=self._clustered_until,
        )

    def _segment_start(self, token: int) -> int:
        size = self._segments.segment_tokens
        return token // size * size

    def _computed_blocks(self, rank: int) -> np.ndarray:
        """Blocks that a rank owns and of which some token was computed."""
        return self._owners.block_ids(rank, self._computed_until)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank]
