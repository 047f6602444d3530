"""vLLM's scheduler, with long prefills in chunks that leave short questions their time.

    --scheduler-cls prefill_service.kv.vllm_connector.fair_scheduler.make_scheduler
    --kv-transfer-config '{..., "kv_connector_extra_config":
      {"prefill_step_s": 0.1, "prefill_share": 0.33}}'

vLLM's own bounds are numbers of tokens, ``max_num_batched_tokens`` and
``long_prefill_token_threshold``. A request that runs is served before those that wait, so a prompt
longer than the budget takes the whole of every step. The threshold bounds short prompts too, and
nothing at all while a request is alone, so that the next one waits for a full step. Here
``PrefillPacer`` sets both for each step, from what steps have taken.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from prefill_service.kv.vllm_connector.connector import PrefillConnector
from prefill_service.kv.vllm_connector.prefill_pacer import Prefill, PrefillPacer
from prefill_service.kv.vllm_connector.vllm_names import (
    AsyncScheduler,
    RequestStatus,
    Scheduler,
    check_scheduler,
)

if TYPE_CHECKING:
    from prefill_service.kv.vllm_connector.vllm_names import (
        EngineCoreOutputs,
        ModelRunnerOutput,
        Request,
        SchedulerOutput,
        VllmConfig,
    )

STEP_S = 0.1
SHARE = 0.33


def make_scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: one for each way in which it overlaps steps."""
    fair = FairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else FairScheduler
    return fair(vllm_config=vllm_config, **arguments)


class FairScheduler(Scheduler):
    """Sets the bounds of each step and times it."""

    def __init__(self, vllm_config: VllmConfig, **arguments: Any) -> None:
        super().__init__(vllm_config=vllm_config, **arguments)
        check_scheduler(self)
        self._pacer = _make_pacer(vllm_config)
        self._step_tokens = self.max_num_scheduled_tokens
        # Begin of each step under way, the work of its prefills, and how many requests decode.
        self._steps: deque[tuple[float, float, int]] = deque()
        self._last_end = 0.0
        self._passed_over: set[str] = set()

    def schedule(self, *arguments: Any, **keywords: Any) -> SchedulerOutput:
        """Schedule a step of vLLM within the pacer's bounds."""
        begin = time.monotonic()
        running = {request.request_id: _prefill(request, 0) for request in self.running}
        prefills = [prefill for prefill in running.values() if prefill.tokens > 1]
        startable = self._startable()
        waiting = [
            prefill
            for name, prefill in startable.items()
            if name not in self._passed_over and prefill.tokens > 0
        ]
        limits = self._pacer.limit_step(prefills, waiting, len(running) - len(prefills))
        self.scheduler_config.long_prefill_token_threshold = limits.request_tokens
        bound = limits.step_tokens or self._step_tokens
        self.max_num_scheduled_tokens = min(bound, self._step_tokens)
        withheld: set[str] = set()
        # Without them more requests could start than the model runner has rows for.
        if limits.withhold_long and len(self.requests) <= self.max_num_running_reqs:
            withheld = {name for name, left in running.items() if self._pacer.is_long(left)}
        output = self._schedule_without(withheld, *arguments, **keywords)
        # What vLLM has no room for is no reason to withhold the others again.
        self._passed_over = startable.keys() & self._startable().keys()
        if output.total_num_scheduled_tokens:
            self._steps.append((begin, *self._measure(output)))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Let the pacer learn from a finished step, then do what vLLM does."""
        if scheduler_output.total_num_scheduled_tokens and self._steps:
            begin, work, decoding = self._steps.popleft()
            end = time.monotonic()
            self._pacer.learn(end - max(begin, self._last_end), work, decoding)
            self._last_end = end
        return super().update_from_output(scheduler_output, model_runner_output)

    def _schedule_without(
        self, withheld: set[str], *arguments: Any, **keywords: Any
    ) -> SchedulerOutput:
        if not withheld:
            return super().schedule(*arguments, **keywords)
        order = {request.request_id: i for i, request in enumerate(self.running)}
        held = [request for request in self.running if request.request_id in withheld]
        self.running = [r for r in self.running if r.request_id not in withheld]
        try:
            return super().schedule(*arguments, **keywords)
        finally:
            self.running = sorted(
                [*held, *self.running], key=lambda r: order.get(r.request_id, len(order))
            )

    def _measure(self, output: SchedulerOutput) -> tuple[float, int]:
        """Work of a step's prefills, and how many of its requests decode."""
        work = 0.0
        decoding = 0
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            if tokens == 1 and not request.is_prefill_chunk:
                decoding += 1
                continue
            before = request.num_computed_tokens - tokens  # vLLM counts them as computed already
            work += self._pacer.work(Prefill(before, tokens), tokens)
        return work, decoding

    def _startable(self) -> dict[str, Prefill]:
        """Waiting requests that do not wait for their KV, and what they have to compute."""
        found = {}
        for request in [*self.kv_holding_waiting, *self.waiting]:
            name = request.request_id
            loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            if not loading or name in self.finished_recving_kv_req_ids:
                found[name] = _prefill(request, self._offered(name))
        return found

    def _offered(self, name: str) -> int:
        """Tokens that the connector brings for a request."""
        if not isinstance(self.connector, PrefillConnector):
            return 0
        return self.connector.scheduler_side.offered_tokens(name)


class FairAsyncScheduler(FairScheduler, AsyncScheduler):
    """The same, where a step is scheduled while the one before it runs."""


def _prefill(request: Request, offered: int) -> Prefill:
    computed = max(request.num_computed_tokens, offered)
    return Prefill(computed, request.num_tokens - computed)


def _make_pacer(vllm_config: VllmConfig) -> PrefillPacer:
    transfer = vllm_config.kv_transfer_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    return PrefillPacer(
        float(extra.get("prefill_step_s", STEP_S)),
        float(extra.get("prefill_share", SHARE)),
        _linear_tokens(vllm_config.model_config.hf_text_config),
    )


def _linear_tokens(config: Any) -> float:
    """Operations of a token's linear layers over those of its attention to one key."""
    hidden = int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    q_width = int(config.num_attention_heads) * head_dim
    kv_width = int(config.num_key_value_heads) * head_dim
    experts = int(getattr(config, "num_experts_per_tok", None) or 0)
    mlp = experts * int(config.moe_intermediate_size) if experts else int(config.intermediate_size)
    return (2 * hidden * (q_width + kv_width) + 3 * hidden * mlp) / (2 * q_width)
