"""Pulls a prefix's pages from the ranks of the same host (``kv.protocol``, consumer's end).

One thread per rank asks for its pages batch by batch, copies them out of the shared memory
and compares checksums on the copy; the caller gets the batches in token order, early ones
while the ranks still compute later ones.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import Manifest, Page
from prefill_service.kv.page_store import TORCH_DTYPES
from prefill_service.kv.transport.sockets import LineReader, encode_line, unix_path

_CONNECT_SECONDS = 10.0
_BATCH_BYTES = 8 << 20
_QUEUED_BATCHES = 2


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Consecutive pages of one run, checked.

    Attributes:
        pages: what they hold, in token order.
        data: [pages, num_layers, 2 (K, V), page_tokens, num_kv_heads, head_dim], a private
            copy on the CPU.
    """

    pages: tuple[Page, ...]
    data: Tensor


class LocalClient:
    """Reads one prefix under one lease. A context manager; one ``fetch`` at a time.

    Args:
        manifest: the prefix.
        lease_id: the lease to read under.
        timeout_s: longest wait for the next pages of a rank.
    """

    def __init__(self, manifest: Manifest, lease_id: str, timeout_s: float = 600.0) -> None:
        self._manifest = manifest
        self._lease_id = lease_id
        self._timeout_s = timeout_s
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._sources: list[_RankSource] = []

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End a ``fetch`` under way, from any thread: it raises CANCELLED."""
        self._cancelled.set()
        with self._lock:
            for source in self._sources:
                source.stop()

    def fetch(self, start_token: int = 0, end_token: int | None = None) -> Iterator[PageBatch]:
        """Pages that hold any of the tokens, in token order, each checked.

        Several pages of a run come at a time (about 8 MiB).

        Raises:
            ServiceError: KV_CORRUPT (naming page, rank and both checksums), HANDOFF_FAILED
                (rank unreachable, gone or silent), KV_MISMATCH (segment smaller than the
                manifest says), CANCELLED, or what the rank answered: UNKNOWN_PREFIX,
                STALE_GENERATION, LEASE_EXPIRED, the prefill's own error.
        """
        order = list(self._batches(start_token, end_token))
        sources: dict[int, _RankSource] = {}
        for rank in sorted({pages[0].rank for pages in order}):
            mine = [pages for pages in order if pages[0].rank == rank]
            sources[rank] = _RankSource(self._manifest, rank, mine, self._lease_id, self._timeout_s)
        with self._lock:
            self._sources = list(sources.values())
        try:
            for source in sources.values():
                source.start()
            for pages in order:
                if self._cancelled.is_set():
                    raise _cancelled(self._lease_id)
                yield sources[pages[0].rank].next_batch()
        except ServiceError:
            if self._cancelled.is_set():  # the broken connection was our own doing
                raise _cancelled(self._lease_id) from None
            raise
        finally:
            for source in sources.values():
                source.stop()
            for source in sources.values():
                source.join()

    def _batches(self, start_token: int, end_token: int | None) -> Iterator[tuple[Page, ...]]:
        layout = self._manifest.layout
        size = max(1, _BATCH_BYTES // layout.page_bytes)
        batch: list[Page] = []
        for page in self._manifest.pages(start_token, end_token):
            # The next run of a rank lies behind this one's last page, which may have a gap.
            follows = bool(batch) and (
                (page.rank, page.index) == (batch[-1].rank, batch[-1].index + 1)
                and page.start_token == batch[-1].start_token + layout.page_tokens
            )
            if batch and (not follows or len(batch) == size):
                yield tuple(batch)
                batch = []
            batch.append(page)
        if batch:
            yield tuple(batch)


class _RankSource(threading.Thread):
    """Pulls one rank's pages in the background, a few batches ahead of the caller."""

    def __init__(
        self,
        manifest: Manifest,
        rank: int,
        batches: list[tuple[Page, ...]],
        lease_id: str,
        timeout_s: float,
    ) -> None:
        super().__init__(name=f"kv-pull-{rank}", daemon=True)
        self._manifest = manifest
        self._rank = rank
        self._batches = batches
        self._lease_id = lease_id
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ready: queue.Queue[PageBatch | ServiceError] = queue.Queue()
        self._room = threading.Semaphore(_QUEUED_BATCHES)
        self._stopped = threading.Event()

    def next_batch(self) -> PageBatch:
        result = self._ready.get()
        self._room.release()
        if isinstance(result, ServiceError):
            raise result
        return result

    def stop(self) -> None:
        """Make the thread end soon, whatever it waits for."""
        self._stopped.set()
        self._room.release()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            self._pull()
        except ServiceError as error:
            self._ready.put(error)
        except Exception as error:  # the caller waits for a result, whatever happens here
            self._ready.put(self._lost(f"broke the transfer: {error!r}"))
        finally:
            self._socket.close()

    def _pull(self) -> None:
        reader = LineReader(self._socket)
        try:
            memory = self._open(reader)
        finally:
            reader.close()
        # Unmapped by hand: a caught exception's traceback would keep the rank's memory alive.
        with memory:
            for pages in self._batches:
                self._room.acquire()
                if self._stopped.is_set():
                    raise _cancelled(self._lease_id)
                message = {"op": "pages", "first": pages[0].index, "count": len(pages)}
                checksums = self._ask(reader, message)["checksums"]
                self._ready.put(self._copy(memory, pages, checksums))

    def _open(self, reader: LineReader) -> mmap.mmap:
        """Connect, and map the rank's segment read-only."""
        endpoint = self._manifest.endpoints[self._rank]
        self._socket.settimeout(_CONNECT_SECONDS)
        try:
            self._socket.connect(unix_path(endpoint))
        except OSError as error:
            raise self._lost(
                f"cannot be reached at {endpoint}: {error.strerror or error}"
            ) from error
        if self._stopped.is_set():
            raise _cancelled(self._lease_id)
        self._socket.settimeout(self._timeout_s)
        answer = self._ask(
            reader,
            {
                "op": "open",
                "prefix_id": self._manifest.prefix_id,
                "generation": self._manifest.generation,
                "lease_id": self._lease_id,
            },
        )
        if not reader.fds:
            raise self._lost("sent no memory with its answer")
        fd, size = reader.fds[0], int(answer["segment_bytes"])
        needed = self._manifest.layout.page_bytes * (1 + max(p[-1].index for p in self._batches))
        # A segment that can shrink could kill this process with SIGBUS while it reads.
        sealed = bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        actual = os.fstat(fd).st_size
        if not sealed or actual != size or size < needed:
            raise ServiceError(
                Reason.KV_MISMATCH,
                f"rank {self._rank} offers a segment of {actual} bytes (announced {size}, "
                f"sealed: {sealed}); the manifest needs {needed}",
                rank=self._rank,
                bytes=actual,
                needed=needed,
            )
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)

    def _ask(self, reader: LineReader, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self._socket.sendall(encode_line(message))
            answer = reader.read()
        except TimeoutError as error:
            raise self._lost(f"did not answer {message} within {self._timeout_s:g} s") from error
        if answer is None:
            raise self._lost("closed the connection (process gone?)")
        if not answer.get("ok"):
            refusal = ServiceError.from_dict(answer)
            refusal.metadata.setdefault("rank", str(self._rank))
            raise refusal
        return answer

    def _copy(self, memory: mmap.mmap, pages: tuple[Page, ...], checksums: list[int]) -> PageBatch:
        layout, first = self._manifest.layout, pages[0].index
        private = np.frombuffer(
            memory, np.uint8, len(pages) * layout.page_bytes, first * layout.page_bytes
        ).copy()
        private = private.reshape(len(pages), layout.page_bytes)
        for page, row, expected in zip(pages, private, checksums, strict=True):
            actual = xxhash.xxh3_64_intdigest(row.data)
            if actual != expected:
                raise ServiceError(
                    Reason.KV_CORRUPT,
                    f"page {page.index} of rank {self._rank} (tokens [{page.start_token}, "
                    f"{page.start_token + page.num_tokens})) of prefix {self._manifest.prefix_id} "
                    f"has checksum {actual:016x}, expected {expected:016x}",
                    page=page.index,
                    rank=self._rank,
                    actual=f"{actual:016x}",
                    expected=f"{expected:016x}",
                )
        data = torch.from_numpy(private).view(TORCH_DTYPES[layout.dtype])
        return PageBatch(pages, data.view(len(pages), *layout.page_shape))

    def _lost(self, what: str) -> ServiceError:
        return ServiceError(
            Reason.HANDOFF_FAILED,
            f"rank {self._rank} {what}",
            rank=self._rank,
            endpoint=self._manifest.endpoints[self._rank],
        )


def _cancelled(lease_id: str) -> ServiceError:
    return ServiceError(Reason.CANCELLED, "the load was cancelled", lease_id=lease_id)
