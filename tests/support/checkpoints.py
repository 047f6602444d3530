"""Checkpoints that nobody loads."""

from __future__ import annotations

from pathlib import Path

from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.model_shape import ModelShape


def described_checkpoint(path: Path, num_layers: int, q_heads: int, kv_heads: int) -> Checkpoint:
    """What the service would know of a small checkpoint, if there were one."""
    shape = ModelShape(
        name="described",
        num_layers=num_layers,
        hidden=16 * q_heads,
        intermediate=64,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=16,
        dtype="float32",
    )
    return Checkpoint(
        path=path,
        family="qwen3_vl",
        fingerprint="f",
        shape=shape,
        max_position_embeddings=1024,
    )
