"""An owner's answers to the requests of other ranks about its blocks of one layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention_shape import PromptShape, accumulation_dtype
from prefill_service.parallel.exchanges.demand.owned_kv import OwnedKV
from prefill_service.parallel.exchanges.demand.remote_verification import VerificationServer
from prefill_service.parallel.exchanges.demand.rpc import (
    RequestHandler,
    RequestHeader,
    RequestKind,
)


class RequestServer(RequestHandler):
    """Blocks, attention and kept mass for whoever requests them.

    Args:
        owned: this rank's blocks of the layer.
        shape: of the model's attention.
        block_tokens: tokens per block.

    Attributes:
        block_ids: this rank's blocks of which some token was computed.
        summaries: of all complete blocks, once some query may be sparse.
    """

    def __init__(self, owned: OwnedKV, shape: PromptShape, block_tokens: int) -> None:
        self._owned = owned
        self._shape = shape
        self._block_tokens = block_tokens
        self._verification = VerificationServer(shape)
        self.block_ids = np.empty(0, np.int64)
        self.summaries: BlockSummaries | None = None

    @override
    def request_buffer(self, header: RequestHeader) -> Tensor:
        blocks = len(self.block_ids)
        device = self._shape.device
        if header.kind is RequestKind.BLOCKS:
            return torch.empty((self._shape.kv_heads, blocks), dtype=torch.uint8, device=device)
        size = self._verification.request_size(header, blocks)
        work = accumulation_dtype(self._shape.torch_dtype)
        return torch.empty(size, dtype=work, device=device)

    @override
    def answer_request(self, rank: int, header: RequestHeader, request: Tensor) -> Tensor:
        if header.kind is RequestKind.BLOCKS:
            wanted = request.cpu().bool()
            return self._owned.select_blocks(wanted, header.clustered_until).contiguous()
        if header.kind is RequestKind.ATTENTION:
            return self._attend_rows(rank, header, request)
        return self._measure_kept_mass(rank, header, request)

    def _attend_rows(self, rank: int, header: RequestHeader, request: Tensor) -> Tensor:
        ids = self.block_ids
        kv = self._owned.stored_keys(len(ids))
        tokens = ids[:, None] * self._block_tokens + np.arange(self._block_tokens)
        position = torch.from_numpy(tokens.ravel()).to(kv.device)
        return self._verification.attend_rows(rank, header, request, kv=kv, position=position)

    def _measure_kept_mass(self, rank: int, header: RequestHeader, request: Tensor) -> Tensor:
        summaries = self.summaries
        assert summaries is not None, "what is verified is sparse"
        ids = torch.from_numpy(self.block_ids)
        complete = summaries.of_blocks(ids[ids < summaries.blocks]).k_mean
        # The prompt's last block may be short of tokens: it has no summary, and needs none.
        k_mean = pad(complete, (0, 0, 0, len(ids) - complete.shape[1]))
        orders = self._owned.apply_order(k_mean, header.clustered_until)
        return self._verification.measure_kept_mass(
            rank, header, request, k_mean=k_mean, orders=orders
        )
