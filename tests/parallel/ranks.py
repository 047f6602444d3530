"""Real gloo ranks for tests: spawned, joined, their results collected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefill_service.parallel.process_group import SPGroup, form_group
from tests.support.prepared_processes import prepared_processes

TIMEOUT_S = 60.0


def run_ranks(work: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """``work(group, *arguments)`` on ``size`` ranks; what each returned (saved with torch)."""
    context = prepared_processes()
    processes = [
        context.Process(target=_run, args=(work, rank, size, folder, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def _run(
    work: Callable[..., Any], rank: int, size: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    group: SPGroup = form_group(
        rank,
        size,
        init_method=f"file://{folder}/rendezvous",
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
    )
    torch.save(work(group, *arguments), folder / f"rank-{rank}.pt")
    # No tear-down, like the service's ranks: it aborts where a peer is through with its own.
    os._exit(0)
