"""The ``gather`` exchange: each chunk's K and V travel once, to all ranks.

Every rank ends up with all keys and values (replicated KV), receiving
``2 * kv_heads * head_dim * bytes * tokens * (P-1)/P`` per layer, the minimum for exact
attention with replicated KV (LSS Transformer, arXiv 2311.02382; LASP-2H, arXiv 2502.07563).
A rank starts on the keys it has (past chunks, its own tokens) while the others' arrive.
"""

from __future__ import annotations

from torch import Tensor

from prefill_service.attention.dense import Partial, attend, merge
from prefill_service.parallel.exchanges.base import AttentionShape
from prefill_service.parallel.kv_buffers import KVBuffers, ResidentKV
from prefill_service.parallel.process_group import PendingSlice, SPGroup
from prefill_service.parallel.token_layout import Range, Share, span


class GatherExchange:
    """Replicated K/V of one prompt and the attention over it.

    One buffer per layer, ``[tokens, 2, kv_heads, head_dim]``: a rank's run of tokens is one
    contiguous slice, K and V fused, so it is sent from and received into its final place.

    Where the layers are not all on the device, one is let go as soon as the next one's rows are on
    their way, and must be complete by then; otherwise slices that nobody here needs yet may take
    until the next chunk.

    Args:
        group: the ranks.
        shape: of the model's attention.
        working: has the buffers; closed by ``finish``. Without it, all are on the device.
    """

    def __init__(
        self, group: SPGroup, shape: AttentionShape, working: KVBuffers | None = None
    ) -> None:
        self._group, self._scale = group, shape.scale
        self._working = working or ResidentKV(shape)
        self._pending: list[list[PendingSlice]] = [[] for _ in range(shape.num_layers)]
        self._ranges: list[Range] = []
        self._chunk_start = 0

    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        """See ``Exchange``; shares are one piece each, contiguous over the ranks."""
        if self._ranges:
            self._let_go(len(self._pending) - 1)
        self._ranges = [share.contiguous for share in chunk]
        self._chunk_start, end = span(chunk)
        self._working.start_chunk(self._chunk_start, end)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See ``Exchange``: put them in place and send them off."""
        kv = self._working.acquire(layer)
        self._wait(layer)  # what the chunk before left under way
        start, end = self._ranges[self._group.rank]
        kv[start:end, 0] = k
        kv[start:end, 1] = v
        self._pending[layer] = self._group.broadcast_slices([kv[a:b] for a, b in self._ranges])
        if layer:
            self._let_go(layer - 1)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See ``Exchange``; ``q`` may also be that of the first tokens of the share."""
        if not q.shape[1]:
            return q
        start, _ = self._ranges[self._group.rank]
        end = start + q.shape[1]
        chunk_start = self._chunk_start
        partials = [self._partial(layer, q, start, end, causal=True)]
        if chunk_start:
            partials.append(self._partial(layer, q, 0, chunk_start))
        if start > chunk_start:
            self._wait(layer, before_rank=self._group.rank)
            partials.append(self._partial(layer, q, chunk_start, start))
        return merge(partials).out

    def complete(self, layer: int, reorder_before: int = 0) -> Tensor:
        """The layer's buffer, complete up to this rank's last token of the chunk.

        Args:
            reorder_before: rows before this one may be reordered: nothing is received there any
                more, and what this rank has to send of them is gone.

        Returns:
            [tokens, 2, kv_heads, head_dim]; rows after this rank's share may still be arriving.
        """
        rank = self._group.rank
        leaves = self._ranges[rank][0] < reorder_before
        self._wait(layer, before_rank=rank + leaves)
        return self._working.layer(layer)

    def reordered(self, layer: int, start: int, end: int) -> None:
        """Note that rows [start, end) of what ``complete`` gave were changed."""
        end = min(end, self._chunk_start)  # rows of this chunk are new anyway
        if end > start:
            self._working.touch(layer, start, end)

    def finish(self) -> None:
        """See ``Exchange``."""
        for layer in range(len(self._pending)):
            self._wait(layer)
        self._working.close()

    def _partial(
        self, layer: int, q: Tensor, start: int, end: int, causal: bool = False
    ) -> Partial:
        kv = self._working.layer(layer)[start:end]
        k, v = kv.permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        return attend(q, k, v, causal=causal, scale=self._scale)

    def _let_go(self, layer: int) -> None:
        if not self._working.resident:
            self._wait(layer)
            self._working.release(layer)

    def _wait(self, layer: int, before_rank: int | None = None) -> None:
        later = []
        for pending in self._pending[layer]:
            if before_rank is None or pending.source < before_rank:
                pending.wait()
            else:
                later.append(pending)
        self._pending[layer] = later
