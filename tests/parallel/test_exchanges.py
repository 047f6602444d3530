"""Every exchange on real gloo ranks: equal to dense float64 attention, bytes as published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prefill_service.attention.report import NEVER
from prefill_service.attention.settings import SparseSettings
from prefill_service.parallel.attention_shape import AttentionShape
from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.exchanges.base import ExchangeSetup
from prefill_service.parallel.exchanges.catalog import (
    DEMAND,
    EXCHANGES,
    GATHER,
    MULTI_RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
    ExchangeKind,
    exchange_named,
)
from prefill_service.parallel.exchanges.registry import (
    choose_exchange,
    make_exchange,
    ulysses_degree,
)
from prefill_service.parallel.mesh import form_meshes
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import deal_patches
from tests.parallel.ranks import TIMEOUT_S, run_ranks

LAYERS, HEAD_DIM, SCALE = 2, 16, 0.25
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
EVEN = Case(tuple(60 * (i + 1) for i in range(8)), 1 << 20, 12, 2)
"""480 tokens in one chunk and 24 query heads: everything divides by 2, 3 and 4."""


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
    """Counts what torch itself is asked to receive, knowing nothing of our meter."""

    def __init__(self) -> None:
        self.received = 0
        self._broadcast, self._batch = dist.broadcast, dist.batch_isend_irecv

    def __enter__(self) -> Wire:
        def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs["group_src"] != dist.get_rank(kwargs["group"]):
                self.received += tensor.nbytes
            return self._broadcast(tensor, *args, **kwargs)

        def batch(ops: list[Any]) -> Any:
            self.received += sum(op.tensor.nbytes for op in ops if op.op is dist.irecv)
            return self._batch(ops)

        dist.broadcast, dist.batch_isend_irecv = broadcast, batch
        return self

    def __exit__(self, *_: object) -> None:
        dist.broadcast, dist.batch_isend_irecv = self._broadcast, self._batch


def run_case(group: SPGroup, meshes: dict[int, Any], kind: ExchangeKind, case: Case) -> Any:
    choice = choose_exchange(
        kind, group.size, q_heads=case.q_heads, kv_heads=case.kv_heads, wanted=case.degree
    )
    layout = deal_patches(case.ends, group.size, case.chunk, kind.order)
    shape = AttentionShape(
        LAYERS, case.tokens, case.q_heads, case.kv_heads, HEAD_DIM, SCALE, torch.float64, CPU
    )
    setup = ExchangeSetup(
        mesh=meshes[choice.degree],
        layout=layout,
        shape=shape,
        settings=SETTINGS,
        units=SelectionUnits.of(case.ends, case.chunk),
    )
    exchange = make_exchange(kind, setup)
    data, before = qkv(case), dict(group.meter.uses)
    out = torch.zeros(LAYERS, case.q_heads, case.tokens, HEAD_DIM, dtype=torch.float64)
    with Wire() as wire:
        for shares in layout.shares:
            exchange.start_chunk(shares)
            share = shares[group.rank]
            mine = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in share.ranges)])
            for layer in range(LAYERS):
                q, k, v = data[layer][:, mine].split([case.q_heads, case.kv_heads, case.kv_heads])
                exchange.store_kv(layer, k.transpose(0, 1), v.transpose(0, 1))
                out[layer][:, mine] = exchange.attend_exact(layer, q)
        exchange.finish()
    return {"out": out, "wire": wire.received, "uses": group.meter.since(before)}


def run_rank(group: SPGroup, cases: list[tuple[str, Case]]) -> list[Any]:
    meshes = form_meshes(group, TIMEOUT_S)
    return [run_case(group, meshes, exchange_named(kind), case) for kind, case in cases]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_equals_dense_attention(size: int, tmp_path: Path) -> None:
    kinds = EXCHANGES if size < 5 else [MULTI_RING, GATHER]
    cases = [
        (kind.name, case)
        for kind in kinds
        for case in CASES.values()
        if kind != ULYSSES or size <= case.q_heads
    ]
    results = run_ranks(run_rank, size, tmp_path, cases)
    for index, (kind, case) in enumerate(cases):
        found = [result[index] for result in results]
        out = sum(result["out"] for result in found)  # each rank filled its own tokens
        torch.testing.assert_close(
            out, dense(case), rtol=0, atol=1e-9, msg=lambda text, at=(kind, case): f"{at}: {text}"
        )
        for result in found:
            assert result["wire"] == moved(result["uses"]), (kind, case)


def published_bytes(kind: ExchangeKind, ranks: int, degree: int, case: Case) -> int:
    """What one rank receives per layer, by the formulas of the papers (even shares, one chunk)."""
    tokens, h_q, h_kv, d, e = case.tokens, case.q_heads, case.kv_heads, HEAD_DIM, 8
    ring = ranks // degree
    match kind.name:
        case "gather" | "ring" | "multi_ring":
            return 2 * h_kv * d * e * tokens * (ranks - 1) // ranks
        case "ulysses":
            return (2 * h_q + 2 * h_kv) * d * e * tokens * (ranks - 1) // ranks**2
        case "usp" | "ulysses_gather":
            heads = (2 * h_q + 2 * h_kv) * d * e * (tokens // ranks) * (degree - 1) // degree
            return heads + 2 * h_kv * d * e * tokens * (ring - 1) // ranks
        case "pass_q":
            return h_q * (2 * d + 1) * e * tokens * (ranks - 1) // ranks
        case "demand":
            raise AssertionError("demand's bytes depend on what is selected")


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_receives_what_the_papers_say(size: int, tmp_path: Path) -> None:
    # What demand moves depends on what is selected: see test_sparse.py.
    kinds = [kind for kind in EXCHANGES if kind != DEMAND]
    results = run_ranks(run_rank, size, tmp_path, [(kind.name, EVEN) for kind in kinds])
    for index, kind in enumerate(kinds):
        degree = ulysses_degree(kind, size, q_heads=EVEN.q_heads, kv_heads=EVEN.kv_heads)
        assert not kind.two_dimensional or degree == 2
        expected = LAYERS * published_bytes(kind, size, degree, EVEN)
        assert [result[index]["wire"] for result in results] == [expected] * size, kind


def test_chunks_move_the_past_again_only_in_rings(tmp_path: Path) -> None:
    """Ulysses, gather and both move a token once; a ring all that its ranks hold, every time."""
    ends = tuple(30 * (i + 1) for i in range(8))
    cases = [
        (kind.name, Case(ends, 60, 4, 1)) for kind in ("gather", "ulysses", "ring", "pass_q")
        for kind in [exchange_named(kind)]
    ]  # two chunks of two patches a rank  # fmt: skip
    results = run_ranks(run_rank, 2, tmp_path, cases)
    gather, ulysses, ring, pass_q = (
        sum(result[i]["wire"] for result in results) // LAYERS for i in range(len(cases))
    )
    kv, tokens = 2 * 4 * HEAD_DIM * 8, ends[-1]
    assert gather == kv * tokens
    assert ulysses == 2 * kv * tokens // 2
    assert ring == kv * (tokens // 2 + tokens)
    assert pass_q == 4 * (2 * HEAD_DIM + 1) * 8 * tokens


def test_ulysses_shares_kv_heads_where_ranks_outnumber_them(tmp_path: Path) -> None:
    """8 query heads on 2 KV heads over 4 ranks: each KV head goes to the two ranks that read it."""
    case = Case(tuple(16 * (i + 1) for i in range(4)), 1000, 2, 4)
    (results,) = zip(*run_ranks(run_rank, 4, tmp_path, [("ulysses", case)]), strict=True)
    one = case.tokens // 4 * HEAD_DIM * 8  # one head of one rank's tokens
    expected = LAYERS * 3 * one * (2 * 1 + 2 + 2)  # a KV head, two query heads, and back
    assert [result["wire"] for result in results] == [expected] * 4


def test_a_degree_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="degree of 3 does not divide 4 ranks"):
        ulysses_degree(USP, 4, q_heads=8, kv_heads=8, wanted=3)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 query heads"):
        ulysses_degree(ULYSSES, 4, q_heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 query heads"):
        ulysses_degree(USP, 4, q_heads=2, kv_heads=2, wanted=4)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 KV heads"):
        ulysses_degree(ULYSSES_GATHER, 4, q_heads=8, kv_heads=2, wanted=4)
    for kind, heads in (
        (USP, {"q_heads": 8, "kv_heads": 1}),
        (ULYSSES_GATHER, {"q_heads": 8, "kv_heads": 8}),
    ):
        assert ulysses_degree(kind, 3, **heads) == 3
        assert ulysses_degree(kind, 6, **heads) == 3
    for kind, heads in (
        (USP, {"q_heads": 2, "kv_heads": 1}),
        (ULYSSES_GATHER, {"q_heads": 8, "kv_heads": 2}),
    ):
        assert ulysses_degree(kind, 6, **heads) == 2
        assert ulysses_degree(kind, 5, **heads) == 1
