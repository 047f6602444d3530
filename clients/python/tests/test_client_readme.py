"""The examples of this README and of the repository's run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_helpers import write_clip

CLIENT = Path(__file__).resolve().parent.parent
READMES = (CLIENT.parents[1] / "README.md", CLIENT / "README.md")
EXAMPLES = [
    example
    for readme in READMES
    for example in re.findall(
        r"## ([^\n]+)\n(?:(?!##).)*?```python\n(.*?)```", readme.read_text(), re.S
    )
]
PRINTED = {
    "Use it": ["You asked: Who opens the door?", "You asked: What happens next?"],
    "Ask": ["You asked: Who opens the door?", "stop Usage(", "You asked: Where does he go?"],
    "Ask many at a time": ["How does it end? -> You asked: How does it end?"],
    "Batch": ["2 answered, 0 failed, 0 done before"],
    "Quality": ["high computed 0.25 of", "kept mass 0.95 of 64", "most looked at: 6.0 s"],
    "Errors": ["refused: NOT_A_VIDEO", "gone: {'video_id': 'vid_0000"],
    "Progress": ["upload", "rank 1 PREFILL: 400/400", "SUCCEEDED 800"],
}


def test_every_example_is_known():
    assert [title for title, _ in EXAMPLES] == list(PRINTED)


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_example(title, code, server, tmp_path):
    write_clip(tmp_path / "holiday.mp4", 1)
    (tmp_path / "notes.txt").write_text("hello")
    run = subprocess.run(
        [sys.executable, "-c", code.replace("localhost:50051", server.address)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for text in PRINTED[title]:
        assert text in run.stdout
