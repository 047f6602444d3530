"""What was done for a job, and when, on one time line: the trace that ``prefill trace`` writes.

The format is Chrome's Trace Event Format as JSON, which Perfetto and chrome://tracing open: one
process per rank with a row for each kind of work, and one for the service itself. All times come
from CLOCK_MONOTONIC, which the processes of a host share (``engine.spans``); 0 is when the job was
queued. Traces are for looking at what has just run: they live in memory, and only the latest.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefill_service.engine.spans import Amount, Span

KEPT_JOBS = 64
KEPT_SPANS = 100_000
"""Spans kept of all jobs together, about 30 MB; those of the oldest jobs are dropped first."""

SERVICE_SPANS = 512
"""Spans kept of one job in the service itself: any number of questions may be about it."""

JOB = "job"
QUESTIONS = "questions"
"""Rows of the service's own process."""

_SERVICE_PID = 0
_MICROSECONDS = 1e6

Event = dict[str, Any]


@dataclass(slots=True)
class JobTrace:
    """One job's spans.

    Attributes:
        start: when it was queued, seconds of CLOCK_MONOTONIC.
        service: spans of the front end.
        ranks: spans by rank, of the attempt that succeeded.
    """

    start: float
    service: list[Span] = field(default_factory=list)
    ranks: dict[int, tuple[Span, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of spans of its ranks."""
        return sum(map(len, self.ranks.values()))


class TraceStore:
    """The traces of the latest jobs. Not thread-safe.

    Args:
        jobs, spans: how many are kept at most.
    """

    def __init__(self, jobs: int = KEPT_JOBS, spans: int = KEPT_SPANS) -> None:
        self.jobs = jobs
        self._spans = spans
        self._traces: OrderedDict[str, JobTrace] = OrderedDict()

    def begin_trace(self, job_id: str) -> None:
        """Start the trace of a job that is being queued."""
        self._traces[job_id] = JobTrace(time.monotonic())
        self._drop_oldest()

    def end_queueing(self, job_id: str) -> None:
        """Note that a job has waited in the queue until now."""
        if trace := self._traces.get(job_id):
            self.note_span(job_id, JOB, "queued", start=trace.start)

    def note_span(self, job_id: str, row: str, name: str, *, start: float, **args: Amount) -> None:
        """Note what began at ``start`` (``time.monotonic``) and ends now, if the job is known."""
        trace = self._traces.get(job_id)
        if trace is not None and len(trace.service) < SERVICE_SPANS:
            trace.service.append(
                Span(row=row, name=name, start=start, end=time.monotonic(), args=args)
            )

    @contextmanager
    def span(self, job_id: str, name: str) -> Iterator[None]:
        """Note what the context does, on the job's own row; also if it fails."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.note_span(job_id, JOB, name, start=start)

    def add_rank_spans(self, job_id: str, ranks: Mapping[int, tuple[Span, ...]]) -> None:
        """Add what each rank has noted."""
        if trace := self._traces.get(job_id):
            trace.ranks = dict(ranks)
            self._drop_oldest()

    def find_trace(self, job_id: str) -> JobTrace | None:
        """A job's trace, if it is still kept."""
        return self._traces.get(job_id)

    def _drop_oldest(self) -> None:
        total = sum(trace.size for trace in self._traces.values())
        while len(self._traces) > max(1, self.jobs) or (
            total > self._spans and len(self._traces) > 1
        ):
            total -= self._traces.popitem(last=False)[1].size


def render_trace(job_id: str, trace: JobTrace) -> bytes:
    """The trace as JSON, UTF-8."""
    events = _process_events(_SERVICE_PID, "service", trace.service, trace.start)
    for rank, spans in sorted(trace.ranks.items()):
        events += _process_events(rank + 1, f"rank {rank}", spans, trace.start)
        events += _received_events(rank + 1, spans, trace.start)
    about = {"job_id": job_id, "clock": "CLOCK_MONOTONIC", "zero_s": round(trace.start, 6)}
    content = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    return json.dumps(content, separators=(",", ":")).encode()


def _process_events(pid: int, name: str, spans: Iterable[Span], zero: float) -> list[Event]:
    """The names of a process and its rows, then its spans."""
    rows: dict[str, list[Span]] = {}
    for span in spans:
        rows.setdefault(str(span.row), []).append(span)
    events = [
        _name_event(pid, 0, "process_name", name),
        _sort_event(pid, 0, "process_sort_index", pid),
    ]
    lanes: list[tuple[str, list[Span]]] = []
    for row, members in rows.items():
        for number, lane in enumerate(_lanes(members)):
            lanes.append((f"{row} {number + 1}" if number else row, lane))
    for tid, (row, lane) in enumerate(lanes):
        events += [
            _name_event(pid, tid, "thread_name", row),
            _sort_event(pid, tid, "thread_sort_index", tid),
        ]
        events += [_span_event(span, pid=pid, tid=tid, lane=row, zero=zero) for span in lane]
    return events


def _lanes(spans: list[Span]) -> list[list[Span]]:
    """Spans in as few lanes as hold them: those of one lane follow or enclose each other."""
    lanes: list[list[Span]] = []
    open_until: list[list[float]] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        for lane, ends in zip(lanes, open_until, strict=True):
            while ends and ends[-1] <= span.start:
                ends.pop()
            if not ends or span.end <= ends[-1]:
                lane.append(span)
                ends.append(span.end)
                break
        else:
            lanes.append([span])
            open_until.append([span.end])
    return lanes


def _span_event(span: Span, *, pid: int, tid: int, lane: str, zero: float) -> Event:
    start = round((span.start - zero) * _MICROSECONDS, 1)
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "cat": lane,
        "name": span.name,
        "ts": start,
        "dur": round((span.end - zero) * _MICROSECONDS, 1) - start,
        "args": span.args,
    }


def _received_events(pid: int, spans: Iterable[Span], zero: float) -> list[Event]:
    """A counter of the bytes that came from other ranks, stepping at each chunk's end."""
    events: list[Event] = []
    total = 0
    for span in spans:
        if span.name.startswith("chunk") and "bytes_received" in span.args:
            total += int(span.args["bytes_received"])
            ts = round((span.end - zero) * _MICROSECONDS, 1)
            events.append(
                {
                    "ph": "C",
                    "pid": pid,
                    "tid": 0,
                    "name": "bytes received",
                    "ts": ts,
                    "args": {"bytes": total},
                }
            )
    return events


def _name_event(pid: int, tid: int, kind: str, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _sort_event(pid: int, tid: int, kind: str, index: int) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"sort_index": index}}
