"""Client and AsyncClient are one interface: the same methods, arguments and documentation."""

from __future__ import annotations

import inspect
import re

import pytest

from prefill_client import AnswerStream, AsyncAnswerStream, AsyncClient, Client

PAIRS = [(Client, AsyncClient), (AnswerStream, AsyncAnswerStream)]
METHODS = [
    (blocking, asynchronous, name)
    for blocking, asynchronous in PAIRS
    for name in vars(blocking)
    if not name.startswith("_") or name == "__init__"
]


def public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


def blocking_form(text: str) -> str:
    """A text or annotation of the asynchronous classes in the words of the blocking ones."""
    text = re.sub(r"\bawait |\basync ", "", text)
    text = re.sub(r"\bAsync(Iterator|Client|AnswerStream|Cancellation)\b", r"\1", text)
    text = re.sub(r"AsyncGenerator\[(\w+), None\]", r"Iterator[\1]", text)
    return text.replace("task that iterates", "thread that iterates")


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_the_same_members(blocking: type, asynchronous: type) -> None:
    assert public(blocking) == public(asynchronous)


@pytest.mark.parametrize(("blocking", "asynchronous", "name"), METHODS)
def test_the_same_signature_and_documentation(
    blocking: type, asynchronous: type, name: str
) -> None:
    one = inspect.getattr_static(blocking, name)
    other = inspect.getattr_static(asynchronous, name)
    assert isinstance(one, property) == isinstance(other, property)
    if isinstance(one, property):
        one = one.fget
        other = other.fget
    assert str(inspect.signature(one)) == blocking_form(str(inspect.signature(other)))
    assert one.__doc__ == (other.__doc__ and blocking_form(other.__doc__))


def test_the_same_arguments_of_the_constructors_are_documented() -> None:
    one, other = (re.search(r"Args:.*", cls.__doc__ or "", re.S) for cls in (Client, AsyncClient))
    assert one is not None
    assert other is not None
    assert one[0] == other[0]


def test_differences_are_found() -> None:
    """The comparison above can fail."""

    class Other:
        async def job(self, job_id: int) -> None:
            """One job."""

    assert str(inspect.signature(Client.job)) != blocking_form(str(inspect.signature(Other.job)))
