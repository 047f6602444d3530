"""The blocks that a rank attends to: its own share's, and those it fetched from their owners."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention_shape import PromptShape


class BlockCache:
    """K and V of all blocks of one layer, of which some are valid.

    Args:
        num_blocks: of the prompt.
        block_tokens: tokens per block.
        shape: of the model's attention.

    Attributes:
        blocks: [blocks, block_tokens, 2, kv_heads, head_dim]; what is not valid is stale.
    """

    def __init__(self, num_blocks: int, block_tokens: int, shape: PromptShape) -> None:
        self._num_tokens = shape.num_tokens
        self._block_tokens = block_tokens
        size = (num_blocks, block_tokens, *shape.row)
        self.blocks = torch.zeros(size, dtype=shape.torch_dtype, device=shape.device)
        self._valid = torch.zeros(shape.kv_heads, num_blocks, dtype=torch.bool)  # on the host

    @property
    def token_rows(self) -> Tensor:
        """[tokens, 2, kv_heads, head_dim] of the prompt (a view)."""
        rows: Tensor = self.blocks.flatten(0, 1)
        return rows[: self._num_tokens]

    def store_run(self, start: int, kv: Tensor) -> None:
        """Store the run of tokens from ``start`` on; blocks that are whole in it become valid.

        Args:
            kv: [tokens, 2, kv_heads, head_dim].
        """
        end = start + len(kv)
        self.token_rows[start:end] = kv
        self._valid[:, -(-start // self._block_tokens) : end // self._block_tokens] = True

    def invalidate(self, first: int, end: int | None = None) -> None:
        """Blocks [first, end), or all from ``first`` on, have to be stored again."""
        self._valid[:, first:end] = False

    def take_missing(self, wanted: Tensor, heads: Tensor) -> Tensor:
        """Which wanted blocks are not valid; they count as valid from now on.

        The caller stores them.

        Args:
            wanted: [len(heads), blocks] bool; blocks after these are not wanted.
            heads: KV heads.

        Returns:
            [kv_heads, blocks] bool, on the host.
        """
        missing = torch.zeros_like(self._valid)
        missing[heads.cpu(), : wanted.shape[1]] = wanted.cpu()
        missing &= ~self._valid
        self._valid.logical_or_(missing)
        return missing

    def store_blocks(self, ids: np.ndarray, selected: Tensor, kv: Tensor) -> None:
        """Store blocks of single KV heads.

        Args:
            ids: [n] blocks of the prompt.
            selected: [kv_heads, n] bool.
            kv: [selected, block_tokens, 2, head_dim].
        """
        heads, slots = selected.nonzero(as_tuple=True)
        self.blocks[torch.from_numpy(ids)[slots], :, :, heads] = kv
