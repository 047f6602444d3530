"""The demand exchange: selects, computes and certifies what one rank with all keys does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention, SparseSettings
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.keys import LayerState
from prefill_service.attention.quality import AttentionPolicy, resolve_policy
from prefill_service.parallel.demand import DemandExchange
from prefill_service.parallel.exchange import AttentionShape
from prefill_service.parallel.group import SPGroup
from prefill_service.parallel.layout import ChunkLayout, Share, deal_patches
from tests.parallel.ranks import run_ranks

LAYERS, KV_HEADS, HEAD_DIM, SCALE = 2, 2, 16, 0.25
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One prompt: patches of so many tokens, tokens per chunk and rank, what is asked for.

    ``broken``: one value is not a number, so that its KV head has no certificate.
    """

    patches: int
    patch_tokens: int
    chunk: int
    ratio: int
    policy: AttentionPolicy
    from_tokens: int = 200
    broken: bool = False

    @property
    def ends(self) -> np.ndarray:
        return 5 + np.arange(1, self.patches + 1) * self.patch_tokens

    @property
    def q_heads(self) -> int:
        return self.ratio * KV_HEADS

    @property
    def settings(self) -> SparseSettings:
        return SparseSettings(self.from_tokens, block_tokens=16, tile_tokens=32, segment_blocks=4)

    def attention(self) -> AdaptiveAttention:
        return AdaptiveAttention(
            self.settings, self.policy, LAYERS, KV_HEADS, HEAD_DIM, torch.float64, CPU, self.ends
        )

    def data(self) -> Tensor:
        """[layers, heads, tokens, head_dim]: keys in a few loose clusters, queries near some."""
        tokens, seed = int(self.ends[-1]), torch.Generator().manual_seed(self.patches)
        centres = torch.randn(LAYERS, 12, HEAD_DIM, dtype=torch.float64, generator=seed)
        heads = self.q_heads + 2 * KV_HEADS
        near = torch.randint(0, 12, (LAYERS, heads, tokens), generator=seed)
        noise = torch.randn(LAYERS, heads, tokens, HEAD_DIM, dtype=torch.float64, generator=seed)
        picked = torch.stack([centres[layer][near[layer]] for layer in range(LAYERS)])
        data = 1.5 * picked + 0.5 * noise
        data[:, : self.q_heads] *= 0.3  # sharper attention would need all blocks
        if self.broken:
            data[:, -1, 3] = torch.nan
        return data

    def split(self, layer: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.split(layer, [self.q_heads, KV_HEADS, KV_HEADS]))


CASES = {
    "sparse": Case(40, 37, 150, 2, resolve_policy(epsilon=0.2)),
    "redone": Case(40, 37, 150, 2, resolve_policy(epsilon=0.5, min_kept_mass=0.8)),
    "dense in the end": Case(20, 37, 150, 1, resolve_policy(epsilon=0.2), broken=True),
    "exact": Case(20, 37, 150, 2, resolve_policy(epsilon=0.0)),
    "small shares": Case(30, 37, 37, 7, resolve_policy(epsilon=0.2)),
    "shares in a block": Case(60, 7, 7, 1, resolve_policy(epsilon=0.2)),
    "exact, shares in a block": Case(40, 7, 7, 2, resolve_policy(epsilon=0.0)),
    "one patch": Case(1, 30, 150, 1, resolve_policy(epsilon=0.2), from_tokens=1),
}


class Spied(DemandExchange):
    """Notes which blocks of other ranks are needed, in its own way: per layer, as a set."""

    def __init__(self, *arguments: Any, cached: bool) -> None:
        super().__init__(*arguments, cached=cached)
        self.needed = 0
        self.have: list[set[tuple[int, int]]] = [set() for _ in range(LAYERS)]

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        super().store(layer, k, v)
        start, end = self._ranges[self._group.rank]
        whole = self._ranges[0][0] // 16 if self._cached else 0  # blocks of earlier chunks
        self.have[layer] = {(head, b) for head, b in self.have[layer] if b < whole}
        mine = [b for b in range(end // 16) if start <= b * 16]
        self.have[layer] |= {(head, b) for head in range(KV_HEADS) for b in mine}

    def advance(self, layer: int, state: LayerState, recent: int) -> None:
        old = state.clustered
        super().advance(layer, state, recent)
        ordered = range(old // 16, state.clustered // 16)
        self.have[layer] -= {(head, b) for head in range(KV_HEADS) for b in ordered}

    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        for row, block in wanted.nonzero().tolist():
            one = (int(heads[row]), block)
            if one not in self.have[self._layer]:
                self.have[self._layer].add(one)
                self.needed += int(self._homes.block_home[block] != self._group.rank)
        super().fetch(wanted, heads)


def with_demand(group: SPGroup, case: Case, cached: bool) -> dict[str, Any]:
    """This rank's part."""
    layout = deal_patches(case.ends, group.size, case.chunk)
    shape = AttentionShape(
        LAYERS, int(case.ends[-1]), case.q_heads, KV_HEADS, HEAD_DIM, SCALE, torch.float64, CPU
    )
    exchange = Spied(group, layout, shape, case.settings.segments, cached=cached)
    attention, data, before = case.attention(), case.data(), dict(group.meter.uses)
    out = torch.zeros_like(data[:, : case.q_heads])
    for shares in layout.shares:
        exchange.start_chunk(shares)
        start, end = shares[group.rank].contiguous
        chunk_start, chunk_end = shares[0].contiguous[0], max(s.contiguous[1] for s in shares)
        for layer in range(LAYERS):
            q, k, v = case.split(data[layer][:, start:end])
            exchange.store(layer, k.transpose(0, 1), v.transpose(0, 1))
            if attention.is_sparse(chunk_start, chunk_end - chunk_start):
                exchange.advance(layer, attention.state(layer), attention.recent(chunk_start))
            if attention.is_sparse(start, end - start):
                out[layer][:, start:end] = attention.attend(
                    layer, q, exchange.kv, start, chunk_start, SCALE, exchange
                )
            else:
                out[layer][:, start:end] = exchange.attend(layer, q)
                attention.observe(layer, q, exchange.kv, start, SCALE)
    exchange.finish()
    uses = group.meter.since(before)
    return {"out": out, "report": attention.report(), "uses": uses, "needed": exchange.needed}


def with_all_keys(case: Case, layout: ChunkLayout) -> list[dict[str, Any]]:
    """What each of the ranks computes where it has every key."""
    data = case.data()
    parts = []
    for rank in range(len(layout.shares[0])):
        attention, out = case.attention(), torch.zeros_like(data[:, : case.q_heads])
        kv = [
            torch.stack(case.split(layer)[1:], 0).permute(2, 0, 1, 3).contiguous() for layer in data
        ]
        for shares in layout.shares:
            share: Share = shares[rank]
            start, end = share.contiguous
            for layer in range(LAYERS):
                q = case.split(data[layer][:, start:end])[0]
                if attention.is_sparse(start, end - start):
                    out[layer][:, start:end] = attention.attend(
                        layer, q, kv[layer], start, shares[0].contiguous[0], SCALE
                    )
                elif end > start:
                    k, v = kv[layer][:end].permute(1, 2, 0, 3)
                    out[layer][:, start:end] = attend_causal(q, k, v, start, SCALE).out
                    attention.observe(layer, q, kv[layer], start, SCALE)
        parts.append({"out": out, "report": attention.report()})
    return parts


def run_rank(group: SPGroup, names: list[str]) -> list[dict[str, Any]]:
    return [with_demand(group, CASES[name], cached) for name in names for cached in (True, False)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_rank_with_all_keys(size: int, tmp_path: Path) -> None:
    names = list(CASES)
    results = run_ranks(run_rank, size, tmp_path, names)
    for index, name in enumerate(names):
        case = CASES[name]
        expected = with_all_keys(case, deal_patches(case.ends, size, case.chunk))
        for rank, wanted in enumerate(expected):
            for found in results[rank][2 * index : 2 * index + 2]:
                torch.testing.assert_close(
                    found["out"], wanted["out"], rtol=0, atol=1e-9, equal_nan=True
                )
                for ours, theirs in zip(
                    found["report"].layers, wanted["report"].layers, strict=True
                ):
                    # The same blocks: as many keys, the same tiles computed again.
                    assert ours.attended == theirs.attended, name
                    assert ours.tiles_redone == theirs.tiles_redone, name
                    assert ours.tiles_dense == theirs.tiles_dense, name
                    assert ours.kept_mass.count == theirs.kept_mass.count, name
                    assert ours.kept_mass.total == pytest.approx(theirs.kept_mass.total, abs=1e-8)
                    assert ours.output_error.total == pytest.approx(
                        theirs.output_error.total, abs=1e-8
                    )
        for found in (one for result in results for one in result[2 * index : 2 * index + 2]):
            use = found["uses"].get("blocks")
            assert (use.bytes_received if use else 0) == found["needed"] * 16 * 2 * HEAD_DIM * 8
    if size == 2:
        of = {name: [r[2 * names.index(name)] for r in results] for name in names}
        redone = [layer for r in of["redone"] for layer in r["report"].layers]
        assert sum(layer.tiles_redone for layer in redone)
        dense = [layer for r in of["dense in the end"] for layer in r["report"].layers]
        assert sum(layer.tiles_dense for layer in dense)
        again = [r[2 * names.index("sparse") + 1] for r in results]
        assert sum(r["needed"] for r in of["sparse"]) < sum(r["needed"] for r in again)
