"""Seconds of a prefill on GPUs that are not here: the cost model's work over assumed rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from prefill_service.attention_shape import BLOCK_TOKENS
from prefill_service.cost_model.cost import CostModel
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.traffic import memory_bytes, traffic
from prefill_service.cost_model.work import Work, prefill_work
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.baselines.methods import spava
from prefill_service.parallel.chunking import Chunking, deal_tokens
from prefill_service.parallel.exchanges.catalog import (
    DEMAND,
    GATHER,
    PASS_Q,
    RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
)
from prefill_service.parallel.exchanges.cost_terms import summary_bytes

CHUNKS = (2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs and their links.

    Attributes:
        nodes, gpus: of each.
        nvlink, network: bytes per second that a GPU receives within a node, and between nodes.
        latency: s of one operation of an exchange.
    """

    name: str
    nodes: int
    gpus: int
    nvlink: float
    network: float
    latency: float

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus

    @property
    def remote(self) -> float:
        """Share of the other ranks that are in other nodes."""
        return (self.ranks - self.gpus) / (self.ranks - 1)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Everything that is not counted.

    Attributes:
        peak: FLOP/s of a GPU in bfloat16.
        linear, attention: shares of it that linear layers and dense attention reach.
        sparse: rate of sparse attention, selection included, over that of dense attention.
        density: share of the pairs that sparse attention computes.
        wanted: of the blocks elsewhere, the share that a rank's queries ever want (``demand``).
        overhead: s per layer and chunk.
        kv_bytes: for K and V on each GPU.
    """

    peak: float = 989e12
    linear: float = 0.6
    attention: float = 0.5
    sparse: float = 0.6
    density: float = 0.1
    wanted: float = 0.5
    overhead: float = 200e-6
    kv_bytes: float = 100 * 2**30

    def sentences(self) -> list[str]:
        """For people."""
        return [
            f"a GPU has {self.peak / 1e12:.0f} TFLOP/s in bfloat16; linear layers reach "
            f"{self.linear:.0%} of it, dense attention {self.attention:.0%}, and "
            f"{self.overhead * 1e6:.0f} us per layer and chunk are overhead",
            f"sparse attention computes {self.density:g} of the pairs (which depends on the video "
            f"and on the quality asked for), at {self.sparse:g} of dense attention's rate, "
            "selection included",
            f"with demand, the queries of a rank want {self.wanted:g} of the blocks elsewhere at "
            "some time; each comes once; nothing hides it",
            "gather, rings, Spava's passing sets and all but the last return of pass_q travel "
            "beside attention, and the longer of both counts; all-to-alls are waited for",
            "between nodes the network counts: all bytes of a ring, whose slowest hop sets the "
            "pace; of the others the share that other nodes send; usp and ulysses_gather keep "
            "their all-to-alls within a node",
            "all ranks wait for the slowest; shares are even; vision tower and decoding are left "
            "out, with all contestants",
            f"K and V have {self.kv_bytes / 2**30:.0f} GiB on a GPU; where they take more, the row "
            "says so, and its time is that of a larger GPU (nothing is offloaded)",
            "Spava: published lengths, N/64 anchor and N/128 passing tokens per block, anchor "
            "computed on every rank; dense attention's rate; its selection costs nothing",
            "the zigzag ring, Ulysses and Spava take the prompt as one chunk; of our own the best "
            f"chunk of {', '.join(f'{size:,}' for size in CHUNKS)} tokens per rank, or the whole",
        ]

    def model(self, machine: Machine) -> CostModel:
        """Rates; bytes are seconds over the machine's slower link."""
        slower = machine.network if machine.nodes > 1 else machine.nvlink
        return CostModel(
            per_pass=self.overhead,
            per_linear_flop=1 / (self.peak * self.linear),
            per_attention_flop=1 / (self.peak * self.attention),
            per_byte=1 / slower,
            per_call=machine.latency,
            provenance="assumed",
        )


NVLINK = Machine(name="8 GPUs, NVLink", nodes=1, gpus=8, nvlink=350e9, network=350e9, latency=10e-6)
NETWORK = Machine(
    name="4 x 8 GPUs, 400 Gb/s", nodes=4, gpus=8, nvlink=350e9, network=45e9, latency=20e-6
)
MACHINES = {
    NVLINK: "350 GB/s received by each GPU within a node, 10 us per operation",
    NETWORK: "one 400 Gb/s card per GPU, 45 GB/s received; 350 GB/s within a node; 20 us",
}


@dataclass(frozen=True, slots=True)
class Projection:
    """One contestant.

    Attributes:
        chunk: tokens per rank and chunk.
        seconds: of the prefill's language model.
        exposed: s of them in which the slowest rank only waits for transfers.
        received: bytes, by the rank that receives most.
        kv_bytes: on the fullest rank.
    """

    name: str
    chunk: int
    seconds: float
    exposed: float
    received: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class _Task:
    """What all contestants do alike: prefill ``tokens`` of a model on a machine."""

    shape: ModelShape
    tokens: int
    machine: Machine
    given: Assumptions


def project(
    shape: ModelShape, tokens: int, machine: Machine, given: Assumptions
) -> Iterator[Projection]:
    """All contestants that this model's heads allow."""
    ranks = machine.ranks
    task = _Task(shape=shape, tokens=tokens, machine=machine, given=given)
    yield replace(_of_strategy(Strategy(GATHER, 1), task, tokens), name="dense, 1 GPU")
    share = -(-tokens // ranks)
    yield _of_strategy(Strategy(RING, ranks), task, share, prefix="zigzag ")
    if ranks <= shape.q_heads:
        strategy = Strategy(ULYSSES, ranks, ranks)
        yield _of_strategy(strategy, task, share, prefix="one-chunk ")
    yield spava_projection(shape, tokens, machine, given)
    for strategy, sparse in _ours(shape, machine):
        yield min(
            (
                _of_strategy(strategy, task, size, prefix="ours: ", sparse=sparse)
                for size in sorted({min(size, share) for size in (*CHUNKS, share)})
            ),
            key=lambda candidate: candidate.seconds,
        )


def _ours(shape: ModelShape, machine: Machine) -> Iterator[tuple[Strategy, bool]]:
    ranks = machine.ranks
    yield Strategy(GATHER, ranks), False
    yield Strategy(RING, ranks), False
    if ranks <= shape.q_heads:
        yield Strategy(ULYSSES, ranks, ranks), False
    degree = machine.gpus if machine.nodes > 1 else machine.gpus // 2
    yield Strategy(USP, ranks, degree), False
    yield Strategy(PASS_Q, ranks), False
    yield Strategy(GATHER, ranks), True
    yield Strategy(DEMAND, ranks), True
    if ranks <= shape.kv_heads:  # more would wait
        yield Strategy(ULYSSES, ranks, ranks), True
    degree = min(degree, shape.kv_heads)
    yield Strategy(ULYSSES_GATHER, ranks, degree), True


def _of_strategy(
    strategy: Strategy, task: _Task, chunk: int, *, prefix: str = "", sparse: bool = False
) -> Projection:
    shape = task.shape
    given = task.given
    chunking = deal_tokens(task.tokens, strategy.ranks, chunk, strategy.order)
    # Sparse attention's rate is lower: as if it computed more pairs at that of dense attention.
    density = min(1.0, given.density / given.sparse) if sparse else 1.0
    strategy = strategy.with_density(density)
    if strategy.exchange == DEMAND:
        work, received = _demand(shape, chunking, density, given)
        # Room for all blocks, beside those at home here.
        memory = memory_bytes(Strategy(GATHER, strategy.ranks), shape, chunking)
        memory += int(chunking.held[-1].max()) * shape.row_bytes * shape.attending_layers
    else:
        work = prefill_work(strategy, shape, chunking, density=density)
        received = int(traffic(strategy, shape, chunking).received.max()) * shape.attending_layers
        memory = memory_bytes(strategy, shape, chunking)
    name = f"{prefix}{strategy.label}{', sparse' if sparse else ''}"
    work = _over_links(work, strategy, task.machine)
    model = given.model(task.machine)
    return _projection(name, chunk, work, received=received, memory=memory, model=model)


def _projection(
    name: str, chunk: int, work: Work, *, received: int, memory: int, model: CostModel
) -> Projection:
    slowest = model.slowest_ranks(work)
    seconds = float(model.chunk_seconds(slowest).sum())
    computing = float(np.sum(model.compute(slowest) + model.attention(slowest)))
    return Projection(
        name=name,
        chunk=chunk,
        seconds=seconds,
        exposed=max(0.0, seconds - computing),
        received=received,
        kv_bytes=memory,
    )


def _over_links(work: Work, strategy: Strategy, machine: Machine) -> Work:
    """Bytes as if all came over the slower link."""
    if machine.nodes == 1 or strategy.ranks == 1:
        return work
    remote = machine.remote
    nvlink = machine.network / machine.nvlink
    match strategy.exchange.name:
        case "gather":
            return replace(work, hidden_bytes=work.hidden_bytes * remote)
        case "ulysses" | "demand":
            return replace(work, exposed_bytes=work.exposed_bytes * remote)
        case "usp":  # the mesh's rows are nodes
            return replace(work, exposed_bytes=work.exposed_bytes * nvlink)
        case "ulysses_gather":  # rows are nodes, or parts of one
            others = strategy.ring - 1
            elsewhere = strategy.ring - strategy.ring // machine.nodes
            return replace(
                work,
                exposed_bytes=work.exposed_bytes * nvlink,
                hidden_bytes=work.hidden_bytes * (elsewhere / others),
            )
        case "ring" | "pass_q" | "multi_ring":  # the slowest hop sets the pace
            return work
        case name:
            raise ValueError(f"which of the bytes of {name} come over the network is not known")


def _demand(
    shape: ModelShape, chunking: Chunking, density: float, given: Assumptions
) -> tuple[Work, int]:
    """As ``gather``, but of K and V only what is wanted, once, and all summaries."""
    strategy = Strategy(GATHER, chunking.ranks)
    gather = prefill_work(strategy, shape, chunking, density=density)
    share = given.wanted + summary_bytes(shape) / BLOCK_TOKENS / shape.row_bytes
    sizes = gather.hidden_bytes * share
    # Summaries, what is wanted, the blocks.
    calls = np.full(chunking.tokens.shape, 3.0 * shape.attending_layers)
    work = replace(
        gather,
        hidden_bytes=0.0 * sizes,
        hidden_calls=0.0 * calls,
        exposed_bytes=sizes,
        exposed_calls=calls,
    )
    return work, int(np.asarray(sizes).sum(0).max())


def spava_projection(
    shape: ModelShape, tokens: int, machine: Machine, given: Assumptions
) -> Projection:
    """Spava's work on one rank; its zigzag blocks make all ranks alike."""
    ranks = machine.ranks
    mode = spava(tokens)
    anchor = mode.anchor_tokens
    passing = mode.passing_tokens
    pairs = spava_pairs(tokens, ranks, anchor, passing)
    received = 2 * (ranks - 1) * passing * shape.row_bytes * shape.attending_layers
    one = np.ones((1, 1))
    work = Work(
        passes=one * shape.num_layers,
        linear_flops=one * (tokens / ranks + anchor) * shape.linear_flops,
        attention_flops=one * pairs * shape.attention_flops(shape.q_heads),
        exposed_bytes=0 * one,
        exposed_calls=0 * one,
        hidden_bytes=one * received * (machine.remote if machine.nodes > 1 else 1.0),
        hidden_calls=one * 2 * (ranks - 1) * shape.attending_layers,
    )
    memory = shape.attending_layers * shape.row_bytes * (tokens // ranks + anchor)
    return _projection(
        "Spava",
        -(-tokens // ranks),
        work,
        received=received,
        memory=memory,
        model=given.model(machine),
    )


def spava_pairs(tokens: int, ranks: int, anchor: int, passing: int) -> float:
    """(query, key) pairs of one rank: its two blocks, and the anchor with itself."""
    block = tokens / (2 * ranks)
    return block * ((2 * ranks - 1) * passing + 2 * anchor + block) + anchor**2 / 2
