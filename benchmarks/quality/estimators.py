"""Block estimators and key orders of the literature and ours, in plain torch.

Deliberately independent of the product's code, so that the comparison also checks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import AttentionInput

ORDERS = ("raster", "grid", "clustered")


def segment_order(keys: Tensor, place: Tensor, order: str, block: int) -> Tensor:
    """[segment] permutation of one segment's ``keys`` [segment, head_dim].

    ``grid`` brings the same place of consecutive frames together (MMInference, arXiv 2504.16083);
    ``clustered`` halves along the principal direction of the keys, down to blocks.
    """
    if order == "raster":
        return torch.arange(len(keys))
    if order == "grid":
        return place.argsort(stable=True)
    return _halve(torch.arange(len(keys)), keys, block)


def _halve(index: Tensor, keys: Tensor, block: int) -> Tensor:
    if len(keys) <= block:
        return index
    centred = keys - keys.mean(0)
    direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    rank = (centred @ direction).argsort()
    left, right = rank.tensor_split(2)
    return torch.cat(
        [_halve(index[left], keys[left], block), _halve(index[right], keys[right], block)]
    )


def lift(variance: Tensor, block: int) -> Tensor:
    """Log-mean-exp of ``block`` normal scores over their mean (random energy model).

    Beyond the point where the largest of them rules (its location by extreme value theory) growth
    is linear in the standard deviation.
    """
    first = math.sqrt(2 * math.log(block))
    edge = first - (math.log(math.log(block)) + math.log(4 * math.pi)) / (2 * first)
    return torch.where(variance <= edge**2, variance / 2, edge * variance.sqrt() - edge**2 / 2)


@dataclass(frozen=True, slots=True)
class Tile:
    """One query tile of one KV head and the keys before it.

    Attributes:
        q: [group, tokens, head_dim], times the scale.
        k, v: [blocks, block, head_dim], the candidates, as ordered.
        local_k, local_v: [local, head_dim], from the first key after the candidates on.
        visible: [tokens, local] bool, the causal mask there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    local_k: Tensor
    local_v: Tensor
    visible: Tensor

    @property
    def block(self) -> int:
        return self.k.shape[1]

    def local_scores(self, q: Tensor) -> Tensor:
        """[group, tokens, local], -inf where masked."""
        return (q @ self.local_k.T).masked_fill(~self.visible, -torch.inf)

    def spread(self) -> Tensor:
        """[blocks] variance of a block's scores, with the tile's mean squared query."""
        return self.k.var(1, unbiased=False) @ self.q.square().mean((0, 1))

    def summary_logits(self, q: Tensor) -> Tensor:
        """[..., blocks] log-mass of each block for queries [..., head_dim], by summaries."""
        bias = math.log(self.block) + lift(self.spread(), self.block)
        return q @ self.k.mean(1).T + bias


def cut(
    source: AttentionInput, head: int, start: int, *, tile: int, block: int, order: Tensor
) -> Tile:
    """The tile of KV head ``head`` whose first query is ``start``.

    Args:
        order: [past], permutation of the keys of the segments that end at or before ``start``.
    """
    group = len(source.q) // len(source.k)
    end = min(start + tile, source.q.shape[1])
    past = start // block * block
    index = torch.cat([order, torch.arange(len(order), past)])
    k = source.k[head]
    v = source.v[head]
    return Tile(
        q=source.q[head * group : (head + 1) * group, start:end] * source.scale,
        k=k[index].unflatten(0, (-1, block)),
        v=v[index].unflatten(0, (-1, block)),
        local_k=k[past:end],
        local_v=v[past:end],
        visible=torch.arange(past, end) <= torch.arange(start, end)[:, None],
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator says of a tile's blocks, as shares of the tile's attention.

    Attributes:
        score: [blocks], what is to be kept first; for rules that add up, the loss without it.
        mass: [blocks].
    """

    score: Tensor
    mass: Tensor


def _shares(candidates: Tensor, local: Tensor) -> Estimate:
    """From log-masses [..., blocks] and the log-mass of the local region [...]."""
    total = torch.logsumexp(torch.cat([candidates, local[..., None]], -1), -1, keepdim=True)
    mass = torch.exp(candidates - total).flatten(0, -2).mean(0)
    return Estimate(mass, mass)


def pooled_pooled(tile: Tile) -> Estimate:
    """Mean query of the tile and mean key of the block (SeerAttention's and Sparge's input)."""
    q = tile.q.mean(1)  # [group, head_dim]
    local = torch.logsumexp(q @ tile.local_k.T, -1)
    return _shares(q @ tile.k.mean(1).T + math.log(tile.block), local)


def queries_pooled(tile: Tile) -> Estimate:
    """Every query and the block's mean key (FlashPrefill)."""
    local = torch.logsumexp(tile.local_scores(tile.q), -1)
    return _shares(tile.q @ tile.k.mean(1).T + math.log(tile.block), local)


def pooled_keys(tile: Tile) -> Estimate:
    """Mean query of the tile and every key (VecAttention)."""
    q = tile.q.mean(1)
    scores = (q @ tile.k.flatten(0, 1).T).unflatten(-1, (-1, tile.block))
    return _shares(torch.logsumexp(scores, -1), torch.logsumexp(q @ tile.local_k.T, -1))


def antidiagonal(tile: Tile, stride: int) -> Estimate:
    """Sums along antidiagonals of squares of ``stride`` keys (XAttention, arXiv 2503.16428)."""
    q = tile.q.unflatten(1, (-1, stride)).flip(2).flatten(2)  # [group, tokens / S, S * head_dim]
    keys = torch.cat([tile.k.flatten(0, 1), tile.local_k])
    scores = q @ keys.unflatten(0, (-1, stride)).flatten(1).T / stride
    past = len(tile.k) * tile.block // stride
    seen = tile.visible[stride - 1 :: stride, ::stride]  # any key of the square is visible
    local = scores[..., past:].masked_fill(~seen, -torch.inf)
    blocks = scores[..., :past].unflatten(-1, (-1, tile.block // stride))
    return _shares(torch.logsumexp(blocks, -1), torch.logsumexp(local, -1))


def bound(tile: Tile) -> Estimate:
    """Upper bound of any score from the block's per-channel minimum and maximum (Quest)."""
    high = tile.q.clamp(min=0) @ tile.k.amax(1).T
    low = tile.q.clamp(max=0) @ tile.k.amin(1).T
    return _shares(high + low, torch.logsumexp(tile.local_scores(tile.q), -1))


def mean_variance(tile: Tile) -> Estimate:
    """Every query, the block's mean key and the spread of its keys; ranked by mass."""
    local = torch.logsumexp(tile.local_scores(tile.q), -1)
    return _shares(tile.summary_logits(tile.q), local)


def mean_variance_loss(tile: Tile) -> Estimate:
    """The same, ranked by what is lost if the block's summary stands in for it: ours."""
    local = torch.logsumexp(tile.local_scores(tile.q), -1)
    logits = tile.summary_logits(tile.q)
    total = torch.logsumexp(torch.cat([logits, local[..., None]], -1), -1)  # [group, tokens]
    mass = torch.exp(logits - total[..., None]).mean((0, 1))
    misplaced = torch.sqrt(1 - torch.exp(-tile.spread() / (2 * math.pi)))
    # The key farthest from the mean, seen by means of 16 queries: an outlier guard.
    pooled = torch.stack([part.mean(1) for part in tile.q.split(16, 1)], 1)
    total16 = torch.stack([part.mean(1) for part in total.split(16, 1)], 1)
    distance = (tile.k - tile.k.mean(1, keepdim=True)).square().sum(-1)
    far = tile.k[torch.arange(len(tile.k)), distance.argmax(1)]
    guard = torch.exp((pooled @ far.T - total16[..., None]).clamp(max=0)).mean((0, 1))
    return Estimate(mass * misplaced + guard, mass)


def oracle(tile: Tile) -> Estimate:
    """The true mass of each block."""
    scores = (tile.q @ tile.k.flatten(0, 1).T).unflatten(-1, (-1, tile.block))
    return _shares(torch.logsumexp(scores, -1), torch.logsumexp(tile.local_scores(tile.q), -1))


@dataclass(frozen=True, slots=True)
class Estimator:
    """An estimator and its multiplications relative to those of QK^T over the same keys.

    ``cost(tile, block, group)`` counts what grows with the number of keys that a tile sees.
    """

    estimate: Callable[[Tile], Estimate]
    cost: Callable[[int, int, int], float]


OURS = "queries x (mean + variance), loss"
ORACLE = "oracle (true mass)"
ESTIMATORS = {
    "pooled q x pooled k": Estimator(pooled_pooled, lambda tile, block, group: 1 / (tile * block)),
    "queries x pooled k": Estimator(queries_pooled, lambda tile, block, group: 1 / block),
    "pooled q x keys": Estimator(pooled_keys, lambda tile, block, group: 1 / tile),
    "antidiagonal S=8": Estimator(
        lambda tile: antidiagonal(tile, 8), lambda tile, block, group: 1 / 8
    ),
    "antidiagonal S=16": Estimator(
        lambda tile: antidiagonal(tile, 16), lambda tile, block, group: 1 / 16
    ),
    "queries x min/max bound": Estimator(bound, lambda tile, block, group: 2 / block),
    "queries x (mean + variance), mass": Estimator(
        mean_variance, lambda tile, block, group: (1 + 1 / (tile * group)) / block
    ),
    OURS: Estimator(
        mean_variance_loss, lambda tile, block, group: (1 + 1 / (tile * group) + 1 / 16) / block
    ),
    ORACLE: Estimator(oracle, lambda tile, block, group: 1.0),
}
