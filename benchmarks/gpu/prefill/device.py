"""What differs between a GPU and the CPU of a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 3


@dataclass(frozen=True, slots=True)
class Device:
    """A device with its clock and its memory."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, which a CPU only crawls with."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def wait(self) -> None:
        """Until everything asked of it is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Free what is not in use, and count the memory's peak from here on."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Most memory allocated since ``forget``; a CPU does not say."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    def seconds(self, call: Callable[[], object]) -> float:
        """The fastest of some calls, after one that warms up."""
        best = float("inf")
        for turn in range(1 + TURNS):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if turn:
                best = min(best, time.perf_counter() - start)
        return best

    def matmul_peak(self, size: int) -> float:
        """FLOP/s of a product of two random square matrices, as it is used: ten in a row."""
        a, b = (self._random(size, size) for _ in range(2))
        out = torch.empty_like(a)
        turns = 10

        def multiply() -> None:
            for _ in range(turns):
                torch.mm(a, b, out=out)

        return 2 * size**3 * turns / self.seconds(multiply)

    def matmul_rate(self, rows: int, inner: int, columns: int) -> float:
        """FLOP/s of ``x @ w.T`` with x [rows, inner] and w [columns, inner], a layer's product."""
        x = self._random(rows, inner)
        w = self._random(columns, inner)
        return 2 * rows * inner * columns / self.seconds(lambda: torch.nn.functional.linear(x, w))

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self.dtype, device=self.device)
