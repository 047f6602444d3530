"""Identity of a checkpoint: KV of one set of weights must never be read by another."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 64 << 10


def fingerprint_model(folder: Path) -> str:
    """sha256 over config.json and, of each .safetensors file, name, size and 64 samples.

    Hashing all bytes of a 16 GB checkpoint would cost every start tens of seconds; a fine-tune
    changes every tensor, so samples spread over the file tell two checkpoints apart.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
