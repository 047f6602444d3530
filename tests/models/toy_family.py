"""A family in one file that shares nothing with Qwen-VL: what ``docs/extending.md`` describes.

It is InternVL under another ``model_type``, as far as a tiny random checkpoint goes: each frame is
a temporal patch of its own, square and of a fixed size, tokens have one position, text names the
frames, and the vision tower has other parts under other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from tools.tiny_tokenizer import chat_template, train_tokenizer

ensure_torchvision()
hf: Any = transformers

MODEL_TYPE = "toy_video"
"""Not ``internvl``: that name is free for a real family."""
FRAME_TOKENS = 16
SIDE = 56


class ToyConfig(hf.InternVLConfig):  # type: ignore[misc]  # transformers' classes are untyped here
    model_type = MODEL_TYPE


class ToyModel(hf.InternVLModel):  # type: ignore[misc]
    config_class = ToyConfig


class ToyForConditionalGeneration(hf.InternVLForConditionalGeneration):  # type: ignore[misc]
    config_class = ToyConfig


class ToyFamily(Family):
    """Frames of 16 tokens, each announced by its number."""

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
        self, video_processor: Any, frames: int, frame_hw: tuple[int, int], sampling: FrameSampling
    ) -> int:
        return frames * (FRAME_TOKENS + 12)

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
        vision = np.flatnonzero(token_ids == config.image_token_id).reshape(frames, FRAME_TOKENS)
        ends = vision[:, -1] + 2  # the last token of a frame is followed by its end token
        start = int(vision[0, 0])
        span = (start, int(vision[-1, -1]) + 1 - start)
        ends[-1] = len(token_ids)
        side = SIDE // config.vision_config.patch_size[0]
        return VideoLayout(
            position_ids=np.arange(len(token_ids))[None],
            position_delta=0,
            placeholder=span,
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


def build_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint of it with random weights."""
    hf.AutoConfig.register(MODEL_TYPE, ToyConfig, exist_ok=True)
    hf.AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    hf.AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration, exist_ok=True)
    tokenizer = train_tokenizer(_template())
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
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = hf.InternVLVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[SIDE, SIDE],
        patch_size=[7, 7],
    )
    config = ToyConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(tokens["context_image_token"]),
        image_seq_length=FRAME_TOKENS,
    )
    config.dtype = "float32"
    torch.manual_seed(0)
    model = ToyForConditionalGeneration(config)
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=size, initial_shift=0),
        image_seq_length=FRAME_TOKENS,
        chat_template=tokenizer.chat_template,
    )
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _template() -> str:
    """The tiny tokenizer's, with a video that is one token until the processor names its frames."""
    return chat_template(default_system=False).replace(
        "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>\\n"
    )
