"""Pulls a prefix's pages from the ranks, over whatever transport each of them serves.

One thread per rank asks for its pages batch by batch and compares checksums on the copy it gets;
the caller receives the batches in token order, early ones while the ranks still compute later
ones.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
import xxhash
from torch import Tensor

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import Manifest, Page
from prefill_service.kv.transport.base import PullRequest, cancelled
from prefill_service.kv.transport_registry import transport_of

_BATCH_BYTES = 8 << 20
_QUEUED_BATCHES = 2


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Consecutive pages of one run, checked.

    Attributes:
        pages: what they hold, in token order.
        data: [pages, num_layers, 2 (K, V), page_tokens, kv_heads, head_dim], a private
            copy on the CPU.
    """

    pages: tuple[Page, ...]
    data: Tensor


class PageClient:
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
        self._pullers: list[_RankPuller] = []

    def __enter__(self) -> Self:
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
            for puller in self._pullers:
                puller.stop()

    def fetch(self, start_token: int = 0, end_token: int | None = None) -> Iterator[PageBatch]:
        """Pages that hold any of the tokens, in token order, each checked.

        Several pages of a run come at a time (about 8 MiB).

        Raises:
            ServiceError: KV_CORRUPT (naming page, rank and both checksums), HANDOFF_FAILED
                (rank unreachable, gone or silent), KV_MISMATCH (fewer pages than the
                manifest says), CANCELLED, or what the rank answered: UNKNOWN_PREFIX,
                STALE_GENERATION, LEASE_EXPIRED, the prefill's own error.
        """
        order = list(self._batches(start_token, end_token))
        pullers: dict[int, _RankPuller] = {}
        for rank in sorted({pages[0].rank for pages in order}):
            pullers[rank] = self._puller([pages for pages in order if pages[0].rank == rank])
        with self._lock:
            self._pullers = list(pullers.values())
        try:
            for puller in pullers.values():
                puller.start()
            for pages in order:
                if self._cancelled.is_set():
                    raise cancelled(self._lease_id)
                yield pullers[pages[0].rank].next_batch()
        except ServiceError:
            if self._cancelled.is_set():  # the broken connection was our own doing
                raise cancelled(self._lease_id) from None
            raise
        finally:
            for puller in pullers.values():
                puller.stop()
            for puller in pullers.values():
                puller.join()

    def _puller(self, batches: list[tuple[Page, ...]]) -> _RankPuller:
        request = PullRequest(
            manifest=self._manifest,
            rank=batches[0][0].rank,
            lease_id=self._lease_id,
            num_pages=1 + max(pages[-1].index for pages in batches),
            timeout_s=self._timeout_s,
        )
        return _RankPuller(request, batches)

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


class _RankPuller(threading.Thread):
    """Pulls one rank's pages in the background, a few batches ahead of the caller."""

    def __init__(self, request: PullRequest, batches: Sequence[tuple[Page, ...]]) -> None:
        super().__init__(name=f"kv-pull-{request.rank}", daemon=True)
        self._request = request
        self._batches = batches
        self._connection = transport_of(request.endpoint).make_connection(request)
        self._ready: queue.Queue[PageBatch | ServiceError] = queue.Queue()
        self._free_slots = threading.Semaphore(_QUEUED_BATCHES)
        self._stopped = threading.Event()

    def next_batch(self) -> PageBatch:
        """The next of the batches, once it is there.

        Raises:
            ServiceError: why there will be none.
        """
        result = self._ready.get()
        self._free_slots.release()
        if isinstance(result, ServiceError):
            raise result
        return result

    def stop(self) -> None:
        """Make the thread end soon, whatever it waits for."""
        self._stopped.set()
        self._free_slots.release()
        self._connection.interrupt()

    def run(self) -> None:
        try:
            self._pull_all()
        except ServiceError as error:
            self._ready.put(error)
        except Exception as error:  # the caller waits for a result, whatever happens here
            self._ready.put(self._request.failure(f"broke the transfer: {error!r}"))
        finally:
            self._connection.close()

    def _pull_all(self) -> None:
        self._connection.open()
        for pages in self._batches:
            self._free_slots.acquire()
            if self._stopped.is_set():
                raise self._request.cancellation()
            data, checksums = self._connection.pull(pages[0].index, len(pages))
            for page, row, expected in zip(pages, data, checksums, strict=True):
                actual = xxhash.xxh3_64_intdigest(row.data)
                if actual != expected:
                    raise self._corruption(page, actual, expected)
            layout = self._request.manifest.layout
            tensor = torch.from_numpy(data).view(layout.torch_dtype)
            self._ready.put(PageBatch(pages, tensor.view(len(pages), *layout.page_shape)))

    def _corruption(self, page: Page, actual: int, expected: int) -> ServiceError:
        rank = self._request.rank
        return ServiceError(
            Reason.KV_CORRUPT,
            f"page {page.index} of rank {rank} (tokens [{page.start_token}, "
            f"{page.start_token + page.num_tokens})) of prefix "
            f"{self._request.manifest.prefix_id} "
            f"has checksum {actual:016x}, expected {expected:016x}",
            page=page.index,
            rank=rank,
            actual=f"{actual:016x}",
            expected=f"{expected:016x}",
        )
