"""Ways to damage a checkpoint's folder, as downloads, tools and people do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` alter the object in a JSON file."""
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Let ``change`` alter the tensors of the only weights' file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` alter the header of the only weights' file; its data stays."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_raw_header(folder, json.dumps(header), raw[8 + length :])


def write_raw_header(folder: Path, header: str, data: bytes) -> None:
    text = header.encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def split(folder: Path) -> None:
    """Two shards and an index in the place of the one file."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_fp8(tensors: dict[str, Tensor], name: str) -> None:
    """Store one weight as e4m3, without scales."""
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
