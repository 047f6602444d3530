"""The service: everything wired, started, watched and stopped in the right order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefill_service.api.answer_service import AnswerServicer
from prefill_service.api.grpc_server import ApiServer
from prefill_service.api.metrics_server import MetricsServer
from prefill_service.api.prefill_service import PrefillServicer
from prefill_service.api.servicer import ServedService
from prefill_service.api.video_service import VideoServicer
from prefill_service.config import AUTO, ServiceConfig
from prefill_service.kv.handoff_reports import ReportServer
from prefill_service.runtime_folder import RuntimeFolder
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.answering.answers import Answers
from prefill_service.scheduling.job_store import JobStore
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.scheduler import Scheduler
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.store import VideoStore

if TYPE_CHECKING:
    from prefill_service.attention.head_budgets import HeadBudgets
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.engine.supervisor import WorkerSupervisor
    from prefill_service.generation.server import GenerationServer
    from prefill_service.kv.budget import KVBudget
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.scheduling.exchange_chooser import ExchangeChooser

logger = logging.getLogger(__name__)

SWEEP_S = 600.0
REMOTE_VLLM_WAIT_S = 30.0
"""How long an answer waits for a vLLM that is not ours to restart."""


@dataclass(slots=True)
class Components:
    """What does the work behind the API."""

    planner: PrefixPlanner
    executor: PrefillExecutor
    generation: GenerationServer
    submit_early: bool = True
    budgets: HeadBudgets | None = None
    memory: KVBudget | None = None
    exchanges: ExchangeChooser | None = None


def build_components(config: ServiceConfig, data_dir: Path, runtime_dir: Path) -> Components:
    """Make the real components; blocking, loads torch and transformers but no weights.

    Raises:
        ServiceError: MODEL_INVALID, CONFIG_INVALID.
    """
    from prefill_service.attention.head_budgets import load_head_budgets
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.engine.resolve import kv_budget
    from prefill_service.generation.server import GenerationServer
    from prefill_service.models.checkpoint import open_checkpoint, resolve_device, resolve_dtype
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.scheduling.exchange_chooser import ExchangeChooser

    engine = config.engine
    checkpoint = open_checkpoint(engine.model)
    device = resolve_device(engine.device)
    dtype = resolve_dtype(engine.dtype, checkpoint, device)
    budgets = None
    if engine.head_budgets:
        path = Path(engine.head_budgets).expanduser()
        shape = (checkpoint.shape.attending_layers, checkpoint.shape.kv_heads)
        budgets = load_head_budgets(path, checkpoint.fingerprint, shape=shape)
    executor = PrefillExecutor(
        engine, config.video, checkpoint, dtype, device=device, runtime_dir=runtime_dir
    )
    memory = kv_budget(engine, checkpoint, dtype, device=device)
    exchanges = None
    if engine.exchange == AUTO:
        exchanges = ExchangeChooser(
            replace(checkpoint.shape, dtype=dtype),
            executor.chunk_tokens,
            memory.working_bytes,
            lambda: executor.supervisor.observed,
            block_tokens=engine.sparse_block_tokens,
        )
    return Components(
        planner=PrefixPlanner(
            checkpoint, dtype, generation_config=config.vllm.generation_config == AUTO
        ),
        executor=executor,
        generation=GenerationServer(
            config.vllm,
            str(checkpoint.path),
            dtype,
            data_dir,
            runtime_dir=runtime_dir,
            fp8=checkpoint.fp8 is not None,
        ),
        submit_early=device != "cpu",
        budgets=budgets,
        memory=memory,
        exchanges=exchanges,
    )


class Service:
    """One service process.

    Args:
        config: validated configuration.
        build: makes the components; tests give their own.

    Attributes:
        started: set once everything is ready.
        port, metrics_port: where it listens, 0 before.
    """

    def __init__(
        self,
        config: ServiceConfig,
        build: Callable[[ServiceConfig, Path, Path], Components] = build_components,
    ) -> None:
        self._config = config
        self._build = build
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self.started = asyncio.Event()
        self.port = 0
        self.metrics_port = 0
        self._server: ApiServer | None = None
        self._scheduler: Scheduler | None = None

    def shut_down(self) -> None:
        """Drain and stop; called a second time: stop at once."""
        (self._at_once if self._stop.is_set() else self._stop).set()

    async def run(self, announce: Callable[[str], None] = logger.info) -> None:
        """Serve until SIGTERM, SIGINT or ``shut_down``; nothing is left running afterwards.

        Args:
            announce: gets one line once everything is ready.

        Raises:
            ServiceError: why it could not start.
        """
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.shut_down)
                stack.callback(loop.remove_signal_handler, number)
            starting = asyncio.create_task(self._start(stack))
            stopping = asyncio.create_task(self._stop.wait())
            stack.callback(stopping.cancel)
            try:
                await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                starting.cancel()
                await asyncio.wait({starting})
            if starting.cancelled():
                return
            announce(starting.result())
            self.started.set()
            await stopping
            logger.info("shutting down")
            assert self._scheduler is not None
            assert self._server is not None
            self._scheduler.drain()
            await self._server.drain(self._config.server.drain_seconds, self._at_once)
        logger.info("stopped")

    async def _start(self, stack: AsyncExitStack) -> str:
        """Start everything; ``stack`` stops it in the reverse order."""
        config = self._config
        data_dir = Path(config.storage.data_dir).expanduser()  # noqa: ASYNC240 (start-up)
        runtime = RuntimeFolder.create()
        stack.callback(runtime.remove)
        runtime_dir = runtime.path
        # Judges the checkpoint: before any process starts or a file is written.
        components = await asyncio.to_thread(self._build, config, data_dir, runtime_dir)
        decoders = DecoderPool(config.video.spare_decoders, folder=runtime_dir)
        decoders.start()
        stack.callback(decoders.close)
        videos = VideoStore.open(config.storage, config.video, decoders)  # locks the data directory
        stack.push_async_callback(videos.close)
        supervisor = components.executor.supervisor
        generation = components.generation
        store = JobStore.open(data_dir / "jobs.db")
        stack.callback(store.close)
        reports = ReportServer(runtime_dir / "reports.sock")
        await reports.start()
        stack.push_async_callback(reports.stop)
        parts = _put_together(config, components, videos=videos, store=store, reports=reports)
        stack.callback(parts.admission.close)
        scheduler = self._scheduler = parts.scheduler
        server = self._server = ApiServer(config.server, parts.services, parts.metrics)
        self.port = server.bind()
        if config.server.metrics_address:
            exporter = MetricsServer(config.server.metrics_address, parts.metrics.registry)
            self.metrics_port = await exporter.start()
            stack.push_async_callback(exporter.stop)
        stack.push_async_callback(_stop_both, supervisor, generation)
        scheduler.recover()
        stack.push_async_callback(scheduler.stop)
        await server.start()
        stack.push_async_callback(server.stop)
        sweeper = asyncio.create_task(_sweep(videos, scheduler), name="sweeper")
        stack.callback(sweeper.cancel)
        await _start_both(supervisor, generation)
        scheduler.start()
        await server.update_health()
        tls = "TLS" if config.server.tls_cert else "plaintext"
        return (
            f"serving on {config.server.host}:{self.port} ({tls}): model {config.engine.model}, "
            f"{config.engine.ranks} ranks, vLLM {config.vllm.url or 'embedded'}, "
            f"context {parts.admission.limit} tokens"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What stands between the API's server and the components, none of it started."""

    admission: Admission
    scheduler: Scheduler
    metrics: Metrics
    services: list[ServedService]


def _put_together(
    config: ServiceConfig,
    components: Components,
    *,
    videos: VideoStore,
    store: JobStore,
    reports: ReportServer,
) -> _Parts:
    executor = components.executor
    generation = components.generation
    metrics = Metrics()
    admission = Admission(
        videos,
        components.planner,
        lambda: generation.max_model_len or config.vllm.max_model_len,
        budgets=components.budgets,
        memory=components.memory,
        ranks=config.engine.ranks,
        max_question_tokens=config.vllm.max_question_tokens,
    )
    scheduler = Scheduler(
        store,
        videos,
        admission,
        executor,
        config=config.engine,
        metrics=metrics,
        exchanges=components.exchanges,
    )
    answers = Answers(
        admission,
        scheduler,
        generation,
        reports,
        vllm_wait_s=REMOTE_VLLM_WAIT_S if config.vllm.url else config.vllm.start_timeout_s,
        submit_early=components.submit_early,
        metrics=metrics,
    )
    services = [
        ServedService(
            VideoServicer(
                videos,
                metrics,
                admission.review_frames,
                upload_idle_s=config.server.upload_idle_seconds,
            )
        ),
        ServedService(PrefillServicer(scheduler), lambda: executor.supervisor.ready),
        ServedService(
            AnswerServicer(answers), lambda: executor.supervisor.ready and generation.ready
        ),
    ]
    return _Parts(admission=admission, scheduler=scheduler, metrics=metrics, services=services)


async def _start_both(supervisor: WorkerSupervisor, generation: GenerationServer) -> None:
    """Start workers and vLLM at the same time; the first failure ends both starts."""
    tasks = [asyncio.create_task(one.start()) for one in (supervisor, generation)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _stop_both(supervisor: WorkerSupervisor, generation: GenerationServer) -> None:
    results = await asyncio.gather(supervisor.stop(), generation.stop(), return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            logger.error("unclean stop", exc_info=error)


async def _sweep(videos: VideoStore, scheduler: Scheduler) -> None:
    """Remove expired videos and abandoned uploads, and write what had no room, now and then."""
    while True:
        try:
            await videos.delete_expired()
            scheduler.jobs.write_unsaved()
        except Exception:
            logger.exception("sweeping expired videos failed")
        await asyncio.sleep(SWEEP_S)
