"""Which prefixes the ranks hold, who uses them, and which goes when room is needed.

The ranks free a prefix's pages on ``DropPrefix``, and refuse to serve them to a
consumer without a live lease. This cache decides; the ranks only obey. A prefix has

* leases, one per answer in flight, which protect it from eviction, and
* once complete, one *standing* lease, which does not: it is what makes the job's
  ``kv_transfer_params`` usable by a vLLM that the service knows nothing of.

All leases are renewed here every third of their time to live, so that the pages outlive a dead
service by no more than that.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import LeasedPages
from prefill_service.kv.manifest import Manifest

if TYPE_CHECKING:
    from prefill_service.engine.executor import PrefillExecutor

logger = logging.getLogger(__name__)

LEASED_WAIT_S = 60.0
"""How long to wait for room when other answers' leases hold the pool."""


@dataclass(slots=True, eq=False)
class Lease:
    """The right to read a prefix's pages, until released or lost."""

    lease_id: str
    manifest: Manifest
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the pages are gone although the lease was not released."""


@dataclass(slots=True, eq=False)
class Prefix:
    """One prefix whose pages the ranks have.

    Attributes:
        standing: id of the standing lease.
        complete: whether all of its pages are computed.
        base: the prefix that it extends, without which its pages are of no use.
    """

    manifest: Manifest
    kv_bytes: int
    standing: str
    complete: bool = False
    base: Prefix | None = None
    leases: set[Lease] = field(default_factory=set)


class PrefixCache:
    """The prefixes that the ranks have.

    Args:
        executor: where leases and drops are sent.
        pool_bytes: KV bytes over all ranks.
        lease_ttl_s: time to live of a lease in the ranks.
        on_evicted: called with the id of each *complete* prefix that was evicted or lost.
    """

    def __init__(
        self,
        executor: PrefillExecutor,
        pool_bytes: int,
        lease_ttl_s: float,
        on_evicted: Callable[[str], None],
    ) -> None:
        self._executor = executor
        self._pool_bytes = pool_bytes
        self._ttl = lease_ttl_s
        self._on_evicted = on_evicted
        self._prefixes: dict[str, Prefix] = {}  # least recently used first
        self._freed = asyncio.Event()

    @property
    def used_bytes(self) -> int:
        """KV bytes of all prefixes, complete or not."""
        return sum(prefix.kv_bytes for prefix in self._prefixes.values())

    @property
    def computing(self) -> bool:
        """Whether a prefix is not complete yet."""
        return any(not prefix.complete for prefix in self._prefixes.values())

    @property
    def leased_bytes(self) -> int:
        """KV bytes of the prefixes that are needed: leased or computed, or extended by such."""
        return sum(prefix.kv_bytes for prefix in self._needed())

    async def make_room(
        self,
        kv_bytes: int,
        wait_s: float = LEASED_WAIT_S,
        *,
        prefix_id: str = "",
        base_id: str = "",
    ) -> None:
        """Evict unleased prefixes, least recently used first, until ``kv_bytes`` fit.

        Waits for prefixes that are being computed, since their jobs end, and then up to
        ``wait_s`` for leases where these alone are in the way. Nothing is evicted before it is
        certain that there will be room.

        Args:
            prefix_id: the prefix that needs the room. A cancelled job may still be computing it;
                its pages must not be dropped before the ranks have stopped writing them.
            base_id: the prefix that it extends, which the caller leases.

        Raises:
            ServiceError: KV_POOL_FULL, at once if the pool is too small even when empty but for
                the prefix that is extended; UNKNOWN_PREFIX, if that has gone.
        """
        least = kv_bytes + (self._get(base_id).kv_bytes if base_id else 0)
        now = asyncio.get_running_loop().time
        deadline = now() + wait_s
        while self._is_written(prefix_id) or self.leased_bytes + kv_bytes > self._pool_bytes:
            if self.computing:
                deadline = now() + wait_s
            timeout = deadline - now()
            if least > self._pool_bytes or timeout <= 0:
                raise self._full(kv_bytes)
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), timeout)
            except TimeoutError:
                continue
        needed = self._needed()
        for prefix in [p for p in self._prefixes.values() if p not in needed]:
            if self.used_bytes + kv_bytes <= self._pool_bytes:
                break
            logger.info("evicting prefix %s (%d bytes)", prefix.manifest.prefix_id, prefix.kv_bytes)
            self.invalidate(prefix.manifest)

    def _full(self, kv_bytes: int) -> ServiceError:
        leased = self.leased_bytes
        remedy = (
            "raise engine.kv_pool_bytes or look at fewer or smaller frames"
            if kv_bytes > self._pool_bytes
            else f"{leased} bytes of them leased to answers in flight"
        )
        return ServiceError(
            Reason.KV_POOL_FULL,
            f"the prefix needs {kv_bytes} bytes of KV, the pool has {self._pool_bytes}; {remedy}",
            needed_bytes=kv_bytes,
            pool_bytes=self._pool_bytes,
            leased_bytes=leased,
        )

    def add_prefix(self, manifest: Manifest, kv_bytes: int, base_id: str = "") -> None:
        """Enter a prefix that is about to be computed. ``make_room`` comes first.

        Args:
            base_id: the prefix that it extends.

        Raises:
            ServiceError: UNKNOWN_PREFIX, if that has gone.
        """
        base = self._get(base_id) if base_id else None
        if (older := self._prefixes.get(manifest.prefix_id)) is not None:
            self.invalidate(older.manifest)
        prefix = Prefix(manifest, kv_bytes, standing=new_lease_id(), base=base)
        self._prefixes[manifest.prefix_id] = prefix

    def complete_prefix(self, prefix_id: str) -> str:
        """Mark a prefix as computed and open its standing lease, whose id is returned.

        Raises:
            ServiceError: STALE_GENERATION if its ranks have been lost since they finished it.
        """
        prefix = self._prefixes.get(prefix_id)
        if prefix is None:
            raise ServiceError(
                Reason.STALE_GENERATION,
                f"the ranks that computed {prefix_id} were lost before it was kept",
            )
        prefix.complete = True
        self._executor.grant_lease(prefix_id, prefix.standing, self._ttl)
        self._freed.set()
        return prefix.standing

    def open_lease(self, prefix_id: str) -> Lease:
        """Open a lease, also on a prefix that is still being computed.

        Raises:
            ServiceError: UNKNOWN_PREFIX.
        """
        prefix = self._get(prefix_id)
        self._prefixes[prefix_id] = self._prefixes.pop(prefix_id)
        if prefix.base is not None:  # it is of more use than what extends it
            base_id = prefix.base.manifest.prefix_id
            self._prefixes[base_id] = self._prefixes.pop(base_id)
        lease = Lease(new_lease_id(), prefix.manifest)
        prefix.leases.add(lease)
        self._executor.grant_lease(prefix_id, lease.lease_id, self._ttl)
        return lease

    def standing_pages(self, prefix_id: str) -> LeasedPages:
        """A complete prefix's pages under its standing lease.

        Raises:
            ServiceError: UNKNOWN_PREFIX.
        """
        prefix = self._get(prefix_id)
        return LeasedPages(prefix.manifest, prefix.standing)

    def release_lease(self, lease: Lease) -> None:
        """End a lease; nothing happens if it has ended or was lost."""
        prefix = self._prefixes.get(lease.manifest.prefix_id)
        if prefix is not None and lease in prefix.leases:
            prefix.leases.remove(lease)
            self._executor.release_lease(lease.manifest.prefix_id, lease.lease_id)
            self._freed.set()

    def invalidate(self, manifest: Manifest) -> None:
        """Free a prefix's pages, and those of what extends it; their leases are lost.

        Nothing happens if it is not there, or has been entered anew since.
        """
        prefix_id = manifest.prefix_id
        prefix = self._prefixes.get(prefix_id)
        if prefix is None or prefix.manifest is not manifest:
            return
        for other in [p for p in self._prefixes.values() if p.base is prefix]:
            self.invalidate(other.manifest)
        for lease_id in (prefix.standing, *(lease.lease_id for lease in prefix.leases)):
            self._executor.release_lease(prefix_id, lease_id)
        self._executor.drop_prefix(prefix_id)
        self._forget(prefix)

    def invalidate_corrupt(self, manifest: Manifest) -> None:
        """Free a complete prefix whose pages are bad, unless it was computed again meanwhile."""
        prefix = self._prefixes.get(manifest.prefix_id)
        if prefix is not None and prefix.complete and prefix.manifest is manifest:
            logger.warning("prefix %s is bad and will be computed again", manifest.prefix_id)
            self.invalidate(manifest)

    def forget_epoch(self, epoch: int) -> None:
        """Forget all prefixes of an epoch of workers that died, and of those before it."""
        for prefix in list(self._prefixes.values()):
            if prefix.manifest.epoch <= epoch:
                self._forget(prefix)

    async def renew_leases(self) -> None:
        """Renew all leases for as long as this coroutine runs."""
        while True:
            await asyncio.sleep(self._ttl / 3)
            for prefix_id, prefix in self._prefixes.items():
                for lease in prefix.leases:
                    self._executor.grant_lease(prefix_id, lease.lease_id, self._ttl)
                if prefix.complete:
                    self._executor.grant_lease(prefix_id, prefix.standing, self._ttl)

    def _needed(self) -> set[Prefix]:
        """Prefixes that are leased or being computed, and those which they extend."""
        needed = {p for p in self._prefixes.values() if p.leases or not p.complete}
        return needed | {p.base for p in needed if p.base is not None}

    def _is_written(self, prefix_id: str) -> bool:
        """Whether ranks may still write pages of that name."""
        prefix = self._prefixes.get(prefix_id)
        return prefix is not None and not prefix.complete

    def _get(self, prefix_id: str) -> Prefix:
        prefix = self._prefixes.get(prefix_id)
        if prefix is None:
            raise ServiceError(
                Reason.UNKNOWN_PREFIX, f"no rank holds prefix {prefix_id}", prefix_id=prefix_id
            )
        return prefix

    def _forget(self, prefix: Prefix) -> None:
        del self._prefixes[prefix.manifest.prefix_id]
        for lease in prefix.leases:
            lease.lost.set()
        self._freed.set()
        if prefix.complete:
            self._on_evicted(prefix.manifest.prefix_id)


def new_lease_id() -> str:
    """A lease id nobody can guess."""
    return f"lease_{uuid.uuid4().hex}"
