"""What a start-up probe of the ranks tells the planner."""

from __future__ import annotations

import dataclasses

import torch

from prefill_service.cost_model.device_probe import probe_device, probe_link
from prefill_service.cost_model.fitting import Observation
from prefill_service.cost_model.model_shape import ModelShape, open_shape
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.parallel.process_group import SPGroup


def model_shape(checkpoint: Checkpoint, dtype: str) -> ModelShape:
    """The planner's view of a checkpoint that is computed in ``dtype``."""
    shape = open_shape(str(checkpoint.path))
    return dataclasses.replace(shape, bytes_per_element=getattr(torch, dtype).itemsize)


def probe_ranks(
    shape: ModelShape, group: SPGroup, device: torch.device, dtype: torch.dtype
) -> tuple[Observation, ...]:
    """Rank 0 times its device, then all time their links together. Every rank calls it.

    Returns:
        On rank 0 all of it, on others what they saw of their link.
    """
    found = probe_device(shape, device, dtype) if group.rank == 0 else []
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
