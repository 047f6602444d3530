"""Worker processes of one thread each. Not in ``__main__``, which spawned workers cannot import."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.quality.fidelity.scoring import Reader

Work = TypeVar("Work")
Found = TypeVar("Found")


@functools.lru_cache(maxsize=1)
def reader(checkpoint: Path, sparse_from: int) -> Reader:
    """A worker keeps its model."""
    torch.set_num_threads(1)
    return Reader(checkpoint, sparse_from)


def spread(run: Callable[[Work], Found], works: Sequence[Work], workers: int) -> Iterator[Found]:
    """``run`` of each, in order, over processes; in this one if there is to be one."""
    if workers == 1:
        yield from map(run, works)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Reader.__module__])  # which takes longer than many a work
    with context.Pool(workers) as pool:
        yield from pool.imap(run, works)
