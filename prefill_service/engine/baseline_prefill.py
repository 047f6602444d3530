"""A prefix by a published method on one rank: its rows all at once, layer by layer.

Unlike the chunk pipeline's, this KV depends on a question, whose rows every rank computes too, and
no page is complete before the last layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.engine.frame_prefetch import FramePrefetcher
from prefill_service.engine.shard_map import baseline_split
from prefill_service.engine.spans import Stage
from prefill_service.engine.task import PrefillMethod, RankTask
from prefill_service.errors import ServiceError
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import LayerKV
from prefill_service.parallel.baselines.baseline_attention import BaselineAttention
from prefill_service.parallel.baselines.sequence_split import SequenceSplit
from prefill_service.parallel.token_layout import Piece, Range, Share


class BaselinePrefill(PrefillMethod, LayerKV):
    """A task with a ``baseline``, computed as the published method does.

    Args:
        rank_task: the task on this rank.
        split: which rank computes which tokens.
        attention: the method's attention.
        shares: this rank's patches, cut into what is decoded and encoded at once.
        prefetcher: decodes the frames of the shares; started by ``execute``.
    """

    def __init__(
        self,
        rank_task: RankTask,
        split: SequenceSplit,
        attention: BaselineAttention,
        *,
        shares: Sequence[Share],
        prefetcher: FramePrefetcher,
    ) -> None:
        self._rank_task = rank_task
        self._worker = rank_task.worker
        self._clock = rank_task.clock
        self._split = split
        self._attention = attention
        self._shares = shares
        self._prefetcher = prefetcher
        self._kept = _kept_rows(split, rank_task.worker.group.rank)
        self._start = 0.0
        self._k = self._v = torch.empty(0)

    @classmethod
    def build(cls, rank_task: RankTask) -> BaselinePrefill:
        """Build what a task with a ``baseline`` needs."""
        group = rank_task.worker.group
        plan = rank_task.task.plan
        baseline = rank_task.task.baseline
        assert baseline is not None, "this task has no baseline"
        split = baseline_split(plan, baseline, group.size)
        shares = patch_shares(
            _context(split, group.rank), plan.patch_ends, rank_task.worker.chunk_tokens
        )
        return cls(
            rank_task,
            split,
            BaselineAttention(
                group, split, baseline.method, rank_task.worker.model.attention_scale
            ),
            shares=shares,
            prefetcher=rank_task.make_prefetcher(shares),
        )

    @override
    def execute(self) -> None:
        self._prefetcher.start()
        features, error = self._encode()
        # Ranks have unequal numbers of encoding steps, so they meet when all are done.
        self._rank_task.sync_point(error=error)
        self._start = time.perf_counter()
        ids, positions = self._inputs()
        video_token_id = self._rank_task.task.plan.video_token_id
        self._worker.model.prefill(ids, positions, video_token_id, features=features, kv=self)
        self._clock.spans.note(Stage.PREFILL, "all rows", self._start, tokens=len(ids))
        layout = self._worker.kv_layout
        pages = sum(layout.pages_for(rows.stop - rows.start) for rows in self._kept)
        self._rank_task.writer.seal_pages(0, pages)

    @override
    def close(self) -> None:
        self._prefetcher.close()

    @override
    def attention_report(self) -> None:
        """Report nothing: the attention of these methods is not measured."""

    @override
    def offload_report(self) -> None:
        """Report nothing: only one layer's keys are held at a time."""

    # ---- LayerKV ---------------------------------------------------------------------------

    @override
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._worker.model.device.type == "cpu" or layer == 0:
            self._rank_task.sync_point()
        page = 0
        layout = self._worker.kv_layout
        for rows in self._kept:
            self._rank_task.writer.write(layer, page, k[rows], v[rows])
            page += layout.pages_for(rows.stop - rows.start)
        self._k = k
        self._v = v
        self._worker.report_progress()
        self._clock.update(
            Stage.PREFILL,
            done=len(k) * (layer + 1) // layout.num_layers,
            total=len(k),
            seconds=time.perf_counter() - self._start,
        )

    @override
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        return self._attention.attend(q, self._k.transpose(0, 1), self._v.transpose(0, 1))

    # ---- steps -----------------------------------------------------------------------------

    def _encode(self) -> tuple[list[VisionFeatures], ServiceError | None]:
        """Features of the rank's patches, share by share; until cancelled, or until an error."""
        features: list[VisionFeatures] = []
        done = 0
        total = sum(share.num_patches for share in self._shares)
        for share in self._shares:
            try:
                pixels = self._prefetcher.next(self._rank_task.control.cancelled)
            except ServiceError as error:
                return [], error
            if pixels is None:
                return [], None
            start = time.perf_counter()
            features.append(self._worker.model.encode(pixels))
            self._worker.report_progress()
            done += share.num_patches
            self._clock.finish_chunk(Stage.VISION, done=done, total=total, start=start)
        return features, None

    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows] token ids and [axes, rows] positions of the rank's rows."""
        plan = self._rank_task.task.plan
        baseline = self._rank_task.task.baseline
        assert baseline is not None
        question = np.array(baseline.question_ids, np.int32)
        split = self._split
        rank = self._worker.group.rank
        # Text has one position on all axes.
        after = np.arange(split.context_tokens, split.num_tokens) + plan.position_delta
        positions = np.concatenate(
            [plan.position_ids, np.tile(after, (len(plan.position_ids), 1))], 1
        )
        index = np.concatenate([np.arange(start, end) for start, end in split.computed(rank)])
        ids = np.concatenate([plan.token_ids, question])[index]
        positions = positions[:, index]
        if split.copies_question(rank):
            assert split.question_at is not None
            copy = np.arange(split.question_at, split.question_at + split.question_tokens)
            positions[:, copy] = copy  # where it stands, not where the question does
        return ids, positions


def _context(split: SequenceSplit, rank: int) -> list[Range]:
    """Ranges of the video that a rank computes: the anchor and its blocks."""
    ranges = [(0, split.anchor_tokens), *(split.block(index) for index in split.blocks_of(rank))]
    return [(start, end) for start, end in ranges if end > start]


def _kept_rows(split: SequenceSplit, rank: int) -> list[slice]:
    """Rows that the rank has pages for, in the pages' order: all it holds but the question."""
    held = zip(split.held(rank), split.held_rows(rank), strict=True)
    return [rows for (start, _), rows in held if start < split.context_tokens]


def patch_shares(ranges: list[Range], patch_ends: np.ndarray, chunk_tokens: int) -> list[Share]:
    """Ranges of whole patches, cut into what is decoded and encoded at once.

    Args:
        ranges: ascending, each begins and ends with a patch.
        patch_ends: [patches] one past each patch's last token.
        chunk_tokens: tokens of a share to aim at; at least one patch is taken.
    """
    bounds = [0, *(int(end) for end in patch_ends)]
    per_share = max(1, chunk_tokens * len(patch_ends) // bounds[-1])
    shares = []
    for start, end in ranges:
        first = bounds.index(start)
        last = bounds.index(end)
        for patch in range(first, last, per_share):
            stop = min(last, patch + per_share)
            shares.append(Share((Piece(patch, stop, bounds[patch], bounds[stop]),)))
    return shares
