"""What the configuration means for subgroups of fewer ranks than all."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefill_service.config import EngineConfig
from prefill_service.engine.resolve import exchange_choice, kv_budget
from prefill_service.errors import ServiceError
from prefill_service.parallel.subgroups import form_subgroups
from tests.support.checkpoints import described_checkpoint

MODEL = described_checkpoint(Path(), num_layers=3, q_heads=6, kv_heads=2)


@pytest.mark.parametrize(
    ("exchange", "wanted", "degrees"),
    [
        ("gather", 0, {6: 1, 3: 1, 2: 1, 1: 1}),
        ("ulysses", 0, {6: 6, 3: 3, 2: 2, 1: 1}),
        ("usp", 0, {6: 3, 3: 3, 2: 2, 1: 1}),
        ("usp", 2, {6: 2, 3: 3, 2: 2, 1: 1}),
        ("multi_ring", 0, {6: 1, 3: 1, 2: 1, 1: 1}),
    ],
)
def test_a_subgroup_has_the_configured_exchange_on_its_own_mesh(
    exchange: str, wanted: int, degrees: dict[int, int]
) -> None:
    engine = EngineConfig(ranks=6, exchange=exchange, ulysses_degree=wanted)
    choices = {t.size: exchange_choice(MODEL, engine, t.size) for t in form_subgroups(6)}
    assert {size: choice.degree for size, choice in choices.items()} == degrees
    assert {str(choice.kind) for choice in choices.values()} == {exchange}


def test_what_all_ranks_cannot_have_is_refused_though_a_subgroup_could() -> None:
    engine = EngineConfig(ranks=8, exchange="ulysses")
    with pytest.raises(ServiceError, match="degree of 8 exceeds the model's 6 query heads"):
        exchange_choice(MODEL, engine)
    assert exchange_choice(MODEL, engine, 4).degree == 4


def test_a_smaller_subgroup_divides_the_keys_among_fewer() -> None:
    engine = EngineConfig(ranks=4, exchange="ring", kv_working_bytes=1 << 20)
    sets = {
        size: kv_budget(engine, MODEL, "float32", device="cpu", ranks=size) for size in (1, 2, 4)
    }
    assert {size: budget.kv_shards for size, budget in sets.items()} == {1: 1, 2: 2, 4: 4}
    assert sets[1].working_set(400) == 4 * sets[4].working_set(400)
    assert {budget.working_bytes for budget in sets.values()} == {1 << 20}
