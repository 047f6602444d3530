"""The certificate over ranks: sampled query rows go to where the keys are.

Same definition as ``attention.certificate``: exact attention of a few rows, and of it what the
approximation kept, ``sum_i min(p_i, p~_i)``. Every home attends to its own keys and returns output
and log-sum-exp; their merge is the exact attention. With the whole log-sum-exp every home then
adds up what was kept of its keys. Nothing of a key travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.attention_shape import AttentionShape
from prefill_service.attention.dense import Partial, merge
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.verification import Verification, finite_rows
from prefill_service.parallel.exchanges.demand.rpc import Ask, Header


class VerificationRequest:
    """The side that asks: some rows of a sparse result, to be compared with exact attention.

    Args:
        problem: what was asked, of some KV heads.
        result: what is to be verified.
        sampled: [samples] which queries.
        known: per rank, the blocks at home there.
    """

    def __init__(
        self, problem: SparseProblem, result: SparseResult, sampled: Tensor, known: list[np.ndarray]
    ) -> None:
        work = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
        rows = sampled.to(problem.q.device)
        self._q = problem.q[:, rows].to(work)  # [q_heads, samples, head_dim]
        self._out, self._lse = result.out[:, rows].to(work), result.lse[:, rows].to(work)
        self._problem = problem
        self._result = result
        self._sampled = sampled
        self._position = rows + problem.tiles.q_offset
        self._known = [torch.from_numpy(ids) for ids in known]
        self._exact: Partial | None = None

    def rows(self) -> Tensor:
        """The request for attention: queries and their positions."""
        return torch.cat([self._q.flatten(), self._position.to(self._q.dtype)])

    def attention_room(self) -> Tensor:
        """Room for a home's output and log-sum-exp."""
        q_heads, samples, head_dim = self._q.shape
        return self._q.new_empty(q_heads * samples * (head_dim + 1))

    def merge(self, replies: Mapping[int, Tensor]) -> None:
        """Exact attention from that of all homes."""
        q_heads, samples, _ = self._q.shape
        parts = []
        for reply in replies.values():
            out, lse = torch.split(reply, [self._q.numel(), q_heads * samples])
            parts.append(Partial(out.view(self._q.shape), lse.view(q_heads, samples)))
        self._exact = merge(parts)

    def beliefs(self, rank: int) -> Tensor:
        """The request for kept mass: what was made of a home's blocks, and both log-sum-exps.

        The logit added to a block's summary, infinite where its tokens were attended.
        """
        assert self._exact is not None, "kept mass is relative to exact attention"
        tiles, ids = self._problem.tiles, self._known[rank]
        tile = self._sampled // tiles.tile_tokens
        seen = torch.tensor([tiles.candidates(i) for i in tile.tolist()])
        local = ids >= seen[:, None]  # [samples, blocks]
        bias = self._lse.new_full((len(self._result.keep), *local.shape), torch.inf)
        within = ids < tiles.blocks
        found = self._result.bias[:, tile.to(self._q.device)][..., ids[within].to(self._q.device)]
        kept = self._result.keep[:, tile.to(self._q.device)][..., ids[within].to(self._q.device)]
        whole = kept | local[:, within].to(kept.device)
        bias[..., within] = found.to(bias.dtype).masked_fill(whole, torch.inf)
        return torch.cat([bias.flatten(), self._exact.lse.flatten(), self._lse.flatten()])

    def kept_room(self) -> Tensor:
        """Room for what a home's keys kept."""
        return self._lse.new_empty(self._lse.numel())

    def certificate(self, kept: Mapping[int, Tensor]) -> Verification:
        """The measurements, from all homes' kept mass."""
        assert self._exact is not None, "certificate() comes after merge()"
        mass = torch.stack(list(kept.values())).sum(0).view_as(self._lse)
        exact = self._exact.out
        error = (self._out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
        sound = finite_rows(self._out) & self._lse.isfinite() & error.isfinite() & mass.isfinite()
        mass, error = torch.where(sound, mass, 0.0), torch.where(sound, error, 1.0)
        heads = len(self._problem.heads)
        shape = (heads, -1, len(self._sampled))
        return Verification(
            kept_mass=mass.view(shape),
            output_error=error.view(shape),
            weighted=mass.new_empty(heads, 0),
        )


@dataclass(slots=True)
class VerificationServer:
    """The side that answers: what a home's keys say of other ranks' rows.

    Attributes:
        shape: of the model's attention.
    """

    shape: AttentionShape
    _seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def request_size(self, header: Header, blocks: int) -> int:
        """Values of a request about ``blocks`` blocks of this home."""
        kv_heads = header.heads.bit_count()
        rows = kv_heads * self._group * header.samples
        if header.ask is Ask.ATTENTION:
            return rows * self.shape.head_dim + header.samples
        return kv_heads * header.samples * blocks + 2 * rows

    def attention(
        self, rank: int, header: Header, request: Tensor, kv: Tensor, position: Tensor
    ) -> Tensor:
        """Exact attention of a rank's rows over this home's keys.

        Args:
            request: ``VerificationRequest.rows``.
            kv: [keys, 2, kv_heads, head_dim].
            position: [keys], or any position before the rows for keys that are out of order.

        Returns:
            Output [q_heads, samples, head_dim] and log-sum-exp [q_heads, samples], flat.
        """
        kv_heads, samples, head_dim = header.heads.bit_count(), header.samples, self.shape.head_dim
        queries, of_row = torch.split(request, [len(request) - samples, samples])
        q = queries.view(kv_heads, self._group * samples, head_dim) * self.shape.scale
        k, v = kv[:, :, self._heads(header)].to(q.dtype).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2)  # [kv_heads, group * samples, keys]
        hidden = position.to(of_row.dtype) > of_row[:, None]  # [samples, keys]
        scores.masked_fill_(hidden.repeat(self._group, 1), -torch.inf)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        self._seen[rank] = q, scores
        return torch.cat([(p @ v).flatten(), lse.flatten()])

    def kept_mass(
        self,
        rank: int,
        header: Header,
        request: Tensor,
        k_mean: Tensor,
        orders: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """What was kept of the rows of the ``attention`` before, over this home's keys.

        Args:
            request: ``VerificationRequest.beliefs``.
            k_mean: [kv_heads, blocks, head_dim] of this home's blocks, as the rank sees them.
            orders: what it sees in another order than ``attention`` did: the first key, and
                [kv_heads, keys] where from there on each of its keys is.

        Returns:
            [q_heads * samples].
        """
        q, scores = self._seen.pop(rank)
        kv_heads, samples, blocks = header.heads.bit_count(), header.samples, k_mean.shape[1]
        rows = kv_heads * self._group * samples
        if not blocks:  # this home has no keys yet
            return request.new_zeros(rows)
        for first, order in orders:
            index = order[self._heads(header)][:, None].expand(-1, scores.shape[1], -1)
            part = scores[..., first : first + order.shape[1]]
            part.copy_(part.gather(2, index))
        bias, lse = torch.split(request, [len(request) - 2 * rows, 2 * rows])
        bias = bias.view(kv_heads, 1, samples, blocks)
        exact, used = lse.view(2, kv_heads, self._group, samples)
        split = (kv_heads, self._group, samples, blocks, -1)
        p = torch.exp(scores.view(kv_heads, self._group, samples, -1) - exact[..., None])
        p = p.view(split)  # [..., blocks, block_tokens]
        whole = bias == torch.inf
        means = k_mean[self._heads(header)].to(q.dtype)[:, None]  # [kv_heads, 1, blocks, head_dim]
        logit = q.view(kv_heads, self._group, samples, -1) @ means.transpose(2, 3)
        logit = logit + bias.masked_fill(whole, 0.0) - used[..., None]
        spread = logit.exp() / p.shape[-1]
        ratio = torch.exp(exact - used).clamp(max=1)[..., None]
        least = torch.minimum(p, spread[..., None]).sum(-1)
        return torch.where(whole, ratio * p.sum(-1), least).sum(-1).flatten()

    @property
    def _group(self) -> int:
        return self.shape.q_heads // self.shape.kv_heads

    def _heads(self, header: Header) -> list[int]:
        return [head for head in range(self.shape.kv_heads) if header.heads >> head & 1]
