"""What the order of the tests relies on."""

from __future__ import annotations

from pathlib import Path

from tests.support.unit_scheduling import DEAR, VLLM_FILES, dear_first, unit_of

ROOT = Path(__file__).resolve().parents[1]


def test_files_that_are_named_are_there() -> None:
    assert [file for file in DEAR if not (ROOT / file).is_file()] == []


def test_all_that_ask_a_vllm_are_named() -> None:
    asking = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and "vllm: Callable[[str], VllmServer]" in path.read_text()
    }
    assert asking == set(VLLM_FILES)


def test_units_are_files_or_share_a_vllm() -> None:
    assert unit_of("tests/a/test_b.py::test_c[1::2]") == "tests/a/test_b.py"
    answers, handoff, *_ = VLLM_FILES
    assert unit_of(f"{answers}::test_x[qwen3_vl-2]") == unit_of(f"{handoff}::test_y")
    assert unit_of(f"{answers}::test_x[qwen2_5_vl-2]") != unit_of(f"{handoff}::test_y")


def test_dear_files_come_first_and_the_rest_stays() -> None:
    found = dear_first((name, name) for name in ("b::1", f"{DEAR[1]}::x", "a::1", f"{DEAR[0]}::y"))
    assert found == [f"{DEAR[0]}::y", f"{DEAR[1]}::x", "b::1", "a::1"]
