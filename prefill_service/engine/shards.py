"""From a plan to a shard map: which rank holds which tokens in which pages."""

from __future__ import annotations

from prefill_service.kv.manifest import KVLayout, ShardRun
from prefill_service.parallel.layout import ChunkLayout


def shard_runs(layout: ChunkLayout, kv: KVLayout) -> tuple[ShardRun, ...]:
    """One run per range of a rank's share, in token order; pages count up per rank."""
    runs = []
    next_page: dict[int, int] = {}
    for chunk in layout.shares:
        for rank, share in enumerate(chunk):
            for start, end in share.ranges:
                page = next_page.get(rank, 0)
                runs.append(ShardRun(start, end, rank, page))
                next_page[rank] = page + kv.pages_for(end - start)
    return tuple(sorted(runs, key=lambda run: run.start_token))


def pages_of_rank(runs: tuple[ShardRun, ...], rank: int, kv: KVLayout) -> int:
    """Pages the rank needs for its runs."""
    return sum(kv.pages_for(run.end_token - run.start_token) for run in runs if run.rank == rank)
