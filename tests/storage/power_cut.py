"""A disk that loses power: what was synced is there, of the rest anything may be or not.

It replays the log of ``write_log.c``. The rules are POSIX's, which are stricter than those of any
file system: ``fsync`` of a file keeps its bytes, ``fsync`` of a folder the names in it, and nothing
else keeps anything. What was not synced comes in any selection of sectors, and of the names in a
folder any first part.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

SECTOR_BYTES = 512
_HEAD = struct.Struct("<cIIIQ")


@dataclass(frozen=True)
class Operation:
    """One record of the log; paths are relative to the folder."""

    kind: str
    path: str
    other: str
    offset: int
    data: bytes


def read_log(log: Path, root: Path) -> Iterator[Operation]:
    """All records of a log that was written below ``root``."""
    data = log.read_bytes()
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    def relative(path: bytes) -> str:
        return str(PurePosixPath(path.decode()).relative_to(root.resolve())) if path else ""

    while at < len(data):
        kind, path_bytes, other_bytes, data_bytes, offset = _unpack(take(1), take(12), take(8))
        path = relative(take(path_bytes))
        other = take(other_bytes)
        yield Operation(
            kind,
            path,
            other.decode() if kind == "?" else relative(other),
            offset,
            take(data_bytes),
        )


def _unpack(kind: bytes, sizes: bytes, offset: bytes) -> tuple[str, int, int, int, int]:
    path, other, data = struct.unpack("=III", sizes)
    return kind.decode(), path, other, data, struct.unpack("=Q", offset)[0]


@dataclass
class _File:
    """A file's synced bytes, and its writes and truncations since then (data is ``None``)."""

    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            self.synced = _apply(self.synced, offset, data)
        self.pending.clear()

    def after_cut(self, chance: random.Random) -> bytes:
        """What is found: each pending sector with a probability that differs between cuts."""
        likely = chance.choice((0.0, 0.5, 0.9, 1.0))
        found = self.synced
        for offset, data in self.pending:
            if data is None:
                if chance.random() < likely:
                    found = _apply(found, offset, None)
                continue
            start = 0
            while start < len(data):
                stop = min(len(data), start + SECTOR_BYTES - (offset + start) % SECTOR_BYTES)
                if chance.random() < likely:
                    found = _apply(found, offset + start, data[start:stop])
                start = stop
        return found


def _apply(content: bytes, offset: int, data: bytes | None) -> bytes:
    if data is None:
        return content[:offset].ljust(offset, b"\0")
    return content[:offset].ljust(offset, b"\0") + data + content[offset + len(data) :]


@dataclass
class _Folder:
    """A folder's synced names, and its changes since then: name to file, or to nothing."""

    synced: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)

    def sync(self) -> None:
        self.synced = self._after(len(self.pending))
        self.pending.clear()

    def after_cut(self, chance: random.Random) -> dict[str, int]:
        return self._after(chance.randint(0, len(self.pending)))

    def _after(self, count: int) -> dict[str, int]:
        names: dict[str, int | None] = {**self.synced}
        for change in self.pending[:count]:
            names |= change
        return {name: entry for name, entry in names.items() if entry is not None}


class SimulatedDisk:
    """Files and folders by number, as a file system has them; number 0 is the root."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._folders: dict[int, _Folder] = {0: _Folder()}
        self._paths: dict[str, int] = {".": 0}
        self._numbers = 0

    def apply(self, operation: Operation) -> None:
        """Go on by one operation."""
        path = operation.path
        match operation.kind:
            case "C":
                self._files[self._add(path)] = _File()
            case "D":
                self._folders[self._add(path)] = _Folder()
            case "W":
                self._files[self._paths[path]].pending.append((operation.offset, operation.data))
            case "T":
                self._files[self._paths[path]].pending.append((operation.offset, None))
            case "S":
                number = self._paths[path]
                (self._folders.get(number) or self._files[number]).sync()
            case "U":
                self._change(path, None)
                del self._paths[path]
            case "R":
                number = self._paths.pop(path)
                self._move(path, operation.other, number)
            case _:
                raise AssertionError(f"{operation.other} of {path} cannot be replayed")

    def _add(self, path: str) -> int:
        self._numbers += 1
        self._paths[path] = self._numbers
        self._change(path, self._numbers)
        return self._numbers

    def _change(self, path: str, number: int | None) -> None:
        pure = PurePosixPath(path)
        self._folders[self._paths[str(pure.parent)]].pending.append({pure.name: number})

    def _move(self, path: str, other: str, number: int) -> None:
        source = PurePosixPath(path)
        target = PurePosixPath(other)
        assert source.parent == target.parent, "only renames within a folder are atomic here"
        folder = self._folders[self._paths[str(source.parent)]]
        folder.pending.append({source.name: None, target.name: number})
        self._paths[other] = number

    def write_after_cut(self, folder: Path, chance: random.Random) -> None:
        """Make in an empty folder what is found after a power cut now."""
        self._write(0, folder, chance)

    def _write(self, number: int, folder: Path, chance: random.Random) -> None:
        for name, entry in self._folders[number].after_cut(chance).items():
            if entry in self._folders:
                (folder / name).mkdir()
                self._write(entry, folder / name, chance)
            else:
                (folder / name).write_bytes(self._files[entry].after_cut(chance))
