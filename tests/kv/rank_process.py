"""A real worker process for tests: a ShardStore and a PageServer, driven over a pipe."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefill_service.errors import ServiceError
from prefill_service.kv.manifest import KVLayout, Manifest, ShardRun, hash_token_ids
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.kv.transport.base import Transport
from prefill_service.kv.transport.unix import UnixTransport
from tests.support.prepared_processes import prepared_processes

EPOCH = 7
LAYOUT = KVLayout(num_layers=2, kv_heads=2, head_dim=8, dtype="float32", page_tokens=4)


@dataclass(frozen=True)
class Serving:
    """How a worker process serves its pages; the name is another for each of them."""

    layout: KVLayout
    folder: Path
    name: str
    epoch: int = EPOCH
    transport: Transport = field(default_factory=UnixTransport)


def _main(pipe: Connection, serving: Serving) -> None:
    torch.set_num_threads(1)
    store = ShardStore(serving.layout, serving.epoch)
    server = serving.transport.serve(store, serving.folder, serving.name)
    server.start()
    writers: dict[str, ShardWriter] = {}
    pipe.send(server.endpoint)
    while (call := pipe.recv()) is not None:
        target, name, args = call
        try:
            if name == "create_pages":
                writers[args[0]] = store.create_pages(*args)
                result = None
            elif name == "corrupt":
                # What a stray write would do: one bit, after the checksum was taken.
                page, offset = args
                raw = writers[target]._file.pages[page].view(torch.uint8).view(-1)
                raw[offset] ^= 1
                result = None
            elif name == "complete":
                result = writers[target].complete
            else:
                result = getattr(store if target == "store" else writers[target], name)(*args)
            pipe.send((True, result))
        except (ServiceError, ValueError) as error:
            pipe.send((False, error))
    server.close()


class WorkerProcess:
    """Its methods are those of ``ShardStore`` and, with a prefix id first, ``ShardWriter``."""

    def __init__(self, serving: Serving) -> None:
        context = prepared_processes()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, serving), daemon=True)
        self.process.start()
        theirs.close()
        self.endpoint: str = self._pipe.recv()

    def store(self, name: str, *args: Any) -> Any:
        return self._call("store", name, args)

    def writer(self, prefix_id: str, name: str, *args: Any) -> Any:
        return self._call(prefix_id, name, args)

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def close(self) -> None:
        if self.process.is_alive():
            self._pipe.send(None)
            self.process.join(5)
        if self.process.is_alive():
            self.kill()

    def _call(self, target: str, name: str, args: tuple[Any, ...]) -> Any:
        self._pipe.send((target, name, args))
        ok, result = self._pipe.recv()
        if not ok:
            raise result
        return result


@contextmanager
def rank_processes(
    layout: KVLayout, count: int, folder: Path, transport: Transport | None = None
) -> Iterator[list[WorkerProcess]]:
    how = Serving(layout, folder, "", transport=transport or UnixTransport())
    ranks = [WorkerProcess(replace(how, name=f"r{i}")) for i in range(count)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def deal(num_tokens: int, ranks: int, chunk: int, layout: KVLayout) -> tuple[ShardRun, ...]:
    """Runs of ``chunk`` tokens, dealt to the ranks in turn; each starts on a fresh page."""
    runs = []
    pages = [0] * ranks
    for i, start in enumerate(range(0, num_tokens, chunk)):
        end = min(start + chunk, num_tokens)
        rank = i % ranks
        runs.append(ShardRun(start, end, rank, pages[rank]))
        pages[rank] += layout.pages_for(end - start)
    return tuple(runs)


def make_manifest(
    layout: KVLayout, runs: tuple[ShardRun, ...], endpoints: list[str], **changes: Any
) -> Manifest:
    fields: dict[str, Any] = {
        "prefix_id": "prefix",
        "engine_id": "engine",
        "epoch": EPOCH,
        "model_fingerprint": "model",
        "layout": layout,
        "num_tokens": runs[-1].end_token,
        "runs": runs,
        "endpoints": tuple(endpoints),
        "token_ids_hash": hash_token_ids([]),
        "position_delta": 0,
    }
    return Manifest(**{**fields, **changes})


def pages_on(manifest: Manifest, rank: int) -> int:
    """Pages the manifest gives to a rank."""
    return sum(page.rank == rank for page in manifest.pages())


def create(
    manifest: Manifest, ranks: list[WorkerProcess], lease_id: str, ttl_s: float = 60
) -> None:
    """Create the prefix on all ranks, under one lease."""
    for i, rank in enumerate(ranks):
        if pages_on(manifest, i):
            rank.store("create_pages", manifest.prefix_id, manifest.epoch, pages_on(manifest, i))
            rank.store("grant_lease", manifest.prefix_id, lease_id, ttl_s)


def publish_run(manifest: Manifest, run: ShardRun, ranks: list[WorkerProcess], kv: Tensor) -> None:
    """Write and seal one run. ``kv``: [layers, 2, tokens, kv heads, head_dim] of the prefix."""
    rank = ranks[run.rank]
    prefix_id = manifest.prefix_id
    part = kv[:, :, run.start_token : run.end_token]
    for layer in range(manifest.layout.num_layers):
        rank.writer(
            prefix_id,
            "write",
            layer,
            run.first_page,
            part[layer, 0].clone(),
            part[layer, 1].clone(),
        )
    count = manifest.layout.pages_for(run.end_token - run.start_token)
    rank.writer(prefix_id, "seal_pages", run.first_page, count)


def publish(manifest: Manifest, ranks: list[WorkerProcess], kv: Tensor, lease_id: str) -> None:
    """Create, write and seal a whole prefix."""
    create(manifest, ranks, lease_id)
    for run in manifest.runs:
        publish_run(manifest, run, ranks, kv)


def random_kv(layout: KVLayout, num_tokens: int, seed: int = 0) -> Tensor:
    """[layers, 2, tokens, kv heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_layers, 2, num_tokens, layout.kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator).to(layout.torch_dtype)
