"""The load benchmark's own parts: arrivals, clients, percentiles, memory, and its report."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from itertools import count, pairwise
from pathlib import Path

import pytest
from prefill_client.errors import PrefillError

from benchmarks.load import report
from benchmarks.load.drive import Record, Reply, drive
from benchmarks.load.report import slope
from benchmarks.load.systems import Ours, _read
from benchmarks.load.traffic import Arrival, Film, Traffic, make_films, plan_traffic
from benchmarks.processes import MemoryLog, tree_bytes
from tools.needle.stories import Question


def test_arrivals_are_poisson_and_half_of_them_about_known_videos() -> None:
    traffic = plan_traffic(18_000, 20, 12, seed=3)
    assert traffic == plan_traffic(18_000, 20, 12, seed=3)
    assert traffic != plan_traffic(18_000, 20, 12, seed=4)
    arrivals = traffic.arrivals
    assert abs(len(arrivals) - 3600) < 4 * 3600**0.5
    gaps = [b.at_s - a.at_s for a, b in pairwise(arrivals)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    # Exponential gaps: the standard deviation is the mean.
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert abs(deviation / mean - 1) < 0.1
    assert abs(sum(not arrival.fresh for arrival in arrivals) / len(arrivals) - 0.5) < 0.05
    assert {arrival.client for arrival in arrivals} == set(range(20))
    asked = dict.fromkeys(range(len(traffic.patches)), 0)
    for arrival in arrivals:  # a film's questions are counted in the order in which they come up
        assert arrival.turn == asked[arrival.film]
        asked[arrival.film] += 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 1, 1), "seconds"), ((1, 0, 1), "clients"), ((1, 1, -2.0), "rate = -2.0")],
)
def test_refuses_what_is_no_traffic(arguments: tuple[float, int, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_traffic(*arguments, seed=0)


def test_films_have_answers_and_every_question_is_asked_before_one_comes_again(
    tmp_path: Path,
) -> None:
    (film,) = make_films([16], tmp_path, seed=5)
    assert film.path.stat().st_size > 0
    asked = [film.question(turn) for turn in range(len(film.questions) + 1)]
    assert len(set(asked)) == len(film.questions)
    assert asked[-1] == asked[0]
    assert all(question.answer for question in film.questions)


class Clerk:
    """Answers after a while, in order; every third question in vain."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self._numbers = count(1)
        self.at_once = self.most = 0

    async def ask(self, client: int, film: Film, question: str) -> Reply:
        self.calls.append((client, question))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(0.02)
            if next(self._numbers) % 3 == 0:
                raise RuntimeError("no")
            return Reply(
                first_s=asyncio.get_running_loop().time(), text="red ", prompt_tokens=100, retries=1
            )
        finally:
            self.at_once -= 1


def film(path: Path) -> Film:
    return Film(path, 16, [Question("color", "what?", "red"), Question("color", "and?", "blue")])


async def test_clients_ask_one_after_the_other_and_late_questions_count_from_their_time(
    tmp_path: Path,
) -> None:
    arrivals = tuple(Arrival(at_s=0.001 * i, client=i % 2, film=0, turn=i) for i in range(6))
    clerk = Clerk()
    records = await drive(clerk, Traffic(arrivals, (16,), 2), [film(tmp_path / "a")])
    assert clerk.most == 2
    assert [record.at_s for record in records] == [arrival.at_s for arrival in arrivals]
    assert [record.error for record in records].count("RuntimeError: no") == 2
    fine = [record for record in records if not record.error]
    assert all(record.wait_s is None for record in records if record.error)
    # The third question of a client waits for two before it.
    last = [record for record in fine if record.at_s >= 0.004]
    assert all(record.wait_s is not None and record.wait_s > 0.05 for record in last)
    assert {(record.at_s, record.right) for record in fine} <= {
        (arrival.at_s, arrival.turn % 2 == 0) for arrival in arrivals
    }
    (everything, new, known) = report.summarize("clerk", records, 0.006)
    assert (everything["questions"], everything["failed"], everything["retried"]) == (6, 2, 4)
    assert (new["questions"], known["questions"]) == (1, 5)
    assert everything["drained_s"] > 0


async def test_a_full_queue_is_asked_again_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Ours(tmp_path, tmp_path, 1, cores=1, quality="balanced", pool_bytes=1 << 20)
    answers: list[Reply | PrefillError] = [
        PrefillError("QUEUE_FULL", "later", retry_after_s=0.01),
        PrefillError("KV_POOL_FULL", "later"),
        Reply(0.0, "red"),
        PrefillError("DECODE_FAILED", "never"),
    ]
    retries = []
    waited = []

    async def ask(client: int, film: Film, question: str, count: int) -> Reply:
        retries.append(count)
        answer = answers.pop(0)
        if isinstance(answer, PrefillError):
            raise answer
        return answer

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(ours, "_ask", ask)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert (await ours.ask(0, film(tmp_path), "what?")).text == "red"
    assert retries == [0, 1, 2]
    assert 0.01 <= waited[0] <= 0.015  # as told, and a little more
    assert 1.0 <= waited[1] <= 1.5
    with pytest.raises(PrefillError, match="never"):
        await ours.ask(0, film(tmp_path), "what?")


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert report.percentile(values, 0.5) == 50
    assert report.percentile(values, 0.95) == 95
    assert report.percentile([3.0], 0.95) == 3.0
    assert report.percentile([], 0.5) is None


def test_slope_is_that_of_the_second_half() -> None:
    grows_first = [(10.0 * i, 1000 * min(i, 10)) for i in range(20)]
    assert slope(grows_first) == pytest.approx(0, abs=1e-6)
    leaks = [(10.0 * i, 1000 + 50 * i) for i in range(20)]
    assert slope(leaks) == pytest.approx(300)  # bytes per minute
    assert slope(leaks[:3]) is None


def test_memory_of_this_process_is_seen() -> None:
    with MemoryLog(lambda: tree_bytes(os.getpid()), every_s=0.01) as log:
        block = bytearray(64 << 20)
        while len(log.samples) < 3:
            time.sleep(0.01)
        del block
    assert tree_bytes(0x7FFFFFFF) == 0
    assert all(size > 0 for _, size in log.samples)


async def test_a_stream_of_events_becomes_a_reply() -> None:
    async def lines(events: list[object]) -> AsyncIterator[bytes]:
        for event in events:
            yield b"data: " + json.dumps(event).encode() + b"\n"
            yield b"\n"
        yield b"data: [DONE]\n"

    usage = {"usage": {"prompt_tokens": 9}}

    def piece(text: str) -> dict[str, object]:
        return {"choices": [{"delta": {"content": text}}]}

    reply = await _read(lines([piece(""), piece("re"), piece("d"), usage]))
    assert (reply.text, reply.prompt_tokens) == ("red", 9)
    with pytest.raises(RuntimeError, match="no text"):
        await _read(lines([piece("")]))
    with pytest.raises(RuntimeError, match="too long"):
        await _read(lines([{"error": {"message": "too long"}}]))


def test_report_of_two_systems(tmp_path: Path) -> None:
    def records(wait_s: float, text: str) -> list[Record]:
        return [
            Record(
                at_s=i,
                client=0,
                film=0,
                patches=16,
                fresh=i == 0,
                wait_s=wait_s * (1 + i),
                done_s=i + wait_s,
                text=text,
                right=True,
                prompt_tokens=100,
            )
            for i in range(4)
        ]

    found = {"ours": records(0.5, "red"), "vllm": [*records(1.0, "red")[:3], *records(1, "x")[3:]]}
    rows = [row for name in found for row in report.summarize(name, found[name], 4.0)]
    assert report.agreement(found) == "ours and vllm gave the same answer to 3 of 4 questions"
    assert report.ratios(rows)[0].startswith("all videos: vllm waits 2.00 times as long as ours")
    samples = {"ours": [(0.0, 1 << 30), (5.0, 1 << 30)], "vllm": []}
    content = report.content({"seed": 1}, rows, found, samples)
    assert content["memory"][0]["peak_mib"] == 1024
    report.draw(found, samples, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    assert len(report.table(rows).splitlines()) == 2 + 6
