"""Quantize a checkpoint to FP8 as its publishers do: e4m3 weights with a scale for each block.

    python -m tools.make_fp8_checkpoint build/checkpoints/qwen3_vl build/checkpoints/qwen3_vl-fp8

The linear layers of the decoder become ``float8_e4m3fn`` with a ``weight_scale_inv`` for each
block of 128 x 128. Embeddings, output layer, norms and the vision tower stay as they are, and
``config.json`` names them: the layout of Qwen3-VL-8B-Instruct-FP8. ``--scheme channel`` and
``tensor`` write the two layouts of compressed-tensors (llm-compressor's FP8_DYNAMIC and FP8).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCHEMES = ("block", "channel", "tensor")
LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)


def quantize(
    source: Path,
    out: Path,
    scheme: str = "block",
    *,
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write ``out``, an FP8 copy of a checkpoint, or return at once if it is there.

    Args:
        source: its folder, with ``model.safetensors``.
        out: the new folder.
        scheme: one of ``SCHEMES``.
        block: rows and columns of a block, for the scheme of that name.
        scale_dtype: of the scales. Qwen's are bfloat16, DeepSeek's float32.
    """
    if out.exists():
        return out
    weights: dict[str, Tensor] = {}
    ignored = ["lm_head"]
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, last = name.rpartition(".")
        linear = last == "weight" and tensor.dim() == 2 and "embed" not in module
        if linear and "visual." in name:
            ignored.append(module)
        if not linear or module in ignored:
            weights[name] = tensor
            continue
        rows, columns = tensor.shape
        size = {"block": block, "channel": (1, columns), "tensor": (rows, columns)}
        quantized, scale = _quantize(tensor.float(), size[scheme])
        weights[name] = quantized
        if scheme == "tensor":
            scale = scale.reshape(1)
        suffix = "_scale_inv" if scheme == "block" else "_scale"
        weights[name + suffix] = scale.to(scale_dtype)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = (
        _fine_grained(block, ignored) if scheme == "block" else _compressed(scheme, ignored)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    shutil.copytree(
        source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    save_file(weights, staging / "model.safetensors", {"format": "pt"})
    (staging / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(staging, out)
    return out


def _quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[rows, columns] fp32 to e4m3 and the scales [blocks down, blocks across] in fp32."""
    rows, columns = weight.shape
    down = -(-rows // block[0])
    across = -(-columns // block[1])
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            # Rounded as it will be stored, so that no quotient leaves e4m3's range.
            scale = weight[part].abs().max().clamp(min=1e-12) / LARGEST
            scale = scale.to(torch.bfloat16).float()
            scales[i, j] = scale
            quantized[part] = (weight[part] / scale).clamp(-LARGEST, LARGEST).to(quantized.dtype)
    return quantized, scales


def _fine_grained(block: tuple[int, int], ignored: list[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ignored,
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def _compressed(strategy: str, ignored: list[str]) -> dict[str, Any]:
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "config_groups": {
            "group_0": {
                "format": "float-quantized",
                "input_activations": {**fp8, "dynamic": True, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**fp8, "dynamic": False, "strategy": strategy},
            }
        },
        "format": "float-quantized",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0])
    arguments = parser.parse_args()
    print(quantize(arguments.source, arguments.out, arguments.scheme))


if __name__ == "__main__":
    main()
