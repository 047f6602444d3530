"""``config show``: TOML that --config reads, with the source of each value."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from prefill_service.cli.config_loading import resolve_config
from prefill_service.cli.main import main


def test_each_value_has_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[engine]\nranks = 3\nmodel = 'm'\n[decoder]\nkv_cache_gib = 2\n")
    assert main(["config", "show", "--config", str(path), "--ranks", "4", "--insecure"]) == 0
    text = capsys.readouterr().out
    lines = {line.split(" = ")[0]: line for line in text.splitlines() if " = " in line}
    assert lines["ranks"].split() == ["ranks", "=", "4", "#", "command", "line"]
    assert lines["insecure"].split() == ["insecure", "=", "true", "#", "command", "line"]
    assert lines["model"].split() == ["model", "=", '"m"', "#", "file", str(path)]
    assert lines["kv_cache_gib"].split() == ["kv_cache_gib", "=", "2.0", "#", "file", str(path)]
    assert lines["page_tokens"].split() == ["page_tokens", "=", "64", "#", "default"]


def test_the_output_reads_back_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    odd = 'a "quoted" \\ path\x7f\t # é'
    path.write_text(f"[vllm]\nextra_args = [{odd!r}, '--x']\n[engine]\nbalance_above = 1e300\n")
    wanted = resolve_config(path, {"engine": {"model": odd}}).config
    assert main(["config", "show", "--config", str(path), "--model", odd]) == 0
    text = capsys.readouterr().out
    copy = tmp_path / "b.toml"
    copy.write_text(text)
    assert tomllib.loads(text)["vllm"]["extra_args"] == wanted.vllm.extra_args
    assert resolve_config(copy, {}).config == wanted


def test_a_bad_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--ranks", "0"]) == 2
    assert "command line: engine.ranks = 0 is not accepted" in capsys.readouterr().err
