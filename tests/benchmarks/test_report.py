from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.report import charts, documents
from benchmarks.report.__main__ import main
from benchmarks.report.results import seconds, share, span


def report(folder: Path, option: str) -> int:
    return main([option], root=folder, charts={"line.svg": lambda: "<svg/>"})


def test_documents_and_charts_are_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "page.md"
    document.write_text("Before.\n\n<!-- generated: machine -->\n<!-- end -->\n\nAfter.\n")
    assert report(tmp_path, "--check") == 1
    assert report(tmp_path, "--write") == 0
    assert report(tmp_path, "--check") == 0
    printed = capsys.readouterr().out
    assert "docs/page.md: written" in printed
    assert "docs/images/line.svg: written" in printed
    assert (tmp_path / "docs" / "images" / "line.svg").read_text() == "<svg/>"
    text = document.read_text()
    assert text.startswith("Before.\n\n<!-- generated: machine -->\n")
    assert text.endswith("\n<!-- end -->\n\nAfter.\n")
    assert "vLLM" in text


def test_a_block_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- generated: guesses -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="guesses"):
        report(tmp_path, "--check")


def test_every_result_file_has_its_command() -> None:
    """A trace is no table of figures, and the meta files belong to the others."""
    files = {path.stem for path in tables.RESULTS.glob("*.json") if ".meta" not in path.name}
    assert files - {"hour-trace"} == set(documents.COMMANDS)


def test_charts_are_the_same_each_time_and_keep_their_text() -> None:
    drawn = charts.first_token()
    assert drawn == charts.first_token()
    assert "seconds to first token</text>" in drawn


def test_numbers_are_printed_alike() -> None:
    assert [seconds(value) for value in (0.0583, 3.2346, 20.76, None)] == [
        "0.06",
        "3.23",
        "20.8",
        "",
    ]
    assert [share(value) for value in (0.318, 0.0439, None)] == ["32%", "4.4%", ""]
    assert [span(values, ".2f") for values in ([1.131, 1.162], [2.2])] == ["1.13 to 1.16", "2.20"]
