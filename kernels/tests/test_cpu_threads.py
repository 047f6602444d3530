"""Pieces of work on several threads: all of them, once, with one torch thread each."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from prefill_kernels.cpu.threads import parallel_for


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_every_piece_once(threads: int, count: int) -> None:
    done: list[tuple[int, int]] = []
    inside: set[int] = set()

    def work(piece: int, worker: int) -> None:
        inside.add(torch.get_num_threads())
        done.append((piece, worker))

    parallel_for(work, range(count))
    assert sorted(piece for piece, _ in done) == list(range(count))
    assert {worker for _, worker in done} <= set(range(threads))
    assert torch.get_num_threads() == threads
    if count > 1:
        assert inside == {1}


def test_they_run_side_by_side() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=30)
    try:
        parallel_for(lambda piece, worker: meeting.wait() and None, [0, 1])
    finally:
        torch.set_num_threads(before)
    assert not meeting.broken


def test_inference_mode_goes_along(threads: int) -> None:
    with torch.inference_mode():
        made = torch.zeros(4)  # cannot be written to outside

        def work(piece: int, _: int) -> None:
            made[piece] = piece

        parallel_for(work, range(4))
    assert made.tolist() == [0, 1, 2, 3]


def test_an_error_is_raised(threads: int) -> None:
    def work(piece: int, _: int) -> None:
        if piece == 2:
            raise ValueError("piece 2")

    with pytest.raises(ValueError, match="piece 2"):
        parallel_for(work, range(5))
    assert torch.get_num_threads() == threads
