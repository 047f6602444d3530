"""Tiny checkpoints' families: what each needs beyond a shape and random weights.

``docs/extending.md`` has the recipe; ``tests/models/toy_family.py`` carries it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from tools.tiny_tokenizer import END_OF_TURN, PADDING, chat_template

hf: Any = transformers  # its classes are untyped


@dataclass(frozen=True, slots=True)
class TinySpec:
    """Shape of a tiny checkpoint. Where 0 is the default, the family has its own value.

    Attributes:
        layers: decoder layers.
        hidden: width of the decoder.
        heads, kv_heads: query and key/value heads; their ratio is the GQA group.
        head_dim: width of a head. Some families derive it: then hidden = heads x head_dim.
        max_position_embeddings: context in tokens.
        video_tokens: ceiling of the default processor, vision tokens of a video (Qwen3-VL)
            or of a temporal patch (Qwen2.5-VL).
        any_token: answers are made of any byte and not of words only, so that a character can
            be cut between two tokens.
        intermediate: width of the decoder's MLP; 0 is twice ``hidden``.
        vision_depth: blocks of the vision tower.
        vision_hidden, vision_intermediate, vision_heads: of the vision tower.
        qk_gain: scale of the query and key norms' weights, where there are such; attention logits
            grow with its square.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 65536
    video_tokens: int = 0
    any_token: bool = False
    intermediate: int = 0
    vision_depth: int = 0
    vision_hidden: int = 128
    vision_intermediate: int = 256
    vision_heads: int = 4
    qk_gain: float = 0.0

    def validate(self) -> None:
        """Raise ValueError if no model of any family has this shape."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """What the tiny checkpoints of one model family have in common.

    Attributes:
        model_type: as ``config.json`` names the family.
        make: makes a model and its processor, from a shape with the family's values in it and
            the tokenizer.
        template: the chat template.
        gain: scale of the random weights: sharp enough attention to tell thousands of tokens
            apart, little enough chaos that fp32 rounding does not show.
        video_tokens, vision_depth: for the fields of ``TinySpec``, if those are 0.
        validate: raises ValueError if no model of the family has a shape.
        published_names: weights are saved under the names that published checkpoints have.
            transformers maps them by ``model_type``, so it has to know that one.
    """

    model_type: str
    make: Callable[[TinySpec, Any], tuple[Any, Any]]
    template: str
    gain: float
    video_tokens: int
    vision_depth: int
    validate: Callable[[TinySpec], None]
    published_names: bool = True

    def complete(self, spec: TinySpec) -> TinySpec:
        """The shape with the family's values for what it leaves open.

        Raises:
            ValueError: no model of the family has it.
        """
        spec.validate()
        self.validate(spec)
        return dataclasses.replace(
            spec,
            video_tokens=spec.video_tokens or self.video_tokens,
            intermediate=spec.intermediate or 2 * spec.hidden,
            vision_depth=spec.vision_depth or self.vision_depth,
            qk_gain=spec.qk_gain or self.gain,
        )


def _text_config(spec: TinySpec, tokenizer: Any, rope: dict[str, Any]) -> dict[str, Any]:
    end, padding = tokenizer.convert_tokens_to_ids([END_OF_TURN, PADDING])
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": padding,
        "eos_token_id": end,
        "pad_token_id": padding,
        "tie_word_embeddings": False,
    }


def _vision_config(spec: TinySpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_intermediate,
        "num_heads": spec.vision_heads,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": spec.hidden,
    }


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _deepstack(depth: int, layers: int) -> list[int]:
    """Blocks whose features join the decoder's first layers: evenly spread over a deep tower."""
    count = min(3, layers, depth)
    if depth < 8:
        return list(range(count))
    return [depth * (1 + i) // 3 - 1 for i in range(count)]


def _qwen3_vl(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    pairs = spec.head_dim // 2
    side = pairs * 5 // 16
    depth = spec.vision_depth
    config = hf.Qwen3VLConfig(
        text_config={
            **_text_config(
                spec,
                tokenizer,
                {
                    "rope_theta": 5e6,
                    "mrope_section": [pairs - 2 * side, side, side],
                    "mrope_interleaved": True,
                },
            ),
            "head_dim": spec.head_dim,
        },
        vision_config={
            **_vision_config(spec),
            "depth": depth,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": _deepstack(depth, spec.layers),
        },
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    patches: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**patches, **half),
        tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(
            **patches,
            do_sample_frames=True,
            fps=2,
            cap_pixels_per_frame=False,
            # Pixels of the whole video: a token covers 32 x 32 pixels of two frames.
            size={
                "shortest_edge": 4 * 32 * 32,
                "longest_edge": spec.video_tokens * 2 * 32 * 32,
            },
        ),
        chat_template=tokenizer.chat_template,
    )
    return hf.Qwen3VLForConditionalGeneration(config), processor


def _qwen2_5_vl(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    pairs = spec.head_dim // 2
    side = pairs * 3 // 8
    depth = spec.vision_depth
    config = hf.Qwen2_5_VLConfig(
        text_config=_text_config(
            spec,
            tokenizer,
            {"rope_theta": 1e6, "mrope_section": [pairs - 2 * side, side, side]},
        ),
        vision_config={
            **_vision_config(spec),
            "depth": depth,
            "patch_size": 14,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [depth - 1],
        },
        tie_word_embeddings=False,
        **_token_ids(tokenizer),
    )
    patches: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        # Neither samples frames nor names a rate by default, like the published checkpoints.
        video_processor=hf.Qwen2VLVideoProcessor(
            **patches,
            cap_pixels_per_frame=False,
            # Pixels of a frame: a token covers 28 x 28 pixels.
            size={
                "shortest_edge": 4 * 28 * 28,
                "longest_edge": spec.video_tokens * 28 * 28,
            },
        ),
        chat_template=tokenizer.chat_template,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _validate_vision(spec: TinySpec) -> None:
    if spec.vision_hidden % (4 * spec.vision_heads):
        raise ValueError(
            f"vision_hidden {spec.vision_hidden} is not a multiple of 4 x vision_heads "
            f"{spec.vision_heads}, as the rotary embedding of rows and columns needs"
        )


def _validate_qwen2_5_vl(spec: TinySpec) -> None:
    _validate_vision(spec)
    if spec.hidden != spec.heads * spec.head_dim:
        raise ValueError(
            f"{QWEN2_5_VL.model_type} needs hidden = heads x head_dim, "
            f"not {spec.hidden} != {spec.heads} x {spec.head_dim}"
        )


QWEN3_VL = TinyFamily(
    model_type="qwen3_vl",
    make=_qwen3_vl,
    template=chat_template(),
    gain=2.0,
    video_tokens=6144,
    vision_depth=4,
    validate=_validate_vision,
)
QWEN2_5_VL = TinyFamily(
    model_type="qwen2_5_vl",
    make=_qwen2_5_vl,
    template=chat_template(default_system=True),
    gain=1.6,
    video_tokens=50,
    vision_depth=3,
    validate=_validate_qwen2_5_vl,
)
FAMILIES = {family.model_type: family for family in (QWEN3_VL, QWEN2_5_VL)}
