"""A video on the way to its prefill: indexed, planned, decoded and encoded as the engine does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """A video whose prefix is known, before a pixel is decoded."""

    path: Path
    index: VideoIndex
    plan: PrefixPlan


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """A prefix that can be prefilled again and again.

    Attributes:
        name: of the file.
        chunks: [chunks] first token and one past the last.
        features: [chunks] of the chunk's temporal patches.
    """

    name: str
    plan: PrefixPlan
    chunks: tuple[tuple[int, int], ...]
    features: tuple[VisionFeatures, ...]


def plan_video(
    path: Path, planner: PrefixPlanner, sampling: FrameSampling, sparse_from_tokens: int
) -> PlannedVideo:
    """Probe and plan.

    Raises:
        ServiceError: naming the file; INVALID_REQUEST if it does not exist or its prefix is too
            short to be sparse, CONTEXT_EXCEEDED if it is too long, or why it is no video.
    """
    if not path.is_file():
        raise ServiceError(Reason.INVALID_REQUEST, f"{path}: no such file", path=path)
    try:
        index = asyncio.run(index_video(path, VideoConfig()))
        plan = planner.plan(index, path.name, sampling, "")
    except ServiceError as error:
        raise ServiceError(error.reason, f"{path}: {error}", path=path) from error
    if plan.num_tokens < sparse_from_tokens:
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"{path}: its prefix of {plan.num_tokens} tokens is too short to be sparse, which "
            f"begins at {sparse_from_tokens} tokens (--sparse-from-tokens); take a longer video, "
            "or more or larger frames of it",
            path=path,
            tokens=plan.num_tokens,
            limit=sparse_from_tokens,
        )
    if plan.num_tokens > (limit := planner.checkpoint.max_position_embeddings):
        raise ServiceError(
            Reason.CONTEXT_EXCEEDED,
            f"{path}: its prefix has {plan.num_tokens} tokens, but the model's context holds "
            f"{limit}; take fewer or smaller frames of it",
            path=path,
            tokens=plan.num_tokens,
            limit=limit,
        )
    return PlannedVideo(path, index, plan)


def encode_video(
    video: PlannedVideo, model: PrefillModel, chunk_tokens: int, folder: Path
) -> EncodedVideo:
    """Decode a planned video and run the vision tower over it, chunk by chunk.

    Args:
        video: to decode.
        model: with the vision tower.
        chunk_tokens: tokens of a chunk to aim at; chunks are the units that a rank computes.
        folder: for the index that the decoder reads.

    Raises:
        ServiceError: what decoding failed with.
    """
    plan = video.plan
    firsts = SelectionUnits.of(plan.patch_ends, chunk_tokens).patches
    starts = [0, *(int(end) for end in plan.patch_ends)]
    preprocess = model.preprocessor(plan)
    frames_per_patch = preprocess.frames_per_patch
    index_path = folder / "index.npz"
    video.index.save(index_path)
    features = []
    try:
        indices = plan.frame_indices.tolist()
        with FrameStream.open(video.path, index_path, indices, VideoConfig()) as stream:
            frames = iter(stream)
            for first, end in pairwise(firsts):
                # The video's last patch may be short of frames; the processor fills it.
                wanted = len(indices[first * frames_per_patch : end * frames_per_patch])
                pixels = preprocess([next(frames) for _ in range(wanted)])
                features.append(model.encode(pixels))
    except ServiceError as error:
        raise ServiceError(error.reason, f"{video.path}: {error}", path=video.path) from error
    chunks = tuple((starts[first], starts[end]) for first, end in pairwise(firsts))
    return EncodedVideo(name=video.path.name, plan=plan, chunks=chunks, features=tuple(features))
