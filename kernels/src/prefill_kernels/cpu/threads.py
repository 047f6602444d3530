"""Independent pieces of work side by side on a CPU's cores, each piece on one of them.

torch divides every single operator among its threads. Attention in pieces is many operators of
tens of microseconds to a millisecond, and waking threads for each costs more than they gain: with
two threads block-sparse attention was slower than with one. Here a thread takes a whole piece.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def parallel_for(work: Callable[[T, int], None], pieces: Sequence[T]) -> None:
    """Call ``work(piece, worker)`` for every piece, on as many threads as torch has here.

    Workers count from 0; what two of them write must not overlap. The first error is raised, when
    all have ended. Inside ``work`` torch has one thread, so that a ``parallel_for`` in it
    goes piece by piece.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(pieces))
    if workers <= 1:
        for piece in pieces:
            work(piece, 0)
        return
    todo = deque(pieces)
    inference = torch.is_inference_mode_enabled()

    def run(worker: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(inference):  # which threads do not inherit
            while todo:
                try:
                    piece = todo.popleft()
                except IndexError:  # another one has taken the last
                    return
                work(piece, worker)

    try:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(run, worker) for worker in range(workers)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # MKL's number is the process's
