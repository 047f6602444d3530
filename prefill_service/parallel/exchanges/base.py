"""What an exchange is: how the queries of one rank meet the keys and values of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.kv_buffers import KVBuffers
from prefill_service.parallel.load_balance import BalanceLimits
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import ChunkLayout, Share
from prefill_service.parallel.unit_attention import UnitAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSetup:
    """What an exchange is built from: one prompt, on the ranks that compute it.

    Attributes:
        mesh: the ranks, in rows of the exchange's Ulysses degree.
        layout: of the prompt, in the exchange's order.
        shape: of the model's attention.
        settings: sizes of sparse attention.
        units: of the prompt.
        selects: some queries of the prompt are attended to sparsely.
        buffers: of an exchange that offloads; without them all keys are on the device.
        balance_limits: when an exchange that balances does so; without them, never.
    """

    mesh: SPMesh
    layout: ChunkLayout
    shape: PromptShape
    settings: SparseSettings
    units: SelectionUnits
    selects: bool = False
    buffers: KVBuffers | None = None
    balance_limits: BalanceLimits | None = None


class Exchange(ABC):
    """Causal attention over the tokens of all ranks, chunk by chunk, layer by layer.

    All ranks make the same calls in the same order, also those without a share of a chunk: what
    one sends another waits for.
    """

    @classmethod
    @abstractmethod
    def build(cls, setup: ExchangeSetup) -> Self:
        """The exchange for one prompt."""

    @property
    def local_kv_heads(self) -> slice | None:
        """KV heads of which this rank attends to all keys, where others attend to the rest.

        ``None`` where every rank attends to all KV heads.
        """
        return None

    @abstractmethod
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        """Announce a chunk: the share of every rank. It lies after all chunks before."""

    @abstractmethod
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take [tokens, kv_heads, head_dim] keys and values of this rank's share."""

    @abstractmethod
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention of this rank's queries over all tokens up to each of them.

        Args:
            q: [q_heads, tokens, head_dim] of this rank's share.

        Returns:
            [q_heads, tokens, head_dim].
        """

    @abstractmethod
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        """Attention of the same queries, sparse where ``attention`` says so, and all of it noted.

        An exchange whose ranks cannot get at single keys counts its share
        (``UnitAttention.count_exact``) and attends exactly.
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait for everything still under way (also after an aborted chunk)."""
