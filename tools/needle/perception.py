"""Stage 1: the vision tower learns to say what a temporal patch shows.

Every visual token must pick its patch's shape and colour among the embeddings of these words
(and, more lightly, every deepstack token must): captions of frames, as in CLIP. So the language
model finds features that speak its embeddings from its first step on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tools.needle.checkpoint import TOKENS_PER_PATCH, word_ids
from tools.needle.stories import COLORS, SHAPES
from tools.needle.tower import NOTHING, batched, clips, features
from tools.needle.training import Log, Run, learning_rate, optimizer

_SHARPNESS = 8.0
_DEEPSTACK_WEIGHT = 0.3
_TRAIN_SEED = 1_000
_VALIDATION_SEED = 900_000
_VALIDATION_CLIPS = 12
_REPORT_EVERY = 100


@dataclass(frozen=True, slots=True)
class PerceptionSettings:
    """Options of the stage."""

    steps: int = 2600
    batch: int = 128
    clips: int = 500
    rate: float = 2e-3
    warm_up: int = 100
    seed: int = 0


class _Words:
    """Loss and accuracy of features against the words that name what a patch shows."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        embeddings = model.get_input_embeddings().weight.detach()
        vocabularies = (SHAPES, tuple(COLORS))
        self._words = [embeddings[word_ids(tokenizer, words)].to(device) for words in vocabularies]
        kinds = 1 + len(model.config.vision_config.deepstack_visual_indexes)
        self.nothing = torch.nn.Parameter(torch.full((kinds, len(self._words)), 3.0, device=device))

    def __call__(self, found: list[Tensor], labels: Tensor) -> tuple[Tensor, list[float]]:
        """Loss, and the share of merged tokens with the right shape and colour.

        Args:
            found: of ``tower.features``.
            labels: [patches].
        """
        none = labels == NOTHING
        targets = (
            torch.where(none, len(SHAPES), labels // len(COLORS)),
            torch.where(none, len(COLORS), labels % len(COLORS)),
        )
        loss = torch.zeros((), device=labels.device)
        right: list[float] = []
        for kind, feature in enumerate(found):
            weight = 1.0 if kind == 0 else _DEEPSTACK_WEIGHT
            for index, (words, target) in enumerate(zip(self._words, targets, strict=True)):
                absent = self.nothing[kind, index].expand(*feature.shape[:2], 1)
                logits = torch.cat([_SHARPNESS * feature @ words.T, absent], -1)
                each = target.repeat_interleave(TOKENS_PER_PATCH)
                loss = loss + weight * cross_entropy(logits.flatten(0, 1), each)
                if kind == 0:
                    right.append((logits.argmax(-1) == target[:, None]).float().mean().item())
        size = sum((f.square().sum(-1).mean() for f in found), torch.zeros(()).to(loss))
        return loss + 1e-3 * size, right


def train(
    model: Any,
    tokenizer: Any,
    settings: PerceptionSettings,
    *,
    out: Path,
    workers: int,
    log: Log,
) -> None:
    """Train ``model.model.visual`` in place; resumes from ``out / "perception.pt"``."""
    device = next(model.parameters()).device
    words = _Words(model, tokenizer, device)
    named = list(model.model.visual.named_parameters())
    run = Run(
        path=out / "perception.pt",
        settings=asdict(settings),
        model=model,
        optimizer=optimizer([*named, ("nothing.embed", words.nothing)]),
        rng=np.random.default_rng(settings.seed),
        extra={"nothing": words.nothing},
    )
    run.resume()
    if run.step >= settings.steps:
        log(f"perception: {run.step} steps were done before")
        return
    frames, labels = clips(settings.clips, _TRAIN_SEED, workers)
    held_out, held_labels = clips(_VALIDATION_CLIPS, _VALIDATION_SEED, workers)
    log(f"perception: {len(frames)} temporal patches rendered; step {run.step}")
    with batched(model):
        while run.step < settings.steps:
            chosen = torch.from_numpy(run.rng.integers(0, len(frames), settings.batch))
            found = features(model, frames[chosen].to(device))
            loss, _ = words(found, labels[chosen].to(device))
            rate = learning_rate(run.step, settings.steps, settings.rate, settings.warm_up)
            run.update(loss, rate, [p for _, p in named])
            if run.step % _REPORT_EVERY == 0 or run.step == settings.steps:
                with torch.no_grad():
                    checked, right = words(
                        features(model, held_out.to(device)), held_labels.to(device)
                    )
                log(
                    f"perception step {run.step} loss {loss.item():.3f} held out "
                    f"{checked.item():.3f}: shape {right[0]:.4f} color {right[1]:.4f}"
                )
    run.save(now=True)
