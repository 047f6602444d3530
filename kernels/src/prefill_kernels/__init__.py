"""Block-sparse attention in Triton, with a PyTorch reference and a CPU back end.

Four steps: ``summarize_blocks`` describes each block of keys, ``estimate_block_loss`` says what its
summary would misplace in each query tile, ``select_blocks`` keeps the blocks that would misplace
most, ``block_sparse_attention`` attends to them and lets the summaries stand for the others.
``adaptive_attention`` takes all four.

Names are imported on first use, so that ``prefill_kernels.cpu`` and ``prefill_kernels.reference``
need no Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefill_kernels.adaptive import AdaptiveOutput, adaptive_attention
    from prefill_kernels.block_attention import (
        block_sparse_attention,
        block_sparse_lse,
        longest_first,
    )
    from prefill_kernels.block_loss import estimate_block_loss
    from prefill_kernels.block_selection import select_blocks
    from prefill_kernels.block_summaries import summarize_blocks
    from prefill_kernels.csr import BlockCSR
    from prefill_kernels.formats import (
        AttentionOptions,
        BlockLoss,
        DroppedBlocks,
        Summaries,
        Tiling,
    )

__all__ = [
    "AdaptiveOutput",
    "AttentionOptions",
    "BlockCSR",
    "BlockLoss",
    "DroppedBlocks",
    "Summaries",
    "Tiling",
    "adaptive_attention",
    "block_sparse_attention",
    "block_sparse_lse",
    "estimate_block_loss",
    "longest_first",
    "select_blocks",
    "summarize_blocks",
]

_MODULES = {
    "AdaptiveOutput": "adaptive",
    "adaptive_attention": "adaptive",
    "block_sparse_attention": "block_attention",
    "block_sparse_lse": "block_attention",
    "longest_first": "block_attention",
    "estimate_block_loss": "block_loss",
    "select_blocks": "block_selection",
    "summarize_blocks": "block_summaries",
    "BlockCSR": "csr",
}
"""Where a name is, if it is not in ``formats``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'formats')}")
    return getattr(module, name)
