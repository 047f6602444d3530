"""Products on CPUs through oneDNN, whose kernels use all of a CPU's vector width.

torch multiplies float32 matrices with MKL, which on the AMD CPU that this was measured on keeps to
half the width of its AVX-512 units. The operator is the one that torch's own compiler emits for
frozen models (``torch._inductor.fx_passes.mkldnn_fusion``); here it is called without a compiler,
which a bare machine does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STRIP = 4096
"""Rows copied at once: they stay in the cache, and copies beyond 32 MiB would each get new pages
from the operating system, which takes four times as long as the product."""


def uses_onednn(x: Tensor) -> bool:
    """Whether ``matmul_nt`` multiplies such tensors through oneDNN."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and torch._C._has_mkldnn


def matmul_nt(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` of [..., n] and [m, n]; in torch's own way where oneDNN does not serve.

    ``y`` may be transposed as it is; other strides, of which oneDNN has only slow code, are copied,
    a strip at a time.
    """
    if not uses_onednn(x) or not x.numel() or not y.numel():
        return x @ y.T
    if y.is_contiguous() or y.T.is_contiguous():
        return _linear(x, y)
    if y.stride(0) == 1:  # rows of y.T are strided: sum over strips of them
        cuts = range(0, y.shape[1], _STRIP)
        parts = (_linear(x[..., a : a + _STRIP], y.T[a : a + _STRIP].contiguous().T) for a in cuts)
        total = next(parts)
        for part in parts:
            total += part
        return total
    if len(y) <= _STRIP:
        return _linear(x, y.contiguous())
    out = x.new_empty(*x.shape[:-1], len(y))
    for a in range(0, len(y), _STRIP):
        out[..., a : a + _STRIP] = _linear(x, y[a : a + _STRIP].contiguous())
    return out


def _linear(x: Tensor, y: Tensor) -> Tensor:
    ops: Any = torch.ops.mkldnn
    out: Tensor = ops._linear_pointwise(x, y, None, "none", [], "")
    return out
