"""Calls kernels in the Triton interpreter, in a process of its own.

TRITON_INTERPRET must be set before triton is first imported, and other tests of the calling process
compile for real.
"""

from __future__ import annotations

import os
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Interpreter:
    """``interpret("block_sparse.longest_first", csr)`` calls it over there, returns or raises.

    Names are below prefill_kernels, or whole where they begin with prefill_service. Of a
    function that returns nothing, the arguments come back as it left them.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((name, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        failed, result = pickle.load(self._process.stdout)
        if failed:
            raise result
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer calls from standard input until it ends; what a kernel prints goes to stderr."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while calls.peek(1):
        name, args, kwargs = pickle.load(calls)
        try:
            if not name.startswith("prefill_service."):
                name = f"prefill_kernels.{name}"
            result = pkgutil.resolve_name(name)(*args, **kwargs)
            answer = False, args if result is None else result
        except Exception as error:
            answer = True, error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
