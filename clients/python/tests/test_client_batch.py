from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from client_helpers import FAST, Cli, until, write_clip

from prefill_client import AsyncClient, RetryPolicy, UnavailableError
from prefill_client.batch import run_batch
from prefill_client.batch._files import ResultFile, read_input


def line(custom_id: str, video: object, question: str = "Who?", **body: object) -> str:
    body = {"video": str(video), "question": question, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/ask", "body": body})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def records(path: Path) -> dict[str, dict]:
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert len({r["custom_id"] for r in found}) == len(found)
    return {record["custom_id"]: record for record in found}


@pytest.fixture
def clips(tmp_path) -> list[Path]:
    return [write_clip(tmp_path / f"{n}.mp4", n) for n in range(3)]


def test_batch(cli: Cli, server, clips, tmp_path):
    copy = shutil.copy(clips[0], tmp_path / "cöpy.mp4")
    video_id = cli.run("upload", clips[2]).stdout.split()[0]
    write(
        tmp_path / "in.jsonl",
        [
            line("a", clips[0], "One?"),
            line("b", "1.mp4", "Two?", max_tokens=3, stop=["x"]),
            line("c", copy, "Three?"),
            line("d", clips[0].as_uri(), "Four?", fps=None),
            line("e", video_id, "Five?"),
            json.dumps(
                {
                    "custom_id": "f",
                    "body": {
                        "video": video_id,
                        "messages": [
                            {"role": "user", "content": "x"},
                            {"role": "assistant", "content": "y"},
                            {"role": "user", "content": "Six?"},
                        ],
                    },
                }
            ),
            line("g", Path(copy).as_uri(), "Seven?"),
        ],
    )
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl", "--errors", "err.jsonl")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("batch: 7 answered; ")
    assert "batch: 7/7 lines" in run.stderr
    answers = records(tmp_path / "out.jsonl")
    words = ["One", "Two", "Three", "Four", "Five", "Six", "Seven"]
    for custom_id, word in zip("abcdefg", words, strict=True):
        record = answers[custom_id]
        assert set(record) == {"id", "custom_id", "response", "error"}
        assert record["error"] is None
        response = record["response"]
        assert response["status_code"] == 200
        assert response["request_id"] in {ask.request_id for ask in server.state.asks}
        body = response["body"]
        assert (body["text"], body["finish_reason"]) == (f"You asked: {word}? ", "stop")
        assert body["usage"]["video_tokens"] == 800
        assert body["frames"] == {"count": 3, "first_s": 0.0, "last_s": 1.0}
        assert body["timings"]["total_s"] == 1.25
    assert (tmp_path / "err.jsonl").read_text() == ""
    # Four names, two files: each was sent once, and each prefix prefilled once.
    assert server.state.bytes_received == sum(clip.stat().st_size for clip in clips)
    assert server.state.prefills == 3


def test_concurrency_is_bounded_and_videos_stay_together(cli: Cli, server, clips, tmp_path):
    server.faults.token_delay_s = 0.02
    lines = [line(f"{q}-{v}", clips[v], f"q{q} v{v}") for q in range(4) for v in range(3)]
    write(tmp_path / "in.jsonl", lines)
    assert cli.run("batch", "in.jsonl", "-o", "o.jsonl", "--concurrency", 2).returncode == 0
    assert server.state.ask_peak == 2
    videos = [ask.spec.video_id for ask in server.state.asks]
    assert sum(a != b for a, b in itertools.pairwise(videos)) <= 4


def test_bad_lines_and_failures(cli: Cli, server, clips, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    write(
        tmp_path / "in.jsonl",
        [
            line("ok", clips[0]),
            "{not json",
            line("ok", clips[0]),
            "",
            line("typo", clips[0], max_token=3),
            line("text", text),
            line("empty", clips[0], " "),
            line("none", "none.mp4"),
            line("type", clips[0], fps="fast"),
            line("url", "http://example.com/a.mp4"),
            '["a"]',
            '{"custom_id": "half \\ud83d", "body": {"video": "none.mp4", "question": "x"}}',
            line("seed", clips[0], seed=2**63, temperature=float("nan")),
        ],
    )
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl", "--errors", "err.jsonl")
    assert run.returncode == 3
    assert run.stdout.startswith("batch: 1 answered, 11 failed (see err.jsonl); ")
    assert list(records(tmp_path / "out.jsonl")) == ["ok"]
    errors = [json.loads(t)["error"] for t in (tmp_path / "err.jsonl").read_text().splitlines()]
    by_line = {error["line"]: error for error in errors}
    reasons = {number: error["reason"] for number, error in by_line.items()}
    assert reasons == {
        2: "INVALID_LINE",
        3: "DUPLICATE_CUSTOM_ID",
        5: "INVALID_LINE",
        6: "NOT_A_VIDEO",
        7: "QUESTION_EMPTY",
        8: "FILE_UNREADABLE",
        9: "INVALID_LINE",
        10: "INVALID_LINE",
        11: "INVALID_LINE",
        12: "INVALID_LINE",
        13: "INVALID_LINE",
    }
    assert by_line[2]["message"].startswith("in.jsonl:2: not JSON: ")
    assert by_line[3]["message"] == "in.jsonl:3: custom_id 'ok' was used in line 1 already"
    assert "unknown key 'max_token'; accepted: video, question" in by_line[5]["message"]
    assert "fps = 'fast' is not accepted" in by_line[9]["message"]
    assert "URLs are not fetched; download it first" in by_line[10]["message"]
    assert r"custom_id = '\ud83d' is not accepted" in by_line[12]["message"]
    assert "temperature = nan is not accepted" in by_line[13]["message"]


def test_strict_asks_nothing(cli: Cli, server, clips, tmp_path):
    write(tmp_path / "in.jsonl", [line("a", clips[0]), "{"])
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl", "--strict")
    assert run.returncode == 1
    assert run.stderr.startswith("prefill: in.jsonl:2: not JSON")
    assert not server.state.calls


def test_failed_lines_are_asked_again(cli: Cli, server, clips, tmp_path):
    write(tmp_path / "in.jsonl", [line(str(n), clips[0], f"q{n}") for n in range(5)])
    server.faults.job_error = ("RANK_DIED", "rank 1 died")
    assert cli.run("batch", "in.jsonl", "-o", "out.jsonl").returncode == 3
    assert len(records(tmp_path / "out.errors.jsonl")) == 5
    server.faults.job_error = None
    server.state.jobs.clear()
    server.state.prefixes.clear()
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl")
    assert run.returncode == 0
    assert len(records(tmp_path / "out.jsonl")) == 5
    assert (tmp_path / "out.errors.jsonl").read_text() == ""
    asks = len(server.state.asks)
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl")
    assert run.stdout.startswith("batch: 0 answered, 5 skipped (answered before); ")
    assert len(server.state.asks) == asks


def test_a_full_queue_is_waited_for(cli: Cli, server, clips, tmp_path):
    server.faults.queue_full = 2
    write(tmp_path / "in.jsonl", [line(str(n), clips[0], f"q{n}") for n in range(3)])
    assert cli.run("batch", "in.jsonl", "-o", "out.jsonl").returncode == 0
    assert len(server.state.asks) == 5


async def test_absent_server_ends_the_batch(server, clips, tmp_path):
    """Lines are neither failed nor lost when there is nobody to ask."""
    write(tmp_path / "in.jsonl", [line(str(n), clips[0], f"q{n}") for n in range(20)])
    paths = [tmp_path / name for name in ("in.jsonl", "out.jsonl", "err.jsonl")]
    server.faults.token_delay_s = 0.05
    async with AsyncClient(server.address, retry=FAST) as client:
        patience = RetryPolicy(attempts=2, initial_delay_s=0.05)
        batch = asyncio.ensure_future(run_batch(client, *paths, retry=patience))
        await until(lambda: len(server.state.asks) > 8)
        await asyncio.to_thread(server.stop)
        try:
            with pytest.raises(UnavailableError):
                await batch
        finally:
            await asyncio.to_thread(server.start)
        done = len(records(paths[1]))
        assert 0 < done < 20
        assert paths[2].read_text() == ""
    # gRPC waits a second or so before it tries an address again that refused it.
    again = RetryPolicy(attempts=10, initial_delay_s=0.2)
    async with AsyncClient(server.address, retry=again) as client:
        result = await run_batch(client, *paths)
    assert (result.skipped, result.answered, result.left) == (done, 20 - done, 0)


async def test_broken_answers_are_asked_for_again(server, clips, tmp_path):
    write(tmp_path / "in.jsonl", [line("a", clips[0]), line("b", clips[0])])
    paths = [tmp_path / name for name in ("in.jsonl", "out.jsonl", "err.jsonl")]
    server.faults.ask_break_after = 2
    async with AsyncClient(server.address, retry=FAST) as client:
        batch = asyncio.ensure_future(run_batch(client, *paths))
        await until(lambda: len(server.state.asks) > 2)
        assert (await batch).answered == 2
    assert records(paths[1])["a"]["response"]["body"]["text"] == "You asked: Who? "


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_batch_goes_on(cli: Cli, server, clips, tmp_path, how):
    server.faults.token_delay_s = 0.1
    lines = [line(str(n), clips[n % 2], f"q{n}") for n in range(12)]
    write(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    process = cli.start("batch", "in.jsonl", "-o", "out.jsonl", "--concurrency", "2")
    deadline = time.monotonic() + 20
    while not output.exists() or output.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=20)
    done = len(records(output))
    assert 3 <= done < 12
    if how is not signal.SIGKILL:
        assert process.returncode == 130
        assert f"{done} answered" in out
        assert f"{12 - done} left: run the same command again" in out
        assert "Traceback" not in err
        deadline = time.monotonic() + 5
        while server.state.ask_active:
            assert time.monotonic() < deadline, "work goes on at the server"
            time.sleep(0.01)
    server.faults.token_delay_s = 0.0
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl")
    assert run.returncode == 0
    assert f"{12 - done} answered, {done} skipped" in run.stdout
    assert len(records(output)) == 12


@pytest.mark.parametrize("torn", ['{"id": "x", "custom_id": "b", "resp', '{"id"', "\x00\x00"])
def test_torn_last_line_is_repaired(cli: Cli, server, clips, tmp_path, torn):
    write(tmp_path / "in.jsonl", [line("a", clips[0]), line("b", clips[0])])
    good = json.dumps({"id": "1", "custom_id": "a", "response": {}, "error": None})
    (tmp_path / "out.jsonl").write_text(good + "\n" + torn)
    run = cli.run("batch", "in.jsonl", "-o", "out.jsonl")
    assert run.returncode == 0, run.stderr
    assert list(records(tmp_path / "out.jsonl")) == ["a", "b"]


def test_last_line_without_its_newline_counts(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"custom_id": "a", "response": {}}')
    with ResultFile(path, resume=True) as output:
        assert output.done == {"a"}
        output.append({"custom_id": "b", "response": {}})
    assert list(records(path)) == ["a", "b"]


@pytest.mark.parametrize("content", ["a note\n", line("a", "v") + "\n", '{"custom_id": 1}\n{}\n'])
def test_foreign_output_is_not_touched(cli: Cli, server, clips, tmp_path, content):
    write(tmp_path / "in.jsonl", [line("a", clips[0])])
    (tmp_path / "notes").write_text(content)
    run = cli.run("batch", "in.jsonl", "-o", "notes")
    assert run.returncode == 2
    assert "notes:1 is not a line of a batch's output" in run.stderr
    assert (tmp_path / "notes").read_text() == content
    assert not server.state.calls


def test_input_encoding(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line("a", "a.mp4").encode() + b"\r\n\xff\n")
    items, bad = read_input(path)
    assert [item.custom_id for item in items] == ["a"]
    assert bad[0].error.message == f"{path}:2: not UTF-8: byte 0 is 0xff"
