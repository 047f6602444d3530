"""Rounds of requests and replies between ranks whose control flow differs.

What a rank wants to know of the others depends on its own data: which blocks it selected, whether
a KV head missed the floor. In every round each rank sends one request, or nothing any more, and
answers the others' requests; a rank that has all it needs goes on answering until nobody requests
anything. So no rank has to know what another does, and none waits for one that does not come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from prefill_service.parallel.process_group import SPGroup


class RequestKind(IntEnum):
    """What a rank wants in a round."""

    NOTHING = 0
    BLOCKS = 1
    ATTENTION = 2
    KEPT_MASS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHeader:
    """What all ranks learn of a rank's request before its data is sent.

    Attributes:
        kind: what is wanted.
        heads: KV heads it is about, as a bit mask.
        samples: query rows it is about.
        clustered_until: tokens before this one are meant in clustered order.
    """

    kind: RequestKind
    heads: int = 0
    samples: int = 0
    clustered_until: int = 0

    def to_ints(self) -> list[int]:
        """The header as it is gathered from all ranks."""
        return [int(self.kind), self.heads, self.samples, self.clustered_until]

    @classmethod
    def from_ints(cls, values: list[int]) -> RequestHeader:
        """The reverse of ``to_ints``."""
        kind, heads, samples, clustered_until = values
        return cls(
            kind=RequestKind(kind), heads=heads, samples=samples, clustered_until=clustered_until
        )


class RequestHandler(Protocol):
    """Answers other ranks' requests."""

    def request_buffer(self, header: RequestHeader) -> Tensor:
        """An uninitialised tensor for the data of a request with such a header."""

    def answer_request(self, rank: int, header: RequestHeader, request: Tensor) -> Tensor:
        """The reply to a rank's request."""


@dataclass(frozen=True, slots=True)
class CollectiveRpc:
    """One rank's side of the rounds.

    Attributes:
        group: the ranks.
        handler: answers the others.
    """

    group: SPGroup
    handler: RequestHandler

    def exchange_requests(
        self,
        header: RequestHeader,
        requests: Mapping[int, Tensor],
        replies: Mapping[int, Tensor],
    ) -> bool:
        """Take part in one round: send a request to the others, answer theirs.

        Args:
            header: of this rank's request.
            requests: per other rank.
            replies: per other rank, filled with its reply.

        Returns:
            Whether any rank requested anything.
        """
        gathered = self.group.all_gather_ints(header.to_ints())
        headers = [RequestHeader.from_ints(values) for values in gathered]
        requesting = [
            rank
            for rank, other in enumerate(headers)
            if other.kind is not RequestKind.NOTHING and rank != self.group.rank
        ]
        if not requesting and header.kind is RequestKind.NOTHING:
            return False
        incoming = {rank: self.handler.request_buffer(headers[rank]) for rank in requesting}
        self.group.send_recv(requests, incoming, "requests").wait()
        answers = {
            rank: self.handler.answer_request(rank, headers[rank], incoming[rank])
            for rank in requesting
        }
        self.group.send_recv(answers, replies, header.kind.name.lower()).wait()
        return True

    def answer_until_done(self) -> None:
        """Answer the other ranks until none requests anything."""
        while self.exchange_requests(RequestHeader(kind=RequestKind.NOTHING), {}, {}):
            pass
