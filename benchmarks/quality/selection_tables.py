"""The tables that ``benchmarks.quality.selection`` prints."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.quality.estimators import ORACLE, ORDERS, OURS
from benchmarks.quality.evaluation import Cell, Key
from benchmarks.quality.rules import LOSS_BUDGET, RULES

DENSITIES = (0.05, 0.1, 0.2, 0.35)
# What the literature combines, as far as the three parts go, and ours: label, estimator, key
# order, rule, compensation with summaries.
METHODS = (
    ("pooled, fixed budget", "pooled q x pooled k", "raster", "fixed budget", False),
    ("FlashPrefill", "queries x pooled k", "raster", "max-relative", False),
    ("VecAttention (blocks)", "pooled q x keys", "raster", "max-relative", False),
    ("XAttention S=8", "antidiagonal S=8", "raster", "top-p", False),
    ("MMInference-like grid", "antidiagonal S=8", "grid", "top-p", False),
    ("Quest", "queries x min/max bound", "raster", "fixed budget", False),
    ("oracle, raster, dropped", ORACLE, "raster", "top-p", False),
    ("oracle, clustered, dropped", ORACLE, "clustered", "top-p", False),
    ("ours without summaries", OURS, "clustered", LOSS_BUDGET, False),
    ("ours in raster order", OURS, "raster", LOSS_BUDGET, True),
    ("ours with Quest's bound", "queries x min/max bound", "clustered", "fixed budget", True),
    ("ours", OURS, "clustered", LOSS_BUDGET, True),
)


def methods(cells: dict[Key, Cell]) -> dict[Key, Cell]:
    """The cells of whole methods."""
    return {
        (*method[1:], density): cells[*method[1:], density]
        for method in METHODS
        for density in DENSITIES
    }


def rules_for(estimator: str) -> list[str]:
    """What is measured: a fixed budget for all, the rules of the methods, and all on ours."""
    if estimator == OURS:
        return list(RULES)
    used = {rule for _, name, _, rule, _ in METHODS if name == estimator}
    return [rule for rule in RULES if rule in used | {"fixed budget"}]


def print_estimators(total: dict[Key, Cell], costs: dict[str, float], density: float) -> None:
    """Estimators and orders at equal budgets per tile."""
    print(f"\n## Estimators and key orders: fixed budget of {density:g} of the blocks per tile\n")
    rows = []
    for order in ORDERS:
        for name, cost in costs.items():
            drop, stay = (
                total[name, order, "fixed budget", summaries, density].row()
                for summaries in (False, True)
            )
            rows.append(
                [
                    order,
                    name,
                    f"{cost:.4f}",
                    drop["kept_mass"],
                    drop["kept_mass_p5"],
                    drop["estimated_kept_mass"],
                    drop["output_error"],
                    stay["kept_mass"],
                    stay["kept_mass_p5"],
                    stay["estimated_kept_mass"] if name == OURS else None,
                    stay["output_error"],
                ]
            )
    columns = ("kept mass", "p5", "estimated", "error")
    header = [
        "order",
        "estimator",
        "cost",
        *(f"{name}, dropped" for name in columns),
        *(f"{name}, summaries" for name in columns),
    ]
    print(tables.markdown(header, rows))


def print_rules(total: dict[Key, Cell]) -> None:
    """Rules on our estimator."""
    print("\n## Rules, on our estimator in clustered order, dropped blocks as summaries\n")
    rows = []
    for rule in RULES:
        for density in DENSITIES:
            row = total[OURS, "clustered", rule, True, density].row()
            rows.append([rule, *row.values()])
    header = ["rule", "density", "kept mass", "p5", "block mass", "estimated", "error"]
    print(tables.markdown(header, rows))


def print_methods(title: str, cells: dict[Key, Cell]) -> None:
    """Whole methods: kept mass / 5th percentile / output error at every density."""
    print(f"\n## Whole methods on {title}: kept mass / 5th percentile / output error\n")
    rows = []
    for label, estimator, order, rule, summaries in METHODS:
        found = [cells[estimator, order, rule, summaries, density].row() for density in DENSITIES]
        rows.append(
            [
                label,
                *(
                    "{kept_mass:.3f} / {kept_mass_p5:.3f} / {output_error:.3f}".format_map(row)
                    for row in found
                ),
            ]
        )
    print(tables.markdown(["method", *(f"density {density:g}" for density in DENSITIES)], rows))
