"""Sampling defaults of a checkpoint are those that vLLM reads from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from vllm.config import ModelConfig

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import Sampling
from prefill_service.models.generation_defaults import read_generation_defaults
from prefill_service.scheduling.admission import fit_sampling
from tests.models.weights.damage import edit_json

FILE = "generation_config.json"
QWEN3_VL = {
    "do_sample": True,
    "top_p": 0.8,
    "top_k": 20,
    "temperature": 0.7,
    "repetition_penalty": 1.0,
}
"""As Qwen3-VL-8B-Instruct publishes it."""


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))


def defaults_of(folder: Path) -> dict[str, float]:
    return dict(read_generation_defaults(folder, AutoConfig.from_pretrained(folder)))


@pytest.mark.parametrize(
    "values",
    [
        {},
        QWEN3_VL,
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
        {"repetition_penalty": 1.05, "temperature": 0.000001},  # as Qwen2.5-VL's
        {"min_p": 0.1, "max_new_tokens": 77},
    ],
)
def test_what_vllm_reads(folder: Path, values: dict[str, Any]) -> None:
    edit_json(folder, FILE, lambda data: data.update(values))
    assert defaults_of(folder) == ModelConfig(model=str(folder)).get_diff_sampling_param()


def test_without_the_file(folder: Path) -> None:
    (folder / FILE).unlink()
    assert defaults_of(folder) == {}


@pytest.mark.parametrize("value", ["hot", [1]])
def test_a_value_that_is_no_number(folder: Path, value: object) -> None:
    edit_json(folder, FILE, lambda data: data.update(repetition_penalty=value))
    with pytest.raises(ServiceError, match=FILE) as caught:
        defaults_of(folder)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_request_wins_over_the_checkpoint(folder: Path) -> None:
    edit_json(folder, FILE, lambda data: data.update(QWEN3_VL, max_new_tokens=50))
    defaults = defaults_of(folder)
    settled = fit_sampling(Sampling(top_k=5, temperature=0.0), None, 10, 1000, defaults=defaults)
    assert (settled.top_k, settled.top_p, settled.temperature) == (5, 0.8, 0.0)
    assert settled.max_tokens == 50
    assert fit_sampling(Sampling(), 60, 10, 1000, defaults=defaults).max_tokens == 60
    assert fit_sampling(Sampling(), None, 10, 40, defaults=defaults).max_tokens == 30


def test_greedy_where_nobody_names_a_temperature() -> None:
    assert Sampling().to_vllm()["temperature"] == 0.0
    assert Sampling().fill_in({"temperature": 0.7}).to_vllm()["temperature"] == 0.7
    assert Sampling(temperature=0.0).fill_in({"temperature": 0.7}).to_vllm()["temperature"] == 0.0
