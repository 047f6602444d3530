"""Every name of vLLM that the connector uses: what it imports, and what it reads off its objects.

None of it is promised. vLLM calls the connector interface experimental, and the rest is private.
So a release of vLLM is taken up here: importing this module on one that lacks a name, or reading
an object that lacks an attribute, gives an error that lists what is missing and which releases
are supported. docs/versions.md has the steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from prefill_service.compat import missing_imports, unsupported_vllm

try:
    from vllm import __version__ as VLLM_VERSION
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
    )
    from vllm.logger import init_logger
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus
except ImportError as error:
    raise unsupported_vllm(missing_imports(__file__), because=error) from error

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.request import Request

__all__ = [
    "VLLM_VERSION",
    "AsyncScheduler",
    "AttentionMetadata",
    "EngineCoreOutputs",
    "ForwardContext",
    "KVCacheBlocks",
    "KVCacheConfig",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorOutput",
    "KVConnectorRole",
    "KVConnectorTransferResults",
    "ModelRunnerOutput",
    "Request",
    "RequestStatus",
    "Scheduler",
    "SchedulerOutput",
    "VllmConfig",
    "extract_layer_index",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "logger",
]

P = ParamSpec("P")
R = TypeVar("R")

logger = init_logger("vllm.prefill_service")  # vLLM configures loggers below "vllm" only


def check_interface(connector: type) -> None:
    """Compare a connector with the base class of the vLLM that is installed.

    vLLM would never call a method that it has renamed, and dies where it passes an argument
    that the method does not take.

    Raises:
        ServiceError: DECODER_UNAVAILABLE, naming every method that is not as expected.
    """
    differing = [
        *(
            f"{name}, which is new"
            for name in sorted(getattr(connector, "__abstractmethods__", ()))
        ),
        *_differing_methods(connector),
    ]
    if differing:
        raise unsupported_vllm([f"KVConnectorBase_V1.{text}" for text in differing])


SCHEDULER_STATE = (
    "connector",
    "finished_recving_kv_req_ids",
    "kv_holding_waiting",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "requests",
    "running",
    "scheduler_config",
    "waiting",
)
"""What the fair scheduler reads and sets of vLLM's, and may be missing in another release."""


def check_scheduler(scheduler: Scheduler) -> None:
    """Compare a scheduler's state with what the fair scheduler works on.

    Raises:
        ServiceError: DECODER_UNAVAILABLE, naming everything that is not there.
    """
    missing = [f"Scheduler.{name}" for name in SCHEDULER_STATE if not hasattr(scheduler, name)]
    if not missing and not hasattr(scheduler.scheduler_config, "long_prefill_token_threshold"):
        missing = ["SchedulerConfig.long_prefill_token_threshold"]
    if missing:
        raise unsupported_vllm(missing)


def _differing_methods(connector: type) -> Iterable[str]:
    for name, method in vars(connector).items():
        if not getattr(method, "__override__", False):
            continue
        theirs = getattr(KVConnectorBase_V1, name, None)
        if theirs is None:
            yield name
            continue
        ours = list(inspect.signature(method).parameters)
        expected = list(inspect.signature(theirs).parameters)
        if ours != expected:
            yield f"{name}({', '.join(ours[1:])}), which now is ({', '.join(expected[1:])})"


def _reads(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a missing attribute of one of vLLM's objects into the error that explains it."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except AttributeError as error:
            missing = f"{type(error.obj).__name__}.{error.name}"
            raise unsupported_vllm([missing], because=error) from error

    return checked


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """How vLLM was started, as far as the connector depends on it.

    Attributes:
        load_failure_policy: what vLLM does with a request whose load failed; ``None`` without
            a KV transfer configuration.
        context_parallel_size: ranks that divide one request's tokens.
        extra: ``kv_connector_extra_config``.
    """

    load_failure_policy: str | None
    context_parallel_size: int
    extra: dict[str, Any]


@_reads
def serving_settings(config: VllmConfig) -> ServingSettings:
    """Read what the connector depends on of vLLM's configuration."""
    transfer = config.kv_transfer_config
    parallel = config.parallel_config
    return ServingSettings(
        load_failure_policy=None if transfer is None else transfer.kv_load_failure_policy,
        context_parallel_size=max(
            parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
        ),
        extra={} if transfer is None else dict(transfer.kv_connector_extra_config),
    )


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model vLLM has loaded: its folder or hub id, and the shape of its K and V."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int


@_reads
def served_model(config: VllmConfig) -> ServedModel:
    """Read which model vLLM has loaded."""
    model = config.model_config
    return ServedModel(
        name=model.model,
        num_layers=int(model.hf_text_config.num_hidden_layers),
        num_kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.get_head_size()),
    )


class PagedCache:
    """vLLM's paged KV cache in one worker.

    Args:
        config: holds the attention layers (``static_forward_context``).
        kv_cache_config: the one group of layers and its block size.
    """

    @_reads
    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        (group,) = kv_cache_config.kv_cache_groups
        self.block_size = int(group.kv_cache_spec.block_size)
        self.layer_names: tuple[str, ...] = tuple(group.layer_names)
        self._layers = config.compilation_config.static_forward_context
        dtype = config.model_config.dtype
        assert not isinstance(dtype, str)  # a name only before vLLM has resolved it
        self._dtype = dtype

    @_reads
    def device(self) -> torch.device:
        """Where the cache lies; vLLM allocates it after the connector is made."""
        device: torch.device = self._layers[self.layer_names[0]].kv_cache.device
        return device

    @_reads
    def num_heads(self, name: str) -> int:
        """KV heads of a layer in this worker."""
        return int(self._layers[name].num_kv_heads)

    @_reads
    def write(self, name: str, kv: Tensor, slots: Tensor) -> None:
        """Write K and V of some tokens into a layer's blocks.

        The backend's own ``do_kv_cache_update`` knows the physical layout, packing and scales.

        Args:
            name: the layer.
            kv: [2, tokens, heads of this worker, head_dim].
            slots: [tokens], block number times block size plus place in the block.
        """
        layer = self._layers[name]
        cache = layer.kv_cache
        k, v = kv.to(device=cache.device, dtype=self._dtype).contiguous().unbind(0)
        layer.impl.do_kv_cache_update(layer, k, v, cache, slots.to(cache.device))


@_reads
def num_cache_groups(kv_cache_config: KVCacheConfig) -> int:
    """Groups of layers that share one block table each."""
    return len(kv_cache_config.kv_cache_groups)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt.

    Attributes:
        transfer_params: ``kv_transfer_params`` as the client sent them.
        media_ends: the token behind each multimodal item.
    """

    request_id: str
    transfer_params: object
    token_ids: list[int]
    num_tokens: int
    media_ends: tuple[int, ...]


@_reads
def prompt(request: Request) -> Prompt:
    """Read a request's prompt."""
    places = [feature.mm_position for feature in request.mm_features or []]
    return Prompt(
        request_id=request.request_id,
        transfer_params=request.kv_transfer_params,
        token_ids=request.prompt_token_ids or [],
        num_tokens=request.num_prompt_tokens,
        media_ends=tuple(place.offset + place.length for place in places),
    )


@_reads
def block_ids(blocks: KVCacheBlocks) -> list[int]:
    """The blocks of a request in the one group of layers, from token 0."""
    (ids,) = blocks.get_block_ids()
    return ids


@_reads
def computes_nothing(output: SchedulerOutput) -> bool:
    """Whether the step has no token to compute."""
    return output.total_num_scheduled_tokens == 0


@_reads
def computed_tokens(output: SchedulerOutput) -> dict[str, int]:
    """Tokens that each request of the step has computed when it ends."""
    cached = output.scheduled_cached_reqs
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in output.scheduled_new_reqs:
        before[new.req_id] = new.num_computed_tokens
    return {name: tokens + output.num_scheduled_tokens[name] for name, tokens in before.items()}


@_reads
def claim_prefix_cache(request: Request) -> bool:
    """Make vLLM ask the connector for a request; True if it would not have."""
    skips = bool(request.skip_reading_prefix_cache)
    request.skip_reading_prefix_cache = False
    return skips


@_reads
def failed_loads(output: KVConnectorOutput) -> set[str]:
    """Requests whose load ended without their KV."""
    return output.failed_recving or set()
