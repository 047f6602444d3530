"""When a rank did what: spans, noted while a task runs and sent with its end.

Times are seconds of CLOCK_MONOTONIC, which is what ``time.perf_counter`` and ``time.monotonic``
read on Linux, and which all processes of a host share: spans of ranks and of the front end go on
one time line. They are the host's: on CUDA a slice says when work was launched and waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

MAX_SPANS = 8192
"""Per task and rank; further ones are counted, not kept. Two thousand chunks fit."""

MAX_LAYER_SPANS = 512
"""Chunks times groups of layers: beyond that, groups are more than one layer."""

Amount = int | float


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took a while.

    Attributes:
        row: where it is drawn, e.g. "decode"; spans of a row follow each other or are nested.
        name: what it was.
        start, end: seconds of CLOCK_MONOTONIC.
        args: amounts by name.
    """

    row: str
    name: str
    start: float
    end: float
    args: dict[str, Amount]


@dataclass(slots=True)
class SpanBuffer:
    """Spans of one task on one rank. Several threads may note them.

    Attributes:
        dropped: how many did not fit.
    """

    limit: int = MAX_SPANS
    dropped: int = 0
    _spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, row: str, name: str, start: float, **args: Amount) -> None:
        """Note what began at ``start`` and ends now."""
        span = Span(row, name, start, time.perf_counter(), args)
        with self._lock:
            if len(self._spans) < self.limit:
                self._spans.append(span)
            else:
                self.dropped += 1

    def spans(self) -> tuple[Span, ...]:
        """All of them, by their start; enclosing ones first. The last one says what is missing."""
        with self._lock:
            found = sorted(self._spans, key=lambda span: (span.start, -span.end))
            if self.dropped:
                end = max(span.end for span in found)
                found.append(Span("missing", f"{self.dropped} slices not kept", end, end, {}))
            return tuple(found)


class Meter(Protocol):
    """``parallel.meter.CommStats``."""

    @property
    def bytes_received(self) -> int:
        """So far."""

    @property
    def seconds(self) -> float:
        """So far."""


class LayerSpans:
    """What a chunk's prefill is made of: its layers, or groups of them, and their attention.

    Args:
        spans: takes them.
        meter: of the rank's collectives.
        row: the row of the chunk's own span, which encloses them.
        layers, chunks: of the model and of the task; they decide how fine the spans are.
    """

    def __init__(self, spans: SpanBuffer, meter: Meter, row: str, layers: int, chunks: int) -> None:
        self._spans, self._meter, self._row, self._layers = spans, meter, row, layers
        self._group = max(1, -(-layers * chunks // MAX_LAYER_SPANS))
        self._first: int | None = None
        self._start = self._attend_s = self._exchange_s = 0.0
        self._bytes = 0

    def enter(self, layer: int) -> None:
        """The keys of ``layer`` are there: the group before it, if it was one, has ended."""
        if self._first is not None and layer % self._group:
            return
        self.leave(layer)
        self._first, self._start, self._attend_s = layer, time.perf_counter(), 0.0
        self._bytes, self._exchange_s = self._meter.bytes_received, self._meter.seconds

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Time the attention of the layer that was entered last."""
        start = time.perf_counter()
        yield
        self._attend_s += time.perf_counter() - start
        if self._group == 1:
            self._spans.note(self._row, "attend", start)

    def leave(self, end: int | None = None) -> None:
        """The chunk has ended, or the layers before ``end`` have."""
        if self._first is None:
            return
        last = (self._layers if end is None else end) - 1
        name = f"layer {last}" if last == self._first else f"layers {self._first}-{last}"
        self._spans.note(
            self._row,
            name,
            self._start,
            attend_ms=_ms(self._attend_s),
            exchange_ms=_ms(self._meter.seconds - self._exchange_s),
            bytes_received=self._meter.bytes_received - self._bytes,
        )
        self._first = None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
