"""Blocks on sequence parallelism: bytes by exchange, load balance, projections."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.report.results import content, one, rows, seconds
from prefill_service.parallel.exchanges.catalog import EXCHANGES

_SHOWN = ("zigzag ring", "Spava", "ours: gather, sparse", "ours: demand, sparse")


def exchanges() -> str:
    """Every exchange, from the catalogue: what it moves and keeps, who published it."""
    header = (
        "exchange",
        "what moves",
        "bytes, one chunk",
        "in more chunks",
        "K and V on a rank",
        "sparse",
        "published",
    )
    return tables.markdown(
        header,
        [
            [
                f"`{kind.name}`",
                kind.description,
                kind.bytes_received,
                kind.more_chunks,
                kind.keeps,
                "yes" if kind.sparse else "",
                kind.paper,
            ]
            for kind in EXCHANGES
        ],
    )


def bytes_by_exchange() -> str:
    """Megabytes that all ranks receive, by quality and exchange."""
    found = rows("sp-sparse")
    measured = dict.fromkeys(row["exchange"] for row in found)
    lines = []
    for quality in dict.fromkeys(row["quality"] for row in found):
        cells = {name: one(found, quality=quality, exchange=name) for name in measured}
        gather = cells["gather"]
        assert gather is not None
        received = [f"{row['mb']:.1f}" if row else "" for row in cells.values()]
        lines.append([f"`{quality}`", f"{gather['density']:.2f}", *received])
    header = ("quality", "density", *(f"`{name}`, MB" for name in measured))
    return tables.markdown(header, lines)


def balance() -> str:
    """What it gains that ranks attend to one another's kept blocks."""
    header = (
        "busy units",
        "density",
        "imbalance before",
        "after",
        "seconds before",
        "after",
        "times as fast",
    )
    return tables.markdown(
        header,
        [
            [
                row["busy"],
                f"{row['density']:.2f}",
                f"{row['rho_before']:.2f}",
                f"{row['rho']:.2f}",
                seconds(row["seconds"]),
                seconds(row["seconds_balanced"]),
                f"{row['gain']:.2f}",
            ]
            for row in rows("sp-balance")
        ],
    )


def checked() -> str:
    """Measured bytes against the formulas, and how well the work model predicts CPU time."""
    found = content("sp-scaling")
    runs = found["checked"]
    equal = sum(row["bytes"] == row["formula"] for row in runs)
    lines = [[f"{ranks}", text] for ranks, text in found["prediction_errors"].items()]
    return (
        f"{equal} of {len(runs)} runs on 1 to 4 ranks received exactly the bytes of the formulas, "
        "rank by rank.\n\n"
        + tables.markdown(("ranks", "CPU time of the busiest rank, against the work model"), lines)
    )


def projected() -> str:
    """Seconds on GPUs by the work model; every rate is assumed, none measured."""
    found = content("sp-scaling")["projected_not_measured"]
    lines = []
    for machine, model, tokens in dict.fromkeys(
        (row["machine"], row["model"], row["tokens"]) for row in found
    ):
        cells = [
            row
            for row in found
            if (row["machine"], row["model"], row["tokens"]) == (machine, model, tokens)
        ]
        fitting = [row for row in cells if row["fits"] == "yes"]
        ours = [row for row in fitting if row["contestant"].startswith("ours")]
        best = min(ours, key=lambda row: float(row["seconds"]))
        lines.append(
            [
                machine,
                model,
                f"{tokens:,}",
                *(
                    seconds(row["seconds"]) if (row := one(fitting, contestant=name)) else ""
                    for name in _SHOWN
                ),
                f"{best['contestant'].removeprefix('ours: ')}: {seconds(best['seconds'])}",
            ]
        )
    header = ("machine", "model", "tokens", *_SHOWN, "fastest of ours that fits")
    return tables.markdown(header, lines)


def assumed() -> str:
    """What the projections assume."""
    return "\n".join(f"* {sentence}" for sentence in content("sp-scaling")["assumed"])
