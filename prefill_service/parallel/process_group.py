"""The sequence-parallel group: ranks and their collectives, which are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from prefill_service.parallel.comm_stats import CONTROL, CommStats


@dataclass(slots=True)
class Transfer:
    """Messages under way. Holds what is being sent until it is gone."""

    name: str
    comm_stats: CommStats
    works: list[dist.Work]
    arriving: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        """Block until all has arrived and left (on CUDA: until the stream may go on)."""
        with self.comm_stats.timed(self.name):
            for work in self.works:
                work.wait()
            for place, staged in self.arriving:
                place.copy_(staged)
        self.works = []
        self.arriving = []
        self.kept = []


@dataclass(slots=True)
class PendingPart:
    """A broadcast under way from ``source``."""

    source: int
    _transfer: Transfer

    def wait(self) -> None:
        """Block until the slice is there (on CUDA: until the stream may read it)."""
        self._transfer.wait()


@dataclass(slots=True)
class SPGroup:
    """One sequence-parallel group as this rank sees it.

    Data travels over ``data`` (gloo on CPU, NCCL on CUDA); small host-side decisions over
    ``control``, which is always gloo, so that a decision never synchronises a GPU.

    Attributes:
        rank, size: of this rank in this group.
        staged: tensors travel through copies on the host, because ranks share a GPU, which NCCL
            refuses.
    """

    rank: int
    size: int
    data: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    comm_stats: CommStats = field(default_factory=CommStats)
    staged: bool = False

    def all_gather_v(self, slices: list[Tensor]) -> list[PendingPart]:
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
            mine = source == self.rank
            staged = self._outgoing(part) if mine else self._incoming(part)
            with self.comm_stats.timed("broadcast"):
                work = dist.broadcast(staged, group=self.data, group_src=source, async_op=True)
            self.comm_stats.received("broadcast", 0 if mine else _bytes(part))
            arriving = [] if mine or staged is part else [(part, staged)]
            transfer = Transfer("broadcast", self.comm_stats, [work], arriving, [staged])
            pending.append(PendingPart(source, transfer))
        return pending

    def send_recv(
        self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor], name: str = "send_recv"
    ) -> Transfer:
        """Messages to and from some ranks of the group, started together.

        Args:
            send: per rank, a contiguous tensor; empty ones are skipped on both sides.
            receive: per rank, the contiguous tensor to fill.
            name: under which it is counted, as one call.
        """
        ops = []
        arriving = []
        kept = []
        for peer, part in send.items():
            if part.numel():
                staged = self._outgoing(part)
                kept.append(staged)
                ops.append(dist.P2POp(dist.isend, staged, group=self.data, group_peer=peer))
        for peer, place in receive.items():
            if place.numel():
                staged = self._incoming(place)
                kept.append(staged)
                if staged is not place:
                    arriving.append((place, staged))
                ops.append(dist.P2POp(dist.irecv, staged, group=self.data, group_peer=peer))
        with self.comm_stats.timed(name):
            works = dist.batch_isend_irecv(ops) if ops else []
        self.comm_stats.received(name, sum(_bytes(place) for place in receive.values()))
        return Transfer(name, self.comm_stats, works, arriving, kept)

    def all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> Transfer:
        """Rank r gets ``send[r]``; ``receive[r]`` is filled from rank r, sizes as they are.

        This rank's own part is copied at once.
        """
        receive[self.rank].copy_(send[self.rank])
        others = [r for r in range(self.size) if r != self.rank]
        return self.send_recv(
            {r: send[r].contiguous() for r in others}, {r: receive[r] for r in others}, "all_to_all"
        )

    def all_reduce_max(self, status: int) -> int:
        """The largest ``status`` of all ranks. Every rank calls it at the same points."""
        if self.size == 1:
            return status
        flag = torch.tensor([status], dtype=torch.int64)
        with self.comm_stats.timed(CONTROL):
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control)
        self.comm_stats.received(CONTROL, _bytes(flag) * (self.size - 1))
        return int(flag)

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's ``values``, equally many on each. Every rank calls it at the same points."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.comm_stats.timed(CONTROL):
            dist.all_gather(found, mine, group=self.control)
        self.comm_stats.received(CONTROL, _bytes(mine) * (self.size - 1))
        return [row.tolist() for row in found]

    def _outgoing(self, part: Tensor) -> Tensor:
        return part.to("cpu", copy=True) if self.staged else part

    def _incoming(self, place: Tensor) -> Tensor:
        # Not empty_like: of a view, that keeps strides which gloo does not receive into.
        return torch.empty(place.shape, dtype=place.dtype) if self.staged else place


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def form_group(
    rank: int,
    size: int,
    *,
    init_method: str,
    device: torch.device,
    timeout_s: float,
    staged: bool = False,
) -> SPGroup:
    """Join the group. With one rank there is nothing to join.

    Args:
        init_method: torch's rendezvous, e.g. ``file:///path``.
        timeout_s: of each collective.
        staged: ranks share a GPU; see ``SPGroup``.
    """
    if size == 1:
        return SPGroup(0, 1, None, None)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" and not staged else "gloo"
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=timeout,
        # NCCL connects at its first collective, in which all ranks must take part, and with the
        # first messages of a short video some have none. Given its device, it connects here.
        device_id=device if backend == "nccl" else None,
    )
    data = dist.group.WORLD
    control = data if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    return SPGroup(rank, size, data, control, staged=staged)
