"""When a rank did what: its progress in each stage, and spans, which are sent when a task ends.

Times are seconds of CLOCK_MONOTONIC, which is what ``time.perf_counter`` and ``time.monotonic``
read on Linux, and which all processes of a host share: spans of ranks and of the front end go on
one time line. They are the host's: on CUDA a span says when work was launched and waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from prefill_service.parallel.comm_stats import CommStats

MAX_SPANS = 8192
"""Spans kept per task and rank; further ones are only counted. Two thousand chunks fit."""

MAX_LAYER_SPANS = 512
"""Spans of layers per task: where chunks times layers exceed it, a span covers several layers."""

_PROGRESS_INTERVAL_S = 0.2

Amount = int | float


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of work with its start and end.

    Attributes:
        row: where it is drawn, e.g. "decode"; spans of a row follow each other or are nested.
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
        span = Span(row=row, name=name, start=start, end=time.perf_counter(), args=args)
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
                found.append(
                    Span("missing", f"{self.dropped} slices not kept", start=end, end=end, args={})
                )
            return tuple(found)


class Stage(StrEnum):
    """Stages of a prefill (``prefill.v1.Stage``)."""

    DECODE = "decode"
    VISION = "vision"
    PREFILL = "prefill"


@dataclass(slots=True)
class StageClock:
    """A task's progress and seconds per stage on one rank, and their spans.

    Attributes:
        report: called with stage, units done, units in all and seconds, at most five times a
            second and when a stage is complete.
        seconds: spent in each stage so far.
    """

    report: Callable[[Stage, int, int, float], None]
    spans: SpanBuffer = field(default_factory=SpanBuffer)
    seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(Stage, 0.0))
    _reported_at: dict[Stage, float] = field(default_factory=dict)
    _chunks: dict[Stage, int] = field(default_factory=lambda: dict.fromkeys(Stage, 0))

    def finish_chunk(
        self, stage: Stage, *, done: int, total: int, start: float, **args: Amount
    ) -> None:
        """Note that a chunk, begun at ``start`` (perf_counter), completed ``done`` of ``total``.

        ``args`` go with its span.
        """
        number = self._chunks[stage]
        self._chunks[stage] += 1
        self.spans.note(stage, f"chunk {number}", start, **args)
        seconds = self.seconds[stage] + time.perf_counter() - start
        self.update(stage, done=done, total=total, seconds=seconds)

    def update(self, stage: Stage, *, done: int, total: int, seconds: float) -> None:
        """Note that ``done`` of ``total`` units took ``seconds`` so far."""
        self.seconds[stage] = seconds
        now = time.monotonic()
        if done >= total or now - self._reported_at.get(stage, 0.0) >= _PROGRESS_INTERVAL_S:
            self._reported_at[stage] = now
            self.report(stage, done, total, seconds)


class LayerSpans:
    """Spans of a chunk's layers, or groups of consecutive layers, and of their attention.

    Args:
        spans: where they are noted.
        stats: of the rank's collectives.
        row: the row of the chunk's own span, which encloses them.
        layers, chunks: of the model and of the task; they decide how fine the spans are.
    """

    def __init__(
        self, spans: SpanBuffer, stats: CommStats, row: str, *, layers: int, chunks: int
    ) -> None:
        self._spans = spans
        self._stats = stats
        self._row = row
        self._layers = layers
        self._per_span = max(1, -(-layers * chunks // MAX_LAYER_SPANS))
        self._first: int | None = None
        self._start = self._attend_s = self._exchange_s = 0.0
        self._bytes = 0

    def enter_layer(self, layer: int) -> None:
        """Note that the keys of ``layer`` are there, and with them the end of earlier layers."""
        if self._first is not None and layer % self._per_span:
            return
        self._finish(layer)
        self._first = layer
        self._start = time.perf_counter()
        self._attend_s = 0.0
        self._bytes = self._stats.bytes_received
        self._exchange_s = self._stats.seconds

    @contextmanager
    def time_attention(self) -> Iterator[None]:
        """Time the attention of the layer that was entered last."""
        start = time.perf_counter()
        yield
        self._attend_s += time.perf_counter() - start
        if self._per_span == 1:
            self._spans.note(self._row, "attend", start)

    def finish_chunk(self) -> None:
        """Note the end of the chunk's last layer."""
        self._finish(self._layers)

    def _finish(self, end: int) -> None:
        """Note the span of the layers since the last one, up to layer ``end``."""
        if self._first is None:
            return
        last = end - 1
        name = f"layer {last}" if last == self._first else f"layers {self._first}-{last}"
        self._spans.note(
            self._row,
            name,
            self._start,
            attend_ms=_ms(self._attend_s),
            exchange_ms=_ms(self._stats.seconds - self._exchange_s),
            bytes_received=self._stats.bytes_received - self._bytes,
        )
        self._first = None


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
