"""When a job is started again that ended with the ranks under it."""

from __future__ import annotations

import json

from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.subgroups import Subgroup

MAX_ATTEMPTS = 2
"""Starts of a job. As many more do not count that ended with a rank that others had."""
RESTARTABLE = frozenset({Reason.RANK_DIED, Reason.RANK_STALLED, Reason.STALE_GENERATION})
"""The group has restarted itself; the job may be tried again."""


class RetryPolicy:
    """The starts of one job on one team.

    Args:
        team: the ranks that it has each time.
    """

    def __init__(self, team: Subgroup) -> None:
        self._team = team
        self._spared = 0  # starts that others have ended

    def another(self, error: ServiceError, starts: int) -> bool:
        """Whether the job is started once more after ``starts`` starts, the last ended so."""
        if not self._concerns(error):
            self._spared = min(self._spared + 1, MAX_ATTEMPTS)
        return error.reason in RESTARTABLE and starts < MAX_ATTEMPTS + self._spared

    def _concerns(self, error: ServiceError) -> bool:
        """Whether the failure of ranks may be the doing of who ran on the team's."""
        ranks = json.loads(error.metadata.get("ranks", "[]"))
        if (rank := error.metadata.get("rank")) is not None:
            ranks.append(int(rank))
        return not ranks or any(rank in self._team.members for rank in ranks)
