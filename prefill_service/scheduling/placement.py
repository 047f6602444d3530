"""Which waiting job gets which ranks: the degree by length and load, and who goes before whom.

Pure functions of what waits and what runs (LoongServe, arXiv 2404.09526; FlexSP, 2412.01523).

* **Degree.** A job that is alone has all ranks. Otherwise it has no more ranks than its prefix has
  chunks, since ranks with less than a chunk each wait for each other more than they compute; and of
  those degrees the one with the least mean time to completion if everything that waits were as
  long: W such jobs on q subgroups of p ranks end after ``t(p) (ceil(W / q) + 1) / 2`` on average.
  Long prompts scale, so that a few of them are done one after the other on all ranks. The longer
  the queue, the more they are done side by side, each on fewer ranks with less to exchange.
* **Place.** The subgroup on which the job would end first, by estimate: fewer ranks now, or more
  later.
* **Order.** First come, first served. A job that has to wait keeps its place: one behind it may use
  the ranks meanwhile if it ends, by estimate, before they are needed.
* **Preemption.** A job that would have to wait runs in the pause of a running one if it has at most
  ``1 / PREEMPT_RATIO`` of the tokens that are left of that one, and all that preempt one have at
  most ``MAX_PREEMPTED`` of its tokens.

Nobody starves: a job is bypassed by at most ``MAX_BYPASSES`` others while it waits, and by at most
that fraction of its own length while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prefill_service.parallel.subgroups import Subgroup

PREEMPT_RATIO = 4
"""A job preempts another that has at least this many times its tokens left."""

MAX_PREEMPTED = 0.5
"""Tokens of all jobs that preempt one, as a fraction of its own."""

MAX_BYPASSES = 8
"""Jobs that start before one that has waited longer."""

LOSS_PER_RANK = 0.15
"""What each further rank adds to the work of a prefix, unless a cost model says more: two ranks are
1.74 times as fast as one, four 2.76 times. An assumption."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits.

    Attributes:
        tokens: of its prefix.
        all_ranks: whether it needs all ranks.
        subgroup: the only ranks that it can have; ``None`` for any.
        bypassed: how many jobs came later and have started.
    """

    job_id: str
    tokens: int
    all_ranks: bool = False
    subgroup: Subgroup | None = None
    bypassed: int = 0


@dataclass(frozen=True, slots=True)
class Active:
    """A job that has ranks.

    Attributes:
        tokens_left: tokens still to compute.
        preemptible: whether another may run in its pause.
        preempted_tokens: tokens of the jobs that have preempted it so far.
        preempts: id of the job in whose pause it runs.
    """

    job_id: str
    tokens: int
    tokens_left: int
    subgroup: Subgroup
    preemptible: bool = True
    preempted_tokens: int = 0
    preempts: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """A job starts on a subgroup.

    Attributes:
        preempts: id of the job that is paused for it, if any.
    """

    job_id: str
    subgroup: Subgroup
    preempts: str = ""


Seconds = Callable[[int, int], float]
"""Time of a prefix of so many tokens on so many ranks, in any unit."""


class KVCapacity(Protocol):
    """What ranks have memory for (``PrefillExecutor``)."""

    def fits(self, tokens: int, subgroup: Subgroup) -> bool:
        """Whether a subgroup can compute a prefix of so many tokens."""

    def fit_together(
        self, preempted: tuple[int, Subgroup], preempting: tuple[int, Subgroup]
    ) -> bool:
        """Whether ranks can have two prefixes (tokens, subgroup), one in the other's pause."""


def assumed_seconds(tokens: int, ranks: int) -> float:
    """The work divided evenly, with ``LOSS_PER_RANK``; in tokens."""
    return tokens / ranks * (1 + LOSS_PER_RANK * (ranks - 1))


class Placer:
    """Places jobs on subgroups.

    Args:
        subgroups: all there are; the first is all ranks.
        chunk_tokens: tokens per chunk and rank.
        capacity: where smaller subgroups have to divide what only larger ones can hold.
        preemption: whether jobs may be paused at all.
        seconds: predicts how long prefixes take.
    """

    def __init__(
        self,
        subgroups: Sequence[Subgroup],
        chunk_tokens: int,
        capacity: KVCapacity,
        *,
        preemption: bool = True,
        seconds: Seconds = assumed_seconds,
    ) -> None:
        self._subgroups = subgroups
        self._chunk_tokens = chunk_tokens
        self._capacity = capacity
        self._preemption = preemption
        self._seconds = seconds

    def choose_degree(self, tokens: int, waiting: int, at_most: int) -> int:
        """Ranks for a prefix when ``waiting`` jobs wait, itself included (module docstring)."""
        sizes = sorted({subgroup.size for subgroup in self._subgroups})

        def mean_seconds(size: int) -> float:
            side_by_side = sum(subgroup.size == size for subgroup in self._subgroups)
            rounds = -(-waiting // side_by_side)
            return self._seconds(tokens, size) * (rounds + 1) / 2

        return min([s for s in sizes if s <= at_most] or sizes[:1], key=mean_seconds)

    def place_jobs(self, waiting: Sequence[Waiting], active: Sequence[Active]) -> list[Placement]:
        """Which of the jobs that wait start now; ``waiting`` is in the order of arrival."""
        timeline = Timeline(active, self._seconds)
        placements: list[Placement] = []
        bypassed: list[int] = []  # by how many, of each job that has to wait
        for job in waiting:
            if any(count >= MAX_BYPASSES for count in bypassed):
                break
            placement = self._place(job, len(waiting) - len(placements), timeline)
            if placement is None:
                bypassed.append(job.bypassed)
                continue
            placements.append(placement)
            timeline.add_active(placement, job.tokens)
            bypassed = [count + 1 for count in bypassed]
        return placements

    def _place(self, job: Waiting, waiting: int, timeline: Timeline) -> Placement | None:
        ends = {
            subgroup: timeline.estimate_end(subgroup, self._seconds(job.tokens, subgroup.size))
            for subgroup in self._candidates(job, waiting, alone=not timeline.active)
        }
        best = min(ends, key=lambda subgroup: (ends[subgroup], -subgroup.size, subgroup.first))
        seconds = self._seconds(job.tokens, best.size)
        if timeline.is_free(best) and timeline.can_start_now(best, seconds):
            return Placement(job.job_id, best)
        placement = self._preempt(job, waiting, timeline)
        if placement is None:
            timeline.reserve(best, ends[best], seconds)
        return placement

    def _candidates(self, job: Waiting, waiting: int, alone: bool) -> list[Subgroup]:
        """The subgroups that a job may have, whether or not they are free."""
        if job.subgroup is not None:
            return [job.subgroup]
        if job.all_ranks or (alone and waiting == 1):
            return [self._subgroups[0]]
        size = self.choose_degree(job.tokens, waiting, -(-job.tokens // self._chunk_tokens))
        fitting = [group for group in self._subgroups if self._capacity.fits(job.tokens, group)]
        least = min((group.size for group in fitting), default=0)
        small = [group for group in fitting if group.size <= max(size, least)]
        return small or [self._subgroups[0]]

    def _preempt(self, job: Waiting, waiting: int, timeline: Timeline) -> Placement | None:
        if not self._preemption:
            return None
        all_ranks = self._subgroups[0].size
        size = all_ranks if job.all_ranks else self.choose_degree(job.tokens, waiting, all_ranks)
        for running in timeline.active:
            if not _is_preemptible(running, job):
                continue
            for subgroup in self._subgroups:
                suits = subgroup.size == size if job.all_ranks else subgroup.size <= size
                if job.subgroup is not None:
                    suits = subgroup == job.subgroup
                if (
                    suits
                    and running.subgroup.contains(subgroup)
                    and timeline.is_free(subgroup, besides=running)
                    and self._capacity.fit_together(
                        (running.tokens, running.subgroup), (job.tokens, subgroup)
                    )
                ):
                    return Placement(job.job_id, subgroup, preempts=running.job_id)
        return None


def _is_preemptible(running: Active, job: Waiting) -> bool:
    """Whether a running job may be paused for one of that length."""
    short = running.tokens_left >= PREEMPT_RATIO * job.tokens
    allowed = running.preempted_tokens + job.tokens <= MAX_PREEMPTED * running.tokens
    return running.preemptible and not running.preempts and short and allowed


class Timeline:
    """Which jobs have which ranks, until when by estimate, and which are to have them then."""

    def __init__(self, active: Sequence[Active], seconds: Seconds) -> None:
        self.active = list(active)
        self._seconds = seconds
        self._reservations: list[tuple[Subgroup, float, float]] = []  # subgroup, start, end

    def add_active(self, placement: Placement, tokens: int) -> None:
        """Note that a job of so many tokens starts where it was placed."""
        for index, job in enumerate(self.active):
            if job.job_id == placement.preempts:
                preempted_tokens = job.preempted_tokens + tokens
                self.active[index] = replace(job, preempted_tokens=preempted_tokens)
        self.active.append(
            Active(
                job_id=placement.job_id,
                tokens=tokens,
                tokens_left=tokens,
                subgroup=placement.subgroup,
                preempts=placement.preempts,
            )
        )

    def is_free(self, subgroup: Subgroup, besides: Active | None = None) -> bool:
        """Whether no job has any of the subgroup's ranks, except perhaps ``besides``."""
        allowed = besides.job_id if besides else ""
        return not any(
            job.subgroup.overlaps(subgroup) for job in self.active if job.job_id != allowed
        )

    def can_start_now(self, subgroup: Subgroup, seconds: float) -> bool:
        """Whether a job that takes so long on free ranks conflicts with no reservation."""
        return self._earliest_start(subgroup, seconds) == 0

    def estimate_end(self, subgroup: Subgroup, seconds: float) -> float:
        """When a job would end that takes so long on the subgroup."""
        return self._earliest_start(subgroup, seconds) + seconds

    def reserve(self, subgroup: Subgroup, end: float, seconds: float) -> None:
        """Reserve the subgroup for a job that waits for it."""
        self._reservations.append((subgroup, end - seconds, end))

    def _earliest_start(self, subgroup: Subgroup, seconds: float) -> float:
        """The first time from which the subgroup is free for so long."""
        start = max((self._busy_until(rank) for rank in subgroup.members), default=0.0)
        for other, begin, end in sorted(self._reservations, key=lambda entry: entry[1]):
            if other.overlaps(subgroup) and start + seconds > begin and start < end:
                start = end
        return start

    def _busy_until(self, rank: int) -> float:
        """When a rank has done what is left of all of its jobs."""
        return sum(
            self._seconds(job.tokens, job.subgroup.size) * job.tokens_left / max(1, job.tokens)
            for job in self.active
            if rank in job.subgroup.members
        )
