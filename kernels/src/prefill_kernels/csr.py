"""The sparse format shared by selection and attention: ragged block-CSR on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockCSR:
    """Kept key blocks of every (KV head, query tile).

    Row ``kv_head * tiles + tile`` keeps the blocks ``col[row_ptr[row]:row_ptr[row + 1]]``. Only
    complete blocks that lie wholly before the tile's first query may be listed, so that none of
    them needs a mask.

    Attributes:
        row_ptr: [kv_heads * tiles + 1] int32, ascending from 0.
        col: [capacity] int32, logical block indices, ascending inside a row. The capacity is an
            upper bound known without asking the device; entries from ``row_ptr[-1]`` on are
            undefined.
    """

    row_ptr: Tensor
    col: Tensor
