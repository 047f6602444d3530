"""The side-by-side benchmark: its cases, one real system in a session, and what its rows say."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.processes import MemoryLog, memory_watch
from benchmarks.service import rows, targets
from benchmarks.service.__main__ import make_folder
from benchmarks.service.cases import Case, CaseError, CaseMaker
from benchmarks.service.hf import Transformers
from benchmarks.service.rows import Cell
from benchmarks.service.session import Length, Session
from benchmarks.service.systems import Asked, Measured, Setup
from tools.make_bench_checkpoint import LARGER, PUBLISHED

KEYS = {
    "system", "mode", "checkpoint", "video_tokens", "first_token_s", "second_first_token_s",
    "peak_rss_bytes", "stages", "density", "kept_mass",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def maker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> CaseMaker:
    return CaseMaker(tiny, (64, 96), tmp_path_factory.mktemp("cases"))


def test_a_session_measures_a_real_system(tiny: Path, maker: CaseMaker, tmp_path: Path) -> None:
    written: list[int] = []
    system = Transformers(Setup(checkpoint=tiny, longest=1024, folder=tmp_path, cores=1))
    session = Session(
        [system], "tiny", 0.0, on_change=lambda: written.append(1), say=lambda _: None
    )
    with session:
        for tokens in (12, 24):  # the second one is over the budget of no seconds
            session.run(Length(tokens, 2, ("transformers",)), lambda n: maker.make(12, n))
    assert len(written) == 2
    first, skipped = rows.rows(session.cells)
    assert first.keys() >= KEYS <= skipped.keys()
    assert (first["video_tokens"], first["frames"], first["repeats"]) == (12, 4, 2)
    # transformers loads the file itself: it saw the frames and the prompt that the service plans.
    assert first["prompts_equal"] is True
    assert first["frames_equal"] is True
    assert first["answers"][0] != first["answers"][1]  # of two videos
    assert 0 < first["second_first_token_s"] < 60
    assert first["first_token_s"] == pytest.approx(sum(first["stages"].values()), abs=0.01)
    assert 1e8 < first["peak_rss_bytes"] < 1e10
    assert session.cold_start_s["transformers"] > 1
    assert "more than 0" in skipped["skipped"]
    assert "skipped" in rows.table([first, skipped])
    tables.write(tmp_path / "rows.json", [first, skipped])
    assert json.loads((tmp_path / "rows.json").read_text())[0]["video_tokens"] == 12
    rows.draw([first, skipped], tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_rows_compare_the_same_videos_only(maker: CaseMaker) -> None:
    case = maker.make(6, 0)

    def measured(seconds: float, tokens: list[int], stage: float) -> tuple[Case, Measured]:
        asked = Asked(seconds, tokens)
        return case, Measured(asked, None, None, stages={"vision": stage})

    vllm = Cell(
        system="vllm",
        mode="exact",
        ranks=1,
        checkpoint="m",
        tokens=6,
        runs={0: measured(8.0, [1, 2, 3, 4], 0)},
    )
    ours = Cell(
        system="ours",
        mode="balanced",
        ranks=2,
        checkpoint="m",
        tokens=6,
        runs={
            0: measured(2.0, [1, 2, 9, 4], 1.0),
            1: measured(40.0, [7, 7, 7, 7], 3.0),
        },
    )
    other = Cell(
        system="ours",
        mode="balanced",
        ranks=2,
        checkpoint="m",
        tokens=12,
        runs={0: measured(1.0, [1], 1.0)},
    )
    base, row, alone = rows.rows([vllm, ours, other])
    assert row["speedup_over_vllm"] == 4.0  # repeat 1 has no counterpart
    assert row["first_token_s"] == 21.0
    assert row["tokens_equal"] == "2/4"
    assert row["answers"] == [[1, 2, 9, 4], [7, 7, 7, 7]]
    assert row["stages"] == {"vision": 2.0}
    assert base["speedup_over_vllm"] == 1.0
    assert alone["speedup_over_vllm"] is None
    assert row["prompts_equal"] is None  # it did not tell its prompt


def test_aims_are_read_off_the_rows_of_one_checkpoint() -> None:
    def row(system: str, tokens: int, first: float, **more: Any) -> dict[str, Any]:
        return {
            "system": system,
            "mode": "balanced",
            "checkpoint": "m",
            "video_tokens": tokens,
            "first_token_s": first,
            "second_first_token_s": first / 50,
            "stages": {"handoff": 0.1, "prefill": 3.0, "vision": 1.0},
            "speedup_over_vllm": 3.2,
        } | more

    text = targets.table(
        [
            row("ours", 8256, 4.0),
            row("ours", 16512, 12.0),
            row("ours-1", 16512, 21.0),
            row("vllm", 16512, 38.4),
            row("ours", 16512, 99.0, checkpoint="another"),
            row("ours", 32768, 0.0, first_token_s=None),
        ],
        "m",
    )
    found = {
        (cells[0], cells[2]): (cells[3], cells[4])
        for line in text.splitlines()[2:]
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert found["vLLM alone / ours", "16512"] == (">= 3", "3.200")
    assert found["second question / first", "8256"] == ("<= 0.05", "0.020")
    assert found["hand-off / (vision + prefill)", "8256"] == ("<= 0.03", "0.025")
    assert found["1 rank / 2 ranks", "16512"] == (">= 1.7", "1.750")
    assert found["time per token / that at 8 K", "16512"] == ("-", "1.500")
    assert len(found) == 8


def test_a_case_that_cannot_be(maker: CaseMaker) -> None:
    with pytest.raises(CaseError, match="768 at most"):
        maker.make(6 * 385, 0)


def sample_anew(log: MemoryLog) -> None:
    """Wait for a sample that began after now."""
    wanted = len(log.samples) + 2
    while len(log.samples) < wanted:
        time.sleep(0.01)


def test_memory_counts_what_was_there_in_between() -> None:
    """Of a process of its own: this one shares gigabytes with others, that come and go."""
    program = """
print("started", flush=True)
input()
block = bytearray(b"x") * (200 << 20)
print("allocated", flush=True)
input()
del block
print("freed", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        with memory_watch(child.pid) as before:
            sample_anew(before)
        with memory_watch(child.pid) as watch:
            for state in ("allocated", "freed"):
                child.stdin.write("\n")
                child.stdin.flush()
                assert child.stdout.readline() == f"{state}\n"
                sample_anew(watch)
        child.stdin.write("\n")
    assert 150 << 20 < watch.peak - before.peak < 300 << 20


def test_the_larger_checkpoint_is_in_the_8bs_proportion() -> None:
    """Of tower to decoder at the size of the benchmark's frames, 512 x 384."""
    patches = 512 * 384 // 16**2
    published = [shape.proportion(patches) for shape in PUBLISHED.values()]
    assert min(published) <= LARGER.proportion(patches) <= max(published)


def test_the_folder_for_logs_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    for _ in range(2):
        assert make_folder(str(folder)) == folder
        assert folder.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be made.*file"):
        make_folder(str(tmp_path / "file" / "below"))
