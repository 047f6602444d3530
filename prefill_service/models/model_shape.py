"""The sizes of a language model."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_service.attention_shape import AttentionShape, require_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape(AttentionShape):
    """A language model with grouped-query attention and gated MLPs.

    A prefix needs no more of the last layer than its K and V, so one layer less attends, and
    exchanges anything, than the model has.

    Attributes:
        name: for people.
        hidden: elements of a token's hidden state.
        intermediate: elements between an MLP's projections.

    Raises:
        ValueError: a size below 1, another dtype, or query heads that are no multiple of the KV
            heads.
    """

    name: str
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        AttentionShape.__post_init__(self)
        require_sizes(self, "num_layers", "q_heads", "kv_heads", "head_dim")
        require_sizes(self, "hidden", "intermediate")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"{self.q_heads} query heads are no multiple of {self.kv_heads} KV heads"
            )

    @property
    def linear_flops(self) -> int:
        """FLOPs per token in linear layers, over all layers."""
        keys_values = 4 * self.hidden * self.kv_heads * self.head_dim
        queries_out = 4 * self.hidden * self.q_heads * self.head_dim
        mlp = 6 * self.hidden * self.intermediate
        return self.num_layers * keys_values + self.attending_layers * (queries_out + mlp)

    def attention_flops(self, heads: int) -> int:
        """FLOPs per (query, key) pair of ``heads`` query heads, over all layers."""
        return self.attending_layers * 4 * heads * self.head_dim
