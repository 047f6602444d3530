"""Coefficients of the cost model from observed seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prefill_service.cost_model.cost import COEFFICIENTS, CostModel
from prefill_service.cost_model.work import Work
from prefill_service.parallel.chunking import Floats

_ROUNDS = 20
_PRIOR_WEIGHT = 1e-4
"""Weight of the prior relative to an observation: it settles only what no observation says."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Work that was timed.

    Attributes:
        work: amounts, one number or one for each chunk (``CostModel.slowest_ranks`` of a prefill).
        seconds: what all of it took together.

    Raises:
        ValueError: seconds that are not above 0.
    """

    work: Work
    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds = {self.seconds!r} is not accepted; expected more than 0")


def fit(
    observations: Sequence[Observation],
    prior: CostModel,
    provenance: str,
    weights: Sequence[float] | None = None,
) -> CostModel:
    """Non-negative least squares of the errors, relative to the larger of predicted and observed.

    Relative to the observed alone, a prediction could be too long without limit but never too short
    by more than 1, and a few jobs of a link that was faster once would outvote many of today's.

    That is not linear, nor is it that the longer of attention and hidden transfer counts. So the
    fit goes in rounds: in each, the model of the round before says what was predicted, and which
    of the two it was, chunk by chunk.

    Args:
        observations: at least one.
        prior: what is believed of coefficients on which the observations say nothing.
        provenance: of the result.
        weights: of the observations, each 1 by default.

    Raises:
        ValueError: no observations.
    """
    if not observations:
        raise ValueError("a fit needs at least one observation")
    weight = np.sqrt(np.ones(len(observations)) if weights is None else np.asarray(weights))
    best = prior
    best_error = np.inf
    model = prior
    observed = np.array([one.seconds for one in observations])
    predicted = observed
    for _ in range(_ROUNDS):
        factor = weight / np.maximum(observed, predicted)
        rows = np.array([_row(model, one.work) for one in observations])
        values = _solve(rows * factor[:, None], observed * factor, prior.coefficients())
        before, model = model, _model(values, provenance)
        predicted = np.array([model.chunk_seconds(one.work).sum() for one in observations])
        errors = weight * (predicted - observed) / np.maximum(observed, predicted)
        if (error := float(errors @ errors)) < best_error:
            best = model
            best_error = error
        if np.allclose(values, before.coefficients(), rtol=1e-9, atol=0):
            break
    return best


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The ``x >= 0`` that minimises ``|matrix x - target|``.

    The solution is the unconstrained one over some subset of the columns. With as few columns as
    here, all subsets are tried, which cannot stall.

    Args:
        matrix: [rows, columns], a handful of columns.
        target: [rows].
    """
    columns = matrix.shape[1]
    best = np.zeros(columns)
    best_error = float(target @ target)
    for size in range(1, columns + 1):
        for subset in combinations(range(columns), size):
            found = np.linalg.lstsq(matrix[:, subset], target, rcond=None)[0]
            if (found < 0).any():
                continue
            rest = matrix[:, subset] @ found - target
            if (error := float(rest @ rest)) < best_error:
                best = np.zeros(columns)
                best_error = error
                best[list(subset)] = found
    return best


def _row(model: CostModel, work: Work) -> Floats:
    """[coefficients] by which each one is multiplied in the seconds that ``model`` predicts."""
    transfer = np.asarray(model.hidden(work)) > np.asarray(model.attention(work))
    return np.array(
        [
            np.sum(work.passes),
            np.sum(work.linear_flops),
            np.sum(np.where(transfer, 0.0, work.attention_flops)),
            np.sum(work.exposed_bytes) + np.sum(np.where(transfer, work.hidden_bytes, 0.0)),
            np.sum(work.exposed_calls) + np.sum(np.where(transfer, work.hidden_calls, 0.0)),
        ],
        np.float64,
    )


def _solve(rows: Floats, target: Floats, prior: Floats) -> Floats:
    """Solve the rows by least squares, with a small penalty on the distance from the prior.

    That distance is relative to the larger of the prior and of what the rows alone say, so that a
    prior which is off by orders of magnitude cannot outweigh them.
    """
    norms = np.linalg.norm(rows, axis=0)
    norms[norms == 0] = 1.0
    alone = nonnegative_least_squares(rows / norms, target) / norms
    scale = np.maximum(prior, alone)
    scale[scale == 0] = 1.0
    penalty = np.sqrt(_PRIOR_WEIGHT)
    matrix = np.concatenate([rows * scale, penalty * np.eye(len(prior))])
    found = nonnegative_least_squares(matrix, np.concatenate([target, penalty * prior / scale]))
    return np.asarray(scale * found)


def _model(values: Floats, provenance: str) -> CostModel:
    return CostModel(
        **dict(zip(COEFFICIENTS, map(float, values), strict=True)), provenance=provenance
    )
