"""The sequence-parallel group: ranks, their collectives, and a meter on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class CommMeter:
    """Bytes this rank received in collectives."""

    bytes_received: int = 0


@dataclass(slots=True)
class SPGroup:
    """One sequence-parallel group as this rank sees it.

    Data travels over ``data`` (gloo on CPU, NCCL on CUDA); small host-side decisions over
    ``control``, which is always gloo, so that agreeing never synchronises a GPU.
    """

    rank: int
    size: int
    data: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    meter: CommMeter = field(default_factory=CommMeter)

    def broadcast_slices(self, slices: list[Tensor]) -> list[PendingSlice]:
        """Each rank sends its slice to all; ``slices[r]`` is rank r's, received in place.

        Together this is the all-gather of LASP-2H and LSS with uneven parts and no padding:
        every rank receives exactly the other ranks' bytes.

        Args:
            slices: contiguous tensors, equal shapes on all ranks; empty ones are skipped.
        """
        pending = []
        for source, part in enumerate(slices):
            if part.numel() == 0 or self.size == 1:
                continue
            work = dist.broadcast(part, group=self.data, group_src=source, async_op=True)
            if source != self.rank:
                self.meter.bytes_received += part.numel() * part.element_size()
            pending.append(PendingSlice(source, work))
        return pending

    def agree(self, status: int) -> int:
        """The largest ``status`` of all ranks. Every rank calls it at the same points."""
        if self.size == 1:
            return status
        flag = torch.tensor([status], dtype=torch.int64)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        return int(flag)


@dataclass(slots=True)
class PendingSlice:
    """A broadcast under way from ``source``."""

    source: int
    _work: dist.Work

    def wait(self) -> None:
        """Block until the slice is there (on CUDA: until the stream may read it)."""
        self._work.wait()


def form_group(
    rank: int, size: int, init_method: str, device: torch.device, timeout_s: float
) -> SPGroup:
    """Join the group. With one rank there is nothing to join.

    Args:
        init_method: torch's rendezvous, e.g. ``file:///path``.
        timeout_s: of each collective.
    """
    if size == 1:
        return SPGroup(0, 1, None, None)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout
    )
    data = dist.group.WORLD
    control = data if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    return SPGroup(rank, size, data, control)
