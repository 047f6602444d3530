"""The connector in vLLM's workers: pulls pages and writes them into the paged cache.

Each load has a thread of its own, since it may wait for pages that are still being computed.
A load is reported as finished exactly once, and only when its thread no longer writes: vLLM
frees the blocks of an aborted request no earlier.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import HandoffReport
from prefill_service.kv.handoff_reports import send_report
from prefill_service.kv.vllm_connector.page_client import PageBatch, PageClient
from prefill_service.kv.vllm_connector.scheduler_side import Load, LoadMetadata
from prefill_service.kv.vllm_connector.vllm_names import (
    PagedCache,
    extract_layer_index,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    logger,
)

if TYPE_CHECKING:
    from prefill_service.kv.vllm_connector.vllm_names import KVCacheConfig, VllmConfig

_IDLE_S = 0.02
_JOIN_S = 5.0


class WorkerSide:
    """State of the connector in one worker.

    Args:
        vllm_config: holds the attention layers.
        kv_cache_config: the one group of layers and its block size.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._cache = PagedCache(vllm_config, kv_cache_config)
        self._done = threading.Condition()
        self._active: dict[str, _LoadThread] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()

    def start_loads(self, metadata: LoadMetadata) -> None:
        """Start the loads of this step; they run beside the model."""
        for load in metadata.loads:
            thread = _LoadThread(self, load)
            with self._done:
                self._active[load.request_id] = thread
            thread.start()

    def take_results(self, ended: set[str], idle: bool) -> tuple[set[str], set[str]]:
        """Requests whose load has ended since the last call, and those among them that failed.

        Args:
            ended: requests that finished in the scheduler; their loads are cancelled.
            idle: nothing else is computed: wait a little rather than spin through steps.
        """
        with self._done:
            for request_id in ended & self._active.keys():
                self._active[request_id].cancel()
            if idle and self._active and not self._finished:
                self._done.wait(_IDLE_S)
            finished = self._finished
            self._finished = set()
            failed = self._failed
            self._failed = set()
        return finished, failed

    def shutdown(self) -> None:
        """Cancel all loads and wait for their threads."""
        with self._done:
            threads = list(self._active.values())
        for thread in threads:
            thread.cancel()
        for thread in threads:
            thread.join(_JOIN_S)

    def load_ended(self, load: Load, failed: bool) -> None:
        """Called by a load's thread as its last act."""
        with self._done:
            del self._active[load.request_id]
            self._finished.add(load.request_id)
            if failed:
                self._failed.add(load.request_id)
            self._done.notify_all()

    def write(self, load: Load, batch: PageBatch, block_ids: Tensor) -> None:
        """Write those tokens of a batch that the load wants, all layers."""
        first = batch.pages[0]
        last = batch.pages[-1]
        start = max(load.start_token, first.start_token)
        end = min(load.end_token, last.start_token + last.num_tokens)
        tokens = slice(start - first.start_token, end - first.start_token)
        position = torch.arange(start, end)  # [tokens]
        block_size = self._cache.block_size
        slots = block_ids[position // block_size] * block_size + position % block_size
        for name in self._cache.layer_names:
            # [pages, 2, page_tokens, heads, head_dim] -> [2, tokens, heads of this rank, head_dim]
            kv = batch.data[:, extract_layer_index(name)].transpose(0, 1).flatten(1, 2)[:, tokens]
            kv = kv[:, :, _heads(kv.shape[2], self._cache.num_heads(name))]
            self._cache.write(name, kv, slots)

    def stream(self) -> Any:
        """A context whose device work is ordered after what this thread has queued so far."""
        device = self._cache.device()
        if device.type != "cuda":
            return nullcontext()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


class _LoadThread(threading.Thread):
    """One load, from the first page to the report."""

    def __init__(self, side: WorkerSide, load: Load) -> None:
        super().__init__(name=f"kv-load-{load.request_id}", daemon=True)
        self._side = side
        self._load = load
        self._clients = [PageClient(part.manifest, part.lease_id) for part in load.parts]
        self._stream = side.stream()
        self._bytes = 0

    def cancel(self) -> None:
        """Stop soon; nothing is written once the load is reported as ended."""
        for client in self._clients:
            client.cancel()

    def run(self) -> None:
        load = self._load
        begin = time.perf_counter()
        error = None
        try:
            self._transfer()
        except ServiceError as caught:
            error = caught
        except Exception as caught:
            logger.exception("load of request %s", load.request_id)
            error = ServiceError(Reason.HANDOFF_FAILED, f"cannot write KV: {caught!r}")
        seconds = time.perf_counter() - begin
        tokens = 0 if error else load.end_token - load.start_token
        if error is None:
            logger.info(
                "request %s: loaded tokens [%d, %d), %.1f MB in %.3f s",
                load.request_id,
                load.start_token,
                load.end_token,
                self._bytes / 1e6,
                seconds,
            )
        else:
            logger.error("request %s: load failed: %s", load.request_id, error)
        # A refusal was decided by the scheduler: one report is enough.
        if load.error is None or get_tensor_model_parallel_rank() == 0:
            details = None if error is None else error.to_dict()
            report = HandoffReport(
                lease_id=load.lease_id,
                ok=error is None,
                tokens=tokens,
                bytes=self._bytes,
                seconds=seconds,
                error=details,
            )
            send_report(load.report_to, report)
        self._side.load_ended(load, failed=error is not None)

    def _transfer(self) -> None:
        load = self._load
        if load.error is not None:
            raise ServiceError.from_dict(load.error)
        block_ids = torch.tensor(load.block_ids)
        with self._stream:
            for client in self._clients:
                with client:
                    for batch in client.fetch(load.start_token, load.end_token):
                        self._side.write(load, batch, block_ids)
                        self._bytes += batch.data.nbytes
            if isinstance(self._stream, torch.cuda.StreamContext):
                torch.cuda.current_stream().synchronize()


def _heads(total: int, mine: int) -> slice:
    """KV heads of this tensor-parallel rank; ranks share a head if there are too few."""
    rank = get_tensor_model_parallel_rank()
    size = get_tensor_model_parallel_world_size()
    first = rank * total // size
    if max(1, total // size) != mine:
        raise ServiceError(
            Reason.KV_MISMATCH,
            f"{total} KV heads over {size} tensor-parallel ranks; vLLM's layer has {mine}",
            heads=total,
            ranks=size,
            layer_heads=mine,
        )
    return slice(first, first + mine)
