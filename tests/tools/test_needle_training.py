"""Training runs, resumes, learns; the committed checkpoint is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tools.needle import checkpoint, language, perception
from tools.needle.language import Phase
from tools.needle.training import Log

ASSET = Path(__file__).resolve().parents[2] / "assets" / "needle-qwen3-vl"
SIGHT = perception.PerceptionSettings(steps=40, batch=64, clips=12, warm_up=10)


def test_phases_are_read() -> None:
    assert language.parse_phases("5:8:8:64,7:16-32:16-900:128") == (
        Phase(steps=5, rendered=(8, 8), seconds=(8, 8), patches=64),
        Phase(steps=7, rendered=(16, 32), seconds=(16, 900), patches=128),
    )
    for wrong in ("5:8:8", "5:8:1-4:64", "5:9-8:9:64", "x:8:8:64"):
        with pytest.raises(ValueError, match=r"phase|range|invalid literal"):
            language.parse_phases(wrong)


def test_perception_learns_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    models = []
    for out, stops in ((whole, (40,)), (parts, (25, 40))):
        out.mkdir()
        for stop in stops:
            tokenizer = checkpoint.build_tokenizer()
            model = checkpoint.build_model(tokenizer, checkpoint.NeedleSpec(), seed=0)
            with stopped_at(stop):
                perception.train(model, tokenizer, SIGHT, out=out, workers=1, log=Log(out / "log"))
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    colour = float(line.rsplit(" ", 1)[1])
    assert colour > 0.45, line  # always "none" would be 0.4


class stopped_at:
    """Ends ``Run.update`` loops early, as a signal would: at a saved step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __enter__(self) -> None:
        from tools.needle.training import Run

        self._original = Run.update

        def update(run: Run, *arguments: object) -> None:
            self._original(run, *arguments)  # type: ignore[arg-type]
            if run.step == self._step < run.settings["steps"]:
                run.save(now=True)
                raise KeyboardInterrupt

        Run.update = update  # type: ignore[method-assign]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        from tools.needle.training import Run

        Run.update = self._original  # type: ignore[method-assign]
        return kind is KeyboardInterrupt


def test_command_trains_from_a_checkpoint_saves_and_evaluates(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.needle",
        "--out",
        str(tmp_path),
        "--start",
        str(ASSET),
        "--phases",
        "2:4:4:8,2:4-6:4-40:8",
        "--rate",
        "1e-6",
        "--lengths",
        "8",
        "--questions",
        "4",
        "--clips",
        "12",
        "--threads",
        "1",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 patches: color" in done.stdout
    assert "language step 4" in (tmp_path / "train.log").read_text()
    before, _ = checkpoint.load(ASSET)
    after, _ = checkpoint.load(tmp_path / "checkpoint")
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-2
    command[command.index("1e-6")] = "1e-3"
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "name another --out, or remove it" in refused.stderr


def test_the_committed_checkpoint() -> None:
    config = json.loads((ASSET / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl"
    assert config["dtype"] == "bfloat16"
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 10e6
    with safe_open(str(ASSET / "model.safetensors"), "pt") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
    model, tokenizer = checkpoint.load(ASSET)
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert tokenizer.get_vocab() == checkpoint.build_tokenizer().get_vocab()
    assert tokenizer.chat_template == checkpoint.build_tokenizer().chat_template


def test_the_committed_checkpoint_answers() -> None:
    """A small slice of the model card's table."""
    model, tokenizer = checkpoint.load(ASSET)
    batches = language.held_out(model, tokenizer, 12, seed=31, workers=1)
    (cell,) = language.evaluate(model, batches, [64], per_task=40, seed=9)
    shares = [r / a for r, a in zip(cell.right, cell.asked, strict=True)]
    assert shares[0] > 0.9, cell
    assert shares[1] > 0.9, cell
    assert shares[2] > 0.75, cell
    assert shares[3] > 0.5, cell


def test_tenths_of_a_second_read_alike(tmp_path: Path) -> None:
    """Training sees one of them only; videos of other frame rates have all."""
    model, tokenizer = checkpoint.load(ASSET)
    tenths = checkpoint.word_ids(tokenizer, tuple(f".{digit} seconds>" for digit in range(10)))
    embeddings = model.get_input_embeddings().weight
    assert (embeddings[tenths] == embeddings[tenths[2]]).all()
    fresh = checkpoint.build_model(tokenizer, checkpoint.NeedleSpec(), seed=0)
    trained = fresh.get_input_embeddings().weight[tenths[2]].detach().clone()
    checkpoint.save(fresh, tokenizer, tmp_path)
    saved = checkpoint.load(tmp_path)[0].get_input_embeddings().weight[tenths]
    assert (saved == trained.bfloat16().float()).all()


def test_the_mean_of_two_checkpoints_lies_between_them(tmp_path: Path) -> None:
    model, tokenizer = checkpoint.load(ASSET)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    checkpoint.save(model, tokenizer, tmp_path / "other")
    found, _ = checkpoint.mean([ASSET, tmp_path / "other"])
    one, _ = checkpoint.load(ASSET)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], 2 * value, rtol=0.01, atol=1e-6)
