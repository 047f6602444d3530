"""The entry point of a rank process: ``python -m prefill_service.engine.worker FD``.

FD is the rank's end of a socket pair; the first message on it is a ``WorkerSpec``. The main thread
computes, one task after another or one inside the pause of another; one thread listens to the
front end, one sends heartbeats, one (``PageServer``) serves pages. When the front end goes away,
so does the rank.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from prefill_service.attention.crossover import measure_crossover
from prefill_service.config import AUTO, HEARTBEAT_S
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine import messages as msg
from prefill_service.engine.baseline_prefill import BaselinePrefill
from prefill_service.engine.chunked_prefill import ChunkedPrefill
from prefill_service.engine.resolve import (
    WorkerSpec,
    chunk_tokens,
    kv_budget,
    kv_layout,
    sparse_settings,
)
from prefill_service.engine.startup_probe import model_shape, probe_ranks
from prefill_service.engine.task import Status, TaskAborted, TaskControl, WorkerContext, run_task
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport_registry import find_transport
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.mesh import form_subgroup_meshes
from prefill_service.parallel.process_group import form_group
from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from prefill_service.video.decoder.pool import DecoderPool

logger = logging.getLogger("prefill_service.rank")


class Worker:
    """One rank: its model, its pages, its place in the group.

    Args:
        spec: what to be.
        pipe: to the front end.
    """

    def __init__(self, spec: WorkerSpec, pipe: Connection) -> None:
        self._spec = spec
        self._pipe = pipe
        self._send_lock = threading.Lock()
        self._inbox: queue.Queue[msg.Run | msg.Resume | None] = queue.Queue()
        self._controls: dict[str, TaskControl] = {}
        self._ticks = 0
        self._busy = self._serving = False

    def run(self) -> None:
        """Load, join the group, serve until told to leave."""
        contexts = self._contexts = self._load()
        context = next(iter(contexts.values()))
        self._store = context.store
        context.decoders.start()
        name = f"g{self._spec.generation}r{self._spec.rank}"
        transport = find_transport(self._spec.engine.kv_transport)
        server = transport.serve(context.store, Path(self._spec.runtime_dir), name)
        server.start()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        device = str(context.model.device)
        sparse_from = context.sparse.from_tokens
        self._send(msg.Ready(self._spec.rank, server.endpoint, device, sparse_from, self._observed))
        self._serving = True
        try:
            self._serve()
        finally:
            server.close()
            context.decoders.close()

    def crash(self, error: Exception) -> None:
        """Tell the front end why this rank leaves.

        Once it serves, whatever the error is, it is the death of a rank to those whose tasks end
        with it on other ranks: a reason would pass for their own.
        """
        if self._serving or not isinstance(error, ServiceError):
            why = error if isinstance(error, ServiceError) else repr(error)
            text = f"rank {self._spec.rank} failed: {why}"
            error = ServiceError(Reason.RANK_DIED, text, rank=self._spec.rank)
        self._send(msg.RankCrashed(self._spec.rank, error.to_dict()))

    def _serve(self, paused: str = "") -> None:
        """Run tasks until told to leave; inside the pause of one, until that one may go on."""
        while (message := self._inbox.get()) is not None:
            match message:
                case msg.Run(task):
                    self._busy = True
                    self._run_task(self._contexts[task.team], task)
                    self._busy = False
                case msg.Resume(job_id) if job_id == paused:
                    return
        if paused:
            self._inbox.put(None)  # for those that this one has interrupted

    def _stand_aside(self, job_id: str) -> None:
        """Run what the front end sends, then go on with the paused task."""
        self._busy = False  # waiting for work is no stall, however long it lasts
        self._send(msg.Paused(job_id, self._spec.rank))
        self._serve(paused=job_id)
        self._busy = True

    def _load(self) -> dict[Subgroup, WorkerContext]:
        spec = self._spec
        torch.set_num_threads(spec.threads)
        device, staged = _device(spec)
        layout = kv_layout(spec.checkpoint, spec.dtype, spec.engine)
        model = PrefillModel(
            spec.checkpoint, getattr(torch, spec.dtype), device, spec.engine.mlp_chunk_tokens
        )
        timeout_s = spec.engine.collective_timeout_s
        group = form_group(
            spec.rank, spec.engine.ranks, spec.init_method, device, timeout_s, staged
        )
        meshes = form_subgroup_meshes(
            group, form_subgroups(spec.engine.ranks, spec.engine.elastic), timeout_s
        )
        self._observed: tuple[Observation, ...] = ()
        if spec.engine.exchange == AUTO:
            shape = model_shape(spec.checkpoint, spec.dtype)
            self._observed = probe_ranks(shape, group, device, model.dtype)
        chunk = chunk_tokens(spec.engine, device.type)
        from_tokens = spec.engine.sparse_from_tokens or self._crossover(model, chunk)
        # The slowest rank decides, so that all of them report one figure.
        from_tokens = group.agree(from_tokens)
        logger.info("sparse attention from %d keys on", from_tokens)
        budget = partial(kv_budget, spec.engine, spec.checkpoint, spec.dtype, spec.device)
        common = WorkerContext(
            number=spec.rank,
            model=model,
            meshes={},
            store=ShardStore(layout, spec.generation),
            kv_layout=layout,
            budget=budget,
            runtime_dir=Path(spec.runtime_dir),
            video=spec.video,
            decoders=DecoderPool(spec.video.spare_decoders),
            chunk_tokens=chunk,
            sparse=sparse_settings(spec.engine, from_tokens),
            balance_above=spec.engine.balance_above,
            balance_least_gflop=spec.engine.balance_least_gflop,
            send=self._send,
            tick=self._tick,
        )
        return {
            team: replace(common, meshes=mine, budget=partial(budget, ranks=team.size))
            for team, mine in meshes.items()
        }

    def _crossover(self, model: PrefillModel, chunk: int) -> int:
        layout, sizes = self._spec.checkpoint, sparse_settings(self._spec.engine, 0)
        return measure_crossover(
            model.num_heads, layout.num_kv_heads, layout.head_dim, model.dtype, model.device,
            chunk, sizes.block_tokens, sizes.tile_tokens, sizes.segment_tokens,
        )  # fmt: skip

    def _run_task(self, context: WorkerContext, task: msg.PrefillTask) -> None:
        control = self._controls[task.job_id]
        try:
            context.budget(task.exchange).check(
                task.plan.num_tokens
            )  # of which every rank thinks the same
        except ServiceError as refusal:
            self._controls.pop(task.job_id, None)
            self._send(msg.RankFailed(task.job_id, self._spec.rank, refusal.to_dict()))
            return
        try:
            begin = ChunkedPrefill if task.comparison is None else BaselinePrefill
            self._send(run_task(context, task, control, begin))
        except TaskAborted as aborted:
            error = aborted.error or ServiceError(
                Reason.CANCELLED,
                "the job was cancelled"
                if aborted.status is Status.CANCELLED
                else "another rank failed",
            )
            self._send(msg.RankFailed(task.job_id, self._spec.rank, error.to_dict()))
        finally:
            self._controls.pop(task.job_id, None)

    def _listen(self) -> None:
        try:
            while True:
                self._handle(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the front end is gone, and with it whoever would wait for us

    def _handle(self, message: object) -> None:
        match message:
            case msg.Run(task):
                aside = partial(self._stand_aside, task.job_id)
                self._controls[task.job_id] = TaskControl(
                    threading.Event(), threading.Event(), aside
                )
                self._inbox.put(message)
            case msg.Cancel(job_id):
                if control := self._controls.get(job_id):
                    control.cancelled.set()
            case msg.Pause(job_id):
                if control := self._controls.get(job_id):
                    control.pause.set()
            case msg.Resume():
                self._inbox.put(message)
            case msg.Grant(prefix_id, lease_id, ttl_s):
                self._store.grant_lease(prefix_id, lease_id, ttl_s)
            case msg.Release(prefix_id, lease_id):
                self._store.release_lease(prefix_id, lease_id)
            case msg.Drop(prefix_id):
                self._store.drop_prefix(prefix_id)
            case msg.Shutdown():
                for control in list(self._controls.values()):
                    control.cancelled.set()
                self._inbox.put(None)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_S):
            self._send(msg.Heartbeat(self._spec.rank, self._ticks, self._busy))

    def _tick(self) -> None:
        self._ticks += 1

    def _send(self, message: object) -> None:
        with self._send_lock:
            self._pipe.send(message)


def _device(spec: WorkerSpec) -> tuple[torch.device, bool]:
    """This rank's device, and whether ranks share GPUs, so that NCCL cannot connect them."""
    if spec.device != "cuda":
        return torch.device("cpu"), False
    count = torch.cuda.device_count()
    device = torch.device(f"cuda:{spec.rank % count}")
    torch.cuda.set_device(device)
    if spec.engine.ranks > count:
        logger.warning(
            "%d ranks share %d GPUs: what they exchange goes through the host",
            spec.engine.ranks, count,
        )  # fmt: skip
    return device, spec.engine.ranks > count


def main() -> None:
    """Read the spec, be the rank."""
    # Ctrl-C reaches the whole foreground process group; the front end decides when to leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    spec: WorkerSpec = pipe.recv()
    logging.basicConfig(
        level=os.environ.get("PREFILL_LOG_LEVEL", "INFO"),
        format=f"%(asctime)s %(levelname)s rank{spec.rank} %(name)s: %(message)s",
    )
    messages: Any = transformers.utils.logging
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    rank, code = Worker(spec, pipe), 0
    try:
        rank.run()
    except Exception as error:
        logger.exception("rank %d failed", spec.rank)
        rank.crash(error)
        code = 1
    # No orderly goodbye: a peer may be blocked in a collective with us, and a process group's
    # tear-down would wait for it.
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
