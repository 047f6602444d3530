"""The demo's parts say why they failed and leave nothing running; what they show is true."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from prefill_client import Answer, PatchAttention, Timings, Usage

from tools.demo.__main__ import ROOT, Asked, DemoError, verdict
from tools.demo.picture import FRAMES, contrast, draw, moments
from tools.demo.story import QUESTIONS, SEED, STORY, marked
from tools.needle.stories import Story
from tools.needle.videos import write_mp4
from tools.service_process import ServiceProcess
from tools.vllm_alone import Question, Reference, answer

NEEDLES = sorted(patch for needle in STORY.needles for patch in needle.patches)
FLAT = [PatchAttention(float(second), 1.0) for second in range(STORY.patches)]
TRUTHS = tuple(question.answer for question in QUESTIONS)


def test_service_that_does_not_start(tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path), "--ranks", "0", "--data-dir", str(tmp_path / "data")]
    with (
        ServiceProcess(arguments, tmp_path / "log") as service,
        pytest.raises(RuntimeError, match=r"exited with code 2: .*engine\.ranks = 0 .*1 to 64"),
    ):
        service.wait_ready(60, lambda elapsed: None)


def test_stop_kills_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the command: it and its child ignore SIGTERM."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    command = tmp_path / "prefill-service"
    command.write_text(
        f"#!{sys.executable}\n{stubborn}"
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn + 'time.sleep(60)'!r}],"
        " start_new_session=True)\n"
        "time.sleep(1)\n"
        "print('serving on 127.0.0.1:1', flush=True)\n"
        "time.sleep(60)\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr("tools.service_process.STOP_S", 0.5)
    monkeypatch.setattr("tools.service_process.sys.executable", str(tmp_path / "python"))
    service = ServiceProcess([], tmp_path / "log")
    with service:
        service.wait_ready(30, lambda elapsed: None)
        assert service.address == "127.0.0.1:1"
        family = psutil.Process(service._process.pid).children()
        assert len(family) == 1
        assert len(service.stop()) == 2
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_reference_names_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exited with code 1: .*config\.json: missing"):
        answer(tmp_path, [Question(str(tmp_path / "video.mp4"), [("user", "why?")])])


def test_demo_fails_with_the_reason_last(tmp_path: Path) -> None:
    """No checkpoint where it should be."""
    script = (
        "import pathlib, tools.demo.__main__ as demo\n"
        f"demo.MODEL = pathlib.Path({str(tmp_path)!r}) / 'absent'\n"
        "demo.main()\n"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("DEMO FAILED: ")
    assert "absent is no checkpoint" in last
    assert time.monotonic() - start < 60


def _answered(*texts: str) -> list[Asked]:
    """Answers whose tokens are [1], [2], ..."""
    timings = Timings(
        prefill_wait_s=0, decoder_first_token_s=0, first_token_s=0, total_s=0, handoff_s=0
    )
    usage = Usage(
        prompt_tokens=3746,
        video_tokens=2160,
        completion_tokens=2,
        kv_tokens_moved=23,
        kv_bytes_moved=1,
        cached_tokens=0,
    )
    return [
        Asked(
            Answer(
                text=text,
                token_ids=(number,),
                finish_reason="stop",
                timings=timings,
                usage=usage,
                job_id="",
                prefix_id="",
                video_id="",
                request_id="",
            ),
            number / 4,
        )
        for number, text in enumerate(texts, 1)
    ]


def _alone(*tokens: int) -> list[Reference]:
    return [Reference([], [token], "") for token in tokens]


def test_verdict_counts_right_answers() -> None:
    expected = (
        "DEMO OK ranks=2 video_tokens=2160 first_token_s=0.25 second_first_token_s=0.50 "
        "kv_tokens_moved_second=23 tokens_equal_vllm_alone=yes right="
    )
    assert verdict(_answered(*TRUTHS), _alone(1, 2, 3)) == f"{expected}3/3"
    wrong = (f" {TRUTHS[0]}\n", f"{TRUTHS[1]}s", "")
    assert verdict(_answered(*wrong), _alone(1, 2, 3)) == f"{expected}1/3"
    assert marked(QUESTIONS[1], wrong[1]) == f"{TRUTHS[1]}s (wrong)"
    assert marked(QUESTIONS[0], wrong[0]) == TRUTHS[0]


def test_verdict_on_other_tokens_is_failure() -> None:
    """Even where every answer is the truth."""
    with pytest.raises(DemoError, match=r"answer 2 differs: tokens \[2\], from vLLM alone \[7\]"):
        verdict(_answered(*TRUTHS), _alone(1, 7, 3))


def test_story_shows_what_is_asked() -> None:
    assert [question.task for question in QUESTIONS] == ["color", "order", "count"]
    events = STORY.events()
    assert [second for second, needle in enumerate(events) if needle] == NEEDLES
    seen = [needle for needle in events if needle]
    color, order, count = QUESTIONS
    assert [n.color for n in seen if n.shape in color.text] == [color.answer]
    assert next(n.shape for n in seen if n.shape in order.text) == order.answer
    assert sum(n.shape in count.text for n in seen) == int(count.answer)


def test_moments_show_every_needle_and_what_is_between() -> None:
    shown = moments(STORY)
    assert len(shown) == FRAMES
    assert shown == sorted(set(shown))
    assert set(NEEDLES) < set(shown)
    assert 0 <= shown[0] < NEEDLES[0]
    assert NEEDLES[-1] < shown[-1] < STORY.patches


def test_contrast_of_needles_and_background() -> None:
    patches = [
        PatchAttention(p.time_s, 2.0 + i if i in NEEDLES else 1.0) for i, p in enumerate(FLAT)
    ]
    patches[5] = PatchAttention(5.0, 2.5 + NEEDLES[0])
    found = contrast(STORY, patches)
    assert found.needles == tuple(2.0 + second for second in NEEDLES)
    assert found.background == 2.5 + NEEDLES[0]
    above = f"({len(NEEDLES) - 1} of {len(NEEDLES)} above that)"
    assert str(found).endswith(f"{found.background:.1f} at most elsewhere {above}")
    with pytest.raises(ValueError, match="239 masses for 240 temporal patches"):
        contrast(STORY, patches[:-1])


def _vivid(picture: Path) -> np.ndarray:
    """Hues, in degrees, of the saturated pixels below the curve."""
    image = cv2.imread(str(picture))  # [height, width, BGR]
    assert image is not None
    height, width = image.shape[:2]
    assert width > 2 * height
    hsv = cv2.cvtColor(image[int(0.75 * height) :], cv2.COLOR_BGR2HSV)
    vivid = (hsv[..., 1] > 150) & (hsv[..., 2] > 150)
    return hsv[..., 0][vivid].astype(int) * 2


def test_picture_shows_the_needles(tmp_path: Path) -> None:
    """Of every needle's colour there is more than where the video is all background."""
    empty = Story(STORY.patches, (), 0)
    hues = []
    for name, story in (("needles", STORY), ("empty", empty)):
        video = write_mp4(tmp_path / f"{name}.mp4", story, SEED, fps=2)
        picture = tmp_path / f"{name}.png"
        draw(picture, video, STORY, fps=2, masses={"exact": FLAT, "balanced": FLAT})
        hues.append(_vivid(picture))
    for degrees, color in ((0, "red"), (55, "yellow"), (180, "cyan"), (235, "blue")):
        near = [(abs((hue - degrees + 180) % 360 - 180) < 15).sum() for hue in hues]
        assert near[0] > near[1] + 800, color
