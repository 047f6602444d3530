"""Progress on a terminal, or as plain lines where the output goes to a file."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self

_PLAIN_S = 5.0


class Line:
    """One step: a title, what is going on now, and in the end what came of it.

    A terminal shows ``show``'s text in place; elsewhere it is printed every five seconds.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._live = sys.stdout.isatty()
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._write(f"{self._title} ...")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._live:
            print()

    def show(self, text: str) -> None:
        """What is going on now."""
        if self._live:
            self._write(f"{self._title}: {text}")
        elif time.monotonic() - self._shown > _PLAIN_S:
            self._shown = time.monotonic()
            print(f"  {text}", flush=True)

    def done(self, text: str) -> None:
        """The step has ended."""
        text = f"{self._title}: {text} ({time.monotonic() - self._start:.1f} s)"
        if self._live:
            print("\r\033[K", end="")
        print(text, flush=True)

    def _write(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", flush=True)
        elif text.endswith(" ..."):
            print(text, flush=True)


class Table:
    """Right-aligned columns after a left-aligned one."""

    def __init__(self, *header: str) -> None:
        self._rows = [header]

    def row(self, *cells: str) -> None:
        """Append a row with as many cells as the header."""
        self._rows.append(cells)

    def print(self) -> None:
        """Print it, with a rule below the header."""
        widths = [max(len(cell) for cell in column) for column in zip(*self._rows, strict=True)]
        for number, (name, *cells) in enumerate(self._rows):
            rest = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            print("  ".join([name.ljust(widths[0]), *rest]))
            if number == 0:
                print("  ".join("-" * width for width in widths))


def fraction(done: int, total: int) -> str:
    """``done/total`` with a bar of ten cells."""
    filled = 10 * done // total if total else 0
    return f"[{'#' * filled}{'.' * (10 - filled)}] {done:,}/{total:,}"
