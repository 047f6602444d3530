"""What a prefix needs of KV memory, and whether it fits: decided before any work is done.

Two bounds, both set by configuration. The *pool* holds pages for hand-off, one copy over all ranks.
The *working set* are the keys and values that later chunks attend to, on every rank, for as long
as the prefill runs: all tokens of every layer but the last, whose attention nobody needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import KVLayout

WORKING_SLOTS = 2
"""Layers that an offloaded working set has on the device: one computes, the next one arrives."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Bounds on the KV memory of one prefix.

    Attributes:
        layout: of a page of this model.
        pool_bytes: pages, over all ranks.
        working_bytes: working set of one rank.
        offload: what exceeds ``working_bytes`` travels (``kv.offload``) and is not refused.
        kv_shards: ranks that divide the working set; 1 where each has all of it (``gather``).
    """

    layout: KVLayout
    pool_bytes: int
    working_bytes: int
    offload: bool = False
    kv_shards: int = 1

    def layer_bytes(self, tokens: int) -> int:
        """Working set of one layer of a prefix on one rank."""
        return ceil(tokens / self.kv_shards) * self.layout.row_bytes

    def working_set(self, tokens: int) -> int:
        """Working set of a prefix on one rank, wherever it lies."""
        return self.layout.attending_layers * self.layer_bytes(tokens)

    def least_working_bytes(self, tokens: int) -> int:
        """What of ``working_set`` cannot be offloaded."""
        layers = self.layout.attending_layers
        return (min(layers, WORKING_SLOTS) if self.offload else layers) * self.layer_bytes(tokens)

    def offloads(self, tokens: int) -> bool:
        """Whether a prefix that fits has to be offloaded."""
        return self.offload and self.working_set(tokens) > self.working_bytes

    @property
    def fitting_tokens(self) -> int:
        """The longest prefix that fits both bounds (the pool's pages taken as full)."""
        pool = self.pool_bytes // self.layout.token_bytes
        working = self.least_working_bytes(self.kv_shards)  # of as many tokens, one on each
        return min(pool, self.working_bytes // working * self.kv_shards) if working else pool

    def check(self, tokens: int) -> None:
        """Refuse a prefix that cannot fit.

        Raises:
            ServiceError: KV_POOL_FULL, see ``refusal``.
        """
        if tokens > self.fitting_tokens:
            raise self.refusal(tokens)

    def refusal(self, tokens: int, advice: str = "") -> ServiceError:
        """Why a prefix of more than ``fitting_tokens`` tokens is refused, and what would help.

        Args:
            advice: a sentence that names a sampling that would fit.
        """
        fitting = self.fitting_tokens
        needed = self.least_working_bytes(tokens)
        limit = self.working_bytes
        option = "engine.kv_working_bytes"
        what = f"{needed} bytes of working KV on each rank"
        remedies = ["raise engine.kv_working_bytes"]
        if needed > limit and not self.offload:
            remedies.append('set engine.kv_offload = "host"')
        if needed <= limit:
            needed = tokens * self.layout.token_bytes
            limit = self.pool_bytes
            option = "engine.kv_pool_bytes"
            what = f"{needed} bytes of KV pages"
            remedies = ["raise engine.kv_pool_bytes"]
        sampling = advice.rstrip(".") or "look at fewer or smaller frames"
        return ServiceError(
            Reason.KV_POOL_FULL,
            f"the video makes {tokens} tokens, which need {what}; {option} is {limit}, and "
            f"{fitting} tokens would fit. {' or '.join(remedies).capitalize()}; or: {sampling}",
            tokens=tokens,
            fitting_tokens=fitting,
            needed_bytes=needed,
            pool_bytes=limit,
            option=option,
            advice=advice,
        )
