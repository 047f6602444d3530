"""Seconds of consecutive steps, on the device that takes them."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Laps with names. On CUDA a lap is a pair of events, read only when asked for.

    Args:
        device: whose time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """What was done since the last mark was ``name``."""
        self._marks.append((name, self._now()))

    def seconds(self, name: str) -> float:
        """Sum of the laps of that name; on CUDA this waits for them."""
        total = 0.0
        for (_, start), (lap, end) in zip(self._marks, self._marks[1:], strict=False):
            if lap != name:
                continue
            if isinstance(start, float) and isinstance(end, float):
                total += end - start
            elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                total += start.elapsed_time(end) / 1000
        return total

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
