"""From a plan to a shard map: which rank holds which tokens in which pages."""

from __future__ import annotations

from prefill_service.engine.messages import BaselineTask, PrefillTask
from prefill_service.kv.manifest import KVLayout, ShardRun
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.baselines.sequence_split import SequenceSplit, split_patches
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.parallel.token_layout import ChunkLayout, deal_patches


def shard_runs(layout: ChunkLayout, kv: KVLayout, team: Subgroup) -> tuple[ShardRun, ...]:
    """One run per range of a rank's share, in token order; pages count up per rank.

    Args:
        layout: of the team's ranks, of which the runs name the number among all.
    """
    runs = []
    next_page: dict[int, int] = {}
    for chunk in layout.shares:
        for rank, share in zip(team.members, chunk, strict=True):
            for start, end in share.ranges:
                page = next_page.get(rank, 0)
                runs.append(ShardRun(start, end, rank, page))
                next_page[rank] = page + kv.pages_for(end - start)
    return tuple(sorted(runs, key=lambda run: run.start_token))


def layout_of(task: PrefillTask, chunk_tokens: int, kv: KVLayout) -> ChunkLayout:
    """The layout that a task's manifest was made from; ranks do as it says.

    Raises:
        ValueError: it was made from another one.
    """
    for whole_units in (False, True):
        layout = deal_patches(
            task.plan.patch_ends, task.team.size, chunk_tokens, task.exchange.kind.order,
            whole_units,
        )  # fmt: skip
        if shard_runs(layout, kv, task.team) == task.manifest.runs:
            return layout
    raise ValueError(f"the manifest of {task.job_id} deals tokens in no way known here")


def baseline_split(plan: PrefixPlan, comparison: BaselineTask, ranks: int) -> SequenceSplit:
    """How a published method splits a prefix.

    Raises:
        ValueError: too few temporal patches (``split_patches``).
    """
    question, text = len(comparison.question_ids), plan.placeholder[0]
    return split_patches(plan.patch_ends, question, ranks, comparison.mode, text)


def baseline_runs(split: SequenceSplit, kv: KVLayout, team: Subgroup) -> tuple[ShardRun, ...]:
    """One run per range that a rank keeps of the context, in token order; see ``shard_runs``."""
    runs = []
    for place, rank in enumerate(team.members):
        page = 0
        for start, end in split.held(place):
            if start < split.context_tokens:
                runs.append(ShardRun(start, end, rank, page))
                page += kv.pages_for(end - start)
    return tuple(sorted(runs, key=lambda run: run.start_token))


def pages_of_rank(runs: tuple[ShardRun, ...], rank: int, kv: KVLayout) -> int:
    """Pages the rank needs for its runs."""
    return sum(kv.pages_for(run.end_token - run.start_token) for run in runs if run.rank == rank)
