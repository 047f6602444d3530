"""Reports of finished loads and of prompts taken in, from inside vLLM to the service.

vLLM answers a failed load with a generic HTTP 500; the report carries the cause. It is also
how the service learns what a hand-off moved, and that a silent vLLM is at work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from prefill_service.kv.handoff import MAX_LINE_BYTES, HandoffReport, IntakeReport
from prefill_service.kv.transport.sockets import bind_unix, encode_line, unix_address, unix_path

logger = logging.getLogger(__name__)

_MAX_REPORTS = 4096
_READ_TIMEOUT_S = 5.0
_SEND_TIMEOUT_S = 2.0


class Intake:
    """How much of one prompt vLLM has taken in, as far as it has said.

    Attributes:
        latest: the last report.
        reported_at: ``time.monotonic()`` of it.
    """

    def __init__(self) -> None:
        self.latest: IntakeReport | None = None
        self.reported_at = -math.inf
        self._changed = asyncio.Event()

    def note(self, report: IntakeReport) -> None:
        """Take a report and wake who waits for one."""
        self.latest = report
        self.reported_at = time.monotonic()
        self._changed.set()

    async def wait_report(self) -> IntakeReport:
        """The next report that nobody has waited for yet."""
        await self._changed.wait()
        self._changed.clear()
        assert self.latest is not None
        return self.latest


class ReportServer:
    """The service's end: a Unix socket that takes one report per connection.

    Reports under one lease id (one per tensor-parallel worker) are merged: the load is well
    only if all are, times and tokens are the largest, bytes add up. So each answer needs a
    lease id of its own. The oldest reports are forgotten beyond 4096.
    Of prompts that are taken in, reports go to those who follow them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._reports: OrderedDict[str, HandoffReport] = OrderedDict()
        self._waiting: dict[str, asyncio.Event] = {}
        self._intakes: dict[str, Intake] = {}

    @property
    def address(self) -> str:
        """``report_to`` of the hand-off parameters."""
        return unix_address(self._path)

    async def start(self) -> None:
        """Listen for reports on the socket ``path``.

        Raises:
            ServiceError: CONFIG_INVALID if the path cannot be bound.
        """
        listener = bind_unix(self._path)
        self._server = await asyncio.start_unix_server(
            self._receive, sock=listener, limit=MAX_LINE_BYTES
        )

    async def stop(self) -> None:
        """Stop listening and remove the socket file."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._path.unlink(missing_ok=True)

    async def wait(self, lease_id: str, timeout_s: float) -> HandoffReport | None:
        """The report under this lease, once it is there; ``None`` after the timeout."""
        if lease_id not in self._reports:
            event = self._waiting.setdefault(lease_id, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), timeout_s)
            except TimeoutError:
                pass
            finally:
                self._waiting.pop(lease_id, None)
        return self._reports.get(lease_id)

    def forget(self, lease_id: str) -> None:
        """Drop the report under this lease, which nobody will ask for again."""
        self._reports.pop(lease_id, None)

    @contextmanager
    def follow_intake(self, lease_id: str) -> Iterator[Intake]:
        """Follow the reports of the prompt under this lease."""
        intake = self._intakes[lease_id] = Intake()
        try:
            yield intake
        finally:
            del self._intakes[lease_id]

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await asyncio.wait_for(reader.readline(), _READ_TIMEOUT_S)
            values = json.loads(line)
            if "computed_tokens" not in values:
                self._record(HandoffReport(**values))
            elif intake := self._intakes.get(values["lease_id"]):
                intake.note(IntakeReport(**values))
        except (TimeoutError, ValueError, TypeError, OSError) as error:
            logger.warning("malformed report: %r", error)
        finally:
            writer.close()

    def _record(self, report: HandoffReport) -> None:
        earlier = self._reports.pop(report.lease_id, None)
        self._reports[report.lease_id] = report if earlier is None else _merge(earlier, report)
        while len(self._reports) > _MAX_REPORTS:
            self._reports.popitem(last=False)
        event = self._waiting.get(report.lease_id)
        if event is not None:
            event.set()


def _merge(first: HandoffReport, second: HandoffReport) -> HandoffReport:
    return replace(
        first,
        ok=first.ok and second.ok,
        tokens=max(first.tokens, second.tokens),
        bytes=first.bytes + second.bytes,
        seconds=max(first.seconds, second.seconds),
        error=first.error or second.error,
    )


def send_report(address: str, report: HandoffReport | IntakeReport) -> None:
    """Send a report; an empty address means nobody wants it. Never raises, takes at most 2 s."""
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_SEND_TIMEOUT_S)
            connection.connect(unix_path(address))
            connection.sendall(encode_line(asdict(report)))
    except Exception as error:  # the load's outcome must not depend on its report
        logger.warning("cannot send the report of lease %s: %s", report.lease_id, error)
