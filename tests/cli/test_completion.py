"""Completion scripts, run by the shells that are there."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from prefill_service.cli.main import main


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_name_commands_and_shown_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    for part in ("healthcheck", "engine-exchange", "pass_q", "data-dir"):
        assert part in text
    assert "decoder-kv-cache-gib" not in text
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["do"], ["doctor"]),
        (["serve", "--rank"], ["--ranks"]),
        (["serve", "--device", "c"], ["cpu", "cuda"]),
        (["config", "s"], ["show"]),
    ],
)
def test_bash_completes(
    words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = " ".join(["prefill-service", *words])
    commands = [
        script("bash", capsys),
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; COMP_LINE='{typed}'",
        "$(complete -p prefill-service | sed 's/.*-F \\([^ ]*\\).*/\\1/')",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(["bash", "-c", "\n".join(commands)], capture_output=True, text=True)
    assert done.stdout.split() == wanted, done.stderr
