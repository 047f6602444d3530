"""What a user of the package meets: its names, its README, and an import that needs no Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import prefill_kernels

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_public_name_is_there() -> None:
    for name in prefill_kernels.__all__:
        assert getattr(prefill_kernels, name).__name__ == name
        assert getattr(prefill_kernels, name).__doc__


def test_the_readme_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    code = example[1] + (
        "assert out.shape == q.shape and lse.shape == (8, 256)\n"
        "assert 0 < kept.row_ptr[-1] < candidates\n"
        "from prefill_kernels import DroppedBlocks, estimate_block_loss, summarize_blocks\n"
        "from prefill_kernels.reference import block_sparse_attention_reference\n"
        "summaries = summarize_blocks(k, v, block_tokens=64)\n"
        "bias = estimate_block_loss(q, k, summaries, tiling=tiling).bias\n"
        "for row, of_row in enumerate(bias.flatten(0, 1)):\n"
        "    start, end = kept.row_ptr[row : row + 2].tolist()\n"
        "    of_row[kept.col[start:end].long()] = -torch.inf\n"
        "dropped = DroppedBlocks(summaries.k_mean, summaries.v_mean, bias)\n"
        "expected, _ = block_sparse_attention_reference(\n"
        "    q, k, v, kept, tiling=tiling, dropped=dropped)\n"
        "torch.testing.assert_close(out.double(), expected, atol=5e-3, rtol=5e-3)\n"
    )
    run(code, TRITON_INTERPRET="1")


def test_the_cpu_back_end_and_the_reference_need_no_triton() -> None:
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import prefill_kernels.cpu.attention, prefill_kernels.cpu.matmul\n"
        "import prefill_kernels.cpu.threads, prefill_kernels.reference\n"
        "from prefill_kernels import BlockCSR, Tiling, Summaries, AttentionOptions\n"
    )


def run(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
