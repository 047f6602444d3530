"""A family in one file that shares nothing with Qwen-VL: what ``docs/extending.md`` describes.

It is InternVL under another ``model_type``, as far as a tiny random checkpoint goes: each frame is
a temporal patch of its own, square and of a fixed size, tokens have one position, text names the
frames, and the vision tower has other parts under other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from typing_extensions import override

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import (
    Family,
    ModuleNames,
    VideoLayout,
    VisionFeatures,
    VisionInput,
)
from prefill_service.models.prefix_plan import FrameSampling
from tools.tiny_families import TinyFamily, TinySpec
from tools.tiny_tokenizer import chat_template

ensure_torchvision()
hf: Any = transformers

MODEL_TYPE = "toy_video"
"""Not ``internvl``: that name is free for a real family."""
SIDE = 56
FRAME_TEXT_TOKENS = 12
"""About as many announce a frame."""


class ToyConfig(hf.InternVLConfig):  # type: ignore[misc]  # transformers' classes are untyped here
    model_type = MODEL_TYPE


class ToyModel(hf.InternVLModel):  # type: ignore[misc]
    config_class = ToyConfig


class ToyForConditionalGeneration(hf.InternVLForConditionalGeneration):  # type: ignore[misc]
    config_class = ToyConfig


class ToyFamily(Family):
    """Frames of ``image_seq_length`` tokens, each announced by its number."""

    model_type = MODEL_TYPE
    modules = ModuleNames(
        vision_blocks="vision_tower.encoder.layer",
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "layernorm_before",
            "layernorm_after",
        ),
        activated=("gate_proj",),
    )

    @override
    def frames_per_patch(self, video_processor: Any) -> int:
        return 1

    @override
    def size_kwargs(self, video_processor: Any, sampling: FrameSampling) -> dict[str, Any]:
        if sampling.min_pixels is not None or sampling.max_pixels is not None:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"min_pixels {sampling.min_pixels} and max_pixels {sampling.max_pixels} cannot be "
                "chosen: the size is fixed",
            )
        return {}

    @override
    def pixel_limits(self, video_processor: Any, sampling: FrameSampling) -> Sequence[int]:
        return ()

    @override
    def estimate_tokens(
        self,
        video_processor: Any,
        config: Any,
        *,
        frames: int,
        frame_hw: tuple[int, int],
        sampling: FrameSampling,
    ) -> int:
        return frames * (int(config.image_seq_length) + FRAME_TEXT_TOKENS)

    @override
    def video_token_id(self, config: Any) -> int:
        return int(config.image_token_id)

    @override
    def vllm_fields(self, processed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"video_num_patches": np.array(len(processed["pixel_values"]), np.int64)}

    @override
    def lay_out(
        self, token_ids: np.ndarray, fields: Mapping[str, np.ndarray], config: Any
    ) -> VideoLayout:
        frames = int(fields["video_num_patches"])
        vision = np.flatnonzero(token_ids == config.image_token_id).reshape(frames, -1)
        ends = vision[:, -1] + 2  # the last token of a frame is followed by its end token
        start = int(vision[0, 0])
        placeholder = (start, int(vision[-1, -1]) + 1 - start)
        ends[-1] = len(token_ids)
        side = SIDE // config.vision_config.patch_size[0]
        return VideoLayout(
            position_ids=np.arange(len(token_ids))[None],
            position_delta=0,
            placeholder=placeholder,
            patch_ends=ends,
            patch_grid=(frames, side, side),
            resized_hw=(SIDE, SIDE),
        )

    @override
    def vision_input(self, processed: Mapping[str, Any]) -> VisionInput:
        return {"pixel_values": processed["pixel_values_videos"].flatten(0, 1)}

    @override
    def patches_per_token(self, config: Any) -> int:
        return round(config.downsample_ratio**-2)

    @override
    def encode(self, model: Any, inputs: VisionInput) -> VisionFeatures:
        output = model.get_image_features(
            **inputs,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
        return VisionFeatures(output.pooler_output.flatten(0, 1), [])


def make_model(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    """A tiny model of the family and its processor."""
    hf.AutoConfig.register(MODEL_TYPE, ToyConfig, exist_ok=True)
    hf.AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    hf.AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration, exist_ok=True)
    tokens = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tokenizer.init_kwargs["extra_special_tokens"] = tokens
    tokenizer._set_model_specific_special_tokens(tokens)
    size = {"height": SIDE, "width": SIDE}
    text = hf.Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_position_embeddings,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = hf.InternVLVisionConfig(
        hidden_size=spec.vision_hidden,
        intermediate_size=spec.vision_intermediate,
        num_hidden_layers=spec.vision_depth,
        num_attention_heads=spec.vision_heads,
        image_size=[SIDE, SIDE],
        patch_size=[7, 7],
    )
    config = ToyConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(tokens["context_image_token"]),
        image_seq_length=spec.video_tokens,
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=size, initial_shift=0),
        image_seq_length=spec.video_tokens,
        chat_template=tokenizer.chat_template,
    )
    return ToyForConditionalGeneration(config), processor


TINY = TinyFamily(
    model_type=MODEL_TYPE,
    make=make_model,
    # A video is one token until the processor names its frames.
    template=chat_template(video="<|video_pad|>\\n"),
    gain=1.6,
    video_tokens=16,
    vision_depth=2,
    validate=lambda spec: None,
    published_names=False,  # transformers has none for this ``model_type``
)
SPEC = TinySpec(
    layers=3,
    hidden=128,
    heads=4,
    head_dim=32,
    max_position_embeddings=32768,
    intermediate=192,
    vision_hidden=64,
    vision_intermediate=96,
)
