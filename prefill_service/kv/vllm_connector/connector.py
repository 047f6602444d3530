"""vLLM's KV connector for prefill-service.

    --kv-transfer-config '{"kv_connector": "PrefillConnector", "kv_role": "kv_consumer",
      "kv_connector_module_path": "prefill_service.kv.vllm_connector.connector",
      "kv_load_failure_policy": "fail"}'

vLLM makes one instance in its scheduler and one in each worker. Requests that carry
``kv_transfer_params["prefill_service"]`` get their video prefix from the ranks; all others
pass untouched. ``scheduler_side`` and ``worker_side`` are the two halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from prefill_service.compat import check_vllm
from prefill_service.kv.vllm_connector.scheduler_side import LoadMetadata, SchedulerSide
from prefill_service.kv.vllm_connector.vllm_names import (
    VLLM_VERSION,
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    check_interface,
    failed_loads,
    num_cache_groups,
    serving_settings,
)
from prefill_service.kv.vllm_connector.worker_side import WorkerSide

if TYPE_CHECKING:
    from torch import Tensor

    from prefill_service.kv.vllm_connector.vllm_names import (
        AttentionMetadata,
        ForwardContext,
        KVCacheBlocks,
        KVCacheConfig,
        KVConnectorOutput,
        Request,
        SchedulerOutput,
        VllmConfig,
    )


class PrefillConnector(KVConnectorBase_V1):
    """Whole video prefixes, loaded asynchronously, never recomputed.

    It does not declare ``SupportsHMA``: vLLM then keeps one group of layers.

    Raises:
        ValueError: vLLM was started with a policy or parallelism that cannot work.
        ServiceError: DECODER_UNAVAILABLE for a release of vLLM that is not supported.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check_config(vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config)

    @property
    def scheduler_side(self) -> SchedulerSide:
        """The half that lives in EngineCore."""
        assert self._scheduler is not None, "called in a worker"
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        """The half that lives in a worker."""
        assert self._worker is not None, "called in the scheduler"
        return self._worker

    # ---- scheduler ----------------------------------------------------------------------

    @override
    def on_new_request(self, request: Request) -> None:
        self.scheduler_side.on_new_request(request)

    @override
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler_side.matched_tokens(request, num_computed_tokens)

    @override
    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler_side.after_alloc(request, blocks, num_external_tokens)

    @override
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler_side.build_meta(scheduler_output)

    @override
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Note failed loads."""
        self.scheduler_side.loads_failed(failed_loads(connector_output))

    @override
    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is sent, so vLLM may free the blocks (loads under way delay that itself)."""
        self.scheduler_side.finished(request.request_id)
        return False, None

    # ---- worker -------------------------------------------------------------------------

    @override
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's loads in the background."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadMetadata)
        self.worker_side.start_loads(metadata)

    @override
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Loads that have ended; those of requests that finished meanwhile are cancelled."""
        metadata = self._connector_metadata
        idle = isinstance(metadata, LoadMetadata) and metadata.idle
        finished, failed = self.worker_side.take_results(finished_req_ids, idle)
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    @override
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: vLLM does not schedule a request before its own has ended."""

    @override
    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """A consumer saves nothing."""

    @override
    def wait_for_save(self) -> None:
        """A consumer saves nothing."""

    @override
    def shutdown(self) -> None:
        """End all loads."""
        if self._worker is not None:
            self._worker.shutdown()


check_interface(PrefillConnector)


def _check_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    settings = serving_settings(vllm_config)
    any_version = bool(settings.extra.get("allow_any_version", False))
    check_vllm(VLLM_VERSION, "this process's", any_version=any_version)
    if settings.load_failure_policy != "fail":
        raise ValueError(
            f"kv_load_failure_policy={settings.load_failure_policy!r}: PrefillConnector needs "
            "'fail'; recomputing a prefix whose pixels vLLM never saw would kill the engine"
        )
    if settings.context_parallel_size > 1:
        raise ValueError("PrefillConnector does not support context parallelism in vLLM")
    groups = num_cache_groups(kv_cache_config)
    if groups != 1:
        raise ValueError(f"PrefillConnector supports one KV cache group, this model has {groups}")
