"""What data says about the schema that it was written with, and whether a job can read that at all.

Responsible for: the bytes in front of data, and the kind and the name of the schema that they lead to. The
deserializers don't look at these: they would read the message of another type, or bytes, as what the job
declares. Invariant: finding the end of what stands in front takes a bounded time, whatever the data is.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from fcluster.common.errors import FormatUnusable
from fcluster.common.failures import describe_exception
from fcluster.graph.codecs import ModelError
from fcluster.schema_registry.references import avro_schema, texts_of_writer
from fcluster.schema_registry.registry import Registry

PROTOBUF: Final = "PROTOBUF"
_WITH_ID, _WITH_GUID = 0, 1
_ID_BYTES: Final = 4
_GUID_BYTES: Final = 16
_INDEXES_BYTES_MAX: Final = 512
"""What a Protobuf message's place in its file may take: many times what the deepest nesting needs."""
_SERIALIZED: Final = "serialized"
"""The form in which confluent-kafka asks for Protobuf schemas."""


def frame_bytes(kind: str, raw: bytes) -> int:
    """How many bytes in front of the data name its schema. 0: it doesn't begin with that.

    Args:
        kind: what the registry calls the format. With Protobuf, the place of the message in its file follows.
        raw: the data, or what a header has.
    """
    size = {_WITH_ID: _ID_BYTES, _WITH_GUID: _GUID_BYTES}.get(raw[0], 0) if raw else 0
    if not size or len(raw) <= size:
        return 0
    return _read_frame(raw)[1] if kind == PROTOBUF else 1 + size


def _read_frame(raw: bytes) -> tuple[Any, int]:
    """The id of a Protobuf schema with the indexes of the message, and how many bytes they take: 0 if they
    can't be read.
    """
    from confluent_kafka.schema_registry.common.serde import SchemaId
    from confluent_kafka.serialization import SerializationError

    found: Any = cast("Any", SchemaId)(PROTOBUF)
    buffer = io.BytesIO(raw[: 1 + _GUID_BYTES + _INDEXES_BYTES_MAX])
    try:
        found.from_bytes(buffer)
    except (EOFError, SerializationError, ValueError, struct.error):
        return None, 0
    return found, buffer.tell()


def written_with(
    registry: Registry, kind: str, frame: bytes, subject: str | None
) -> tuple[Any, Mapping[str, str]]:
    """The schema with which data was written, as confluent-kafka's client gives it, and the texts of those to
    which it refers, by name.

    Args:
        registry: the registry. The deserializers ask for the same, and find it in the client then.
        kind: what the registry calls the format.
        frame: what stands in front of the data.
        subject: under which the deserializers look for the schema.

    Raises:
        ModelError: it is a schema of another format, or refers to itself.
        UnknownSchemaError: the registry doesn't have it.
        FormatUnusable: the registry can't be asked, or gives Protobuf's as text.
    """
    found = _asked(registry, kind, frame, subject)
    registered = _kind_of(found, kind)
    if registered != kind:
        raise ModelError(f"that is of the type {registered}, not {kind}")
    if kind == PROTOBUF and _serialized(found.schema_str) is None:
        # Perhaps the client keeps the text that a registry has answered when the schema was registered.
        registry.client.clear_caches()
        found = _asked(registry, kind, frame, subject)
        if _serialized(found.schema_str) is None:
            raise FormatUnusable(
                f"the schema registry {registry.url} gives Protobuf schemas as text only, when "
                f"confluent-kafka asks for their descriptors (format={_SERIALIZED})",
                remedy="Use a registry that has both, or read the topic as 'bytes'.",
            )
    # The deserializers ask for these, too, and would go in circles.
    return found, texts_of_writer(registry, found, _form(kind))


def _kind_of(schema: Any, kind: str) -> str:
    """The format of a schema. Registries leave it out if it is Avro, and some may always do so."""
    if schema.schema_type not in (None, "AVRO") or kind == "AVRO":
        return schema.schema_type or "AVRO"
    try:
        written = json.loads(schema.schema_str)
    except ValueError:
        return kind
    return "AVRO" if kind == PROTOBUF or _type_of(written) in ("record", "enum", "fixed") else kind


def _asked(registry: Registry, kind: str, frame: bytes, subject: str | None) -> Any:
    form = _form(kind)
    title = subject or "the data"
    if frame[0] == _WITH_GUID:
        guid = _guid_of(frame)
        return registry.ask("get_schema_by_guid", guid, form, subject=title)
    number = int.from_bytes(frame[1 : 1 + _ID_BYTES], "big")
    return registry.ask("get_schema", number, subject, form, subject=title)


def _form(kind: str) -> str | None:
    """The form in which the deserializers ask for schemas."""
    return _SERIALIZED if kind == PROTOBUF else None


def _guid_of(frame: bytes) -> str:
    from uuid import UUID

    return str(UUID(bytes=frame[1 : 1 + _GUID_BYTES]))


def id_title(frame: bytes) -> str:
    """The id or GUID in front of data, for messages."""
    if frame[0] == _WITH_GUID:
        return _guid_of(frame)
    return str(int.from_bytes(frame[1 : 1 + _ID_BYTES], "big"))


# --- Protobuf ---------------------------------------------------------------------------------------------


def _serialized(text: str) -> bytes | None:
    """The descriptor of a file, as confluent-kafka wants it. None: it is something else."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def check_message(schema: Any, frame: bytes, descriptor: Any) -> None:
    """Check that data is a message of the declared type. Protobuf would read any other as that, too.

    Only the name counts, not the package, as in Avro.

    Args:
        schema: the one with which it was written.
        frame: what stands in front of the data.
        descriptor: of the declared class.

    Raises:
        ModelError: it is another message, or the schema doesn't have it.
    """
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from google.protobuf.message import DecodeError

    file: Any = FileDescriptorProto()
    try:
        file.ParseFromString(_serialized(schema.schema_str))
    except DecodeError as error:
        raise ModelError(f"that can't be read ({error})") from error
    indexes: Sequence[int] = _read_frame(frame)[0].message_indexes
    names: list[str] = []
    messages = file.message_type
    for index in indexes:
        if not 0 <= index < len(messages):
            raise ModelError(f"that has no message at {list(indexes)}")
        names.append(messages[index].name)
        messages = messages[index].nested_type
    if names[-1] != descriptor.name:
        written = ".".join(filter(None, [file.package, *names]))
        raise ModelError(f"it is a {written}, not a {descriptor.full_name}")


# --- Avro -------------------------------------------------------------------------------------------------


def check_avro(schema: Any, texts: Mapping[str, str], declared: Any) -> None:
    """Check what the deserializer doesn't, or says in a way that shows its own data.

    Args:
        schema: the one with which data was written.
        texts: those to which it refers, by name.
        declared: the job's, parsed by fastavro.

    Raises:
        ModelError: they don't fit.
    """
    from fastavro.schema import UnknownType

    try:
        written = json.loads(schema.schema_str)
        avro_schema(written, texts)
    except UnknownType as error:
        name = cast("Any", error).name
        raise ModelError(f"that has the type {name!r}, which it doesn't know") from error
    except Exception as error:  # what fastavro raises
        raise ModelError(f"that isn't Avro ({describe_exception(error)})") from error
    if _type_of(written) == "bytes":
        # The deserializer gives all that follows as bytes then, whatever the job declares.
        if is_decimal(written) or not any(map(_is_bytes, _branches(declared))):
            raise ModelError(f"it is {_title(written)}, not {_title(declared)}")
    elif _type_of(written) == _type_of(declared) == "record":
        names = {_last(name) for name in (declared["name"], *declared.get("aliases", ()))}
        if _last(written["name"]) not in names:
            raise ModelError(f"it is {_title(written)}, not {_title(declared)}")


def is_decimal(schema: Any) -> bool:
    """Whether an Avro schema is a decimal that is written as bytes."""
    parts = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}
    return _type_of(schema) == "bytes" and parts.get("logicalType") == "decimal"


def _is_bytes(schema: Any) -> bool:
    return _type_of(schema) == "bytes" and not is_decimal(schema)


def _branches(schema: Any) -> Sequence[Any]:
    return cast("list[Any]", schema) if isinstance(schema, list) else [schema]


def _type_of(schema: Any) -> Any:
    return cast("dict[str, Any]", schema).get("type") if isinstance(schema, dict) else schema


def _title(schema: Any) -> str:
    if isinstance(schema, list):
        return "a union"
    parts = cast("dict[str, Any]", schema) if isinstance(schema, dict) else {}
    return f"of the type {parts.get('name') or parts.get('logicalType') or _type_of(schema)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]
