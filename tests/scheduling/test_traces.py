"""Traces: what the format demands, what is kept, and what the service answers."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.spans import Span
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.scheduling.traces import JobTrace, TraceStore, render_trace
from tests.support.in_process_service import InProcessService, answer, error_of
from tests.support.simulated_backends import SimulatedExecutor

Serve = Callable[..., Any]
Event = dict[str, Any]


def check_format(trace: dict[str, Any]) -> dict[str, dict[str, list[Event]]]:
    """Slices by the names of their process and row, as a viewer would put them.

    Of the Trace Event Format: every event has the fields its kind needs, processes and rows have
    names, and slices of a row follow or enclose each other.
    """
    processes: dict[int, str] = {}
    rows: dict[tuple[int, int], str] = {}
    slices: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        place = (event["pid"], event["tid"])
        assert all(isinstance(number, int) for number in place)
        match event["ph"]:
            case "M" if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            case "M" if event["name"] == "thread_name":
                assert place not in rows
                rows[place] = event["args"]["name"]
            case "M":
                assert event["name"] in ("process_sort_index", "thread_sort_index")
            case "C":
                assert all(isinstance(value, int) for value in event["args"].values())
                assert event["ts"] >= 0
            case "X":
                assert event["dur"] >= 0
                assert event["name"]
                slices[place].append(event)
            case other:
                raise AssertionError(f"{other!r} is no kind of event that is written")
    for place, events in slices.items():
        ends: list[float] = []
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"] + 0.2:  # times are rounded to 0.1
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1] + 0.2, (rows[place], event)
            ends.append(end)
    found: dict[str, dict[str, list[Event]]] = defaultdict(dict)
    for place, events in slices.items():
        found[processes[place[0]]][rows[place]] = events
    return found


def span(row: str, name: str, start: float, end: float, **args: float) -> Span:
    return Span(row, name, start, end, args)


def test_rendered_trace_has_rows_slices_and_a_counter() -> None:
    trace = JobTrace(
        100.0,
        [span("job", "queued", 100, 101), span("questions", "answer", 110, 112)],
        {
            1: (
                span("decode", "chunk 0", 101, 102, frames=4),
                span("prefill", "chunk 0", 102, 104, tokens=8, bytes_received=30),
                span("prefill", "layer 0", 102, 103, attend_ms=1.5, bytes_received=30),
                span("prefill", "chunk 1", 104, 105, tokens=8, bytes_received=12),
            )
        },
    )
    content = json.loads(render_trace("job_a", trace))
    found = check_format(content)
    assert {name: set(rows) for name, rows in found.items()} == {
        "service": {"job", "questions"},
        "rank 1": {"decode", "prefill"},
    }
    chunk = found["rank 1"]["prefill"][0]
    assert (chunk["name"], chunk["ts"], chunk["dur"]) == ("chunk 0", 2e6, 2e6)
    assert chunk["args"] == {"tokens": 8, "bytes_received": 30}
    counted = [e for e in content["traceEvents"] if e["ph"] == "C"]
    assert [(e["ts"], e["args"]["bytes"]) for e in counted] == [(4e6, 30), (5e6, 42)]
    assert content["otherData"]["job_id"] == "job_a"


def test_slices_that_overlap_get_rows_of_their_own() -> None:
    spans = [
        span("questions", "a", 1, 4),
        span("questions", "b", 2, 6),
        span("questions", "c", 5, 7),
        span("questions", "first token of a", 1, 3),
    ]
    trace = JobTrace(0.0, spans)
    rows = check_format(json.loads(render_trace("job_a", trace)))["service"]
    names = {row: [event["name"] for event in events] for row, events in rows.items()}
    assert names == {"questions": ["a", "first token of a", "c"], "questions 2": ["b"]}


def test_the_oldest_jobs_go_when_there_are_too_many_jobs_or_spans() -> None:
    traces = TraceStore(jobs=3, spans=10)
    for name in "abcd":
        traces.begin_trace(name)
    assert traces.find_trace("a") is None
    traces.add_rank_spans("b", {0: (span("decode", "chunk 0", 0, 1),) * 6})
    traces.add_rank_spans("d", {0: (span("decode", "chunk 0", 0, 1),) * 6})
    assert [name for name in "bcd" if traces.find_trace(name)] == ["c", "d"]
    traces.add_rank_spans("d", {0: (span("decode", "chunk 0", 0, 1),) * 60})
    assert [name for name in "bcd" if traces.find_trace(name)] == ["d"]  # one is always kept
    traces.note_span("a", "job", "late", start=0.0)  # of a job that was let go: nothing
    assert traces.find_trace("a") is None


class Traced(SimulatedExecutor):
    """Ranks that say when they worked."""

    async def prefill(self, task: PrefillTask, *arguments: Any) -> PrefillOutcome:
        start = time.perf_counter()
        outcome = await super().prefill(task, *arguments)
        done = span("prefill", "chunk 0", start, time.perf_counter(), tokens=1, bytes_received=2)
        return replace(outcome, spans={0: (done,), 1: (done,)})


async def fetch(s: InProcessService, job_id: str) -> bytes:
    stream = s.prefills.TracePrefillJob(pb.TracePrefillJobRequest(job_id=job_id))
    return b"".join([message.data async for message in stream])


async def test_a_job_and_its_questions_are_on_one_time_line(serve: Serve) -> None:
    async with serve(executor=Traced()) as s:
        s.executor.step_s = 0.01
        final = (await answer(s.ask())).final
        await answer(s.ask())
        text = await fetch(s, final.job_id)
        found = check_format(json.loads(text))
        job = {event["name"]: event for event in found["service"]["job"]}
        assert list(job) == ["queued", "plan", "make room", "ranks"]
        assert job["queued"]["ts"] == 0
        ranks = job["ranks"]
        (chunk,) = found["rank 1"]["prefill"]
        assert ranks["ts"] <= chunk["ts"] + 0.2
        assert chunk["ts"] + chunk["dur"] <= ranks["ts"] + ranks["dur"] + 0.2
        asked = [e for row, events in found["service"].items() if row != "job" for e in events]
        names = ["answer", "hand-off and first token"]
        assert sorted(e["name"] for e in asked) == [name for name in names for _ in range(2)]
        assert {e["args"].get("completion_tokens") for e in asked} == {None, 4}
        assert await fetch(s, final.job_id) == text


async def test_what_has_no_trace_says_why(serve: Serve) -> None:
    async with serve() as s:
        code, reason, _, _ = await error_of(fetch(s, "job_x"))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB")
        done = (await s.ended((await s.create(frames=4)).job_id))[-1]
        s.executor.step_s = 30
        running = await s.create(frames=6)
        await s.until(lambda: len(s.executor.started) == 2)
        with pytest.raises(grpc.aio.AioRpcError, match="RUNNING and has no trace: there is one"):
            await fetch(s, running.job_id)
        assert (await error_of(fetch(s, running.job_id)))[1] == "NO_TRACE"
        request = pb.CancelPrefillJobRequest(job_id=running.job_id)
        await s.prefills.CancelPrefillJob(request)
        found = check_format(json.loads(await fetch(s, running.job_id)))
        assert "ranks" in {event["name"] for event in found["service"]["job"]}
        assert len(found) == 1  # the ranks did not end it, so they said nothing
    async with serve() as s:
        code, reason, metadata, _ = await error_of(fetch(s, done.job_id))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_TRACE")
        assert metadata == {"job_id": done.job_id, "state": "EVICTED"}
