"""A working set larger than its bound: rows stored elsewhere, brought to the device in time.

Two buffers of one layer each are on the device: while one layer computes, the next one's rows
arrive in the other (prefetch), after the rows that the layer before has written left it
(write-back). What backs a row is fixed when its chunk begins: the store of the ``CopyEngine``, or
what the bound leaves on the device.

How much of a chunk goes to the store follows SPPO (arXiv 2503.10377): the fraction
``f = min(1, t_compute * B_copy / bytes)`` whose copies hide behind computing, here less those that
the chunks before have committed to, since attention needs all rows again in every chunk. The
bound comes first: what does not fit below it goes to the store, and what that takes is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prefill_service.attention_shape import PromptShape
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import WORKING_SLOTS, KVBudget
from prefill_service.kv.offload.copy_engine import Copy, CopyEngine, HostRows, Mark, Ticket
from prefill_service.kv.offload.cuda_copies import CudaCopyEngine
from prefill_service.kv.offload.file_copies import FileCopyEngine
from prefill_service.kv.offload.offload_report import OffloadReport

_HEADROOM = 0.8
"""Share of the computing that copies may fill: they are not as even as their mean."""


@dataclass(frozen=True, slots=True)
class ChunkCosts:
    """What is known of a chunk when it begins; bytes over all layers.

    Attributes:
        compute_s: expected, 0 if unknown. Later chunks take longer, so the last one's time is safe.
        new_bytes: of the chunk's rows.
        host_bytes, kept_bytes: of the rows before, which all travel once in this chunk.
        host_rate, device_rate: bytes per second to and from the store, and within the device.
    """

    compute_s: float
    new_bytes: int
    host_bytes: int
    kept_bytes: int
    host_rate: float
    device_rate: float


def hidden_share(costs: ChunkCosts) -> float:
    """SPPO's fraction: as much of a chunk as can go to the store while it is computed."""
    spare_s = (
        _HEADROOM * costs.compute_s
        - costs.host_bytes / costs.host_rate
        - costs.kept_bytes / costs.device_rate
    )
    return min(1.0, max(0.0, spare_s * costs.host_rate / costs.new_bytes))


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [start, end) of every layer and what backs them: the store, or ``kept``."""

    start: int
    end: int
    kept: Tensor | None  # [layers, end - start, *row]


def open_working(budget: KVBudget, shape: PromptShape, folder: Path) -> OffloadedKV | None:
    """The working set of one prefix where it has to be offloaded, else nothing.

    Args:
        budget: bound, and whether offloading is configured.
        shape: sizes.
        folder: where a CPU rank's file goes.

    Raises:
        ServiceError: KV_POOL_FULL if not even offloaded it fits, or there is no room for its rows.
    """
    if not budget.offloads(shape.num_tokens):
        return None
    on_gpu = shape.device.type == "cuda"
    engine: CopyEngine = CudaCopyEngine(shape) if on_gpu else FileCopyEngine(shape, folder)
    engine.start()
    try:
        return OffloadedKV(shape, budget.working_bytes, engine)
    except BaseException:
        engine.close()
        raise


class OffloadedKV:
    """A working set of which only part is on the device; an exchange's ``KVBuffers``.

    When copies fail, what it gives is worthless from then on, and ``failure`` says why.

    Args:
        shape: its sizes.
        limit_bytes: bound on what lies on the device.
        engine: copies; closed with this object.
        share: of a chunk, what goes to the store although the bound would leave it room.

    Raises:
        ServiceError: KV_POOL_FULL if ``limit_bytes`` is less than the two buffers.
    """

    resident = False

    def __init__(
        self,
        shape: PromptShape,
        limit_bytes: int,
        engine: CopyEngine,
        share: Callable[[ChunkCosts], float] = hidden_share,
    ) -> None:
        least = WORKING_SLOTS * shape.layer_bytes
        if limit_bytes < least:
            raise ServiceError(
                Reason.KV_POOL_FULL,
                f"{WORKING_SLOTS} layers of {shape.num_tokens} tokens need {least} bytes on the "
                f"device, the limit is {limit_bytes}; raise engine.kv_working_bytes",
                needed_bytes=least,
                pool_bytes=limit_bytes,
            )
        self._shape = shape
        self._engine = engine
        self._share = share
        self._free = [shape.empty(shape.num_tokens) for _ in range(WORKING_SLOTS)]
        self._stored = 0  # rows that the store backs
        self._room = limit_bytes - least  # for rows that are kept on the device
        self._bytes = least
        self._buffers: dict[int, Tensor] = {}
        self._arriving: dict[int, Ticket] = {}
        self._wanted: int | None = None
        self._runs: list[_Run] = []
        self._done = [0] * shape.attending_layers  # rows that are in their backing
        self._touched: dict[int, tuple[int, int]] = {}
        self._chunk = (0, 0)
        self._resumed: Mark | None = None
        self._spans: list[tuple[Mark, Mark]] = []  # of computing, between two layers' waits

    def start_chunk(self, start: int, end: int) -> None:
        compute_s = self._expected_seconds(end - start)
        self._resumed = None
        self._spans = []
        self._chunk = (start, end)
        self._settle(start, end, compute_s)

    def acquire(self, layer: int) -> Tensor:
        if self._resumed is not None:
            self._spans.append((self._resumed, self._engine.mark()))
        self._fetch(layer)
        ticket = self._arriving.pop(layer, None)
        if ticket is not None:
            self._engine.wait(ticket)
        following = (layer + 1) % self._shape.attending_layers
        if following or self._chunk[1] < self._shape.num_tokens:
            self.prefetch(following)
        self._resumed = self._engine.mark()
        return self._buffers[layer]

    def layer(self, layer: int) -> Tensor:
        return self._buffers[layer]

    def touch(self, layer: int, start: int, end: int) -> None:
        first, last = self._touched.get(layer, (start, end))
        self._touched[layer] = (min(first, start), max(last, end))

    def release(self, layer: int) -> None:
        buffer = self._buffers.pop(layer)
        start, end = self._chunk
        copies = self._copies(layer, buffer, start, end, to_device=False)
        if layer in self._touched:
            first, last = self._touched.pop(layer)
            copies += self._copies(layer, buffer, first, min(last, start), to_device=False)
        if end < self._shape.num_tokens:  # after the last chunk nobody wants them
            self._engine.submit(copies)
        self._done[layer] = end
        self._free.append(buffer)  # copies happen in order: the next rows come after these went
        if self._wanted is not None:
            self.prefetch(self._wanted)

    def prefetch(self, layer: int) -> None:
        """Begin to bring a layer; without a free buffer, as soon as there is one."""
        if layer in self._buffers:
            return
        self._wanted = layer
        if self._free:
            self._fetch(layer)

    @property
    def failure(self) -> ServiceError | None:
        """Why rows no longer travel."""
        return self._engine.failure

    def report(self) -> OffloadReport:
        """What it took so far; also after ``close``."""
        return OffloadReport(
            high_water_bytes=self._bytes,  # kept rows are never given back before the end
            offloaded_bytes=self._stored * self._shape.attending_layers * self._shape.row_bytes,
            moved_bytes=self._engine.moved_bytes,
            stalled_s=self._engine.stalled_s,
        )

    def close(self) -> None:
        self._engine.close()
        self._buffers = {}
        self._free = []
        self._runs = []

    # ---- steps -----------------------------------------------------------------------------

    def _expected_seconds(self, rows: int) -> float:
        """Seconds that so many rows will take to compute, from the last chunk's; 0 without one."""
        last = self._chunk[1] - self._chunk[0]
        if not last or not self._spans:
            return 0.0
        seconds = sum(self._engine.seconds(a, b) for a, b in self._spans)
        return seconds * self._shape.attending_layers / len(self._spans) * min(1.0, rows / last)

    def _settle(self, start: int, end: int, compute_s: float) -> None:
        """Decide what backs the chunk's rows."""
        row_bytes = self._shape.attending_layers * self._shape.row_bytes
        kept = sum(run.end - run.start for run in self._runs if run.kept is not None)
        costs = ChunkCosts(
            compute_s,
            new_bytes=(end - start) * row_bytes,
            host_bytes=(start - kept) * row_bytes,
            kept_bytes=kept * row_bytes,
            host_rate=self._engine.host_rate.read(),
            device_rate=self._engine.device_rate.read(),
        )
        stored = round(self._share(costs) * (end - start))
        stored = max(stored, end - start - self._room // row_bytes)
        self._stored += stored
        if stored:
            first = start
            if self._runs and self._runs[-1].kept is None:
                first = self._runs.pop().start
            self._runs.append(_Run(first, start + stored, None))
        if start + stored < end:
            rows = end - start - stored
            self._runs.append(
                _Run(start + stored, end, self._shape.empty(self._shape.attending_layers, rows))
            )
            self._room -= rows * row_bytes
            self._bytes += rows * row_bytes

    def _fetch(self, layer: int) -> None:
        """Let the layer's rows begin to arrive, unless they have."""
        if layer in self._buffers:
            return
        if not self._free:
            raise RuntimeError(
                f"layer {layer} is wanted while {sorted(self._buffers)} are acquired; "
                f"{WORKING_SLOTS} at a time"
            )
        if self._wanted == layer:
            self._wanted = None
        buffer = self._buffers[layer] = self._free.pop()
        copies = self._copies(layer, buffer, 0, self._done[layer], to_device=True)
        self._arriving[layer] = self._engine.submit(copies)

    def _copies(
        self, layer: int, buffer: Tensor, start: int, end: int, *, to_device: bool
    ) -> list[Copy]:
        """The copies between rows [start, end) of a buffer and their backing."""
        copies: list[Copy] = []
        for run in self._runs:
            a = max(start, run.start)
            b = min(end, run.end)
            if a >= b:
                continue
            backing: HostRows | Tensor = HostRows(layer, a, b)
            if run.kept is not None:
                backing = run.kept[layer, a - run.start : b - run.start]
            copies.append(Copy(buffer[a:b], backing, to_device))
        return copies
