"""What the kernels accept: checks of their arguments, and keys in blocks or pages as one view."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prefill_kernels.csr import BlockCSR
from prefill_kernels.formats import DroppedBlocks, Tiling

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def as_blocks(x: Tensor, block_tokens: int, paged: bool) -> Tensor:
    """The complete blocks (or pages) as a view [blocks, kv_heads, block_tokens, head_dim]."""
    if paged:
        return x.permute(0, 2, 1, 3)
    kv_heads, keys, head_dim = x.shape
    head, token, _ = x.stride()
    size = (keys // block_tokens, kv_heads, block_tokens, head_dim)
    return x.as_strided(size, (block_tokens * token, head, token, 1))


def tma_usable(k_blocks: Tensor, v_blocks: Tensor) -> bool:
    """Whether Hopper's tensor memory accelerator can load blocks of this layout."""
    blocks, _, block_tokens, head_dim = k_blocks.shape
    if blocks == 0 or block_tokens < 64 or head_dim not in (64, 128, 256):
        return False
    if k_blocks.is_cuda and torch.cuda.get_device_capability(k_blocks.device)[0] < 9:
        return False
    size = k_blocks.element_size()
    return size == 2 and all(
        x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x.stride()[:3])
        for x in (k_blocks, v_blocks)
    )


def descriptor(blocks: Tensor, tokens: int) -> TensorDescriptor | None:
    """Loads [1, 1, tokens, head_dim] at a time; ``None`` if a block is shorter."""
    if blocks.shape[2] < tokens:
        return None
    shape = list(blocks.shape)
    strides = list(blocks.stride())
    return TensorDescriptor(blocks, shape, strides, [1, 1, tokens, shape[3]])


def check_attention(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> None:
    """Raise ``ValueError`` for queries, keys and tables that no kernel here accepts."""
    table = tiling.block_table
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v are not accepted; expected one of "
            f"{', '.join(map(str, DTYPES))} for all three"
        )
    shape = list(k.shape)
    wanted = 3 if table is None else 4
    if len(shape) != wanted or list(v.shape) != shape or q.dim() != 3 or q.shape[2] != shape[-1]:
        raise ValueError(
            f"shapes {list(q.shape)}, {shape}, {list(v.shape)} of q, k, v do not fit: expected "
            f"3 dimensions for q, {wanted} for k and v, and one head_dim"
        )
    if q.shape[2] > 256:
        raise ValueError(f"head_dim = {q.shape[2]} is above the limit of 256")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous")
    kv_heads = shape[0] if table is None else shape[2]
    if kv_heads == 0 or q.shape[0] % kv_heads:
        raise ValueError(f"{q.shape[0]} query heads are no multiple of {kv_heads} KV heads")
    keys = shape[1] if table is None else table.shape[-1] * tiling.block_tokens
    needed = tiling.q_offset + q.shape[1]
    if keys < needed:
        raise ValueError(f"{keys} keys are fewer than the {needed} up to the last query")
    if table is not None:
        _check_table(table, tiling.block_tokens, page_tokens=shape[1], kv_heads=kv_heads)


def _check_table(table: Tensor, block_tokens: int, *, page_tokens: int, kv_heads: int) -> None:
    if page_tokens != block_tokens:
        raise ValueError(f"pages hold {page_tokens} tokens, expected block_tokens = {block_tokens}")
    if table.dtype != torch.int32 or table.stride(-1) != 1:
        raise ValueError(f"block_table must be contiguous int32, got {table.dtype}")
    if table.dim() == 2 and table.shape[0] != kv_heads:
        raise ValueError(f"block_table has {table.shape[0]} rows for {kv_heads} KV heads")


def check_rows(
    kept: BlockCSR,
    dropped: DroppedBlocks | None,
    order: Tensor | None,
    *,
    kv_heads: int,
    tiles: int,
    candidates: int,
    head_dim: int,
) -> None:
    """Raise ``ValueError`` for what belongs to rows or blocks and does not fit their number.

    ``candidates`` are the blocks before the last tile's local region: the kernel reads so many.
    """
    rows = kv_heads * tiles
    if kept.row_ptr.shape != (rows + 1,):
        raise ValueError(
            f"row_ptr has {kept.row_ptr.numel()} entries, expected {rows + 1}: "
            f"{kv_heads} KV heads x {tiles} tiles, and one"
        )
    if kept.row_ptr.dtype != torch.int32 or kept.col.dtype != torch.int32:
        raise ValueError(f"the CSR must be int32, got {kept.row_ptr.dtype} and {kept.col.dtype}")
    if order is not None and (order.shape != (rows,) or order.dtype != torch.int32):
        raise ValueError(f"order is {order.dtype} {list(order.shape)}, expected int32 [{rows}]")
    if dropped is None:
        return
    bias = dropped.bias
    if bias.dtype != torch.float32 or bias.dim() != 3 or bias.shape[:2] != (kv_heads, tiles):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}, expected float32 "
            f"[{kv_heads}, {tiles}, blocks]"
        )
    if bias.shape[2] < candidates:
        raise ValueError(
            f"bias and summaries of {bias.shape[2]} blocks do not reach the {candidates} before "
            f"the last tile"
        )
    for name, x in (("k_mean", dropped.k_mean), ("v_mean", dropped.v_mean)):
        if list(x.shape) != [kv_heads, bias.shape[2], head_dim]:
            raise ValueError(
                f"{name} is {list(x.shape)}, expected {[kv_heads, bias.shape[2], head_dim]}"
            )
