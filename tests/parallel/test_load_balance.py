"""Who does what for whom: even enough, few tiles, and no rank any busier."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.parallel.load_balance import Load, Move, choose_moves, imbalance


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


def after(loads: list[Load], moves: list[Move]) -> list[int]:
    totals = [load.total for load in loads]
    for move in moves:
        pairs = move.count * loads[move.giver].pairs[move.tile]
        totals[move.giver] -= pairs
        totals[move.taker] += pairs
    return totals


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("skew", [1, 2, 10])
@pytest.mark.parametrize("seed", range(12))
def test_loads_are_evened_out(ranks: int, skew: int, seed: int) -> None:
    loads = random_loads(seed, ranks, skew)
    moves = choose_moves(loads, 1.0)
    totals = after(loads, moves)
    mean = sum(load.total for load in loads) / ranks
    assert imbalance(totals) <= imbalance([load.total for load in loads])
    assert imbalance(totals) <= 1.02 + 8 * 128 * 64 / mean  # to two moved tiles' price
    givers = {m.giver for m in moves}
    takers = {m.taker for m in moves}
    assert not givers & takers
    assert len({(m.giver, m.taker, m.head, m.tile) for m in moves}) == len(moves)
    given: dict[tuple[int, int, int], set[int]] = {}
    for m in moves:
        run = set(range(m.first, m.first + m.count))
        assert run <= set(range(loads[m.giver].blocks[m.head][m.tile]))
        assert m.count >= 4  # fewer would not pay for the queries on their way
        taken = given.setdefault((m.giver, m.head, m.tile), set())
        assert not taken & run
        taken |= run


def test_few_tiles_move_and_the_largest_ones() -> None:
    loads = [Load(0, [[10, 300, 20, 30]], [8192] * 4), Load(0, [[10, 10, 10, 10]], [8192] * 4)]
    assert choose_moves(loads, 1.1) == [Move(0, 1, 0, 1, 142, 158)]


def test_nothing_moves_up_to_the_threshold_or_where_nothing_can() -> None:
    loads = [Load(0, [[110]], [8192]), Load(0, [[90]], [8192])]
    assert choose_moves(loads, 1.1) == []
    assert choose_moves(loads, 1.09) != []
    assert choose_moves([Load(10**9, [[3]], [8192]), Load(0, [[0]], [8192])], 1.0) == []
    assert choose_moves([Load(0, [[0]], [0]), Load(0, [[0]], [0])], 1.0) == []
