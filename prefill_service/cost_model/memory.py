"""Bytes of K and V, and of the buffers that move them, on the rank that needs most."""

from __future__ import annotations

from prefill_service.cost_model.chunking import Chunking
from prefill_service.cost_model.model_shape import ModelShape
from prefill_service.cost_model.schemes import Exchange, Scheme, split_heads
from prefill_service.cost_model.traffic import (
    BLOCK_TOKENS,
    DEFAULT_OPTIONS,
    TrafficOptions,
    summary_bytes,
    traffic,
)


def memory_bytes(
    scheme: Scheme,
    shape: ModelShape,
    chunking: Chunking,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> int:
    """K and V of all attending layers on the fullest rank, and one layer's exchange buffers.

    Weights, activations and the pages kept for hand-off are not in it: they depend neither on the
    exchange nor, but for the pages, on the prompt's length.
    """
    tokens = int(chunking.tokens.sum())
    held = int(chunking.held[-1].max())
    layers, kv = shape.attending_layers, shape.kv_bytes
    moved = traffic(scheme, shape, chunking, options)
    arriving = int((moved.exposed.received + moved.hidden.received).max())
    match scheme.exchange:
        case Exchange.GATHER:  # received into its final place
            return layers * tokens * kv
        case Exchange.RING | Exchange.MULTI_RING:
            # Of one layer: the shard being attended to and the one arriving meanwhile.
            return (layers + _moving(scheme)) * held * kv
        case Exchange.ULYSSES | Exchange.USP | Exchange.ULYSSES_GATHER:
            heads = int(split_heads(shape, scheme.ulysses, scheme.whole_groups)[1].max())
            row = int(chunking.rows(scheme.ulysses).held[-1].max())
            if scheme.exchange is Exchange.ULYSSES_GATHER:  # of all rows, received in place
                row = tokens
            per_layer = row * heads * 2 * shape.head_dim * shape.bytes_per_element
            return (layers + _moving(scheme)) * per_layer + int(moved.exposed.received.max())
        case Exchange.PASS_Q:
            return layers * held * kv + arriving
        case Exchange.DEMAND:  # every rank keeps the summaries of all blocks
            blocks = int((-(-chunking.tokens // BLOCK_TOKENS)).sum())
            return layers * (held * kv + blocks * summary_bytes(shape)) + arriving


def _moving(scheme: Scheme) -> int:
    circulates = scheme.ring > 1 and scheme.exchange is not Exchange.ULYSSES_GATHER
    return 2 if circulates else 0
