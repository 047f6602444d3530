"""Where the service under disturbance runs: its own disk, temporary folder and shared memory.

In a user and mount namespace the data directory and ``/dev/shm`` are file systems of a given size
that nobody else uses: the disk can be filled, and whatever is left can be counted. Where the
kernel allows no such namespace, ordinary folders take their place, and the disk is not filled.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

DISK_BYTES = 48 << 20
SHARED_MEMORY_BYTES = 2 << 30
_CACHES = "torchinductor_"
"""Folders of this name are caches that torch shares among all programs of a user."""

_SET_CHILD_SUBREAPER = 36
_MOUNT = """\
mount -t tmpfs -o size="$1" none "$2" && mount -t tmpfs -o size="$3" none /dev/shm \
&& echo mounted && exec cat"""


def _adopt_orphans(adopt: bool) -> None:
    """Whether descendants whose parents have died become children of this process."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


class Sandbox:
    """Folders for one service, and the namespace they are in.

    Attributes:
        folder: of everything, short enough for Unix sockets.
        bounded: whether the disk is bounded and shared memory is private.
    """

    def __init__(self) -> None:
        self.bounded = False
        self._holder: subprocess.Popen[str] | None = None
        self._before: list[psutil.Process] = []
        self._mark = uuid.uuid4().hex

    def __enter__(self) -> Self:
        # Orphans of killed processes become children of this one: none is overlooked.
        _adopt_orphans(True)
        self._before = psutil.Process().children(recursive=True)
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        for name in ("data", "tmp", "films"):
            (self.folder / name).mkdir()
        if shutil.which("unshare") and shutil.which("nsenter"):
            self._unshare()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._holder is not None:
            self._holder.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)
        _adopt_orphans(False)

    def _unshare(self) -> None:
        sizes = [str(DISK_BYTES), str(self.folder / "data"), str(SHARED_MEMORY_BYTES)]
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert holder.stdout is not None
        if holder.stdout.readline().strip() == "mounted":
            self._holder = holder
            self.bounded = True
        else:
            holder.communicate()

    @property
    def launcher(self) -> list[str]:
        """What a command has to be preceded by to run inside."""
        if self._holder is None:
            return []
        namespaces = [f"--target={self._holder.pid}", "--user", "--mount"]
        return ["nsenter", *namespaces, "--preserve-credentials", f"--wd={Path.cwd()}"]

    def environment(self, **extra: str) -> dict[str, str]:
        """Environment variables of a process inside."""
        return {**os.environ, "TMPDIR": str(self.folder / "tmp"), **extra}

    @property
    def data(self) -> Path:
        """The data directory, as processes inside name it."""
        return self.folder / "data"

    @property
    def films(self) -> Path:
        """A folder for the caller's videos."""
        return self.folder / "films"

    def _outside(self, path: Path) -> Path:
        """The name of a path inside, for this process."""
        if self._holder is None:
            return path
        return Path(f"/proc/{self._holder.pid}/root{path}")

    # ---- the disk ------------------------------------------------------------------------

    def fill_disk(self) -> None:
        """Leave no byte free. Only where it is ``bounded``."""
        assert self.bounded
        with (self._outside(self.data) / "ballast").open("wb", buffering=0) as ballast:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        ballast.write(bytes(size))

    def free_disk(self) -> None:
        """Undo ``fill_disk``."""
        (self._outside(self.data) / "ballast").unlink(missing_ok=True)

    # ---- what is left --------------------------------------------------------------------

    def leftovers(self, mine: Sequence[int] = ()) -> dict[str, list[str]]:
        """What a service that has ended has left behind, by kind.

        Args:
            mine: processes of the caller that are no leftovers.
        """
        known = {*mine} | ({self._holder.pid} if self._holder is not None else set())
        for process in self._before:  # the caller's own, and what they have started since
            with suppress(psutil.NoSuchProcess):
                known |= {process.pid, *(one.pid for one in process.children(recursive=True))}
        processes = [
            " ".join(child.cmdline())[:120] or child.name()
            for child in psutil.Process().children(recursive=True)
            if child.pid not in known and child.status() != psutil.STATUS_ZOMBIE
        ]
        files: list[str] = []
        sockets: list[str] = []
        for path in sorted((self.folder / "tmp").rglob("*")):
            if any(part.startswith(_CACHES) for part in path.parts):
                continue
            (sockets if path.is_socket() else files).append(path.name)
        found: dict[str, Any] = {"processes": processes, "temporary files": files}
        found["sockets"] = sockets
        if self.bounded:
            shared = self._outside(Path("/dev/shm"))
            found["shared memory"] = sorted(path.name for path in shared.iterdir())
        return found
