"""Shapes of published models, the prompts they prefill, and the work that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.model_shape import ModelShape
from prefill_service.models.prefix_plan import PrefixPlan

hf: Any = transformers

VIDEO = 151656
START = 151652
END = 151653
SMALL_VIDEO = 7
SMALL_START = 5
SMALL_END = 6
TEXT_ID = 3
SYSTEM_TOKENS = 14  # before a video, with the families' default prompts
TIMESTAMP_TOKENS = 6
"""Tokens of Qwen3-VL's ``<12.5 seconds>`` before each temporal patch."""


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A language model's sizes, and the frames of its videos.

    Attributes:
        mrope_section: rotary pairs for time, height and width.
        deepstack: early layers that get vision features of their own.
        grid: rows and columns of the tokens of a temporal patch.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    deepstack: int = 0
    grid: tuple[int, int] = (14, 18)

    @property
    def patch_tokens(self) -> int:
        """Vision tokens of a temporal patch."""
        return self.grid[0] * self.grid[1]

    @property
    def small(self) -> bool:
        """A rehearsal's."""
        return self.vocabulary < VIDEO

    def projections(self) -> int:
        """Weights of a layer's q, k and v projections."""
        return self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim

    def linear_flops(self, tokens: int, layers: int) -> int:
        """Of a prefix: of the last layer, only keys and values (and queries) are computed."""
        mlp = 3 * self.hidden * self.intermediate
        layer = self.projections() + self.heads * self.head_dim * self.hidden + mlp
        return 2 * tokens * ((layers - 1) * layer + self.projections())

    def attention_flops(self, pairs: float) -> float:
        """Both products over (query, key) pairs of one query head, for all query heads."""
        return 4 * self.head_dim * self.heads * pairs

    def config(self, layers: int) -> Any:
        """transformers' configuration; the vision tower, which is not run, has one block."""
        text: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 1 << 20,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.mrope_section),
            },
        }
        vision: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "depth": 1,
            "out_hidden_size": self.hidden,
        }
        ids = self.token_ids()
        if self.family == "qwen2_5_vl":
            vision |= {"tokens_per_second": 2, "fullatt_block_indexes": [0]}
            return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        text["head_dim"] = self.head_dim
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 256}
        return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)

    def token_ids(self) -> dict[str, int]:
        """As the configuration names them."""
        video = VIDEO
        start = START
        end = END
        if self.small:
            video = SMALL_VIDEO
            start = SMALL_START
            end = SMALL_END
        return {
            "video_token_id": video,
            "vision_start_token_id": start,
            "vision_end_token_id": end,
            "image_token_id": video - 1,
        }

    def checkpoint(self, layers: int, dtype: str) -> Checkpoint:
        """What the service would know of it, if it were on disk."""
        return Checkpoint(
            path=Path("random"),
            family=self.family,
            fingerprint="random",
            shape=self.model_shape(layers, dtype),
            max_position_embeddings=1 << 20,
        )

    def model_shape(self, layers: int, dtype: str) -> ModelShape:
        """Its sizes with so many layers."""
        return ModelShape(
            name=self.name,
            num_layers=layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            q_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
        )

    def plan(self, video_tokens: int) -> PrefixPlan:
        """A prefix of about so many vision tokens, positions by the family's own rule."""
        ids = self.token_ids()
        (rows, columns) = self.grid
        patches = max(1, round(video_tokens / self.patch_tokens))
        video = np.full(self.patch_tokens, ids["video_token_id"], np.int32)
        start, end = ([ids[f"vision_{which}_token_id"]] for which in ("start", "end"))
        system = np.full(SYSTEM_TOKENS, TEXT_ID, np.int32)
        if self.family == "qwen2_5_vl":
            tokens = np.concatenate([system, start, np.tile(video, patches), end])
        else:
            stamp = np.full(TIMESTAMP_TOKENS, TEXT_ID, np.int32)
            patch = np.concatenate([stamp, start, video, end])
            tokens = np.concatenate([system, np.tile(patch, patches)])
        tokens = tokens.astype(np.int32)
        fields = {"video_grid_thw": np.array([patches, 2 * rows, 2 * columns])}
        layout = FAMILIES[self.family].lay_out(tokens, fields, self.config(1))
        return PrefixPlan(
            prefix_id=f"{self.name}-{len(tokens)}",
            family=self.family,
            token_ids=tokens,
            position_ids=layout.position_ids,
            position_delta=layout.position_delta,
            frame_indices=np.arange(2 * patches),
            frame_seconds=np.arange(2 * patches) / 2.0,
            patch_grid=layout.patch_grid,
            resized_hw=layout.resized_hw,
            patch_ends=layout.patch_ends,
            placeholder=layout.placeholder,
            vllm_fields=fields,
            system_prompt="",
            video_token_id=ids["video_token_id"],
            num_video_tokens=patches * self.patch_tokens,
        )


QWEN25_7B = PublishedModel(
    "Qwen2.5-VL-7B",
    "qwen2_5_vl",
    layers=28,
    hidden=3584,
    intermediate=18944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocabulary=152064,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
)
QWEN3_8B = PublishedModel(
    "Qwen3-VL-8B",
    "qwen3_vl",
    layers=36,
    hidden=4096,
    intermediate=12288,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151936,
    rope_theta=5e6,
    mrope_section=(24, 20, 20),
    deepstack=3,
)
SHAPES = (QWEN25_7B, QWEN3_8B)

TINY = (
    replace(
        QWEN25_7B,
        name="tiny Qwen2.5-VL",
        layers=5,
        hidden=224,
        intermediate=448,
        heads=7,
        kv_heads=1,
        head_dim=32,
        vocabulary=64,
        mrope_section=(4, 6, 6),
        grid=(4, 6),
    ),
    replace(
        QWEN3_8B,
        name="tiny Qwen3-VL",
        layers=5,
        hidden=128,
        intermediate=256,
        heads=8,
        kv_heads=2,
        head_dim=32,
        vocabulary=64,
        mrope_section=(6, 5, 5),
        grid=(4, 6),
    ),
)
"""The same structure, group sizes included, for a CPU."""
