"""The published methods beside ours: Spava, Star Attention, APB, on ranks that are threads.

They look at the question, so every question has a prefix of its own. Split, attention and what is
passed on are the product's (``parallel/comparison``); only the messages are copies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.quality.fidelity.rehearsal import Prefix
from prefill_service.engine.baseline_prefill import patch_shares
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.baselines.baseline_attention import BaselineAttention
from prefill_service.parallel.baselines.methods import BaselineMethod, BaselineName
from prefill_service.parallel.baselines.sequence_split import SequenceSplit, split_patches
from prefill_service.parallel.process_group import PendingPart, SPGroup

METHODS = tuple(str(method) for method in BaselineName)


def comparison_kv(
    model: PrefillModel,
    prefix: Prefix,
    method: BaselineMethod,
    *,
    ranks: int,
    question_ids: Sequence[int],
    chunk_tokens: int,
) -> list[Tensor]:
    """The prefix's KV as ``ranks`` ranks of a published method make it for one question.

    Args:
        method: the method with its lengths for this prefix.
        question_ids: tokens after the video.
        chunk_tokens: vision features are handed over in runs of about so many tokens.

    Returns:
        Per layer [2, kv_heads, tokens, head_dim], keys and values in prompt order.

    Raises:
        ValueError: the video is too short for the method on so many ranks.
    """
    tokens = len(prefix.token_ids)
    split = split_patches(
        prefix.patch_ends, len(question_ids), ranks, method, text_tokens=_text_tokens(prefix)
    )
    shape = (tokens, 2, model.shape.kv_heads, model.shape.head_dim)
    pages = [torch.empty(shape, dtype=model.dtype) for _ in range(model.shape.num_layers)]
    board = Timeline(ranks)
    question = np.array(question_ids, np.int32)

    def compute(rank: int) -> None:
        group = _ThreadRank(rank, ranks, None, None, board=board)
        attention = BaselineAttention(group, split, method, model.attention_scale)
        ids, positions = _inputs(prefix, split, rank, question)
        ranges = [(0, split.anchor_tokens), *(split.block(b) for b in split.blocks_of(rank))]
        shares = patch_shares([r for r in ranges if r[1] > r[0]], prefix.patch_ends, chunk_tokens)
        features = [part for share in shares for part in prefix.features_of(share)]
        rows = _Rows(split, rank, pages, attention)
        try:
            model.prefill(ids, positions, prefix.video_token_id, features=features, kv=rows)
        except BaseException:
            board.barrier.abort()  # the others would wait for ever
            raise

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(compute, range(ranks)))
    return [page.permute(1, 2, 0, 3) for page in pages]


class Timeline:
    """Where threads leave their tensors for each other."""

    def __init__(self, ranks: int) -> None:
        self.barrier = Barrier(ranks)
        self._left: list[Tensor | None] = [None] * ranks

    def exchange(self, rank: int, slices: list[Tensor]) -> None:
        """Fill ``slices`` but the own one from the other ranks'."""
        self._left[rank] = slices[rank]
        self.barrier.wait()
        for other, place in enumerate(slices):
            left = self._left[other]
            if other != rank and left is not None:
                place.copy_(left)
        self.barrier.wait()


@dataclass(slots=True)
class _ThreadRank(SPGroup):
    """A rank among threads: what is sent has arrived when the call returns."""

    board: Timeline = field(default_factory=lambda: Timeline(1))

    @override
    def all_gather_v(self, slices: list[Tensor]) -> list[PendingPart]:
        self.board.exchange(self.rank, slices)
        return []


class _Rows:
    """One rank's ``LayerKV``: its rows of a layer; those that it answers for go to the pages."""

    def __init__(
        self, split: SequenceSplit, rank: int, pages: list[Tensor], attention: BaselineAttention
    ) -> None:
        held = zip(split.held(rank), split.held_rows(rank), strict=True)
        self._kept = [(run, rows) for run, rows in held if run[0] < split.context_tokens]
        self._pages = pages
        self._attention = attention
        self._k = self._v = torch.empty(0)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """[rows, kv_heads, head_dim] each."""
        for (start, end), rows in self._kept:
            self._pages[layer][start:end] = torch.stack([k[rows], v[rows]], 1)
        self._k = k
        self._v = v

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """The method's attention."""
        return self._attention.attend(q, self._k.transpose(0, 1), self._v.transpose(0, 1))


def _text_tokens(prefix: Prefix) -> int:
    """Tokens before the video: its first patch begins with a marker that later ones lack."""
    first, second = (int(end) for end in prefix.patch_ends[:2])
    return first - (second - first) - 1


def _inputs(
    prefix: Prefix, split: SequenceSplit, rank: int, question: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[rows] ids and [3, rows] positions of a rank's rows, as ``engine.comparison`` has them."""
    start = int(prefix.position_ids.max()) + 1
    after = np.tile(np.arange(start, start + len(question)), (3, 1))
    positions = np.concatenate([prefix.position_ids, after], 1)
    ids = np.concatenate([prefix.token_ids, question])
    index = np.concatenate([np.arange(*run) for run in split.computed(rank)])
    ids = ids[index]
    positions = positions[:, index]
    if split.copies_question(rank):
        assert split.question_at is not None
        copy = np.arange(split.question_at, split.question_at + split.question_tokens)
        positions[:, copy] = copy
    return ids, positions
