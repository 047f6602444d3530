"""Plans video prefixes and builds prompts: processor and tokenizer, no weights, no pixels.

Which frames, how they are resized, which token ids stand for them: all of it is decided by the
family's own transformers processor. It is *run*, on a video without storage (torch's meta
device), so an hour of video is planned without decoding a frame and nothing is imitated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.families.qwen_vl import FAMILIES
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.video.index import VideoIndex

ensure_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402

DEFAULT_FPS = 2.0
"""For checkpoints whose processor names no rate (Qwen2.5-VL): the Qwen reference's own."""


class PrefixPlanner:
    """Turns (video index, sampling, system prompt) into a ``PrefixPlan``, and chats into ids.

    Args:
        checkpoint: the model.
        dtype: precision of the KV cache; part of the prefix id.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._config = transformers.AutoConfig.from_pretrained(checkpoint.path)
        processors: Any = transformers.AutoProcessor
        self._processor = processors.from_pretrained(checkpoint.path)
        self._family = FAMILIES[checkpoint.family]
        added = self._processor.tokenizer.added_tokens_decoder.values()
        self._control_tokens = [token.content for token in added if token.special]
        self._processor_hash = _hash(
            transformers.__version__,
            json.dumps(self._video_processor.to_dict(), sort_keys=True, default=str),
        )

    @property
    def _video_processor(self) -> Any:
        return self._processor.video_processor

    def plan(
        self,
        index: VideoIndex,
        video_sha256: str,
        sampling: FrameSampling,
        system_prompt: str,
        profile: str = "exact",
    ) -> PrefixPlan:
        """Plan the prefix that ends with the video.

        Args:
            index: of the video.
            video_sha256: of its bytes.
            sampling: which frames, how large.
            system_prompt: goes before the video.
            profile: how attention is computed (``AttentionPolicy.profile``); part of the id.

        Raises:
            ServiceError: INVALID_REQUEST, when the sampling cannot be applied to this video.
        """
        indices = self._sample(index, sampling)
        meta_video = torch.empty(
            (len(indices), 3, index.height, index.width), dtype=torch.uint8, device="meta"
        )  # [frames, 3, height, width], no storage
        metadata = VideoMetadata(
            total_num_frames=index.frame_count,
            fps=index.fps,
            duration=index.duration_s,
            frames_indices=indices.tolist(),
        )
        try:
            inputs = self._processor(
                text=[self._prefix_text(system_prompt)],
                videos=[meta_video],
                videos_kwargs={
                    "do_sample_frames": False,
                    "video_metadata": [metadata],
                    "return_metadata": True,
                    **self._size_kwargs(sampling),
                },
            )
        except ValueError as error:
            raise ServiceError(
                Reason.INVALID_REQUEST, f"the video cannot be sampled as asked: {error}"
            ) from error

        token_ids = np.asarray(inputs["input_ids"][0], np.int32)
        t, h, w = (int(n) for n in inputs["video_grid_thw"][0])
        interval = inputs.get("second_per_grid_ts")
        second_per_grid_ts = None if interval is None else float(interval[0])
        layout = self._family.lay_out(token_ids, (t, h, w), second_per_grid_ts, self._config)
        patch = self._video_processor.patch_size
        resized_hw = (h * patch, w * patch)
        return PrefixPlan(
            prefix_id=_hash(
                self.checkpoint.fingerprint, self.dtype, profile, self._processor_hash,
                video_sha256, indices, token_ids, layout.position_ids, np.array(resized_hw),
            ),
            family=self.checkpoint.family,
            token_ids=token_ids,
            position_ids=layout.position_ids,
            position_delta=layout.position_delta,
            frame_indices=indices,
            grid_thw=(t, h, w),
            resized_hw=resized_hw,
            patch_ends=layout.patch_ends,
            placeholder=layout.placeholder,
            second_per_grid_ts=second_per_grid_ts,
            system_prompt=system_prompt,
            video_token_id=self._config.video_token_id,
            merge_size=self._video_processor.merge_size,
        )  # fmt: skip

    def prompt_token_ids(self, plan: PrefixPlan, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The whole prompt: the plan's prefix, then the chat, ready for the answer.

        Args:
            plan: the prefix.
            messages: (role, text) in turn; role is "user" or "assistant", first and last "user".

        Raises:
            ServiceError: QUESTION_EMPTY, or INVALID_REQUEST for roles out of turn and for texts
                that contain the model's control tokens.
        """
        self._check_messages(messages)
        prefix = self._prefix_text(plan.system_prompt)
        text = self._render(plan.system_prompt, messages, add_generation_prompt=True)
        if not text.startswith(prefix):
            raise ServiceError(
                Reason.MODEL_INVALID,
                "the chat template does not put the video ahead of the question's text",
            )
        suffix = self._processor.tokenizer(text[len(prefix) :], add_special_tokens=False)
        return [*plan.token_ids.tolist(), *suffix["input_ids"]]

    def estimate_tokens(self, index: VideoIndex, sampling: FrameSampling) -> int:
        """About how many tokens a plan would have, without making it.

        Raises:
            ServiceError: INVALID_REQUEST, as ``plan``.
        """
        frames = len(self._sample(index, sampling))
        return self._estimate(index, frames, self._size_kwargs(sampling)["size"])

    def suggest_fit(self, index: VideoIndex, sampling: FrameSampling, limit_tokens: int) -> str:
        """A sentence saying which number of frames or which size would fit ``limit_tokens``."""
        try:
            frames = len(self._sample(index, sampling))
        except ServiceError:
            return ""
        sizes = self._size_kwargs(sampling)["size"]
        options = []
        fitting = _largest(lambda n: self._estimate(index, n, sizes) <= limit_tokens, 2, frames)
        if fitting:
            fps = fitting * index.fps / index.frame_count
            options.append(f"num_frames={fitting} (fps={math.floor(fps * 1000) / 1000:g})")
        factor = self._video_processor.patch_size * self._video_processor.merge_size
        pixels = _largest(
            lambda blocks: (
                self._estimate(
                    index, frames, {"shortest_edge": 1, "longest_edge": blocks * factor**2}
                )
                <= limit_tokens
            ),
            1,
            max(1, sizes["longest_edge"] // factor**2),
        )
        if pixels:
            options.append(f"max_pixels={pixels * factor**2}")
        return f"{' or '.join(options)} would fit" if options else "no sampling of it would fit"

    # ---- pieces --------------------------------------------------------------------------

    def _sample(self, index: VideoIndex, sampling: FrameSampling) -> np.ndarray:
        """Indices of the sampled frames, [frames] int64, by the processor's own rule."""
        temporal = self._video_processor.temporal_patch_size
        if sampling.fps is not None and sampling.num_frames is not None:
            raise ServiceError(Reason.INVALID_REQUEST, "fps and num_frames exclude each other")
        if sampling.fps is not None and not (math.isfinite(sampling.fps) and sampling.fps > 0):
            raise ServiceError(
                Reason.INVALID_REQUEST, f"fps is {sampling.fps}, it must be more than 0",
                fps=sampling.fps,
            )  # fmt: skip
        if sampling.num_frames is not None and sampling.num_frames < temporal:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"num_frames is {sampling.num_frames}; one temporal patch takes {temporal}",
                num_frames=sampling.num_frames,
                minimum=temporal,
            )
        if index.frame_count < temporal:
            indices = np.arange(index.frame_count)
        else:
            metadata = VideoMetadata(
                total_num_frames=index.frame_count, fps=index.fps, duration=index.duration_s
            )
            fps, num_frames = sampling.fps, sampling.num_frames
            processor = self._video_processor
            if fps is num_frames is processor.fps is processor.num_frames is None:
                fps = DEFAULT_FPS
            try:
                indices = np.asarray(
                    processor.sample_frames(metadata, num_frames=num_frames, fps=fps)
                )
            except (ValueError, ZeroDivisionError) as error:
                raise ServiceError(
                    Reason.INVALID_REQUEST, f"the video cannot be sampled as asked: {error}"
                ) from error
        # Fewer frames than one temporal patch: the processors refuse, so repeat the last
        # frame, which is what they do to fill a longer video's last patch.
        missing = max(0, temporal - len(indices))
        padded: np.ndarray = np.concatenate([indices, np.repeat(indices[-1:], missing)])
        return padded.astype(np.int64)

    def _size_kwargs(self, sampling: FrameSampling) -> dict[str, Any]:
        size = self._video_processor.size
        shortest = sampling.min_pixels or size["shortest_edge"]
        longest = sampling.max_pixels or size["longest_edge"]
        if sampling.max_pixels is not None and sampling.min_pixels is None:
            shortest = min(shortest, longest)
        if not 0 < shortest <= longest:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"min_pixels {shortest} and max_pixels {longest} leave no size",
                min_pixels=shortest,
                max_pixels=longest,
            )
        cap = sampling.cap_pixels_per_frame
        if cap is None:
            cap = bool(self._video_processor.cap_pixels_per_frame)
        return {
            "size": {"shortest_edge": shortest, "longest_edge": longest},
            "cap_pixels_per_frame": cap,
        }

    def _estimate(self, index: VideoIndex, frames: int, size: dict[str, int]) -> int:
        """Tokens of ``frames`` frames, text included (12 per patch for a timestamp)."""
        processor = self._video_processor
        try:
            patches = processor.get_num_of_video_patches(
                frames, index.height, index.width, {"size": size}
            )
        except ValueError:
            return 1 << 62
        timestamps = math.ceil(frames / processor.temporal_patch_size) * 12
        return int(patches // processor.merge_size**2 + timestamps)

    def _prefix_text(self, system_prompt: str) -> str:
        marker = "?"
        text = self._render(system_prompt, [("user", marker)], add_generation_prompt=False)
        end = text.rfind(self._processor.video_token)
        # The family's <|vision_end|> closes the placeholder and belongs to the prefix.
        return text[: text.index(marker, end)]

    def _render(
        self,
        system_prompt: str,
        messages: Sequence[tuple[str, str]],
        add_generation_prompt: bool,
    ) -> str:
        chat: list[dict[str, Any]] = []
        if system_prompt:
            self._check_text("the system prompt", system_prompt)
            chat.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
        for i, (role, text) in enumerate(messages):
            content: list[dict[str, str]] = [{"type": "text", "text": text}]
            if i == 0:
                content.insert(0, {"type": "video"})
            chat.append({"role": role, "content": content})
        rendered = self._processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(rendered)

    def _check_messages(self, messages: Sequence[tuple[str, str]]) -> None:
        if not messages:
            raise ServiceError(Reason.QUESTION_EMPTY, "there is no question")
        for i, (role, text) in enumerate(messages):
            expected = ("user", "assistant")[i % 2]
            if role != expected:
                raise ServiceError(
                    Reason.INVALID_REQUEST,
                    f"message {i} has role {role!r}; user and assistant take turns, user first",
                    message_index=i,
                )
            if not text.strip():
                raise ServiceError(
                    Reason.QUESTION_EMPTY, f"message {i} has no text", message_index=i
                )
            self._check_text(f"message {i}", text)
        if messages[-1][0] != "user":
            raise ServiceError(Reason.INVALID_REQUEST, "the last message must be the user's")

    def _check_text(self, name: str, text: str) -> None:
        """Refuse control tokens in text from outside: they would forge turns or video spans."""
        for token in self._control_tokens:
            if token in text:
                raise ServiceError(
                    Reason.INVALID_REQUEST,
                    f"{name} contains the control token {token!r}",
                    token=token,
                )


def _largest(fits: Any, low: int, high: int) -> int:
    """Largest n in [low, high] with ``fits(n)``, which is monotone; 0 if there is none."""
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _hash(*parts: str | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
