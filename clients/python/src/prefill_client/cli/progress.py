"""Progress on stderr: bars that redraw on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from prefill_client.types import IntakeProgress, Job, JobState, Stage, UploadProgress

REDRAW_S = 0.1
LINE_S = 5.0
_UNITS = {Stage.DECODE: "frames", Stage.VISION: "patches", Stage.PREFILL: "tokens"}


@dataclass(frozen=True)
class Bar:
    """One line: ``done`` of ``total`` ``unit`` after ``elapsed_s`` seconds of work."""

    label: str
    done: float
    total: float
    unit: str
    elapsed_s: float

    @property
    def complete(self) -> bool:
        """Whether all is done."""
        return self.done >= self.total > 0

    @property
    def rate(self) -> float:
        """Units per second, 0 while no time has passed."""
        return self.done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def numbers(self) -> str:
        """Format the numbers, as in ``12/40 frames, 3.2/s, 9 s left``."""
        share = f"{_short(self.done)}/{_short(self.total)} {self.unit}"
        if not self.rate:
            return share
        left = "" if self.complete else f", {_clock((self.total - self.done) / self.rate)} left"
        return f"{share}, {_short(self.rate)}/s{left}"

    def draw(self, width: int) -> str:
        """Draw the line in at most ``width`` columns."""
        text = f"{self.label:<8} {{}} {self.numbers()}"
        cells = min(30, width - len(text) - 1)
        if cells < 5:
            return text.format("")[:width]
        filled = round(cells * min(1.0, self.done / self.total)) if self.total else 0
        return text.format("━" * filled + "─" * (cells - filled))


def _short(value: float) -> str:
    for size, suffix in ((1 << 30, "G"), (1 << 20, "M"), (10 << 10, "K")):
        if value >= size:
            return f"{value / (size if suffix != 'K' else 1 << 10):.1f}{suffix}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def job_bars(job: Job) -> list[Bar]:
    """Make a bar for each stage: counts summed over ranks, the time of the slowest rank."""
    bars = []
    for stage, unit in _UNITS.items():
        ranks = [entry for entry in job.progress if entry.stage is stage]
        if ranks:
            done = sum(r.done for r in ranks)
            total = sum(r.total for r in ranks)
            elapsed = max(r.elapsed_s for r in ranks)
            bars.append(Bar(stage.lower(), done, total, unit, elapsed))
    return bars


class ProgressPrinter:
    """Shows uploads and jobs. ``finish`` before anything else is written to the terminal."""

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._quiet = quiet
        self._tty = stream.isatty()
        self._clock = clock
        self._bars: dict[str, Bar] = {}
        self._note = ""
        self._drawn = 0
        self._last = float("-inf")
        self._started: dict[str, tuple[float, float]] = {}
        self._reported: set[str] = set()

    def show_upload(self, progress: UploadProgress) -> None:
        """Show how far the hashing, sending or checking of a file is."""
        if progress.phase == "probe":
            self._show([], "checking the file")
            return
        elapsed = self._elapsed(progress.phase, progress.done)
        bar = Bar(progress.phase, progress.done, progress.total, "bytes", elapsed)
        self._show([bar], "")

    def show_job(self, job: Job) -> None:
        """Show a job's stages rank by rank, and what it waits for."""
        note = ""
        if job.state is JobState.QUEUED:
            note = f"queued, {job.queue_position} ahead" if job.queue_position else "queued"
        elif job.attempts > 1 and not job.state.ended:
            note = f"attempt {job.attempts}"
        self._show(job_bars(job), note, force=job.state.ended)

    def show_intake(self, progress: IntakeProgress) -> None:
        """Show how much of a long prompt vLLM has."""
        elapsed = self._elapsed("intake", progress.computed_tokens)
        bar = Bar("intake", progress.computed_tokens, progress.prompt_tokens, "tokens", elapsed)
        self._show([bar], "")

    def _elapsed(self, label: str, done: float) -> float:
        """Seconds that all of what is done would have taken at the rate seen.

        What was there before (a resumed upload, a prefix) says nothing about the rate.
        """
        start, first = self._started.setdefault(label, (self._clock(), done))
        return (self._clock() - start) * done / (done - first) if done > first else 0.0

    def show_counts(
        self, label: str, done: int, total: int, *, elapsed_s: float, note: str
    ) -> None:
        """Show how many lines of a batch are done, after ``elapsed_s`` seconds."""
        self._show([Bar(label, done, total, "lines", elapsed_s)], note)

    def finish(self) -> None:
        """Leave what is shown where it is and start afresh below it."""
        if self._tty and self._bars and not self._quiet:
            self._draw()
        self._bars.clear()
        self._started.clear()
        self._reported.clear()
        self._note = ""
        self._drawn = 0
        self._last = float("-inf")

    def _show(self, bars: list[Bar], note: str, force: bool = False) -> None:
        if self._quiet:
            return
        self._bars.update({bar.label: bar for bar in bars})
        changed = note != self._note
        self._note = note
        due = self._clock() - self._last >= (REDRAW_S if self._tty else LINE_S)
        if self._tty:
            if due or changed or force:
                self._last = self._clock()
                self._draw()
            return
        ended = [b for b in bars if b.complete and b.label not in self._reported]
        for bar in ended or (bars if due else []):
            self._last = self._clock()
            self._stream.write(f"{bar.label}: {bar.numbers()}\n")
        self._reported.update(bar.label for bar in ended)
        if note and changed:
            self._stream.write(note + "\n")
        self._stream.flush()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        lines = [bar.draw(width) for bar in self._bars.values()]
        if self._note:
            lines.append(self._note[:width])
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        body = "".join(f"\x1b[2K{line}\n" for line in lines)
        # Lines that are gone (a note) are wiped too, and the cursor goes back up.
        gone = max(0, self._drawn - len(lines))
        wipe = "\x1b[2K\n" * gone + (f"\x1b[{gone}A" if gone else "")
        self._stream.write(up + body + wipe)
        self._stream.flush()
        self._drawn = len(lines)
