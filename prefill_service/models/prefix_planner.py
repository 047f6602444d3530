"""Plans video prefixes and builds prompts: processor and tokenizer, no weights, no pixels.

Which frames, how they are resized, which token ids stand for them: all of it is decided by the
family's own transformers processor. It is *run*, on a video without storage (torch's meta
device), so an hour of video is planned without decoding a frame and nothing is imitated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.chat import Chat, Messages
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.frame_sampling import FrameSampler, SampledFrames
from prefill_service.models.generation_defaults import read_generation_defaults
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.processor import open_processor, try_video
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex

ensure_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402


class PrefixPlanner:
    """Turns (video index, sampling, system prompt) into a ``PrefixPlan``, and chats into ids.

    Args:
        checkpoint: the model.
        dtype: precision of the KV cache; part of the prefix id.
        generation_config: read the checkpoint's defaults of sampling.

    Attributes:
        generation_defaults: sampling parameters for requests without them, by vLLM's names.
        chat: the checkpoint's chat template and tokenizer.
        sampler: its rule of which frames are looked at.

    Raises:
        ServiceError: MODEL_INVALID for a processor, tokenizer or chat template that cannot do it.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, *, generation_config: bool = True
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._config = transformers.AutoConfig.from_pretrained(checkpoint.path)
        self._family = FAMILIES[checkpoint.family]
        self.generation_defaults: Mapping[str, float] = (
            read_generation_defaults(checkpoint.path, self._config) if generation_config else {}
        )
        self._processor = open_processor(checkpoint.path, self._family, self._config)
        video_processor = self._processor.video_processor
        self.chat = Chat(self._processor, self._family)
        self.chat.check_template()
        self.sampler = FrameSampler(self._family, video_processor, self._config)
        try_video(
            self._processor,
            self._family,
            self._config,
            text=self.chat.prefix(""),
            size_kwargs=self.sampler.size_kwargs(FrameSampling()),
        )
        self._processor_hash = _hash(
            transformers.__version__,
            json.dumps(video_processor.to_dict(), sort_keys=True, default=str),
        )

    def plan(
        self,
        index: VideoIndex,
        video_sha256: str,
        sampling: FrameSampling,
        system_prompt: str,
        *,
        attention_key: str = "exact",
    ) -> PrefixPlan:
        """Plan the prefix that ends with the video.

        Args:
            index: of the video.
            video_sha256: of its bytes.
            sampling: which frames, how large.
            system_prompt: goes before the video.
            attention_key: how attention is computed; part of the id.

        Raises:
            ServiceError: INVALID_REQUEST, when the sampling cannot be applied to this video.
        """
        sampled = self.sampler.sample(index, sampling)
        geometry = sampled.timeline.index.geometry
        indices = sampled.indices
        processed = self._process(sampled, sampling, self.chat.prefix(system_prompt))
        token_ids = np.asarray(processed["input_ids"][0], np.int32)
        fields = self._family.vllm_fields(processed)
        layout = self._family.lay_out(token_ids, fields, self._config)
        video_token_id = self._family.video_token_id(self._config)
        prefix_id = _hash(
            self.checkpoint.fingerprint,
            self.dtype,
            attention_key,
            self._processor_hash,
            video_sha256,
            indices,
            token_ids,
            layout.position_ids,
            np.array(layout.resized_hw),
            np.array(geometry.display_hw),
        )
        return PrefixPlan(
            prefix_id=prefix_id,
            family=self.checkpoint.family,
            token_ids=token_ids,
            position_ids=layout.position_ids,
            position_delta=layout.position_delta,
            frame_indices=indices,
            frame_seconds=sampled.seconds,
            patch_grid=layout.patch_grid,
            resized_hw=layout.resized_hw,
            patch_ends=layout.patch_ends,
            placeholder=layout.placeholder,
            vllm_fields=fields,
            system_prompt=system_prompt,
            video_token_id=video_token_id,
            num_video_tokens=int(np.count_nonzero(token_ids == video_token_id)),
            warnings=sampled.warnings,
            square_pixels=bool(sampling.square_pixels),
        )

    def prompt_token_ids(self, plan: PrefixPlan, messages: Messages) -> list[int]:
        """The whole prompt: the plan's prefix, then the chat, ready for the answer.

        Raises:
            ServiceError: as ``Chat.suffix_ids``.
        """
        return [*plan.token_ids.tolist(), *self.chat.suffix_ids(plan.system_prompt, messages)]

    def count_tokens(self, texts: Sequence[str], most: int) -> int:
        """Tokens of texts, no further than to be sure that they are more than ``most``."""
        return self.chat.count_tokens(texts, most)

    def estimate_tokens(self, index: VideoIndex, sampling: FrameSampling) -> int:
        """About how many tokens a plan would have, without making it.

        Raises:
            ServiceError: INVALID_REQUEST, as ``plan``.
        """
        return self.sampler.estimate_tokens(index, sampling)

    def check_frames(self, geometry: Geometry) -> None:
        """Check that the processor takes such frames, whatever is sampled.

        Raises:
            ServiceError: INVALID_REQUEST, with their size and the processor's limit.
        """
        self.sampler.check_frames(geometry)

    def suggest_fit(self, index: VideoIndex, sampling: FrameSampling, limit_tokens: int) -> str:
        """A sentence saying which number of frames or which size would fit ``limit_tokens``."""
        return self.sampler.suggest_fit(index, sampling, limit_tokens)

    def _process(self, sampled: SampledFrames, sampling: FrameSampling, text: str) -> Any:
        """The processor's output for a prompt with these frames, whose pixels are never made."""
        index = sampled.timeline.index
        meta_video = torch.empty(
            (len(sampled.numbers), 3, index.height, index.width), dtype=torch.uint8, device="meta"
        )  # [frames, 3, height, width], no storage
        try:
            return self._processor(
                text=[text],
                videos=[meta_video],
                videos_kwargs={
                    "do_sample_frames": False,
                    "video_metadata": [sampled.metadata],
                    "return_metadata": True,
                    **self.sampler.size_kwargs(sampling),
                },
            )
        except ValueError as error:
            raise ServiceError(
                Reason.INVALID_REQUEST, f"the video cannot be sampled as asked: {error}"
            ) from error


def _hash(*parts: str | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
