"""What calls return: plain frozen dataclasses. Times are aware datetimes, durations seconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, BinaryIO, TypeAlias, TypedDict

from prefill_client.attention import AttentionReport, BlockMap, PatchAttention, Quality


class VideoState(StrEnum):
    """The life of a video."""

    UNSPECIFIED = "UNSPECIFIED"
    UPLOADING = "UPLOADING"
    PROBING = "PROBING"
    READY = "READY"
    FAILED = "FAILED"


class JobState(StrEnum):
    """The life of a prefill job."""

    UNSPECIFIED = "UNSPECIFIED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EVICTED = "EVICTED"

    @property
    def ended(self) -> bool:
        """Whether the job has reached its last state."""
        return self not in (JobState.UNSPECIFIED, JobState.QUEUED, JobState.RUNNING)


class Stage(StrEnum):
    """Stages of a prefill. They count frames, temporal patches and tokens."""

    UNSPECIFIED = "UNSPECIFIED"
    DECODE = "DECODE"
    VISION = "VISION"
    PREFILL = "PREFILL"


@dataclass(frozen=True)
class FrameSize:
    """A size that ``frames`` frames are stored in, in pixels; an estimate in long files."""

    width: int
    height: int
    frames: int


@dataclass(frozen=True)
class VideoInfo:
    """What probing found in the file.

    ``width`` and ``height`` are those of a frame as it is shown: of square pixels, upright.
    ``stored`` is the size that most frames are stored in, ``sample_aspect_ratio`` the width of a
    stored pixel over its height, ``sizes`` all sizes that occur. Stored frames are turned by
    ``rotation`` degrees counter-clockwise, upside down before that if they are ``mirrored``.
    """

    container: str
    codec: str
    width: int
    height: int
    frame_count: int
    fps: float
    duration_s: float
    keyframe_count: int
    stored: FrameSize | None = None
    sample_aspect_ratio: tuple[int, int] = (1, 1)
    sizes: tuple[FrameSize, ...] = ()
    rotation: int = 0
    mirrored: bool = False


@dataclass(frozen=True)
class VideoWarning:
    """What you should know of a file that is taken all the same.

    ``reason`` is for programs (docs/api.md lists them), ``message`` for people.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class Video:
    """A stored video, or an upload on its way to be one."""

    video_id: str
    display_name: str
    state: VideoState
    size_bytes: int
    committed_bytes: int
    sha256: str
    create_time: datetime | None
    expire_time: datetime | None
    info: VideoInfo | None
    error_reason: str
    error_message: str
    warnings: tuple[VideoWarning, ...] = ()


@dataclass(frozen=True)
class StageProgress:
    """How far one rank is in one stage."""

    stage: Stage
    rank: int
    done: int
    total: int
    elapsed_s: float


@dataclass(frozen=True)
class JobError:
    """Why a job failed."""

    reason: str
    message: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class ShardRange:
    """Tokens ``start_token <= i < end_token`` are held by ``rank``."""

    start_token: int
    end_token: int
    rank: int


@dataclass(frozen=True)
class CollectiveUse:
    """One kind of collective: calls and bytes over all ranks, the slowest rank's time in it."""

    name: str
    calls: int
    bytes_received: int
    elapsed_s: float


@dataclass(frozen=True)
class CommunicationReport:
    """What the ranks of a prefill exchanged, and how."""

    exchange: str
    collectives: tuple[CollectiveUse, ...]


@dataclass(frozen=True)
class PrefillResult:
    """What a finished job offers. See PrefillResult in the API reference.

    ``attention`` and ``communication`` are None from a server that is older than the report.
    """

    prefix_id: str
    prefix_tokens: int
    video_tokens: int
    frames: int
    grid_thw: tuple[int, ...]
    position_delta: int
    shards: tuple[ShardRange, ...]
    kv_bytes: int
    kv_transfer_params_json: str
    manifest_json: str
    attention: AttentionReport | None
    communication: CommunicationReport | None = None
    warnings: tuple[VideoWarning, ...] = ()
    unlisted_frames: int = 0


class ComparisonMethod(StrEnum):
    """A published way to compute a prefix, for research."""

    UNSPECIFIED = "unspecified"
    SPAVA = "spava"
    STAR = "star"
    APB = "apb"


@dataclass(frozen=True)
class Comparison:
    """What a prefix was computed by instead of attention. None: as published for its length."""

    method: ComparisonMethod
    question: str
    anchor_tokens: int | None
    passing_tokens: int | None


class SampleBy(StrEnum):
    """What is evenly spaced among sampled frames. UNSPECIFIED: chosen by the file's rate."""

    UNSPECIFIED = "unspecified"
    FRAME = "frame"
    TIME = "time"


@dataclass(frozen=True)
class PrefillSpec:
    """The video prefix a job computes. None: the model family's own default."""

    video_id: str
    fps: float | None
    num_frames: int | None
    max_pixels: int | None
    min_pixels: int | None
    cap_pixels_per_frame: bool | None
    max_frames: int | None
    system_prompt: str
    quality: Quality
    epsilon: float | None
    min_kept_mass: float | None
    comparison: Comparison | None = None
    sample_by: SampleBy = SampleBy.UNSPECIFIED
    square_pixels: bool | None = None


@dataclass(frozen=True)
class Job:
    """A prefill and how far it is."""

    job_id: str
    spec: PrefillSpec
    state: JobState
    progress: tuple[StageProgress, ...]
    attempts: int
    queue_position: int
    error: JobError | None
    result: PrefillResult | None
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    prefix_tokens: int


@dataclass(frozen=True)
class Inspection:
    """All that is known of a job's attention.

    Attributes:
        block_map: of the layer and KV head of the lowest density; None if nothing was sparse.
        patches: the attention mass over the video's time; empty if it was not measured.
    """

    job: Job
    attention: AttentionReport
    block_map: BlockMap | None
    patches: tuple[PatchAttention, ...]


@dataclass(frozen=True)
class Timings:
    """Timings of one answer, measured by the server, in seconds."""

    prefill_wait_s: float
    decoder_first_token_s: float
    first_token_s: float
    total_s: float
    handoff_s: float


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer and its prompt."""

    prompt_tokens: int
    video_tokens: int
    completion_tokens: int
    kv_tokens_moved: int
    kv_bytes_moved: int
    cached_tokens: int


@dataclass(frozen=True)
class SampledFrames:
    """The frames of the video that the model looked at, in order.

    Attributes:
        numbers: of each in the file, from 0 in presentation order. One stands more than once
            where it is shown long and frames are sampled by time, and the last one where a video
            has too few frames for a temporal patch.
        times_s: the time that each stands for, seconds after the file's first frame: when it
            begins to be shown, or, sampled by time, the sampled time.
    """

    numbers: tuple[int, ...]
    times_s: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """One complete answer. ``finish_reason`` is "stop", "length" or "abort"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
    usage: Usage
    job_id: str
    prefix_id: str
    video_id: str
    request_id: str
    warnings: tuple[VideoWarning, ...] = ()
    frames: SampledFrames | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a chat; ``role`` is "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class IntakeProgress:
    """How much of a prompt vLLM has, in tokens; it says so of prompts that take it long."""

    computed_tokens: int
    prompt_tokens: int


@dataclass(frozen=True)
class UploadProgress:
    """How far an upload is: ``phase`` is "hash", "upload" or "probe"; the rest is bytes."""

    phase: str
    done: int
    total: int


class FrameOptions(TypedDict, total=False):
    """What is prefilled: which frames, how large, the system prompt before them, and how well.

    What is left out (or None) is the model family's own default. At most one of ``fps`` and
    ``num_frames``. ``max_frames`` limits what ``fps``, or the default, leads to, in place of the
    processor's own limit; the frames are evenly spread then. ``max_pixels`` and ``min_pixels``
    are the processor's ``longest_edge`` and ``shortest_edge``, in pixels;
    ``cap_pixels_per_frame`` applies the family's per-frame ceiling. ``sample_by`` says what is
    evenly spaced: "frame" numbers, or "time"; by default time where the file's rate varies.
    ``square_pixels`` ignores the file's sample aspect ratio, as vLLM does.

    ``quality`` is "exact", "high", "balanced" (the default) or "fast"; ``epsilon``, instead of
    it, is the attention mass that may be misplaced, 0 (exact) to below 1. ``min_kept_mass`` is
    the floor of what is measured to be kept, 0 (off) to 1. Each choice is a prefix of its own.

    ``comparison``, instead of these, has a published method compute the prefix, for research:
    "spava", "star" or "apb". It consults the question; where none is asked, give it as
    ``comparison_question``. ``anchor_tokens`` and ``passing_tokens`` replace published lengths.
    """

    fps: float | None
    num_frames: int | None
    max_pixels: int | None
    min_pixels: int | None
    cap_pixels_per_frame: bool | None
    max_frames: int | None
    square_pixels: bool | None
    sample_by: SampleBy | str | None
    system_prompt: str | None
    quality: Quality | str | None
    epsilon: float | None
    min_kept_mass: float | None
    comparison: ComparisonMethod | str | None
    comparison_question: str | None
    anchor_tokens: int | None
    passing_tokens: int | None


class AskOptions(FrameOptions, total=False):
    """Frame options and how to decode: what is not said is the served model's default."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    repetition_penalty: float | None
    ignore_eos: bool | None


# What is uploaded: the path or file:// URL of a file, bytes, or a file open for reading bytes.
VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
# A video is given as a Video, as the id of one, or as what is to be uploaded. A string is an id
# if it looks like one ("vid_" and letters or digits, no dot or slash).
VideoLike: TypeAlias = "Video | VideoSource"
QuestionLike: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"


def to_dict(value: Any) -> Any:
    """Convert a result to JSON-ready data; datetimes become ISO 8601 text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value
