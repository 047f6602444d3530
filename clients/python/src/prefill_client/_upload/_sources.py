"""Where the bytes of an upload come from: a path, bytes or an open file, read at any offset."""

from __future__ import annotations

import inspect
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from prefill_client._arguments import refuse

PIECE_BYTES = 8 << 20
UNNAMED = "upload"
_WHOLE = "of an HTTP response that reads all at once, give the bytes, or a file they are written to"


class Source:
    """A file that is read from where it stands to its end, more than once if need be.

    One that cannot be read again, such as a pipe, is copied to a temporary file as ``pieces``
    reads it. Memory holds one piece at a time. All methods block.

    Args:
        file: open for reading bytes.
        name: of the file, for messages.
        display_name: of the video, unless the caller gives one.
        owned: whether ``close`` closes the file.
    """

    def __init__(self, file: Any, name: str, display_name: str, *, owned: bool) -> None:
        self.name = name
        self.display_name = display_name
        self._file = file
        self._owned = owned
        self._start = 0
        self.seekable = _is_seekable(file)
        if self.seekable:
            self._start = file.tell()

    def size_hint(self) -> int:
        """Bytes that there seem to be, for progress; 0 if that is unknown."""
        if not self.seekable:
            return 0
        size: int = self._file.seek(0, os.SEEK_END) - self._start
        self._file.seek(self._start)
        return max(size, 0)

    def pieces(self) -> Iterator[bytes]:
        """All bytes from the start, in pieces; the first to be called of a pipe.

        Raises:
            OSError: it cannot be read, or there is no room for the copy.
            ArgumentError: what it reads is not bytes.
        """
        if self.seekable:
            offset = 0
            while data := self.read_at(offset, PIECE_BYTES):
                offset += len(data)
                yield data
            return
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            while data := self._read(PIECE_BYTES):
                _append(copy, data)
                yield data
        except BaseException:
            copy.close()
            raise
        self.close()
        self._file = copy
        self._owned = True
        self.seekable = True

    def read_at(self, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset`` on; none at the end.

        Raises:
            OSError: it cannot be read.
            ArgumentError: what it reads is not bytes.
        """
        position = self._start + offset
        if self._file.tell() != position:
            self._file.seek(position)
        return self._read(size)

    def close(self) -> None:
        """Close what was opened here. A file of the caller's stays open."""
        if self._owned:
            self._file.close()

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if not isinstance(data, bytes | bytearray | memoryview):
            kind = type(data).__name__
            if hasattr(data, "close"):
                data.close()  # a coroutine, which would warn that nobody has awaited it
            refuse("file", self._file, f"a file whose read() returns bytes, not {kind}")
        return bytes(data)


class _View(io.RawIOBase):
    """Bytes of the caller's as a file, without a copy of them."""

    def __init__(self, view: memoryview) -> None:
        self._view = view.cast("B")
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._view)}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def open_source(what: Any) -> Source:
    """Open what ``split_video`` found.

    Raises:
        OSError: the file cannot be opened.
        ArgumentError: it is closed, open for text, or reads all or nothing.
    """
    if isinstance(what, str):
        return Source(open(what, "rb"), what, os.path.basename(what), owned=True)
    if isinstance(what, bytes | bytearray | memoryview):
        view = memoryview(what)
        if not view.c_contiguous:
            refuse("bytes", what, "contiguous bytes; bytes(...) makes them so")
        return Source(_View(view), f"bytes ({view.nbytes})", UNNAMED, owned=True)
    if isinstance(what, io.TextIOBase):
        refuse("file", what, "a file that is open for bytes: open(path, 'rb')")
    if getattr(what, "closed", False) is True:
        refuse("file", what, "an open file; this one is closed")
    if not _takes_size(what.read):
        refuse("file", what, f"a file whose read() takes a size; {_WHOLE}")
    path = getattr(what, "name", None)
    known = isinstance(path, str | bytes | os.PathLike)
    name = os.path.basename(os.fsdecode(path)) if known else ""  # type: ignore[arg-type]
    return Source(what, name or ascii(what), name or UNNAMED, owned=False)


def _is_seekable(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    if callable(seekable):
        return bool(seekable())
    return hasattr(file, "seek") and hasattr(file, "tell")


def _takes_size(read: Any) -> bool:
    """Whether ``read(size)`` can be called; True of one that does not say what it takes."""
    try:
        signature = inspect.signature(read)
    except ValueError:  # of a function written in C
        return True
    try:
        signature.bind(0)
    except TypeError:
        return False
    return True


def _append(copy: Any, data: bytes) -> None:
    try:
        copy.write(data)
        copy.flush()
    except OSError as error:
        folder = tempfile.gettempdir()
        text = f"{error.strerror}: what cannot be read twice is copied to {folder} until it is sent"
        raise OSError(error.errno, text) from error
