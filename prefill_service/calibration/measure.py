"""What budgets do to a set of videos: density and kept mass per head, deviation per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from prefill_service.attention.head_budgets import HeadBudgets
from prefill_service.attention.quality import AttentionPolicy, Quality
from prefill_service.attention.settings import SparseSettings
from prefill_service.calibration.encoded_video import EncodedVideo
from prefill_service.calibration.local_prefill import LocalPrefill
from prefill_service.models.prefill_model import PrefillModel


@dataclass(frozen=True, slots=True)
class Measured:
    """What some budgets did to all videos together.

    Attributes:
        density: [layers, kv_heads] attended over causal keys.
        kept_mass: [layers, kv_heads] mean over the verified rows, of the KV head's worst query
            head: the floor, too, is held by each of them.
    """

    density: np.ndarray
    kept_mass: np.ndarray

    @property
    def total(self) -> float:
        """Sum of the densities: all heads have equally many causal keys."""
        return float(self.density.sum())

    @property
    def worst(self) -> float:
        """The worst head's kept mass."""
        return float(self.kept_mass.min())


class Bench:
    """Prefills the same videos under different budgets, without a floor, which would hide them.

    Args:
        settings: sizes, and how many rows are verified.
        step: called with what is being measured, before each prefill.
    """

    def __init__(
        self,
        model: PrefillModel,
        videos: Sequence[EncodedVideo],
        settings: SparseSettings,
        step: Callable[[str], None],
    ) -> None:
        self._model = model
        self._videos = videos
        self._settings = settings
        self._step = step
        checkpoint = model.checkpoint
        self.shape = (checkpoint.shape.attending_layers, checkpoint.shape.kv_heads)

    def measure(self, epsilons: np.ndarray, label: str) -> Measured:
        """Prefill all videos with an epsilon per head, [layers, kv_heads]."""
        policy = self._policy(epsilons)
        layers = self.shape[0]
        attended = np.zeros(self.shape)
        causal = np.zeros(layers)
        mass = np.zeros((layers, self._model.shape.q_heads))
        rows = np.zeros(layers)
        for video in self._videos:
            self._step(f"{label}: {video.name}")
            reports = LocalPrefill(self._model, video, self._settings, policy).run()
            for report in reports:
                attended[report.layer] += report.attended
                causal[report.layer] += report.causal
                mass[report.layer] += report.head_mass
                rows[report.layer] += report.kept_mass.count / self._model.shape.q_heads
        heads = mass.reshape(*self.shape, -1) / rows[:, None, None]  # [layers, kv_heads, group]
        return Measured(attended / causal[:, None], heads.min(-1))

    def uniform(self, epsilon: float) -> np.ndarray:
        """[layers, kv_heads] of one epsilon."""
        return np.full(self.shape, epsilon)

    def sensitivity(self, epsilon: float) -> np.ndarray:
        """[layers] what approximating one layer alone does to the KV of the whole prefix.

        Sync-Point Drop ranks layers by what dropping a synchronisation of one of them costs
        (SPD, arXiv 2502.20727); here it is one layer's attention that is approximated. All that a
        prefix hands on is its KV, so the cost is the KV's relative error, mean over all layers
        (those before the approximated one have none) and videos.
        """
        few = replace(self._settings, verified_rows=0)  # kept mass is not read
        policy = self._policy(self.uniform(epsilon))
        deviation = np.zeros(self.shape[0])
        for video in self._videos:
            self._step(f"sensitivity, exact: {video.name}")
            exact = self._pages(video, few, AttentionPolicy(Quality.EXACT, 0.0, 0.0), None)
            for layer in range(self.shape[0]):
                self._step(f"sensitivity, layer {layer}: {video.name}")
                pages = self._pages(video, few, policy, layer)
                errors = [
                    float((a - b).double().norm() / b.double().norm())
                    for a, b in zip(pages, exact, strict=True)
                ]
                deviation[layer] += np.mean(errors) / len(self._videos)
        return deviation

    def _pages(
        self,
        video: EncodedVideo,
        settings: SparseSettings,
        policy: AttentionPolicy,
        only: int | None,
    ) -> list[Tensor]:
        """The prefix's keys and values per layer, with one layer alone approximated, or all."""
        prefill = LocalPrefill(self._model, video, settings, policy, only=only, keep=True)
        prefill.run()
        return prefill.pages

    def _policy(self, epsilons: np.ndarray) -> AttentionPolicy:
        largest = float(epsilons.max())
        rows = tuple(tuple(row) for row in epsilons.tolist())
        budgets = HeadBudgets(
            model_fingerprint=self._model.checkpoint.fingerprint,
            epsilon=largest,
            head_epsilons=rows,
        )
        return AttentionPolicy(Quality.CUSTOM, largest, 0.0, budgets)
