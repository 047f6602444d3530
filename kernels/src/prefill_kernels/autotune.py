"""Launch configurations of block-sparse attention: the list, and what of it suits a call."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

TUNED_FROM = 8192
"""Keys from which a call may autotune. Shorter ones would choose for the wrong shape."""


def prune(configs: list[triton.Config], named: dict[str, Any], **kw: Any) -> list[triton.Config]:
    """What autotuning has to try for a call."""
    arguments = {**named, **kw}
    tma = arguments["k_desc_64"] is not None
    q = arguments["p_q"]
    return suitable(q, arguments["BLOCK_D"], arguments["BLOCK_TOKENS"], tma)


def suitable(q: Tensor, block_d: int, block_tokens: int, tma: bool) -> list[triton.Config]:
    """Configurations for queries on a GPU, the likeliest first; never empty.

    Where tensor descriptors can be used, one configuration without them is left to compare.
    """
    shared, capability = _limits(q.device.index)
    fitting = [
        c
        for c in CONFIGS
        if fits(
            c,
            block_d=block_d,
            block_tokens=block_tokens,
            size=q.element_size(),
            shared=shared,
            capability=capability,
        )
    ]
    with_tma = [c for c in fitting if tma and c.kwargs["TMA"]]
    without = [c for c in fitting if not c.kwargs["TMA"]]
    return with_tma + without[:1] if with_tma else without or [fallback(block_tokens)]


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """Shared memory of a program in bytes, and the compute capability: 90 for sm_90."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return properties["max_shared_mem"], 10 * major + minor


def fits(
    config: triton.Config,
    *,
    block_d: int,
    block_tokens: int,
    size: int,
    shared: int,
    capability: int,
) -> bool:
    """Whether a configuration suits a head of ``block_d`` elements of ``size`` bytes.

    The register rules are those under which ahead-of-time compilation for sm_80, sm_90 and sm_100
    shows no spills at 16 bits (kernels/tests/test_compiled.py compiles the main ones), but for
    four instructions of ``block_sparse_lse`` at head size 64 on sm_100.
    """
    hopper = capability >= 90  # has the tensor memory accelerator
    m = int(config.kwargs["BLOCK_M"])
    n = int(config.kwargs["BLOCK_N"])
    if n > block_tokens or (config.kwargs["TMA"] and not hopper):
        return False
    if (m + 2 * config.num_stages * n) * block_d * size + 2048 > shared:
        return False
    if size == 4:
        return m == 64 and n == 32 and block_d <= 128
    if capability // 10 == 10 and (block_d, *_name(config)) in _SPILLING_ON_BLACKWELL:
        return False
    rows = m // int(config.num_warps)  # accumulator and score rows of a warp
    if hopper:
        return rows <= 16 and (block_d <= 128 or (n <= 64 and int(config.num_warps) == 8))
    return rows * block_d <= 16 * 128 and n * block_d * (int(config.num_stages) - 1) <= 64 * 128


def _name(config: triton.Config) -> tuple[Any, ...]:
    """BLOCK_M, BLOCK_N, TMA, warps and stages, as ``CONFIGS`` lists them."""
    return (*config.kwargs.values(), config.num_warps, config.num_stages)


def fallback(block_tokens: int) -> triton.Config:
    """The smallest configuration: any head size, dtype and device, and the interpreter."""
    blocks = {"BLOCK_M": 64, "BLOCK_N": min(block_tokens, 32), "TMA": False}
    return triton.Config(blocks, num_warps=4, num_stages=2)


CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "TMA": tma}, num_warps=warps, num_stages=stages)
    for m, n, tma, warps, stages in (
        (128, 128, True, 8, 2),
        (128, 128, True, 8, 3),
        (128, 64, True, 8, 3),
        (128, 64, True, 8, 4),
        (128, 64, True, 8, 2),
        (64, 64, True, 4, 3),
        (128, 64, False, 8, 3),
        (128, 128, False, 8, 2),
        (128, 64, False, 8, 2),
        (64, 64, False, 4, 3),
        (64, 64, False, 4, 2),
        (64, 32, False, 4, 2),
        (64, 32, False, 8, 2),
    )
]
"""What autotuning chooses from, pruned per call by ``fits``; results are cached on disk."""

_SPILLING_ON_BLACKWELL = {
    (128, 128, 64, True, 8, 4),
    (128, 128, 128, False, 8, 2),
    (256, 128, 64, False, 8, 2),
}
"""Head size and configuration, of those that spill on sm_100 and not on sm_90."""
