"""What the kernels become on sm_80, sm_90 and sm_100, read from their machine code."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from machine_code import Code, Const, compile_kernel
from prefill_kernels import block_attention, block_loss, block_selection, block_summaries
from prefill_kernels.autotune import CONFIGS, fits

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may use


def attention(
    capability: int,
    head_dim: int,
    config: tuple[int, int, bool, int, int],
    *,
    dtype: str = "bf16",
    paged: bool = False,
    skip: bool = False,
    variant: str = "whole",
) -> Code:
    """config: BLOCK_M, BLOCK_N, TMA, warps, stages; must be one that tuning would consider.

    Variant "kept only" leaves out local region and summaries, and with them most of the compile
    time; "lse only" is the launch of the estimate, without values.
    """
    block_m, block_n, tma, warps, stages = config
    block_d = triton.next_power_of_2(head_dim)
    candidate = next(
        c for c in CONFIGS if (*c.kwargs.values(), c.num_warps, c.num_stages) == config
    )
    size = 4 if dtype == "fp32" else 2
    assert fits(
        candidate,
        block_d=block_d,
        block_tokens=128,
        size=size,
        shared=SHARED[capability],
        capability=capability,
    )
    arguments: dict[str, str | Const] = dict.fromkeys(
        ("p_q", "p_k", "p_v", "p_k_mean", "p_v_mean", "p_out"), f"*{dtype}"
    )
    for name in ("k_desc_64", "v_desc_64", "k_desc_128", "v_desc_128"):
        shape = f"[1,1,{name[-3:].lstrip('_')},{block_d}]"
        arguments[name] = f"tensordesc<{dtype}{shape}>" if tma else Const(None)
    arguments |= {"p_bias": "*fp32", "p_lse": "*fp32", "p_row_ptr": "*i32", "p_col": "*i32"}
    arguments |= {"p_table": "*i32" if paged else Const(None), "p_order": Const(None)}
    for name in block_attention.attention_kernel.arg_names:
        if name.startswith("stride_"):
            arguments[name] = "i32:16"
    for name in ("stride_table_head", "queries", "tiles", "tile_tokens", "q_offset", "blocks"):
        arguments[name] = "i32"
    arguments |= dict.fromkeys(("scale_log2", "inverse_scale", "skip_log2"), "fp32")
    constants = {
        "GROUP": 7,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_TOKENS": 128,
        "LOCAL": variant != "kept only",
        "PAGED": paged,
        "SUMMARIES": variant != "kept only",
        "ORDERED": False,
        "SKIP": skip,
        "VALUES": variant != "lse only",
        "ALIGNED": tma,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "TMA": tma,
    }
    arguments |= {name: Const(value) for name, value in constants.items()}
    kernel = block_attention.attention_kernel
    return compile_kernel(kernel, arguments, capability, num_warps=warps, num_stages=stages)


def fitting(capability: int, block_d: int, block_tokens: int) -> list[triton.Config]:
    """The configurations of 16-bit heads."""
    return [
        c
        for c in CONFIGS
        if fits(
            c,
            block_d=block_d,
            block_tokens=block_tokens,
            size=2,
            shared=SHARED[capability],
            capability=capability,
        )
    ]


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("block_d", [64, 128, 256])
@pytest.mark.parametrize("block_tokens", [64, 128])
def test_pruning_leaves_a_few(capability: int, block_d: int, block_tokens: int) -> None:
    left = fitting(capability, block_d, block_tokens)
    assert 1 <= len(left) <= 13
    assert (capability >= 90) == any(c.kwargs["TMA"] for c in left)
    assert all(c.kwargs["BLOCK_N"] <= block_tokens for c in left)
    assert not fitting(capability, block_d, 16)


def test_what_spills_on_blackwell_alone_is_pruned_there_alone() -> None:
    def left(capability: int, block_d: int) -> set[tuple[object, ...]]:
        found = fitting(capability, block_d, 128)
        return {(*c.kwargs.values(), c.num_warps, c.num_stages) for c in found}

    assert left(90, 64) == left(100, 64)
    assert left(90, 128) - left(100, 128) == {(128, 64, True, 8, 4), (128, 128, False, 8, 2)}
    assert left(90, 256) - left(100, 256) == {(128, 64, False, 8, 2)}


@pytest.mark.parametrize(
    ("head_dim", "config", "options"),
    [
        (64, (128, 64, True, 8, 3), {"dtype": "fp16", "paged": True, "variant": "kept only"}),
        (128, (128, 128, True, 8, 2), {}),
        (256, (128, 64, True, 8, 2), {}),
    ],
)
def test_attention_on_hopper(
    head_dim: int, config: tuple[int, int, bool, int, int], options: dict[str, Any]
) -> None:
    code = attention(90, head_dim, config, **options)
    assert code.spills == 0
    assert code.shared <= SHARED[90]
    assert code.count("HGMMA") > 0
    assert code.count("HMMA") == 0
    # Keys and values of the stages ahead are on their way before the loop begins.
    stages = config[-1]
    assert code.count("UTMALDG") >= 2 * stages


@pytest.mark.parametrize(
    ("head_dim", "config", "options"),
    [
        (64, (128, 64, False, 8, 3), {"variant": "kept only", "skip": True}),
        (64, (128, 64, False, 8, 2), {"variant": "lse only"}),
        (128, (128, 64, False, 8, 2), {}),
        (256, (64, 32, False, 8, 2), {"variant": "kept only"}),
    ],
)
def test_attention_on_ampere(
    head_dim: int, config: tuple[int, int, bool, int, int], options: dict[str, Any]
) -> None:
    code = attention(80, head_dim, config, **options)
    assert code.spills == 0
    assert code.shared <= SHARED[80]
    assert code.count("HMMA") > 0


@pytest.mark.parametrize(
    ("head_dim", "config"),
    [(64, (128, 64, True, 8, 3)), (128, (128, 128, True, 8, 2)), (256, (128, 64, True, 8, 2))],
)
def test_attention_on_blackwell(head_dim: int, config: tuple[int, int, bool, int, int]) -> None:
    code = attention(100, head_dim, config, variant="whole" if head_dim == 128 else "kept only")
    assert code.spills == 0
    assert code.shared <= SHARED[100]
    assert code.count("UTCHMMA") > 0


DIMENSIONS = {"GROUP": 7, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_TOKENS": 128}
LOSS = DIMENSIONS | {"BLOCK_M": 64, "BLOCK_N": 128}
BIAS = {"BLOCK_TOKENS": 128, "LOG_BLOCK": 4.85, "EDGE": 2.5, "BLOCK_N": 1024}
OTHERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "square": (block_loss.square_kernel, DIMENSIONS | {"BLOCK_M": 64}, 4),
    "bias": (block_loss.bias_kernel, BIAS, 4),
    "loss": (block_loss.loss_kernel, LOSS, 8),
    "threshold": (block_selection.threshold_kernel, {"BLOCK_N": 256}, 4),
    "fill": (block_selection.fill_kernel, {"BLOCK_N": 256}, 4),
    "summaries": (block_summaries.summaries_kernel, DIMENSIONS | {"PAGED": True}, 8),
}
TYPES = {"p_forced": "*i8", "scale": "fp32"}
TYPES |= dict.fromkeys(("p_q", "p_k", "p_v"), "*bf16")
TYPES |= dict.fromkeys(("p_table", "p_kept_levels", "p_counts", "p_row_ptr", "p_col"), "*i32")


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels(name: str) -> None:
    kernel, constants, warps = OTHERS[name]
    arguments: dict[str, str | Const] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            arguments[argument] = Const(constants[argument])
        elif argument in ("p_k_mean", "p_k_far") and name == "loss":
            arguments[argument] = "*bf16"
        elif argument.startswith("stride_"):
            arguments[argument] = "i32:16"
        else:
            arguments[argument] = TYPES.get(argument, "*fp32" if argument[:2] == "p_" else "i32")
    stages = 2 if name == "loss" else 3
    code = compile_kernel(kernel, arguments, 90, num_warps=warps, num_stages=stages)
    assert code.spills == 0
    assert code.shared <= SHARED[90]
    assert (code.count("HGMMA") > 0) == (name == "loss")
    assert code.count("HMMA") == 0
