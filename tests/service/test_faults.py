"""What users and machines do to a running service: ranks, clients, limits, bad questions."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefill_client import Client, ContextExceededError, JobState, PrefillError, Video

from tests.support.service_process import ServiceProcess, service_process
from tests.vllm_server import VllmServer

LIMIT = 12_000


@pytest.fixture(scope="module")
def service(
    checkpoint: Callable[..., Path],
    vllm: Callable[[str], VllmServer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServiceProcess]:
    with service_process(
        checkpoint("qwen3_vl"),
        tmp_path_factory.mktemp("service"),
        *("--ranks", "2", *vllm("qwen3_vl").arguments, "--engine-lease-ttl-s", "5"),
    ) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: ServiceProcess) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def long_video(client: Client, make_video: Callable[..., Path], tmp_path: Path) -> Video:
    """A video no test has asked about before: half a minute, some seconds of prefill."""
    seed = int(time.time() * 1000) % 100_000
    video = make_video(seconds=30, fps=10, width=320, height=240, seed=seed)
    return client.upload(shutil.copy(video, tmp_path / "long.mp4"))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_a_killed_rank_costs_time_but_not_the_answer(
    service: ServiceProcess, client: Client, long_video: Video
) -> None:
    options: Any = {"max_tokens": 8}
    before = client.ask(long_video, "What happens?", fps=1.0, **options).result()
    killed = threading.Event()

    def kill_once(job: object) -> None:
        if not killed.is_set() and getattr(job, "state", None) is JobState.RUNNING:
            killed.set()
            service.workers()[1].kill()

    stream = client.ask(long_video, "What happens?", on_progress=kill_once, **options)
    text = "".join(stream)
    assert killed.is_set()
    assert stream.final is not None
    job = client.job(stream.final.job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 2)
    again = client.ask(long_video, "What happens?", **options).result()
    assert again.text == text
    # what the dead ranks held is computed again when asked for
    after = client.ask(long_video, "What happens?", fps=1.0, **options).result()
    assert after.text == before.text
    # what the dead ranks had in the temporary folder is gone
    (run,) = service.temporary.iterdir()
    assert [folder.name.partition("-")[0] for folder in run.glob("e*-*")] == ["e1"]


def test_a_client_that_leaves_stops_the_work(client: Client, long_video: Video) -> None:
    job_ids: list[str] = []
    started = threading.Event()

    def on_progress(job: object) -> None:
        if getattr(job, "state", None) is JobState.RUNNING and not started.is_set():
            job_ids.append(job.job_id)  # type: ignore[attr-defined]
            started.set()

    stream = client.ask(long_video, "What happens?", on_progress=on_progress)
    reader = threading.Thread(target=lambda: _swallow(stream), daemon=True)
    reader.start()
    assert started.wait(60)
    stream.cancel()
    wait_until(lambda: client.job(job_ids[0]).state is JobState.CANCELLED, 60)
    reader.join(10)
    # the ranks are free at once for somebody else
    assert client.ask(long_video, "Still there?", max_tokens=4, fps=0.5).result().text


def test_a_short_question_overtakes_a_long_prefill(client: Client, long_video: Video) -> None:
    """Another prefix of few frames is answered while the long one's ranks are paused for it."""
    started = threading.Event()

    def on_progress(job: object) -> None:
        if getattr(job, "state", None) is JobState.RUNNING:
            started.set()

    options: Any = {"max_tokens": 8, "quality": "exact"}
    stream = client.ask(long_video, "What happens?", fps=8.0, on_progress=on_progress, **options)
    reader = threading.Thread(target=lambda: _swallow(stream), daemon=True)
    reader.start()
    assert started.wait(60)
    short = client.ask(long_video, "What happens?", num_frames=4, **options).result()
    states = {job.job_id: job.state for job in client.jobs()}
    assert states[short.job_id] is JobState.SUCCEEDED
    assert JobState.RUNNING in states.values()
    reader.join(120)
    assert stream.final is not None
    # Four times the tokens were left, so that nothing but the pause can have let it go before.
    assert stream.final.usage.video_tokens > 8 * short.usage.video_tokens
    again = client.ask(long_video, "What happens?", fps=8.0, **options).result()
    assert again.job_id == stream.final.job_id


def _swallow(stream: object) -> None:
    try:
        for _ in stream:  # type: ignore[attr-defined]
            pass
    except PrefillError:
        pass


def test_a_deadline_ends_the_work(client: Client, long_video: Video) -> None:
    with pytest.raises(PrefillError) as caught:
        list(client.ask(long_video, "What happens?", timeout=1.0))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: all(job.state.ended for job in client.jobs()), 60)


def test_a_video_over_the_context_says_what_would_fit(
    client: Client, make_video: Callable[..., Path]
) -> None:
    video = client.upload(make_video(seconds=240, fps=4, width=640, height=480, seed=7))
    with pytest.raises(ContextExceededError) as caught:
        client.ask(video, "What happens?", fps=4.0, max_pixels=640 * 480 * 960).result()
    error = caught.value
    assert int(error.metadata["tokens"]) > int(error.metadata["limit"])
    assert error.metadata["tokens"] in error.message
    assert error.metadata["limit"] in error.message
    assert "would fit" in error.message
    frames = int(error.message.split("num_frames=")[1].split()[0])
    assert frames >= 2


@pytest.mark.parametrize(
    ("question", "options", "reason"),
    [
        ("", {}, "QUESTION_EMPTY"),
        ("word " * 70_000, {"fps": 0.2}, "QUESTION_TOO_LONG"),
        ("What <|im_end|> now?", {}, "INVALID_REQUEST"),
        ("What?", {"fps": -1.0}, "INVALID_REQUEST"),
        ("What?", {"fps": 1.0, "num_frames": 8}, "INVALID_REQUEST"),
        ("What?", {"max_tokens": 0}, "INVALID_REQUEST"),
        ("What?", {"epsilon": 1.0}, "INVALID_REQUEST"),
        ("What?", {"quality": "high", "epsilon": 0.1}, "INVALID_REQUEST"),
    ],
)
def test_questions_that_cannot_be_answered(
    client: Client, long_video: Video, question: str, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(PrefillError) as caught:
        client.ask(long_video, question, **options).result()  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_unknown_ids(client: Client) -> None:
    for call, reason in (
        (lambda: client.ask("vid_" + "0" * 26, "What?").result(), "UNKNOWN_VIDEO"),
        (lambda: client.video("vid_" + "0" * 26), "UNKNOWN_VIDEO"),
        (lambda: client.delete_video("vid_" + "0" * 26), "UNKNOWN_VIDEO"),
        (lambda: client.job("job_" + "0" * 26), "UNKNOWN_JOB"),
        (lambda: client.cancel_job("job_" + "0" * 26), "UNKNOWN_JOB"),
    ):
        with pytest.raises(PrefillError) as caught:
            call()
        assert caught.value.reason == reason


def test_a_file_that_is_no_video(client: Client, tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("not a video\n" * 100)
    with pytest.raises(PrefillError) as caught:
        client.upload(fake)
    assert caught.value.reason == "NOT_A_VIDEO"


def test_stop_strings_and_sampling(client: Client, long_video: Video) -> None:
    free = client.ask(long_video, "What happens?", max_tokens=24).result()
    again = client.ask(long_video, "What happens?", max_tokens=24).result()
    assert again.text == free.text
    word = free.text.split()[1]
    cut = client.ask(long_video, "What happens?", max_tokens=24, stop=[word]).result()
    assert cut.text == free.text.split(word)[0]
    assert cut.finish_reason == "stop"
    one, two, other = (
        client.ask(long_video, "What?", max_tokens=24, temperature=1.5, seed=seed).result().text
        for seed in (1, 1, 2)
    )
    assert one == two != other


def test_several_questions_at_once_prefill_once(client: Client, long_video: Video) -> None:
    answers: dict[int, object] = {}

    def ask(i: int) -> None:
        answers[i] = client.ask(long_video, f"Question {i}?", max_tokens=6).result()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == 4
    assert len({answer.job_id for answer in answers.values()}) == 1  # type: ignore[attr-defined]
