"""A prefix by a published method on one rank: its rows all at once, layer by layer.

Unlike the chunk pipeline's, this KV depends on a question, whose rows every rank computes too, and
no page is complete before the last layer.
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prefill_service.engine.frame_prefetch import FramePrefetcher
from prefill_service.engine.messages import PrefillTask, Progress, Stage
from prefill_service.engine.shard_map import baseline_split
from prefill_service.engine.task import StageClock, TaskControl, WorkerContext, checkpoint
from prefill_service.errors import ServiceError
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.models.families.base import VisionFeatures
from prefill_service.parallel.baselines.baseline_attention import BaselineAttention
from prefill_service.parallel.baselines.sequence_split import SequenceSplit
from prefill_service.parallel.token_layout import Piece, Range, Share


class BaselinePrefill:
    """A ``TaskRun`` of a task with a ``comparison``; also the model's ``LayerKV``."""

    def __init__(
        self,
        rank: WorkerContext,
        task: PrefillTask,
        writer: ShardWriter,
        control: TaskControl,
    ) -> None:
        assert task.comparison is not None, "run_task was given the wrong way to begin"
        self._rank, self._task, self._writer, self._control = rank, task, writer, control
        self._question = np.array(task.comparison.question_ids, np.int32)
        group, model, plan = rank.group, rank.model, task.plan
        self.clock = StageClock(
            lambda stage, done, total, seconds: rank.send(
                Progress(task.job_id, rank.number, stage, done, total, seconds)
            )
        )
        self._split = baseline_split(plan, task.comparison, group.size)
        self._attention = BaselineAttention(
            group, self._split, task.comparison.mode, model.attention_scale
        )
        self._kept = _kept_rows(self._split, group.rank)
        self._shares = patch_shares(
            _context(self._split, group.rank), plan.patch_ends, rank.chunk_tokens
        )
        preprocess = model.preprocessor(plan)
        self._feeder = FramePrefetcher(
            partial(rank.open_frames, task),
            preprocess,
            plan.frame_indices,
            preprocess.frames_per_patch,
            self._shares,
            self._on_frames,
            self.clock.spans,
        )
        self._k = self._v = torch.empty(0)

    def execute(self) -> None:
        """Encode the rank's patches, the anchor's included, then run the language model once."""
        features, error = self._encode()
        # Ranks have unequal numbers of encoding steps, so they meet when all are done.
        checkpoint(self._rank, self._control, error=error)
        self._start = time.perf_counter()
        ids, positions = self._inputs()
        self._rank.model.prefill(
            ids, positions, self._task.plan.video_token_id, features=features, kv=self
        )
        self.clock.spans.note(Stage.PREFILL, "all rows", self._start, tokens=len(ids))
        layout = self._rank.kv_layout
        pages = sum(layout.pages_for(rows.stop - rows.start) for rows in self._kept)
        self._writer.seal_pages(0, pages)

    def close(self) -> None:
        """Stop decoding."""
        self._feeder.close()

    def report(self) -> None:
        """Nothing is measured of these methods."""

    def offloaded(self) -> None:
        """Nothing is: one layer's keys are held at a time."""

    # ---- LayerKV ---------------------------------------------------------------------------

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of this rank's rows: those that it answers for go to its pages."""
        if self._rank.model.device.type == "cpu" or layer == 0:
            checkpoint(self._rank, self._control)
        page, layout = 0, self._rank.kv_layout
        for rows in self._kept:
            self._writer.write(layer, page, k[rows], v[rows])
            page += layout.pages_for(rows.stop - rows.start)
        self._k, self._v = k, v
        self._rank.tick()
        done, total = len(k) * (layer + 1) // layout.num_layers, len(k)
        self.clock.set(Stage.PREFILL, done, total, time.perf_counter() - self._start)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """The method's attention of this rank's rows."""
        return self._attention.attend(q, self._k.transpose(0, 1), self._v.transpose(0, 1))

    # ---- steps -----------------------------------------------------------------------------

    def _encode(self) -> tuple[list[VisionFeatures], ServiceError | None]:
        """Features of the rank's patches, share by share; until cancelled, or until an error."""
        features: list[VisionFeatures] = []
        done, total = 0, sum(share.num_patches for share in self._shares)
        for share in self._shares:
            try:
                pixels = self._feeder.next(self._control.cancelled)
            except ServiceError as error:
                return [], error
            if pixels is None:
                return [], None
            start = time.perf_counter()
            features.append(self._rank.model.encode(pixels))
            self._rank.tick()
            done += share.num_patches
            self.clock.add(Stage.VISION, done, total, start)
        return features, None

    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows] token ids and [axes, rows] positions of the rank's rows."""
        plan, split, rank = self._task.plan, self._split, self._rank.group.rank
        # Text has one position on all axes.
        after = np.arange(split.context_tokens, split.num_tokens) + plan.position_delta
        positions = np.concatenate(
            [plan.position_ids, np.tile(after, (len(plan.position_ids), 1))], 1
        )
        index = np.concatenate([np.arange(start, end) for start, end in split.computed(rank)])
        ids, positions = (
            np.concatenate([plan.token_ids, self._question])[index],
            positions[:, index],
        )
        if split.copies_question(rank):
            assert split.question_at is not None
            copy = np.arange(split.question_at, split.question_at + split.question_tokens)
            positions[:, copy] = copy  # where it stands, not where the question does
        return ids, positions

    def _on_frames(self, done: int, total: int, seconds: float) -> None:
        self._rank.tick()
        self.clock.set(Stage.DECODE, done, total, seconds)


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
        first, last = bounds.index(start), bounds.index(end)
        for patch in range(first, last, per_share):
            stop = min(last, patch + per_share)
            shares.append(Share((Piece(patch, stop, bounds[patch], bounds[stop]),)))
    return shares
