"""A prefill's work on real ranks of this CPU: what the comm stats count, and what a rank computes.

Random inputs and weights of a reduced shape go through linear layers and an exchange as in a
prefill. Ranks outnumber cores here, so that wall clock says nothing; a rank's work is the CPU time
of its one computing thread, which does not run while it waits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.parallel.problem import DENSE, Problem, positions
from benchmarks.parallel.ranks import TIMEOUT_S, Transport, run_ranks
from prefill_service.cost_model.cost import ASSUMED, CostModel
from prefill_service.cost_model.fitting import Observation, fit
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.work import Work, prefill_work
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import chunking_of
from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.exchanges.catalog import GATHER, ExchangeKind
from prefill_service.parallel.mesh import SPMesh, form_meshes
from prefill_service.parallel.process_group import SPGroup

REDUCED = ModelShape(
    name="reduced",
    num_layers=3,
    hidden=256,
    intermediate=1024,
    q_heads=8,
    kv_heads=2,
    head_dim=64,
    dtype="float32",
)
TURNS = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """One prefill on some ranks.

    Attributes:
        received: bytes by rank, by the comm stats.
        cpu_seconds: by rank, of the computing thread; the least of all turns.
    """

    kind: ExchangeKind
    ranks: int
    tokens: int
    chunk: int
    received: tuple[int, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def strategy(self) -> Strategy:
        """As the cost model calls it."""
        degree = _problem(REDUCED, self.tokens, self.chunk).choice(self.kind, self.ranks).degree
        return Strategy(self.kind, self.ranks, degree)

    def work(self) -> Work:
        """by the cost model's formulas: [chunks, ranks]."""
        layout = _problem(REDUCED, self.tokens, self.chunk).layout(self.kind, self.ranks)
        chunking = chunking_of([[share.ranges for share in chunk] for chunk in layout.shares])
        return prefill_work(self.strategy, REDUCED, chunking)

    def predicted_bytes(self) -> tuple[int, ...]:
        """by the cost model's formulas, by rank."""
        problem = _problem(REDUCED, self.tokens, self.chunk)
        found = problem.predicted(self.kind, self.ranks, torch.float32).received * problem.layers
        return tuple(int(size) for size in found)

    def observations(self) -> list[Observation]:
        """Each rank's computing, without its transfers."""
        work = self.work()
        return [
            Observation(_computing(work, rank), seconds)
            for rank, seconds in enumerate(self.cpu_seconds)
        ]

    def predicted_seconds(self, model: CostModel) -> float:
        """CPU time of the busiest rank."""
        work = self.work()
        return max(
            float(model.chunk_seconds(_computing(work, rank)).sum()) for rank in range(self.ranks)
        )


def _computing(work: Work, rank: int) -> Work:
    return Work(
        passes=work.passes[:, rank],  # type: ignore[index]
        linear_flops=work.linear_flops[:, rank],  # type: ignore[index]
        attention_flops=work.attention_flops[:, rank],  # type: ignore[index]
    )


def fit_work(measured: Sequence[Measured]) -> CostModel:
    """The cost model's A, B and C for this CPU."""
    seen = [observation for one in measured for observation in one.observations()]
    return fit(seen, ASSUMED, f"{len(seen)} ranks' CPU time")


def measure(ranks: int, tokens: Sequence[int], chunk: int) -> list[Measured]:
    """Every exchange at every length; on one rank, where all are the same, ``gather``."""
    kinds = DENSE if ranks > 1 else DENSE[:1]
    jobs = [(kind, length) for length in tokens for kind in kinds]
    of_ranks = run_ranks(_run, ranks, Transport("gloo", "cpu"), jobs, chunk)
    found = []
    for (kind, length), results in zip(jobs, zip(*of_ranks, strict=True), strict=True):
        received, seconds = zip(*results, strict=True)
        found.append(
            Measured(
                kind=kind,
                ranks=ranks,
                tokens=length,
                chunk=chunk,
                received=received,
                cpu_seconds=seconds,
            )
        )
    return found


def _run(
    group: SPGroup, device: torch.device, jobs: Sequence[tuple[ExchangeKind, int]], chunk: int
) -> list[tuple[int, float]]:
    meshes = form_meshes(group, TIMEOUT_S)
    _prefill(meshes, GATHER, _problem(REDUCED, jobs[0][1], chunk))  # warms up
    return [_best(meshes, kind, _problem(REDUCED, tokens, chunk)) for kind, tokens in jobs]


def _best(meshes: Mapping[int, SPMesh], kind: ExchangeKind, problem: Problem) -> tuple[int, float]:
    turns = [_prefill(meshes, kind, problem) for _ in range(TURNS)]
    assert len({received for received, _ in turns}) == 1, "bytes do not depend on the turn"
    return turns[0][0], min(seconds for _, seconds in turns)


def _prefill(
    meshes: Mapping[int, SPMesh], kind: ExchangeKind, problem: Problem
) -> tuple[int, float]:
    """Bytes received and CPU seconds of one prefill."""
    group = meshes[1].world
    shape = REDUCED
    layout = problem.layout(kind, group.size)
    exchange = problem.exchange(kind, meshes, torch.float32, torch.device("cpu"))
    q_width = shape.q_heads * shape.head_dim
    kv_width = shape.kv_heads * shape.head_dim

    def weights(*size: int) -> torch.Tensor:
        return torch.randn(size) * float(size[0] ** -0.5)

    to_kv = weights(shape.hidden, 2 * kv_width)
    to_q = weights(shape.hidden, q_width)
    back = weights(q_width, shape.hidden)
    up = weights(shape.hidden, 2 * shape.intermediate)
    down = weights(shape.intermediate, shape.hidden)
    before = dict(group.comm_stats.uses)
    seconds = 0.0
    for chunk in layout.shares:
        tokens = len(positions(chunk[group.rank]))
        x = torch.randn(tokens, shape.hidden)
        exchange.start_chunk(chunk)
        start = time.thread_time()
        for layer in range(shape.num_layers):
            k, v = (x @ to_kv).view(tokens, 2, shape.kv_heads, shape.head_dim).unbind(1)
            if layer == shape.attending_layers:
                break  # nothing of a prefix is observable after its last K and V
            exchange.store_kv(layer, k, v)
            q = (x @ to_q).view(tokens, shape.q_heads, shape.head_dim).transpose(0, 1)
            found = exchange.attend_exact(layer, q.contiguous())
            x = x + found.transpose(0, 1).reshape(tokens, q_width) @ back
            gate, value = (x @ up).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down
        seconds += time.thread_time() - start
    exchange.finish()
    return moved(group.comm_stats.since(before)), seconds


def _problem(shape: ModelShape, tokens: int, chunk: int) -> Problem:
    """Temporal patches of 32 tokens."""
    ends = tuple(range(32, tokens + 1, 32))
    return Problem(
        patch_ends=ends,
        chunk=chunk,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        layers=shape.attending_layers,
    )
