"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.in_process_service import template

__all__ = ["template"]


@pytest.fixture(scope="session")
def video(make_video: Callable[..., Path]) -> bytes:
    return make_video(seconds=2, fps=5, width=160, height=120).read_bytes()
