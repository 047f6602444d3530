"""The tensors of a checkpoint's folder as the headers of its safetensors files describe them.

A header is some kilobytes of JSON with the name, dtype, shape and place of each tensor
(https://huggingface.co/docs/safetensors). Reading all of them costs milliseconds and finds files
that are truncated, missing or not what their name says, before gigabytes are loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from prefill_service.models.weights.refusal import refuse

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SIGNATURES = {
    b"PK\x03\x04": "a PyTorch or zip archive",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF file",
    b"<!DO": "an HTML page",
    b"<htm": "an HTML page",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a header describes it.

    Attributes:
        dtype: by safetensors' name, e.g. ``"BF16"``.
        shape: of the tensor.
        file: that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_tensors(folder: Path, model: str) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, with every file checked against its header.

    Args:
        folder: of the checkpoint.
        model: as the operator named it, for errors.

    Raises:
        ServiceError: MODEL_INVALID for a file that is missing, truncated or not safetensors, and
            for an index that does not agree with the files.
    """
    places = _weight_map(folder, model)
    files = sorted(set(places.values())) if places else [WEIGHTS]
    _check_readers_agree(folder, model, files)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(folder, file, model).items():
            if name in tensors:
                raise refuse(
                    model, file, f"tensor {name!r} is in {tensors[name].file} too", tensor=name
                )
            tensors[name] = tensor
    for name, file in (places or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise refuse(model, file, f"tensor {name!r} is missing; {INDEX} names it", tensor=name)
    return tensors


def _weight_map(folder: Path, model: str) -> dict[str, str] | None:
    """Files by tensor, of the index; ``None`` without one."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).is_file():
            raise refuse(model, WEIGHTS, _missing_text(folder))
        return None
    places = read_json(folder, INDEX, model).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise refuse(model, INDEX, "weight_map is not an object that names files")
    for file in places.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise refuse(model, INDEX, f"weight_map names {file!r}, no file of this folder")
    missing = sorted(file for file in set(places.values()) if not (folder / file).is_file())
    if missing:
        count = f"{len(missing)} of {len(set(places.values()))} files that {INDEX} names"
        raise refuse(model, missing[0], f"missing ({count})")
    return places


def _missing_text(folder: Path) -> str:
    """Why there are no weights that can be read, as far as the folder shows it."""
    supported = f"supported are {WEIGHTS} and shards with {INDEX}"
    others = [
        path.name
        for pattern in ("*.gguf", "*.bin", "*.pt", "*.pth", "*.onnx", "*.safetensors")
        for path in sorted(folder.glob(pattern))
    ]
    if not others:
        return f"missing; {supported}"
    if others[0].endswith(".safetensors"):
        return f"and {INDEX} are missing, while {others[0]} is there; {supported}"
    return f"missing, the folder has {others[0]}; {supported}"


def _check_readers_agree(folder: Path, model: str, files: list[str]) -> None:
    """Refuse weights that vLLM would load and transformers would not, or the reverse."""
    if WEIGHTS not in files and (folder / WEIGHTS).exists():
        text = f"is beside {INDEX}, which does not name it: which of the two is the model?"
        raise refuse(model, WEIGHTS, text)
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files)
    unindexed = others if files == [WEIGHTS] and not (folder / INDEX).exists() else []
    for name in others:
        if name in unindexed or name.startswith("consolidated"):
            text = f"is beside {', '.join(files[:2])}; vLLM would load it too. Move it away"
            raise refuse(model, name, text)


def _read_header(folder: Path, file: str, model: str) -> dict[str, StoredTensor]:
    """The tensors of one file, whose size must be what they take."""
    path = folder / file
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        kind = next((name for sign, name in _SIGNATURES.items() if start.startswith(sign)), "")
        if kind:
            raise refuse(model, file, f"is {kind}, not safetensors")
        if len(start) < _LENGTH_BYTES or not 2 <= length <= _MAX_HEADER_BYTES:
            raise refuse(model, file, f"is no safetensors file ({size} bytes)")
        raw = stream.read(length)
    if len(raw) < length:
        raise refuse(model, file, f"is truncated: {size} bytes, its header alone takes {length}")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise refuse(model, file, f"has a broken safetensors header: {error}") from error
    _check_places(entries, size - _LENGTH_BYTES - length, file=file, model=model)
    return {name: StoredTensor(entry.dtype, entry.shape, file) for name, entry in entries.items()}


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, value: Mapping[str, Any]) -> _Entry:
    """Raises ValueError, TypeError or KeyError for what is not an entry of a header."""
    dtype = value["dtype"]
    if dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}")
    shape = tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has shape {shape} and data_offsets {begin}, {end}")
    if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name!r}, {dtype} of shape {shape}, has {end - begin} bytes")
    return _Entry(dtype, shape, begin, end)


def _check_places(entries: Mapping[str, _Entry], size: int, *, file: str, model: str) -> None:
    """Tensors must follow each other without gaps up to the end of the file."""
    cursor = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != cursor:
            text = f"has a broken safetensors header: tensor {name!r} begins at {entry.begin}"
            raise refuse(model, file, f"{text}, not at {cursor}", tensor=name)
        cursor = entry.end
    if size < cursor:
        text = f"is truncated: {size} bytes of tensors, its header describes {cursor}"
        raise refuse(model, file, f"{text}. Download it again")
    if size > cursor:
        text = f"has {size} bytes of tensors, its header describes {cursor}"
        raise refuse(model, file, text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys is there twice."""
    names = Counter(name for name, _ in pairs)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


def read_json(folder: Path, file: str, model: str) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        ServiceError: MODEL_INVALID for a file that is missing or no JSON object.
    """
    try:
        data = json.loads((folder / file).read_text(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise refuse(model, file, "missing") from None
    except (OSError, ValueError) as error:
        raise refuse(model, file, f"cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise refuse(model, file, "is not a JSON object")
    return data


def check_no_lfs_pointers(folder: Path, model: str) -> None:
    """Refuse a clone whose large files are Git LFS pointers still.

    Raises:
        ServiceError: MODEL_INVALID, naming the first such file.
    """
    pointers = list(_lfs_pointers(folder))
    if pointers:
        text = "is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder"
        raise refuse(model, pointers[0], text)


def _lfs_pointers(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as stream:
                if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    yield path.name
