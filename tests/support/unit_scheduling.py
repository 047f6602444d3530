"""Which tests pytest-xdist keeps together, and which it starts first.

Tests of one file share its fixtures. Those that ask a real vLLM share it by model family over
several files. What takes longest starts first, so that no core waits for a single file at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from xdist.scheduler import LoadFileScheduling

VLLM_FILES = (
    "tests/service/test_answers.py",
    "tests/generation/test_vllm_handoff.py",
    "tests/service/test_faults.py",
    "tests/service/test_service_life.py",
    "tests/service/test_baseline.py",
)
"""They ask the ``vllm`` fixture's server, of which a process has one for each family."""

DEAR = (
    *VLLM_FILES,
    "tests/engine/test_executor.py",
    "tests/service/test_fp8.py",
    "tests/generation/test_generation_server.py",
    "tests/benchmarks/test_fidelity.py",
    "tests/engine/test_memory.py",
    "tests/engine/test_subgroups.py",
    "tests/engine/test_chunked_prefill.py",
    "tests/engine/test_baseline_prefill.py",
    "tests/engine/test_faults.py",
    "tests/benchmarks/gpu/test_gpu_prefill.py",
    "tests/benchmarks/test_load.py",
    "tests/tools/test_demo.py",
    "tests/calibration/test_calibrate.py",
    "tests/parallel/test_exchanges.py",
    "tests/parallel/test_extending_exchange.py",
    "tests/parallel/test_baseline_attention.py",
    "tests/parallel/test_sparse.py",
    "kernels/tests/test_compiled.py",
)
"""Files that take more than twenty seconds, roughly the longest first."""

OTHER_FAMILY = "qwen2_5_vl"

Item = TypeVar("Item")


def unit_of(nodeid: str) -> str:
    """What a test is kept together with: its file, or all that ask the same vLLM."""
    file, _, test = nodeid.partition("::")
    if file not in VLLM_FILES:
        return file
    return f"vLLM of {OTHER_FAMILY}" if OTHER_FAMILY in test else "vLLM"


def dear_first(items: Iterable[tuple[str, Item]]) -> list[Item]:
    """Items by their node ids, the dear files' before the others', else as they were."""
    rank = {file: number for number, file in enumerate(DEAR)}
    ordered = sorted(items, key=lambda pair: rank.get(pair[0].partition("::")[0], len(DEAR)))
    return [item for _, item in ordered]


class UnitScheduling(LoadFileScheduling):
    """xdist's ``--dist loadfile`` with units of ours, in the order of collection."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
