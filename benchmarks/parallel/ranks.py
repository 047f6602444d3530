"""Ranks for benchmarks: spawned on one machine, their results collected."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefill_service.parallel.process_group import form_group

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Transport:
    """How ranks of one machine are connected.

    Attributes:
        name: for people.
        device: ``cpu`` or ``cuda``; rank r takes GPU ``r % gpus``.
        staged: see ``SPGroup``.
        gpus: that the ranks share.
    """

    name: str
    device: str
    staged: bool = False
    gpus: int = 1


def transports(device: str) -> list[Transport]:
    """Those that this machine can test: gloo on CPU; through the host, and NCCL, on CUDA.

    Staged ranks copy on a CPU as well, so that this path is tested without a GPU, too.
    """
    if device == "cpu":
        return [Transport("gloo", "cpu"), Transport("gloo, staged", "cpu", staged=True)]
    gpus = torch.cuda.device_count()
    found = [Transport("staged, 1 GPU", "cuda", staged=True)]
    return [*found, Transport("nccl", "cuda", gpus=gpus)] if gpus > 1 else found


def run_ranks(work: Callable[..., Any], ranks: int, transport: Transport, *arguments: Any) -> Any:
    """``work(group, device, *arguments)`` on each rank; what each returned.

    Raises:
        RuntimeError: what ranks failed with.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sp-ranks-") as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_run,
                args=(work, arguments),
                kwargs={"rank": rank, "ranks": ranks, "folder": folder, "transport": transport},
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        errors = sorted(folder.glob("error-*"))
        if errors:
            raise RuntimeError("\n".join(f"{file.name}: {file.read_text()}" for file in errors))
        if dead := [process.exitcode for process in processes if process.exitcode]:
            raise RuntimeError(f"ranks ended with {dead}")
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _run(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    rank: int,
    ranks: int,
    folder: Path,
    transport: Transport,
) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if transport.device == "cuda":
        device = torch.device("cuda", rank % transport.gpus)
        torch.cuda.set_device(device)
    try:
        group = form_group(
            rank,
            ranks,
            init_method=f"file://{folder}/rendezvous",
            device=device,
            timeout_s=TIMEOUT_S,
            staged=transport.staged,
        )
        torch.save(work(group, device, *arguments), folder / f"rank-{rank}.pt")
    except Exception:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    # No tear-down, like the service's ranks: it aborts where a peer is through with its own.
    os._exit(0)
