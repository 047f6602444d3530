"""Launch configurations of block-sparse attention: the list, and what of it suits a call."""

from __future__ import annotations

from typing import Any

import torch
import triton


def prune(configs: list[triton.Config], named: dict[str, Any], **kw: Any) -> list[triton.Config]:
    """What fits this call: block, descriptors, shared memory and (a rule of thumb) registers."""
    device = torch.cuda.current_device()
    shared = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    hopper = torch.cuda.get_device_capability(device)[0] >= 9
    arguments = {**named, **kw}
    size = arguments["p_q"].element_size()
    fitting = [
        config
        for config in configs
        if fits(config, arguments["BLOCK_D"], arguments["BLOCK_TOKENS"], size, shared, hopper)
        and (arguments["k_desc_64"] is not None or not config.kwargs["TMA"])
    ]
    return fitting or [fallback(arguments["BLOCK_TOKENS"])]


def fits(
    config: triton.Config, block_d: int, block_tokens: int, size: int, shared: int, hopper: bool
) -> bool:
    """Whether a configuration suits a head of ``block_d`` elements of ``size`` bytes.

    The register rules are those under which ahead-of-time compilation shows no spills
    (tests/kernels/test_compiled.py).
    """
    m, n = int(config.kwargs["BLOCK_M"]), int(config.kwargs["BLOCK_N"])
    if n > block_tokens or (config.kwargs["TMA"] and not hopper):
        return False
    if (m + 2 * config.num_stages * n) * block_d * size + 2048 > shared:
        return False
    if size == 4:
        return m == 64 and n == 32 and block_d <= 128
    rows = m // int(config.num_warps)  # accumulator and score rows of a warp
    if hopper:
        return rows <= 16 and (n <= 64 or block_d <= 128)
    return rows * block_d <= 16 * 128 and n * block_d * (int(config.num_stages) - 1) <= 64 * 128


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
        (128, 128, False, 8, 2),
        (128, 64, False, 8, 3),
        (128, 64, False, 8, 2),
        (64, 64, False, 4, 3),
        (64, 64, False, 4, 2),
        (64, 32, False, 4, 2),
        (64, 32, False, 8, 2),
    )
]
"""What autotuning chooses from, pruned per call by ``fits``; results are cached on disk."""
