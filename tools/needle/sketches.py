"""Videos for the language model: rendered patches' features, and sketches of long videos.

A *sketch* of a video of N seconds renders only some of its patches, in runs of neighbours. The
background patches among them stand for the w seconds between the runs that were left out: their
tokens count w-fold in attention, by ln w added to their scores, and positions and timestamps are
those of the whole video. To a query, w tokens that are alike are one token of weight w. So the
language model learns to find needles among 8,000 tokens for the price of 1,000, which is
quadratically less. It is no substitute for length itself: real backgrounds differ from each other,
and their extremes grow with their number; the last steps of training need some whole videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.needle.checkpoint import GRID, MERGE
from tools.needle.stories import (
    COLORS,
    SHAPES,
    TASKS,
    Needle,
    Question,
    Story,
    order_question,
    sample_questions,
    sample_story,
)
from tools.needle.tower import NOTHING


@dataclass(frozen=True, slots=True)
class Layout:
    """Tokens of ``<|im_start|>user`` and a video, as the processor writes them.

    Attributes:
        ids: [tokens].
        positions: [3, tokens], M-RoPE.
        vision: [tokens] bool, video tokens.
        patch: [tokens], index of the temporal patch a token (timestamp included) belongs to, -1
            for the text before the first.
        next: position after the last token.
    """

    ids: np.ndarray
    positions: np.ndarray
    vision: np.ndarray
    patch: np.ndarray
    next: int


def layout(tokenizer: Any, seconds: np.ndarray) -> Layout:
    """Of a video whose temporal patches are those of the given seconds, ascending."""
    ids: list[int] = []
    positions: list[tuple[int, int, int]] = []
    patch: list[int] = []
    at = 0
    current = -1
    side = GRID // MERGE
    special = tokenizer.convert_tokens_to_ids
    start, end, pad = special(["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"])

    def text(tokens: list[int]) -> None:
        nonlocal at
        for token in tokens:
            ids.append(token)
            positions.append((at, at, at))
            patch.append(current)
            at += 1

    text([*tokenizer.encode("<|im_start|>user\n", add_special_tokens=False), start])
    for current, second in enumerate(seconds.tolist()):  # read by text()
        stamp = f"<{second + 0.25:.1f} seconds>"  # mean of its two frames' times
        text([*tokenizer.encode(stamp, add_special_tokens=False), start])
        for row in range(side):
            for column in range(side):
                ids.append(pad)
                positions.append((at, at + row, at + column))
                patch.append(current)
        at += side
        text([end])
    text([end])
    found = np.array(ids)
    return Layout(
        ids=found,
        positions=np.array(positions).T.copy(),
        vision=found == pad,
        patch=np.array(patch),
        next=at,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Videos of equal layout with their questions.

    Attributes:
        layout: of all videos.
        features: [videos, patches, tokens, 1 + deepstack, hidden].
        weights: [videos, layout tokens], how many tokens each stands for.
        questions: [videos, questions * slot] ids, each question in a slot of its own.
        slot: tokens of a slot.
        video, answer_at, answer, task: [answers]; where each answer is predicted (flat position
            in its video's questions), its id, and its task's index.
    """

    layout: Layout
    features: Tensor
    weights: Tensor
    questions: Tensor
    slot: int
    video: Tensor
    answer_at: Tensor
    answer: Tensor
    task: Tensor


class Batches:
    """Makes batches from a bank of patch features.

    Args:
        tokenizer: the model's.
        bank: [patches, tokens, 1 + deepstack, hidden].
        labels: [patches], see ``tower.NOTHING``.
        device: of the batches.
    """

    def __init__(self, tokenizer: Any, bank: Tensor, labels: Tensor, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._bank = bank
        self._device = device
        numbers = labels.numpy()
        self._members = [np.nonzero(numbers == label)[0] for label in range(NOTHING + 1)]
        empty = [label for label, members in enumerate(self._members) if not len(members)]
        if empty:
            raise ValueError(f"no patch shows label {empty[0]}: render more clips")
        self._encoded: dict[tuple[str, str], list[int]] = {}
        one = Needle("star", "red", (0,))
        self._slot = len(self._encode(order_question(one, one))) - 1  # no question is longer

    def make(
        self,
        seconds: int,
        rendered: int,
        *,
        videos: int,
        questions: int,
        rng: np.random.Generator,
        weights: tuple[float, ...],
    ) -> Batch:
        """Videos of ``seconds``, of which ``rendered`` patches exist; equal: no sketch.

        Args:
            questions: per video.
            weights: of ``TASKS``.
        """
        chosen, left_out = _choose(seconds, rendered, rng)
        plan = layout(self._tokenizer, chosen)
        sources = np.empty((videos, rendered), np.int64)
        counts = np.ones((videos, rendered))
        ids = np.full((videos, questions, self._slot), self._tokenizer.pad_token_id)
        answers = []
        for video in range(videos):
            story = sample_story(rendered, rng)
            empty = self._fill(sources[video], story, rng)
            # Needles stand for nothing but themselves: their share goes to the background.
            bearing = left_out * empty
            counts[video] += bearing * (left_out.sum() / max(bearing.sum(), 1e-9))
            for slot, question in enumerate(sample_questions(story, questions, rng, weights)):
                tokens = self._encode(question)
                ids[video, slot, : len(tokens) - 1] = tokens[:-1]
                at = slot * self._slot + len(tokens) - 3  # the token before the answer
                answers.append((video, at, tokens[-2], TASKS.index(question.task)))
        patch = plan.patch
        per_token = np.where(patch >= 0, counts[:, np.maximum(patch, 0)], 1.0)
        columns = torch.tensor(answers, device=self._device).T
        return Batch(
            layout=plan,
            features=self._bank[torch.from_numpy(sources)].to(self._device).float(),
            weights=torch.from_numpy(per_token).float().to(self._device),
            questions=torch.from_numpy(ids).view(videos, -1).to(self._device),
            slot=self._slot,
            video=columns[0],
            answer_at=columns[1],
            answer=columns[2],
            task=columns[3],
        )

    def _fill(self, sources: np.ndarray, story: Story, rng: np.random.Generator) -> np.ndarray:
        """Choose a rendered patch for each of the story's; [patches] bool, which are background."""
        empty = np.ones(len(sources), bool)
        sources[:] = rng.choice(self._members[NOTHING], len(sources))
        colors = list(COLORS)
        for needle in story.needles:
            label = SHAPES.index(needle.shape) * len(COLORS) + colors.index(needle.color)
            at = list(needle.patches)
            sources[at] = rng.choice(self._members[label], len(at))
            empty[at] = False
        return empty

    def _encode(self, question: Question) -> list[int]:
        """The turn's tokens from the question on: ..., the answer, the end of turn."""
        key = (question.text, question.answer)
        if key not in self._encoded:
            turn = f"{question.text}<|im_end|>\n<|im_start|>assistant\n"
            self._encoded[key] = [
                token
                for part in (turn, question.answer, "<|im_end|>")
                for token in self._tokenizer.encode(part, add_special_tokens=False)
            ]
        return self._encoded[key]


def _choose(seconds: int, rendered: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which seconds a sketch renders, ascending, and how many more each stands for.

    Runs of neighbours have 1 to 16 patches. What lies between two runs is borne by the last patch
    of the first, or by all of its patches alike: a model that has seen both relies on neither.
    """
    if rendered == seconds:
        return np.arange(seconds), np.zeros(seconds)
    length = int(rng.choice([1, 2, 4, 8, 16]))
    sizes = np.full(-(-rendered // length), length)
    sizes[-1] -= sizes.sum() - rendered
    # Gaps before each run and after the last share the seconds that are left out.
    cuts = np.sort(rng.integers(0, seconds - rendered + 1, len(sizes)))
    gaps = np.diff(cuts, append=seconds - rendered)
    starts = cuts + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = np.concatenate([start + np.arange(n) for start, n in zip(starts, sizes, strict=True)])
    gaps[0] += cuts[0]
    evenly = rng.random() < 0.5
    bearing = [
        np.full(n, gap / n) if evenly else np.append(np.zeros(n - 1), gap)
        for n, gap in zip(sizes, gaps, strict=True)
    ]
    return chosen, np.concatenate(bearing)


def predict(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of each answer and of what follows it, [answers, vocabulary].

    A video is read once; its questions stand behind it side by side (``ask``).
    """
    log_weight = batch.weights.log()
    cache = _read(model, batch, log_weight)
    hidden = ask(
        model,
        cache,
        batch.layout.next,
        questions=batch.questions,
        slot=batch.slot,
        log_weight=log_weight,
    )
    at = hidden[batch.video, batch.answer_at], hidden[batch.video, batch.answer_at + 1]
    return model.lm_head(at[0]), model.lm_head(at[1])


def _read(model: Any, batch: Batch, log_weight: Tensor) -> Any:
    """The videos' KV, as a transformers cache."""
    from transformers import DynamicCache

    plan = batch.layout
    videos = len(batch.features)
    device = batch.questions.device
    tokens = len(plan.ids)
    vision = torch.from_numpy(plan.vision).to(device)
    ids = torch.from_numpy(plan.ids).to(device)
    embeds = model.get_input_embeddings()(ids)[None].repeat(videos, 1, 1)
    embeds[:, vision] = batch.features[:, :, :, 0].flatten(1, 2)
    mask = None
    if log_weight.any():  # a sketch
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
        mask = log_weight[:, None, None, :].expand(-1, 1, tokens, -1)
        mask = mask.masked_fill(future, -torch.inf)
    cache = DynamicCache(config=model.config.text_config)
    model.model.language_model(
        inputs_embeds=embeds,
        position_ids=torch.from_numpy(plan.positions).to(device)[:, None].expand(-1, videos, -1),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        visual_pos_masks=vision[None].expand(videos, -1),
        deepstack_visual_embeds=[
            batch.features[:, :, :, 1 + layer].flatten(0, 2)
            for layer in range(batch.features.shape[3] - 1)
        ],
    )
    return cache


def ask(
    model: Any, cache: Any, position: int, *, questions: Tensor, slot: int, log_weight: Tensor
) -> Tensor:
    """Hidden states of questions behind a prefix, [videos, questions * slot, hidden].

    Each question has the positions that it would have alone, and sees the prefix and itself.

    Args:
        cache: of the prefix; grows by the questions.
        position: the first one after the prefix.
        questions: [videos, questions * slot] ids.
        log_weight: [videos, prefix tokens] added to the scores.
    """
    videos, asked = questions.shape
    index = torch.arange(asked, device=questions.device)
    own = (index[:, None] // slot == index // slot) & (index[:, None] >= index)
    behind = torch.zeros(asked, asked, device=questions.device).masked_fill(~own, -torch.inf)
    mask = torch.cat(
        [log_weight[:, None, :].expand(-1, asked, -1), behind.expand(videos, -1, -1)], -1
    )[:, None]
    states: Tensor = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(questions),
        position_ids=(position + index % slot).expand(3, videos, -1),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states
