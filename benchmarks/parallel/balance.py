"""Does it pay that ranks attend to each other's selected blocks? Skewed queries, with and without.

    python -m benchmarks.parallel.balance [--ranks 2] [--tokens 16384] [--rounds 3]

Attention alone, by the product's own path (adaptive attention over ``gather``), on real gloo ranks
with one thread each. In every second unit queries want single keys, elsewhere they want the mean:
on two ranks one has all the work. Beside it the same without a skew, and one that no threshold
would balance. Rounds alternate; the table has the best of each, and what the busiest rank does
over the mean. With more ranks than cores seconds mean nothing, and are marked so.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.parallel.ranks import Transport, run_ranks
from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import combine
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape
from prefill_service.config import EngineConfig
from prefill_service.parallel.exchanges.delegation import make_balancer
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.load_balance import BalanceLimits
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import deal_patches
from prefill_service.parallel.unit_attention import UnitAttention

LAYERS = 3
Q_HEADS = 8
KV_HEADS = 2
HEAD_DIM = 128
PATCH = 128
CHUNK = 512
SCALE = HEAD_DIM**-0.5
CPU = torch.device("cpu")
BUSY = {"every unit": 1, "every second unit": 2, "every eighth unit": 8}
"""How often a unit has something to look for."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt, the same on every rank; of ``every`` units one is busy."""

    tokens: int
    every: int

    @property
    def ends(self) -> np.ndarray:
        """[patches] one past each patch's last token."""
        return np.arange(PATCH, self.tokens + 1, PATCH)

    @property
    def shape(self) -> PromptShape:
        """Of every layer."""
        return PromptShape(
            num_layers=LAYERS + 1,
            num_tokens=self.tokens,
            q_heads=Q_HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=SCALE,
            dtype="float32",
            device=CPU,
        )

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """Q, K, V [heads, tokens, head_dim]: keys in loose clusters, busy queries near some."""
        seed = torch.Generator().manual_seed(number)
        heads = (Q_HEADS, KV_HEADS, KV_HEADS)
        centres = torch.randn(64, HEAD_DIM, generator=seed)
        near = torch.randint(0, 64, (sum(heads), self.tokens), generator=seed)
        noise = torch.randn(sum(heads), self.tokens, HEAD_DIM, generator=seed)
        found = 1.4 * centres[near] + 0.6 * noise
        idle = torch.arange(self.tokens) // CHUNK % self.every != 0
        found[:Q_HEADS, idle] *= 0.1
        q, k, v = found.split(list(heads))
        return q, k, v


def compute(group: SPGroup, device: torch.device, problem: Problem, above: float) -> dict[str, Any]:
    """One prefill's attention on this rank; for ``run_ranks``."""
    shape = problem.shape
    units = SelectionUnits.of(problem.ends, CHUNK)
    layout = deal_patches(problem.ends, group.size, CHUNK, whole_units=True)
    settings = SparseSettings(1024)
    attention = AdaptiveAttention(settings, resolve_policy(Quality.BALANCED), shape, problem.ends)
    limits = BalanceLimits(above, EngineConfig().balance_least_gflop * 1e9)
    balancer = make_balancer(group, shape, settings, units, limits=limits)
    exchange = GatherExchange(group, shape, balancer=balancer)
    unit_attention = UnitAttention(attention, units)
    data = [problem.layer(number) for number in range(LAYERS)]
    group.all_reduce_max(0)  # begin together
    start = time.perf_counter()
    before = time.process_time()
    for shares in layout.shares:
        exchange.start_chunk(shares)
        attention.stats.start_chunk()
        first, end = shares[group.rank].contiguous
        for layer, (q, k, v) in enumerate(data):
            kv = (x[:, first:end].transpose(0, 1) for x in (k, v))
            exchange.store_kv(layer, *kv)
            exchange.attend_adaptive(layer, q[:, first:end], unit_attention)
    exchange.finish()
    group.all_reduce_max(0)  # as the last rank is done
    seconds = time.perf_counter() - start
    cpu_s = time.process_time() - before
    return {"seconds": seconds, "cpu_s": cpu_s, "report": attention.stats.report()}


def rounds(
    group: SPGroup, device: torch.device, problem: Problem, count: int
) -> list[dict[str, Any]]:
    """Alternately without balance and with the default; for ``run_ranks``."""
    above = EngineConfig().balance_above
    compute(group, device, Problem(4 * CHUNK, problem.every), above)  # warm
    return [compute(group, device, problem, level) for _ in range(count) for level in (0.0, above)]


def row(name: str, found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of all ranks' rounds."""

    def best(what: str) -> list[float]:
        """Of the slowest rank, without balance and with it."""
        rounds = [max(rank[i][what] for rank in found) for i in range(len(found[0]))]
        return [min(rounds[at::2]) for at in (0, 1)]

    (plain, balanced) = best("seconds")
    busiest = best("cpu_s")
    report = combine([rank[1]["report"] for rank in found])
    return {
        "busy": name,
        "density": round(report.density, 3),
        "rho_before": round(report.imbalance_before, 3),
        "rho": round(report.imbalance, 3),
        "seconds": round(plain, 3),
        "seconds_balanced": round(balanced, 3),
        "gain": round(plain / balanced, 3),
        "busiest_cpu_gain": round(busiest[0] / busiest[1], 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "sp-balance.json")
    options = parser.parse_args(arguments)
    found = []
    for name, every in BUSY.items():
        problem = Problem(options.tokens // PATCH * PATCH, every)
        ranks = run_ranks(rounds, options.ranks, Transport("gloo", "cpu"), problem, options.rounds)
        found.append(row(name, ranks))
    print(tables.markdown(list(found[0]), [list(one.values()) for one in found]))
    crowded = options.ranks > (os.cpu_count() or 1)
    if crowded:
        print(f"{options.ranks} ranks on {os.cpu_count()} cores: seconds mean nothing")
    about = tables.settings(
        ranks=options.ranks,
        tokens=options.tokens,
        rounds=options.rounds,
        crowded=crowded,
        heads=[Q_HEADS, KV_HEADS, HEAD_DIM],
        layers=LAYERS,
        chunk=CHUNK,
    )
    tables.write(options.out, {"settings": about, "rows": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
