"""Sparse attention over ranks selects, computes and verifies what one rank with all keys does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.fallback import VerifiedAttention
from prefill_service.attention.quality import AttentionPolicy, resolve_policy
from prefill_service.attention.report import combine
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import PromptShape
from prefill_service.engine.resolve import is_sparse
from prefill_service.kv.offload.file_copies import FileCopyEngine
from prefill_service.kv.offload.working_set import OffloadedKV
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.catalog import exchange_named
from prefill_service.parallel.exchanges.delegation import make_balancer
from prefill_service.parallel.exchanges.demand.exchange import DemandExchange
from prefill_service.parallel.exchanges.demand.layer_keys import DemandLayerKeys
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.exchanges.registry import choose_exchange, make_exchange
from prefill_service.parallel.load_balance import BalanceLimits
from prefill_service.parallel.mesh import form_meshes
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import ChunkLayout, Share, deal_patches
from prefill_service.parallel.unit_attention import UnitAttention
from tests.parallel.ranks import TIMEOUT_S, run_ranks

LAYERS = 2
KV_HEADS = 2
HEAD_DIM = 16
SCALE = 0.25
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One prompt: patches of so many tokens, tokens per chunk and rank, what is asked for.

    ``broken``: one value is not a number, so that its KV head cannot be verified. ``action``: where
    queries want single keys, as shares of the prompt; elsewhere they want the mean.
    """

    patches: int
    patch_tokens: int
    chunk: int
    ratio: int
    policy: AttentionPolicy
    from_tokens: int = 200
    broken: bool = False
    action: tuple[float, float] = (0.0, 0.0)
    kv_heads: int = KV_HEADS

    @property
    def ends(self) -> np.ndarray:
        return 5 + np.arange(1, self.patches + 1) * self.patch_tokens

    @property
    def q_heads(self) -> int:
        return self.ratio * self.kv_heads

    @property
    def settings(self) -> SparseSettings:
        return SparseSettings(self.from_tokens, block_tokens=16, tile_tokens=32, segment_blocks=4)

    @property
    def shape(self) -> PromptShape:
        return PromptShape(
            num_layers=LAYERS + 1,
            num_tokens=int(self.ends[-1]),
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=HEAD_DIM,
            scale=SCALE,
            dtype="float64",
            device=CPU,
        )

    def layout(self, ranks: int) -> ChunkLayout:
        sparse = not self.policy.exact and int(self.ends[-1]) >= self.from_tokens
        return deal_patches(self.ends, ranks, self.chunk, whole_units=sparse)

    def data(self) -> Tensor:
        """[layers, heads, tokens, head_dim]: keys in a few loose clusters, queries near some."""
        tokens = int(self.ends[-1])
        seed = torch.Generator().manual_seed(self.patches)
        centres = torch.randn(LAYERS, 12, HEAD_DIM, dtype=torch.float64, generator=seed)
        heads = self.q_heads + 2 * self.kv_heads
        near = torch.randint(0, 12, (LAYERS, heads, tokens), generator=seed)
        noise = torch.randn(LAYERS, heads, tokens, HEAD_DIM, dtype=torch.float64, generator=seed)
        picked = torch.stack([centres[layer][near[layer]] for layer in range(LAYERS)])
        found = 1.5 * picked + 0.5 * noise
        first, last = (int(share * tokens) for share in self.action)
        found[:, : self.q_heads, :first] *= 0.3  # sharper attention would need all blocks
        found[:, : self.q_heads, last:] *= 0.3
        if self.broken:
            found[:, -1, 3] = torch.nan
        return found

    def split(self, layer: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.split(layer, [self.q_heads, self.kv_heads, self.kv_heads]))


BUSY = Case(90, 37, 80, 1, resolve_policy(epsilon=0.2), action=(0.79, 0.83))
"""All that happens in 3,335 tokens happens in 133 of them, less than two units."""

CASES = {
    "sparse": Case(40, 37, 150, 2, resolve_policy(epsilon=0.2)),
    "redone": Case(40, 37, 150, 2, resolve_policy(epsilon=0.5, min_kept_mass=0.8)),
    "dense in the end": Case(20, 37, 150, 1, resolve_policy(epsilon=0.2), broken=True),
    "units in parts": Case(100, 13, 530, 1, resolve_policy(epsilon=0.2)),
    "exact": Case(20, 37, 150, 2, resolve_policy(epsilon=0.0)),
    "small shares": Case(30, 37, 37, 7, resolve_policy(epsilon=0.2)),
    "shares in a block": Case(60, 7, 7, 1, resolve_policy(epsilon=0.2)),
    "exact, shares in a block": Case(40, 7, 7, 2, resolve_policy(epsilon=0.0)),
    "one late unit": Case(20, 37, 160, 1, resolve_policy(epsilon=0.2)),  # on four ranks, no first
    "three heads": Case(30, 37, 120, 2, resolve_policy(epsilon=0.2), kv_heads=3),
    "one patch": Case(1, 30, 150, 1, resolve_policy(epsilon=0.2), from_tokens=1),
}


class Selection(AdaptiveAttention):
    """Notes which blocks every unit keeps, by layer and first token."""

    def __init__(self, case: Case, heads: slice | None = None) -> None:
        super().__init__(case.settings, case.policy, case.shape, case.ends, heads=heads)
        self.kept: dict[tuple[int, int], Tensor] = {}
        record = self.stats.record_sparse

        def noted(layer: int, tiles: Tiles, used: VerifiedAttention, **rest: Any) -> None:
            self.kept[layer, tiles.q_offset] = used.keep.clone()
            record(layer, tiles, used, **rest)

        self.stats.record_sparse = noted  # type: ignore[method-assign]


class Spied(DemandExchange):
    """Notes which blocks of other ranks are needed, in its own way: per layer, as a set."""

    def __init__(self, *arguments: Any, cached: bool) -> None:
        super().__init__(*arguments, cached=cached)
        self.cached = cached
        self.needed = 0
        self.have: list[set[tuple[int, int]]] = [set() for _ in range(LAYERS)]
        for layer, keys in enumerate(self._layers):
            self._spy(layer, keys)

    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        super().start_chunk(chunk)
        self.ranges = [share.contiguous for share in chunk]

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        super().store_kv(layer, k, v)
        start, end = self.ranges[self._group.rank]
        first = min(a for a, b in self.ranges if a < b)
        whole = first // 16 if self.cached else 0  # blocks of earlier chunks
        self.have[layer] = {(head, b) for head, b in self.have[layer] if b < whole}
        mine = [b for b in range(end // 16) if start <= b * 16]
        self.have[layer] |= {(head, b) for head in range(KV_HEADS) for b in mine}

    def _spy(self, layer: int, keys: DemandLayerKeys) -> None:
        see_clustered = keys._see_clustered
        fetch_blocks = keys.fetch_blocks

        def seen(until: int) -> None:
            old = keys._clustered_until
            see_clustered(until)
            ordered = range(old // 16, until // 16)
            self.have[layer] -= {(head, b) for head in range(KV_HEADS) for b in ordered}

        def fetched(wanted: Tensor, heads: Tensor) -> None:
            for row, block in wanted.nonzero().tolist():
                one = (int(heads[row]), block)
                if one not in self.have[layer]:
                    self.have[layer].add(one)
                    self.needed += int(self._owners.block_owner[block] != self._group.rank)
            fetch_blocks(wanted, heads)

        keys._see_clustered = seen  # type: ignore[method-assign]
        keys.fetch_blocks = fetched  # type: ignore[method-assign]


def offloaded(shape: PromptShape, folder: Path) -> OffloadedKV:
    """Room for half a layer beside the two that are always here."""
    engine = FileCopyEngine(shape, folder).start()
    device_bytes = int(2.5 * shape.layer_bytes)
    return OffloadedKV(shape, device_bytes, engine, lambda _: 0.4)


def compute(group: SPGroup, case: Case, kind: str, folder: Path) -> dict[str, Any]:
    """This rank's part of a prefill, by the product's own path."""
    layout = case.layout(group.size)
    shape = case.shape
    units = SelectionUnits.of(case.ends, case.chunk)
    exchange: Exchange
    if kind == "gather":
        exchange = GatherExchange(group, shape)
    elif kind == "offloaded":
        exchange = GatherExchange(group, shape, offloaded(shape, folder))
    elif kind in ("demand", "uncached"):
        cached = kind == "demand"
        exchange = Spied(group, layout, shape, case.settings.segments, cached=cached)
    elif kind == "balanced":
        balancer = make_balancer(group, shape, case.settings, units, limits=BalanceLimits(1.0))
        exchange = GatherExchange(group, shape, balancer=balancer)
    else:
        meshes = form_meshes(group, TIMEOUT_S)
        choice = choose_exchange(
            exchange_named(kind), group.size, q_heads=case.q_heads, kv_heads=case.kv_heads
        )
        sparse = is_sparse(shape.num_tokens, choice, case.policy, case.from_tokens)
        setup = ExchangeSetup(
            mesh=meshes[choice.degree],
            layout=layout,
            shape=shape,
            settings=case.settings,
            units=units,
            selects=sparse,
        )
        exchange = make_exchange(choice.kind, setup)
    selection = Selection(case, exchange.local_kv_heads)
    data = case.data()
    before = dict(group.comm_stats.uses)
    attention = UnitAttention(selection, units)
    out = torch.zeros_like(data[:, : case.q_heads])
    for shares in layout.shares:
        exchange.start_chunk(shares)
        selection.stats.start_chunk()
        start, end = shares[group.rank].contiguous
        for layer in range(LAYERS):
            q, k, v = case.split(data[layer][:, start:end])
            exchange.store_kv(layer, k.transpose(0, 1), v.transpose(0, 1))
            out[layer][:, start:end] = exchange.attend_adaptive(layer, q, attention)
    exchange.finish()
    return {
        "out": out,
        "kept": selection.kept,
        "report": selection.stats.report(),
        "uses": group.comm_stats.since(before),
        "needed": getattr(exchange, "needed", None),
    }


def one_rank(case: Case) -> dict[str, Any]:
    """Unit by unit, with every key at hand."""
    selection = Selection(case)
    data = case.data()
    out = torch.zeros_like(data[:, : case.q_heads])
    for layer in range(LAYERS):
        whole, k, v = case.split(data[layer])
        kv = torch.stack([k, v]).permute(2, 0, 1, 3).contiguous()
        for start, end in SelectionUnits.of(case.ends, case.chunk).cut(0, int(case.ends[-1])):
            q = whole[:, start:end]
            if selection.is_sparse(start, end - start):
                out[layer][:, start:end] = selection.attend_unit(layer, q, kv, start=start)
            else:
                k, v = kv[:end].permute(1, 2, 0, 3)
                out[layer][:, start:end] = attend_causal(q, k, v, q_offset=start, scale=SCALE).out
                selection.observe_exact(layer, q, kv, start=start)
    return {"out": out, "kept": selection.kept, "report": selection.stats.report()}


def kinds(name: str, ranks: int) -> list[str]:
    """Ways to compute a case; more ranks than query heads cannot divide them."""
    found = {
        "sparse": [
            "balanced",
            "demand",
            "ulysses",
            "ulysses_gather",
            "gather",
            "uncached",
            "offloaded",
        ],
        "one late unit": ["demand", "ulysses_gather", "gather", "offloaded"],
        "three heads": ["ulysses", "ulysses_gather"],
    }.get(name, ["balanced", "demand", "ulysses", "ulysses_gather"])
    return [kind for kind in found if kind != "ulysses" or ranks <= CASES[name].q_heads]


def run_rank(group: SPGroup, folder: Path, names: list[str]) -> list[dict[str, dict[str, Any]]]:
    return [
        {kind: compute(group, CASES[name], kind, folder) for kind in kinds(name, group.size)}
        for name in names
    ]


def run_busy(group: SPGroup, folder: Path) -> dict[str, Any]:
    return compute(group, BUSY, "balanced", folder)


def assert_same_blocks(found: list[dict[str, Any]], expected: dict[str, Any], case: str) -> None:
    """Ranks' parts of a prefill against that of one rank."""
    out = sum(part["out"] for part in found)  # each has its own queries, and zeros
    torch.testing.assert_close(out, expected["out"], rtol=0, atol=1e-9, equal_nan=True)
    kept: dict[tuple[int, int], list[Tensor]] = {}
    for part in found:
        for unit, keep in part["kept"].items():  # of all KV heads on one rank, or some on each
            kept.setdefault(unit, []).append(keep)
    assert kept.keys() == expected["kept"].keys(), case
    for unit, keeps in kept.items():
        assert torch.equal(torch.cat(keeps), expected["kept"][unit]), (case, unit)


def ulysses_bytes(case: Case, ranks: int) -> list[int]:
    """Each rank's heads of all others' tokens, and all others' heads of its own tokens."""
    each, rest = divmod(case.kv_heads, ranks)
    received = []
    for rank in range(ranks):
        keys = each + (rank < rest)
        queries = keys * case.ratio
        mine = 0
        for chunk in case.layout(ranks).shares:
            own = chunk[rank].num_tokens
            others = sum(share.num_tokens for share in chunk) - own
            mine += others * (queries + 2 * keys) + own * (case.q_heads - queries)
        received.append(mine * LAYERS * HEAD_DIM * 8)
    return received


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_selects_what_one_does(size: int, tmp_path: Path) -> None:
    names = list(CASES)
    ranks = run_ranks(run_rank, size, tmp_path, tmp_path, names)
    for index, name in enumerate(names):
        expected = one_rank(CASES[name])
        wanted = expected["report"].layers
        for kind in kinds(name, size):
            found = [rank[index][kind] for rank in ranks]
            assert_same_blocks(found, expected, f"{name}, {kind}")
            layers = combine([part["report"] for part in found]).layers
            for ours, theirs in zip(layers, wanted, strict=True):
                assert ours.attended == theirs.attended, (name, kind)
                assert ours.tiles_redone == theirs.tiles_redone, (name, kind)
                assert ours.tiles_dense == theirs.tiles_dense, (name, kind)
                assert ours.kept_mass.count == theirs.kept_mass.count, (name, kind)
                for measure in ("kept_mass", "output_error"):
                    mine = getattr(ours, measure).total
                    other = getattr(theirs, measure).total
                    assert mine == pytest.approx(other, abs=1e-8), (name, kind, measure)
            if kind == "ulysses" and size > 1 and name in ("sparse", "three heads"):
                used = [part["uses"]["all_to_all"].bytes_received for part in found]
                assert used == ulysses_bytes(CASES[name], size)
            for part in found:
                if part["needed"] is not None:
                    use = part["uses"].get("blocks")
                    received = use.bytes_received if use else 0
                    assert received == part["needed"] * 16 * 2 * HEAD_DIM * 8


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_skewed_is_balanced(size: int, tmp_path: Path) -> None:
    """Of the paper: at most 5 % above the mean afterwards, and nothing else changes."""
    found = run_ranks(run_busy, size, tmp_path, tmp_path)
    expected = one_rank(BUSY)
    assert_same_blocks(found, expected, "busy")
    report = combine([part["report"] for part in found])
    assert report.imbalance_before > 1.1
    assert report.imbalance <= 1.05
    for ours, theirs in zip(report.layers, expected["report"].layers, strict=True):
        assert ours.attended == theirs.attended
    used = [part["uses"]["balance"].bytes_received for part in found]
    gathered = [part["uses"]["broadcast"].bytes_received for part in found]
    assert 0 < sum(used) < sum(gathered)  # far from moving everything
