"""What this device and its link can do, timed briefly at start for the first cost model.

Three things are timed: a linear layer's product, dense attention, and a layer's worth of tiny
operations, whose time is all overhead. Each is repeated until its share of the time is spent, and
the shortest counts: on a busy machine interference only ever adds. The link is timed by a function
of the caller, who knows how ranks talk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefill_service.cost_model.fitting import Observation
from prefill_service.cost_model.work import Work
from prefill_service.models.model_shape import ModelShape

if TYPE_CHECKING:
    import torch

LINK_BYTES = (1 << 10, 1 << 20, 4 << 20)
LINK_REPEATS = 3

_MAX_FLOPS = {"cpu": 1e9, "cuda": 1e12}
_OPERATIONS_PER_LAYER = 20  # kernels of a layer beside its large products: norms, rotary, adds
_REPEATS = 3


def probe_device(
    shape: ModelShape, device: torch.device, budget_s: float = 0.6
) -> list[Observation]:
    """Time the operations that prefill consists of, on one rank.

    Args:
        shape: of the model; matrices have its dtype, and its widths as far as a small fraction of
            a second allows.
        device: where it will run.
        budget_s: seconds to spend. The first run of each operation may overrun it.

    Returns:
        For ``fitting.fit``; they say nothing of the link.
    """
    import torch

    target = _Target(
        device=device,
        dtype=shape.torch_dtype,
        max_flops=_MAX_FLOPS.get(device.type, 1e9),
        budget_s=budget_s / 3,
    )
    with torch.inference_mode():
        return [_linear(shape, target), _attention(shape, target), _overhead(target)]


def probe_link(move: Callable[[int], None]) -> list[Observation]:
    """Time a link with a few small and large messages.

    The number of calls does not depend on their time, so all ranks of a group may run this
    together with a ``move`` that is a collective.

    Args:
        move: makes this rank receive that many bytes in one operation; returns when they are there.

    Returns:
        For ``fitting.fit``, beside those of ``probe_device``.
    """
    found = []
    for size in LINK_BYTES:
        move(size)  # connections are made on first use
        times = []
        for _ in range(LINK_REPEATS):
            start = time.perf_counter()
            move(size)
            times.append(time.perf_counter() - start)
        found.append(Observation(Work(exposed_bytes=float(size), exposed_calls=1.0), min(times)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where operations are timed, and how much of them.

    Attributes:
        device, dtype: of the operands.
        max_flops: of one operation.
        budget_s: seconds to spend on repeating one operation.
    """

    device: torch.device
    dtype: torch.dtype
    max_flops: float
    budget_s: float


def _linear(shape: ModelShape, target: _Target) -> Observation:
    import torch

    width = shape.hidden
    inner = max(1, min(shape.intermediate, int(target.max_flops / (2 * width * 256))))
    tokens = max(1, min(1024, int(target.max_flops / (2 * width * inner))))
    x = torch.ones(tokens, width, dtype=target.dtype, device=target.device)
    weight = torch.ones(width, inner, dtype=target.dtype, device=target.device)
    seconds = _shortest(lambda: x @ weight, target)
    return Observation(Work(linear_flops=2.0 * tokens * width * inner), seconds)


def _attention(shape: ModelShape, target: _Target) -> Observation:
    import torch

    # Every head has keys of its own: how they are shared is up to the real back end.
    heads = min(shape.q_heads, 8)
    size = shape.head_dim
    tokens = max(16, min(8192, int((target.max_flops / (4 * heads * size)) ** 0.5)))
    q, k, v = torch.ones(3, 1, heads, tokens, size, dtype=target.dtype, device=target.device)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = _shortest(lambda: attend(q, k, v), target)
    return Observation(Work(attention_flops=4.0 * heads * tokens * tokens * size), seconds)


def _overhead(target: _Target) -> Observation:
    import torch

    x = torch.ones(1, 16, dtype=target.dtype, device=target.device)

    def layer() -> object:
        y = x
        for _ in range(_OPERATIONS_PER_LAYER):
            y = y + x
        return y

    return Observation(Work(passes=1.0), _shortest(layer, target))


def _shortest(run: Callable[[], object], target: _Target) -> float:
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter() - start

    end = time.perf_counter() + target.budget_s
    best = timed()  # also warms up: kernels are loaded, threads started
    for _ in range(_REPEATS):
        best = min(best, timed())
        if time.perf_counter() > end:
            break
    return best
