"""Who does what for whom: even enough, few tiles, and no rank any busier."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.parallel.load_balance import Delegation, Load, choose_delegations, imbalance


def random_loads(seed: int, ranks: int, skew: float) -> list[Load]:
    """Two KV heads, four tiles a rank; the first rank has ``skew`` times as many blocks."""
    rng = np.random.default_rng(seed)
    loads = []
    for rank in range(ranks):
        blocks = rng.integers(0, 200, (2, 4)) * (skew if rank == 0 else 1)
        tokens = rng.integers(1, 128) if seed % 3 == 0 else 128
        loads.append(
            Load(
                int(rng.integers(0, 200_000)),
                blocks.astype(int).tolist(),
                [128 * 64] * 3 + [int(tokens) * 64],
            )
        )
    return loads


def after(loads: list[Load], delegations: list[Delegation]) -> list[int]:
    totals = [load.total for load in loads]
    for one in delegations:
        pairs = one.count * loads[one.from_rank].pairs[one.tile]
        totals[one.from_rank] -= pairs
        totals[one.to_rank] += pairs
    return totals


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("skew", [1, 2, 10])
@pytest.mark.parametrize("seed", range(12))
def test_loads_are_evened_out(ranks: int, skew: int, seed: int) -> None:
    loads = random_loads(seed, ranks, skew)
    delegations = choose_delegations(loads, 1.0)
    totals = after(loads, delegations)
    mean = sum(load.total for load in loads) / ranks
    assert imbalance(totals) <= imbalance([load.total for load in loads])
    assert imbalance(totals) <= 1.02 + 8 * 128 * 64 / mean  # to two delegated tiles' price
    assert not {d.from_rank for d in delegations} & {d.to_rank for d in delegations}
    tiles = {(d.from_rank, d.to_rank, d.head, d.tile) for d in delegations}
    assert len(tiles) == len(delegations)
    delegated: dict[tuple[int, int, int], set[int]] = {}
    for d in delegations:
        run = set(range(d.first, d.first + d.count))
        assert run <= set(range(loads[d.from_rank].blocks[d.head][d.tile]))
        assert d.count >= 4  # fewer would not pay for the queries on their way
        before = delegated.setdefault((d.from_rank, d.head, d.tile), set())
        assert not before & run
        before |= run


def test_few_tiles_are_delegated_and_the_largest_ones() -> None:
    loads = [Load(0, [[10, 300, 20, 30]], [8192] * 4), Load(0, [[10, 10, 10, 10]], [8192] * 4)]
    assert choose_delegations(loads, 1.1) == [
        Delegation(from_rank=0, to_rank=1, head=0, tile=1, first=142, count=158)
    ]


def test_nothing_is_delegated_up_to_the_threshold_or_where_nothing_can() -> None:
    loads = [Load(0, [[110]], [8192]), Load(0, [[90]], [8192])]
    assert choose_delegations(loads, 1.1) == []
    assert choose_delegations(loads, 1.09) != []
    assert choose_delegations([Load(10**9, [[3]], [8192]), Load(0, [[0]], [8192])], 1.0) == []
    assert choose_delegations([Load(0, [[0]], [0]), Load(0, [[0]], [0])], 1.0) == []
