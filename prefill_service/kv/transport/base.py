"""How pages travel from a worker to whoever reads them: what a transport has to offer.

A transport has two ends. In the worker a ``PageServer`` serves the pages of a ``ShardStore`` at an
endpoint, ``scheme:address``, which the manifest names. At the reader's a ``PageConnection`` to one
rank opens a prefix under a lease and pulls pages. Which pages are asked for, in what order, and
whether their checksums are right is not the transport's business: ``page_client`` does that for
all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.page_store import ShardStore


@dataclass(frozen=True, slots=True)
class PullRequest:
    """One reader's wish for pages of one rank.

    Attributes:
        lease_id: the lease to read under.
        num_pages: pages that the rank must have at least, for all that is going to be pulled.
        timeout_s: longest wait for the next answer of the rank.
    """

    manifest: Manifest
    rank: int
    lease_id: str
    num_pages: int
    timeout_s: float

    @property
    def endpoint(self) -> str:
        """Where the rank serves its pages."""
        return self.manifest.endpoints[self.rank]

    def failure(self, what: str) -> ServiceError:
        """HANDOFF_FAILED, naming the rank: ``what`` says what it did or did not do."""
        return ServiceError(
            Reason.HANDOFF_FAILED,
            f"rank {self.rank} {what}",
            rank=self.rank,
            endpoint=self.endpoint,
        )

    def cancellation(self) -> ServiceError:
        """CANCELLED, by the reader's own wish."""
        return cancelled(self.lease_id)


def cancelled(lease_id: str) -> ServiceError:
    """The load under this lease was cancelled by its reader."""
    return ServiceError(Reason.CANCELLED, "the load was cancelled", lease_id=lease_id)


class PageServer(ABC):
    """Serves a rank's pages.

    An open connection does not renew a lease; the service does (``ShardStore.grant_lease``). A
    server answers with the store's own errors, and waits with it for pages that are not complete
    (``open_prefix``, ``wait_sealed``). Memory that has to be registered with a device is registered
    when a prefix is opened.
    """

    @property
    @abstractmethod
    def endpoint(self) -> str:
        """Address for the manifest, ``scheme:...``; known once the server has started."""

    @abstractmethod
    def start(self) -> None:
        """Begin to serve, in threads of its own.

        Raises:
            ServiceError: CONFIG_INVALID if it cannot be reached at its address.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening and end all connections."""


class PageConnection(ABC):
    """A reader's connection to one rank, used by one thread. ``interrupt`` is for the others."""

    @abstractmethod
    def open(self) -> None:
        """Connect and open the prefix under its lease; waits until the rank has created it.

        Raises:
            ServiceError: HANDOFF_FAILED (rank unreachable, gone or silent), KV_MISMATCH (fewer
                pages than the manifest says), or the store's error.
        """

    @abstractmethod
    def pull(self, first: int, count: int) -> tuple[np.ndarray, list[int]]:
        """Pages of the rank, once they are complete.

        Args:
            first: index of the first page on this rank.
            count: so many pages from there.

        Returns:
            A private copy of their bytes [count, page_bytes] uint8, and the checksums that the rank
            took of them.

        Raises:
            ServiceError: as ``open``.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Make a call that waits in another thread, and all later ones, fail soon."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Idempotent, also before ``open``."""


class Transport(ABC):
    """One way for pages to travel. Stateless.

    Attributes:
        scheme: what its endpoints begin with, before the colon.
        example: an endpoint, for error messages.
    """

    scheme: str
    example: str

    @abstractmethod
    def serve(self, store: ShardStore, folder: Path, name: str) -> PageServer:
        """A server of the rank's pages, not yet started.

        Args:
            folder: the service's runtime directory, for files that the server needs.
            name: unlike that of any other server in this folder.
        """

    @abstractmethod
    def make_connection(self, request: PullRequest) -> PageConnection:
        """A connection to the rank that the request names, not yet opened."""
