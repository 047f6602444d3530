from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_interpreter import Interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    interpreter.start()
    yield interpreter
    interpreter.close()
