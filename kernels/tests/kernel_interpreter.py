"""Calls functions with kernels in the Triton interpreter, in a process of its own.

TRITON_INTERPRET must be set before triton is first imported, and other tests of the calling process
compile for real.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Interpreter:
    """``interpreter(select_blocks, loss, ...)`` calls a function over there and returns or raises.

    The function must be one that a process can import by its module and name.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((function, args, kwargs), self._process.stdin)
        self._process.stdin.flush()
        failed, result = pickle.load(self._process.stdout)
        if failed:
            raise result
        return result

    def close(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer calls from standard input until it ends; what a kernel prints goes to stderr."""
    calls = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while calls.peek(1):
        try:
            function, args, kwargs = pickle.load(calls)
            answer = False, function(*args, **kwargs)
        except Exception as error:
            answer = True, error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
