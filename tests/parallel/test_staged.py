"""Ranks that share a GPU: what they exchange goes through copies on the host, also here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.exchanges.catalog import EXCHANGES, ExchangeKind
from prefill_service.parallel.mesh import form_meshes
from prefill_service.parallel.process_group import SPGroup
from tests.parallel.conformance import CASES, dense, run_case
from tests.parallel.ranks import TIMEOUT_S, run_ranks


def staged_exchanges(group: SPGroup, kinds: list[ExchangeKind], name: str) -> list[Any]:
    meshes = form_meshes(replace(group, staged=True), TIMEOUT_S)
    assert all(mesh.ring.staged and mesh.ulysses.staged for mesh in meshes.values())
    return [run_case(meshes[1].world, meshes, kind, CASES[name]) for kind in kinds]


def test_exchanges_through_the_host_equal_dense_attention(tmp_path: Path) -> None:
    kinds = EXCHANGES
    results = run_ranks(staged_exchanges, 4, tmp_path, kinds, "odd, chunks")
    for index, kind in enumerate(kinds):
        found = [result[index] for result in results]
        out = sum(result["out"] for result in found)
        torch.testing.assert_close(out, dense(CASES["odd, chunks"]), rtol=0, atol=1e-9, msg=kind)
        for result in found:
            assert result["wire"] == moved(result["uses"]), kind


class Handed:
    """Tensors that torch was given to send or to receive into."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        broadcast = dist.broadcast
        batch = dist.batch_isend_irecv

        def spy_broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.tensors.append(tensor)
            return broadcast(tensor, *args, **kwargs)

        def spy_batch(ops: list[Any]) -> Any:
            self.tensors += [op.tensor for op in ops]
            return batch(ops)

        dist.broadcast = spy_broadcast
        dist.batch_isend_irecv = spy_batch


def copies(group: SPGroup) -> None:
    """What is on the wire is nobody's memory: late writes do not reach it, arrivals wait."""
    handed = Handed()
    staged = replace(group, staged=True)
    other = 1 - group.rank
    # Parts of something larger, as the buffers of keys and values are.
    buffer = torch.full((2, 3, 4), -1.0)
    buffer[group.rank] = group.rank
    pending = staged.all_gather_v(list(buffer))
    buffer[group.rank] = 7.0  # after it was sent
    assert bool((buffer[other] == -1).all()), "nothing arrives before it is waited for"
    for one in pending:
        one.wait()
    assert bool((buffer[other] == other).all())
    leaving = torch.full((4, 5), float(group.rank))
    arriving = torch.full((6, 5), -1.0)
    transfer = staged.send_recv({other: leaving}, {other: arriving[1:5]})
    leaving.fill_(7.0)
    assert bool((arriving == -1).all())
    transfer.wait()
    assert bool((arriving[1:5] == other).all())
    assert bool((arriving[[0, 5]] == -1).all())
    parts = [torch.full((1, 2), float(group.rank)), torch.full((2, 2), float(group.rank))]
    room = [torch.empty(group.rank + 1, 2) for _ in range(2)]
    staged.all_to_all(parts, room).wait()
    assert bool((room[other] == other).all())
    assert bool((room[group.rank] == group.rank).all())
    mine = {tensor.untyped_storage().data_ptr() for tensor in (buffer, leaving, arriving, *room)}
    assert len(handed.tensors) == 2 + 2 + 2
    assert all(tensor.untyped_storage().data_ptr() not in mine for tensor in handed.tensors)


def test_transfers_are_copies_on_the_host(tmp_path: Path) -> None:
    run_ranks(copies, 2, tmp_path)
