"""What a rank process is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_service.attention.adaptive import SparseSettings
from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.kv.manifest import KVLayout
from prefill_service.models.checkpoint import Checkpoint

_DEFAULT_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank of one generation of the group; ``init_method`` is torch's rendezvous."""

    rank: int
    generation: int
    engine: EngineConfig
    video: VideoConfig
    checkpoint: Checkpoint
    dtype: str
    device: str
    threads: int
    init_method: str
    socket_path: str


def chunk_tokens(engine: EngineConfig, device: str) -> int:
    """Tokens per chunk and rank: as configured, or a device's default."""
    return engine.chunk_tokens or _DEFAULT_CHUNK_TOKENS[device]


def sparse_settings(engine: EngineConfig, from_tokens: int) -> SparseSettings:
    """Sizes of sparse attention: a segment of 16 blocks, a tile of at least one block."""
    block = engine.sparse_block_tokens
    return SparseSettings(from_tokens, block_tokens=block, tile_tokens=max(128, block))


def kv_layout(checkpoint: Checkpoint, dtype: str, engine: EngineConfig) -> KVLayout:
    """Shape of a KV page of this model."""
    return KVLayout(
        checkpoint.num_layers,
        checkpoint.num_kv_heads,
        checkpoint.head_dim,
        dtype,
        engine.page_tokens,
    )
