"""Processes of a process group and their shared memory, which somebody has to remove.

multiprocessing's resource tracker does, if it outlives the others. For the case that it does not,
the names are kept in a file, in a folder that the next start of the service looks into.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIST_FILE = "shared-memory"
_SHARED_MEMORY = Path("/dev/shm")


def running_members(group: int) -> list[tuple[int, bytes]]:
    """Ids and command lines of the running processes of a process group; no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, its_group, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append((int(folder.name), (folder / "cmdline").read_bytes()))
    return found


def list_memory(group: int, folder: Path) -> None:
    """Add the files of shared memory that a group's processes have mapped to the folder's list."""
    names = set(_listed(folder))
    known = len(names)
    for pid, _ in running_members(group):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = Path(line.split(maxsplit=5)[-1])
                if path.parent == _SHARED_MEMORY and not path.name.endswith(" (deleted)"):
                    names.add(path.name)
    if len(names) > known:
        with suppress(OSError):  # a full disk
            (folder / LIST_FILE).write_text("\n".join(sorted(names)))


def remove_listed_memory(folder: Path) -> None:
    """Remove what is left of the folder's list, whose processes have ended."""
    for name in _listed(folder):
        path = _SHARED_MEMORY / name
        with suppress(OSError):
            if path.parent == _SHARED_MEMORY and path.lstat().st_uid == os.getuid():
                path.unlink()


def _listed(folder: Path) -> list[str]:
    try:
        return (folder / LIST_FILE).read_text().split("\n")
    except OSError:
        return []
