"""Verification over ranks: sampled query rows go to where the keys are.

Same definition as ``attention.verification``: exact attention of a few rows, and of it what the
approximation kept, ``sum_i min(p_i, p~_i)``. Every owner attends to its own keys and returns output
and log-sum-exp; their merge is the exact attention. With the whole log-sum-exp every owner then
adds up what was kept of its keys. Nothing of a key travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, merge
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.verification import Verification, measure_rows, weigh_values
from prefill_service.attention_shape import PromptShape, accumulation_dtype
from prefill_service.parallel.exchanges.demand.owned_kv import KeyOrder
from prefill_service.parallel.exchanges.demand.rpc import RequestHeader, RequestKind


class VerificationRequest:
    """The requesting side: some rows of a sparse result, to be compared with exact attention.

    Args:
        problem: what the result is of, for some KV heads.
        result: what is to be verified.
        sampled: [samples] which queries.
        owned_blocks: per rank, the blocks that it owns.
    """

    def __init__(
        self,
        problem: SparseProblem,
        result: SparseResult,
        sampled: Tensor,
        owned_blocks: list[np.ndarray],
    ) -> None:
        work = accumulation_dtype(problem.q.dtype)
        rows = sampled.to(problem.q.device)
        self._q = problem.q[:, rows].to(work)  # [q_heads, samples, head_dim]
        self._out = result.out[:, rows].to(work)
        self._lse = result.lse[:, rows].to(work)
        self._problem = problem
        self._result = result
        self._sampled = sampled
        self._position = rows + problem.tiles.q_offset
        self._owned_blocks = [torch.from_numpy(ids) for ids in owned_blocks]
        self._exact: Partial | None = None

    def attention_request(self) -> Tensor:
        """The request for attention: queries and their positions, flat."""
        return torch.cat([self._q.flatten(), self._position.to(self._q.dtype)])

    def attention_buffer(self) -> Tensor:
        """An uninitialised tensor for an owner's output and log-sum-exp."""
        q_heads, samples, head_dim = self._q.shape
        return self._q.new_empty(q_heads * samples * (head_dim + 1))

    def merge_attention(self, replies: Mapping[int, Tensor]) -> None:
        """Exact attention from that of all owners."""
        q_heads, samples, _ = self._q.shape
        parts = []
        for reply in replies.values():
            out, lse = torch.split(reply, [self._q.numel(), q_heads * samples])
            parts.append(Partial(out.view(self._q.shape), lse.view(q_heads, samples)))
        self._exact = merge(parts)

    def kept_mass_request(self, rank: int) -> Tensor:
        """The request for kept mass: what was made of an owner's blocks, and both log-sum-exps.

        Of a block that is the logit added to its summary, infinite where its tokens were attended.
        """
        assert self._exact is not None, "kept mass is relative to exact attention"
        tiles = self._problem.tiles
        ids = self._owned_blocks[rank]
        tile = self._sampled // tiles.tile_tokens
        candidates = torch.tensor([tiles.candidates(i) for i in tile.tolist()])
        local = ids >= candidates[:, None]  # [samples, blocks]
        bias = self._lse.new_full((len(self._result.keep), *local.shape), torch.inf)
        within = ids < tiles.blocks
        found = self._result.bias[:, tile.to(self._q.device)][..., ids[within].to(self._q.device)]
        kept = self._result.keep[:, tile.to(self._q.device)][..., ids[within].to(self._q.device)]
        whole = kept | local[:, within].to(kept.device)
        bias[..., within] = found.to(bias.dtype).masked_fill(whole, torch.inf)
        return torch.cat([bias.flatten(), self._exact.lse.flatten(), self._lse.flatten()])

    def kept_mass_buffer(self) -> Tensor:
        """An uninitialised tensor for what was kept of an owner's keys."""
        return self._lse.new_empty(self._lse.numel())

    def measure(self, kept: Mapping[int, Tensor]) -> Verification:
        """The measurements, from all owners' kept mass."""
        assert self._exact is not None, "measure() comes after merge_attention()"
        mass = torch.stack(list(kept.values())).sum(0).view_as(self._lse)
        mass, error = measure_rows(mass, self._out, self._lse, self._exact.out)
        heads = len(self._problem.heads)
        shape = (heads, -1, len(self._sampled))
        return Verification(
            kept_mass=mass.view(shape),
            output_error=error.view(shape),
            weighted=mass.new_empty(heads, 0),
        )


@dataclass(frozen=True, slots=True)
class _RowScores:
    """What an owner remembers of a request for attention until kept mass is requested.

    Attributes:
        q: [kv_heads, queries_per_kv * samples, head_dim], scaled.
        scores: [kv_heads, queries_per_kv * samples, keys], -inf for keys after the query.
    """

    q: Tensor
    scores: Tensor


@dataclass(frozen=True, slots=True)
class VerificationServer:
    """The answering side: what an owner's keys say of other ranks' rows.

    Attributes:
        shape: of the model's attention.
    """

    shape: PromptShape
    _scores: dict[int, _RowScores] = field(default_factory=dict)  # by requesting rank

    def request_size(self, header: RequestHeader, blocks: int) -> int:
        """Values of a request about ``blocks`` blocks of this owner."""
        kv_heads = header.heads.bit_count()
        rows = kv_heads * self._queries_per_kv * header.samples
        if header.kind is RequestKind.ATTENTION:
            return rows * self.shape.head_dim + header.samples
        return kv_heads * header.samples * blocks + 2 * rows

    def attend_rows(
        self, rank: int, header: RequestHeader, request: Tensor, *, kv: Tensor, position: Tensor
    ) -> Tensor:
        """Exact attention of a rank's rows over this owner's keys.

        Args:
            rank: that requests it.
            header: of the request.
            request: ``VerificationRequest.attention_request``.
            kv: [keys, 2, kv_heads, head_dim].
            position: [keys], or any position before the rows for keys that are out of order.

        Returns:
            Output [q_heads, samples, head_dim] and log-sum-exp [q_heads, samples], flat.
        """
        samples = header.samples
        size = (header.heads.bit_count(), self._queries_per_kv * samples, self.shape.head_dim)
        queries, of_row = torch.split(request, [len(request) - samples, samples])
        q = queries.view(size) * self.shape.scale
        k, v = kv[:, :, self._heads(header)].to(q.dtype).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2)  # [kv_heads, queries_per_kv * samples, keys]
        hidden = position.to(of_row.dtype) > of_row[:, None]  # [samples, keys]
        scores.masked_fill_(hidden.repeat(self._queries_per_kv, 1), -torch.inf)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        self._scores[rank] = _RowScores(q, scores)
        out = [weigh_values(*of_head) for of_head in zip(p, v, strict=True)]
        return torch.cat([torch.stack(out).flatten(), lse.flatten()])

    def measure_kept_mass(
        self,
        rank: int,
        header: RequestHeader,
        request: Tensor,
        *,
        k_mean: Tensor,
        orders: Sequence[KeyOrder] = (),
    ) -> Tensor:
        """What was kept of the rows of the rank's last ``attend_rows``, over this owner's keys.

        Args:
            rank: that requests it.
            header: of the request.
            request: ``VerificationRequest.kept_mass_request``.
            k_mean: [kv_heads, blocks, head_dim] of this owner's blocks, as the rank sees them.
            orders: which keys the rank sees in another order than that of ``attend_rows``.

        Returns:
            [q_heads * samples].
        """
        rows = self._scores.pop(rank)
        kv_heads = header.heads.bit_count()
        samples = header.samples
        blocks = k_mean.shape[1]
        per_kv = self._queries_per_kv
        count = kv_heads * per_kv * samples
        if not blocks:  # this owner has no keys yet
            return request.new_zeros(count)
        scores = self._reordered(rows.scores, header, orders)
        bias, lse = torch.split(request, [len(request) - 2 * count, 2 * count])
        bias = bias.view(kv_heads, 1, samples, blocks)
        exact, used = lse.view(2, kv_heads, per_kv, samples)
        p = torch.exp(scores.view(kv_heads, per_kv, samples, -1) - exact[..., None])
        p = p.view(kv_heads, per_kv, samples, blocks, -1)  # the last: block_tokens
        whole = bias == torch.inf
        means = k_mean[self._heads(header)].to(rows.q.dtype)[:, None]
        # [kv_heads, 1, blocks, head_dim] means give [kv_heads, per_kv, samples, blocks] logits.
        logit = rows.q.view(kv_heads, per_kv, samples, -1) @ means.transpose(2, 3)
        logit = logit + bias.masked_fill(whole, 0.0) - used[..., None]
        spread = logit.exp() / p.shape[-1]
        ratio = torch.exp(exact - used).clamp(max=1)[..., None]
        least = torch.minimum(p, spread[..., None]).sum(-1)
        return torch.where(whole, ratio * p.sum(-1), least).sum(-1).flatten()

    def _reordered(
        self, scores: Tensor, header: RequestHeader, orders: Sequence[KeyOrder]
    ) -> Tensor:
        """``scores`` with its keys in the order in which the rank sees them (in place)."""
        for run in orders:
            index = run.order[self._heads(header)][:, None].expand(-1, scores.shape[1], -1)
            part = scores[..., run.first_row : run.first_row + run.order.shape[1]]
            part.copy_(part.gather(2, index))
        return scores

    @property
    def _queries_per_kv(self) -> int:
        return self.shape.queries_per_kv

    def _heads(self, header: RequestHeader) -> list[int]:
        return [head for head in range(self.shape.kv_heads) if header.heads >> head & 1]
