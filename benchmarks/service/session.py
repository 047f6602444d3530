"""One session: all systems kept running, asked in turn, every result written as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from prefill_client import PrefillError

from benchmarks.processes import cpu_seconds, memory_watch
from benchmarks.service.cases import Case
from benchmarks.service.rows import Cell
from benchmarks.service.systems import System

_IDLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Length:
    """A length that is measured.

    Attributes:
        tokens: vision tokens.
        repeats: how often, each time with another video.
        systems: names of those that take part.
        modes: of those that have several; empty for all.
    """

    tokens: int
    repeats: int
    systems: tuple[str, ...]
    modes: tuple[str, ...] = ()


class Session:
    """Alternating runs of several systems on one checkpoint.

    Args:
        systems: started by ``start``.
        checkpoint: name for the rows.
        budget_s: a system one of whose runs took longer for its first token is not asked about
            longer videos.
        on_change: called after each run.
        say: progress for people.

    Attributes:
        cells: in the order of systems, modes and lengths.
        cold_start_s: seconds by system.
        idle_cores: cores that all systems together use when nothing is asked.
    """

    def __init__(
        self,
        systems: Sequence[System],
        checkpoint: str,
        budget_s: float,
        *,
        on_change: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._systems = systems
        self._checkpoint = checkpoint
        self._budget_s = budget_s
        self._on_change = on_change
        self._say = say
        self._stack = ExitStack()
        self._over: dict[tuple[str, str], str] = {}
        self.cells: list[Cell] = []
        self.cold_start_s: dict[str, float] = {}
        self.idle_cores = 0.0

    def __enter__(self) -> Session:
        """Start every system, one after the other."""
        try:
            for system in self._systems:
                self._stack.enter_context(system)
                self.cold_start_s[system.name] = round(system.cold_start_s, 1)
                self._say(f"{system.name}: ready in {system.cold_start_s:.0f} s")
            self.idle_cores = round(_cores_used([s.pid for s in self._systems]), 3)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End them."""
        self._stack.close()

    def warm_up(self, case: Case) -> None:
        """Ask every system about a short video, so that first requests' own costs are over."""
        for system in self._systems:
            for mode in system.modes:
                system.measure(case, mode)

    def run(self, length: Length, make: Callable[[int], Case]) -> list[Cell]:
        """Measure one length; its cells.

        Args:
            make: the case of a repeat.
        """
        taking_part = [s for s in self._systems if s.name in length.systems]
        pairs = [
            (system, mode)
            for system in taking_part
            for mode in system.modes
            if not length.modes or mode in length.modes or len(system.modes) == 1
        ]
        cells = [self._cell(system, mode, length.tokens) for system, mode in pairs]
        self.cells += cells
        for repeat in range(length.repeats):
            case = make(repeat)
            # Each repeat begins with another one: no system is always the first or the last.
            order = [(i + repeat) % len(pairs) for i in range(len(pairs))]
            for index in order:
                (system, mode) = pairs[index]
                cell = cells[index]
                if not cell.skipped:
                    try:
                        self._measure(system, mode, cell, case=case, repeat=repeat)
                    except (RuntimeError, OSError, PrefillError) as error:
                        cell.skipped = f"{type(error).__name__}: {error}"
                        self._say(f"{system.name}, {mode}, {cell.tokens}: {cell.skipped}")
                    self._on_change()
        return cells

    def _cell(self, system: System, mode: str, tokens: int) -> Cell:
        cell = Cell(
            system=system.name,
            mode=mode,
            ranks=system.ranks,
            checkpoint=self._checkpoint,
            tokens=tokens,
        )
        cell.skipped = self._over.get((system.name, mode), "")
        return cell

    def _measure(self, system: System, mode: str, cell: Cell, *, case: Case, repeat: int) -> None:
        start = time.perf_counter()
        with memory_watch(system.pid) as memory:
            measured = system.measure(case, mode)
        measured.peak_bytes = memory.peak
        cell.runs[repeat] = case, measured
        first = measured.first.first_token_s
        if first > self._budget_s:
            self._over[system.name, mode] = (
                f"{first:.0f} s at {cell.tokens} tokens, more than {self._budget_s:g}"
            )
        second = f"{measured.second.first_token_s:.2f} s" if measured.second else "not asked"
        self._say(
            f"{case.video_tokens} tokens, {system.name}, {mode}: first token {first:.2f} s, "
            f"second question {second} ({time.perf_counter() - start:.0f} s in all)"
        )


def _cores_used(roots: Sequence[int]) -> float:
    """Cores that process trees use, over a few seconds."""
    before = sum(map(cpu_seconds, roots))
    time.sleep(_IDLE_S)
    return (sum(map(cpu_seconds, roots)) - before) / _IDLE_S
