"""A disk without a free byte can be emptied, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.small_disk import KINDS, run_on_small_disk

SCENARIOS = "tests.storage.full_disk"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_videos(kind: str, disk: Path, make_video: Callable[..., Path]) -> None:
    sample = make_video(seconds=2, fps=5, width=160, height=120)
    run_on_small_disk(kind, 12, disk, SCENARIOS, "videos", str(sample))


def test_service(disk: Path, template: tuple[Path, str]) -> None:
    folder, video_id = template
    run_on_small_disk("tmpfs", 12, disk, SCENARIOS, "service", str(folder), video_id)
