"""The entry point of a rank process: ``python -m prefill_service.engine.rank FD``.

FD is the rank's end of a socket pair; the first message on it is a ``RankSpec``. The main thread
computes; one thread listens to the front end, one sends heartbeats, one (``PageServer``) serves
pages. When the front end goes away, so does the rank.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine import messages as msg
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import Checkpoint

logger = logging.getLogger("prefill_service.rank")

_HEARTBEAT_S = 1.0
_DEFAULT_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank needs to start."""

    rank: int
    generation: int
    engine: EngineConfig
    video: VideoConfig
    checkpoint: Checkpoint
    dtype: str
    device: str
    threads: int
    init_method: str
    socket_path: str


def chunk_tokens(engine: EngineConfig, device: str) -> int:
    """Tokens per chunk and rank: as configured, or a device's default."""
    return engine.chunk_tokens or _DEFAULT_CHUNK_TOKENS[device]


class Rank:
    """One rank: its model, its pages, its place in the group.

    Args:
        spec: what to be.
        pipe: to the front end.
    """

    def __init__(self, spec: RankSpec, pipe: Connection) -> None:
        self._spec = spec
        self._pipe = pipe
        self._send_lock = threading.Lock()
        self._tasks: queue.Queue[msg.PrefillTask | None] = queue.Queue()
        self._cancelled: dict[str, threading.Event] = {}
        self._ticks = 0
        self._busy = False

    def run(self) -> None:
        """Load, join the group, serve until told to leave."""
        import torch
        import transformers

        from prefill_service.engine.pipeline import PrefillPipeline
        from prefill_service.kv.manifest import KVLayout
        from prefill_service.kv.page_server import PageServer
        from prefill_service.kv.segment import ShardStore
        from prefill_service.models.prefill_model import PrefillModel
        from prefill_service.parallel.group import form_group, leave_group

        spec, checkpoint = self._spec, self._spec.checkpoint
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(spec.threads)
        device = torch.device(f"cuda:{spec.rank}" if spec.device == "cuda" else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        layout = KVLayout(
            checkpoint.num_layers,
            checkpoint.num_kv_heads,
            checkpoint.head_dim,
            spec.dtype,
            spec.engine.page_tokens,
        )
        self._store = ShardStore(layout, spec.generation)
        model = PrefillModel(checkpoint, getattr(torch, spec.dtype), device)
        group = form_group(
            spec.rank,
            spec.engine.ranks,
            spec.init_method,
            device,
            spec.engine.collective_timeout_s,
        )
        server = PageServer(self._store, Path(spec.socket_path))
        pipeline = PrefillPipeline(
            model,
            group,
            self._store,
            layout,
            spec.video,
            chunk_tokens(spec.engine, device.type),
            self._send,
            self._tick,
        )
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        self._send(
            msg.Ready(spec.rank, os.getpid(), f"unix:{spec.socket_path}", layout, str(device))
        )
        try:
            while (task := self._tasks.get()) is not None:
                self._busy = True
                self._run_task(pipeline, task)
                self._busy = False
        finally:
            server.close()
        leave_group(group)

    def _run_task(self, pipeline: Any, task: msg.PrefillTask) -> None:
        from prefill_service.engine.pipeline import Status, TaskAborted

        cancelled = self._cancelled[task.job_id]
        try:
            self._send(pipeline.run(task, cancelled))
        except TaskAborted as aborted:
            error = aborted.error or ServiceError(
                Reason.CANCELLED,
                "the job was cancelled"
                if aborted.status is Status.CANCELLED
                else "another rank failed",
            )
            self._send(msg.RankFailed(task.job_id, self._spec.rank, error.to_dict()))
        finally:
            self._cancelled.pop(task.job_id, None)

    def _listen(self) -> None:
        try:
            while True:
                self._handle(self._pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the front end is gone, and with it whoever would wait for us

    def _handle(self, message: object) -> None:
        match message:
            case msg.Run(task):
                self._cancelled[task.job_id] = threading.Event()
                self._tasks.put(task)
            case msg.Cancel(job_id):
                if event := self._cancelled.get(job_id):
                    event.set()
            case msg.Grant(prefix_id, lease_id, ttl_s):
                self._store.grant(prefix_id, lease_id, ttl_s)
            case msg.Release(prefix_id, lease_id):
                self._store.release(prefix_id, lease_id)
            case msg.Drop(prefix_id):
                self._store.drop(prefix_id)
            case msg.Shutdown():
                for event in list(self._cancelled.values()):
                    event.set()
                self._tasks.put(None)

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(_HEARTBEAT_S):
            self._send(msg.Heartbeat(self._spec.rank, self._ticks, self._busy))

    def _tick(self) -> None:
        self._ticks += 1

    def _send(self, message: object) -> None:
        with self._send_lock:
            self._pipe.send(message)


def main() -> None:
    """Read the spec, be the rank."""
    # Ctrl-C reaches the whole foreground process group; the front end decides when to leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    spec: RankSpec = pipe.recv()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(
        level=os.environ.get("PREFILL_LOG_LEVEL", "INFO"),
        format=f"%(asctime)s %(levelname)s rank{spec.rank} %(name)s: %(message)s",
    )
    try:
        Rank(spec, pipe).run()
    except ServiceError as error:
        pipe.send(msg.RankCrashed(spec.rank, error.to_dict()))
        sys.exit(1)
    except Exception as error:
        logger.exception("rank %d failed", spec.rank)
        failed = ServiceError(
            Reason.RANK_DIED, f"rank {spec.rank} failed: {error!r}", rank=spec.rank
        )
        pipe.send(msg.RankCrashed(spec.rank, failed.to_dict()))
        # A peer may be blocked in a collective with us: no orderly goodbye.
        os._exit(1)


if __name__ == "__main__":
    main()
