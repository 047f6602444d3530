"""A prompt's random Q, K and V, its attention through an exchange, and the same on one rank."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.parallel.ranks import TIMEOUT_S
from prefill_service.attention.report import NEVER
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape, dtype_name
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.traffic import traffic
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import chunking_of
from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.catalog import (
    GATHER,
    MULTI_RING,
    PASS_Q,
    RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
    ExchangeKind,
)
from prefill_service.parallel.exchanges.cost_terms import Traffic
from prefill_service.parallel.exchanges.registry import (
    ExchangeChoice,
    choose_exchange,
    make_exchange,
)
from prefill_service.parallel.mesh import SPMesh, form_meshes
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import ChunkLayout, Share, deal_patches

DENSE = (
    GATHER,
    RING,
    ULYSSES,
    USP,
    PASS_Q,
    MULTI_RING,
    ULYSSES_GATHER,
)
"""Exchanges whose bytes follow from the layout alone, not from what attention selects."""
SETTINGS = SparseSettings(NEVER)


@dataclass(frozen=True, slots=True)
class Problem:
    """Random inputs of ``layers`` layers of attention over one prompt.

    Attributes:
        patch_ends: see ``deal_patches``.
        chunk: tokens per chunk and rank.
    """

    patch_ends: tuple[int, ...]
    chunk: int
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int = 2
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.patch_ends[-1]

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)

    def choice(self, kind: ExchangeKind, ranks: int) -> ExchangeChoice:
        """The exchange with its mesh."""
        return choose_exchange(kind, ranks, q_heads=self.q_heads, kv_heads=self.kv_heads)

    def layout(self, kind: ExchangeKind, ranks: int) -> ChunkLayout:
        """Which rank has which tokens."""
        return deal_patches(self.patch_ends, ranks, self.chunk, order=kind.order)

    def shape(self, dtype: torch.dtype, device: torch.device) -> PromptShape:
        """Of the attention."""
        return PromptShape(
            num_layers=self.layers + 1,
            num_tokens=self.tokens,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            dtype=dtype_name(dtype),
            device=device,
        )

    def exchange(
        self,
        kind: ExchangeKind,
        meshes: Mapping[int, SPMesh],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Exchange:
        """The exchange for this prompt, on one rank."""
        ranks = meshes[1].world.size
        setup = ExchangeSetup(
            mesh=meshes[self.choice(kind, ranks).degree],
            layout=self.layout(kind, ranks),
            shape=self.shape(dtype, device),
            settings=SETTINGS,
            units=SelectionUnits.of(self.patch_ends, self.chunk),
        )
        return make_exchange(kind, setup)

    def layer(self, layer: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Q [q_heads, tokens, head_dim], K and V [kv_heads, tokens, head_dim]."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        heads = [self.q_heads, self.kv_heads, self.kv_heads]
        drawn = torch.randn(sum(heads), self.tokens, self.head_dim, generator=generator)
        return list(drawn.to(dtype).to(device).split(heads))

    def dense(self, layer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Causal attention in float64, head by head."""
        q, k, v = (x.double() for x in self.layer(layer, dtype, device))
        hidden = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=device).triu(1)
        group = self.q_heads // self.kv_heads
        rows = []
        for head in range(self.q_heads):
            scores = (q[head] @ k[head // group].T) * self.scale
            rows.append(scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v[head // group])
        return torch.stack(rows)

    def predicted(self, kind: ExchangeKind, ranks: int, dtype: torch.dtype) -> Traffic:
        """What the cost model's formulas say that each rank receives per layer, chunk by chunk.

        Of the exchanges in ``DENSE``.
        """
        shape = ModelShape(
            name="random",
            num_layers=self.layers + 1,
            hidden=1,
            intermediate=1,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype_name(dtype),
        )
        choice = self.choice(kind, ranks)
        layout = self.layout(kind, ranks)
        chunking = chunking_of([[share.ranges for share in chunk] for chunk in layout.shares])
        return traffic(Strategy(kind, ranks, choice.degree), shape, chunking)


@dataclass(frozen=True, slots=True)
class Run:
    """What one rank saw.

    Attributes:
        tokens: [own tokens] their positions.
        out: [layers, q_heads, own tokens, head_dim], on the host.
        received: bytes, by the comm stats.
        seconds: from first chunk to last, waiting included.
    """

    tokens: Tensor
    out: Tensor
    received: int
    seconds: float


def run_exchanges(
    group: SPGroup, device: torch.device, work: Sequence[tuple[Problem, ExchangeKind, torch.dtype]]
) -> list[Run]:
    """Each of them, one after another; for ``run_ranks``."""
    meshes = form_meshes(group, TIMEOUT_S)
    return [
        run_exchange(meshes, problem, kind, dtype=dtype, device=device)
        for problem, kind, dtype in work
    ]


def run_exchange(
    meshes: Mapping[int, SPMesh],
    problem: Problem,
    kind: ExchangeKind,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """All chunks and layers, on one rank of many that do the same."""
    group = meshes[1].world
    layout = problem.layout(kind, group.size)
    exchange = problem.exchange(kind, meshes, dtype, device)
    data = [problem.layer(layer, dtype, device) for layer in range(problem.layers)]
    before = dict(group.comm_stats.uses)
    parts = []
    mine = []
    group.all_reduce_max(0)  # begin together
    start = time.perf_counter()
    for chunk in layout.shares:
        tokens = positions(chunk[group.rank])
        exchange.start_chunk(chunk)
        mine.append(tokens)
        outs = []
        for layer, (q, k, v) in enumerate(data):
            at = tokens.to(device)
            exchange.store_kv(layer, k[:, at].transpose(0, 1), v[:, at].transpose(0, 1))
            outs.append(exchange.attend_exact(layer, q[:, at]))
        parts.append(torch.stack(outs))
    exchange.finish()
    out = torch.cat(parts, 2).cpu()  # waits for the device
    seconds = time.perf_counter() - start
    return Run(
        tokens=torch.cat(mine),
        out=out,
        received=moved(group.comm_stats.since(before)),
        seconds=seconds,
    )


def positions(share: Share) -> Tensor:
    """[tokens] of a share."""
    return torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in share.ranges)])
