"""Attention on this CPU: dense, ours and FlexAttention at several lengths and densities.

    make bench-attention
    python -m benchmarks.attention.cpu --tokens 8192 --threads 1

A row's ``density`` is measured: attended over causal key columns (tokens of kept blocks, the local
region, one per block summary). ``ours_s`` is the attention and ``select_s`` what finds and prepares
it: clustering, summaries, estimates, the choice and its lists. Contestants take turns; each gets
the best of its rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.attention import problem as cpu_problem
from benchmarks.attention.flex import Flex
from benchmarks.attention.problem import Estimates, Problem
from prefill_service.attention.report import LayerReport

LONG = 8192
DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)


def dense_gqa(problem: Problem) -> Callable[[], Tensor]:
    """torch's causal SDPA, which repeats the KV heads by itself."""
    q = problem.q[None]
    k = problem.k.contiguous()[None]
    v = problem.v.contiguous()[None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=problem.scale, enable_gqa=True
    )


def dense_expanded(problem: Problem) -> Callable[[], Tensor]:
    """The same over KV heads repeated beforehand; the repetition is a present."""
    group = len(problem.q) // len(problem.k)
    k, v = (x.repeat_interleave(group, 0)[None] for x in (problem.k, problem.v))
    q = problem.q[None]
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=problem.scale
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check(threads: int) -> str:
    """Ours against attention over the same blocks written out in float64."""
    torch.set_num_threads(threads)
    problem = cpu_problem.make(1536 + 300, 8, 2, head_dim=64, chunk=512, seed=1)
    exact = Problem(
        q=problem.q.double(), kv=problem.kv.double(), scale=problem.scale, chunk=problem.chunk
    )
    truth = cpu_problem.estimate_losses(exact)
    found = []
    for made, estimates in ((problem, cpu_problem.estimate_losses(problem)), (exact, truth)):
        epsilon = estimates.epsilon(0.35)
        out, report = cpu_problem.run(made, epsilon, torch.empty_like(made.kv))
        if abs(estimates.density(epsilon) - report.density) > 1e-9:
            raise AssertionError(
                f"density {report.density}, estimated {estimates.density(epsilon)}"
            )
        keeps = [chunk.keep(epsilon) for chunk in estimates.chunks]
        wanted = cpu_problem.reference(exact, truth, keeps)
        found.append(float((out - wanted).norm() / wanted.norm()))
    if found[0] > 1e-5 or found[1] > 1e-12:
        raise AssertionError(f"relative errors against float64 with the same mask: {found}")
    return (
        f"correct: relative error against float64 with the same mask {found[0]:.1e} in float32, "
        f"{found[1]:.1e} in float64, at density {report.density:.2f}"
    )


def prepare_flex(problem: Problem, estimates: Estimates) -> tuple[Flex | None, str]:
    """A compiled FlexAttention, or why there is none."""
    torch.compiler.reset()
    try:
        flex = Flex(problem, estimates)
        mask = flex.mask(estimates.epsilon(1.0 if problem.tokens <= LONG else 0.1))
        start = time.perf_counter()
        out = flex.run(mask)
        taken = time.perf_counter() - start
    except Exception as error:  # a missing or failing C++ compiler shows in many ways
        return None, f"flex_s = null: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if problem.tokens <= LONG:
        off = float((out - dense_gqa(problem)()[0]).abs().max())
        if off > 1e-4:
            raise AssertionError(f"FlexAttention at density 1 is {off} off dense attention")
    return flex, f"compiled in {taken:.0f} s"


def reachable(estimates: Estimates, densities: Sequence[float]) -> dict[float, float]:
    """Epsilon per density; of those below what is kept in any case only the largest.

    The local regions, the previous temporal patch, the sink and the summaries are always attended.
    """
    floor = estimates.density(estimates.epsilon(0.0))
    below = [density for density in densities if density < floor]
    return {d: estimates.epsilon(d) for d in densities if d >= floor or d == max(below)}


DENSE = {"enable_gqa": dense_gqa, "expanded": dense_expanded}


@dataclass(slots=True)
class Timings:
    """Best seconds per contestant (and density); per density the last report, and how many."""

    best: dict[tuple[str, float], float] = field(default_factory=dict)
    reports: dict[float, LayerReport] = field(default_factory=dict)
    rounds: int = 0
    rounds_of: Counter[float] = field(default_factory=Counter)

    def note(self, name: str, density: float, value: float) -> None:
        """Keep the smaller."""
        key = name, density
        self.best[key] = min(value, self.best.get(key, value))

    def get(self, name: str, density: float) -> float | None:
        """Rounded; ``None`` if it did not take part."""
        value = self.best.get((name, density))
        return None if value is None else round(value, 5)


def take_turns(
    problem: Problem,
    epsilons: dict[float, float],
    dense: dict[str, Callable[[], Tensor]],
    *,
    flex: Flex | None,
    options: argparse.Namespace,
) -> Timings:
    """Rounds in which every contestant runs once per density (dense attention once).

    Of long prompts only the first round has the higher densities, which cost minutes.
    """
    masks = {d: flex.mask(epsilon) for d, epsilon in epsilons.items()} if flex else {}
    kv = torch.empty_like(problem.kv)
    found = Timings()
    start = time.perf_counter()
    while found.rounds < options.rounds:
        if found.rounds > 1 and time.perf_counter() - start > options.seconds:
            break
        if found.rounds and problem.tokens > LONG:
            epsilons = {d: epsilon for d, epsilon in epsilons.items() if d <= 0.2}
        found.rounds += 1
        for name, call in dense.items():
            found.note(name, 1.0, seconds(call))
        for density, epsilon in epsilons.items():
            begin = time.perf_counter()
            _, report = cpu_problem.run(problem, epsilon, kv)
            found.note("wall_s", density, time.perf_counter() - begin)
            found.note("ours_s", density, report.attend_s)
            found.note("select_s", density, report.select_s)
            found.note("certify_s", density, report.verify_s)
            found.reports[density] = report
            found.rounds_of[density] += 1
            if flex:
                found.note("flex_s", density, seconds(partial(flex.run, masks[density])))
    return found


def measure(
    problem: Problem, threads: int, options: argparse.Namespace, variants: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of one length and thread count; ``variants`` of dense attention compete."""
    torch.set_num_threads(threads)
    estimates = cpu_problem.estimate_losses(problem)
    epsilons = reachable(estimates, options.densities)
    flex, note = (
        prepare_flex(problem, estimates) if options.flex else (None, "flex_s = null: --no-flex")
    )
    print(f"{problem.tokens} tokens, {threads} threads: FlexAttention {note}", flush=True)
    dense = {name: DENSE[name](problem) for name in variants}
    found = take_turns(problem, epsilons, dense, flex=flex, options=options)
    winner = min(variants, key=lambda name: found.best[name, 1.0])
    dense_s = found.best[winner, 1.0]
    rows = []
    for wanted, epsilon in epsilons.items():
        report = found.reports[wanted]
        ours = found.best["ours_s", wanted]
        select = found.best["select_s", wanted]
        names = ("ours_s", "select_s", "flex_s", "certify_s", "wall_s")
        rows.append(
            {
                "tokens": problem.tokens,
                "density": round(report.density, 4),
                "threads": threads,
                "dense_s": round(dense_s, 5),
                **{name: found.get(name, wanted) for name in names},
                "ratio_attend": round(dense_s / ours * report.density, 3),
                "ratio_total": round(dense_s / (ours + select) * report.density, 3),
                "dense": winner,
                "wanted_density": wanted,
                "epsilon": epsilon,
                "kept_mass": round(report.kept_mass.mean(1.0), 4),
                "rounds": found.rounds_of[wanted],
            }
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention.cpu", description=__doc__.partition("\n")[0]
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=1024, help="queries per call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="no third round after so many")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "attention-cpu.json")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Run, print a table, write the rows and, beside them, the settings."""
    options = parse(arguments)
    header = tables.settings(
        q_heads=options.q_heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype="float32",
        chunk=options.chunk,
        block=cpu_problem.SETTINGS.block_tokens,
        tile=cpu_problem.SETTINGS.tile_tokens,
        segment=cpu_problem.SETTINGS.segment_tokens,
        input="mixture",
    )
    started = time.perf_counter()
    print(check(max(options.threads)), flush=True)
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        problem = cpu_problem.make(
            tokens,
            options.q_heads,
            options.kv_heads,
            head_dim=options.head_dim,
            chunk=options.chunk,
        )
        for threads in options.threads:
            # Above 8K tokens the slower way to run dense attention need not be timed for minutes.
            variants = [rows[-1]["dense"]] if rows and tokens > LONG else list(DENSE)
            rows += measure(problem, threads, options, variants)
            tables.write(options.out, rows)
    header["load_after"] = round(os.getloadavg()[0], 2)
    header["seconds"] = round(time.perf_counter() - started)
    tables.write(options.out.with_suffix(".meta.json"), header)
    columns = ["tokens", "threads", "density", "dense_s", "ours_s", "select_s", "flex_s"]
    columns += ["ratio_attend", "ratio_total", "kept_mass"]
    print()
    print(tables.markdown(columns, [[row[name] for name in columns] for row in rows]))
    print("\nratio_attend = dense_s / ours_s * density (wanted: >= 0.7 from 8K tokens and <= 0.2)")
    print("ratio_total = dense_s / (ours_s + select_s) * density (wanted: >= 0.5 there)")
    print(f"{header['seconds']} s; {len(rows)} rows in {options.out}")


if __name__ == "__main__":
    main()
