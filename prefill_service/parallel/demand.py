"""The ``demand`` exchange: only selected blocks travel.

Each rank keeps the K and V of its segments (``homes``). Summaries of all blocks go to all ranks,
1/32 of K and V; each rank selects for its own query tiles against all keys, and asks the homes for
the union of the selected blocks that it does not have yet. Sampled rows are certified where the
keys are: the rows travel, not the keys (the pass-Q primitive of ``pass_q``). What is selected, and
therefore what comes out, is what one rank with all keys selects.

Exact attention fetches all blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.block_sparse import GatherBuffers
from prefill_service.attention.certificate import Certificate
from prefill_service.attention.clustering import order_segments
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.keys import LayerState, Measurement, Segments
from prefill_service.attention.sparse import SparseResult
from prefill_service.attention.summaries import BlockSummaries, summarize
from prefill_service.attention.tiles import Tiles
from prefill_service.parallel.exchange import AttentionShape
from prefill_service.parallel.group import SPGroup
from prefill_service.parallel.homes import HomeMap
from prefill_service.parallel.layout import ChunkLayout, Share
from prefill_service.parallel.rounds import Ask, Header, Rounds
from prefill_service.parallel.witnesses import Witness, Witnesses


class DemandExchange:
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
        self._homes = HomeMap(layout, group.size, segments.block_tokens, segments.segment_tokens)
        block = (segments.block_tokens, 2, shape.kv_heads, shape.head_dim)
        mine = len(self._homes.ids(group.rank))
        # Zeros, because the last block may never be full.
        self._own = [self._zeros(mine, *block) for _ in range(shape.num_layers)]
        self._cached, self._layer = cached, 0
        rooms = shape.num_layers if cached else 1
        self._rooms = [self._zeros(self._homes.blocks, *block) for _ in range(rooms)]
        self._present = torch.zeros(rooms, shape.kv_heads, self._homes.blocks, dtype=torch.bool)
        self._rounds = Rounds(group, self._request_room, self._answer)
        self._witnesses = Witnesses(shape)
        self._states: dict[int, LayerState] = {}

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

    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        """See ``Exchange``; shares are contiguous."""
        self._ranges = [share.contiguous for share in chunk]
        self._chunk_start = self._ranges[0][0]
        self._chunk_end = max(end for _, end in self._ranges)
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

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See ``Exchange``: keep what is at home here, send the rest to its home."""
        self._layer = layer
        start, end = self._ranges[self._group.rank]
        kv = torch.stack([k, v], 1)  # [tokens, 2, kv_heads, head_dim]
        self.kv[start:end] = kv
        block = self._sizes.block_tokens
        # The chunk before may have ended within a block, which now has more tokens.
        kept = self._chunk_start // block if self._cached else 0
        self._here[:, kept:] = False
        self._here[:, -(-start // block) : end // block] = True
        own = self._own[layer].flatten(0, 1)
        own[self._place] = kv[self._staying]
        coming = [kv.new_empty((len(rows), *kv.shape[1:])) for rows in self._arriving]
        self._group.send_recv(
            {r: kv[rows] for r, rows in zip(self._others(), self._leaving, strict=True)},
            dict(zip(self._others(), coming, strict=True)),
            "homes",
        ).wait()
        for rows, part in zip(self._arriving, coming, strict=True):
            own[rows] = part

    def advance(self, layer: int, state: LayerState, recent: int) -> None:
        """Cluster the segments that have become old, at their homes; tell all what is new.

        Every rank calls it after ``store``, once a query of the chunk may be sparse.

        Args:
            recent: tokens from here on are kept by place.
        """
        self._states[layer] = state
        sizes, block = self._sizes, self._sizes.block_tokens
        first, end = state.clustered, recent // sizes.segment_tokens * sizes.segment_tokens
        for start in range(first, end, sizes.segment_tokens):
            if self._homes.segment_home[start // sizes.segment_tokens] == self._group.rank:
                self._cluster(layer, start)
        self._here[:, first // block : end // block] = False  # what is here is in another order
        state.clustered = max(first, end)
        fresh = [
            ids[(ids >= first // block) & (ids < self._chunk_end // block)]
            for ids in (self._homes.ids(rank) for rank in range(self._group.size))
        ]
        self._tell(layer, state, fresh)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See ``Exchange``; every block before the queries is fetched."""
        start, end = self._ranges[self._group.rank]
        out = q
        if end > start:
            blocks = -(-start // self._sizes.block_tokens)
            wanted = torch.ones(self._shape.kv_heads, blocks, dtype=torch.bool)
            self.fetch(wanted, torch.arange(self._shape.kv_heads))
            k, v = self.kv[:end].permute(1, 2, 0, 3)
            out = attend_causal(q, k, v, start, self._shape.scale).out
        self.close()
        return out

    def finish(self) -> None:
        """See ``Exchange``; nothing outlives a call here."""

    # ---- KeySource -------------------------------------------------------------------------

    def prepare(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        """See ``KeySource``; the rest was done in ``advance``."""
        first = tiles.local_start(0)
        if first < tiles.q_offset:  # the block in which the first query stands began before it
            wanted = torch.zeros(self._shape.kv_heads, self._homes.blocks, dtype=torch.bool)
            wanted[:, first // self._sizes.block_tokens] = True
            self.fetch(wanted, torch.arange(self._shape.kv_heads))

    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        """See ``KeySource``. Blocks that are here are not asked for again."""
        need = torch.zeros_like(self._here)
        need[heads.cpu(), : wanted.shape[1]] = wanted.cpu()
        need &= ~self._here
        self._here.logical_or_(need)
        own = self._known(self._group.rank)
        self._put(self._group.rank, need[:, own], self._blocks_of(self._layer, need[:, own]))
        requests = {r: need[:, self._known(r)] for r in self._others()}
        if not any(bool(part.any()) for part in requests.values()):
            return
        replies = {
            r: self._room.new_empty((int(part.sum()), *self._room.shape[1:3], self._shape.head_dim))
            for r, part in requests.items()
        }
        # What is here is known on the host; NCCL takes requests from the device.
        wanted_of = {r: part.to(self._shape.device, torch.uint8) for r, part in requests.items()}
        self._rounds.ask(Header(Ask.BLOCKS), wanted_of, replies)
        for r, part in requests.items():
            self._put(r, part, replies[r])

    def certify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: SparseResult,
        summaries: BlockSummaries,
        asked: Measurement,
        buffers: GatherBuffers,
    ) -> Certificate:
        """See ``KeySource``: the sampled rows are attended to where the keys are."""
        known = [self._known(r) for r in range(self._group.size)]
        witness = Witness(q, result, asked, known)
        mask = sum(1 << int(head) for head in asked.heads.tolist())
        rank, samples = self._group.rank, len(asked.sampled)
        rows = witness.rows()
        replies = {r: witness.attention_room() for r in self._others()}
        header = Header(Ask.ATTENTION, mask, samples)
        self._rounds.ask(header, dict.fromkeys(self._others(), rows), replies)
        replies[rank] = self._attention(rank, header, rows)
        witness.merge(replies)
        requests = [witness.beliefs(r) for r in range(self._group.size)]
        kept = {r: witness.kept_room() for r in self._others()}
        header = Header(Ask.KEPT_MASS, mask, samples)
        self._rounds.ask(header, {r: requests[r] for r in self._others()}, kept)
        kept[rank] = self._kept_mass(rank, header, requests[rank])
        return witness.certificate(kept)

    def close(self) -> None:
        """See ``KeySource``."""
        self._rounds.close()

    # ---- steps -----------------------------------------------------------------------------

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=self._shape.dtype, device=self._shape.device)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._group.size) if rank != self._group.rank]

    def _known(self, rank: int) -> np.ndarray:
        """Blocks at home on a rank, of which some token was computed."""
        return self._homes.ids(rank, self._chunk_end)

    def _cluster(self, layer: int, start: int) -> None:
        sizes = self._sizes
        first = int(self._homes.rows(np.array([start]))[0]) // sizes.block_tokens
        blocks = slice(first, first + sizes.segment_tokens // sizes.block_tokens)
        segment = self._own[layer][blocks].flatten(0, 1)  # [segment, 2, kv_heads, head_dim], a view
        fixed = 0 if start else sizes.fixed_tokens
        order = order_segments(
            segment[:, 0].transpose(0, 1), sizes.block_tokens, sizes.segment_tokens, fixed
        )
        for head, rows in enumerate(order):
            segment[:, :, head] = segment[rows, :, head]

    def _tell(self, layer: int, state: LayerState, fresh: list[np.ndarray]) -> None:
        """Summaries of every home's fresh blocks, to all."""
        work, shape = state.summaries.k_mean.dtype, self._shape
        packed = [
            torch.empty(
                (4, shape.kv_heads, len(ids), shape.head_dim), dtype=work, device=shape.device
            )
            for ids in fresh
        ]
        mine = fresh[self._group.rank]
        if len(mine):
            rows = self._homes.rows(mine * self._sizes.block_tokens) // self._sizes.block_tokens
            blocks = self._own[layer][torch.from_numpy(rows)].flatten(0, 1)
            k, v = blocks.permute(1, 2, 0, 3)
            found = summarize(k, v, self._sizes.block_tokens)
            torch.stack(
                [found.k_mean, found.k_var, found.v_mean, found.k_far],
                out=packed[self._group.rank],
            )
        for pending in self._group.broadcast_slices(packed):
            pending.wait()
        for ids, part in zip(fresh, packed, strict=True):
            state.summaries.scatter(torch.from_numpy(ids), BlockSummaries(*part))

    def _blocks_of(self, layer: int, wanted: Tensor) -> Tensor:
        """[count, block_tokens, 2, head_dim] of the [kv_heads, own blocks] that are wanted."""
        heads, slots = wanted.nonzero(as_tuple=True)
        blocks: Tensor = self._own[layer][slots, :, :, heads]
        return blocks

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
            return self._blocks_of(self._layer, request.cpu().bool()).contiguous()
        if header.ask is Ask.ATTENTION:
            return self._attention(rank, header, request)
        return self._kept_mass(rank, header, request)

    def _attention(self, rank: int, header: Header, request: Tensor) -> Tensor:
        ids = self._known(self._group.rank)
        kv = self._own[self._layer][: len(ids)].flatten(0, 1)  # [keys, 2, kv_heads, head_dim]
        tokens = ids[:, None] * self._sizes.block_tokens + np.arange(self._sizes.block_tokens)
        position = torch.from_numpy(tokens.ravel()).to(kv.device)
        return self._witnesses.attention(rank, header, request, kv, position)

    def _kept_mass(self, rank: int, header: Header, request: Tensor) -> Tensor:
        ids = torch.from_numpy(self._known(self._group.rank))
        summaries = self._states[self._layer].summaries
        known = summaries.of(ids[ids < summaries.blocks]).k_mean
        # The prompt's last block may be short of tokens: it has no summary, and needs none.
        k_mean = torch.nn.functional.pad(known, (0, 0, 0, len(ids) - known.shape[1]))
        return self._witnesses.kept_mass(rank, header, request, k_mean)
