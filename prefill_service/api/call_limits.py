"""How many calls run at once, in all and of one peer; uploads are counted apart from the rest."""

from __future__ import annotations

import math
from collections import Counter
from urllib.parse import unquote

from prefill_service.errors import Reason, ServiceError

UPLOAD = "UploadChunks"


class CallLimit:
    """Calls of one kind at once.

    Args:
        what: the calls, as errors name them.
        most: of them at once.
        peer_share: of ``most``, what one peer may have, rounded up.
    """

    def __init__(self, what: str, most: int, *, peer_share: float) -> None:
        self._what = what
        self._most = most
        self._most_of_peer = math.ceil(peer_share * most)
        self._running: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """Calls at the moment, refused ones that are being answered included."""
        return self._running.total()

    def enter(self, peer: str) -> None:
        """Count a call, which must ``leave``."""
        self._running[peer] += 1

    def leave(self, peer: str) -> None:
        """Count a call no more."""
        self._running[peer] -= 1
        if not self._running[peer]:
            del self._running[peer]

    def check(self, peer: str) -> None:
        """Whether a call that has entered may go on.

        Raises:
            ServiceError: QUEUE_FULL (metadata: limit).
        """
        if self.running > self._most:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{self._most} {self._what} are running, which is the limit",
                limit=self._most,
            )
        if self._running[peer] > self._most_of_peer:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{self._most_of_peer} {self._what} from {peer} are running, which is the limit "
                "for one address",
                limit=self._most_of_peer,
            )


def address_of(peer: str) -> str:
    """The address in gRPC's name for a peer, e.g. ``ipv4:192.0.2.1:5000``, without its port."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return unquote(rest).rpartition(":")[0].strip("[]")
