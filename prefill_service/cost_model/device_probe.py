"""A short look at what this device and its link can do, for the first cost model.

Three things are timed: a linear layer's product, dense attention, and a layer's worth of tiny
operations, whose time is all overhead. Each is repeated until its share of the time is spent, and
the shortest counts: on a busy machine interference only ever adds. The link is timed by a function
of the caller, who knows how ranks talk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefill_service.cost_model.fitting import Observation
from prefill_service.cost_model.model_shape import ModelShape
from prefill_service.cost_model.work import Work

if TYPE_CHECKING:
    import torch

LINK_BYTES = (1 << 10, 1 << 20, 4 << 20)
LINK_TURNS = 3

_MOST_FLOPS = {"cpu": 1e9, "cuda": 1e12}
_OPERATIONS_PER_LAYER = 20  # kernels of a layer beside its large products: norms, rotary, adds
_TURNS = 3


def probe_device(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, budget_s: float = 0.6
) -> list[Observation]:
    """Time the operations that prefill consists of, on one rank.

    Args:
        shape: of the model; matrices have its widths as far as a small fraction of a second allows.
        device: where it will run.
        dtype: of its weights and activations.
        budget_s: seconds to spend. The first turn of each operation may overrun it.

    Returns:
        For ``fitting.fit``; they say nothing of the link.
    """
    import torch

    share = budget_s / 3
    most = _MOST_FLOPS.get(device.type, 1e9)
    with torch.inference_mode():
        return [
            _linear(shape, device, dtype, most, share),
            _attention(shape, device, dtype, most, share),
            _overhead(device, dtype, share),
        ]


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
        turns = []
        for _ in range(LINK_TURNS):
            start = time.perf_counter()
            move(size)
            turns.append(time.perf_counter() - start)
        found.append(Observation(Work(exposed_bytes=float(size), exposed_calls=1.0), min(turns)))
    return found


def _linear(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, most: float, budget_s: float
) -> Observation:
    import torch

    width, inner = shape.hidden, shape.intermediate
    inner = max(1, min(inner, int(most / (2 * width * 256))))
    tokens = max(1, min(1024, int(most / (2 * width * inner))))
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(width, inner, dtype=dtype, device=device)
    seconds = _shortest(lambda: x @ weight, device, budget_s)
    return Observation(Work(linear_flops=2.0 * tokens * width * inner), seconds)


def _attention(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, most: float, budget_s: float
) -> Observation:
    import torch

    # Every head has keys of its own: how they are shared is up to the real back end.
    heads, size = min(shape.q_heads, 8), shape.head_dim
    tokens = max(16, min(8192, int((most / (4 * heads * size)) ** 0.5)))
    q, k, v = torch.ones(3, 1, heads, tokens, size, dtype=dtype, device=device)
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = _shortest(lambda: attend(q, k, v), device, budget_s)
    return Observation(Work(attention_flops=4.0 * heads * tokens * tokens * size), seconds)


def _overhead(device: torch.device, dtype: torch.dtype, budget_s: float) -> Observation:
    import torch

    x = torch.ones(1, 16, dtype=dtype, device=device)

    def layer() -> object:
        y = x
        for _ in range(_OPERATIONS_PER_LAYER):
            y = y + x
        return y

    return Observation(Work(passes=1.0), _shortest(layer, device, budget_s))


def _shortest(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    end = time.perf_counter() + budget_s
    best = timed()  # also warms up: kernels are loaded, threads started
    for _ in range(_TURNS):
        best = min(best, timed())
        if time.perf_counter() > end:
            break
    return best
