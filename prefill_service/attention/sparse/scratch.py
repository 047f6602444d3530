"""Memory that one call after the other writes its intermediate results to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class ScratchBuffers:
    """Named buffers that grow to the largest request; fresh memory would cost page faults."""

    _held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of the dtype and device of ``like``.

        It is valid until the next request of that name.
        """
        numel = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < numel or held.dtype != like.dtype:
            held = self._held[name] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return held[:numel].view(shape)
