from __future__ import annotations

import json
import os
import pty
import signal
import time

import pytest
from client_helpers import Cli, write_clip

from prefill_client import UploadProgress
from prefill_client.cli.progress import Bar, ProgressPrinter

CHUNK = 256 << 10


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_ask(cli: Cli, server, clip):
    run = cli.run("ask", clip, "Who is it?")
    assert (run.returncode, run.stdout) == (0, "You asked: Who is it? \n")
    assert "prefill: 800/800 tokens" in run.stderr
    assert "upload: 1.5M/1.5M bytes" in run.stderr
    assert "3 frames, 0.0 to 1.0 s; 800 video tokens" in run.stderr
    assert "\x1b" not in run.stderr


def test_the_intake_of_a_long_prompt_is_shown(cli: Cli, server, clip):
    server.faults.intake = (250, 1000)
    run = cli.run("ask", clip, "Who is it?")
    assert (run.returncode, run.stdout) == (0, "You asked: Who is it? \n")
    assert "intake: 1000/1000 tokens" in run.stderr


def test_ask_several_questions_prefills_once(cli: Cli, server, clip):
    run = cli.run("ask", "-q", clip, "Who?", "Where?", "--fps", "1", "--max-tokens", "3")
    assert run.stdout == "Q: Who?\nA: You asked: Who? \n\nQ: Where?\nA: You asked: Where? \n\n"
    assert run.stderr == ""
    assert (server.state.prefills, server.state.calls["UploadChunks"]) == (1, 1)
    assert server.state.asks[1].spec.sampling.fps == 1.0


def test_warnings_of_a_video_are_shown_once(cli: Cli, server, tmp_path):
    clip = write_clip(tmp_path / "joined.mp4", 1)
    warned = "prefill: warning: its clock restarts\n"
    assert cli.run("upload", "-q", clip).stderr == warned
    assert cli.run("ask", "-q", clip, "Who?", "Where?").stderr == warned
    assert cli.run("chat", "-q", clip, stdin="Who?\nWhere?\n").stderr == warned
    assert cli.run("list", "-q").stderr == warned
    record = json.loads(cli.run("ask", "-q", clip, "Who?", "--json").stdout)
    found = [{"reason": "CLOCK_RESTARTS", "message": "its clock restarts"}]
    assert record["warnings"] == found
    started = cli.run("start", "-q", "--wait", clip)
    assert started.stderr == warned
    job = json.loads(cli.run("jobs", "--json", started.stdout.split()[0]).stdout)
    assert (job["result"]["warnings"], job["result"]["unlisted_frames"]) == (found, 1)


def test_a_video_from_the_standard_input(cli: Cli, server, clip):
    text = clip.read_text()
    run = cli.run("upload", "-", stdin=text)
    assert (run.returncode, run.stdout.split()[1]) == (0, "-"), run.stderr
    (video_id,) = server.state.videos
    assert bytes(server.state.data[video_id]) == clip.read_bytes()
    run = cli.run("ask", "-q", "-", "Who?", "Where?", stdin=text)
    assert run.stdout.count("You asked: ") == 2
    run = cli.run("ask", clip.as_uri(), "Who?")
    assert "You asked: Who? " in run.stdout
    assert (len(server.state.videos), server.state.calls["UploadChunks"]) == (1, 1)
    run = cli.run("ask", "https://example.com/a.mp4", "Who?")
    assert run.returncode == 2
    assert "URLs are not fetched; download it first" in run.stderr
    run = cli.run("ask", clip, b"caf\xe9?".decode(errors="surrogateescape"))
    assert run.returncode == 2
    assert r"question = '\udce9' is not accepted" in run.stderr


def test_ask_json_and_id(cli: Cli, server, clip):
    video_id = cli.run("upload", clip).stdout.split()[0]
    run = cli.run("ask", video_id, "Who?", "--json")
    record = json.loads(run.stdout)
    assert (record["question"], record["text"]) == ("Who?", "You asked: Who? ")
    assert record["usage"]["video_tokens"] == 800
    assert record["frames"] == {"numbers": [0, 12, 25], "times_s": [0.0, 0.48, 1.0]}
    assert record["video_id"] == video_id


def test_chat_remembers(cli: Cli, server, clip):
    run = cli.run("chat", "-q", clip, stdin="Who?\n\nWhere?\n")
    assert (run.returncode, run.stdout) == (0, "You asked: Who? \nYou asked: Where? \n")
    assert [m.text for m in server.state.asks[1].messages] == ["Who?", "You asked: Who? ", "Where?"]


def test_videos_and_jobs(cli: Cli, server, tmp_path):
    clips = [write_clip(tmp_path / f"{n}.mp4", n) for n in range(2)]
    run = cli.run("upload", clips[0], tmp_path / "none.mp4", clips[1], "--json")
    assert run.returncode == 1
    assert "none.mp4" in run.stderr
    ids = [json.loads(line)["video_id"] for line in run.stdout.splitlines()]
    assert len(ids) == 2
    listing = cli.run("list").stdout.splitlines()
    assert [line.split()[:2] for line in listing] == [[ids[1], "READY"], [ids[0], "READY"]]
    assert json.loads(cli.run("list", "--json").stdout.splitlines()[0])["info"]["width"] == 320
    job = json.loads(cli.run("start", ids[0], "--json").stdout)
    assert job["state"] == "QUEUED"
    watched = cli.run("watch", job["job_id"])
    assert watched.returncode == 0
    assert watched.stdout.split()[:2] == [job["job_id"], "SUCCEEDED"]
    assert cli.run("jobs").stdout.split()[:2] == [job["job_id"], "SUCCEEDED"]
    lines = cli.run("watch", "--json", job["job_id"]).stdout.splitlines()
    assert json.loads(lines[-1])["result"]["prefix_id"] == "pfx_1"
    other = cli.run("start", ids[1]).stdout.split()[0]
    assert cli.run("cancel", other).stdout.split()[1] == "CANCELLED"
    assert cli.run("jobs", other).stdout.split()[1] == "CANCELLED"
    assert cli.run("watch", other).returncode == 1
    assert cli.run("delete", *ids).returncode == 0
    gone = cli.run("delete", ids[0])
    assert gone.returncode == 1
    assert gone.stderr == f"prefill: no video '{ids[0]}' [UNKNOWN_VIDEO]\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["ask", "none.mp4", "Who?"], 1, "No such file or directory: 'none.mp4'"),
        (["ask", "vid_0", "Who?"], 1, "no video 'vid_0' [UNKNOWN_VIDEO]"),
        (["--address", "localhost:1", "list"], 1, "cannot reach localhost:1: "),
        (["ask", "vid_0"], 2, "required: QUESTION"),
        (["ask", "vid_0", "Who?", "--fps", "1", "--num-frames", "2"], 2, "not allowed with"),
        (["ask", "vid_0", "Who?", "--top-k", "99999999999"], 2, "top_k = 99999999999"),
        (["list", "--tls-cert", "a.pem"], 2, "both cert and key"),
        (["list", "--token-file", "none"], 1, "No such file or directory: 'none'"),
        (["batch", "in.jsonl", "-o", "in.jsonl"], 2, "must be three files"),
    ],
)
def test_errors_are_one_line(cli: Cli, arguments, status, message):
    run = cli.run(*arguments)
    assert run.returncode == status
    assert message in run.stderr
    if status == 1:
        assert run.stderr.count("\n") == 1


def test_token_file(cli: Cli, server, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    assert cli.run("list", "--token-file", "token").returncode == 0
    assert server.state.metadata["authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("proxy", ["http_proxy", "grpc_proxy", "https_proxy"])
def test_no_proxy_to_this_machine(cli: Cli, monkeypatch, proxy):
    monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert cli.run("list").returncode == 0


def test_ctrl_c_cancels_at_the_server(cli: Cli, server, clip):
    server.faults.token_delay_s = 30.0
    process = cli.start("ask", clip, "Who?")
    wait_for(lambda: server.state.ask_active)
    time.sleep(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr
    wait_for(lambda: server.state.ask_cancelled == 1, 2.0)
    assert time.monotonic() - start < 5


def test_killed_upload_is_gone_on_with(cli: Cli, server, clip):
    server.faults.chunk_delay_s = 0.2
    process = cli.start("upload", clip)
    wait_for(lambda: server.state.bytes_received >= 2 * CHUNK)
    process.kill()
    process.communicate()
    server.faults.chunk_delay_s = 0.0
    time.sleep(0.5)  # the chunk under way is committed
    assert server.state.bytes_received < clip.stat().st_size
    assert cli.run("upload", clip).returncode == 0
    assert server.state.bytes_received == clip.stat().st_size


def test_interrupted_upload(cli: Cli, server, clip):
    server.faults.chunk_delay_s = 0.2
    process = cli.start("upload", clip)
    wait_for(lambda: server.state.bytes_received >= CHUNK)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in stderr) == (130, False)


def test_ctrl_c_in_a_unary_call(cli: Cli, server):
    server.faults.unary_delay_s = 30.0
    process = cli.start("jobs", "job_0")
    wait_for(lambda: server.state.calls["GetPrefillJob"])
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert time.monotonic() - start < 5


def test_bars_on_a_terminal(cli: Cli, server, clip):
    server.faults.prefill_delay_s = 0.15
    leader, follower = pty.openpty()
    process = cli.start("ask", clip, "Who?", stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # how Linux says that the other side was closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    out, _ = process.communicate(timeout=20)
    assert out == "You asked: Who? \n"
    text = shown.decode()
    assert "\x1b[2K" in text
    assert "━" in text
    assert "800/800 tokens, 533/s" in text


def test_bar():
    bar = Bar("decode", 30, 120, "frames", 10.0)
    assert bar.numbers() == "30/120 frames, 3/s, 0:30 left"
    assert bar.draw(79) == f"decode   {'━' * 8}{'─' * 22} {bar.numbers()}"
    assert Bar("decode", 0, 120, "frames", 0.0).numbers() == "0/120 frames"
    assert len(bar.draw(20)) <= 20
    assert Bar("upload", 3 << 30, 4 << 30, "bytes", 4000.0).numbers() == (
        "3.0G/4.0G bytes, 786.4K/s, 22:13 left"
    )


def test_plain_progress_is_occasional():
    class Lines(list):
        def write(self, text):
            self.append(text)

        def flush(self):
            pass

        def isatty(self):
            return False

    now = [0.0]
    lines = Lines()
    printer = ProgressPrinter(lines, clock=lambda: now[0])  # type: ignore[arg-type]
    for done in range(101):
        now[0] += 0.12
        printer.show_upload(UploadProgress("upload", done, 100))
    assert [line.strip().split(",")[0] for line in lines] == [
        "upload: 0/100 bytes",
        "upload: 42/100 bytes",
        "upload: 84/100 bytes",
        "upload: 100/100 bytes",
    ]
