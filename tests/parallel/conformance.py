"""What every exchange must do: exact attention on real gloo ranks, all its bytes in the statistics.

``check_exchange`` takes a catalogue entry and asks for nothing that is not in the entry, so that an
exchange of a test's own file can pass the same checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.quality import resolve_policy
from prefill_service.attention.report import NEVER
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.exchanges.base import ExchangeSetup
from prefill_service.parallel.exchanges.catalog import ExchangeKind, MeshForm
from prefill_service.parallel.exchanges.registry import choose_exchange, make_exchange
from prefill_service.parallel.mesh import form_meshes
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import deal_patches
from prefill_service.parallel.unit_attention import UnitAttention
from tests.parallel.ranks import TIMEOUT_S, run_ranks

LAYERS = 2
HEAD_DIM = 16
SCALE = 0.25
CPU = torch.device("cpu")
SETTINGS = SparseSettings(NEVER, block_tokens=8, tile_tokens=16, segment_blocks=4)


@dataclass(frozen=True)
class Case:
    """One prompt: patch ends, tokens per chunk and rank, heads; ``degree`` of USP or 0."""

    ends: tuple[int, ...]
    chunk: int
    kv_heads: int
    ratio: int
    degree: int = 0

    @property
    def tokens(self) -> int:
        return self.ends[-1]

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.ratio


ODD = tuple(3 + 7 * (i + 1) for i in range(23))
CASES = {
    "one patch": Case((10,), 8, 4, 1),
    "odd, chunks": Case(ODD, 20, 2, 4),
    "ratio 7": Case((9, 11, 40, 41, 60), 25, 1, 7),
    "one chunk": Case(ODD, 1000, 4, 1),
}


def qkv(case: Case) -> torch.Tensor:
    """[layers, q_heads + 2 kv_heads, tokens, head_dim] in float64."""
    shape = (LAYERS, case.q_heads + 2 * case.kv_heads, case.tokens, HEAD_DIM)
    seed = torch.Generator().manual_seed(case.tokens + case.ratio)
    return torch.randn(shape, dtype=torch.float64, generator=seed)


def dense(case: Case) -> torch.Tensor:
    q, k, v = qkv(case).split([case.q_heads, case.kv_heads, case.kv_heads], 1)
    k, v = (x.repeat_interleave(case.ratio, 1) for x in (k, v))
    scores = (q @ k.mT) * SCALE
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Wire:
    """Counts what torch itself is asked to receive, knowing nothing of our statistics."""

    def __init__(self) -> None:
        self.received = 0
        self._broadcast = dist.broadcast
        self._batch = dist.batch_isend_irecv

    def __enter__(self) -> Wire:
        def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs["group_src"] != dist.get_rank(kwargs["group"]):
                self.received += tensor.nbytes
            return self._broadcast(tensor, *args, **kwargs)

        def batch(ops: list[Any]) -> Any:
            self.received += sum(op.tensor.nbytes for op in ops if op.op is dist.irecv)
            return self._batch(ops)

        dist.broadcast = broadcast
        dist.batch_isend_irecv = batch
        return self

    def __exit__(self, *_: object) -> None:
        dist.broadcast = self._broadcast
        dist.batch_isend_irecv = self._batch


def run_case(group: SPGroup, meshes: dict[int, Any], kind: ExchangeKind, case: Case) -> Any:
    """This rank's part: the first layer by ``attend_exact``, the others by ``attend_adaptive``."""
    choice = choose_exchange(
        kind, group.size, q_heads=case.q_heads, kv_heads=case.kv_heads, wanted=case.degree
    )
    layout = deal_patches(case.ends, group.size, case.chunk, order=kind.order)
    shape = PromptShape(
        num_layers=LAYERS + 1,
        num_tokens=case.tokens,
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=HEAD_DIM,
        scale=SCALE,
        dtype="float64",
        device=CPU,
    )
    setup = ExchangeSetup(
        mesh=meshes[choice.degree],
        layout=layout,
        shape=shape,
        settings=SETTINGS,
        units=SelectionUnits.of(case.ends, case.chunk),
    )
    exchange = make_exchange(kind, setup)
    adaptive = AdaptiveAttention(
        SETTINGS,
        resolve_policy(epsilon=0.0),
        shape,
        np.array(case.ends),
        heads=exchange.local_kv_heads,
    )
    attention = UnitAttention(adaptive, setup.units)
    data = qkv(case)
    before = dict(group.comm_stats.uses)
    out = torch.zeros(LAYERS, case.q_heads, case.tokens, HEAD_DIM, dtype=torch.float64)
    with Wire() as wire:
        for shares in layout.shares:
            exchange.start_chunk(shares)
            adaptive.stats.start_chunk()
            share = shares[group.rank]
            mine = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in share.ranges)])
            for layer in range(LAYERS):
                q, k, v = data[layer][:, mine].split([case.q_heads, case.kv_heads, case.kv_heads])
                exchange.store_kv(layer, k.transpose(0, 1), v.transpose(0, 1))
                if layer == 0:
                    out[layer][:, mine] = exchange.attend_exact(layer, q)
                else:
                    out[layer][:, mine] = exchange.attend_adaptive(layer, q, attention)
        exchange.finish()
    return {
        "out": out,
        "wire": wire.received,
        "uses": group.comm_stats.since(before),
    }


def run_rank(group: SPGroup, cases: Sequence[tuple[ExchangeKind, Case]]) -> list[Any]:
    meshes = form_meshes(group, TIMEOUT_S)
    return [run_case(group, meshes, kind, case) for kind, case in cases]


def check_exchange(kinds: Sequence[ExchangeKind], size: int, folder: Path) -> None:
    """On so many ranks every exchange computes dense float64 attention and counts its bytes."""
    cases = [
        (kind, case)
        for kind in kinds
        for case in CASES.values()
        if kind.mesh is not MeshForm.ROW or size <= case.q_heads
    ]
    results = run_ranks(run_rank, size, folder, cases)
    for index, (kind, case) in enumerate(cases):
        found = [result[index] for result in results]
        out = sum(result["out"] for result in found)  # each rank filled its own tokens
        torch.testing.assert_close(
            out, dense(case), rtol=0, atol=1e-9, msg=lambda text, at=(kind, case): f"{at}: {text}"
        )
        for result in found:
            assert result["wire"] == moved(result["uses"]), (kind, case)
