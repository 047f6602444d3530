"""Packed linear layers: the same products, activations included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from prefill_service.models.layers.packed_linear import PackedLinear, can_pack, pack_linears

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not can_pack(CPU, torch.float32), reason="this build of torch has no oneDNN"
)


class Gated(nn.Module):
    """As language models have it."""

    def __init__(self, act: str, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(40, 96, bias=bias)
        self.up_proj = nn.Linear(40, 96, bias=bias)
        self.down_proj = nn.Linear(96, 40, bias=bias)
        self.act_fn = ACT2FN[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """As Qwen3-VL's tower has it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(40, 96)
        self.linear_fc2 = nn.Linear(96, 24)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "block",
    [
        lambda: Gated("silu", False),
        lambda: Gated("silu", True),
        lambda: Gated("relu", False),  # not one that is fused
        lambda: Plain(ACT2FN["gelu_pytorch_tanh"]),
        lambda: Plain(nn.GELU()),
    ],
)
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (1, 33, 40), (0, 40)])
@torch.inference_mode()
def test_block_is_the_same(block: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    packed = block()
    exact = block().double()
    exact.load_state_dict(packed.state_dict())
    linears = sum(type(m) is nn.Linear for m in packed.modules())
    assert pack_linears(packed, ("gate_proj", "linear_fc1")) == linears
    assert not any(type(m) is nn.Linear for m in packed.modules())
    x = 3 * torch.randn(shape)
    torch.testing.assert_close(packed(x).double(), exact(x.double()), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other() -> None:
    """What chunked MLPs rest on: the same bits, whatever rows are beside."""
    torch.manual_seed(1)
    layer = PackedLinear(nn.Linear(64, 96))
    x = torch.randn(300, 64)
    whole = layer(x)
    for rows in (1, 15, 16, 100):
        assert torch.equal(layer(x[:rows]), whole[:rows])


@torch.inference_mode()
def test_bfloat16() -> None:
    if not can_pack(CPU, torch.bfloat16):
        pytest.skip("this CPU has no bfloat16 products")
    torch.manual_seed(2)
    linear = nn.Linear(64, 32).bfloat16()
    x = torch.randn(10, 64).bfloat16()
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    got = PackedLinear(linear)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, atol=0.02, rtol=0.01)


def test_float64_and_gpus_are_left_alone() -> None:
    assert not can_pack(CPU, torch.float64)
    assert not can_pack(torch.device("cuda"), torch.float32)
