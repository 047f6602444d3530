"""Setting the wall clock of the service's processes, and nobody else's."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock_shift.c")


class Clock:
    """A library that shifts the clock of the processes it is loaded into, and its setting.

    Attributes:
        environment: variables that load it; empty where it cannot be built.
    """

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self._setting: Path | None = None

    def build(self, folder: Path) -> None:
        """Compile the library, if there is a compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            return
        library = folder / "clock_shift.so"
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return
        self._setting = folder / "clock"
        self._setting.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._setting)}

    def shift(self, seconds: int) -> None:
        """Set the clock so many seconds ahead of the machine's. Only where it was built."""
        assert self._setting is not None
        with self._setting.open("r+b") as setting:
            setting.write(struct.pack("q", seconds))
