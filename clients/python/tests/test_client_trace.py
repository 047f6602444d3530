"""A job's trace: pieces joined, a broken stream begun again, the command's file."""

from __future__ import annotations

import json

import pytest
from client_helpers import Api, Cli

from prefill_client import InvalidRequestError, NotFoundError


async def test_trace_is_the_servers_text_also_after_a_break(api: Api, server, clip):
    job = await api.call("prefill", clip, wait=True)
    server.faults.trace_break = 1
    trace = json.loads(await api.call("trace_job", job.job_id))
    assert [event["ph"] for event in trace["traceEvents"]] == ["X", "M"]
    assert trace["traceEvents"][0]["name"] == "naïve"
    assert server.state.calls["TracePrefillJob"] == 2
    with pytest.raises(NotFoundError, match="no job 'job_x'") as caught:
        await api.call("trace_job", "job_x")
    assert caught.value.reason == "UNKNOWN_JOB"
    server.faults.prefill_delay_s = 30
    queued = await api.call("prefill", clip, fps=1.0)
    with pytest.raises(InvalidRequestError) as refused:
        await api.call("trace_job", queued.job_id)
    assert refused.value.reason == "NO_TRACE"


def test_command_writes_the_file_or_the_standard_output(cli: Cli, server, clip, tmp_path):
    job_id = cli.run("start", "--wait", "-q", clip).stdout.split()[0]
    run = cli.run("trace", job_id, "-o", "trace.json")
    assert (run.returncode, run.stdout) == (0, f"{job_id}  1 slices  trace.json\n"), run.stderr
    written = json.loads((tmp_path / "trace.json").read_text())
    assert len(written["traceEvents"]) == 2
    run = cli.run("trace", job_id)
    assert json.loads((tmp_path / f"{job_id}.json").read_text()) == written
    assert json.loads(cli.run("trace", job_id, "-o", "-").stdout) == written
    run = cli.run("trace", "job_x", "-o", "never.json")
    assert (run.returncode, run.stderr) == (1, "prefill: no job 'job_x' [UNKNOWN_JOB]\n")
    assert not (tmp_path / "never.json").exists()
