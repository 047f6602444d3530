"""The configuration resolved against a checkpoint and a device."""

from __future__ import annotations

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import TILE_TOKENS
from prefill_service.config import (
    AUTO,
    EngineConfig,
    memory_bytes,
    resolve_kv_pool_bytes,
)
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import KVLayout
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.parallel.exchanges.catalog import EXCHANGES, GATHER, exchange_named
from prefill_service.parallel.exchanges.registry import ExchangeChoice, choose_exchange

_DEFAULT_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}


def chunk_tokens(engine: EngineConfig, device: str) -> int:
    """Tokens per chunk and rank: as configured, or a device's default."""
    return engine.chunk_tokens or _DEFAULT_CHUNK_TOKENS[device]


def exchange_choice(checkpoint: Checkpoint, engine: EngineConfig, ranks: int = 0) -> ExchangeChoice:
    """The configured exchange; ``gather`` where none is, which bounds what a prefix may take.

    Args:
        ranks: number of ranks of the subgroup that computes, by default all. A smaller subgroup
            has the configured Ulysses degree where that divides it, else one of its own.

    Raises:
        ServiceError: CONFIG_INVALID, this model's heads do not allow it on so many ranks, or its
            keys cannot be offloaded as configured.
    """
    kind = GATHER if engine.exchange == AUTO else exchange_named(engine.exchange)
    wanted = engine.ulysses_degree
    ranks = ranks or engine.ranks
    if ranks < engine.ranks and wanted and ranks % wanted:
        wanted = 0
    if engine.kv_offload == "host" and not kind.offloads:
        can = " or ".join(repr(str(other)) for other in EXCHANGES if other.offloads)
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"engine.kv_offload = 'host' is not accepted with engine.exchange = {str(kind)!r}, "
            f"whose keys stay on the device; expected 'off', or engine.exchange = {can}",
            name="engine.kv_offload",
        )
    try:
        return choose_exchange(
            kind,
            ranks,
            q_heads=checkpoint.shape.q_heads,
            kv_heads=checkpoint.shape.kv_heads,
            wanted=wanted,
        )
    except ValueError as error:
        text = f"engine.exchange = {engine.exchange!r} is not accepted: {error}"
        raise ServiceError(Reason.CONFIG_INVALID, text, name="engine.exchange") from error


def is_sparse(
    num_tokens: int, exchange: ExchangeChoice, policy: AttentionPolicy, from_tokens: int
) -> bool:
    """Whether some queries of a prompt are attended to sparsely."""
    return exchange.kind.sparse and not policy.exact and num_tokens >= from_tokens


def sparse_settings(engine: EngineConfig, from_tokens: int) -> SparseSettings:
    """Sizes of sparse attention: a segment of 16 blocks, a tile of at least one block."""
    block = engine.sparse_block_tokens
    return SparseSettings(from_tokens, block_tokens=block, tile_tokens=max(TILE_TOKENS, block))


def kv_layout(checkpoint: Checkpoint, dtype: str, engine: EngineConfig) -> KVLayout:
    """The shape of a KV page of this model."""
    shape = checkpoint.shape
    return KVLayout(
        num_layers=shape.num_layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        page_tokens=engine.page_tokens,
    )


def kv_budget(
    engine: EngineConfig,
    checkpoint: Checkpoint,
    dtype: str,
    *,
    device: str,
    exchange: ExchangeChoice | None = None,
    ranks: int = 0,
) -> KVBudget:
    """Bounds on a prefix's KV memory; the front end and the workers of a host compute the same.

    Args:
        exchange: the one that computes the prefix, by default the configured one.
        ranks: number of ranks of the subgroup that computes it, by default all.

    Raises:
        ServiceError: CONFIG_INVALID, see ``exchange_choice``.
    """
    ranks = ranks or engine.ranks
    choice = exchange or exchange_choice(checkpoint, engine, ranks)
    return KVBudget(
        kv_layout(checkpoint, dtype, engine),
        resolve_kv_pool_bytes(engine),
        engine.kv_working_bytes or _default_working_bytes(engine.ranks, device),
        offload=engine.kv_offload == "host" and choice.kind.offloads,
        kv_shards=choice.kv_shards(ranks, checkpoint.shape.q_heads, checkpoint.shape.kv_heads),
    )


def _default_working_bytes(ranks: int, device: str) -> int:
    """A quarter of the memory, divided evenly among the ranks that use it."""
    if device == "cpu":
        return memory_bytes() // 4 // ranks
    import torch

    ranks_of_a_gpu = -(-ranks // torch.cuda.device_count())
    return int(torch.cuda.get_device_properties(0).total_memory) // 4 // ranks_of_a_gpu
