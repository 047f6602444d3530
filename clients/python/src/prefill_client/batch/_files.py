"""The files of a batch: its input, its output and its errors, one JSON object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from prefill_client._arguments import check_text
from prefill_client._requests import ASK_NAMES, build_ask, split_video
from prefill_client.errors import ArgumentError, InvalidRequestError

URL = "/v1/ask"


@dataclass(frozen=True)
class BatchItem:
    """A line of the input that can be asked."""

    line: int
    custom_id: str
    video: str  # an id or an absolute path
    question: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line of the input that cannot be asked, and why."""

    line: int
    custom_id: str | None
    error: InvalidRequestError


def read_input(path: Path) -> tuple[list[BatchItem], list[BadLine]]:
    """Read and check a whole input file. Empty lines are skipped.

    Raises:
        OSError: it cannot be read.
    """
    items: list[BatchItem] = []
    bad: list[BadLine] = []
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            entry: Any = None
            reason = "INVALID_LINE"
            try:
                entry = _load(raw)
                item = _parse(number, entry)
                if item.custom_id in seen:
                    reason = "DUPLICATE_CUSTOM_ID"
                    used = f"custom_id {item.custom_id!r} was used in line {seen[item.custom_id]}"
                    raise ValueError(f"{used} already")
            except (TypeError, ValueError) as error:
                text = error.message if isinstance(error, ArgumentError) else str(error)
                message = f"{path}:{number}: {text}"
                metadata = {"line": str(number)}
                failure = InvalidRequestError(reason, message, metadata=metadata)
                bad.append(BadLine(number, _custom_id(entry), failure))
            else:
                seen[item.custom_id] = number
                items.append(item)
    return items, bad


def _load(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None


def _custom_id(entry: Any) -> str | None:
    value = entry.get("custom_id") if isinstance(entry, dict) else None
    return value if isinstance(value, str) else None


def _parse(number: int, entry: Any) -> BatchItem:
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be a JSON object, not {_kind(entry)}")
    custom_id = entry.get("custom_id")
    body = entry.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id must be a text that is not empty, not {custom_id!r}")
    check_text("custom_id", custom_id)
    if entry.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST, not {entry['method']!r}")
    if entry.get("url", URL) != URL:
        raise ValueError(f"url must be {URL}, not {entry['url']!r}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be a JSON object, not {_kind(body)}")
    options = {key: value for key, value in body.items() if value is not None}
    video = options.pop("video", None)
    question = options.pop("question", None)
    messages = options.pop("messages", None)
    if (question is None) == (messages is None):
        raise ValueError("body must have either question or messages")
    if question is not None and not isinstance(question, str):
        raise ValueError(f"question must be a text, not {_kind(question)}")
    if messages is not None and not isinstance(messages, list):
        raise ValueError(f"messages must be a list, not {_kind(messages)}")
    asked = question if question is not None else messages
    for name in options:
        if name not in ASK_NAMES:
            accepted = ", ".join(("video", "question", "messages", *ASK_NAMES))
            raise ValueError(f"body has an unknown key {name!r}; accepted: {accepted}")
    build_ask("", asked, options, "")  # type: ignore[arg-type]  # what it refuses is the line's error
    return BatchItem(number, custom_id, _video(video), asked, options)


def _video(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"video must be a path, a file:// URL or an id, not {value!r}")
    video_id, path = split_video(value)
    return value if video_id is not None else os.path.abspath(path)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), f"{value!r}"
    )


class ResultFile:
    """Lines appended one by one, each on the disk before the next; ``with`` opens the file.

    Args:
        path: the file.
        resume: keep what is there. A last line torn by a crash is cut off; anything else that
            is not the output of a batch is refused rather than added to.

    Raises:
        ValueError: the file is not the output of a batch.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.done: set[str] = set()
        self._resume = resume
        self._file: BinaryIO

    def __enter__(self) -> Self:
        mode = "a+b" if self._resume else "w+b"
        self._file = cast(BinaryIO, open(self.path, mode))
        try:
            self.done.update(self._repair())
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Write a line and wait until it is on the disk."""
        # A lone surrogate of a bad input line becomes its escape \udXXX, which is JSON.
        line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
        self._file.write(line + b"\n")
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _repair(self) -> Iterator[str]:
        """Return the custom_ids of the file; a last line that is cut short is cut off."""
        self._file.seek(0)
        end = 0
        for number, raw in enumerate(self._file, 1):
            torn = not raw.endswith(b"\n")
            try:
                record = json.loads(raw)
                custom_id = record["custom_id"]
                if "response" not in record or not isinstance(custom_id, str):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                if torn:
                    self._file.truncate(end)
                    self._sync()
                    return
                raise ValueError(
                    f"{self.path}:{number} is not a line of a batch's output; "
                    "name another file, or remove it to start again"
                ) from None
            end += len(raw)
            yield custom_id
            if torn:  # only the newline is missing
                self._file.write(b"\n")
                self._sync()
                return
