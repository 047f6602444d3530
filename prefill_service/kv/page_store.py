"""A rank's KV pages and the leases on them.

Each prefix has one ``PageFile``, sized when it is created. Its pages become visible one by one,
when ``seal_pages`` has computed their checksums; leases say who may read them. Memory is
returned to the system once the prefix is dropped and the last consumer has unmapped it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import KVLayout
from prefill_service.kv.page_file import PageFile
from prefill_service.kv.page_writer import ShardWriter

_POLL_S = 0.25
"""How often a blocked reader checks its lease and whether its consumer is still there."""


class ShardStore:
    """All prefixes of one rank, and the leases on them. Thread-safe.

    Args:
        layout: shape of a page.
        epoch: number of the workers' start; lets the store distinguish a manifest of an
            earlier one (STALE_GENERATION) from a prefix that never was (UNKNOWN_PREFIX).
    """

    def __init__(self, layout: KVLayout, epoch: int = 0) -> None:
        self.layout = layout
        self.epoch = epoch
        self._changed = threading.Condition()
        self._files: dict[str, PageFile] = {}
        self._leases: dict[str, dict[str, float]] = {}  # prefix -> lease -> monotonic expiry

    # ---- the rank and the service -----------------------------------------------------

    def create_pages(self, prefix_id: str, epoch: int, num_pages: int) -> ShardWriter:
        """Make room for ``num_pages`` pages, replacing an earlier file of the prefix.

        Raises:
            ServiceError: KV_POOL_FULL if the system has no memory for it.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages} of prefix {prefix_id}; at least 1")
        try:
            file = PageFile.create(prefix_id, epoch, num_pages, self.layout)
        except (OSError, ValueError) as error:
            num_bytes = num_pages * self.layout.page_bytes
            raise ServiceError(
                Reason.KV_POOL_FULL,
                f"no shared memory for {num_bytes} bytes of KV of prefix {prefix_id}: {error}",
                prefix_id=prefix_id,
                bytes=num_bytes,
            ) from error
        with self._changed:
            replaced = self._files.pop(prefix_id, None)
            if replaced is not None:
                replaced.close(_stale(prefix_id, replaced.epoch, epoch))
            self._files[prefix_id] = file
            self._changed.notify_all()
        return ShardWriter(file, self._changed)

    def grant_lease(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        """Create or renew a lease. It may precede ``create_pages``: readers then wait for it."""
        with self._changed:
            self._purge()
            self._leases.setdefault(prefix_id, {})[lease_id] = time.monotonic() + ttl_s
            self._changed.notify_all()

    def release_lease(self, prefix_id: str, lease_id: str) -> None:
        """End a lease; unknown ones are ignored."""
        with self._changed:
            leases = self._leases.get(prefix_id, {})
            leases.pop(lease_id, None)
            if not leases:
                self._leases.pop(prefix_id, None)
            self._changed.notify_all()

    def drop_prefix(self, prefix_id: str) -> None:
        """Forget a prefix and its leases; its readers fail with UNKNOWN_PREFIX."""
        with self._changed:
            self._leases.pop(prefix_id, None)
            file = self._files.pop(prefix_id, None)
            if file is not None:
                file.close(_unknown(prefix_id, "was dropped"))
            self._changed.notify_all()

    def close(self) -> None:
        """Drop all prefixes."""
        for prefix_id in list(self._files):
            self.drop_prefix(prefix_id)

    def find_pages(self, prefix_id: str, epoch: int) -> PageFile:
        """The file of a prefix of which this rank has computed all pages.

        Raises:
            ServiceError: UNKNOWN_PREFIX, or the error that the prefix ended with.
        """
        with self._changed:
            file = self._files.get(prefix_id)
            if file is None or file.epoch != epoch:
                raise _unknown(prefix_id, "is not held by this rank")
            file.raise_error()
            return file

    # ---- the page server ----------------------------------------------------------------

    def open_prefix(
        self, prefix_id: str, epoch: int, lease_id: str, wanted: Callable[[], bool]
    ) -> tuple[PageFile, int]:
        """The file and a duplicate of its memfd, which the caller closes.

        Waits while a live lease announces the prefix but the rank has not created it, or
        has not replaced an older epoch of it. ``wanted`` is polled while it waits.

        Raises:
            ServiceError: UNKNOWN_PREFIX, STALE_GENERATION, LEASE_EXPIRED, CANCELLED (no
                longer wanted), or the prefill's own error.
        """
        announced = False
        with self._changed:
            while True:
                file = self._files.get(prefix_id)
                current = self.epoch if file is None else file.epoch
                if current > epoch:
                    raise _stale(prefix_id, epoch, current)
                if file is None and not announced and prefix_id not in self._leases:
                    raise _unknown(prefix_id, "is not held by this rank")
                self._check_lease(prefix_id, lease_id)
                announced = True
                if file is not None and file.epoch == epoch:
                    file.raise_error()
                    return file, os.dup(file.fd)
                self._wait(prefix_id, lease_id, wanted)

    def wait_sealed(
        self,
        file: PageFile,
        lease_id: str,
        *,
        first: int,
        count: int,
        wanted: Callable[[], bool],
    ) -> list[int]:
        """Checksums of ``count`` pages from ``first``, once all of them are sealed.

        Raises:
            ServiceError: as ``open_prefix``; INVALID_REQUEST for pages that do not exist.
        """
        if first < 0 or count < 1 or first + count > file.num_pages:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"pages [{first}, {first + count}) of prefix {file.prefix_id}, "
                f"which has {file.num_pages} on this rank",
                first=first,
                count=count,
                num_pages=file.num_pages,
            )
        with self._changed:
            while True:
                file.raise_error()
                self._check_lease(file.prefix_id, lease_id)
                found = file.checksums[first : first + count]
                checksums = [checksum for checksum in found if checksum is not None]
                if len(checksums) == count:
                    return checksums
                self._wait(file.prefix_id, lease_id, wanted)

    # ---- under the lock -----------------------------------------------------------------

    def _wait(self, prefix_id: str, lease_id: str, wanted: Callable[[], bool]) -> None:
        left = self._leases[prefix_id][lease_id] - time.monotonic()
        self._changed.wait(min(_POLL_S, max(left, 0.001)))
        if not wanted():
            raise ServiceError(Reason.CANCELLED, "the consumer has gone", lease_id=lease_id)

    def _check_lease(self, prefix_id: str, lease_id: str) -> None:
        expiry = self._leases.get(prefix_id, {}).get(lease_id)
        if expiry is None or expiry <= time.monotonic():
            state = "is unknown or was released" if expiry is None else "has expired"
            raise ServiceError(
                Reason.LEASE_EXPIRED,
                f"lease {lease_id} on prefix {prefix_id} {state}",
                prefix_id=prefix_id,
                lease_id=lease_id,
            )

    def _purge(self) -> None:
        # An expired lease is kept for a while, so that its holder learns what happened.
        horizon = time.monotonic() - 300.0
        for prefix_id, leases in list(self._leases.items()):
            for lease_id in [lease for lease, expiry in leases.items() if expiry < horizon]:
                del leases[lease_id]
            if not leases:
                del self._leases[prefix_id]


def _stale(prefix_id: str, asked: int, current: int) -> ServiceError:
    return ServiceError(
        Reason.STALE_GENERATION,
        f"prefix {prefix_id} of epoch {asked} is gone; this rank is at epoch {current}",
        prefix_id=prefix_id,
        generation=asked,
        current_generation=current,
    )


def _unknown(prefix_id: str, state: str) -> ServiceError:
    return ServiceError(Reason.UNKNOWN_PREFIX, f"prefix {prefix_id} {state}", prefix_id=prefix_id)
