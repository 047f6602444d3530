"""An exchange in one file: what ``docs/extending.md`` describes.

It is also a pytest plugin. ``pytest -p tests.parallel.toy_exchange`` runs tests as if its entry and
its formulas stood where the recipe puts them.
"""

from __future__ import annotations

from typing import Self

import pytest
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import attend_causal
from prefill_service.parallel.exchanges import catalog
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.catalog import ExchangeKind
from prefill_service.parallel.exchanges.cost_terms import CostTerms, Traffic
from prefill_service.parallel.token_layout import Range, Share
from prefill_service.parallel.unit_attention import UnitAttention
from tests.cost_model import simulator
from tests.parallel import published_bytes


class SendToAll(Exchange):
    """Every rank sends its K and V to every other, and waits before it attends."""

    def __init__(self, setup: ExchangeSetup) -> None:
        shape = setup.shape
        self._group = setup.mesh.world
        self._scale = shape.scale
        self._kv = shape.empty(shape.attending_layers, shape.num_tokens)
        self._ranges: list[Range] = []

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


def walk(
    simulation: simulator.Simulation, shares: simulator.Shares, moved: simulator.Moved
) -> None:
    """Every rank keeps all, and waits for one message from each that has tokens."""
    for source, tokens in enumerate(shares):
        for rank in range(simulation.ranks):
            simulation.keep(rank, tokens)
            if rank != source and tokens:
                moved.exposed[rank] += (
                    len(tokens) * simulation.shape.kv_heads * 2 * simulation.vector
                )
                moved.exposed_calls[rank] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before a module that reads the catalogue is imported."""
    vars(catalog)["EXCHANGES"] = (*catalog.EXCHANGES, SEND_TO_ALL)
    simulator.WALKS[SEND_TO_ALL.name] = walk
    published_bytes.FORMULAS[SEND_TO_ALL.name] = published_bytes.keys_to_all
