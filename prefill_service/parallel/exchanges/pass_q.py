"""The ``pass_q`` exchange: K and V stay, queries go round and their results come back.

TokenRing (arXiv 2412.20501), and the pass-Q half of Meta's context parallelism (arXiv 2411.01783).
Worth it where a chunk's queries are few against the keys held: per rank, layer and chunk of n
tokens it receives ``q_heads (2 d + 1) e n (P-1)/P`` bytes, whatever lies before the chunk. (The
log-sum-exp has 4 bytes at least, also where e is 2.)
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial, merge
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.online_softmax import OnlineSoftmax
from prefill_service.parallel.process_group import SPGroup, Transfer
from prefill_service.parallel.token_layout import ChunkLayout, HeldTokens, Range, Share
from prefill_service.parallel.unit_attention import UnitAttention


class PassQExchange(Exchange):
    """K/V of this rank's tokens, and the attention of all ranks' queries over them.

    Args:
        group: the ranks.
        layout: of the whole prompt.
        shape: of the model's attention.
    """

    def __init__(self, group: SPGroup, layout: ChunkLayout, shape: PromptShape) -> None:
        self._group = group
        self._heads = HeadSplit(shape.q_heads, shape.kv_heads, 1)
        self._held = HeldTokens(group.size)
        self._scale = shape.scale
        tokens = sum(share.num_tokens for share in layout.of_rank(group.rank))
        size = (tokens, *shape.row)
        self._kv = [
            torch.empty(size, dtype=shape.torch_dtype, device=shape.device)
            for _ in range(shape.attending_layers)
        ]
        # Of the chunk: the first row of K and V, and each rank's tokens.
        self._first_row = 0
        self._ranges: list[list[Range]] = []
        self._counts: list[int] = []

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup.mesh.world, setup.layout, setup.shape)

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        self._first_row = self._held.count(self._group.rank)
        self._ranges = [share.ranges for share in chunk]
        self._counts = [share.num_tokens for share in chunk]
        for member, ranges in enumerate(self._ranges):
            self._held.extend(member, ranges)

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        rows = slice(self._first_row, self._first_row + len(k))
        self._kv[layer][rows, 0] = k
        self._kv[layer][rows, 1] = v

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        rank = self._group.rank
        size = self._group.size
        kv = self._kv[layer][: self._held.count(rank)]
        partials: list[Partial] = []
        returning: list[Transfer] = []
        current = q.contiguous()
        for step in range(size):
            owner = (rank - step) % size
            transfer, coming = self._pass_on(current, owner, step)
            queries = OnlineSoftmax(
                current, self._ranges[owner], heads=self._heads, part=0, scale=self._scale
            )
            queries.attend_held(kv, 0, self._held, rank)
            if step:
                sent, partial = self._give_back(queries.result(), q, step)
                returning += sent
                partials.append(partial)
            else:
                queries.attend_own(kv, self._held, rank)
                partials.append(queries.result())
            if transfer is not None:
                transfer.wait()
            current = coming
        for back in returning:
            back.wait()
        return merge(partials).out

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        attention.count_exact(layer, self._ranges[self._group.rank])
        return self.attend_exact(layer, q)

    @override
    def finish(self) -> None:
        pass  # every transfer is waited for in the layer that started it

    def _pass_on(self, current: Tensor, owner: int, step: int) -> tuple[Transfer | None, Tensor]:
        """Send the queries at hand to the next rank, receive those of the rank before."""
        rank = self._group.rank
        size = self._group.size
        if step == size - 1:
            return None, current
        q_heads, _, head_dim = current.shape
        coming = current.new_empty((q_heads, self._counts[(owner - 1) % size], head_dim))
        transfer = self._group.send_recv(
            {(rank + 1) % size: current}, {(rank - 1) % size: coming}, "pass_q"
        )
        return transfer, coming

    def _give_back(self, found: Partial, q: Tensor, step: int) -> tuple[list[Transfer], Partial]:
        """Return a result to the queries' owner; receive that of this rank's own queries."""
        rank = self._group.rank
        size = self._group.size
        mine = Partial(q.new_empty(q.shape), found.lse.new_empty(q.shape[:2]))
        to = (rank - step) % size
        source = (rank + step) % size
        outs = self._group.send_recv({to: found.out}, {source: mine.out}, "give_back")
        sums = self._group.send_recv({to: found.lse}, {source: mine.lse}, "give_back")
        return [outs, sums], mine
