"""The keys and values that later chunks attend to, layer by layer, wherever they lie meanwhile.

An exchange asks for one layer at a time. ``ResidentKV`` has all layers on the device;
``kv.offload.OffloadedKV`` has some of them elsewhere and brings each one in time. What computes
cannot tell them apart: the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WorkingShape:
    """Sizes of a working set.

    Attributes:
        layers: that attend.
        tokens: rows of each layer.
        kv_heads, head_dim: of a row, ``[2 (K, V), kv_heads, head_dim]``.
        dtype, device: where it is computed with.
    """

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row(self) -> tuple[int, int, int]:
        """K and V of one token of one layer."""
        return (2, self.kv_heads, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.row) * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer."""
        return self.tokens * self.row_bytes

    def empty(self, *sizes: int) -> Tensor:
        """An uninitialised tensor ``[*sizes, *row]`` on the device."""
        return torch.empty((*sizes, *self.row), dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class WorkingReport:
    """What a working set took.

    Attributes:
        high_water_bytes: most bytes that lay on the device at once.
        offloaded_bytes: bytes whose home is elsewhere at the end.
        moved_bytes: to and from there.
        stalled_s: seconds that computing waited for a layer.
    """

    high_water_bytes: int
    offloaded_bytes: int = 0
    moved_bytes: int = 0
    stalled_s: float = 0.0


class WorkingKV(Protocol):
    """One buffer ``[tokens, 2, kv_heads, head_dim]`` per layer.

    Chunk by chunk, the layers are acquired and released in ascending order, each once; the next
    one may be acquired before the last one is released. A buffer may be used from ``acquire`` to
    ``release`` only; both are called by the thread that computes.
    """

    def start_chunk(self, start: int, end: int) -> None:
        """Rows [start, end) are written next, in every layer; rows before were, in all."""

    def acquire(self, layer: int) -> Tensor:
        """The layer's buffer, its rows before the chunk in place. May wait, and is then measured.

        Raises:
            ServiceError: the layer could not be brought back.
        """

    def layer(self, layer: int) -> Tensor:
        """The buffer of an acquired layer.

        Raises:
            KeyError: it is not acquired.
        """

    def touch(self, layer: int, start: int, end: int) -> None:
        """Note that rows [start, end) before the chunk were changed, too."""

    def release(self, layer: int) -> None:
        """The chunk's rows are complete, and nothing reads or writes the buffer any more."""

    def prefetch(self, layer: int) -> None:
        """Begin to bring a layer. ``acquire`` does so for the next one by itself."""

    def report(self) -> WorkingReport:
        """What it took so far."""

    def close(self) -> None:
        """Wait for what is under way and give everything back. Idempotent."""


class ResidentKV:
    """A working set that fits: all layers on the device. See ``WorkingKV``."""

    def __init__(self, shape: WorkingShape) -> None:
        self._buffers = [shape.empty(shape.tokens) for _ in range(shape.layers)]
        self._bytes = shape.layers * shape.layer_bytes

    def start_chunk(self, start: int, end: int) -> None:
        """See ``WorkingKV``."""

    def acquire(self, layer: int) -> Tensor:
        """See ``WorkingKV``."""
        return self._buffers[layer]

    layer = acquire

    def touch(self, layer: int, start: int, end: int) -> None:
        """See ``WorkingKV``."""

    def release(self, layer: int) -> None:
        """See ``WorkingKV``."""

    def prefetch(self, layer: int) -> None:
        """See ``WorkingKV``."""

    def report(self) -> WorkingReport:
        """See ``WorkingKV``."""
        return WorkingReport(self._bytes)

    def close(self) -> None:
        """See ``WorkingKV``."""
        self._buffers = []
