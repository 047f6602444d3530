"""What both stages share: learning rate, parameter groups, progress, and state that resumes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAVE_EVERY_S = 120.0


def optimizer(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors and embeddings."""
    plain: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    for name, parameter in parameters:
        (plain if parameter.dim() < 2 or "embed" in name else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)


@dataclass(slots=True)
class Run:
    """Model, optimiser, random numbers and step of a stage, kept in a file while it runs.

    Attributes:
        path: the file; replaced atomically every two minutes and at the end.
        settings: what must not change between parts of one run.
        model: all its weights are saved.
        step: steps done.
    """

    path: Path
    settings: dict[str, Any]
    model: Any
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def resume(self) -> bool:
        """Go on where the file says, if there is one.

        Raises:
            ValueError: the file belongs to a run with other settings.
        """
        if not self.path.exists():
            return False
        saved = torch.load(self.path, map_location="cpu", weights_only=False)
        if saved["settings"] != self.settings:
            raise ValueError(
                f"{self.path} was trained with {saved['settings']}, not {self.settings}; "
                "name another --out, or remove it"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.bit_generator.state = saved["rng"]
        for name, tensor in self.extra.items():
            tensor.data.copy_(saved["extra"][name])
        self.step = saved["step"]
        return True

    def save(self, now: bool = False) -> None:
        """Write the file if it is due."""
        if not now and time.monotonic() - self._saved < SAVE_EVERY_S:
            return
        staging = self.path.with_suffix(".partial")
        torch.save(
            {
                "settings": self.settings,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": self.rng.bit_generator.state,
                "extra": {name: tensor.detach().cpu() for name, tensor in self.extra.items()},
                "step": self.step,
            },
            staging,
        )
        os.replace(staging, self.path)
        self._saved = time.monotonic()

    def update(self, loss: torch.Tensor, rate: float, clip: list[torch.nn.Parameter]) -> None:
        """One optimiser step with gradients clipped to norm 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip, 1.0)
        self.optimizer.step()
        self.step += 1
        self.save()


class Log:
    """Lines to the terminal and to a file, with seconds since the start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        """Write one line."""
        line = f"{time.monotonic() - self._start:7.0f} s  {line}"
        print(line, flush=True)
        self._file.write(line + "\n")
