from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from prefill.v1 import video_service_pb2 as _video_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SampleBy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAMPLE_BY_UNSPECIFIED: _ClassVar[SampleBy]
    SAMPLE_BY_FRAME: _ClassVar[SampleBy]
    SAMPLE_BY_TIME: _ClassVar[SampleBy]

class Quality(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUALITY_UNSPECIFIED: _ClassVar[Quality]
    QUALITY_EXACT: _ClassVar[Quality]
    QUALITY_HIGH: _ClassVar[Quality]
    QUALITY_BALANCED: _ClassVar[Quality]
    QUALITY_FAST: _ClassVar[Quality]
    QUALITY_CUSTOM: _ClassVar[Quality]

class ComparisonMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPARISON_METHOD_UNSPECIFIED: _ClassVar[ComparisonMethod]
    COMPARISON_METHOD_SPAVA: _ClassVar[ComparisonMethod]
    COMPARISON_METHOD_STAR: _ClassVar[ComparisonMethod]
    COMPARISON_METHOD_APB: _ClassVar[ComparisonMethod]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_EVICTED: _ClassVar[JobState]

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_DECODE: _ClassVar[Stage]
    STAGE_VISION: _ClassVar[Stage]
    STAGE_PREFILL: _ClassVar[Stage]
SAMPLE_BY_UNSPECIFIED: SampleBy
SAMPLE_BY_FRAME: SampleBy
SAMPLE_BY_TIME: SampleBy
QUALITY_UNSPECIFIED: Quality
QUALITY_EXACT: Quality
QUALITY_HIGH: Quality
QUALITY_BALANCED: Quality
QUALITY_FAST: Quality
QUALITY_CUSTOM: Quality
COMPARISON_METHOD_UNSPECIFIED: ComparisonMethod
COMPARISON_METHOD_SPAVA: ComparisonMethod
COMPARISON_METHOD_STAR: ComparisonMethod
COMPARISON_METHOD_APB: ComparisonMethod
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_EVICTED: JobState
STAGE_UNSPECIFIED: Stage
STAGE_DECODE: Stage
STAGE_VISION: Stage
STAGE_PREFILL: Stage

class FrameSampling(_message.Message):
    __slots__ = ("fps", "num_frames", "max_pixels", "min_pixels", "cap_pixels_per_frame", "by", "max_frames", "square_pixels")
    FPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    CAP_PIXELS_PER_FRAME_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SQUARE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    fps: float
    num_frames: int
    max_pixels: int
    min_pixels: int
    cap_pixels_per_frame: bool
    by: SampleBy
    max_frames: int
    square_pixels: bool
    def __init__(self, fps: _Optional[float] = ..., num_frames: _Optional[int] = ..., max_pixels: _Optional[int] = ..., min_pixels: _Optional[int] = ..., cap_pixels_per_frame: bool = ..., by: _Optional[_Union[SampleBy, str]] = ..., max_frames: _Optional[int] = ..., square_pixels: bool = ...) -> None: ...

class AttentionSpec(_message.Message):
    __slots__ = ("quality", "epsilon", "min_kept_mass")
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    MIN_KEPT_MASS_FIELD_NUMBER: _ClassVar[int]
    quality: Quality
    epsilon: float
    min_kept_mass: float
    def __init__(self, quality: _Optional[_Union[Quality, str]] = ..., epsilon: _Optional[float] = ..., min_kept_mass: _Optional[float] = ...) -> None: ...

class ComparisonSpec(_message.Message):
    __slots__ = ("method", "question", "anchor_tokens", "passing_tokens")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    method: ComparisonMethod
    question: str
    anchor_tokens: int
    passing_tokens: int
    def __init__(self, method: _Optional[_Union[ComparisonMethod, str]] = ..., question: _Optional[str] = ..., anchor_tokens: _Optional[int] = ..., passing_tokens: _Optional[int] = ...) -> None: ...

class PrefillSpec(_message.Message):
    __slots__ = ("video_id", "sampling", "system_prompt", "attention", "comparison")
    VIDEO_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_PROMPT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    COMPARISON_FIELD_NUMBER: _ClassVar[int]
    video_id: str
    sampling: FrameSampling
    system_prompt: str
    attention: AttentionSpec
    comparison: ComparisonSpec
    def __init__(self, video_id: _Optional[str] = ..., sampling: _Optional[_Union[FrameSampling, _Mapping]] = ..., system_prompt: _Optional[str] = ..., attention: _Optional[_Union[AttentionSpec, _Mapping]] = ..., comparison: _Optional[_Union[ComparisonSpec, _Mapping]] = ...) -> None: ...

class StageProgress(_message.Message):
    __slots__ = ("stage", "rank", "done", "total", "elapsed")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    stage: Stage
    rank: int
    done: int
    total: int
    elapsed: _duration_pb2.Duration
    def __init__(self, stage: _Optional[_Union[Stage, str]] = ..., rank: _Optional[int] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("reason", "message", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ShardRange(_message.Message):
    __slots__ = ("start_token", "end_token", "rank")
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    start_token: int
    end_token: int
    rank: int
    def __init__(self, start_token: _Optional[int] = ..., end_token: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class AttentionMeasures(_message.Message):
    __slots__ = ("density", "sampled_rows", "kept_mass_mean", "kept_mass_p5", "kept_mass_min", "output_error_mean", "output_error_p95", "tiles", "tiles_redone", "tiles_dense", "select", "attend", "certify")
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_ROWS_FIELD_NUMBER: _ClassVar[int]
    KEPT_MASS_MEAN_FIELD_NUMBER: _ClassVar[int]
    KEPT_MASS_P5_FIELD_NUMBER: _ClassVar[int]
    KEPT_MASS_MIN_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ERROR_MEAN_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ERROR_P95_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    TILES_REDONE_FIELD_NUMBER: _ClassVar[int]
    TILES_DENSE_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    ATTEND_FIELD_NUMBER: _ClassVar[int]
    CERTIFY_FIELD_NUMBER: _ClassVar[int]
    density: float
    sampled_rows: int
    kept_mass_mean: float
    kept_mass_p5: float
    kept_mass_min: float
    output_error_mean: float
    output_error_p95: float
    tiles: int
    tiles_redone: int
    tiles_dense: int
    select: _duration_pb2.Duration
    attend: _duration_pb2.Duration
    certify: _duration_pb2.Duration
    def __init__(self, density: _Optional[float] = ..., sampled_rows: _Optional[int] = ..., kept_mass_mean: _Optional[float] = ..., kept_mass_p5: _Optional[float] = ..., kept_mass_min: _Optional[float] = ..., output_error_mean: _Optional[float] = ..., output_error_p95: _Optional[float] = ..., tiles: _Optional[int] = ..., tiles_redone: _Optional[int] = ..., tiles_dense: _Optional[int] = ..., select: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., attend: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., certify: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class LayerAttention(_message.Message):
    __slots__ = ("layer", "measures", "head_density")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MEASURES_FIELD_NUMBER: _ClassVar[int]
    HEAD_DENSITY_FIELD_NUMBER: _ClassVar[int]
    layer: int
    measures: AttentionMeasures
    head_density: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., measures: _Optional[_Union[AttentionMeasures, _Mapping]] = ..., head_density: _Optional[_Iterable[float]] = ...) -> None: ...

class AttentionReport(_message.Message):
    __slots__ = ("quality", "epsilon", "min_kept_mass", "floor_met", "sparse_from_tokens", "total", "layers", "imbalance", "imbalance_before")
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    MIN_KEPT_MASS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_MET_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FROM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    quality: Quality
    epsilon: float
    min_kept_mass: float
    floor_met: bool
    sparse_from_tokens: int
    total: AttentionMeasures
    layers: _containers.RepeatedCompositeFieldContainer[LayerAttention]
    imbalance: float
    imbalance_before: float
    def __init__(self, quality: _Optional[_Union[Quality, str]] = ..., epsilon: _Optional[float] = ..., min_kept_mass: _Optional[float] = ..., floor_met: bool = ..., sparse_from_tokens: _Optional[int] = ..., total: _Optional[_Union[AttentionMeasures, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerAttention, _Mapping]]] = ..., imbalance: _Optional[float] = ..., imbalance_before: _Optional[float] = ...) -> None: ...

class CollectiveUse(_message.Message):
    __slots__ = ("name", "calls", "bytes_received", "elapsed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    calls: int
    bytes_received: int
    elapsed: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., calls: _Optional[int] = ..., bytes_received: _Optional[int] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CommunicationReport(_message.Message):
    __slots__ = ("exchange", "collectives")
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    exchange: str
    collectives: _containers.RepeatedCompositeFieldContainer[CollectiveUse]
    def __init__(self, exchange: _Optional[str] = ..., collectives: _Optional[_Iterable[_Union[CollectiveUse, _Mapping]]] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("prefix_id", "prefix_tokens", "video_tokens", "frames", "grid_thw", "position_delta", "shards", "kv_bytes", "kv_transfer_params_json", "manifest_json", "attention", "communication", "warnings", "unlisted_frames")
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VIDEO_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    GRID_THW_FIELD_NUMBER: _ClassVar[int]
    POSITION_DELTA_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_PARAMS_JSON_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    COMMUNICATION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    UNLISTED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    prefix_id: str
    prefix_tokens: int
    video_tokens: int
    frames: int
    grid_thw: _containers.RepeatedScalarFieldContainer[int]
    position_delta: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardRange]
    kv_bytes: int
    kv_transfer_params_json: str
    manifest_json: str
    attention: AttentionReport
    communication: CommunicationReport
    warnings: _containers.RepeatedCompositeFieldContainer[_video_service_pb2.VideoWarning]
    unlisted_frames: int
    def __init__(self, prefix_id: _Optional[str] = ..., prefix_tokens: _Optional[int] = ..., video_tokens: _Optional[int] = ..., frames: _Optional[int] = ..., grid_thw: _Optional[_Iterable[int]] = ..., position_delta: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardRange, _Mapping]]] = ..., kv_bytes: _Optional[int] = ..., kv_transfer_params_json: _Optional[str] = ..., manifest_json: _Optional[str] = ..., attention: _Optional[_Union[AttentionReport, _Mapping]] = ..., communication: _Optional[_Union[CommunicationReport, _Mapping]] = ..., warnings: _Optional[_Iterable[_Union[_video_service_pb2.VideoWarning, _Mapping]]] = ..., unlisted_frames: _Optional[int] = ...) -> None: ...

class PrefillJob(_message.Message):
    __slots__ = ("job_id", "spec", "state", "progress", "attempts", "queue_position", "error", "result", "create_time", "start_time", "end_time", "prefix_tokens")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    spec: PrefillSpec
    state: JobState
    progress: _containers.RepeatedCompositeFieldContainer[StageProgress]
    attempts: int
    queue_position: int
    error: JobError
    result: PrefillResult
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    prefix_tokens: int
    def __init__(self, job_id: _Optional[str] = ..., spec: _Optional[_Union[PrefillSpec, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., progress: _Optional[_Iterable[_Union[StageProgress, _Mapping]]] = ..., attempts: _Optional[int] = ..., queue_position: _Optional[int] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., result: _Optional[_Union[PrefillResult, _Mapping]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., prefix_tokens: _Optional[int] = ...) -> None: ...

class CreatePrefillJobRequest(_message.Message):
    __slots__ = ("spec", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: PrefillSpec
    request_id: str
    def __init__(self, spec: _Optional[_Union[PrefillSpec, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class CreatePrefillJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: PrefillJob
    def __init__(self, job: _Optional[_Union[PrefillJob, _Mapping]] = ...) -> None: ...

class GetPrefillJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetPrefillJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: PrefillJob
    def __init__(self, job: _Optional[_Union[PrefillJob, _Mapping]] = ...) -> None: ...

class ListPrefillJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPrefillJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[PrefillJob]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[PrefillJob, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelPrefillJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelPrefillJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: PrefillJob
    def __init__(self, job: _Optional[_Union[PrefillJob, _Mapping]] = ...) -> None: ...

class WatchPrefillJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class WatchPrefillJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: PrefillJob
    def __init__(self, job: _Optional[_Union[PrefillJob, _Mapping]] = ...) -> None: ...

class InspectPrefillJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class BlockMap(_message.Message):
    __slots__ = ("layer", "kv_head", "rows", "columns", "density")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    layer: int
    kv_head: int
    rows: int
    columns: int
    density: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., kv_head: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., density: _Optional[_Iterable[float]] = ...) -> None: ...

class PatchAttention(_message.Message):
    __slots__ = ("time", "mass")
    TIME_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    time: _duration_pb2.Duration
    mass: float
    def __init__(self, time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., mass: _Optional[float] = ...) -> None: ...

class InspectPrefillJobResponse(_message.Message):
    __slots__ = ("job", "attention", "block_map", "patches")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_MAP_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    job: PrefillJob
    attention: AttentionReport
    block_map: BlockMap
    patches: _containers.RepeatedCompositeFieldContainer[PatchAttention]
    def __init__(self, job: _Optional[_Union[PrefillJob, _Mapping]] = ..., attention: _Optional[_Union[AttentionReport, _Mapping]] = ..., block_map: _Optional[_Union[BlockMap, _Mapping]] = ..., patches: _Optional[_Iterable[_Union[PatchAttention, _Mapping]]] = ...) -> None: ...

class TracePrefillJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class TracePrefillJobResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
