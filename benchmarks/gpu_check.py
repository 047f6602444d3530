"""Everything that is to be checked and measured on a GPU, one stage after another.

    python -m benchmarks.gpu_check --out build/gpu  # under ten minutes
    python -m benchmarks.gpu_check --device cpu --out build/gpu  # a rehearsal

A rehearsal runs all steps at tiny sizes; its times mean nothing. Every stage is a process of its
own with a time limit, and its output and results are in the folder before the next one begins; one
that fails or takes too long does not stop the others. The last lines say in one line each how the
stages ended. The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Stage:
    """A benchmark to run.

    Attributes:
        name: of its files in the folder.
        module: run by ``python -m``.
        on_gpu, on_cpu: its arguments; ``{out}`` is the folder.
        limit_s: after which it is ended.
    """

    name: str
    module: str
    on_gpu: tuple[str, ...]
    on_cpu: tuple[str, ...]
    limit_s: float


STAGES = (
    Stage(
        name="prefill",
        module="benchmarks.gpu.prefill",
        on_gpu=("--budget", "200", "--output", "{out}/gpu-prefill.json"),
        on_cpu=("--device", "cpu", "--tiny", "--turns", "1", "--output", "{out}/gpu-prefill.json"),
        limit_s=270,
    ),
    Stage(
        name="attention",
        module="benchmarks.gpu.attention",
        on_gpu=("--budget", "120", "--output", "{out}/attention-gpu.json"),
        on_cpu=("--dry-run",),
        limit_s=190,
    ),
    Stage(
        name="exchanges",
        module="benchmarks.gpu.exchanges",
        on_gpu=(),
        on_cpu=("--device", "cpu", "--small"),
        limit_s=130,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a stage failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    options = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    return run_stages(chosen, options.device, options.out)


def run_stages(stages: Sequence[Stage], device: str, out: Path) -> int:
    """Run them in order; 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    failed = False
    for stage in stages:
        begin = time.monotonic()
        status = _run(stage, device, out)
        failed |= status != "ok"
        lines.append(f"{stage.name}: {status}, {time.monotonic() - begin:.0f} s")
        print((out / f"{stage.name}.log").read_text(errors="replace"), flush=True)
    print("\n".join(lines))
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


def _run(stage: Stage, device: str, out: Path) -> str:
    arguments = stage.on_gpu if device == "cuda" else stage.on_cpu
    command = [sys.executable, "-m", stage.module]
    command += [argument.format(out=out) for argument in arguments]
    environment = {"PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with (out / f"{stage.name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=stage.limit_s,
            )
        except subprocess.TimeoutExpired:
            return f"not done after {stage.limit_s:.0f} s"
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
