"""FP8 checkpoints: what is read of them, what it amounts to, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.weights.fp8 import dequantize, dequantized_weights
from prefill_service.models.weights.loading import load_model
from prefill_service.models.weights.quantization import Fp8Format
from prefill_service.models.weights.safetensors_files import read_tensors
from tests.models.weights.damage import edit_json, edit_weights, split
from tests.support.dequantized_copy import write_dequantized
from tools.make_fp8_checkpoint import quantize

BLOCK = (128, 96)
"""The tiny checkpoint's 256 x 256 and 512 x 256 matrices are no multiples of it."""
LAYER = "model.language_model.layers.1"
Q_PROJ = f"{LAYER}.self_attn.q_proj"


@pytest.fixture(scope="module")
def fp8(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(checkpoint("qwen3_vl"), tmp_path_factory.mktemp("fp8") / "block", block=BLOCK)


@pytest.fixture
def folder(fp8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8, tmp_path / "model"))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (128, 128), (130, 257), (64, 300)])
@pytest.mark.parametrize("block", [(128, 128), (3, 2), (1, 128), None])
def test_the_product_of_every_element_and_its_scale(
    shape: tuple[int, int], block: tuple[int, int] | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    height, width = block or (1, shape[1])
    grid = (-(-shape[0] // height), -(-shape[1] // width))
    scale = torch.rand(grid, generator=generator).to(torch.bfloat16)
    out = dequantize(weight, scale, block)
    assert out.dtype is torch.float32
    factors = weight.float().tolist()
    scales = scale.float().tolist()
    for i, row in enumerate(out.tolist()):
        for j, value in enumerate(row):
            assert value == factors[i][j] * scales[i // height][j // width]


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((3,), 0.5)])
def test_scales_of_a_tensor_or_its_rows(scale: torch.Tensor) -> None:
    weight = torch.tensor([[1.0, -2.0], [448.0, 0.0], [3.0, 0.5]])
    assert torch.equal(dequantize(weight.to(torch.float8_e4m3fn), scale, None), weight / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_the_model_has_the_weights_of_a_dequantized_copy(
    checkpoint: Callable[..., Path], tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    path = quantize(checkpoint("qwen3_vl"), tmp_path / "fp8", scheme, block=BLOCK)
    copy = write_dequantized(path, tmp_path / "copy")
    opened = open_checkpoint(str(path))
    assert opened.fp8 == Fp8Format(
        method="fp8" if scheme == "block" else "compressed-tensors",
        block=BLOCK if scheme == "block" else None,
        scale_suffix="_scale_inv" if scheme == "block" else "_scale",
        ignored=opened.fp8.ignored if opened.fp8 else (),
    )
    model = load_model(opened.path, opened.fp8, dtype=dtype)
    expected = AutoModel.from_pretrained(copy, dtype=dtype).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {value.dtype for value in found.values()} == {dtype}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_quantizing_leaves_little_error(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """e4m3 has three bits of fraction: no element moves by more than a sixteenth and the scale."""
    source = checkpoint(family)
    path = quantize(source, tmp_path / "fp8")
    opened = open_checkpoint(str(path))
    assert opened.fp8 is not None
    original = load_file(source / "model.safetensors")
    weights = dequantized_weights(path, read_tensors(path, ""), opened.fp8)
    assert weights.keys() == original.keys()
    changed = 0
    for name, weight in weights.items():
        value = weight[...]
        changed += not torch.equal(value, original[name])
        torch.testing.assert_close(value, original[name], rtol=0.07, atol=0.01)
    assert changed == 7 * opened.shape.num_layers


def test_shards_whose_scales_are_in_another_file(folder: Path) -> None:
    whole = load_file(write_dequantized(folder, folder.parent / "copy") / "model.safetensors")
    split(folder)
    opened = open_checkpoint(str(folder))
    tensors = read_tensors(folder, "")
    assert opened.fp8 is not None
    assert len({tensors[name].file for name in tensors}) == 2
    for name, weight in dequantized_weights(folder, tensors, opened.fp8).items():
        assert torch.equal(weight[...], whole[name]), name


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no scales": (
        lambda w: w.pop(f"{Q_PROJ}.weight_scale_inv"),
        f"'{Q_PROJ}.weight' is F8_E4M3, its scales '{Q_PROJ}.weight_scale_inv' are missing",
    ),
    "scales of another block": (
        lambda w: w.update({f"{Q_PROJ}.weight_scale_inv": torch.ones(2, 2)}),
        "of shape [2, 2]; a weight of shape [256, 256] needs [2, 3] in a floating-point dtype",
    ),
    "scales of integers": (
        lambda w: w.update({f"{Q_PROJ}.weight_scale_inv": torch.ones(2, 3, dtype=torch.int8)}),
        "is I8 of shape [2, 3]; ",
    ),
    "e5m2": (
        lambda w: w.update({f"{Q_PROJ}.weight": w[f"{Q_PROJ}.weight"].to(torch.float8_e5m2)}),
        f"'{Q_PROJ}.weight' is F8_E5M2 of shape [256, 256]; supported are",
    ),
    "left in full": (
        lambda w: w.update({f"{Q_PROJ}.weight": w[f"{Q_PROJ}.weight"].float()}),
        f"'{Q_PROJ}.weight_scale_inv' are scales of a weight that is not F8_E4M3",
    ),
    "a norm": (
        lambda w: w.update(
            {f"{LAYER}.input_layernorm.weight": torch.ones(256).to(torch.float8_e4m3fn)}
        ),
        f"'{LAYER}.input_layernorm.weight' is F8_E4M3 of shape [256]",
    ),
    "the head, which is listed": (
        lambda w: w.update(
            {
                "lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn),
                "lm_head.weight_scale_inv": torch.ones(6, 3),
            }
        ),
        "'lm_head.weight' is F8_E4M3, but config.json says its module is not quantized",
    ),
    "kv scales": (
        lambda w: w.update({f"{LAYER}.self_attn.k_scale": torch.ones(1)}),
        "is a scale of an FP8 KV cache, which is not supported",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_do_not_fit_the_configuration(folder: Path, kind: str) -> None:
    change, text = CHANGES[kind]
    edit_weights(folder, change)
    with pytest.raises(ServiceError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.reason is Reason.MODEL_INVALID
    assert text in caught.value.message


def test_a_configuration_of_fp8_without_fp8(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=entry))
    with pytest.raises(ServiceError, match="says fp8, but no tensor is F8_E4M3"):
        open_checkpoint(str(folder))
