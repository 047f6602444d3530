"""From a plan to a shard map: which rank holds which tokens in which pages."""

from __future__ import annotations

from prefill_service.engine.messages import BaselineTask, PrefillTask
from prefill_service.kv.manifest import KVLayout, Manifest, ShardRun
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.baselines.sequence_split import SequenceSplit, split_patches
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.parallel.token_layout import (
    ChunkLayout,
    Share,
    deal_patches,
    deal_text,
    share_of,
)


def shard_runs(layout: ChunkLayout, kv: KVLayout, subgroup: Subgroup) -> tuple[ShardRun, ...]:
    """One run per range of a rank's share, in token order; pages count up per rank.

    Args:
        layout: of the subgroup's ranks, of which the runs name the number among all.
    """
    runs = []
    next_page: dict[int, int] = {}
    for chunk in layout.shares:
        for rank, share in zip(subgroup.members, chunk, strict=True):
            for start, end in share.ranges:
                page = next_page.get(rank, 0)
                runs.append(ShardRun(start, end, rank, page))
                next_page[rank] = page + kv.pages_for(end - start)
    return tuple(sorted(runs, key=lambda run: run.start_token))


def token_layout(
    plan: PrefixPlan, ranks: int, chunk_tokens: int, *, exchange: ExchangeChoice, whole_units: bool
) -> ChunkLayout:
    """Which rank of a subgroup computes which tokens of a prefix.

    Args:
        ranks: of the subgroup.
        chunk_tokens: tokens per chunk and rank.
        exchange: whose order of a chunk's patches it is.
        whole_units: whether ranks get whole selection units (``PrefillTask``).
    """
    return deal_patches(
        plan.patch_ends,
        ranks,
        chunk_tokens,
        order=exchange.kind.order,
        whole_units=whole_units,
    )


def task_layout(task: PrefillTask, chunk_tokens: int, kv: KVLayout) -> ChunkLayout:
    """The token layout of a task, which is the one that its manifest was made from.

    Raises:
        ValueError: the manifest was made from another one.
    """
    layout = token_layout(
        task.plan,
        task.subgroup.size,
        chunk_tokens,
        exchange=task.exchange,
        whole_units=task.whole_units,
    )
    if shard_runs(layout, kv, task.subgroup) != task.manifest.runs:
        raise ValueError(f"the manifest of {task.job_id} was made from another token layout")
    return layout


def text_layout(base: Manifest, plan: PrefixPlan, ranks: int, chunk_tokens: int) -> ChunkLayout:
    """Which rank of a subgroup computes which tokens of the text that ``plan`` has after a prefix.

    Args:
        base: the prefix.
        chunk_tokens: tokens per chunk and rank.
    """
    return deal_text(base.num_tokens, plan.num_tokens, ranks, chunk_tokens)


def held_shares(manifest: Manifest, subgroup: Subgroup) -> tuple[Share, ...]:
    """What each rank of a subgroup holds of a prefix, as if it were one chunk."""
    return tuple(
        share_of((run.start_token, run.end_token) for run in manifest.runs if run.rank == rank)
        for rank in subgroup.members
    )


def baseline_split(plan: PrefixPlan, baseline: BaselineTask, ranks: int) -> SequenceSplit:
    """How a published method splits a prefix.

    Raises:
        ValueError: too few temporal patches (``split_patches``).
    """
    question = len(baseline.question_ids)
    text = plan.placeholder[0]
    return split_patches(plan.patch_ends, question, ranks, baseline.method, text_tokens=text)


def baseline_runs(split: SequenceSplit, kv: KVLayout, subgroup: Subgroup) -> tuple[ShardRun, ...]:
    """One run per range that a rank keeps of the context, in token order; see ``shard_runs``."""
    runs = []
    for place, rank in enumerate(subgroup.members):
        page = 0
        for start, end in split.held(place):
            if start < split.context_tokens:
                runs.append(ShardRun(start, end, rank, page))
                page += kv.pages_for(end - start)
    return tuple(sorted(runs, key=lambda run: run.start_token))


def pages_of_rank(runs: tuple[ShardRun, ...], rank: int, kv: KVLayout) -> int:
    """How many pages a rank needs for its runs."""
    return sum(kv.pages_for(run.end_token - run.start_token) for run in runs if run.rank == rank)
