"""Needle videos prefilled at several qualities and asked the same questions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.fidelity.comparison import METHODS, comparison_kv
from benchmarks.quality.fidelity.rehearsal import Prefix, Rehearsal, rehearse
from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.settings import SparseSettings
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.baselines.methods import BaselineMethod, BaselineName, baseline_method
from tools.needle import checkpoint, sketches, stories, tower, videos
from tools.needle.stories import TASKS, Question, Story
from tools.needle.videos import PLAIN, Look

SURE = 1.0
"""Lead in nats from which an answer is no toss-up: 2.7 times as likely as the next one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to prefill: a step of the dial, ``epsilon=...`` or a published method; and ranks."""

    quality: str
    ranks: int = 1

    @property
    def published(self) -> BaselineName | None:
        """The published method, if it is one."""
        return BaselineName(self.quality) if self.quality in METHODS else None

    @property
    def policy(self) -> AttentionPolicy:
        """What a request of this quality gets."""
        if self.quality.startswith("epsilon="):
            return resolve_policy(epsilon=float(self.quality.removeprefix("epsilon=")))
        return resolve_policy(Quality(self.quality))


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one video under one setting.

    Attributes:
        setting: which.
        video: its seed.
        patches, tokens: of the video's prefix.
        tasks: [questions] index into ``TASKS``.
        right: [questions] whether the answer's first token is the true one.
        same: [questions] whether it is the exact prefill's, on as many ranks.
        sure: [questions] whether the exact prefill's leads by more than ``SURE``.
        density, certified: of the report; ``certified`` is None where nothing was sampled, both are
            for published methods, of which nothing is measured.
        true_mass: kept mass over all rows; None where it was not measured.
        floor_met: of the report; False where there is none.
    """

    setting: Setting
    video: int
    patches: int
    tokens: int
    tasks: list[int]
    right: list[bool]
    same: list[bool]
    sure: list[bool]
    density: float | None
    certified: float | None
    true_mass: float | None
    floor_met: bool


class Reader:
    """A needle checkpoint in this process: sees frames, prefills them, answers.

    Args:
        folder: the checkpoint.
        sparse_from: length in tokens from which attention may be sparse.
        chunk_tokens: per chunk and rank.
    """

    def __init__(self, folder: Path, sparse_from: int = 512, chunk_tokens: int = 512) -> None:
        self._sparse = SparseSettings(sparse_from)
        self._chunk_tokens = chunk_tokens
        self._model, self._tokenizer = checkpoint.load(folder)
        self._model.eval()
        opened = open_checkpoint(str(folder))
        self._prefill = PrefillModel(opened, torch.float32, torch.device("cpu"))

    @torch.no_grad()
    def prefix(self, frames: np.ndarray) -> Prefix:
        """Of a video's frames, [2 * patches, SIDE, SIDE, 3]."""
        pairs = torch.from_numpy(frames).view(-1, 2, *frames.shape[1:])
        with tower.batched(self._model):
            parts = [tower.features(self._model, part) for part in pairs.split(256)]
        merged, *deepstack = (torch.cat(found).flatten(0, 1) for found in zip(*parts, strict=True))
        plan = sketches.layout(self._tokenizer, np.arange(len(pairs)))
        ends = np.searchsorted(plan.patch, np.arange(len(pairs)), side="right")
        ends[-1] = len(plan.ids)
        return Prefix(
            token_ids=plan.ids.astype(np.int32),
            position_ids=plan.positions,
            patch_ends=ends,
            video_token_id=int(plan.ids[plan.vision][0]),
            features=VisionFeatures(merged, deepstack),
            patch_tokens=checkpoint.TOKENS_PER_PATCH,
        )

    def prefill(
        self,
        prefix: Prefix,
        setting: Setting,
        policy: AttentionPolicy | None = None,
        sparse: SparseSettings | None = None,
    ) -> Rehearsal:
        """KV and report."""
        return rehearse(
            self._prefill,
            prefix,
            policy or setting.policy,
            ranks=setting.ranks,
            chunk_tokens=self._chunk_tokens,
            settings=sparse or self._sparse,
        )

    @torch.no_grad()
    def answers(
        self, prefix: Prefix, kv: list[torch.Tensor], texts: Sequence[str]
    ) -> tuple[list[str], list[float]]:
        """First word of the answer to each question, alone behind the prefix, and its lead.

        The lead is the logarithm of how many times as likely the word is as the next one.
        """
        from transformers import DynamicCache

        turns = [self.turn(text) for text in texts]
        slot = max(map(len, turns))
        ids = torch.full((len(turns), slot), self._tokenizer.pad_token_id)
        for row, turn in zip(ids, turns, strict=True):
            row[: len(turn)] = torch.tensor(turn)
        cache = DynamicCache(config=self._model.config.text_config)
        for layer, (k, v) in enumerate(kv):
            cache.update(k[None], v[None], layer)
        tokens = len(prefix.token_ids)
        hidden = sketches.ask(
            self._model,
            cache,
            int(prefix.position_ids.max()) + 1,
            questions=ids.view(1, -1),
            slot=slot,
            log_weight=torch.zeros(1, tokens),
        )
        last = torch.tensor([index * slot + len(turn) - 1 for index, turn in enumerate(turns)])
        best = self._model.lm_head(hidden[0, last]).topk(2)
        words = [self._tokenizer.decode([token]) for token in best.indices[:, 0].tolist()]
        return words, (best.values[:, 0] - best.values[:, 1]).tolist()

    def turn(self, text: str) -> list[int]:
        """Tokens behind a prefix."""
        turn = f"{text}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = self._tokenizer.encode(turn, add_special_tokens=False)
        return ids

    def compare(
        self,
        frames: np.ndarray,
        questions: Sequence[Question],
        settings: Sequence[Setting],
        video: int,
        *,
        measure_truth: bool,
    ) -> list[Asked]:
        """Ask the same questions under every setting.

        Args:
            settings: with ``exact`` among them for every number of ranks.
            video: its seed.
            measure_truth: also certify every row, in passes of their own.
        """
        prefix = self.prefix(frames)
        texts = [question.text for question in questions]
        exact: dict[int, tuple[list[str], list[bool]]] = {}
        asked = []
        for setting in sorted(settings, key=lambda s: s.quality != Quality.EXACT):
            measured: tuple[float | None, float | None, float | None, bool]
            if setting.published:
                words = [self._published(prefix, setting, text) for text in texts]
                measured = (None, None, None, False)
            else:
                done = self.prefill(prefix, setting)
                words, leads = self.answers(prefix, done.kv, texts)
                masses = [layer.kept_mass for layer in done.report.layers]
                sampled = sum(mass.count for mass in masses)
                measured = (
                    done.report.density,
                    sum(mass.total for mass in masses) / sampled if sampled else None,
                    self._truth(prefix, setting) if measure_truth else None,
                    all(mass.mean(1.0) >= setting.policy.min_kept_mass for mass in masses),
                )
                if setting.quality == Quality.EXACT:
                    exact[setting.ranks] = words, [lead > SURE for lead in leads]
            density, certified, true_mass, floor_met = measured
            true, sure = exact[setting.ranks]
            asked.append(
                Asked(
                    setting=setting,
                    video=video,
                    patches=len(prefix.patch_ends),
                    tokens=len(prefix.token_ids),
                    tasks=[TASKS.index(question.task) for question in questions],
                    right=[w == q.answer for w, q in zip(words, questions, strict=True)],
                    same=[w == e for w, e in zip(words, true, strict=True)],
                    sure=sure,
                    density=density,
                    certified=certified,
                    true_mass=true_mass,
                    floor_met=floor_met,
                )
            )
        return asked

    def _published(self, prefix: Prefix, setting: Setting, text: str) -> str:
        """The answer after a published method's prefill, which has seen the question."""
        assert setting.published is not None
        method = baseline_method(setting.published, len(prefix.token_ids), setting.ranks)
        kv = self.published(prefix, method, setting.ranks, text)
        return self.answers(prefix, kv, [text])[0][0]

    def published(
        self, prefix: Prefix, method: BaselineMethod, ranks: int, text: str
    ) -> list[torch.Tensor]:
        """KV of a published method's prefill, made for one question."""
        return comparison_kv(
            self._prefill,
            prefix,
            method,
            ranks=ranks,
            question_ids=self.turn(text),
            chunk_tokens=self._chunk_tokens,
        )

    def _truth(self, prefix: Prefix, setting: Setting) -> float | None:
        """Kept mass over all rows that were sparse, without the floor."""
        if setting.policy.exact:
            return None
        # With a floor, knowing every row would have other heads computed again.
        policy = replace(setting.policy, min_kept_mass=0.0)
        every = replace(self._sparse, verify_every_row=True)
        report = self.prefill(prefix, setting, policy, every).report
        masses = [layer.kept_mass for layer in report.layers]
        rows = sum(mass.count for mass in masses)
        return sum(mass.total for mass in masses) / rows if rows else None


def filmed(story: Story, seed: int, look: Look = PLAIN) -> np.ndarray:
    """The story's frames after an mp4 round trip."""
    with tempfile.TemporaryDirectory() as folder:
        path = videos.write_mp4(Path(folder) / "story.mp4", story, seed, look=look)
        return videos.read_frames(path)


def fresh_video(patches: int, per_task: int, seed: int) -> tuple[np.ndarray, list[Question]]:
    """A seeded video in which two shapes may be counted, and different questions of it."""
    rng = np.random.default_rng((seed, patches))
    story = stories.sample_story(patches, rng)
    while patches >= stories.MIN_COUNTING and story.countable < 2:
        story = stories.sample_story(patches, rng)
    return filmed(story, seed), stories.distinct_questions(story, per_task, rng)
