"""KV between token order and pages [pages, page_tokens, kv_heads, head_dim]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_kernel(p_pages, p_rows, p_slots, stride_page, stride_slot, stride_head,
                stride_row, stride_row_head, page_tokens, KV_HEADS: tl.constexpr,
                HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
                GATHER: tl.constexpr):  # fmt: skip
    """One token: from its slot to its row, or back. A negative slot is nowhere."""
    i_token = tl.program_id(0)
    slot = tl.load(p_slots + i_token).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_h < KV_HEADS) & (o_d < HEAD_DIM)
    used = (o_h < tl.where(slot >= 0, KV_HEADS, 0)) & (o_d < HEAD_DIM)
    p_slot = p_pages + slot // page_tokens * stride_page + slot % page_tokens * stride_slot
    p_row = p_rows + i_token.to(tl.int64) * stride_row
    if GATHER:
        x = tl.load(p_slot + o_h * stride_head + o_d, mask=used, other=0.0)
        tl.store(p_row + o_h * stride_row_head + o_d, x, mask=mask)
    else:
        x = tl.load(p_row + o_h * stride_row_head + o_d, mask=used)
        tl.store(p_slot + o_h * stride_head + o_d, x, mask=used)


def slots_of_blocks(block_table: Tensor, tokens: int, page_tokens: int) -> Tensor:
    """[tokens] int64: slot (page * page_tokens + offset) of each token of a paged sequence."""
    if tokens > block_table.numel() * page_tokens:
        raise ValueError(f"{tokens} tokens exceed {block_table.numel()} pages of {page_tokens}")
    position = torch.arange(tokens, device=block_table.device)
    return block_table.long()[position // page_tokens] * page_tokens + position % page_tokens


def gather_from_pages(pages: Tensor, slots: Tensor) -> Tensor:
    """Rows of slots, in their order.

    Args:
        pages: [pages, page_tokens, kv_heads, head_dim], last dimension contiguous.
        slots: [tokens] int32 or int64; a negative slot gives zeros.

    Returns:
        [tokens, kv_heads, head_dim].
    """
    rows = torch.empty((len(slots), *pages.shape[2:]), dtype=pages.dtype, device=pages.device)
    _copy(pages, rows, slots, gather=True)
    return rows


def scatter_to_pages(rows: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Write rows into their slots.

    Args:
        rows: [tokens, kv_heads, head_dim], last dimension contiguous.
        pages: [pages, page_tokens, kv_heads, head_dim] like ``rows``, last dimension contiguous.
        slots: [tokens] int32 or int64, distinct; a negative slot (padding) is left out.
    """
    _copy(pages, rows, slots, gather=False)


def _copy(pages: Tensor, rows: Tensor, slots: Tensor, *, gather: bool) -> None:
    tokens, kv_heads, head_dim = rows.shape
    if pages.dim() != 4 or pages.shape[2:] != rows.shape[1:] or slots.shape != (tokens,):
        raise ValueError(
            f"pages {list(pages.shape)}, rows {list(rows.shape)} and slots {list(slots.shape)} "
            "do not fit"
        )
    if pages.dtype != rows.dtype or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"dtypes {pages.dtype}, {rows.dtype}, {slots.dtype} do not fit")
    if pages.stride(3) != 1 or rows.stride(2) != 1:
        raise ValueError("the last dimension of pages and rows must be contiguous")
    if tokens == 0:
        return
    copy_kernel[(tokens,)](
        pages, rows, slots.contiguous(), *pages.stride()[:3], *rows.stride()[:2], pages.shape[1],
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_H=triton.next_power_of_2(kv_heads), GATHER=gather, enable_fp_fusion=True,
    )  # fmt: skip


def gather_reference(pages: Tensor, slots: Tensor) -> Tensor:
    """What ``gather_from_pages`` computes, naively."""
    rows = pages.flatten(0, 1)[slots.clamp(min=0).long()]
    return rows.masked_fill((slots < 0)[:, None, None], 0)


def scatter_reference(rows: Tensor, pages: Tensor, slots: Tensor) -> None:
    """What ``scatter_to_pages`` does, naively."""
    used = slots >= 0
    page, offset = slots[used].long() // pages.shape[1], slots[used].long() % pages.shape[1]
    pages[page, offset] = rows[used]
