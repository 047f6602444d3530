"""Which waiting job gets which ranks: the degree by length and load, and who goes before whom.

Pure functions of what waits and what runs (LoongServe, arXiv 2404.09526; FlexSP, 2412.01523).

* **Degree.** Nobody else there: all ranks. Else no more ranks than the prefix has chunks, since
  ranks with less than a chunk each wait for each other more than they compute; and of those degrees
  the one with the least mean time to completion if everything that waits were as long: W such jobs
  on q teams of p ranks end after ``t(p) (ceil(W / q) + 1) / 2`` on average. Long prompts scale, so
  that a few of them are done one after the other on all ranks; the longer the queue, the more they
  are done side by side, each on fewer ranks with less to exchange.
* **Place.** The team on which the job would end first, by estimate: fewer ranks now, or more later.
* **Order.** First come, first served. A job that has to wait keeps its place: one behind it may use
  the ranks meanwhile if it ends, by estimate, before they are needed.
* **Overtaking.** A job that would have to wait runs inside the pause of one at work if it has at
  most ``1 / SHORT`` of the tokens that are left of that one, and all that overtake one have at most
  ``OVERTAKEN`` of its tokens.

Nobody starves: a job is passed by at most ``PASSED`` others while it waits, and by at most that
share of its own length while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prefill_service.parallel.subgroups import Subgroup

SHORT = 4
"""A job overtakes another that has as many times its tokens left."""

OVERTAKEN = 0.5
"""Tokens of all jobs that overtake one, as a share of its own."""

PASSED = 8
"""Jobs that begin before one that has waited longer."""

LOSS = 0.15
"""What each further rank adds to the work of a prefix, unless a cost model says more: two ranks are
1.74 times as fast as one, four 2.76 times. An assumption."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits.

    Attributes:
        tokens: of its prefix.
        everyone: it needs all ranks.
        passed: jobs that came later and have begun.
    """

    job_id: str
    tokens: int
    everyone: bool = False
    passed: int = 0


@dataclass(frozen=True, slots=True)
class Active:
    """A job that has ranks.

    Attributes:
        left: tokens still to compute.
        pausable: another may run inside it.
        overtaken: tokens of those that have, so far.
        inside: it is itself inside another one.
    """

    job_id: str
    tokens: int
    left: int
    team: Subgroup
    pausable: bool = True
    overtaken: int = 0
    inside: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """A job begins.

    Attributes:
        over: job that is paused for it, if any.
    """

    job_id: str
    team: Subgroup
    over: str = ""


Seconds = Callable[[int, int], float]
"""Time of a prefix of so many tokens on so many ranks, in any unit."""


class Room(Protocol):
    """What ranks have working KV for (``PrefillExecutor``)."""

    def fits(self, tokens: int, team: Subgroup) -> bool:
        """Whether a team can compute a prefix."""

    def fit_together(self, paused: tuple[int, Subgroup], inside: tuple[int, Subgroup]) -> bool:
        """Whether it can compute two (tokens, team), one in the other's pause."""


def assumed_seconds(tokens: int, ranks: int) -> float:
    """Even shares, and ``LOSS``; in tokens."""
    return tokens / ranks * (1 + LOSS * (ranks - 1))


class Placer:
    """Places jobs on teams.

    Args:
        teams: there are; the first is all ranks.
        chunk_tokens: per chunk and rank.
        room: where smaller teams have to divide what only larger ones can hold.
        overtaking: whether jobs may be paused at all.
        seconds: predicts how long prefixes take.
    """

    def __init__(
        self,
        teams: Sequence[Subgroup],
        chunk_tokens: int,
        room: Room,
        overtaking: bool = True,
        seconds: Seconds = assumed_seconds,
    ) -> None:
        self._teams = teams
        self._chunk_tokens = chunk_tokens
        self._room = room
        self._overtaking = overtaking
        self._seconds = seconds

    def degree(self, tokens: int, waiting: int, at_most: int) -> int:
        """Ranks for a prefix when ``waiting`` jobs wait, itself included; see the module."""
        sizes = sorted({team.size for team in self._teams})

        def mean_seconds(size: int) -> float:
            side_by_side = sum(team.size == size for team in self._teams)
            rounds = -(-waiting // side_by_side)
            return self._seconds(tokens, size) * (rounds + 1) / 2

        return min([s for s in sizes if s <= at_most] or sizes[:1], key=mean_seconds)

    def place(self, waiting: Sequence[Waiting], active: Sequence[Active]) -> list[Placement]:
        """Who begins now, of those who wait, in the order in which they came."""
        board = Timeline(active, self._seconds)
        placed: list[Placement] = []
        passed: list[int] = []  # how often each has been that has to wait
        for job in waiting:
            if any(count >= PASSED for count in passed):
                break
            found = self._place(job, len(waiting) - len(placed), board)
            if found is None:
                passed.append(job.passed)
                continue
            placed.append(found)
            board.add(found, job.tokens)
            passed = [count + 1 for count in passed]
        return placed

    def _place(self, job: Waiting, waiting: int, board: Timeline) -> Placement | None:
        teams = list(self._teams[:1])
        alone = waiting == 1 and not board.active
        if not (job.everyone or alone):
            size = self.degree(job.tokens, waiting, -(-job.tokens // self._chunk_tokens))
            fitting = [team for team in self._teams if self._room.fits(job.tokens, team)]
            least = min((team.size for team in fitting), default=0)
            teams = [team for team in fitting if team.size <= max(size, least)] or teams
        ends = {team: board.end(team, self._seconds(job.tokens, team.size)) for team in teams}
        best = min(teams, key=lambda team: (ends[team], -team.size, team.first))
        if board.free(best) and board.begins_now(best, self._seconds(job.tokens, best.size)):
            return Placement(job.job_id, best)
        over = self._overtake(job, waiting, board)
        if over is None:
            board.reserve(best, ends[best], self._seconds(job.tokens, best.size))
        return over

    def _overtake(self, job: Waiting, waiting: int, board: Timeline) -> Placement | None:
        if not self._overtaking:
            return None
        size = self._teams[0].size if job.everyone else self.degree(job.tokens, waiting, 1 << 30)
        for outer in board.active:
            long = outer.left >= SHORT * job.tokens
            spared = outer.overtaken + job.tokens > OVERTAKEN * outer.tokens
            if outer.inside or not outer.pausable or spared or not long:
                continue
            for team in self._teams:
                suits = team.size == size if job.everyone else team.size <= size
                if (
                    suits
                    and outer.team.contains(team)
                    and board.free(team, besides=outer)
                    and self._room.fit_together((outer.tokens, outer.team), (job.tokens, team))
                ):
                    return Placement(job.job_id, team, outer.job_id)
        return None


class Timeline:
    """Who has which ranks, until when by estimate, and who is to have them then."""

    def __init__(self, active: Sequence[Active], seconds: Seconds) -> None:
        self.active = list(active)
        self._seconds = seconds
        self._reserved: list[tuple[Subgroup, float, float]] = []  # team, start, end

    def add(self, placed: Placement, tokens: int) -> None:
        """A job has got ranks."""
        for index, job in enumerate(self.active):
            if job.job_id == placed.over:
                self.active[index] = replace(job, overtaken=job.overtaken + tokens)
        self.active.append(Active(placed.job_id, tokens, tokens, placed.team, inside=placed.over))

    def free(self, team: Subgroup, besides: Active | None = None) -> bool:
        """Whether nobody has any of the team's ranks, but perhaps one that is to be paused."""
        allowed = besides.job_id if besides else ""
        return not any(job.team.overlaps(team) for job in self.active if job.job_id != allowed)

    def begins_now(self, team: Subgroup, seconds: float) -> bool:
        """Whether a job on free ranks is in no reservation's way."""
        return self._start(team, seconds) == 0

    def end(self, team: Subgroup, seconds: float) -> float:
        """When a job would end that takes so long on the team."""
        return self._start(team, seconds) + seconds

    def reserve(self, team: Subgroup, end: float, seconds: float) -> None:
        """A job waits for the team."""
        self._reserved.append((team, end - seconds, end))

    def _start(self, team: Subgroup, seconds: float) -> float:
        """The first time at which the team is free for so long."""
        start = max((self._busy(rank) for rank in team.members), default=0.0)
        for other, begin, end in sorted(self._reserved, key=lambda r: r[1]):
            if other.overlaps(team) and start + seconds > begin and start < end:
                start = end
        return start

    def _busy(self, rank: int) -> float:
        """Until when a rank is: with what is left of all of its jobs."""
        return sum(
            self._seconds(job.tokens, job.team.size) * job.left / max(1, job.tokens)
            for job in self.active
            if rank in job.team.members
        )
