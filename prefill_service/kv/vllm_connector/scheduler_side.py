"""The connector in vLLM's scheduler: which tokens it offers, and which requests it refuses.

A request of ours must never reach the model runner without its prefix: its item carries only
the grid, and vLLM dies if it has to compute a vision token. So a request that cannot be
served is not passed over: the connector claims its whole prompt and lets the worker report
that load as failed, which ends this request alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.fingerprint import fingerprint_model
from prefill_service.kv.handoff import (
    PARAMS_KEY,
    HandoffParams,
    HandoffReport,
    IntakeReport,
    LeasedPages,
)
from prefill_service.kv.handoff_reports import send_report
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.kv.vllm_connector.vllm_names import (
    KVConnectorMetadata,
    Prompt,
    block_ids,
    claim_prefix_cache,
    computed_tokens,
    computes_nothing,
    logger,
    prompt,
    served_model,
)

if TYPE_CHECKING:
    from prefill_service.kv.vllm_connector.vllm_names import (
        KVCacheBlocks,
        Request,
        SchedulerOutput,
        VllmConfig,
    )

INTAKE_REPORT_S = 1.0
"""Seconds between two reports of how far vLLM is with a prompt."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens ``[start_token, end_token)`` to bring into a request's blocks.

    Attributes:
        block_ids: the request's blocks, from token 0.
        parts: pages that have the tokens, in their order.
        error: set if the request is to be refused instead (``ServiceError.to_dict``).
    """

    request_id: str
    start_token: int
    end_token: int
    block_ids: list[int]
    parts: tuple[LeasedPages, ...]
    lease_id: str
    report_to: str
    error: dict[str, Any] | None = None


@dataclass
class LoadMetadata(KVConnectorMetadata):
    """What the scheduler's connector tells the workers' in one step."""

    loads: list[Load] = field(default_factory=list)
    idle: bool = False
    """Nothing is computed in this step."""


@dataclass
class _Offer:
    """One request of ours, from its arrival to its end."""

    manifest: Manifest | None
    parts: tuple[LeasedPages, ...]
    lease_id: str
    report_to: str
    error: ServiceError | None
    prompt_tokens: int
    computed_tokens: int = 0  # with those of the step that was scheduled last
    settled: bool = False  # a load was ordered, or none was needed and that was reported
    reported_at: float = -math.inf


class SchedulerSide:
    """State of the connector in the EngineCore process.

    Args:
        vllm_config: names the model the manifests must fit.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = served_model(vllm_config)
        self._model_shape = (model.num_layers, model.num_kv_heads, model.head_dim)
        self._fingerprint = _fingerprint(model.name)
        self._offers: dict[str, _Offer] = {}
        self._pending: list[Load] = []

    def on_new_request(self, request: Request) -> None:
        """Check a request of ours once; others pass untouched. Never raises."""
        received = prompt(request)
        params = received.transfer_params
        if not isinstance(params, dict) or params.get(PARAMS_KEY) is None:
            return
        entry = params[PARAMS_KEY] if isinstance(params[PARAMS_KEY], dict) else {}
        offer = _Offer(
            manifest=None,
            parts=(),
            lease_id=str(entry.get("lease_id", "")),
            report_to=str(entry.get("report_to", "")),
            error=None,
            prompt_tokens=received.num_tokens,
        )
        try:
            handoff = HandoffParams.from_kv_transfer_params(params)
            assert handoff is not None  # the key is there
            offer.manifest = handoff.manifest
            offer.parts = handoff.parts
            for part in handoff.parts:
                self._check_model(part.manifest)
            _check_prompt(handoff.manifest, received)
        except ServiceError as error:
            offer.error = error
        except Exception as error:  # whatever a client sent, the engine goes on
            offer.error = ServiceError(Reason.INVALID_REQUEST, f"hand-off parameters: {error}")
        if claim_prefix_cache(request):
            # vLLM would ignore the connector and compute the prefix (prompt_logprobs).
            offer.error = ServiceError(
                Reason.INVALID_REQUEST, "prompt_logprobs cannot be had over a handed-over prefix"
            )
        if offer.error is not None:
            logger.warning("request %s is refused: %s", request.request_id, offer.error)
        self._offers[request.request_id] = offer

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens to load beyond those in vLLM's own cache, always asynchronously."""
        offer = self._offers.get(request.request_id)
        if offer is None:
            return 0, False
        if offer.error is not None or offer.manifest is None:
            return prompt(request).num_tokens - num_computed_tokens, True
        missing = offer.manifest.num_tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def offered_tokens(self, request_id: str) -> int:
        """Tokens of a request that are loaded instead of computed; 0 if it is not one of ours."""
        offer = self._offers.get(request_id)
        if offer is None or offer.error is not None or offer.manifest is None:
            return 0
        return offer.manifest.num_tokens

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Order the load, now that the request has blocks."""
        offer = self._offers.get(request.request_id)
        if offer is None:
            return
        if num_external > 0:
            end = prompt(request).num_tokens
            if offer.error is None and offer.manifest is not None:
                end = offer.manifest.num_tokens
            error = None if offer.error is None else offer.error.to_dict()
            load = Load(
                request_id=request.request_id,
                start_token=end - num_external,
                end_token=end,
                block_ids=block_ids(blocks),
                parts=offer.parts,
                lease_id=offer.lease_id,
                report_to=offer.report_to,
                error=error,
            )
            self._pending.append(load)
        elif not offer.settled:
            report = HandoffReport(lease_id=offer.lease_id, ok=True, tokens=0, bytes=0, seconds=0.0)
            threading.Thread(
                target=send_report, args=(offer.report_to, report), daemon=True
            ).start()
        offer.settled = True

    def build_meta(self, scheduler_output: SchedulerOutput) -> LoadMetadata:
        """The loads ordered in this step."""
        idle = computes_nothing(scheduler_output)
        if not idle:
            self._report_intake(scheduler_output)
        metadata = LoadMetadata(self._pending, idle)
        self._pending = []
        return metadata

    def loads_failed(self, request_ids: set[str]) -> None:
        """Never offer a source again that failed for this request."""
        for request_id in request_ids:
            offer = self._offers.get(request_id)
            if offer is not None and offer.error is None:
                offer.error = ServiceError(
                    Reason.HANDOFF_FAILED, "the load failed before", lease_id=offer.lease_id
                )

    def finished(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._offers.pop(request_id, None)

    def _report_intake(self, scheduler_output: SchedulerOutput) -> None:
        """Say how far the prompts are that this step does not complete, once a second each.

        Prompts that wait for others are among them: the engine computes, and their turn comes.
        """
        computed = computed_tokens(scheduler_output)
        now = time.monotonic()
        reports = []
        for request_id, offer in self._offers.items():
            if request_id in computed:
                offer.computed_tokens = computed[request_id]
            late = now > offer.reported_at + INTAKE_REPORT_S
            if late and offer.computed_tokens < offer.prompt_tokens:
                offer.reported_at = now
                report = IntakeReport(offer.lease_id, offer.computed_tokens, offer.prompt_tokens)
                reports.append((offer.report_to, report))
        if reports:
            threading.Thread(target=_send_all, args=(reports,), daemon=True).start()

    def _check_model(self, manifest: Manifest) -> None:
        layout = manifest.layout
        offered = (layout.num_layers, layout.kv_heads, layout.head_dim)
        if offered != self._model_shape:
            names = "layers, KV heads, head size"
            raise ServiceError(
                Reason.KV_MISMATCH,
                f"the manifest's KV has ({names}) = {offered}, vLLM's model {self._model_shape}",
                offered=offered,
                model=self._model_shape,
            )
        if self._fingerprint and manifest.model_fingerprint != self._fingerprint:
            raise ServiceError(
                Reason.KV_MISMATCH,
                f"the KV is of checkpoint {manifest.model_fingerprint[:16]}, vLLM has loaded "
                f"{self._fingerprint[:16]}",
                offered=manifest.model_fingerprint,
                model=self._fingerprint,
            )


def _send_all(reports: Sequence[tuple[str, IntakeReport]]) -> None:
    for address, report in reports:
        send_report(address, report)


def _fingerprint(model: str) -> str:
    """Fingerprint of the checkpoint vLLM has loaded; empty, with a warning, if it is not found."""
    try:
        folder = Path(model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, local_files_only=True))
        return fingerprint_model(folder)
    except Exception as error:
        logger.warning("%s: KV of other weights cannot be told apart: %s", model, error)
        return ""


def _check_prompt(manifest: Manifest, received: Prompt) -> None:
    """The prompt must begin with exactly the manifest's tokens and end its media there."""
    token_ids = received.token_ids
    if len(token_ids) <= manifest.num_tokens:
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"the prompt has {len(token_ids)} tokens; prefix {manifest.prefix_id} alone has "
            f"{manifest.num_tokens}, and at least one more is needed",
            prompt_tokens=len(token_ids),
            prefix_tokens=manifest.num_tokens,
        )
    actual = hash_token_ids(token_ids[: manifest.num_tokens])
    if actual != manifest.token_ids_hash:
        raise ServiceError(
            Reason.KV_MISMATCH,
            f"the prompt's first {manifest.num_tokens} tokens have hash {actual[:16]}, prefix "
            f"{manifest.prefix_id} has {manifest.token_ids_hash[:16]}",
            prefix_id=manifest.prefix_id,
            actual=actual,
            expected=manifest.token_ids_hash,
        )
    if manifest.position_delta != 0 and not received.media_ends:
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"prefix {manifest.prefix_id} has position delta {manifest.position_delta}, but the "
            "request has no multimodal item to derive it from",
            position_delta=manifest.position_delta,
        )
    for end in received.media_ends:
        if end > manifest.num_tokens:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"a multimodal item ends at token {end}, beyond the prefix's "
                f"{manifest.num_tokens} tokens",
                end=end,
                prefix_tokens=manifest.num_tokens,
            )
