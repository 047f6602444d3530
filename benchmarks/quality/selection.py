"""Which key blocks to keep: estimators, key orders and rules at equal density.

    make bench-selection
    python -m benchmarks.quality.selection --checkpoint DIR  # a model's queries, keys, values
    python -m benchmarks.quality.selection --kv FILE  # captured before

Every tile of queries (and the heads of its group) keeps some of the key blocks before it and its
local region. Density is the share of blocks kept; what that does to attention is measured on
sampled rows. None of this imports the product's code.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs, tables
from benchmarks.inputs import AttentionInput
from benchmarks.quality import selection_tables
from benchmarks.quality.estimators import ESTIMATORS, ORDERS, Tile, cut, segment_order
from benchmarks.quality.evaluation import Cell, Key, Sample
from benchmarks.quality.rules import RULES, stack
from benchmarks.quality.selection_tables import DENSITIES


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes; see the options of the same names."""

    tile: int
    block: int
    segment: int
    sinks: int
    tiles_per_head: int
    rows_per_tile: int


def tiles_of(source: AttentionInput, order: str, setting: Setting) -> Iterator[Tile]:
    """Tiles spread over the second half of the tokens, of every KV head."""
    tokens = source.q.shape[1]
    starts = torch.linspace(tokens // 2, tokens - setting.tile, setting.tiles_per_head)
    starts = (starts.long() // setting.tile * setting.tile).unique()
    for head in range(len(source.k)):
        segments = source.k[head].split(setting.segment)
        places = source.place.split(setting.segment)
        orders = [
            segment_order(keys, place, order, setting.block) + index * setting.segment
            for index, (keys, place) in enumerate(zip(segments, places, strict=True))
            if len(keys) == setting.segment
        ]
        for start in starts.tolist():
            past = torch.cat([torch.empty(0).long(), *orders[: start // setting.segment]])
            yield cut(source, head, start, tile=setting.tile, block=setting.block, order=past)


@torch.no_grad()
def compare(source: AttentionInput, order: str, setting: Setting) -> dict[Key, Cell]:
    """Estimators and rules at every density, with and without compensation."""
    tiles = list(tiles_of(source, order, setting))
    keeps: list[list[Tensor]] = [[] for _ in tiles]  # per tile, per variant: [blocks]
    estimates: list[list[tuple[float, float]]] = [[] for _ in tiles]  # dropped, compensated
    names: list[tuple[str, str, float]] = []
    for name, estimator in ESTIMATORS.items():
        found = [estimator.estimate(tile) for tile in tiles]
        scores = stack(found, setting.sinks)
        for rule in selection_tables.rules_for(name):
            for density in DENSITIES:
                names.append((name, rule, density))
                _, keep = RULES[rule].match(scores, density)
                for index, estimate in enumerate(found):
                    kept = keep[index, : len(estimate.score)]
                    keeps[index].append(kept)
                    # Only ours says what a summary loses; the others would lose all the mass.
                    lost = float(estimate.mass[~kept].sum()), float(estimate.score[~kept].sum())
                    estimates[index].append((1 - lost[0], max(0.0, 1 - lost[1])))
    cells: dict[Key, Cell] = {}
    for tile, kept_here, estimated in zip(tiles, keeps, estimates, strict=True):
        keep = torch.stack(kept_here)
        sample = Sample(tile, setting.rows_per_tile)
        for compensated in (False, True):
            quality = sample.compensate(keep) if compensated else sample.drop(keep)
            for index, (name, rule, density) in enumerate(names):
                cell = cells.setdefault((name, order, rule, compensated, density), Cell())
                cell.plain.append(quality.plain[:, index])
                cell.kept.append(quality.kept[:, index])
                cell.error.append(float(quality.error[index]))
                cell.estimated.append(estimated[index][compensated])
                cell.blocks.append(keep.shape[1])
                cell.blocks_kept.append(int(keep[index].sum()))
    return cells


def result_rows(cells: dict[Key, Cell], source: str, setting: Setting, group: int) -> list[Any]:
    """One dict per cell, for the result file."""
    rows = []
    for (estimator, order, rule, compensated, wanted), cell in cells.items():
        cost = ESTIMATORS[estimator].cost(setting.tile, setting.block, group)
        rows.append(
            {
                "input": source,
                "estimator": estimator,
                "order": order,
                "rule": rule,
                "summaries": compensated,
                "wanted_density": wanted,
                "cost": round(cost, 6),
                **{name: round(value, 4) for name, value in cell.row().items()},
            }
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.selection", description=__doc__.partition("\n")[0]
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--kv", type=Path, help="file of captured tensors (see --save-kv)")
    source.add_argument("--checkpoint", type=Path, help="Qwen2.5-VL or Qwen3-VL folder to capture")
    parser.add_argument("--patches", type=int, default=512, help="of the video for --checkpoint")
    parser.add_argument("--side", type=int, default=96, help="pixels of its frames")
    parser.add_argument(
        "--save-kv", type=Path, default=Path("build/captured-kv.pt"), help="what it captured"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the synthetic inputs")
    parser.add_argument("--kinds", nargs="+", default=inputs.KINDS, choices=inputs.KINDS)
    parser.add_argument("--tile", type=int, default=128, help="queries per tile")
    parser.add_argument("--block", type=int, default=64, help="keys per block")
    parser.add_argument("--segment", type=int, default=1024, help="keys reordered together")
    parser.add_argument("--sinks", type=int, default=1, help="first blocks, always kept")
    parser.add_argument("--tiles-per-head", type=int, default=6)
    parser.add_argument("--rows-per-tile", type=int, default=64)
    parser.add_argument("--shown-density", type=float, default=0.1, choices=DENSITIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON (default: benchmarks/results/)")
    options = parser.parse_args(arguments)
    if options.tile % 16 or options.block % 16:
        parser.error("--tile and --block must be multiples of 16, the longest stride compared")
    if options.segment % options.block:
        parser.error(f"--segment {options.segment} is no multiple of --block {options.block}")
    return options


def sources(options: argparse.Namespace) -> tuple[str, list[AttentionInput]]:
    """Name for the result file, and the inputs."""
    if options.checkpoint:
        captured = inputs.capture(
            options.checkpoint, patches=options.patches, side=options.side, seed=options.seed
        )
        options.save_kv.parent.mkdir(parents=True, exist_ok=True)
        inputs.save(options.save_kv, captured)
    if options.checkpoint or options.kv:
        # A prefill needs the last layer's keys and values, but not its attention.
        return "selection-trained", inputs.load(options.kv or options.save_kv)[:-1]
    made = [inputs.synthetic(kind, options.tokens, seed=options.seed) for kind in options.kinds]
    return "selection", made


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison, print tables, write the results."""
    options = parse(arguments)
    started = time.perf_counter()
    setting = Setting(
        tile=options.tile,
        block=options.block,
        segment=options.segment,
        sinks=options.sinks,
        tiles_per_head=options.tiles_per_head,
        rows_per_tile=options.rows_per_tile,
    )
    name, found = sources(options)
    group = len(found[0].q) // len(found[0].k)
    total: dict[Key, Cell] = {}
    rows: list[Any] = []
    by_input: dict[str, dict[Key, Cell]] = {}
    for source in found:
        cells: dict[Key, Cell] = {}
        for order in ORDERS:
            cells |= compare(source, order, setting)
        by_input[source.name] = cells
        methods = selection_tables.methods(cells)
        rows += result_rows(methods, source.name, setting, group)
        for key, cell in cells.items():
            total.setdefault(key, Cell()).extend(cell)
    rows = result_rows(total, "all", setting, group) + rows
    costs = {
        name: estimator.cost(setting.tile, setting.block, group)
        for name, estimator in ESTIMATORS.items()
    }
    tokens = found[0].q.shape[1]
    print(
        f"# Block selection: {len(found)} inputs, {tokens} tokens, {len(found[0].q)} query and "
        f"{len(found[0].k)} KV heads, head_dim {found[0].q.shape[2]}, tiles of {setting.tile}, "
        f"blocks of {setting.block}, segments of {setting.segment}\n\n"
        "cost: multiplications of the estimator over those of QK^T. Clustering and summaries cost "
        f"about {48 / (group * tokens):.4f} of causal QK^T, once per key."
    )
    selection_tables.print_estimators(total, costs, options.shown_density)
    selection_tables.print_rules(total)
    selection_tables.print_methods("all inputs", total)
    for input_name, cells in by_input.items():
        selection_tables.print_methods(input_name, cells)
    seconds = round(time.perf_counter() - started, 1)
    header = tables.settings(
        seconds=seconds,
        tokens=tokens,
        q_heads=len(found[0].q),
        kv_heads=len(found[0].k),
        head_dim=found[0].q.shape[2],
        seed=options.seed,
        **asdict(setting),
    )
    out = options.out or tables.RESULTS / f"{name}.json"
    tables.write(out, {"settings": header, "rows": rows})
    print(f"\n{seconds} s; {len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
