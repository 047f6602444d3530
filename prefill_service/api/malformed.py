"""Requests that are not messages of the API: which field is wrong, for INVALID_ARGUMENT.

gRPC answers INTERNAL to a request that protobuf refuses to parse, and names nothing. The common
cause is a text that is not UTF-8, which clients in other languages send without noticing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import DecodeError, Message

from prefill_service.errors import Reason, ServiceError


@dataclass(frozen=True, slots=True)
class MalformedRequest:
    """Stands for a request that cannot be parsed, so that it is answered like any other."""

    error: ServiceError


def tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that returns a ``MalformedRequest`` where ``deserialize`` raises.

    Args:
        deserialize: ``FromString`` of the request's class.
    """
    message_class = getattr(deserialize, "__self__", None)
    descriptor = getattr(message_class, "DESCRIPTOR", None)

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return MalformedRequest(_describe(descriptor, data, error))

    return parse


def _describe(descriptor: Descriptor | None, data: bytes, error: DecodeError) -> ServiceError:
    kind = "request" if descriptor is None else descriptor.full_name
    for name, value in _bad_texts(descriptor, data):
        position = _first_bad_byte(value)
        return ServiceError(
            Reason.INVALID_REQUEST,
            f"{name} of the {kind} is not UTF-8: byte {position} of {len(value)} is "
            f"{value[position]:#04x}",
            name=name,
            value=ascii(value[:64]),
            accepted="UTF-8",
        )
    return ServiceError(
        Reason.INVALID_REQUEST, f"the request is no message of {kind}: {error}", name=kind
    )


def _bad_texts(descriptor: Descriptor | None, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Fields whose text is not UTF-8, by name, with their bytes."""
    if descriptor is None:
        return
    try:
        message = _bytes_class(descriptor).FromString(data)
    except DecodeError:
        return
    yield from _search(message, descriptor, "")


def _search(message: Message, descriptor: Descriptor, path: str) -> Iterator[tuple[str, bytes]]:
    for field, value in message.ListFields():
        original = descriptor.fields_by_name[field.name]
        many = not isinstance(value, bytes | Message | int | float)
        for number, item in enumerate(value if many else [value]):
            name = f"{path}{field.name}[{number}]" if many else f"{path}{field.name}"
            if original.message_type is not None:
                yield from _search(item, original.message_type, f"{name}.")
            elif original.type == FieldDescriptor.TYPE_STRING and _first_bad_byte(item) >= 0:
                yield name, item


def _first_bad_byte(value: bytes) -> int:
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1


@functools.cache
def _bytes_class(descriptor: Descriptor) -> Any:
    """The class of the same message with bytes for text, which has the same wire format."""
    pool = descriptor_pool.DescriptorPool()
    _add_file(pool, descriptor.file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(descriptor.full_name))


def _add_file(pool: descriptor_pool.DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add_file(pool, dependency, added)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    for message in proto.message_type:
        for field in message.field:
            if field.type == field.TYPE_STRING:
                field.type = field.TYPE_BYTES
    pool.Add(proto)
