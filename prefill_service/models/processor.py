"""The checkpoint's processor and tokenizer, checked before the first question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import ServiceError
from prefill_service.models.families.base import Family
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.run_tokenizer import RunTokenizer
from prefill_service.models.weights.refusal import refuse

ensure_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

_FILES = "processor and tokenizer files"
_TRIED_HW = (240, 320)  # pixels of the frames that are tried


def open_processor(folder: Path, family: Family, config: Any) -> Any:
    """transformers' processor of a checkpoint.

    Args:
        folder: of the checkpoint.
        family: of the checkpoint.
        config: transformers' configuration of it.

    Raises:
        ServiceError: MODEL_INVALID for files that transformers does not accept, a processor
            without videos, and a vocabulary larger than the model's.
    """
    model = str(folder)
    processors: Any = transformers.AutoProcessor
    try:
        processor = processors.from_pretrained(folder)
    except Exception as error:  # whatever transformers and tokenizers raise for broken files
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise refuse(model, _FILES, f"transformers refuses them: {reason}") from error
    for part in ("video_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            text = f"make a {type(processor).__name__}, which has no {part}"
            raise refuse(model, _FILES, text)
    size = int(config.get_text_config().vocab_size)
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= size:
        text = f"token id {largest} is beyond vocab_size {size} of config.json"
        raise refuse(model, "tokenizer.json", text)
    video_token = getattr(processor, "video_token", None)
    if video_token is not None:
        processor.tokenizer = RunTokenizer.wrap(processor.tokenizer, video_token)
    return processor


def try_video(
    processor: Any, family: Family, config: Any, *, text: str, size_kwargs: Mapping[str, Any]
) -> None:
    """Process a small video as requests will; its pixels are never made.

    Args:
        processor, family, config: of the checkpoint.
        text: prompt with a video.
        size_kwargs: by the frame sampler, for no particular size.

    Raises:
        ServiceError: MODEL_INVALID for a processor that does not take the video, enlarges it
            beyond the model's context, or marks it with other tokens than the model expects.
    """
    model = str(config.name_or_path)
    frames = 2 * family.frames_per_patch(processor.video_processor)
    _check_enlarged(processor, family, config, frames)
    metadata = VideoMetadata(
        total_num_frames=frames, fps=2.0, duration=frames / 2, frames_indices=list(range(frames))
    )
    try:
        processed = processor(
            text=[text],
            videos=[torch.empty((frames, 3, *_TRIED_HW), dtype=torch.uint8, device="meta")],
            videos_kwargs={
                "do_sample_frames": False,
                "video_metadata": [metadata],
                "return_metadata": True,
                **size_kwargs,
            },
        )
        token_ids = np.asarray(processed["input_ids"][0], np.int32)
        fields = family.vllm_fields(processed)
    except Exception as error:  # whatever the processor raises
        reason = str(error) or type(error).__name__
        raise refuse(model, _FILES, f"do not take a video: {reason}") from error
    video_token_id = family.video_token_id(config)
    if video_token_id not in token_ids:
        text = f"mark a video with other tokens than {video_token_id}, which config.json names"
        raise refuse(model, _FILES, text)
    try:
        family.lay_out(token_ids, fields, config)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        text = f"lay a video out as config.json does not describe: {error}"
        raise refuse(model, _FILES, text) from error


def _check_enlarged(processor: Any, family: Family, config: Any, frames: int) -> None:
    """Refuse sizes (``min_pixels``) that no context holds, before an array of them is made."""
    limit = int(config.get_text_config().max_position_embeddings)
    video_processor = processor.video_processor
    try:
        tokens = family.estimate_tokens(
            video_processor,
            config,
            frames=frames,
            frame_hw=_TRIED_HW,
            sampling=FrameSampling(),
        )
    except (ValueError, ServiceError):  # the processor itself says why
        return
    if tokens > limit:
        text = (
            f"enlarge {frames} frames of {_TRIED_HW[1]} x {_TRIED_HW[0]} pixels to {tokens} tokens "
            f"by size = {dict(video_processor.size)}; max_position_embeddings of config.json is "
            f"{limit}"
        )
        raise refuse(str(config.name_or_path), _FILES, text)
