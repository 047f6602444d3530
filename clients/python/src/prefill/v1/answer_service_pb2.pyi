from google.protobuf import duration_pb2 as _duration_pb2
from prefill.v1 import prefill_service_pb2 as _prefill_service_pb2
from prefill.v1 import video_service_pb2 as _video_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role

class ChatMessage(_message.Message):
    __slots__ = ("role", "text")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    text: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., text: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "repetition_penalty", "ignore_eos")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    repetition_penalty: float
    ignore_eos: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., repetition_penalty: _Optional[float] = ..., ignore_eos: bool = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("spec", "messages", "sampling_params", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: _prefill_service_pb2.PrefillSpec
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    sampling_params: SamplingParams
    request_id: str
    def __init__(self, spec: _Optional[_Union[_prefill_service_pb2.PrefillSpec, _Mapping]] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., sampling_params: _Optional[_Union[SamplingParams, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class AskTimings(_message.Message):
    __slots__ = ("prefill_wait", "decoder_first_token", "first_token", "total", "handoff")
    PREFILL_WAIT_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    prefill_wait: _duration_pb2.Duration
    decoder_first_token: _duration_pb2.Duration
    first_token: _duration_pb2.Duration
    total: _duration_pb2.Duration
    handoff: _duration_pb2.Duration
    def __init__(self, prefill_wait: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., decoder_first_token: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., first_token: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., total: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., handoff: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AskUsage(_message.Message):
    __slots__ = ("prompt_tokens", "video_tokens", "completion_tokens", "kv_tokens_moved", "kv_bytes_moved", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VIDEO_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_MOVED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    video_tokens: int
    completion_tokens: int
    kv_tokens_moved: int
    kv_bytes_moved: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., video_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., kv_tokens_moved: _Optional[int] = ..., kv_bytes_moved: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class AskProgress(_message.Message):
    __slots__ = ("job", "computed_tokens", "prompt_tokens")
    JOB_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    job: _prefill_service_pb2.PrefillJob
    computed_tokens: int
    prompt_tokens: int
    def __init__(self, job: _Optional[_Union[_prefill_service_pb2.PrefillJob, _Mapping]] = ..., computed_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class AskDelta(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SampledFrames(_message.Message):
    __slots__ = ("numbers", "seconds")
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, numbers: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ...) -> None: ...

class AskFinal(_message.Message):
    __slots__ = ("finish_reason", "timings", "usage", "job_id", "prefix_id", "warnings", "frames")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ID_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    timings: AskTimings
    usage: AskUsage
    job_id: str
    prefix_id: str
    warnings: _containers.RepeatedCompositeFieldContainer[_video_service_pb2.VideoWarning]
    frames: SampledFrames
    def __init__(self, finish_reason: _Optional[str] = ..., timings: _Optional[_Union[AskTimings, _Mapping]] = ..., usage: _Optional[_Union[AskUsage, _Mapping]] = ..., job_id: _Optional[str] = ..., prefix_id: _Optional[str] = ..., warnings: _Optional[_Iterable[_Union[_video_service_pb2.VideoWarning, _Mapping]]] = ..., frames: _Optional[_Union[SampledFrames, _Mapping]] = ...) -> None: ...

class AskResponse(_message.Message):
    __slots__ = ("progress", "delta", "final")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    progress: AskProgress
    delta: AskDelta
    final: AskFinal
    def __init__(self, progress: _Optional[_Union[AskProgress, _Mapping]] = ..., delta: _Optional[_Union[AskDelta, _Mapping]] = ..., final: _Optional[_Union[AskFinal, _Mapping]] = ...) -> None: ...
