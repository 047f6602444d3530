"""The keys and values that later chunks attend to, layer by layer, wherever they lie meanwhile.

An exchange asks for one layer at a time. ``ResidentKV`` has all of them on the device;
``kv.offload.OffloadedKV`` has some elsewhere and brings each one in time. What computes cannot tell
them apart: the bits are the same.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from typing_extensions import override

from prefill_service.attention_shape import PromptShape


class KVBuffers(Protocol):
    """One buffer ``[tokens, 2, kv_heads, head_dim]`` per layer.

    Chunk by chunk, the layers are acquired and released in ascending order, each once; the next
    one may be acquired before the last one is released. A buffer may be used from ``acquire`` to
    ``release`` only; both are called by the thread that computes.
    """

    @property
    def resident(self) -> bool:
        """Any number of layers may be acquired, any number of times, and none need be released."""

    def start_chunk(self, start: int, end: int) -> None:
        """Rows [start, end) are written next, in every layer; rows before were, in all."""

    def acquire(self, layer: int) -> Tensor:
        """The layer's buffer, its rows before the chunk in place. May wait; that is measured."""

    def layer(self, layer: int) -> Tensor:
        """The buffer of an acquired layer.

        Raises:
            KeyError: it is not acquired.
        """

    def touch(self, layer: int, start: int, end: int) -> None:
        """Note that rows [start, end) before the chunk were changed, too."""

    def release(self, layer: int) -> None:
        """The chunk's rows are complete, and nothing reads or writes the buffer any more."""

    def close(self) -> None:
        """Wait for what is under way and give everything back. Idempotent."""


class ResidentKV(KVBuffers):
    """KV buffers that fit: all layers stay on the device."""

    @property
    @override
    def resident(self) -> bool:
        return True

    def __init__(self, shape: PromptShape) -> None:
        self._buffers = [shape.empty(shape.num_tokens) for _ in range(shape.attending_layers)]

    @override
    def start_chunk(self, start: int, end: int) -> None:
        pass

    @override
    def acquire(self, layer: int) -> Tensor:
        return self._buffers[layer]

    @override
    def layer(self, layer: int) -> Tensor:
        return self._buffers[layer]

    @override
    def touch(self, layer: int, start: int, end: int) -> None:
        pass

    @override
    def release(self, layer: int) -> None:
        pass

    @override
    def close(self) -> None:
        self._buffers = []
