"""The ``demand`` exchange: only selected blocks travel.

Each rank keeps the K and V of its segments (``homes``). Summaries of all blocks, always float32 at
least, go to all ranks: 1/32 of K and V in float32. Each rank selects for its own query tiles
against all keys, and asks the homes for the union of the selected blocks that it does not have yet.
Sampled rows are certified where the keys are: the rows travel, not the keys (the pass-Q primitive
of ``pass_q``). What is selected, and therefore what comes out, is what one rank with all keys
selects.

Ranks of a chunk see clustered order up to different places (``home_keys``), each its own queries'.

Exact attention fetches all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.attention_shape import AttentionShape
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.key_source import KeySource, LayerState
from prefill_service.attention.settings import Segments
from prefill_service.attention.sparse.hooks import SelectedBlocks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import SampledRows, Verification
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.demand.owned_kv import OwnedKV
from prefill_service.parallel.exchanges.demand.owners import OwnerMap
from prefill_service.parallel.exchanges.demand.remote_verification import (
    VerificationRequest,
    VerificationServer,
)
from prefill_service.parallel.exchanges.demand.rpc import Ask, CollectiveRpc, Header
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.token_layout import ChunkLayout, Share, span
from prefill_service.parallel.unit_attention import UnitAttention


@dataclass(slots=True)
class _Told:
    """What all ranks were told of a layer's blocks.

    Attributes:
        complete: blocks before this one are complete, and told in prompt order.
        clustered: tokens before this one are told in clustered order.
        ids, summaries: of the blocks told in clustered order in this chunk.
    """

    complete: int = 0
    clustered: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    summaries: BlockSummaries | None = None


class DemandExchange(Exchange, KeySource):
    """K/V of this rank's segments, and room for what it attends to.

    Also the ``KeySource`` of sparse attention; ``kv`` is its buffer.

    Args:
        group: the ranks.
        layout: of the whole prompt.
        shape: of the model's attention.
        segments: sizes of blocks and segments.
        cached: keep what was fetched for later chunks, in room for every layer: each block comes
            once, twice if it was wanted before its segment was clustered. Otherwise one layer's
            room serves all, and a block comes once per chunk that wants it.
    """

    def __init__(
        self,
        group: SPGroup,
        layout: ChunkLayout,
        shape: AttentionShape,
        segments: Segments,
        cached: bool = True,
    ) -> None:
        self._group, self._shape, self._sizes = group, shape, segments
        self._homes = OwnerMap(layout, group.size, segments.block_tokens, segments.segment_tokens)
        self._own = OwnedKV(self._homes, group.rank, shape, segments)
        block = (segments.block_tokens, 2, shape.kv_heads, shape.head_dim)
        self._cached, self._layer = cached, 0
        rooms = shape.num_layers if cached else 1
        self._rooms = [self._zeros(self._homes.blocks, *block) for _ in range(rooms)]
        self._present = torch.zeros(rooms, shape.kv_heads, self._homes.blocks, dtype=torch.bool)
        self._rounds = CollectiveRpc(group, self._request_room, self._answer)
        self._witnesses = VerificationServer(shape)
        self._states: dict[int, LayerState] = {}
        self._told = [_Told() for _ in range(shape.num_layers)]

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup.mesh.world, setup.layout, setup.shape, setup.settings.segments)

    @property
    def _room(self) -> Tensor:
        """[blocks, block_tokens, 2, kv_heads, head_dim] of the layer at hand."""
        return self._rooms[self._layer if self._cached else 0]

    @property
    def _here(self) -> Tensor:
        """[kv_heads, blocks] bool, what of it is valid."""
        return self._present[self._layer if self._cached else 0]

    @property
    def kv(self) -> Tensor:
        """[tokens, 2, kv_heads, head_dim] of the layer at hand; what was not fetched is stale."""
        rows: Tensor = self._room.flatten(0, 1)
        return rows[: self._shape.num_tokens]

    # ---- Exchange --------------------------------------------------------------------------

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        self._ranges = [share.contiguous for share in chunk]
        self._chunk_start, self._chunk_end = span(chunk)
        tokens = [np.arange(start, end) for start, end in self._ranges]
        homes = [self._homes.home_of(of_rank) for of_rank in tokens]
        rank = self._group.rank
        self._leaving = [torch.from_numpy(np.flatnonzero(homes[rank] == r)) for r in self._others()]
        self._arriving = [
            torch.from_numpy(self._homes.rows(tokens[r][homes[r] == rank])) for r in self._others()
        ]
        stays = homes[rank] == rank
        self._staying = torch.from_numpy(np.flatnonzero(stays))
        self._place = torch.from_numpy(self._homes.rows(tokens[rank][stays]))

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._layer = layer
        start, end = self._ranges[self._group.rank]
        kv = torch.stack([k, v], 1)  # [tokens, 2, kv_heads, head_dim]
        self.kv[start:end] = kv
        block = self._sizes.block_tokens
        # The chunk before may have ended within a block, which now has more tokens.
        kept = self._chunk_start // block if self._cached else 0
        self._here[:, kept:] = False
        self._here[:, -(-start // block) : end // block] = True
        self._own.put(layer, self._place, kv[self._staying])
        coming = [kv.new_empty((len(rows), *kv.shape[1:])) for rows in self._arriving]
        self._group.send_recv(
            {r: kv[rows] for r, rows in zip(self._others(), self._leaving, strict=True)},
            dict(zip(self._others(), coming, strict=True)),
            "homes",
        ).wait()
        for rows, part in zip(self._arriving, coming, strict=True):
            self._own.put(layer, rows, part)

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        """Every block before the queries is fetched."""
        out = self._attend_first(layer, q)
        self.close()
        return out

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        adaptive = attention.adaptive
        (start, border), units = attention.split(*self._ranges[self._group.rank])
        _, of_chunk = attention.split(self._chunk_start, self._chunk_end)
        if of_chunk:  # some rank has sparse units: then summaries are due
            oldest, newest = (
                adaptive.recent_from(at) for at in (self._chunk_start, of_chunk[-1][0])
            )
            self._advance(layer, adaptive.layer_state(layer), oldest, newest)
        parts = []
        if border > start or not units:
            part = q[:, : border - start]
            parts.append(self._attend_first(layer, part))
            adaptive.observe_exact(layer, part, self.kv, start=start)
        for first, last in units:
            part = q[:, first - start : last - start]
            parts.append(adaptive.attend_unit(layer, part, self.kv, start=first, source=self))
        self.close()
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @override
    def finish(self) -> None:
        pass  # every transfer is waited for in the layer that started it

    # ---- KeySource -------------------------------------------------------------------------

    @override
    def prepare_keys(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        # Most of it is done in ``_advance``.
        self._see(layer, recent // self._sizes.segment_tokens * self._sizes.segment_tokens)
        first = tiles.local_start(0)
        if first < tiles.q_offset:  # the block in which the first query stands began before it
            wanted = torch.zeros(self._shape.kv_heads, self._homes.blocks, dtype=torch.bool)
            wanted[:, first // self._sizes.block_tokens] = True
            self.fetch_blocks(wanted, torch.arange(self._shape.kv_heads))

    @override
    def fetch_blocks(self, wanted: Tensor, heads: Tensor) -> None:
        # Blocks that are here are not asked for again.
        need = torch.zeros_like(self._here)
        need[heads.cpu(), : wanted.shape[1]] = wanted.cpu()
        need &= ~self._here
        self._here.logical_or_(need)
        own = self._known(self._group.rank)
        clustered = self._seen()
        mine = self._own.blocks(self._layer, need[:, own], clustered)
        self._put(self._group.rank, need[:, own], mine)
        requests = {r: need[:, self._known(r)] for r in self._others()}
        if not any(bool(part.any()) for part in requests.values()):
            return
        replies = {
            r: self._room.new_empty((int(part.sum()), *self._room.shape[1:3], self._shape.head_dim))
            for r, part in requests.items()
        }
        # What is here is known on the host; NCCL takes requests from the device.
        wanted_of = {r: part.to(self._shape.device, torch.uint8) for r, part in requests.items()}
        self._rounds.ask(Header(Ask.BLOCKS, clustered=clustered), wanted_of, replies)
        for r, part in requests.items():
            self._put(r, part, replies[r])

    @override
    def delegate_blocks(self, selected: SelectedBlocks) -> None:
        """Nothing is delegated: other ranks do not have the blocks."""

    @override
    def verify_rows(
        self, problem: SparseProblem, result: SparseResult, sampled: SampledRows
    ) -> Verification:
        # The sampled rows are attended to where the keys are.
        known = [self._known(r) for r in range(self._group.size)]
        witness = VerificationRequest(problem, result, sampled.rows, known)
        mask = sum(1 << int(head) for head in problem.heads.tolist())
        rank, samples = self._group.rank, len(sampled.rows)
        rows = witness.rows()
        replies = {r: witness.attention_room() for r in self._others()}
        header = Header(Ask.ATTENTION, mask, samples, self._seen())
        self._rounds.ask(header, dict.fromkeys(self._others(), rows), replies)
        replies[rank] = self._attention(rank, header, rows)
        witness.merge(replies)
        requests = [witness.beliefs(r) for r in range(self._group.size)]
        kept = {r: witness.kept_room() for r in self._others()}
        header = Header(Ask.KEPT_MASS, mask, samples, self._seen())
        self._rounds.ask(header, {r: requests[r] for r in self._others()}, kept)
        kept[rank] = self._kept_mass(rank, header, requests[rank])
        return witness.certificate(kept)

    def close(self) -> None:
        """Answer the other ranks until none needs more of the layer."""
        self._rounds.close()

    # ---- steps -----------------------------------------------------------------------------

    def _advance(self, layer: int, state: LayerState, oldest: int, newest: int) -> None:
        """Cluster the segments that have become old, at their homes; tell all what is new.

        Every rank calls it after ``store``, once a query of the chunk may be sparse.

        Args:
            oldest, newest: of the chunk's first and last unit, the token from which on their
                queries keep all by place.
        """
        size, block, told = self._sizes.segment_tokens, self._sizes.block_tokens, self._told[layer]
        oldest, newest = oldest // size * size, max(told.clustered, newest // size * size)
        self._states[layer] = state
        self._see(layer, told.clustered)  # what the chunk before was told, all of it now
        self._own.cluster(layer, told.clustered, newest)
        complete = self._chunk_end // block
        raster = range(max(told.complete, oldest // block), complete)
        ordered = range(told.clustered // block, newest // block)
        told.complete, told.clustered = complete, newest
        self._tell(layer, state, raster, ordered)
        self._own.settle(layer, oldest)
        self._see(layer, oldest)

    def _attend_first(self, layer: int, q: Tensor) -> Tensor:
        """Exact attention of the share's first tokens; the layer then ends with ``close``."""
        start, out = self._ranges[self._group.rank][0], q
        end = start + q.shape[1]
        if end > start:
            blocks = -(-start // self._sizes.block_tokens)
            wanted = torch.ones(self._shape.kv_heads, blocks, dtype=torch.bool)
            self.fetch_blocks(wanted, torch.arange(self._shape.kv_heads))
            k, v = self.kv[:end].permute(1, 2, 0, 3)
            out = attend_causal(q, k, v, q_offset=start, scale=self._shape.scale).out
        return out

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=self._shape.dtype, device=self._shape.device)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank]

    def _known(self, rank: int) -> np.ndarray:
        """Blocks at home on a rank, of which some token was computed."""
        return self._homes.ids(rank, self._chunk_end)

    def _seen(self) -> int:
        """Tokens before this one are seen in clustered order by the queries at hand."""
        state = self._states.get(self._layer)
        return state.clustered if state else 0

    def _see(self, layer: int, clustered: int) -> None:
        """See more segments in clustered order. What is here of them is in another one."""
        state, told, block = self._states[layer], self._told[layer], self._sizes.block_tokens
        if clustered <= state.clustered:
            return
        first, last = state.clustered // block, clustered // block
        self._here[:, first:last] = False
        new = torch.from_numpy((told.ids >= first) & (told.ids < last))
        assert told.summaries is not None, "segments are seen in clustered order once that is told"
        state.summaries.scatter(torch.from_numpy(told.ids)[new], told.summaries.of_blocks(new))
        state.clustered = clustered

    def _tell(self, layer: int, state: LayerState, raster: range, ordered: range) -> None:
        """Summaries of every home's blocks that are new in one order or the other, to all."""
        ranks, shape = range(self._group.size), self._shape
        of_raster, of_ordered = (
            [ids[(ids >= span.start) & (ids < span.stop)] for ids in map(self._homes.ids, ranks)]
            for span in (raster, ordered)
        )
        counts = [len(a) + len(b) for a, b in zip(of_raster, of_ordered, strict=True)]
        work, rank = state.summaries.k_mean.dtype, self._group.rank
        sizes = [(shape.kv_heads, count, 4 * shape.head_dim + 1) for count in counts]
        packed = [torch.empty(size, dtype=work, device=shape.device) for size in sizes]
        if counts[rank]:
            packed[rank].copy_(self._own.summaries(layer, of_raster[rank], of_ordered[rank]))
        for pending in self._group.all_gather_v(packed):
            pending.wait()
        both = torch.cat(packed, 1)
        in_order = torch.cat([
            torch.arange(count) >= len(ids)
            for count, ids in zip(counts, of_raster, strict=True)
        ])  # fmt: skip
        ids = torch.from_numpy(np.concatenate(of_raster))
        state.summaries.scatter(ids, BlockSummaries.unpack(both[:, ~in_order]))
        told = self._told[layer]
        told.ids = np.concatenate(of_ordered)
        told.summaries = BlockSummaries.unpack(both[:, in_order])

    def _put(self, rank: int, wanted: Tensor, blocks: Tensor) -> None:
        heads, slots = wanted.nonzero(as_tuple=True)
        ids = torch.from_numpy(self._known(rank))[slots]
        self._room[ids, :, :, heads] = blocks

    # ---- answers ---------------------------------------------------------------------------

    def _request_room(self, header: Header) -> Tensor:
        blocks = len(self._known(self._group.rank))
        if header.ask is Ask.BLOCKS:
            heads = self._shape.kv_heads
            return torch.empty((heads, blocks), dtype=torch.uint8, device=self._shape.device)
        size = self._witnesses.request_size(header, blocks)
        work = torch.float64 if self._shape.dtype == torch.float64 else torch.float32
        return torch.empty(size, dtype=work, device=self._shape.device)

    def _answer(self, rank: int, header: Header, request: Tensor) -> Tensor:
        if header.ask is Ask.BLOCKS:
            wanted = request.cpu().bool()
            return self._own.blocks(self._layer, wanted, header.clustered).contiguous()
        if header.ask is Ask.ATTENTION:
            return self._attention(rank, header, request)
        return self._kept_mass(rank, header, request)

    def _attention(self, rank: int, header: Header, request: Tensor) -> Tensor:
        ids = self._known(self._group.rank)
        kv = self._own.rows(self._layer, len(ids))
        tokens = ids[:, None] * self._sizes.block_tokens + np.arange(self._sizes.block_tokens)
        position = torch.from_numpy(tokens.ravel()).to(kv.device)
        return self._witnesses.attention(rank, header, request, kv, position)

    def _kept_mass(self, rank: int, header: Header, request: Tensor) -> Tensor:
        ids = torch.from_numpy(self._known(self._group.rank))
        summaries = self._states[self._layer].summaries
        known = summaries.of_blocks(ids[ids < summaries.blocks]).k_mean
        # The prompt's last block may be short of tokens: it has no summary, and needs none.
        k_mean = torch.nn.functional.pad(known, (0, 0, 0, len(ids) - known.shape[1]))
        k_mean, orders = self._own.as_seen(self._layer, k_mean, header.clustered)
        return self._witnesses.kept_mass(rank, header, request, k_mean, orders)
