"""Sizes of a model's attention, without torch until a tensor is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of each dtype that Q, K and V may have, by torch's name."""

BLOCK_TOKENS = 64
"""Keys of a block of sparse attention, by default."""

TILE_TOKENS = 128
"""Queries of a tile of sparse attention, which has at least as many as a block has keys."""

SUMMARY_VECTORS = 4
"""Vectors of a key block's summary: mean key, variance, mean value, mean outlier."""


def summary_width(head_dim: int) -> int:
    """Numbers of the summary of a block of one KV head: its vectors, and the outliers' count."""
    return SUMMARY_VECTORS * head_dim + 1


def dtype_name(dtype: torch.dtype) -> str:
    """The name that ``DTYPE_BYTES`` and a manifest have for a dtype of torch."""
    return str(dtype).removeprefix("torch.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over elements of ``dtype``: scores, log-sum-exps, statistics."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Sizes of the K and V that a model makes of each token.

    Attributes:
        num_layers: layers that have K and V.
        kv_heads, head_dim: of each layer. A rank that divides heads with others may have none.
        dtype: of K and V, a key of ``DTYPE_BYTES``.

    Raises:
        ValueError: another dtype.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype = {self.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def attending_layers(self) -> int:
        """Layers whose attention is computed: a prefix needs only K and V of the last one."""
        return self.num_layers - 1

    @property
    def bytes_per_element(self) -> int:
        """Bytes of an element of Q, K and V."""
        return DTYPE_BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def row(self) -> tuple[int, int, int]:
        """K and V of one token in one layer, ``[2 (K, V), kv_heads, head_dim]``."""
        return (2, self.kv_heads, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return prod(self.row) * self.bytes_per_element

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape(KVShape):
    """Sizes of a model's grouped-query attention.

    Attributes:
        q_heads: query heads of each layer.
    """

    q_heads: int

    @property
    def queries_per_kv(self) -> int:
        """Query heads that read one KV head."""
        return self.q_heads // self.kv_heads

    def of_prompt(self, num_tokens: int, *, scale: float, device: torch.device) -> PromptShape:
        """The same attention over one prompt on one device."""
        return PromptShape(
            num_layers=self.num_layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            num_tokens=num_tokens,
            scale=scale,
            device=device,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape(AttentionShape):
    """Sizes of the attention of one prompt, and where it is computed.

    Attributes:
        num_tokens: tokens of the prompt.
        scale: factor on the scores.
        device: of Q, K and V.
    """

    num_tokens: int
    scale: float
    device: torch.device

    @property
    def layer_bytes(self) -> int:
        """Bytes of K and V of all tokens in one layer."""
        return self.num_tokens * self.row_bytes

    def empty(self, *sizes: int) -> Tensor:
        """An uninitialised tensor ``[*sizes, *row]`` on the device."""
        import torch

        return torch.empty((*sizes, *self.row), dtype=self.torch_dtype, device=self.device)


def require_sizes(shape: KVShape, *names: str) -> None:
    """Check that the attributes of these names are 1 or more.

    Raises:
        ValueError: it names the first that is not.
    """
    for name in names:
        if (value := getattr(shape, name)) < 1:
            raise ValueError(f"{name} = {value}; expected 1 or more")
