"""The cost model: fitted, refined, saved; and the probe that starts it."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prefill_service.cost_model.cost import ASSUMED, COEFFICIENTS, CostModel
from prefill_service.cost_model.device_probe import (
    LINK_BYTES,
    LINK_REPEATS,
    probe_device,
    probe_link,
)
from prefill_service.cost_model.fitting import Observation, fit, nonnegative_least_squares
from prefill_service.cost_model.history import CostHistory
from prefill_service.cost_model.presets import PRESETS
from prefill_service.cost_model.profile import load_profile, save_profile
from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.work import Work, prefill_work
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import deal_tokens
from prefill_service.parallel.exchanges.catalog import GATHER, RING, ULYSSES, USP, ExchangeKind

SHAPE = PRESETS["qwen3-vl-8b"]
TRUTH = CostModel(
    per_pass=4e-4,
    per_linear_flop=1 / 310e12,
    per_attention_flop=1 / 95e12,
    per_byte=1 / 7e9,
    per_call=60e-6,
    provenance="truth",
)


def jobs(count: int, seed: int, *exchanges: ExchangeKind) -> list[Work]:
    """Prefills of various lengths, chunks and numbers of ranks."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        exchange = exchanges[index % len(exchanges)]
        ranks = draw.choice([2, 4, 8])
        strategy = Strategy(exchange, ranks, ranks if exchange == ULYSSES else 1)
        tokens = int(10 ** draw.uniform(3, 5.5))
        cut = deal_tokens(tokens, ranks, draw.choice([256, 1024, 8192]), strategy.order)
        found.append(prefill_work(strategy, SHAPE, cut, density=draw.choice([1.0, 0.3])))
    return found


def timed(works: list[Work], truth: CostModel, noise: float, seed: int = 1) -> list[Observation]:
    draw = random.Random(seed)
    return [
        Observation(truth.slowest_ranks(work), truth.prefill_seconds(work) * draw.gauss(1, noise))
        for work in works
    ]


def errors(model: CostModel, works: list[Work], truth: CostModel) -> list[float]:
    return [abs(model.prefill_seconds(w) / truth.prefill_seconds(w) - 1) for w in works]


def test_a_chunk_takes_what_its_slowest_rank_takes() -> None:
    cost = CostModel(
        per_pass=1.0,
        per_linear_flop=2.0,
        per_attention_flop=3.0,
        per_byte=5.0,
        per_call=7.0,
        provenance="",
    )

    def one_busy_rank(amount: float) -> np.ndarray:
        """[1 chunk, 2 ranks]."""
        return np.array([[amount, 0.0]])

    work = Work(
        passes=one_busy_rank(1),
        linear_flops=one_busy_rank(1),
        attention_flops=one_busy_rank(10),
        exposed_bytes=one_busy_rank(1),
        exposed_calls=one_busy_rank(1),
        hidden_bytes=one_busy_rank(2),
        hidden_calls=one_busy_rank(2),
    )
    # 1 + 2 + (5 + 7) exposed + max(30 attention, 24 hidden)
    assert cost.chunk_seconds(work).tolist() == [[45.0, 0.0]]
    assert cost.prefill_seconds(work) == 45
    slow = replace(cost, per_byte=50.0)  # 1 + 2 + (50 + 7) + max(30, 114)
    assert slow.prefill_seconds(work) == 174


def test_fit_recovers_a_b_c_from_one_ranks_chunks() -> None:
    draw = np.random.default_rng(3)
    fixed, token, pair = TRUTH.rates(SHAPE)
    observations = []
    for _ in range(60):
        n = int(draw.integers(256, 8192))
        past = int(draw.integers(0, 100_000))
        cut = deal_tokens(past + n, 1, past + n)
        pairs = float(cut.pairs[0, 0]) - past * (past + 1) / 2
        seconds = (fixed + token * n + pair * pairs) * draw.normal(1, 0.02)
        work = Work(
            passes=float(SHAPE.num_layers),
            linear_flops=float(SHAPE.linear_flops) * n,
            attention_flops=float(SHAPE.attention_flops(SHAPE.q_heads)) * pairs,
        )
        observations.append(Observation(work, seconds))
    found = fit(observations, ASSUMED, "fitted").rates(SHAPE)
    assert found == pytest.approx((fixed, token, pair), rel=0.06)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fit_recovers_all_five_through_the_overlap(seed: int) -> None:
    works = jobs(60, seed, GATHER, RING, ULYSSES)
    exact = fit(timed(works, TRUTH, 0.0), ASSUMED, "fitted")
    assert exact.coefficients() == pytest.approx(TRUTH.coefficients(), rel=2e-3)
    noisy = fit(timed(works, TRUTH, 0.03, seed), ASSUMED, "fitted")
    assert np.mean(errors(noisy, jobs(20, seed + 50, RING, USP), TRUTH)) < 0.03


def test_what_no_observation_says_stays_as_it_was() -> None:
    works = jobs(20, 5, GATHER)
    alone = [
        prefill_work(Strategy(GATHER, 1), SHAPE, deal_tokens(n, 1, 512))
        for n in (700, 5000, 90_000)
    ]
    found = fit(timed(alone, TRUTH, 0.0), ASSUMED, "fitted")
    assert found.coefficients()[3:] == pytest.approx(ASSUMED.coefficients()[3:])
    assert max(errors(found, alone, TRUTH)) < 1e-3
    # A prior off by a factor of a thousand does not pull what is observed.
    far = replace(ASSUMED, per_linear_flop=ASSUMED.per_linear_flop / 1000)
    assert max(errors(fit(timed(works, TRUTH, 0.0), far, ""), works, TRUTH)) < 5e-3


def test_nonnegative_least_squares_meets_its_conditions() -> None:
    """At the optimum the gradient is 0 where x > 0 and not negative where x = 0."""
    draw = np.random.default_rng(11)
    bound = 0
    for _ in range(100):
        matrix = draw.normal(size=(8, 5))
        target = draw.normal(size=8)
        x = nonnegative_least_squares(matrix, target)
        gradient = matrix.T @ (matrix @ x - target)
        assert (x >= 0).all()
        assert np.abs(gradient[x > 0]).max(initial=0) < 1e-9
        assert gradient[x == 0].min(initial=0) > -1e-9
        bound += int((x == 0).any())
    assert bound > 50


def test_refinement_converges_to_changed_costs() -> None:
    kinds = (GATHER, RING, ULYSSES)
    history = CostHistory(TRUTH)
    draw = random.Random(2)
    for work in jobs(40, 8, *kinds):
        history.add_job(work, TRUTH.prefill_seconds(work) * draw.gauss(1, 0.02))
    check = jobs(20, 99, *kinds)
    assert np.mean(errors(history.model, check, TRUTH)) < 0.03
    changed = replace(TRUTH, per_linear_flop=TRUTH.per_linear_flop * 2, per_byte=1 / 1e9)
    assert np.mean(errors(history.model, check, changed)) > 0.2
    course = []
    for work in jobs(60, 9, *kinds):
        history.add_job(work, changed.prefill_seconds(work) * draw.gauss(1, 0.02))
        course.append(float(np.mean(errors(history.model, check, changed))))
    assert course[0] > 0.2  # one job settles nothing
    assert max(course[20:]) < 0.1
    assert max(course[40:]) < 0.04
    assert history.model.provenance == "truth; refined by 100 jobs"


def test_history_is_bounded() -> None:
    history = CostHistory(ASSUMED, capacity=8)
    for work in jobs(30, 4, RING):
        history.add_job(work, 1.0)
    assert len(history._jobs) == 8
    for arguments, message in (
        ({"capacity": 0}, "capacity = 0"),
        ({"forgetting": 0.0}, "forgetting = 0.0"),
        ({"forgetting": 1.1}, "forgetting = 1.1"),
    ):
        with pytest.raises(ValueError, match=message):
            CostHistory(ASSUMED, **arguments)  # type: ignore[arg-type]


def test_bad_observations_are_refused() -> None:
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"seconds = {seconds!r}"):
            Observation(Work(), seconds)
    with pytest.raises(ValueError, match="at least one observation"):
        fit([], ASSUMED, "")
    with pytest.raises(ValueError, match="per_byte = -1 is not accepted"):
        replace(ASSUMED, per_byte=-1)


def test_a_profile_keeps_every_digit_and_names_units(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(TRUTH, path)
    assert load_profile(path) == TRUTH
    content = json.loads(path.read_text())
    assert content["provenance"] == "truth"
    assert content["coefficients"]["per_byte"] == {"value": 1 / 7e9, "unit": "s per byte received"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="x"), "is not a cost profile"),
        (lambda c: c.update(version=2), "version = 2; expected 1"),
        (lambda c: c.update(provenance=3), "provenance = 3; expected text"),
        (lambda c: c.update(coefficients=[]), "coefficients are missing"),
        (lambda c: c["coefficients"].pop("per_call"), "coefficient per_call is missing"),
        (lambda c: c["coefficients"]["per_call"].update(value="1"), "value of per_call = '1'"),
        (lambda c: c["coefficients"]["per_call"].update(value=-1), "per_call = -1.0 is not acc"),
        (lambda c: c["coefficients"]["per_call"].update(unit="ms"), "unit of per_call = 'ms'"),
    ],
)
def test_bad_profiles_are_named(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(TRUTH, path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with pytest.raises(ServiceError, match=message) as refused:
        load_profile(path)
    assert refused.value.reason is Reason.CONFIG_INVALID
    assert str(path) in str(refused.value)


def test_unreadable_profiles_are_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot be read: No such file"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ServiceError, match="is not JSON"):
        load_profile(tmp_path / "bad.json")
    with pytest.raises(ServiceError, match="cannot be written"):
        save_profile(TRUTH, tmp_path / "no" / "folder.json")


TINY = ModelShape(
    name="tiny",
    num_layers=2,
    hidden=64,
    intermediate=128,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    dtype="bfloat16",
)


@pytest.mark.parametrize("shape", [SHAPE, TINY], ids=["large", "tiny"])
def test_probe_fits_a_model_of_this_machine(shape: ModelShape) -> None:
    start = time.perf_counter()
    seen = probe_device(replace(shape, dtype="float32"), torch.device("cpu"))
    # A second on an idle core; the rest is for a busy one.
    assert time.perf_counter() - start < 5
    found = fit(seen, ASSUMED, "probe")
    for observation in seen:
        assert found.chunk_seconds(observation.work) == pytest.approx(observation.seconds, rel=0.01)
    for name in COEFFICIENTS[:3]:
        assert getattr(found, name) > 0
    assert 1e8 < 1 / found.per_linear_flop < 1e14
    assert 1e8 < 1 / found.per_attention_flop < 1e14
    assert found.per_byte == pytest.approx(ASSUMED.per_byte)


def test_link_probe_recovers_bandwidth_and_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    clock = [0.0]

    def move(size: int) -> None:
        calls.append(size)
        clock[0] += 2e-3 + size / 200e6 + (0.5 if len(calls) % 3 == 0 else 0.0)  # now and then busy

    monkeypatch.setattr(
        "prefill_service.cost_model.device_probe.time.perf_counter", lambda: clock[0]
    )
    found = fit(probe_link(move), ASSUMED, "link")
    assert 1 / found.per_byte == pytest.approx(200e6, rel=0.01)
    assert found.per_call == pytest.approx(2e-3, rel=0.01)
    # As many on every rank, however long they take: a collective must not be left half-way.
    assert calls == [size for size in LINK_BYTES for _ in range(LINK_REPEATS + 1)]
