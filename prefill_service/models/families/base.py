"""What differs between model families, as one interface.

The model code itself is transformers': a family says where the parts are in it, how the family's
processor lays a video out in a prompt, and what the vision tower and the language model take.
``docs/extending.md`` lists the steps of adding one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from prefill_service.models.prefix_plan import FrameSampling

VisionInput = Mapping[str, Tensor]
"""Pixels of some temporal patches with what belongs to them, by the tower's parameter names."""


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """How a family lays a video out in a prompt.

    Attributes:
        position_ids: [axes, tokens] int64; three axes (time, height, width) with M-RoPE, else one.
        position_delta: next position minus number of tokens.
        placeholder: offset of the first vision token, and tokens from there to the last one. Where
            vLLM looks for a start token (Qwen3-VL), it begins with that; tokens after the last
            vision token may be counted in.
        patch_ends: [temporal patches] int64, see ``PrefixPlan.patch_ends``.
        patch_grid: temporal patches, and patch rows and columns of each.
        resized_hw: pixels of a resized frame.
    """

    position_ids: np.ndarray
    position_delta: int
    placeholder: tuple[int, int]
    patch_ends: np.ndarray
    patch_grid: tuple[int, int, int]
    resized_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the vision tower made of some temporal patches.

    Attributes:
        embeds: [vision tokens, hidden].
        deepstack: per early language layer, [vision tokens, hidden] features that are added to its
            output; empty for families without them.
    """

    embeds: Tensor
    deepstack: list[Tensor]


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """Where a family's parts are in transformers' model.

    Attributes:
        language_model: path of the language model, which has ``layers`` and ``embed_tokens``.
        vision_blocks: path of the vision tower's blocks.
        mlps: names, in a block of either, of MLPs that treat rows independently.
        norms: the same of norms.
        activated: names of linear layers whose result the ``act_fn`` beside them is applied to,
            and nothing else. They are fused with it on CPUs; an activation of another name is not.
    """

    vision_blocks: str
    norms: tuple[str, ...]
    activated: tuple[str, ...]
    language_model: str = "language_model"
    mlps: tuple[str, ...] = ("mlp",)


class Family(ABC):
    """One model family. Stateless: processor, configuration and model are handed in.

    Attributes:
        model_type: as the checkpoint's ``config.json`` names the family.
        modules: where its parts are.
        default_fps: frames per second where neither the request nor the processor names a rate.
        grounding_tokens: special tokens of the vocabulary that questions may contain, because
            they mark objects and regions and not turns or media. All others are refused.
    """

    model_type: str
    modules: ModuleNames
    default_fps = 2.0
    grounding_tokens: frozenset[str] = frozenset()

    # ---- frames: how many, how large -------------------------------------------------------

    @abstractmethod
    def frames_per_patch(self, video_processor: Any) -> int:
        """Frames that one temporal patch takes."""

    @abstractmethod
    def size_kwargs(self, video_processor: Any, sampling: FrameSampling) -> dict[str, Any]:
        """Arguments by which the video processor chooses the size of frames as asked.

        Raises:
            ServiceError: INVALID_REQUEST if no size is left, or the family has a fixed one.
        """

    @abstractmethod
    def pixel_limits(self, video_processor: Any, sampling: FrameSampling) -> Sequence[int]:
        """Values of ``max_pixels`` that can be suggested, ascending; none if the size is fixed."""

    @abstractmethod
    def estimate_tokens(
        self,
        video_processor: Any,
        config: Any,
        *,
        frames: int,
        frame_hw: tuple[int, int],
        sampling: FrameSampling,
    ) -> int:
        """About how many tokens a video makes, the text between its frames included.

        Args:
            video_processor: the checkpoint's.
            config: the checkpoint's configuration.
            frames: how many are sampled.
            frame_hw: pixels of a frame of the video.
            sampling: how large frames become.

        Raises:
            ValueError: the processor cannot resize such frames as asked.
        """

    # ---- the prompt ------------------------------------------------------------------------

    @abstractmethod
    def video_token_id(self, config: Any) -> int:
        """Id of the tokens that vision features take the place of."""

    @abstractmethod
    def vllm_fields(self, processed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The fewest fields that vLLM's model accepts as a video without pixels.

        They are all that vLLM gets of the video, and what it computes M-RoPE positions from.

        Args:
            processed: the processor's output of one prompt with one video.
        """

    @abstractmethod
    def lay_out(
        self, token_ids: np.ndarray, fields: Mapping[str, np.ndarray], config: Any
    ) -> VideoLayout:
        """Positions, placeholder and patch boundaries of a prefix with one video.

        Args:
            token_ids: [tokens], up to the question: after the last vision token comes whatever
                the chat template and processor close the video with.
            fields: of the video, by ``vllm_fields``.
            config: the checkpoint's configuration.
        """

    # ---- the model -------------------------------------------------------------------------

    @abstractmethod
    def vision_input(self, processed: Mapping[str, Any]) -> VisionInput:
        """What ``encode`` takes, from the video processor's output for some temporal patches."""

    @abstractmethod
    def patches_per_token(self, config: Any) -> int:
        """Spatial patches that the tower merges into one vision token."""

    def weight_name(self, name: str) -> str:
        """A weight's name without what differs between files and transformers' own model.

        By default that is the path to the language model, which older checkpoints lack.

        Args:
            name: in a file, or of the model's ``state_dict``.
        """
        parts = name.split(".")
        while parts[0] in ("model", "language_model"):
            del parts[0]
        return ".".join(parts)

    def speed_up(self, model: Any) -> None:  # noqa: B027
        """Replace parts of a loaded model that have a faster equal. By default there are none."""

    @abstractmethod
    def encode(self, model: Any, inputs: VisionInput) -> VisionFeatures:
        """Run the vision tower over temporal patches, which must be independent of each other."""

    def language_kwargs(
        self, position_ids: Tensor, vision_mask: Tensor, deepstack: list[Tensor]
    ) -> dict[str, Any]:
        """Arguments of the language model beyond embeddings and cache.

        Args:
            position_ids: [axes, tokens].
            vision_mask: [tokens] bool, which tokens are vision tokens.
            deepstack: of ``VisionFeatures``, for these tokens; empty without vision tokens.

        Returns:
            By default, of one axis: positions [1, tokens].
        """
        return {"position_ids": position_ids}
