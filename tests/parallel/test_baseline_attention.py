"""Spava, Star Attention and APB on real gloo ranks, against attention under an explicit mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefill_service.attention.dense import Partial, attend
from prefill_service.parallel.baselines import baseline_attention
from prefill_service.parallel.baselines.baseline_attention import BaselineAttention
from prefill_service.parallel.baselines.methods import (
    BaselineMethod,
    BaselineName,
    PassingScore,
    baseline_method,
)
from prefill_service.parallel.baselines.passing import passing_counts, start_passing
from prefill_service.parallel.baselines.sequence_split import (
    SequenceSplit,
    split_patches,
)
from prefill_service.parallel.comm_stats import moved
from prefill_service.parallel.process_group import SPGroup
from tests.parallel.baseline_cases import (
    ALL,
    APB,
    HEAD_DIM,
    SCALE,
    SPAVA,
    STAR,
    Case,
    E,
    all_rows,
    cases,
    dense,
    emulate,
    random,
    rows_of,
    visible,
)
from tests.parallel.conformance import Wire
from tests.parallel.even_split import split_evenly
from tests.parallel.ranks import run_ranks


def run_case(group: SPGroup, case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    split = case.split(group.size)
    method = case.baseline(group.size)
    rows = all_rows(case, split)[:, rows_of(split, group.rank)]
    q, k, v = rows.split([case.q_heads, case.kv_heads, case.kv_heads])
    pairs = 0

    def counted(
        q: torch.Tensor, k: torch.Tensor, *rest: Any, causal: bool, scale: float
    ) -> Partial:
        nonlocal pairs
        n = q.shape[1]
        pairs += n * (n + 1) // 2 if causal else n * k.shape[1]
        return attend(q, k, *rest, causal=causal, scale=scale)

    before = dict(group.comm_stats.uses)
    with Wire() as wire, monkeypatch.context() as patch:
        patch.setattr(baseline_attention, "attend", counted)
        out = BaselineAttention(group, split, method, SCALE).attend(q, k, v)
    return {
        "out": out,
        "wire": wire.received,
        "uses": group.comm_stats.since(before),
        "pairs": pairs,
        "needle": {} if case.passing == ALL else needle_reaches(group, case, split, method),
    }


def needle_reaches(group: SPGroup, case: Case, split: SequenceSplit, method: BaselineMethod) -> Any:
    """Per needle's block and own later block: whether each KV head's passing set has the needle."""
    found = {}
    for target in range(split.num_blocks):
        whole = all_rows(case, split).clone()
        q, k, v = whole.split([case.q_heads, case.kv_heads, case.kv_heads])
        start, end = split.block(target)
        needle = (start + end - 1) // 2
        q[:, split.context_tokens : split.num_tokens, 0] += 3
        k[:, needle] = 0
        k[:, needle, 0] = 100
        mine = rows_of(split, group.rank)
        counts = passing_counts(split, method.passing_tokens)
        passed = start_passing(
            group,
            split,
            (q[:, mine], k[:, mine], v[:, mine]),
            counts=counts,
            score=method.score,
        )
        for block in split.blocks_of(group.rank):
            keys, values = passed.earlier_keys(block)
            if block > target:
                there = (keys == k[:, None, needle]).all(-1)  # [kv_heads, keys]
                same = (values == v[:, None, needle]).all(-1)
                found[target, block] = bool((there & same).any(-1).all())
        passed.wait_all()
    return found


def run_rank(group: SPGroup) -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {
            name: run_case(group, case, monkeypatch) for name, case in cases(group.size).items()
        }


Ran = tuple[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda size: f"{size} ranks")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """What each rank found for each case."""
    size: int = request.param
    folder: Path = tmp_path_factory.mktemp("ranks")
    return size, run_ranks(run_rank, size, folder)


def check(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-9, msg=lambda text: f"{what}: {text}"
    )


def test_equals_the_method_under_an_explicit_mask(ran: Ran) -> None:
    """Seed 19 (g), and (h): uneven and one-token blocks, a question of one token."""
    size, results = ran
    for name, case in cases(size).items():
        split = case.split(size)
        method = case.baseline(size)
        expected = emulate(case, split, visible(case, split, method))
        for rank, result in enumerate(results):
            mine = rows_of(split, rank)
            check(result[name]["out"], expected[:, mine], (name, rank))


def test_equals_dense_attention_where_all_passes_or_one_rank_has_all(ran: Ran) -> None:
    """Seed 19 (a) and (f)."""
    size, results = ran
    for name, case in cases(size).items():
        if size > 1 and not (case.method is SPAVA and case.passing == ALL):
            continue
        split = case.split(size)
        for rank, result in enumerate(results):
            expected = dense(case, split)[:, rows_of(split, rank)]
            check(result[name]["out"], expected, (name, rank))


def test_the_question_is_exact_whatever_passes(ran: Ran) -> None:
    """Seed 19 (b), on every rank and for every method."""
    size, results = ran
    for name, case in cases(size).items():
        expected = dense(case, case.split(size))[:, -case.question :]
        for rank, result in enumerate(results):
            check(result[name]["out"][:, -case.question :], expected, (name, rank))


def test_bytes_are_the_published_ones(ran: Ran) -> None:
    """Seed 19 (c): two passing sets of each other rank, and the question's merge."""
    size, results = ran
    for name, case in cases(size).items():
        counts = passing_counts(case.split(size), case.baseline(size).passing_tokens)
        merge = (size - 1) * case.question * case.q_heads * (HEAD_DIM + 1) * E
        for rank, result in enumerate(results):
            mine = sum(counts[index] for index in case.split(size).blocks_of(rank))
            expected = merge + (sum(counts) - mine) * 2 * case.kv_heads * HEAD_DIM * E
            assert result[name]["wire"] == moved(result[name]["uses"]) == expected, (name, rank)
    even = cases(size)["even"]
    passed = 2 * (size - 1) * 5 * 2 * even.kv_heads * HEAD_DIM * E
    merge = (size - 1) * even.question * even.q_heads * (HEAD_DIM + 1) * E
    assert {result["even"]["wire"] for result in results} == {passed + merge}


def test_ranks_attend_to_equally_many_pairs(ran: Ran) -> None:
    """Seed 19 (d). Rank 0 alone has the question's own pairs."""
    size, results = ran
    case = cases(size)["even"]
    pairs = [result["even"]["pairs"] for result in results]
    pairs[0] -= case.question * (case.question + 1) // 2
    assert len(set(pairs)) == 1
    split = case.split(size)
    method = case.baseline(size)
    seen = int(visible(case, split, method)[0].sum())
    # Every rank computes the anchor's rows again.
    again = (size - 1) * case.baseline(size).anchor_tokens * (method.anchor_tokens + 1) // 2
    assert sum(result["even"]["pairs"] for result in results) == seen + again


def test_a_key_that_stands_out_reaches_every_later_block(ran: Ran) -> None:
    """Seed 19 (i), for a needle in every block and every KV head, also where two keys pass."""
    size, results = ran
    for name, case in cases(size).items():
        if case.passing == ALL:
            continue
        blocks = case.split(size).num_blocks
        found = {at: there for result in results for at, there in result[name]["needle"].items()}
        later = {(a, b) for b in range(blocks) for a in range(b)}
        assert found == dict.fromkeys(later, case.method is not STAR), name


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_each_token_is_kept_by_one_rank(size: int) -> None:
    """Seed 19 (e)."""
    for name, case in cases(size).items():
        if case.blocks and size > 4:
            continue
        split = case.split(size)
        kept = sorted(t for r in range(size) for a, b in split.held(r) for t in range(a, b))
        assert kept == list(range(split.num_tokens)), name
        for rank in range(size):
            computed = [t for a, b in split.computed(rank) for t in range(a, b)]
            assert len(computed) == split.rank_rows(rank).count
            held = [list(range(a, b)) for a, b in split.held(rank)]
            assert held == [computed[rows] for rows in split.held_rows(rank)], name


def test_videos_are_split_at_patches() -> None:
    ends = [30, 50, 70, 90, 110, 130, 150, 170, 195]  # the first has text, and so has the last
    spava = baseline_method(SPAVA, 195, 2, anchor_tokens=40, passing_tokens=5)
    assert split_patches(ends, 6, 2, spava) == SequenceSplit(
        ranks=2, anchor_tokens=50, block_ends=(90, 130, 170, 195), question_tokens=6
    )
    none = baseline_method(SPAVA, 195, 2, anchor_tokens=0, passing_tokens=5)
    assert split_patches(ends, 6, 2, none) == SequenceSplit(
        ranks=2, anchor_tokens=0, block_ends=(70, 110, 150, 195), question_tokens=6
    )
    apb = baseline_method(APB, 195, 2, anchor_tokens=50, passing_tokens=5)
    assert split_patches(ends, 6, 2, apb, text_tokens=11) == SequenceSplit(
        ranks=2, anchor_tokens=50, block_ends=(130, 195), question_tokens=6, question_at=11
    )
    text = r"9 temporal patches .* an anchor of 111 tokens leaves 3, 4 blocks need as many"
    with pytest.raises(ValueError, match=text):
        split_patches(
            ends, 6, 2, baseline_method(SPAVA, 195, 2, anchor_tokens=111, passing_tokens=5)
        )
    with pytest.raises(ValueError, match="an anchor of 500 tokens leaves 0, 4 blocks"):
        split_patches(
            ends, 6, 2, baseline_method(SPAVA, 195, 2, anchor_tokens=500, passing_tokens=5)
        )


def test_published_lengths() -> None:
    context = 148_512
    assert [baseline_method(method, context, 8) for method in BaselineName] == [
        BaselineMethod(
            name=SPAVA, anchor_tokens=2432, passing_tokens=1280, score=PassingScore.MEAN
        ),
        BaselineMethod(
            name=STAR,
            anchor_tokens=16502,
            passing_tokens=0,
            score=PassingScore.MEAN,
            blocks_per_rank=1,
        ),
        BaselineMethod(
            name=APB,
            anchor_tokens=2432,
            passing_tokens=2432,
            score=PassingScore.MAX,
            blocks_per_rank=1,
            question_in_anchor=True,
        ),
    ]


def test_what_cannot_be_is_refused() -> None:
    method = baseline_method(SPAVA, 100, 4, anchor_tokens=8, passing_tokens=2)
    with pytest.raises(ValueError, match=r"a context of 15 tokens is too short .* at least 16"):
        split_evenly(15, 1, 4, method)
    assert split_evenly(16, 1, 4, method).block_ends == tuple(range(9, 17))
    with pytest.raises(ValueError, match="a question of 0 tokens; at least 1"):
        split_evenly(100, 0, 4, method)
    with pytest.raises(ValueError, match="a block of tokens 20 to 20 is empty"):
        SequenceSplit(ranks=2, anchor_tokens=10, block_ends=(20, 20, 30, 40), question_tokens=1)
    with pytest.raises(ValueError, match="after 11 tokens is outside an anchor of 10"):
        SequenceSplit(
            ranks=2, anchor_tokens=10, block_ends=(20, 30), question_tokens=1, question_at=11
        )
    with pytest.raises(ValueError, match="3 blocks are neither 1 nor 2 for 2 ranks"):
        SequenceSplit(ranks=2, anchor_tokens=10, block_ends=(20, 30, 40), question_tokens=1)
    with pytest.raises(ValueError, match="star passes no tokens on, 5 were asked for"):
        baseline_method(STAR, 100, 4, anchor_tokens=None, passing_tokens=5)
    with pytest.raises(ValueError, match="-1 passing tokens: neither may be negative"):
        baseline_method(SPAVA, 100, 4, anchor_tokens=8, passing_tokens=-1)
    with pytest.raises(ValueError, match="3 blocks per rank; there are 1 or 2"):
        BaselineMethod(name=SPAVA, anchor_tokens=8, passing_tokens=2, blocks_per_rank=3)
    with pytest.raises(ValueError, match="a question in the anchor needs one block per rank"):
        BaselineMethod(name=APB, anchor_tokens=8, passing_tokens=2, question_in_anchor=True)
    group = SPGroup(0, 1, None, None)
    split = split_evenly(100, 2, 1, method)
    with pytest.raises(ValueError, match="the split is for 4 ranks, the group has 1"):
        BaselineAttention(group, split_evenly(100, 2, 4, method), method, SCALE)
    q = random(2, 101, HEAD_DIM, seed=1)
    with pytest.raises(ValueError, match=r"101 queries, 101 keys .* rank 0 has 102 rows"):
        BaselineAttention(group, split, method, SCALE).attend(q, q, q)
