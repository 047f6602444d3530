"""Linear layers on CPUs: oneDNN products of weights packed once, with the activation fused.

The operator is that of ``prefill_kernels.cpu.matmul``. It takes a weight in the order its kernel
reads, which MKL would make anew in every call, and applies bias and activation while the result is
in registers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS = {
    "SiLUActivation": ("swish", ""),
    "SiLU": ("swish", ""),
    "GELUTanh": ("gelu", "tanh"),
    "GELU": ("gelu", "none"),
    "GELUActivation": ("gelu", "none"),
}
"""By class name: (operation, algorithm) as oneDNN's operators name them."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch and this machine have such products."""
    ops: Any = torch.ops.mkldnn
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    return dtype is torch.float32 or (
        dtype is torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported())
    )


class PackedLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` of an ``nn.Linear`` that this takes the place of.

    Args:
        linear: whose weight is packed. Its own copy is freed with the layer.
        activation: (operation, algorithm), see ``_ACTIVATIONS``.
    """

    def __init__(self, linear: nn.Linear, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        ops: Any = torch.ops.mkldnn
        # A plain attribute: packed tensors can be neither saved nor moved, nor need they be.
        self.weight: Tensor = ops._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self._operation, self._algorithm = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        ops: Any = torch.ops.mkldnn
        out: Tensor = ops._linear_pointwise(
            x, self.weight, self.bias, self._operation, [], self._algorithm
        )
        return out


def pack_linears(model: nn.Module, activated: Collection[str]) -> int:
    """Replace every ``nn.Linear`` in ``model``, on a machine that ``can_pack``.

    Args:
        model: whose layers are replaced in place.
        activated: names of layers whose result the ``act_fn`` beside them is applied to, and
            nothing else: the two are fused.

    Returns:
        How many were replaced.
    """
    count = 0
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) is not nn.Linear:
                continue
            activation = ("none", "")
            if name in activated:
                act_fn = type(getattr(module, "act_fn", None)).__name__
                activation = _ACTIVATIONS.get(act_fn, activation)
                if activation[0] != "none":
                    module.act_fn = nn.Identity()
            setattr(module, name, PackedLinear(part, activation))
            count += 1
    return count
