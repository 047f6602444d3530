"""A plain float32 copy of an FP8 checkpoint, element by element, for comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_dequantized(source: Path, out: Path) -> Path:
    """Write ``out``: each FP8 weight times the scale at (row // height, column // width)."""
    config = json.loads((source / "config.json").read_text())
    height, width = config.pop("quantization_config").get("weight_block_size", (1, 1 << 40))
    weights = load_file(source / "model.safetensors")
    for name, stored in list(weights.items()):
        if stored.dtype != torch.float8_e4m3fn:
            continue
        suffix = "_scale_inv" if f"{name}_scale_inv" in weights else "_scale"
        scale = weights.pop(name + suffix).float()
        rows, columns = (torch.arange(size) for size in stored.shape)
        if scale.numel() > 1:
            scale = scale[rows[:, None] // height, columns[None] // width]
        weights[name] = stored.float() * scale
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "config.json").write_text(json.dumps(config))
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out
