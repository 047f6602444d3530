"""The cost model: seconds of a chunk from its tokens, its attended pairs and its traffic.

A rank spends ``A + B n + C p`` on a chunk of n tokens of its own with p attended (query, key)
pairs (LoongServe, arXiv 2404.09526; FlexSP, 2412.01523), plus its transfers. The terms are kept per
layer, FLOP and byte rather than per token and pair, so that measurements on one model say something
about another, and a probe of single operations about all of them.

Transfers that an exchange can hide run beside the attention: the longer of both counts. All ranks
wait for each other, so a chunk takes what its slowest rank takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from prefill_service.cost_model.work import Amount, Work
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import Floats


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of each unit of work on one rank.

    Attributes:
        per_pass: s per layer and chunk, whatever its size (A).
        per_linear_flop: s per FLOP of linear layers (B, over the model's FLOPs per token).
        per_attention_flop: s per FLOP of attention (C, over the model's FLOPs per pair).
        per_byte: s per byte received; its inverse is the link's bandwidth.
        per_call: s per operation of an exchange; the link's latency.
        provenance: where the numbers come from, for people.

    Raises:
        ValueError: a coefficient that is negative or not finite.
    """

    per_pass: float
    per_linear_flop: float
    per_attention_flop: float
    per_byte: float
    per_call: float
    provenance: str

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value!r} is not accepted; expected 0 or more seconds")

    def coefficients(self) -> Floats:
        """The coefficients as a vector, in the order of ``COEFFICIENTS``."""
        return np.array([getattr(self, name) for name in COEFFICIENTS])

    def attention(self, work: Work) -> Amount:
        """Seconds of attention."""
        return self.per_attention_flop * work.attention_flops

    def hidden(self, work: Work) -> Amount:
        """Seconds of the transfers that run beside attention."""
        return self.per_byte * work.hidden_bytes + self.per_call * work.hidden_calls

    def exposed(self, work: Work) -> Amount:
        """Seconds of the transfers that nothing runs beside."""
        return self.per_byte * work.exposed_bytes + self.per_call * work.exposed_calls

    def compute(self, work: Work) -> Amount:
        """Seconds of everything that is neither attention nor transfer."""
        return self.per_pass * work.passes + self.per_linear_flop * work.linear_flops

    def chunk_seconds(self, work: Work) -> Floats:
        """Predict the seconds of each chunk and rank; the result has the shape of the amounts."""
        overlapped = np.maximum(self.attention(work), self.hidden(work))
        return np.asarray(self.compute(work) + self.exposed(work) + overlapped, np.float64)

    def slowest_ranks(self, work: Work) -> Work:
        """Keep of each chunk the work of the rank that takes longest: nothing else counts.

        Args:
            work: arrays of [chunks, ranks].
        """
        return work.select_ranks(self.chunk_seconds(work).argmax(1))

    def prefill_seconds(self, work: Work) -> float:
        """Predict the seconds of a whole prefill: of all chunks, each as long as its slowest rank.

        Args:
            work: arrays of [chunks, ranks].
        """
        return float(self.chunk_seconds(work).max(1).sum())

    def rates(self, shape: ModelShape) -> tuple[float, float, float]:
        """One model's A in s per chunk, B in s per token and C in s per attended pair."""
        return (
            self.per_pass * shape.num_layers,
            self.per_linear_flop * shape.linear_flops,
            self.per_attention_flop * shape.attention_flops(shape.q_heads),
        )


COEFFICIENTS = tuple(f.name for f in fields(CostModel) if f.name != "provenance")

ASSUMED = CostModel(
    per_pass=200e-6,
    per_linear_flop=1 / 400e12,
    per_attention_flop=1 / 300e12,
    per_byte=1 / 25e9,
    per_call=20e-6,
    provenance="assumed",
)
"""Round numbers, of an H100-class GPU in bfloat16 behind PCIe 4.0 x16, not measured."""
