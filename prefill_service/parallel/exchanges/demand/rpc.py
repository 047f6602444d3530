"""Rounds of requests and replies between ranks whose control flow differs.

What a rank wants to know of the others depends on its own data: which blocks it selected, whether
a KV head missed the floor. In every round each rank asks one thing, or nothing any more, and
answers what the others ask; a rank that has all it needs goes on answering until nobody asks. So
no rank has to know what another does, and none waits for one that does not come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from torch import Tensor

from prefill_service.parallel.process_group import SPGroup


class Ask(IntEnum):
    """What a rank wants in a round."""

    NOTHING = 0
    BLOCKS = 1
    ATTENTION = 2
    KEPT_MASS = 3


@dataclass(frozen=True, slots=True)
class Header:
    """One rank's part in a round.

    Attributes:
        ask: what.
        heads: KV heads it is about, as a bit mask.
        samples: query rows it is about.
        clustered: tokens before this one are meant in clustered order.
    """

    ask: Ask
    heads: int = 0
    samples: int = 0
    clustered: int = 0


@dataclass(slots=True)
class CollectiveRpc:
    """One rank's view.

    Attributes:
        room: an uninitialised tensor for the request of a rank with such a header.
        answer: the reply to a rank's request.
    """

    group: SPGroup
    room: Callable[[Header], Tensor]
    answer: Callable[[int, Header, Tensor], Tensor]
    count: int = field(default=0)

    def ask(
        self, header: Header, requests: Mapping[int, Tensor], replies: Mapping[int, Tensor]
    ) -> bool:
        """One round.

        Args:
            requests: per other rank.
            replies: per other rank, filled with its reply.

        Returns:
            Whether anybody asked anything.
        """
        self.count += 1
        row = [int(header.ask), header.heads, header.samples, header.clustered]
        headers = [Header(Ask(ask), *rest) for ask, *rest in self.group.all_gather_ints(row)]
        asking = [
            rank
            for rank, other in enumerate(headers)
            if other.ask is not Ask.NOTHING and rank != self.group.rank
        ]
        if not asking and header.ask is Ask.NOTHING:
            return False
        incoming = {rank: self.room(headers[rank]) for rank in asking}
        name = header.ask.name.lower()
        self.group.send_recv(requests, incoming, "requests").wait()
        answers = {rank: self.answer(rank, headers[rank], incoming[rank]) for rank in asking}
        self.group.send_recv(answers, replies, name).wait()
        return True

    def close(self) -> None:
        """Answer until nobody asks."""
        while self.ask(Header(Ask.NOTHING), {}, {}):
            pass
