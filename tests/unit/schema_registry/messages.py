"""Classes of Protobuf messages, made as `protoc` would make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import (
    any_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    message_factory,
    text_format,
    timestamp_pb2,
    wrappers_pb2,
)

_TYPES = descriptor_pb2.FieldDescriptorProto


def message_class(name: str, **fields: str) -> Any:
    """A class of messages with these fields, each given as the name of its type."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="tests", syntax="proto3")
    message = file.message_type.add(name=name)
    for number, (field, kind) in enumerate(fields.items(), start=1):
        message.field.add(
            name=field, number=number, type=getattr(_TYPES, f"TYPE_{kind}"), label=_TYPES.LABEL_OPTIONAL
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tests.{name}"))


def importing_class(name: str, imported: str) -> Any:
    """A class of messages with one field, `inner`, whose type is in another file that this one imports."""
    inner = descriptor_pb2.FileDescriptorProto(name=f"{imported}.proto", package="tests", syntax="proto3")
    inner.message_type.add(name=imported).field.add(
        name="text", number=1, type=_TYPES.TYPE_STRING, label=_TYPES.LABEL_OPTIONAL
    )
    outer = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="tests", syntax="proto3")
    outer.dependency.append(inner.name)
    outer.message_type.add(name=name).field.add(
        name="inner",
        number=1,
        type=_TYPES.TYPE_MESSAGE,
        type_name=f".tests.{imported}",
        label=_TYPES.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    for file in (inner, outer):
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tests.{name}"))


def classes(*files: str, names: Sequence[str]) -> list[Any]:
    """Classes of messages, from the text of files' descriptors, which are in a pool of their own."""
    pool = descriptor_pool.DescriptorPool()
    for module in (any_pb2, duration_pb2, timestamp_pb2, wrappers_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for text in files:
        pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]
