"""MLPs and norms, some rows at a time: their scratch does not grow with a chunk's length.

An MLP needs three to four times ``rows x intermediate`` beside its input and output, a norm its
rows in float32 twice; both treat rows independently, so that doing them in pieces changes nothing
but the peak (HelixPipe's chunked MLP, arXiv 2507.00394). The model's own modules do the
computing: only their ``forward`` is called piece by piece.

Row for row the result is the same to the bit with float32 and bfloat16 on CPUs; where a BLAS picks
another kernel for fewer rows (float64, GPUs), it is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from prefill_service.models.families.base import ModuleNames

_TILE = 16


def limit_rows(layers: Any, rows: int, names: ModuleNames) -> None:
    """Let the MLP and the norms of each language layer or vision block take ``rows`` rows at most.

    Args:
        layers: the blocks.
        rows: at most so many at once.
        names: of MLPs and norms in them.

    Raises:
        ValueError: ``rows`` below 1, or a block without an MLP of a known name.
    """
    if rows < 1:
        raise ValueError(f"{rows} rows at a time; at least 1")
    for number, block in enumerate(layers):
        if not any(hasattr(block, name) for name in names.mlps):
            raise ValueError(
                f"block {number}, a {type(block).__name__}, has no part named {names.mlps}"
            )
        for name in names.mlps + names.norms:
            part: nn.Module | None = getattr(block, name, None)
            if part is not None:
                part.forward = partial(_in_pieces, part.forward, rows)


def _in_pieces(forward: Callable[[Tensor], Tensor], rows: int, x: Tensor) -> Tensor:
    """``forward(x)`` for ``x`` [..., rows, width], at most ``rows`` of them at a time."""
    total = x.shape[-2]
    if total <= rows:
        return forward(x)
    # Pieces as equal as whole multiples of 16 let them be: a last one of a few rows would run
    # at the speed of a matrix-vector product, and BLAS rounds rows that fill no register tile in
    # another way (seen with float64 and odd counts).
    even = -(-total // -(-total // rows))
    size = min(rows, -(-even // _TILE) * _TILE)
    out: Tensor | None = None
    for start in range(0, total, size):
        part = forward(x[..., start : start + size, :])
        if out is None:
            out = part.new_empty((*x.shape[:-1], part.shape[-1]))
        out[..., start : start + size, :] = part
    assert out is not None
    return out
