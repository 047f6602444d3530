"""A rank's KV pages: shared memory that the rank writes and consumers can only read.

One sealed memfd per prefix, sized when it is created. Its pages become visible one by one,
when ``seal_pages`` has computed their checksums; leases say who may read them. Memory is
returned to the system once the prefix is dropped and the last consumer has unmapped it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Since Linux 5.1, not yet named by the fcntl module: existing writable maps go on working,
# new ones and write(2) are refused.
_F_SEAL_FUTURE_WRITE = 0x10
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

_POLL_SECONDS = 0.25
"""How often a blocked reader checks its lease and whether its consumer is still there."""


@dataclass(eq=False)
class Segment:
    """One prefix's shard on this rank. All fields are guarded by the store's condition."""

    prefix_id: str
    generation: int
    num_pages: int
    layout: KVLayout
    fd: int
    pages: Tensor  # [num_pages, *layout.page_shape], on the shared memory
    checksums: list[int | None] = field(default_factory=list)
    error: ServiceError | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the shared memory."""
        return self.num_pages * self.layout.page_bytes


def _new_segment(prefix_id: str, generation: int, num_pages: int, layout: KVLayout) -> Segment:
    num_bytes = num_pages * layout.page_bytes
    fd = os.memfd_create("prefill-service-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    # The tensor keeps the mapping alive; nobody closes it by hand, so that a write that is
    # under way while the prefix is dropped stays harmless.
    flat = torch.frombuffer(memory, dtype=TORCH_DTYPES[layout.dtype])
    pages = flat.view(num_pages, *layout.page_shape)
    return Segment(prefix_id, generation, num_pages, layout, fd, pages, [None] * num_pages)


class ShardStore:
    """All prefixes of one rank, and the leases on them. Thread-safe.

    Args:
        layout: shape of a page.
        generation: generation of the rank group; lets the store tell a manifest of an
            earlier group (STALE_GENERATION) from a prefix that never was (UNKNOWN_PREFIX).
    """

    def __init__(self, layout: KVLayout, generation: int = 0) -> None:
        self.layout = layout
        self.generation = generation
        self._changed = threading.Condition()
        self._segments: dict[str, Segment] = {}
        self._leases: dict[str, dict[str, float]] = {}  # prefix -> lease -> monotonic expiry

    # ---- the rank and the service -----------------------------------------------------

    def create(self, prefix_id: str, generation: int, num_pages: int) -> ShardWriter:
        """Make room for ``num_pages`` pages, replacing an earlier segment of the prefix.

        Raises:
            ServiceError: KV_POOL_FULL if the system has no memory for it.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages} of prefix {prefix_id}; at least 1")
        try:
            segment = _new_segment(prefix_id, generation, num_pages, self.layout)
        except (OSError, ValueError) as error:
            num_bytes = num_pages * self.layout.page_bytes
            raise ServiceError(
                Reason.KV_POOL_FULL,
                f"no shared memory for {num_bytes} bytes of KV of prefix {prefix_id}: {error}",
                prefix_id=prefix_id,
                bytes=num_bytes,
            ) from error
        with self._changed:
            replaced = self._segments.pop(prefix_id, None)
            if replaced is not None:
                self._close(replaced, _stale(prefix_id, replaced.generation, generation))
            self._segments[prefix_id] = segment
            self._changed.notify_all()
        return ShardWriter(segment, self._changed)

    def grant(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        """Create or renew a lease. It may precede ``create``: readers then wait for it."""
        with self._changed:
            self._purge()
            self._leases.setdefault(prefix_id, {})[lease_id] = time.monotonic() + ttl_s
            self._changed.notify_all()

    def release(self, prefix_id: str, lease_id: str) -> None:
        """End a lease; unknown ones are ignored."""
        with self._changed:
            leases = self._leases.get(prefix_id, {})
            leases.pop(lease_id, None)
            if not leases:
                self._leases.pop(prefix_id, None)
            self._changed.notify_all()

    def drop(self, prefix_id: str) -> None:
        """Forget a prefix and its leases; its readers fail with UNKNOWN_PREFIX."""
        with self._changed:
            self._leases.pop(prefix_id, None)
            segment = self._segments.pop(prefix_id, None)
            if segment is not None:
                self._close(segment, _unknown(prefix_id, "was dropped"))
            self._changed.notify_all()

    @property
    def bytes_used(self) -> int:
        """Bytes of all segments. Dropped ones that a consumer still maps do not count."""
        with self._changed:
            return sum(segment.num_bytes for segment in self._segments.values())

    def close(self) -> None:
        """Drop everything."""
        for prefix_id in list(self._segments):
            self.drop(prefix_id)

    # ---- the page server ----------------------------------------------------------------

    def open(
        self, prefix_id: str, generation: int, lease_id: str, wanted: Callable[[], bool]
    ) -> tuple[Segment, int]:
        """The segment and a duplicate of its memfd, which the caller closes.

        Waits while a live lease announces the prefix but the rank has not created it, or
        has not replaced an older generation of it. ``wanted`` is polled while it waits.

        Raises:
            ServiceError: UNKNOWN_PREFIX, STALE_GENERATION, LEASE_EXPIRED, CANCELLED (no
                longer wanted), or the prefill's own error.
        """
        announced = False
        with self._changed:
            while True:
                segment = self._segments.get(prefix_id)
                current = self.generation if segment is None else segment.generation
                if current > generation:
                    raise _stale(prefix_id, generation, current)
                if segment is None and not announced and prefix_id not in self._leases:
                    raise _unknown(prefix_id, "is not held by this rank")
                self._check_lease(prefix_id, lease_id)
                announced = True
                if segment is not None and segment.generation == generation:
                    if segment.error is not None:
                        raise _copy(segment.error)
                    return segment, os.dup(segment.fd)
                self._wait(prefix_id, lease_id, wanted)

    def wait_sealed(
        self, segment: Segment, lease_id: str, first: int, count: int, wanted: Callable[[], bool]
    ) -> list[int]:
        """Checksums of ``count`` pages from ``first``, once all of them are sealed.

        Raises:
            ServiceError: as ``open``; INVALID_REQUEST for pages that do not exist.
        """
        if first < 0 or count < 1 or first + count > segment.num_pages:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"pages [{first}, {first + count}) of prefix {segment.prefix_id}, "
                f"which has {segment.num_pages} on this rank",
                first=first,
                count=count,
                num_pages=segment.num_pages,
            )
        with self._changed:
            while True:
                if segment.error is not None:
                    raise _copy(segment.error)
                self._check_lease(segment.prefix_id, lease_id)
                found = segment.checksums[first : first + count]
                checksums = [checksum for checksum in found if checksum is not None]
                if len(checksums) == count:
                    return checksums
                self._wait(segment.prefix_id, lease_id, wanted)

    # ---- under the lock -----------------------------------------------------------------

    def _wait(self, prefix_id: str, lease_id: str, wanted: Callable[[], bool]) -> None:
        left = self._leases[prefix_id][lease_id] - time.monotonic()
        self._changed.wait(min(_POLL_SECONDS, max(left, 0.001)))
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
        # An expired lease is kept for a while, so that its holder is told what happened.
        horizon = time.monotonic() - 300.0
        for prefix_id, leases in list(self._leases.items()):
            for lease_id in [lease for lease, expiry in leases.items() if expiry < horizon]:
                del leases[lease_id]
            if not leases:
                del self._leases[prefix_id]

    def _close(self, segment: Segment, error: ServiceError) -> None:
        segment.error = segment.error or error
        segment.pages = torch.empty(0)
        os.close(segment.fd)
        segment.fd = -1


class ShardWriter:
    """Writes one prefix's pages on the rank that computes them. One writing thread."""

    def __init__(self, segment: Segment, changed: threading.Condition) -> None:
        self._segment = segment
        self._changed = changed

    def write(self, layer: int, first_page: int, k: Tensor, v: Tensor) -> None:
        """Store K and V of consecutive tokens of one run, from ``first_page`` onwards.

        Args:
            layer: index of the layer.
            first_page: page that takes the first token.
            k: [tokens, num_kv_heads, head_dim] after rotary embedding, on any device, in
                the layout's dtype. The last page may be filled partly.
            v: as ``k``.

        Raises:
            ServiceError: KV_MISMATCH if shape or dtype are not the layout's, or a page
                does not exist or is sealed; or the error the prefix was ended with.
        """
        layout, num_tokens = self._segment.layout, k.shape[0]
        pages = self._open_pages(first_page, layout.pages_for(num_tokens))
        expected = (num_tokens, layout.num_kv_heads, layout.head_dim)
        full, rest = divmod(num_tokens, layout.page_tokens)
        for which, source in enumerate((k, v)):
            if tuple(source.shape) != expected or source.dtype != TORCH_DTYPES[layout.dtype]:
                raise ServiceError(
                    Reason.KV_MISMATCH,
                    f"{'KV'[which]} of layer {layer} is {tuple(source.shape)} {source.dtype}; "
                    f"the layout wants {expected} {layout.dtype}",
                    layer=layer,
                )
            host = source.detach().to("cpu")
            target = pages[:, layer, which]  # [pages, page_tokens, num_kv_heads, head_dim]
            if full:
                target[:full].copy_(host[: num_tokens - rest].view(full, *target.shape[1:]))
            if rest:
                target[full, :rest].copy_(host[num_tokens - rest :])

    def seal_pages(self, first_page: int, count: int) -> None:
        """Checksum pages and let consumers have them; they must not be written again.

        Raises:
            ServiceError: KV_MISMATCH if a page does not exist or is sealed already; or the
                error the prefix was ended with.
        """
        pages = self._open_pages(first_page, count)
        raw = pages.view(torch.uint8).numpy().reshape(count, -1)
        checksums = [xxhash.xxh3_64_intdigest(raw[page]) for page in range(count)]
        with self._changed:
            self._segment.checksums[first_page : first_page + count] = checksums
            self._changed.notify_all()

    def fail(self, error: ServiceError) -> None:
        """End the prefix with an error, which all its readers get."""
        with self._changed:
            self._segment.error = self._segment.error or error
            self._changed.notify_all()

    @property
    def complete(self) -> bool:
        """Whether every page is sealed."""
        with self._changed:
            return self._segment.error is None and None not in self._segment.checksums

    def _open_pages(self, first_page: int, count: int) -> Tensor:
        """[count, *page_shape] of pages that may be written."""
        segment, end = self._segment, first_page + count
        with self._changed:
            if segment.error is not None:
                raise _copy(segment.error)
            sealed = [c for c in segment.checksums[first_page:end] if c is not None]
            if first_page < 0 or end > segment.num_pages or sealed:
                raise ServiceError(
                    Reason.KV_MISMATCH,
                    f"pages [{first_page}, {end}) of prefix {segment.prefix_id} cannot be "
                    f"written: it has {segment.num_pages} pages, {len(sealed)} of these sealed",
                    prefix_id=segment.prefix_id,
                )
            return segment.pages[first_page:end]


def _copy(error: ServiceError) -> ServiceError:
    """A fresh exception per reader: raising one object again and again grows its traceback."""
    return ServiceError.from_dict(error.to_dict())


def _stale(prefix_id: str, asked: int, current: int) -> ServiceError:
    return ServiceError(
        Reason.STALE_GENERATION,
        f"prefix {prefix_id} of generation {asked} is gone; this rank is at generation {current}",
        prefix_id=prefix_id,
        generation=asked,
        current_generation=current,
    )


def _unknown(prefix_id: str, state: str) -> ServiceError:
    return ServiceError(Reason.UNKNOWN_PREFIX, f"prefix {prefix_id} {state}", prefix_id=prefix_id)
