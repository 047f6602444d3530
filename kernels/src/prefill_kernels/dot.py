"""The matrix product, also where the Triton interpreter has none for the operands' type."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """a [M, K] @ b [K, N] (+ acc) in float32; float32 operands in three tf32 products."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter would multiply the bits of bfloat16 as integers.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return tl.dot(a, b, acc)
