"""Hub ids, from a cache as the hub's client lays it out: nothing is downloaded here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def add_repository(cache: Path, name: str) -> Path:
    """The folder of a repository's only commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_cached_repository_is_opened(cache: Path, checkpoint: Callable[..., Path]) -> None:
    snapshot = add_repository(cache, "some/model")
    shutil.copytree(checkpoint("qwen3_vl"), snapshot)
    assert open_checkpoint("some/model").path == snapshot.resolve()
    assert open_checkpoint("some/model", local_files_only=True).family == "qwen3_vl"


def test_the_configuration_is_judged_before_the_weights_are_downloaded(
    cache: Path, checkpoint: Callable[..., Path]
) -> None:
    snapshot = add_repository(cache, "some/model-awq")
    snapshot.mkdir(parents=True)
    config = json.loads((checkpoint("qwen3_vl") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (snapshot / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServiceError) as caught:
        open_checkpoint("some/model-awq")
    assert caught.value.message.startswith(
        "some/model-awq: config.json: quantization_config.quant_method = 'awq' cannot be served"
    )


@pytest.mark.parametrize("model", ["nobody/no-such-model", "not a hub id", "a/b/c"])
def test_neither_a_folder_nor_to_be_had(cache: Path, model: str) -> None:
    with pytest.raises(ServiceError) as caught:
        open_checkpoint(model)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert caught.value.message.startswith(f"{model}: n")
