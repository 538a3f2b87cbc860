"""Avro, JSON Schema and Protobuf as codecs of keys and values, over confluent-kafka's own serializers.

Responsible for: the classes that a job file uses, their checks, and messages that say what doesn't fit.
Invariants: declaring a format uses no network, so a job can be imported and checked without a registry; two
declarations of the same format are equal; a key's name has its schema's fingerprint, because other schemas
give other bytes. The serializers are never bypassed: their bytes begin with a schema's id, and that is all
that is known about them here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar, cast
from uuid import UUID

import msgspec

from fcluster.common.errors import FclusterError, FormatUnusable, JobError
from fcluster.common.failures import bounded_repr, describe_exception, type_of
from fcluster.graph.codecs import (
    KEY_ID_HEADER,
    UNNAMED_KEY_BY,
    VALUE_ID_HEADER,
    Codec,
    CodecNote,
    CodecUse,
    ModelError,
    decode_json,
    encode_json_key,
)
from fcluster.graph.models import is_model
from fcluster.schema_registry.defaults import Finish, compile_defaults
from fcluster.schema_registry.references import (
    DeclaredClient,
    Reference,
    all_references,
    check_json_references,
    checked_avro,
    checked_references,
    declared_schema,
    registered_references,
    serializer_with_references,
    texts_of_writer,
)
from fcluster.schema_registry.registry import (
    EXTRA,
    Registry,
    UnknownReferenceError,
    UnknownSchemaError,
    registry_for,
)
from fcluster.schema_registry.standing import standing_of, why_avro_is_unreadable
from fcluster.schema_registry.texts import bad_schema, parsed_schema

_T = TypeVar("_T")

_FRAME_BYTES: Final = 5
"""A magic byte (0) and a schema's id; or 1 and the 16 bytes of a schema's GUID."""
_GUID_BYTES: Final = 16
_MAGIC: Final = (0, 1)
_WITH_GUID: Final = b"\1"
_NATIVE: Final = (bytes, bytearray, datetime, date, time, Decimal, UUID)
"""What Avro's logical types have values of."""
_MOMENTS: Final = {"timestamp-millis", "timestamp-micros"}
_LOCAL_TIMES: Final = {"local-timestamp-millis", "local-timestamp-micros"}
_AMBIGUOUS: Final = ("map", "float", "double")
"""Avro types of which equal values may have different bytes."""
SchemaIdSerializer = Callable[[bytes, Any, Any], bytes]
"""The type of `header_schema_id_serializer` and `prefix_schema_id_serializer` in
confluent_kafka.schema_registry.
"""


def _unopened(_value: Any) -> NoReturn:
    raise AssertionError("a format of a schema registry is opened for a topic before it is used")


class RegistryFormat(Codec[_T]):
    """The common part of the formats. A job uses one of the classes below.

    Attributes:
        auto_register: whether the schema is registered when the first record is written.
        ids_in_headers: whether schemas' ids are written to headers.
        kind: what the registry calls the format.
    """

    kind: str

    def __init__(
        self,
        name: str,
        identity: tuple[Any, ...],
        text: str,
        auto_register: bool,
        schema_id_serializer: SchemaIdSerializer | None,
    ) -> None:
        super().__init__(name, _unopened, _unopened, self._open)
        self.ids_in_headers = _writes_to_headers(schema_id_serializer, type(self).__name__)
        self._identity: tuple[Any, ...] = (
            type(self).__name__,
            auto_register,
            self.ids_in_headers,
            *identity,
        )
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.auto_register = auto_register

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the base class is frozen; the attributes here are set once

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RegistryFormat) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def name_for(self, use: CodecUse) -> str:
        """See `Codec`."""
        if use.part == "state" or "/" in use.name:
            raise JobError(
                f"{type(self).__name__} of {use.name!r} can't be used for state, which no other program "
                "reads.",
                remedy="Give the state a model: a dataclass or a msgspec.Struct.",
            )
        if use.name == UNNAMED_KEY_BY:
            raise JobError(
                f"key_by uses {type(self).__name__}, and has no name, under which its schema could be "
                "registered.",
                remedy="Give it one: key_by(..., name='account').",
            )
        if use.part != "key":
            return self.name
        self.check_key(use.name)
        form = "-guid" if self.ids_in_headers else ""
        return f"{self.name}-{self._fingerprint}{form}"

    @abstractmethod
    def check_key(self, topic: str) -> None:
        """Check that equal keys have equal bytes.

        Raises:
            JobError: they may not.
        """

    def id_header(self, part: Literal["key", "value"]) -> str | None:
        """See `Codec`. What the header has is also a valid beginning of the data."""
        return KEY_ID_HEADER if part == "key" else VALUE_ID_HEADER

    def header_bytes(self, raw: bytes) -> int:
        """See `Codec`: the GUID. An id stays in front of the data, where all readers find it."""
        return self.guid_bytes(raw) if self.ids_in_headers and raw[:1] == _WITH_GUID else 0

    def guid_bytes(self, raw: bytes) -> int:  # noqa: ARG002  for formats that have more there
        """How many bytes of data that begins with a GUID belong to it."""
        return 1 + _GUID_BYTES

    def notes_on(self, use: CodecUse, *, reads: bool, writes: bool) -> Iterable[CodecNote]:
        """See `Codec`."""
        try:
            registry = registry_for(use, is_patient=False)
            return list(
                standing_of(
                    registry,
                    use,
                    self.kind,
                    lambda: self.schema(registry),
                    lambda schema: self.why_unreadable(registry, schema),
                    reads=reads,
                    writes=writes,
                    auto_register=self.auto_register,
                    needs_guids=self.ids_in_headers,
                )
            )
        except ImportError as error:
            raise _not_installed(type(self).__name__, error, FormatUnusable) from error

    @abstractmethod
    def schema(self, registry: Registry) -> Any:
        """The schema as confluent-kafka's client takes it, with the versions of those to which it refers.

        Raises:
            UnknownSchemaError: the registry doesn't have one of these.
            FormatUnusable: it can't be asked.
        """

    def why_unreadable(self, registry: Registry, schema: Any) -> str | None:  # noqa: ARG002  for formats that know it
        """Why what was written with a registered schema can't be read; see `standing.WhyUnreadable`."""
        return None

    @abstractmethod
    def make(self, registry: Registry) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """confluent-kafka's serializer and deserializer."""

    def check_value(self, value: Any) -> None:
        """Raise TypeError for a value that the serializer would write wrongly."""

    def _open(self, use: CodecUse) -> Codec[_T]:
        try:
            from confluent_kafka.serialization import SerializationContext

            registry = registry_for(use)
            serialize, deserialize = self.make(registry)
        except ImportError as error:
            raise _not_installed(type(self).__name__, error, FormatUnusable) from error
        context = SerializationContext(use.name, cast("Any", use.part))
        subject = f"{use.name}-{use.part}"
        return Codec(
            self.name,
            _encoder(self, registry, serialize, context, subject),
            _decoder(self, registry, deserialize, context, subject),
        )

    def _conf(self) -> dict[str, Any]:
        from confluent_kafka.schema_registry import topic_subject_name_strategy

        # The default asks the registry which subject a topic is associated with. Not every registry knows
        # that.
        return {"subject.name.strategy": topic_subject_name_strategy}

    def _writing_conf(self, registry: Registry) -> dict[str, Any]:
        conf = {**self._conf(), "auto.register.schemas": self.auto_register}
        if self.ids_in_headers:
            conf["schema.id.serializer"] = _guid_in_front(registry)
        return conf


class _TextFormat(RegistryFormat[_T]):
    """A format whose schema is a text, which may refer to others."""

    _text: str
    _references: tuple[Reference, ...]

    def _pair(
        self,
        registry: Registry,
        serializer: Callable[[Any], Callable[..., Any]],
        deserializer: Callable[[Any, Any], Callable[..., Any]],
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What two functions make: one takes a schema, the other a client and a schema."""
        references = self._references
        if not references:
            return serializer(self._text), deserializer(registry.client, self._text)
        return (
            serializer_with_references(
                registry,
                self.kind,
                references,
                lambda found: serializer(_client_schema(self._text, self.kind, found)),
                register=self.auto_register,
            ),
            deserializer(
                DeclaredClient(registry.client, self.kind, references),
                declared_schema(self._text, self.kind, references),
            ),
        )

    def schema(self, registry: Registry) -> Any:
        """See `RegistryFormat`."""
        found = registered_references(registry, self.kind, self._references, register=False)
        return _client_schema(self._text, self.kind, found)


class Avro(_TextFormat[_T]):
    """Avro, with schemas in a registry.

    Example::

        payments = job.topic("payments", value=Avro(Path("payment.avsc"), model=Payment))

    A record is read with the schema it was written with, and then fitted to this one, as Avro says: fields
    that this schema doesn't have are left out, and new ones get their defaults.

    Attributes:
        schema: the schema, as JSON text, as a dict (a list for a union), or as the path of a file with it.
        model: values are objects of this class: a dataclass, a Struct or a pydantic model. None: dicts.
        auto_register: whether the schema is registered when the first record is written. If not, it has to be
            registered already. The same holds for its references.
        references: the schemas of other subjects to which it refers, each as a `Reference`.
        schema_id_serializer: confluent-kafka's `header_schema_id_serializer` writes schemas' ids to headers.
            Default: in front of the data.

    Raises:
        JobError: the schema isn't valid, refers to what isn't declared, or the extra `schema-registry` isn't
            installed.
    """

    kind = "AVRO"

    def __init__(
        self,
        schema: str | Path | Mapping[str, Any] | Sequence[Any],
        *,
        model: type[_T] | None = None,
        auto_register: bool = True,
        references: Sequence[Reference] = (),
        schema_id_serializer: SchemaIdSerializer | None = None,
    ) -> None:
        parsed = parsed_schema(schema, "Avro")
        self._references = checked_references(references, "Avro")
        try:
            self._checked = checked_avro(parsed, self._references, "Avro schema")
        except ImportError as error:
            raise _not_installed("Avro", error) from error
        try:
            self._finish = compile_defaults(self._checked)
        except Exception as error:  # what a wrong default leads to
            raise bad_schema("default of a field in the Avro schema", error) from error
        self._convert = _Conversion.of(model, "Avro")
        self._text = json.dumps(parsed)
        identity, text = _with_references(self._text, self._references)
        super().__init__("avro", (*identity, model), text, auto_register, schema_id_serializer)

    def check_key(self, topic: str) -> None:
        """See `RegistryFormat`."""
        found = next((one for one in _avro_types(self._checked) if one in _AMBIGUOUS), None)
        if found is not None:
            raise JobError(
                f"The Avro schema of the keys of {topic!r} has the type {found!r}, of which equal values may "
                "have different bytes.",
                remedy="Use keys of text, integers, bytes, enums, or records of these.",
            )

    def make(self, registry: Registry) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import avro

        # A field that the schema doesn't have would be left out silently.
        conf = {**self._writing_conf(registry), "validate.strict.allow.default": True}
        library, client = cast("Any", avro), registry.client
        check = _checking(self._checked, self._convert.to_plain)
        read = _finishing(self._finish, self._convert.from_plain)

        def deserializer(knowing: Any, schema: Any) -> Callable[..., Any]:
            usual = library.AvroDeserializer(knowing, schema, read, conf=self._conf())
            # It refuses data of which nothing follows the id: a record without fields, or empty bytes.
            conf = {**self._conf(), "schema.id.deserializer": _id_of_padded}
            of_nothing = library.AvroDeserializer(knowing, schema, read, conf=conf)

            def deserialize(raw: bytes, context: Any) -> Any:
                return usual(raw, context) if len(raw) > _FRAME_BYTES else of_nothing(raw + b"\0", context)

            return deserialize

        return self._pair(
            registry, lambda schema: library.AvroSerializer(client, schema, check, conf), deserializer
        )

    def check_value(self, value: Any) -> None:
        """See `RegistryFormat`."""
        self._convert.check(value)

    def why_unreadable(self, registry: Registry, schema: Any) -> str | None:
        """See `RegistryFormat`."""
        try:
            texts = texts_of_writer(registry, schema)
        except UnknownSchemaError as error:
            return f"it refers to a schema that the registry doesn't have: {error}"
        return why_avro_is_unreadable(self._checked, schema.schema_str, texts)


class JsonSchema(_TextFormat[_T]):
    """JSON that is checked against a JSON Schema, with schemas in a registry.

    What is read has to be valid under this schema, and so has what is written.

    Attributes:
        schema: the schema, as JSON text, as a dict, or as the path of a file with it.
        model: values are objects of this class: a dataclass, a Struct or a pydantic model. None: as in JSON.
        auto_register: as in `Avro`.
        references: as in `Avro`.
        schema_id_serializer: as in `Avro`.

    Raises:
        JobError: as in `Avro`.
    """

    kind = "JSON"

    def __init__(
        self,
        schema: str | Path | Mapping[str, Any],
        *,
        model: type[_T] | None = None,
        auto_register: bool = True,
        references: Sequence[Reference] = (),
        schema_id_serializer: SchemaIdSerializer | None = None,
    ) -> None:
        try:
            from jsonschema.validators import validator_for
        except ImportError as error:
            raise _not_installed("JsonSchema", error) from error
        parsed = parsed_schema(schema, "JSON")
        self._references = checked_references(references, "JsonSchema")
        declared = [(f"JSON schema {name!r}", one.parsed) for name, one in all_references(references).items()]
        for what, one in [("JSON schema", parsed), *declared]:
            try:
                cast("Any", validator_for(one)).check_schema(one)
            except Exception as error:  # what jsonschema raises
                raise bad_schema(what, error) from error
        check_json_references(parsed, self._references, "JSON schema")
        self._convert = _Conversion.of(model, "JsonSchema")
        self._text = json.dumps(parsed)
        identity, text = _with_references(self._text, self._references)
        super().__init__("json-schema", (*identity, model), text, auto_register, schema_id_serializer)

    def check_key(self, topic: str) -> None:
        """See `RegistryFormat`. Keys are written with sorted names."""

    def make(self, registry: Registry) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import json_schema

        to_plain, from_plain = self._convert.to_json, self._convert.from_json
        library, client = cast("Any", json_schema), registry.client
        return self._pair(
            registry,
            lambda schema: library.JSONSerializer(
                schema, client, to_plain, self._writing_conf(registry), json_encode=_json_text
            ),
            lambda knowing, schema: library.JSONDeserializer(
                schema, from_plain, knowing, self._conf(), json_decode=decode_json
            ),
        )

    def check_value(self, value: Any) -> None:
        """See `RegistryFormat`."""
        self._convert.check(value)


class Protobuf(RegistryFormat[_T]):
    """Messages of a class that `protoc` generated, with schemas in a registry.

    Example::

        from payments_pb2 import Payment

        payments = job.topic("payments", value=Protobuf(Payment))

    Attributes:
        message: the class.
        auto_register: as in `Avro`.
        schema_id_serializer: as in `Avro`.

    Raises:
        JobError: it isn't a class of messages, or the extra `schema-registry` isn't installed.
    """

    kind = "PROTOBUF"

    def __init__(
        self,
        message: type[_T],
        *,
        auto_register: bool = True,
        schema_id_serializer: SchemaIdSerializer | None = None,
    ) -> None:
        try:
            from google.protobuf.message import Message
        except ImportError as error:
            raise _not_installed("Protobuf", error) from error
        if not (isinstance(message, type) and issubclass(message, Message)):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"Protobuf got {bounded_repr(message)}, which is not a class of messages.",
                remedy="Generate the class with protoc, import it, and give the class: Protobuf(Payment).",
            )
        self._message: type[_T] = message
        self._descriptor: Any = cast("Any", message).DESCRIPTOR
        text = str(self._descriptor.file.serialized_pb)
        identity = f"{self._descriptor.full_name} {text}"
        super().__init__("protobuf", (message,), identity, auto_register, schema_id_serializer)

    def check_key(self, topic: str) -> None:
        """See `RegistryFormat`."""
        field = next(_ambiguous_fields(self._descriptor, frozenset()), None)
        if field is not None:
            raise JobError(
                f"{self._descriptor.full_name} can't be the key of {topic!r}: equal values of its field "
                f"{field!r} may have different bytes.",
                remedy="Use keys without maps, floats and doubles.",
            )

    def make(self, registry: Registry) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import protobuf

        library, client = cast("Any", protobuf), registry.client
        return (
            library.ProtobufSerializer(self._message, client, self._writing_conf(registry)),
            library.ProtobufDeserializer(self._message, self._conf(), client),
        )

    def guid_bytes(self, raw: bytes) -> int:
        """See `RegistryFormat`: the place of the message in its file follows."""
        from confluent_kafka.schema_registry.common.serde import SchemaId

        return cast("Any", SchemaId)(self.kind).from_bytes(io.BytesIO(raw)).tell()

    def check_value(self, value: Any) -> None:
        """See `RegistryFormat`."""
        if not isinstance(value, self._message):
            raise TypeError(
                f"{bounded_repr(value)} is of type {type_of(value)}, but {self._message.__name__} is "
                "declared there"
            )

    def schema(self, registry: Registry) -> Any:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import protobuf

        file = self._descriptor.file
        conf = {**self._conf(), "auto.register.schemas": False}
        # confluent-kafka has no public way to the schema's text and to the versions of the imported files.
        serializer = cast("Any", protobuf).ProtobufSerializer(self._message, registry.client, conf)

        def resolve(_argument: Any, context: Any) -> Any:
            return serializer._resolve_dependencies(context, file)

        try:
            found = registry.call(resolve, None, None, file.name)
        except UnknownSchemaError as error:
            raise UnknownSchemaError(f"a file that {file.name!r} imports isn't registered") from error
        return _client_schema(serializer._schema.schema_str, self.kind, found)


def _client_schema(text: str, kind: str, references: list[Any]) -> Any:
    from confluent_kafka.schema_registry import Schema

    return Schema(text, kind, references)


def _with_references(text: str, references: Sequence[Reference]) -> tuple[tuple[Any, ...], str]:
    """What tells a schema with its references from others; and the same as text, for its fingerprint."""
    identities = tuple(one.identity for one in references)
    return (text, identities), f"{text} {identities}" if references else text


def _writes_to_headers(schema_id_serializer: object, what: str) -> bool:
    """Whether a schema's id is written to a header.

    Raises:
        JobError: it isn't one of the two serializers of ids, or the extra isn't installed.
    """
    if schema_id_serializer is None:
        return False
    try:
        from confluent_kafka import schema_registry
    except ImportError as error:
        raise _not_installed(what, error) from error
    known = cast("Any", schema_registry)
    if schema_id_serializer is known.prefix_schema_id_serializer:
        return False
    if schema_id_serializer is known.header_schema_id_serializer:
        return True
    raise JobError(
        f"{what} got schema_id_serializer={bounded_repr(schema_id_serializer)}.",
        remedy="Give header_schema_id_serializer of confluent_kafka.schema_registry to write schemas' ids to "
        "headers, or leave it out: then they are in front of the data.",
    )


def _guid_in_front(registry: Registry) -> SchemaIdSerializer:
    """Writes what `header_schema_id_serializer` writes to a header in front of the data. It is put into the
    header when the record is written: what keeps bytes until then keeps both.
    """

    def serialize(data: bytes, _context: Any, schema_id: Any) -> bytes:
        if schema_id.guid is None:
            raise FormatUnusable(
                f"the schema registry {registry.url} gives no GUID for a schema, which is what is written to "
                "headers",
                remedy="Use a registry that does, or leave out schema_id_serializer= of the format: then ids "
                "are in front of the data.",
            )
        return schema_id.guid_to_bytes() + data

    return serialize


# --- values and objects -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Conversion:
    """Between a model's objects and what the serializers take. Without a model nothing is converted."""

    model: type[Any] | None

    @staticmethod
    def of(model: type[Any] | None, format_name: str) -> _Conversion:
        if model is not None and not is_model(model):
            raise JobError(
                f"model={bounded_repr(model)} of {format_name} is not a model.",
                remedy="Give a dataclass, a msgspec.Struct or a pydantic model (the class).",
            )
        if model is not None and not hasattr(model, "model_validate"):
            # What msgspec knows about a class has to be there before any thread converts (decision 0086).
            msgspec.json.Decoder(model)
        return _Conversion(model)

    @property
    def to_plain(self) -> Callable[[Any, Any], Any] | None:
        """For Avro, which has times, decimals and bytes of its own."""
        if self.model is None:
            return None
        if hasattr(self.model, "model_dump"):
            return lambda value, _context: value.model_dump(by_alias=True)
        return lambda value, _context: msgspec.to_builtins(value, builtin_types=_NATIVE)

    @property
    def to_json(self) -> Callable[[Any, Any], Any] | None:
        if self.model is None:
            return None
        if hasattr(self.model, "model_dump"):
            return lambda value, _context: value.model_dump(mode="json", by_alias=True)
        return lambda value, _context: msgspec.to_builtins(value)

    @property
    def from_plain(self) -> Callable[[Any, Any], Any] | None:
        return self._reader(builtin=_NATIVE)

    @property
    def from_json(self) -> Callable[[Any, Any], Any] | None:
        return self._reader(builtin=())

    def _reader(self, builtin: tuple[type, ...]) -> Callable[[Any, Any], Any] | None:
        model = self.model
        if model is None:
            return None
        if hasattr(model, "model_validate"):
            return lambda value, _context: cast("Any", model).model_validate(value)
        return lambda value, _context: msgspec.convert(value, model, builtin_types=builtin)

    def check(self, value: Any) -> None:
        if self.model is not None and type(value) is not self.model:
            raise TypeError(
                f"{bounded_repr(value)} is of type {type_of(value)}, but {self.model.__name__} is declared "
                "there"
            )


def _encoder(
    kind: RegistryFormat[Any],
    registry: Registry,
    serialize: Callable[..., Any],
    context: Any,
    subject: str,
) -> Callable[[Any], bytes]:
    check, call = kind.check_value, registry.call

    def encode(value: Any) -> bytes:
        if value is None:
            raise ModelError(
                "None is no value of a format with a schema registry; for a tombstone, let a handler yield "
                "Record(value=None)"
            )
        check(value)
        try:
            encoded: bytes = call(serialize, value, context, subject)
        except FormatUnusable:
            raise
        except UnknownSchemaError as error:
            if kind.auto_register:
                raise FormatUnusable(
                    f"the schema registry {registry.url} answers that it doesn't have the schema of "
                    f"{subject!r}, when that is to be registered: {error}",
                    remedy="Check schema.registry.url, and look for the reason in the registry's log.",
                ) from error
            raise FormatUnusable(
                f"the schema registry {registry.url} doesn't have the schema of {subject!r}, and the job may "
                f"not register it: {error}",
                remedy="Register it, or declare the format with auto_register=True.",
            ) from error
        except Exception as error:
            raise ModelError(f"it doesn't fit the schema of {subject!r}: {_described(error)}") from error
        return encoded

    return encode


def _decoder(
    kind: RegistryFormat[Any],
    registry: Registry,
    deserialize: Callable[..., Any],
    context: Any,
    subject: str,
) -> Callable[[bytes], Any]:
    call, name = registry.call, type(kind).__name__

    def decode(raw: bytes) -> Any:
        if len(raw) < _FRAME_BYTES or raw[0] not in _MAGIC:
            raise ModelError(
                f"it doesn't begin with the id of a schema (a zero byte, and 4 bytes), as {name} with a "
                f"schema registry does, but with {bounded_repr(raw[:_FRAME_BYTES])}; and the record has no "
                f"header '__{context.field}_schema_id'"
            )
        schema_id = _id_in(raw)
        try:
            return call(deserialize, raw, context, subject)
        except FormatUnusable:
            raise
        except UnknownReferenceError as error:
            raise ModelError(
                f"it was written with the schema {schema_id}, which refers to one that the registry "
                f"{registry.url} doesn't have: {error}"
            ) from error
        except UnknownSchemaError as error:
            raise ModelError(
                f"it was written with the schema {schema_id}, which the registry {registry.url} doesn't "
                f"have: {error}"
            ) from error
        except Exception as error:
            raise ModelError(
                f"it was written with the schema {schema_id}, and doesn't fit the one that the job declares: "
                f"{_described(error)}"
            ) from error

    return decode


def _id_in(raw: bytes) -> str:
    """The id, or the GUID, with which data begins."""
    if raw[0] == 0:
        return str(int.from_bytes(raw[1:_FRAME_BYTES], "big"))
    guid = raw[1 : 1 + _GUID_BYTES]
    return str(UUID(bytes=guid)) if len(guid) == _GUID_BYTES else guid.hex()


def _described(error: BaseException) -> str:
    """The error, with the place in the value, which the JSON serializers leave out."""
    path = getattr(error.__context__, "json_path", "$")
    return describe_exception(error) + ("" if path == "$" else f", at {path}")


def _id_of_padded(data: bytes, _context: Any, schema_id: Any) -> io.BytesIO:
    return schema_id.from_bytes(io.BytesIO(data[:-1]))


def _finishing(
    finish: Finish | None, from_plain: Callable[[Any, Any], Any] | None
) -> Callable[[Any, Any], Any] | None:
    """`from_plain`, behind the right defaults."""
    if finish is None:
        return from_plain
    if from_plain is None:
        return lambda value, _context: finish(value)
    return lambda value, context: from_plain(finish(value), context)


def _checking(schema: Any, to_plain: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    """`to_plain`, with a check: the serializer writes 1.7 as the int 1, and "false" as True."""
    from fastavro.validation import ValidationError, validate

    logical = set(_logical_types(schema))
    has_moments = logical & _MOMENTS and not logical & _LOCAL_TIMES

    def checked(value: Any, context: Any) -> Any:
        plain = value if to_plain is None else to_plain(value, context)
        try:
            validate(plain, schema)
        except ValidationError as error:
            errors: tuple[object, ...] = cast("Any", error).errors
            raise ValueError("; ".join(map(str, errors))) from error
        if has_moments:
            _check_zones(plain, "it")
        if "uuid" in logical:
            _check_readable(plain, schema)
        return plain

    return checked


def _check_zones(value: Any, path: str) -> None:
    """Raise ValueError for a time without a zone: fastavro takes it for one of this machine's zone."""
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"{path} is {value!r}, which has no time zone: give it one, such as UTC")
    elif isinstance(value, dict):
        for name, one in cast("dict[str, Any]", value).items():
            _check_zones(one, f"{path}[{name!r}]")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(cast("Sequence[Any]", value)):
            _check_zones(one, f"{path}[{number}]")


def _check_readable(value: Any, schema: Any) -> None:
    """Raise what fastavro raises for text that isn't a UUID, which it writes all the same."""
    import fastavro

    library, buffer = cast("Any", fastavro), io.BytesIO()
    library.schemaless_writer(buffer, schema, value)
    buffer.seek(0)
    library.schemaless_reader(buffer, schema, None)


# --- schemas ----------------------------------------------------------------------------------------------


def _not_installed(what: str, error: ImportError, kind: type[FclusterError] = JobError) -> FclusterError:
    return kind(
        f"{what} needs packages that aren't installed ({error.name or error}).", remedy=f"Run: {EXTRA}"
    )


def _avro_types(schema: Any) -> Iterator[str]:
    """The names of all types in an Avro schema."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, list):
        for one in cast("list[Any]", schema):
            yield from _avro_types(one)
    elif isinstance(schema, dict):
        parts = cast("dict[str, Any]", schema)
        for name in ("type", "items", "values"):
            if name in parts:
                yield from _avro_types(parts[name])
        for field in cast("list[Any]", parts.get("fields", [])):
            yield from _avro_types(field["type"])


def _logical_types(schema: Any) -> Iterator[str]:
    """The names of all logical types in an Avro schema."""
    if isinstance(schema, list):
        for one in cast("list[Any]", schema):
            yield from _logical_types(one)
    elif isinstance(schema, dict):
        parts = cast("dict[str, Any]", schema)
        if "logicalType" in parts:
            yield parts["logicalType"]
        for name in ("type", "items", "values"):
            yield from _logical_types(parts.get(name))
        for field in cast("list[Any]", parts.get("fields", [])):
            yield from _logical_types(field["type"])


def _ambiguous_fields(descriptor: Any, seen: frozenset[str]) -> Iterator[str]:
    """Fields of a message of which equal values may have different bytes."""
    for field in descriptor.fields:
        message = field.message_type
        is_map = message is not None and message.GetOptions().map_entry
        if is_map or field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
            yield field.name
        elif message is not None and message.full_name not in seen:
            yield from _ambiguous_fields(message, seen | {descriptor.full_name})


def _json_text(value: Any) -> str:
    return encode_json_key(value).decode()
