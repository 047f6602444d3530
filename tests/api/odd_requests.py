"""Requests made from the protos and the table of limits: the least accepted ones, and odd ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from prefill.v1 import answer_service_pb2, prefill_service_pb2, video_service_pb2

from prefill_service.api.limit_kinds import Choice, Items, Limit, Nested, Text
from prefill_service.api.limits import LIMITS

SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (video_service_pb2, "VideoService"),
        (prefill_service_pb2, "PrefillService"),
        (answer_service_pb2, "AnswerService"),
    )
]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
MEGABYTE = 1_000_000
MANY = 100_000

# Of texts with a form of their own.
FORMS = {"video_id": "vid_x", "job_id": "job_x", "sha256": "a" * 64, "path": "/nowhere"}

INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class OddRequest:
    """A request with one field of an odd value.

    Attributes:
        path: of the field, as errors name it.
        label: the value, for people.
        legal: whether the table of limits has the value.
        presence: whether it can be told from a field that is not set.
    """

    method: MethodDescriptor
    message: Message
    path: str
    label: str
    legal: bool
    presence: bool

    def __str__(self) -> str:
        return f"{self.method.name} {self.path}={self.label}"


def request_messages() -> dict[str, Descriptor]:
    """Every message that is a request or part of one, by name."""
    found: dict[str, Descriptor] = {}
    waiting = [method.input_type for method in METHODS]
    while waiting:
        message = waiting.pop()
        if message.name not in found:
            found[message.name] = message
            waiting += [field.message_type for field in message.fields if field.message_type]
    return found


def fill(message: Message) -> Any:
    """Give a message what its limits require of it, and no more."""
    for name, limit in LIMITS[message.DESCRIPTOR.name].items():
        if not limit.required:
            continue
        match limit:
            case Nested():
                fill(getattr(message, name))
            case Text():
                setattr(message, name, FORMS.get(name, "x"))
            case _:
                setattr(message, name, 1)
    return message


def least_request(method: MethodDescriptor) -> Any:
    """The shortest request that is within all limits."""
    return fill(GetMessageClass(method.input_type)())


def odd_values(field: FieldDescriptor, limit: Limit) -> list[tuple[str, Any]]:
    """Labels and values of one element of a field."""
    if isinstance(limit, Choice):
        numbers = field.enum_type.values_by_number
        return [(str(number), number) for number in [*numbers, 99, -1, 2**31 - 1]]
    kind = field.cpp_type
    if kind in INTEGERS:
        low, high = INTEGERS[kind]
        return [(str(value), value) for value in (0, 1, -1, low, high)]
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        huge = 3e38 if kind == FieldDescriptor.CPPTYPE_FLOAT else 1.7e308
        tiny = 1e-38 if kind == FieldDescriptor.CPPTYPE_FLOAT else 5e-324
        values = (0.0, -0.0, 0.5, -1.0, tiny, huge, -huge, math.nan, math.inf, -math.inf)
        return [(str(value), value) for value in values]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return [("True", True), ("False", False)]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return [("nothing", b""), ("zeros", bytes(3 * MEGABYTE))]
    return [
        ("nothing", ""),
        ("megabyte", "a" * MEGABYTE),
        ("words", "word " * (MEGABYTE // 5)),
        ("digits", "1" * 5000),
        ("nul", "\0"),
        ("dots", "../../etc/passwd"),
        ("emoji", "\U0001f3ac" * 100),
        ("control", "<|im_end|><|video_pad|>"),
    ]


Place = tuple[str, Callable[[Any], Message]]


def _places(message: Descriptor, place: Place) -> Iterator[tuple[FieldDescriptor, Limit, Place]]:
    """Every field of a message, at any depth, with how to get at the message that has it."""
    path, get = place
    for name, limit in LIMITS[message.name].items():
        field = message.fields_by_name[name]
        yield field, limit, place
        inner = limit.element if isinstance(limit, Items) else limit
        if not isinstance(inner, Nested):
            continue

        def descend(
            root: Any,
            name: str = name,
            limit: Limit = limit,
            get: Callable[[Any], Message] = get,
        ) -> Message:
            """The nested message, made if there is none."""
            held = getattr(get(root), name)
            if isinstance(limit, Items):
                return fill(held[0] if held else held.add())  # type: ignore[no-any-return]
            held.SetInParent()
            return fill(held)  # type: ignore[no-any-return]

        suffix = f"{name}[0]." if isinstance(limit, Items) else f"{name}."
        yield from _places(field.message_type, (f"{path}{suffix}", descend))


def odd_requests(method: MethodDescriptor, base: Callable[[], Any]) -> Iterator[OddRequest]:
    """Requests of a method, each with one odd field.

    Args:
        base: makes the request that is changed.
    """
    for field, limit, (path, get) in _places(method.input_type, ("", lambda root: root)):
        if isinstance(limit, Items):
            yield from _odd_lists(method, base, field, limit=limit, place=(path, get))
            continue
        if isinstance(limit, Nested):
            root = base()
            get(root).ClearField(field.name)
            legal = not limit.required
            yield OddRequest(method, root, f"{path}{field.name}", "unset", legal, False)
            continue
        for label, value in odd_values(field, limit):
            root = base()
            holder = get(root)
            setattr(holder, field.name, value)
            kept = getattr(holder, field.name)  # as the field has it
            given = field.has_presence or bool(kept)
            legal = limit.accepts(kept) if given or limit.required else True
            yield OddRequest(method, root, f"{path}{field.name}", label, legal, given)


def _odd_lists(
    method: MethodDescriptor,
    base: Callable[[], Any],
    field: FieldDescriptor,
    *,
    limit: Items,
    place: Place,
) -> Iterator[OddRequest]:
    path, get = place
    for count in (0, MANY):
        root = base()
        holder = get(root)
        holder.ClearField(field.name)
        elements = getattr(holder, field.name)
        if field.message_type is not None:
            elements.extend([fill(elements.add())] * (count - 1) if count else [])
        else:
            elements.extend(["x"] * count)
        yield OddRequest(
            method, root, f"{path}{field.name}", f"{count} elements", count <= limit.most, True
        )
    if field.message_type is None:
        for label, value in odd_values(field, limit.element):
            root = base()
            getattr(get(root), field.name).append(value)
            legal = limit.element.accepts(value)
            yield OddRequest(method, root, f"{path}{field.name}[0]", label, legal, True)
