"""What a set of kept blocks does to attention, measured exactly on sampled query rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.quality.estimators import Tile


@dataclass(frozen=True, slots=True)
class Quality:
    """Per variant (set of kept blocks) and sampled row, [rows, variants], and error [variants].

    Attributes:
        plain: exact attention mass of the kept blocks and the local region.
        kept: 1 - total variation distance between the exact distribution and the one used.
        error: norm of the output's error over the norm of the exact output.
    """

    plain: Tensor
    kept: Tensor
    error: Tensor


class Sample:
    """Some rows of a tile, attended exactly; every variant is then a few sums over blocks."""

    def __init__(self, tile: Tile, rows: int) -> None:
        q = tile.q.flatten(0, 1)
        visible = tile.visible.expand(len(tile.q), -1, -1).flatten(0, 1)
        step = max(1, len(q) // rows)
        chosen = torch.arange(step // 2, len(q), step)
        q = q[chosen]
        visible = visible[chosen]
        scores = (q @ tile.k.flatten(0, 1).T).unflatten(-1, (-1, tile.block))
        local = (q @ tile.local_k.T).masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(torch.cat([scores.flatten(1), local], 1), 1)
        p = torch.exp(scores - lse[:, None, None])  # [rows, blocks, block]
        p_local = torch.exp(local - lse[:, None])
        self.block = tile.block
        self.sorted = p.sort(-1).values
        self.prefix = torch.nn.functional.pad(self.sorted.cumsum(-1), (1, 0))
        self.mass = p.sum(-1)  # [rows, blocks]
        self.local_mass = p_local.sum(-1, keepdim=True)
        self.out = torch.einsum("rjb,jbd->rjd", p, tile.v)
        self.local_out = p_local @ tile.local_v
        self.exact = self.out.sum(1) + self.local_out
        self.v_mean = tile.v.mean(1)
        logits = tile.summary_logits(q[None])[0]
        # exp overflows only where a summary is absurd; such a block is never better dropped.
        self.summary = torch.exp((logits - lse[:, None]).clamp(max=50))

    def drop(self, keep: Tensor) -> Quality:
        """Attention over the kept blocks [variants, blocks] and the local region alone."""
        kept = keep.to(self.mass.dtype)
        plain = self.mass @ kept.T + self.local_mass
        out = torch.einsum("rjd,vj->vrd", self.out, kept) + self.local_out
        return Quality(plain, plain, self._error(out / plain.T[..., None]))

    def compensate(self, keep: Tensor) -> Quality:
        """The dropped blocks stay as one key each: mean value, logit from the summary."""
        kept = keep.to(self.mass.dtype)
        plain = self.mass @ kept.T + self.local_mass
        total = plain + self.summary @ (1 - kept.T)  # [rows, variants], of the exact one
        out = torch.einsum("rjd,vj->vrd", self.out, kept) + self.local_out
        out += torch.einsum("rj,vj,jd->vrd", self.summary, 1 - kept, self.v_mean)
        # Overlap of a dropped block: its keys' shares p, against equal shares of the summary.
        equal = self.summary[..., None] / (self.block * total[:, None])  # [rows, blocks, variants]
        below = torch.searchsorted(self.sorted, equal)
        overlap = self.prefix.gather(-1, below) + equal * (self.block - below)
        overlap = (overlap * (1 - kept.T)).sum(1)
        overlap += plain * (1 / total).clamp(max=1)
        return Quality(plain, overlap, self._error(out / total.T[..., None]))

    def _error(self, out: Tensor) -> Tensor:
        """[variants, rows, head_dim] to [variants]."""
        errors: Tensor = (out - self.exact).flatten(1).norm(dim=1) / self.exact.norm()
        return errors


@dataclass(slots=True)
class Cell:
    """One (estimator, order, rule, compensation, density) over tiles: lists over tiles."""

    plain: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    estimated: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    blocks_kept: list[int] = field(default_factory=list)

    def extend(self, other: Cell) -> None:
        """Take in another input's tiles."""
        for name in self.__slots__:
            getattr(self, name).extend(getattr(other, name))

    def row(self) -> dict[str, float]:
        """Columns of the result."""
        kept = torch.cat(self.kept)
        return {
            "density": sum(self.blocks_kept) / sum(self.blocks),
            "kept_mass": float(kept.mean()),
            "kept_mass_p5": float(kept.quantile(0.05)),
            "block_mass": float(torch.cat(self.plain).mean()),
            "estimated_kept_mass": sum(self.estimated) / len(self.estimated),
            "output_error": sum(self.error) / len(self.error),
        }


Key = tuple[str, str, str, bool, float]
"""Estimator, order, rule, compensated, wanted density."""
