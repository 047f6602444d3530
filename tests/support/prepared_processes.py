"""Child processes of tests that start with torch and transformers imported."""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing.context import ForkServerContext

IMPORTED = [
    "torch",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
]


@cache
def prepared_processes() -> ForkServerContext:
    """Start processes as ``spawn`` does, from one in which the dear imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
