"""The copy engine of CUDA ranks: a stream of its own and page-locked host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention_shape import PromptShape
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.offload.copy_engine import Copy, CopyEngine, Mark, Ticket, probe


@dataclass(frozen=True, slots=True, eq=False)
class _Event(Ticket, Mark):
    event: torch.cuda.Event


class CudaCopyEngine(CopyEngine):
    """Rows in page-locked memory, copied on a side stream. The host never waits for a copy.

    Speeds are those of the probe: a copy engine of a GPU shares its link with little else.

    Args:
        shape: of the working set; ``start`` locks host memory for the whole of it.
    """

    def __init__(self, shape: PromptShape) -> None:
        super().__init__()
        self._shape = shape
        self._device = shape.device
        self._stream = torch.cuda.Stream(shape.device)
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._rows: Tensor | None = None

    @override
    def start(self) -> Self:
        """Lock the memory and begin.

        Raises:
            ServiceError: KV_POOL_FULL if so much memory cannot be had or locked.
        """
        shape = self._shape
        # torch's pinned allocator rounds up to a power of two; this much memory must be exact.
        size = (shape.attending_layers, shape.num_tokens, *shape.row)
        num_bytes = shape.attending_layers * shape.layer_bytes
        try:
            self._rows = torch.empty(size, dtype=shape.torch_dtype)
        except RuntimeError as error:
            raise _no_memory(num_bytes, str(error)) from error
        cudart: Any = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(self._rows.data_ptr(), num_bytes, 0))
        if code:
            raise _no_memory(num_bytes, f"cudaHostRegister gives error {code}")
        probe(self, shape)
        self._stalls.clear()
        return self

    @override
    def submit(self, copies: Sequence[Copy]) -> Ticket:
        assert self._rows is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy in copies:
                backing = copy.backing
                if not isinstance(backing, Tensor):
                    backing = self._rows[backing.layer, backing.start : backing.end]
                    self.moved_bytes += copy.num_bytes
                target, source = (copy.rows, backing) if copy.to_device else (backing, copy.rows)
                target.copy_(source, non_blocking=True)
        return _Event(self._record(self._stream))

    @override
    def wait(self, ticket: Ticket) -> None:
        # The stream that computes waits, the host goes on.
        assert isinstance(ticket, _Event)
        computing = torch.cuda.current_stream(self._device)
        before = self._record(computing)
        computing.wait_event(ticket.event)
        self._stalls.append((before, self._record(computing)))

    @override
    def mark(self) -> Mark:
        return _Event(self._record(torch.cuda.current_stream(self._device)))

    @override
    def seconds(self, start: Mark, end: Mark) -> float:
        # Waits until the computing has got there.
        assert isinstance(start, _Event)
        assert isinstance(end, _Event)
        return _seconds(start.event, end.event)

    @property
    @override
    def stalled_s(self) -> float:
        return sum(_seconds(before, after) for before, after in self._stalls)

    @override
    def close(self) -> None:
        if self._rows is None:
            return
        self._stream.synchronize()
        cudart: Any = torch.cuda.cudart()
        cudart.cudaHostUnregister(self._rows.data_ptr())
        self._rows = None

    def _record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _no_memory(num_bytes: int, why: str) -> ServiceError:
    return ServiceError(
        Reason.KV_POOL_FULL,
        f"no page-locked memory for {num_bytes} bytes of offloaded KV: {why}",
        needed_bytes=num_bytes,
    )
