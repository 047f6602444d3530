"""Key layouts of block-sparse attention: blocks as one view of either, and what it accepts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prefill_kernels.csr import BlockCSR

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """[pages, page_tokens, kv_heads, head_dim] -> [kv_heads, blocks * page_tokens, head_dim]."""
    kv_heads = pages.shape[2]
    table = block_table.expand(kv_heads, -1)
    heads = torch.arange(kv_heads, device=pages.device)[:, None]
    return pages[table, :, heads].flatten(1, 2)


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
    shape, strides = list(blocks.shape), list(blocks.stride())
    return TensorDescriptor(blocks, shape, strides, [1, 1, tokens, shape[3]])


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_tokens: int,
    tile_tokens: int,
    q_offset: int,
    query_step: int,
    scale: float,
    block_table: Tensor | None,
) -> None:
    """Raise ``ValueError`` for queries, keys and geometry that no kernel here accepts."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype} of q, k, v are not accepted; expected one of "
            f"{', '.join(map(str, DTYPES))} for all three"
        )
    if block_tokens < 16 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens = {block_tokens} is not a power of two of 16 or more")
    if tile_tokens < 1 or q_offset < 0:
        raise ValueError(f"tile_tokens = {tile_tokens} must be >= 1, q_offset = {q_offset} >= 0")
    if query_step < 1:
        raise ValueError(f"query_step = {query_step} is not accepted; expected 1 or more")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale} is not accepted; expected a positive number")
    shape = list(k.shape)
    wanted = 3 if block_table is None else 4
    if len(shape) != wanted or list(v.shape) != shape or q.dim() != 3 or q.shape[2] != shape[-1]:
        raise ValueError(
            f"shapes {list(q.shape)}, {shape}, {list(v.shape)} of q, k, v do not fit: expected "
            f"3 dimensions for q, {wanted} for k and v, and one head_dim"
        )
    if q.shape[2] > 256:
        raise ValueError(f"head_dim = {q.shape[2]} is above the limit of 256")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous")
    kv_heads = shape[0] if block_table is None else shape[2]
    if kv_heads == 0 or q.shape[0] % kv_heads:
        raise ValueError(f"{q.shape[0]} query heads are no multiple of {kv_heads} KV heads")
    keys = shape[1] if block_table is None else block_table.shape[-1] * block_tokens
    needed = q_offset + query_step * (q.shape[1] - 1) + 1
    if keys < needed:
        raise ValueError(f"{keys} keys are fewer than the {needed} up to the last query")
    if block_table is None:
        return
    if shape[1] != block_tokens:
        raise ValueError(f"pages hold {shape[1]} tokens, expected block_tokens = {block_tokens}")
    if block_table.dtype != torch.int32 or block_table.stride(-1) != 1:
        raise ValueError(f"block_table must be contiguous int32, got {block_table.dtype}")
    if block_table.dim() == 2 and block_table.shape[0] != kv_heads:
        raise ValueError(f"block_table has {block_table.shape[0]} rows for {kv_heads} KV heads")


def check_rows(
    csr: BlockCSR,
    kv_heads: int,
    tiles: int,
    candidates: int,
    head_dim: int,
    summaries: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    order: Tensor | None,
) -> None:
    """Raise ``ValueError`` for what belongs to rows or blocks and does not fit their number.

    ``candidates`` are the blocks before the last tile's local region: the kernel reads so many.
    """
    rows = kv_heads * tiles
    if csr.row_ptr.shape != (rows + 1,) and rows:
        raise ValueError(
            f"row_ptr has {csr.row_ptr.numel()} entries, expected {rows + 1}: "
            f"{kv_heads} KV heads x {tiles} tiles, and one"
        )
    if csr.row_ptr.dtype != torch.int32 or csr.col.dtype != torch.int32:
        raise ValueError(f"the CSR must be int32, got {csr.row_ptr.dtype} and {csr.col.dtype}")
    if order is not None and (order.shape != (rows,) or order.dtype != torch.int32):
        raise ValueError(f"order is {order.dtype} {list(order.shape)}, expected int32 [{rows}]")
    if (summaries is None) != (bias is None):
        raise ValueError("summaries and bias belong together")
    if summaries is None or bias is None:
        return
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
    for name, x in zip(("k_mean", "v_mean"), summaries, strict=True):
        if list(x.shape) != [kv_heads, bias.shape[2], head_dim]:
            raise ValueError(
                f"{name} is {list(x.shape)}, expected {[kv_heads, bias.shape[2], head_dim]}"
            )
