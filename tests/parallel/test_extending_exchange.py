"""A toy exchange, one class and one catalogue entry in this file, passes what all others pass."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import attend_causal
from prefill_service.cost_model.model_shape import PRESETS
from prefill_service.cost_model.schemes import Scheme, schemes
from prefill_service.cost_model.traffic import memory_bytes, traffic
from prefill_service.parallel.chunking import deal_tokens
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.catalog import EXCHANGES, ExchangeKind
from prefill_service.parallel.exchanges.cost_terms import CostTerms, Traffic
from prefill_service.parallel.token_layout import Share
from prefill_service.parallel.unit_attention import UnitAttention
from tests.parallel.conformance import check_exchange


class SendToAll(Exchange):
    """Every rank sends its K and V to every other, and waits before it attends."""

    def __init__(self, setup: ExchangeSetup) -> None:
        shape = setup.shape
        self._group = setup.mesh.world
        self._scale = shape.scale
        size = (shape.num_layers, shape.num_tokens, 2, shape.kv_heads, shape.head_dim)
        self._kv = torch.empty(size, dtype=shape.dtype, device=shape.device)

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup)

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        self._ranges = [share.contiguous for share in chunk]

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        rows = [self._kv[layer, start:end] for start, end in self._ranges]
        mine = rows.pop(self._group.rank)
        mine[:, 0] = k
        mine[:, 1] = v
        others = [rank for rank in range(self._group.size) if rank != self._group.rank]
        receive = dict(zip(others, rows, strict=True))
        self._group.send_recv(dict.fromkeys(others, mine), receive, "send_to_all").wait()

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        start, end = self._ranges[self._group.rank]
        if start == end:
            return q
        k, v = self._kv[layer, :end].permute(1, 2, 0, 3)
        return attend_causal(q, k, v, q_offset=start, scale=self._scale).out

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        start, end = self._ranges[self._group.rank]
        if end > start:
            attention.count_exact(layer, [(start, end)])
        return self.attend_exact(layer, q)

    @override
    def finish(self) -> None:
        pass


def send_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(exposed=terms.broadcasts())


def send_memory(terms: CostTerms) -> int:
    return terms.shape.attending_layers * terms.all_keys_bytes()


SEND_TO_ALL = ExchangeKind(
    name="send_to_all",
    description="K and V to all ranks, a message from each to each",
    bytes_received="2 h_kv d e N (P-1)/P",
    more_chunks="the same",
    keeps="all",
    paper="none",
    implementation=f"{__name__}:SendToAll",
    traffic=send_traffic,
    memory=send_memory,
    all_tokens=True,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_it_conforms(size: int, tmp_path: Path) -> None:
    check_exchange([SEND_TO_ALL], size, tmp_path)


def test_the_planner_costs_it() -> None:
    [scheme] = schemes(4, [SEND_TO_ALL])
    assert scheme == Scheme(SEND_TO_ALL, 4)
    assert scheme not in list(schemes(4, EXCHANGES))
    shape = PRESETS["qwen3-vl-8b"]
    chunking = deal_tokens(8192, 4, 512)
    received = traffic(scheme, shape, chunking).received
    assert received.tolist() == [shape.kv_bytes * 8192 * 3 // 4] * 4
    assert memory_bytes(scheme, shape, chunking) == 35 * 8192 * shape.kv_bytes
