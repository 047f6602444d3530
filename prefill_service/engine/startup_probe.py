"""What a start-up probe of the ranks tells the cost model."""

from __future__ import annotations

import torch

from prefill_service.cost_model.device_probe import probe_device, probe_link
from prefill_service.cost_model.fitting import Observation
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.process_group import SPGroup


def probe_ranks(shape: ModelShape, group: SPGroup, device: torch.device) -> tuple[Observation, ...]:
    """Rank 0 times its device, then all time their links together. Every rank calls it.

    Returns:
        On rank 0 all of it, on others what they saw of their link.
    """
    found = probe_device(shape, device) if group.rank == 0 else []
    if group.size == 1:
        return tuple(found)
    after = (group.rank + 1) % group.size
    before = (group.rank - 1) % group.size

    def move(size: int) -> None:
        leaving, arriving = torch.zeros(2, size, dtype=torch.uint8, device=device)
        group.send_recv({after: leaving}, {before: arriving}, "probe").wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return (*found, *probe_link(move))
