"""Checks of arguments before anything is sent, and the error that says what would be accepted.

A message's field would take most of what is wrong here with an error of protobuf's own, which
names neither the argument nor its limit, and only once a file of gigabytes has been uploaded.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from prefill_client.errors import ArgumentError

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MESSAGE_BYTES = 4 << 20
"""The server takes no larger message."""

_SHOWN = 80


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise the error of an argument.

    Raises:
        ArgumentError: naming the argument, its value and what is accepted.
    """
    cut = value[: _SHOWN + 1] if isinstance(value, str | bytes | bytearray) else value
    try:
        shown = ascii(cut)
    except ValueError:  # an integer of thousands of digits
        shown = "..."
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    if not isinstance(value, str | int | float | bytes | None):
        shown = f"{shown} ({type(value).__name__})"
    raise ArgumentError(
        "INVALID_REQUEST",
        f"{name} = {shown} is not accepted; expected {expected}",
        metadata={"name": name, "value": shown, "accepted": expected},
    )


def check_text(name: str, value: object) -> str:
    """Return a text that UTF-8 can encode, which all text of the API is.

    Raises:
        ArgumentError: it is not a str, or holds a surrogate without its other half.
    """
    if not isinstance(value, str):
        refuse(name, value, "text (str)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        refuse(
            name,
            value[error.start : error.start + 1],
            f"text without lone surrogates; this one is at index {error.start} of {len(value)}",
        )
    return value


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """Return an integer from ``low`` to ``high``.

    Raises:
        ArgumentError: it is none, or outside.
    """
    expected = f"an integer, {low} to {high}"
    if isinstance(value, bool):
        refuse(name, value, expected)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        refuse(name, value, expected)
    if not low <= number <= high:
        # The decimal digits of a huge one take seconds to print, or are refused by Python.
        shown = number if number.bit_length() < 256 else f"{number.bit_length()} bits"
        refuse(name, shown, expected)
    return number


@dataclass(frozen=True)
class Range:
    """Accepted values of a number.

    Args:
        low, high: bounds, both accepted unless said otherwise.
        integer: whether only integers are.
        above_low, below_high: the bound itself is not accepted.
    """

    low: float
    high: float
    integer: bool = False
    above_low: bool = False
    below_high: bool = False

    def check(self, name: str, value: object) -> float:
        """Return ``value`` as a number in the range.

        Raises:
            ArgumentError: it is not a number, or not in the range.
        """
        if self.integer:
            return check_integer(name, value, int(self.low), int(self.high))
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            refuse(name, value, str(self))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        inside = self.low <= number <= self.high and math.isfinite(number)
        if (
            not inside
            or (self.above_low and number == self.low)
            or (self.below_high and number == self.high)
        ):
            refuse(name, value if math.isfinite(number) else number, str(self))
        return number

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above_low else f"{self.low:g} or more"
        if math.isinf(self.high):
            return f"a finite number, {low}"
        high = f"less than {self.high:g}" if self.below_high else f"at most {self.high:g}"
        return f"a number, {low} and {high}"


def check_flag(name: str, value: object) -> bool:
    """Return True or False.

    Raises:
        ArgumentError: it is neither.
    """
    if not isinstance(value, bool):
        refuse(name, value, "True or False")
    return value


def check_choice(name: str, value: object, accepted: Collection[str]) -> str:
    """Return one of the accepted words.

    Raises:
        ArgumentError: it is none of them.
    """
    if not isinstance(value, str) or value not in accepted:
        refuse(name, value, f"one of {', '.join(accepted)}")
    return str(value)


def check_seconds(name: str, value: object) -> float:
    """Return a time limit in seconds.

    Raises:
        ArgumentError: it is not a finite number above 0.
    """
    return Range(0, math.inf, above_low=True).check(name, value)


def check_request_id(value: object) -> str:
    """Return the text of a UUID.

    Raises:
        ArgumentError: it is none.
    """
    text = check_text("request_id", value)
    try:
        uuid.UUID(text)
    except ValueError:
        refuse("request_id", text, "a UUID")
    return text


def check_sha256(value: object) -> str:
    """Return a digest in lower case.

    Raises:
        ArgumentError: it is not 64 hexadecimal digits.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        refuse("sha256", value, "64 hexadecimal digits")
    return value.lower()
