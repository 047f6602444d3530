"""Kinds of bounds that a field of a request may have."""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from typing_extensions import override

SHOWN = 64
"""Characters of a text that an error quotes."""


class Limit(ABC):
    """What a field accepts; ``str()`` says it for people."""

    required = False
    """Whether the field is checked when it is not set, too."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Whether the field may have this value."""

    def show(self, value: Any) -> str:
        """The value for an error's message, cut where it is long."""
        return repr(value)

    @property
    def note(self) -> str:
        """What else bounds the field, for the documentation."""
        return ""


@dataclass(frozen=True, slots=True)
class Number(Limit):
    """A number from ``low`` to ``high``.

    Attributes:
        above_low, below_high: the bound itself is not accepted.
        also: what else bounds it.
    """

    low: float
    high: float
    above_low: bool = False
    below_high: bool = False
    required: bool = False
    also: str = ""

    @override
    def accepts(self, value: Any) -> bool:
        if (self.above_low and value == self.low) or (self.below_high and value == self.high):
            return False
        return bool(self.low <= value <= self.high)

    @property
    @override
    def note(self) -> str:
        return self.also

    def __str__(self) -> str:
        if not (self.above_low or self.below_high):
            return f"{self.low:,} to {self.high:,}"
        low = f"more than {self.low:,}" if self.above_low else f"{self.low:,} or more"
        high = f"less than {self.high:,}" if self.below_high else f"at most {self.high:,}"
        return f"{low} and {high}"


@dataclass(frozen=True, slots=True)
class Text(Limit):
    """A text of so many bytes in UTF-8.

    Attributes:
        most: bytes, or characters with ``characters``.
        pattern: what all of it must match; empty is accepted unless it is ``required``.
        what: the pattern for people.
        also: what else bounds it.
    """

    most: int
    required: bool = False
    characters: bool = False
    pattern: re.Pattern[str] | None = None
    what: str = ""
    also: str = ""

    @override
    def accepts(self, value: Any) -> bool:
        if len(value) > self.most or (not self.characters and len(value.encode()) > self.most):
            return False
        if not value:
            return not self.required
        return self.pattern is None or self.pattern.fullmatch(value) is not None

    @override
    def show(self, value: Any) -> str:
        if len(value) <= SHOWN:
            return ascii(value) if value else "empty"
        unit = "characters" if self.characters else "bytes"
        return f"{len(value) if self.characters else len(value.encode())} {unit} long"

    @property
    @override
    def note(self) -> str:
        return self.also

    def __str__(self) -> str:
        if self.what:
            return self.what
        least = "1 to" if self.required else "at most"
        return f"{least} {self.most:,} {'characters' if self.characters else 'bytes'}"


@dataclass(frozen=True, slots=True)
class Uuid(Limit):
    """A UUID in any of its usual forms, or nothing."""

    @override
    def accepts(self, value: Any) -> bool:
        if not value:
            return True
        try:
            return len(value) <= SHOWN and bool(uuid.UUID(value))
        except ValueError:
            return False

    @override
    def show(self, value: Any) -> str:
        return Text(SHOWN).show(value)

    def __str__(self) -> str:
        return "a UUID"


@dataclass(frozen=True, slots=True)
class Data(Limit):
    """At most so many bytes."""

    most: int

    @override
    def accepts(self, value: Any) -> bool:
        return len(value) <= self.most

    @override
    def show(self, value: Any) -> str:
        return f"{len(value)} bytes long"

    def __str__(self) -> str:
        return f"at most {self.most:,} bytes"


@dataclass(frozen=True, slots=True)
class Choice(Limit):
    """A member of an enum.

    Attributes:
        enum: the enum.
        required: whether "not set", its first member, is refused.
    """

    enum: EnumTypeWrapper
    required: bool = False

    @property
    def names(self) -> Collection[str]:
        """Members that are accepted."""
        return [name for name, value in self.enum.items() if value or not self.required]

    @override
    def accepts(self, value: Any) -> bool:
        return value in self.enum.values() and (value != 0 or not self.required)

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True, slots=True)
class Flag(Limit):
    """True or false."""

    @override
    def accepts(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class Nested(Limit):
    """A message, whose fields have limits of their own.

    Attributes:
        required: whether its own required fields are looked for if it is not set.
    """

    required: bool = False

    @override
    def accepts(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "a message"


@dataclass(frozen=True, slots=True)
class Items(Limit):
    """A list of at most ``most`` elements.

    Attributes:
        element: what each may be.
    """

    most: int
    element: Limit

    @override
    def accepts(self, value: Any) -> bool:
        return len(value) <= self.most

    @override
    def show(self, value: Any) -> str:
        return f"a list of {len(value)}"

    def __str__(self) -> str:
        return f"at most {self.most:,} elements, each {self.element}"
