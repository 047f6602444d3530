"""Products on CPUs through oneDNN, whose kernels use all of a CPU's vector width.

torch multiplies float32 matrices with MKL, which on the AMD CPU that this was measured on keeps to
half the width of its AVX-512 units. The operator is the one that torch's own compiler emits for
frozen models (``torch._inductor.fx_passes.mkldnn_fusion``); here it is called without a compiler,
which a bare machine does not have. docs/performance.md has the gain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def serves(x: Tensor) -> bool:
    """Whether ``product`` multiplies such tensors through oneDNN."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and torch._C._has_mkldnn


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T`` of [..., n] and [m, n]; in torch's own way where oneDNN does not serve.

    ``y`` may be transposed as it is; other strides, of which oneDNN has only slow code, are copied.
    """
    if not serves(x) or not x.numel() or not y.numel():
        return x @ y.T
    ops: Any = torch.ops.mkldnn
    if not (y.is_contiguous() or y.T.is_contiguous()):
        y = y.T.contiguous().T if y.stride(0) == 1 else y.contiguous()
    out: Tensor = ops._linear_pointwise(x, y, None, "none", [], "")
    return out
