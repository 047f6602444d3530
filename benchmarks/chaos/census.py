"""The processes of a service by kind, with their memory and descriptors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

FRONT_END = "front end"
FORK_SERVER = "fork server"
RANK = "rank"
DECODER = "decoder"
VLLM = "vLLM API server"
ENGINE = "vLLM engine"
VLLM_WORKER = "vLLM worker"
OTHER = "other"
KINDS = (FRONT_END, FORK_SERVER, RANK, VLLM, ENGINE, VLLM_WORKER, DECODER)

_MARKS = (
    ("prefill_service.engine.worker", RANK),
    ("prefill_service.video.decoder.child", DECODER),
    ("prefill_service.generation.vllm_server", VLLM),
    ("VLLM::EngineCore", ENGINE),
    ("VLLM::Worker", VLLM_WORKER),
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory and descriptors of one process, or the sum of several.

    Attributes:
        processes: how many.
        rss: resident bytes; what several share counts in each.
        pss: proportional bytes; what n share counts a n-th in each.
        private: anonymous bytes, proportional: what a leak of the program's own would raise.
        shared: bytes of shared memory, proportional: KV pages among them.
        descriptors: open files, sockets and pipes.
        threads: of the processes.
    """

    processes: int = 0
    rss: int = 0
    pss: int = 0
    private: int = 0
    shared: int = 0
    descriptors: int = 0
    threads: int = 0

    def plus(self, other: Memory) -> Memory:
        """The sum of both."""
        mine = asdict(self)
        return Memory(**{name: mine[name] + value for name, value in asdict(other).items()})


def processes_by_kind(root: int) -> dict[str, list[int]]:
    """Process ids of a service by ``KINDS``; what else it has started is ``OTHER``."""
    found: dict[str, list[int]] = {kind: [] for kind in (*KINDS, OTHER)}
    with contextlib.suppress(psutil.NoSuchProcess):
        waiting = [psutil.Process(root)]
        while waiting:
            process = waiting.pop()
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found[_kind(process, root)].append(process.pid)
                waiting += process.children()
    return {kind: sorted(pids) for kind, pids in found.items()}


def _kind(process: psutil.Process, root: int) -> str:
    if process.pid == root:
        return FRONT_END
    words = process.cmdline()
    if "--fork-server" in words and process.ppid() == root:
        return FORK_SERVER  # whose command line all that it has forked have too
    return next((kind for mark, kind in _MARKS if any(mark in word for word in words)), OTHER)


def memory_of(pids: Sequence[int]) -> Memory:
    """Memory of those that are still there."""
    total = Memory()
    for pid in pids:
        with contextlib.suppress(OSError):
            total = total.plus(_memory(Path(f"/proc/{pid}")))
    return total


def _memory(folder: Path) -> Memory:
    fields: dict[str, int] = {}
    for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        fields[name] = int(size) << 10
    return Memory(
        processes=1,
        rss=fields["Rss:"],
        pss=fields["Pss:"],
        private=fields["Pss_Anon:"],
        shared=fields["Pss_Shmem:"],
        descriptors=len(list((folder / "fd").iterdir())),
        threads=len(list((folder / "task").iterdir())),
    )


def memory_by_kind(root: int) -> dict[str, dict[str, Any]]:
    """``Memory`` of every kind of process, as JSON has it, and the process ids."""
    return {
        kind: {**asdict(memory_of(pids)), "pids": pids}
        for kind, pids in processes_by_kind(root).items()
    }
