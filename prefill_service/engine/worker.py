"""The process of one rank: forked, or ``python -m prefill_service.engine.worker FD``.

FD is the worker's end of a socket pair; the first message on it is a ``WorkerSpec``. With
``--fork-server FD`` the module is what workers are forked from, and serves requests for them.
The main thread of a worker computes, one task after another or one in the pause of another; one
thread listens to the front end, one sends heartbeats, one (``PageServer``) serves pages. When the
front end goes away, the worker exits.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from prefill_service.attention.crossover import measure_crossover
from prefill_service.attention.settings import SparseSettings
from prefill_service.config import AUTO, HEARTBEAT_S
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine import messages as msg
from prefill_service.engine.agreement import CollectiveStatus, TaskAborted, TaskControl
from prefill_service.engine.baseline_prefill import BaselinePrefill
from prefill_service.engine.chunked_prefill import ChunkedPrefill
from prefill_service.engine.processes.fork_server import FORK_SERVER, serve_forks
from prefill_service.engine.resolve import chunk_tokens, kv_layout, sparse_settings
from prefill_service.engine.startup_probe import probe_ranks
from prefill_service.engine.task import BuildMethod, WorkerContext, run_task
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport_registry import find_transport
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.mesh import form_subgroup_meshes
from prefill_service.parallel.process_group import SPGroup, form_group
from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from prefill_service.video.decoder.pool import DecoderPool

logger = logging.getLogger("prefill_service.engine.worker")  # __name__ is "__main__" here

NICENESS = 5
"""On a CPU, whose cores they share, answers go before prefills, unless an operator has set another
niceness."""


class Worker:
    """One rank: its model, its pages and its process groups.

    Args:
        spec: its rank, its epoch and the configuration.
        pipe: to the front end.
    """

    def __init__(self, spec: msg.WorkerSpec, pipe: Connection) -> None:
        self._spec = spec
        self._pipe = pipe
        self._send_lock = threading.Lock()
        self._inbox: queue.Queue[msg.StartTask | msg.ResumeTask | None] = queue.Queue()
        self._controls: dict[str, TaskControl] = {}
        self._contexts: dict[Subgroup, WorkerContext] = {}
        self._store = ShardStore(kv_layout(spec.checkpoint, spec.dtype, spec.engine), spec.epoch)
        self._units_done = 0
        self._busy = False
        self._serving = False

    def run(self) -> None:
        """Load the model, join the process groups, and serve until ``Shutdown``."""
        spec = self._spec
        torch.set_num_threads(spec.threads)
        device, shared = _choose_device(spec)
        if device.type == "cpu" and os.nice(0) == 0:
            os.nice(NICENESS)
        model = PrefillModel(
            spec.checkpoint, getattr(torch, spec.dtype), device, spec.engine.mlp_chunk_tokens
        )
        group = form_group(
            spec.rank,
            spec.engine.ranks,
            init_method=spec.init_method,
            device=device,
            timeout_s=spec.engine.collective_timeout_s,
            staged=shared,
        )
        observed = self._probe(model, group)
        sparse = sparse_settings(spec.engine, self._sparse_from_tokens(model, group))
        logger.info("sparse attention from %d keys on", sparse.from_tokens)
        decoders = DecoderPool(spec.video.spare_decoders)
        decoders.start()
        self._contexts = self._form_contexts(model, group, decoders, sparse)
        transport = find_transport(spec.engine.kv_transport)
        name = f"e{spec.epoch}r{spec.rank}"
        server = transport.serve(self._store, Path(spec.runtime_dir), name)
        server.start()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        self._send(
            msg.WorkerReady(
                rank=spec.rank,
                endpoint=server.endpoint,
                device=str(device),
                sparse_from_tokens=sparse.from_tokens,
                observed=observed,
            )
        )
        self._serving = True
        try:
            self._serve()
        finally:
            server.close()
            decoders.close()

    def report_crash(self, error: Exception) -> None:
        """Send the front end the reason why this worker exits.

        Once it serves, any error is reported as the death of a rank. Other ranks' tasks end with
        it, and the reason of this one would pass for theirs.
        """
        if self._serving or not isinstance(error, ServiceError):
            why = error if isinstance(error, ServiceError) else repr(error)
            text = f"rank {self._spec.rank} failed: {why}"
            error = ServiceError(Reason.RANK_DIED, text, rank=self._spec.rank)
        self._send(msg.WorkerCrashed(self._spec.rank, error.to_dict()))

    # ---- start-up --------------------------------------------------------------------------

    def _probe(self, model: PrefillModel, group: SPGroup) -> tuple[Observation, ...]:
        """What this rank measures of its device and links, if the exchange is ``auto``."""
        if self._spec.engine.exchange != AUTO:
            return ()
        return probe_ranks(model.shape, group, model.device)

    def _sparse_from_tokens(self, model: PrefillModel, group: SPGroup) -> int:
        """Prompt length from which attention is sparse: as configured, else as measured.

        The slowest rank decides, so that all of them report one number.
        """
        engine = self._spec.engine
        return group.all_reduce_max(engine.sparse_from_tokens or self._measure_crossover(model))

    def _measure_crossover(self, model: PrefillModel) -> int:
        spec = self._spec
        sizes = sparse_settings(spec.engine, 0)
        chunk = chunk_tokens(spec.engine, model.device.type)
        return measure_crossover(model.shape, sizes, chunk, model.device)

    def _form_contexts(
        self, model: PrefillModel, group: SPGroup, decoders: DecoderPool, sparse: SparseSettings
    ) -> dict[Subgroup, WorkerContext]:
        """One context for each subgroup that this rank is in. Every rank calls it."""
        engine = self._spec.engine
        subgroups = form_subgroups(engine.ranks, engine.elastic)
        meshes = form_subgroup_meshes(group, subgroups, engine.collective_timeout_s)
        return {
            subgroup: WorkerContext(
                spec=self._spec,
                model=model,
                store=self._store,
                decoders=decoders,
                sparse=sparse,
                meshes=subgroup_meshes,
                send=self._send,
                report_progress=self._count_unit,
            )
            for subgroup, subgroup_meshes in meshes.items()
        }

    # ---- tasks -----------------------------------------------------------------------------

    def _serve(self, paused: str = "") -> None:
        """Run tasks until ``Shutdown``; in the pause of task ``paused``, until it may go on."""
        while (message := self._inbox.get()) is not None:
            match message:
                case msg.StartTask(task):
                    self._busy = True
                    self._run_task(task)
                    self._busy = False
                case msg.ResumeTask(job_id) if job_id == paused:
                    return
        if paused:
            self._inbox.put(None)  # for the loop that runs the paused task

    def _yield_ranks(self, job_id: str) -> None:
        """Run what the front end sends, until the paused task may go on."""
        self._busy = False  # waiting for work is no stall, however long it lasts
        self._send(msg.TaskPaused(job_id, self._spec.rank))
        self._serve(paused=job_id)
        self._busy = True

    def _run_task(self, task: msg.PrefillTask) -> None:
        try:
            answer = self._compute(self._contexts[task.subgroup], task)
        finally:
            self._controls.pop(task.job_id, None)
        self._send(answer)

    def _compute(
        self, context: WorkerContext, task: msg.PrefillTask
    ) -> msg.RankDone | msg.RankFailed:
        """Compute this rank's part of a task; what is not agreed among ranks ends the worker."""
        try:
            # Every rank finds the same, so that none starts what another refuses.
            context.kv_budget(task.exchange).check(task.plan.num_tokens)
        except ServiceError as refusal:
            return msg.RankFailed(task.job_id, self._spec.rank, refusal.to_dict())
        build: BuildMethod = ChunkedPrefill.build
        if task.baseline is not None:
            build = BaselinePrefill.build
        elif task.base is not None:
            build = ChunkedPrefill.build_text
        try:
            return run_task(context, task, self._controls[task.job_id], build)
        except TaskAborted as aborted:
            cancelled = aborted.status is CollectiveStatus.CANCELLED
            text = "the job was cancelled" if cancelled else "another rank failed"
            error = aborted.error or ServiceError(Reason.CANCELLED, text)
            return msg.RankFailed(task.job_id, self._spec.rank, error.to_dict())

    # ---- messages --------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                self._handle(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the front end is gone, and with it whoever would wait for us

    def _handle(self, message: object) -> None:
        match message:
            case msg.StartTask(task):
                self._controls[task.job_id] = TaskControl(
                    cancelled=threading.Event(),
                    pause=threading.Event(),
                    yield_ranks=partial(self._yield_ranks, task.job_id),
                )
                self._inbox.put(message)
            case msg.CancelTask(job_id):
                if control := self._controls.get(job_id):
                    control.cancelled.set()
            case msg.PauseTask(job_id):
                if control := self._controls.get(job_id):
                    control.pause.set()
            case msg.ResumeTask():
                self._inbox.put(message)
            case msg.GrantLease(prefix_id, lease_id, ttl_s):
                self._store.grant_lease(prefix_id, lease_id, ttl_s)
            case msg.ReleaseLease(prefix_id, lease_id):
                self._store.release_lease(prefix_id, lease_id)
            case msg.DropPrefix(prefix_id):
                self._store.drop_prefix(prefix_id)
            case msg.Shutdown():
                for control in list(self._controls.values()):
                    control.cancelled.set()
                self._inbox.put(None)

    def _beat(self) -> None:
        never = threading.Event()
        while not never.wait(HEARTBEAT_S):
            self._send(msg.Heartbeat(self._spec.rank, self._units_done, self._busy))

    def _count_unit(self) -> None:
        self._units_done += 1

    def _send(self, message: object) -> None:
        with self._send_lock:
            self._pipe.send(message)


def _choose_device(spec: msg.WorkerSpec) -> tuple[torch.device, bool]:
    """This rank's device, and whether ranks share GPUs, so that NCCL cannot connect them."""
    if spec.device != "cuda":
        return torch.device("cpu"), False
    count = torch.cuda.device_count()
    device = torch.device(f"cuda:{spec.rank % count}")
    torch.cuda.set_device(device)
    if spec.engine.ranks > count:
        logger.warning(
            "%d ranks share %d GPUs: what they exchange goes through the host",
            spec.engine.ranks,
            count,
        )
    return device, spec.engine.ranks > count


def run_worker(descriptor: int) -> NoReturn:
    """Read the spec from this end of a socket pair and run the worker."""
    # Ctrl-C reaches the whole foreground process group; the front end decides when to leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(descriptor)
    spec: msg.WorkerSpec = pipe.recv()
    logging.basicConfig(
        level=os.environ.get("PREFILL_LOG_LEVEL", "INFO"),
        format=f"%(asctime)s %(levelname)s rank{spec.rank} %(name)s: %(message)s",
    )
    transformers_logging: Any = transformers.utils.logging
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    worker = Worker(spec, pipe)
    code = 0
    try:
        worker.run()
    except Exception as error:
        logger.exception("rank %d failed", spec.rank)
        worker.report_crash(error)
        code = 1
    # Exit without tearing down: a peer may be blocked in a collective with this worker, and the
    # process group's tear-down would wait for it.
    logging.shutdown()
    os._exit(code)


def main() -> None:
    """Be one worker, or fork as many as are asked for."""
    *option, descriptor = sys.argv[1:]
    if option == [FORK_SERVER]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with socket.socket(fileno=int(descriptor)) as control:
            serve_forks(control, run_worker)
    else:
        run_worker(int(descriptor))


if __name__ == "__main__":
    main()
