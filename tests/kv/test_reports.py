"""Reports of loads reach the service, whatever their fate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import HandoffReport, IntakeReport
from prefill_service.kv.handoff_reports import ReportServer, send_report


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ReportServer]:
    server = ReportServer(tmp_path / "reports.sock")
    await server.start()
    yield server
    await server.stop()
    assert not (tmp_path / "reports.sock").exists()


def report(lease: str, error: ServiceError | None = None, size: int = 10) -> HandoffReport:
    return HandoffReport(lease, error is None, 5, size, 0.1, error and error.to_dict())


async def send(server: ReportServer, *reports: HandoffReport) -> None:
    for one in reports:
        await asyncio.to_thread(send_report, server.address, one)


async def test_waiter_gets_the_report(server: ReportServer) -> None:
    waiting = asyncio.create_task(server.wait("lease", 5))
    await asyncio.sleep(0.05)
    await send(server, report("other"), report("lease"))
    assert await waiting == report("lease")
    assert await server.wait("lease", 0) == report("lease")  # it is kept


async def test_no_report_in_time(server: ReportServer) -> None:
    assert await server.wait("lease", 0.05) is None


async def test_workers_reports_are_merged(server: ReportServer) -> None:
    bad = ServiceError(Reason.KV_CORRUPT, "page 3", page=3)
    await send(server, report("lease"), report("lease", bad, size=3))
    while (merged := await server.wait("lease", 1)) is None or merged.bytes != 13:
        await asyncio.sleep(0.01)
    assert not merged.ok
    assert merged.error == bad.to_dict()


async def test_old_reports_are_forgotten(
    server: ReportServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_service.kv.handoff_reports._MAX_REPORTS", 2)
    await send(server, report("a"), report("b"), report("c"))
    assert await server.wait("c", 1) == report("c")
    assert await server.wait("a", 0.01) is None


async def test_a_report_that_was_read_is_dropped_with_its_answer(server: ReportServer) -> None:
    await send(server, report("a"), report("b"))
    assert await server.wait("b", 1) == report("b")
    server.forget("a")
    server.forget("never seen")
    assert await server.wait("a", 0.01) is None
    assert await server.wait("b", 0) == report("b")


async def test_a_prompt_that_is_taken_in_is_followed(server: ReportServer) -> None:
    with server.follow_intake("lease") as intake:
        first = IntakeReport("lease", 10, 30)
        await asyncio.to_thread(send_report, server.address, IntakeReport("other", 1, 30))
        await asyncio.to_thread(send_report, server.address, first)
        assert await asyncio.wait_for(intake.wait_report(), 5) == first
        reported_at = intake.reported_at
        second = IntakeReport("lease", 20, 30)
        waiting = asyncio.create_task(intake.wait_report())
        await asyncio.to_thread(send_report, server.address, second)
        assert await asyncio.wait_for(waiting, 5) == second
        assert intake.latest == second
        assert intake.reported_at > reported_at
    await asyncio.to_thread(send_report, server.address, second)  # nobody follows it any more
    await send(server, report("lease"))
    assert await server.wait("lease", 1) == report("lease")


async def test_nonsense_does_not_stop_the_server(server: ReportServer) -> None:
    for line in (b"nonsense\n", b"{}\n", b"[1]\n", b'{"computed_tokens": 1}\n', b""):
        _, writer = await asyncio.open_unix_connection(server.address.removeprefix("unix:"))
        writer.write(line)
        writer.close()
    await send(server, report("lease"))
    assert await server.wait("lease", 1) == report("lease")


@pytest.mark.parametrize("address", ["", "unix:/nowhere/x.sock", "tcp://example", "nonsense"])
def test_sending_never_raises(address: str) -> None:
    begin = time.monotonic()
    send_report(address, report("lease"))
    assert time.monotonic() - begin < 3
