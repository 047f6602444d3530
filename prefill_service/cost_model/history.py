"""The cost model kept up to date by finished jobs."""

from __future__ import annotations

from collections import deque

from prefill_service.cost_model.cost import CostModel
from prefill_service.cost_model.fitting import Observation, fit
from prefill_service.cost_model.work import Work


class CostHistory:
    """The last jobs, each worth less than the one after it, and the model that fits them.

    Args:
        prior: the model before any job, from a probe or a profile.
        capacity: jobs remembered.
        forgetting: weight of a job relative to the next one, above 0 and at most 1.

    Raises:
        ValueError: a capacity or factor out of range.
    """

    def __init__(self, prior: CostModel, capacity: int = 64, forgetting: float = 0.85) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity} is not accepted; expected 1 or more")
        if not 0 < forgetting <= 1:
            raise ValueError(
                f"forgetting = {forgetting!r} is not accepted; expected 0 < forgetting <= 1"
            )
        self._prior = prior
        self._forgetting = forgetting
        self._jobs: deque[Observation] = deque(maxlen=capacity)
        self._model = prior
        self._finished = 0

    @property
    def model(self) -> CostModel:
        """Fitted to all jobs so far; the prior before the first one."""
        return self._model

    def add_job(self, work: Work, seconds: float) -> CostModel:
        """Learn from a finished job.

        Args:
            work: arrays of [chunks, ranks] (``prefill_work`` of what was run).
            seconds: that it took, without waiting for frames.

        Returns:
            The new model.

        Raises:
            ValueError: seconds that are not above 0.
        """
        self._jobs.append(Observation(self._model.slowest_ranks(work), seconds))
        self._finished += 1
        count = len(self._jobs)
        weights = [self._forgetting ** (count - 1 - index) for index in range(count)]
        origin = self._prior.provenance
        provenance = f"{origin}; refined by {self._finished} job{'s' if self._finished > 1 else ''}"
        self._model = fit(list(self._jobs), self._prior, provenance, weights)
        return self._model
