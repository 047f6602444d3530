"""The race of ingests in small, and what is read out of a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.ingest import decoding
from benchmarks.ingest.hour import intervals, overlap, read_trace
from benchmarks.processes import MemoryLog, pss_bytes, tree
from prefill_service.engine.spans import Span
from prefill_service.scheduling.traces import JobTrace, render_trace
from tests.video.processes import wait_until
from tools.make_hour_video import HourOptions, write_hour


def test_both_hand_over_the_same_frames(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = HourOptions(seconds=40, fps=10, width=320, height=240, scenes=3)
    video = write_hour(tmp_path / "v.mp4", options)
    out = tmp_path / "out.json"
    decoding.main(
        [
            "--video",
            str(video),
            "--frames",
            "12",
            "--run",
            "2",
            "--rounds",
            "1",
            "--scratch",
            str(tmp_path),
            "--out",
            str(out),
        ]
    )
    written = json.loads(out.read_text())
    assert [row["contestant"] for row in written["rows"]] == ["ours", "opencv"]
    assert all(row["frames"] == 12 and row["memory_mib"] > 0 for row in written["rows"])
    assert written["settings"]["keyframes"] == 5
    assert written["settings"]["pixel_difference"] < 3
    assert written["summary"]["ratio"] > 0
    assert "times as fast as OpenCV" in capsys.readouterr().out


def test_other_frames_are_noticed(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", frames)
    np.save(tmp_path / "b.npy", frames[[0, 1, 3, 2, 4]])
    assert decoding.compare(tmp_path / "a.npy", tmp_path / "a.npy") == 0
    with pytest.raises(AssertionError, match="differs from OpenCV's by"):
        decoding.compare(tmp_path / "a.npy", tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", frames[:4])
    with pytest.raises(AssertionError, match=r"\(5, 3, 4, 3\), of OpenCV \(4, 3, 4, 3\)"):
        decoding.compare(tmp_path / "a.npy", tmp_path / "c.npy")


def test_frames_are_dealt_in_runs_and_none_is_lost() -> None:
    wanted = decoding.wanted_frames(1000, 25, 0.5)
    assert (wanted[0], wanted[-1], len(wanted)) == (0, 499, 12)
    shares = decoding.deal(wanted, 2, 5)
    assert [len(share) for share in shares] == [7, 5]
    assert sorted(frame for share in shares for frame in share) == wanted.tolist()
    assert decoding.deal(wanted, 4, 12) == [wanted.tolist()]


def test_bound_and_overlap_are_those_of_the_trace() -> None:
    def span(row: str, name: str, start: float, end: float) -> Span:
        return Span(row=row, name=name, start=start, end=end, args={})

    trace = JobTrace(
        0.0,
        [span("questions", "hand-off and first token", 12, 12.5)],
        {
            0: (
                span("decode", "chunk 0", 1, 3),
                span("decode", "chunk 1", 3, 7),
                span("vision", "chunk 0", 3, 4),
                span("prefill", "chunk 0", 4, 6),
                span("prefill", "layer 0", 4, 5),
                span("vision", "chunk 1", 7, 8),
                span("prefill", "chunk 1", 8, 11),
            ),
            1: (
                span("decode", "chunk 0", 1, 2),
                span("vision", "chunk 0", 2, 3),
                span("prefill", "chunk 0", 4, 8),
            ),
        },
    )
    row = read_trace(json.loads(render_trace("job_a", trace)), first_token_s=13.0)
    assert (row["decode_s"], row["compute_s"], row["handoff_s"]) == (6, 7, 0.5)
    assert row["hidden"] == pytest.approx(
        3 / 7
    )  # three of rank 0's six of decoding; rank 1 decodes for one
    assert row["bound_s"] == pytest.approx(1.15 * 7 + 0.5)
    assert row["first_token_over_bound"] == pytest.approx(13 / (1.15 * 7 + 0.5))


def test_overlap_of_intervals() -> None:
    assert overlap([(0, 2), (3, 5)], [(1, 4)]) == 2
    assert intervals([{"name": "layer 0", "ts": 0, "dur": 5}]) == []


def test_peak_memory_sees_what_comes_and_goes() -> None:
    # Of a process of its own: what this one shares with others comes and goes with them.
    program = """
input(); block = bytearray(b"x") * (64 << 20); print(flush=True)
input(); del block; print(flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with MemoryLog(lambda: pss_bytes(child.pid), 0.01) as memory:
            before = pss_bytes(child.pid)
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            assert wait_until(lambda: memory.peak > before + (60 << 20))
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        assert pss_bytes(child.pid) < memory.peak - (60 << 20)
        child.stdin.write(b"\n")
    me = os.getpid()
    assert tree(me)[0] == me
    title = psutil.Process(me).cmdline()[0]  # pytest-xdist gives its workers one of their own
    assert tree(me, leave_out=title) == []
    assert pss_bytes(1 << 30) == 0
