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
from fcluster.schema_registry.avro_values import compile_checks
from fcluster.schema_registry.defaults import Finish, compile_defaults
from fcluster.schema_registry.references import (
    BUILT_IN,
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
from fcluster.schema_registry.writers import (
    PROTOBUF,
    check_avro,
    check_message,
    frame_bytes,
    id_title,
    is_decimal,
    written_with,
)

_T = TypeVar("_T")

_FRAME_BYTES: Final = 5
"""A magic byte (0) and a schema's id. With a GUID, it is 1, and 16 bytes follow."""
_WITH_GUID: Final = b"\1"
_NATIVE: Final = (bytes, bytearray, datetime, date, time, Decimal, UUID)
"""What Avro's logical types have values of."""
_AMBIGUOUS: Final = ("map", "float", "double")
"""Avro types of which equal values may have different bytes."""
SchemaIdSerializer = Callable[[bytes, Any, Any], bytes]
"""The type of `header_schema_id_serializer` and `prefix_schema_id_serializer` in
confluent_kafka.schema_registry.
"""
SubjectNameStrategy = Callable[..., "str | None"]
"""The type of `topic_subject_name_strategy`, `record_subject_name_strategy` and
`topic_record_subject_name_strategy` there.
"""
_STRATEGIES: Final = (
    "topic_subject_name_strategy",
    "record_subject_name_strategy",
    "topic_record_subject_name_strategy",
)


def _unopened(_value: Any) -> NoReturn:
    raise AssertionError("a format of a schema registry is opened for a topic before it is used")


class RegistryFormat(Codec[_T]):
    """The common part of the formats. A job uses one of the classes below.

    Attributes:
        auto_register: whether the schema is registered when the first record is written.
        ids_in_headers: whether schemas' ids are written to headers.
        kind: what the registry calls the format.
        frame_title: what stands in front of data, for messages.
    """

    kind: str
    frame_title = "a zero byte, and 4 bytes"

    def __init__(
        self,
        name: str,
        identity: tuple[Any, ...],
        text: str,
        record_name: str | None,
        auto_register: bool,
        schema_id_serializer: SchemaIdSerializer | None,
        subject_name_strategy: SubjectNameStrategy | None,
        normalize_schemas: bool,
    ) -> None:
        super().__init__(name, _unopened, _unopened, self._open)
        title = type(self).__name__
        self.ids_in_headers = _writes_to_headers(schema_id_serializer, title)
        self._strategy_name = _strategy_name(subject_name_strategy, title, record_name)
        self._record_name = record_name
        self._normalize_schemas = normalize_schemas
        self._identity: tuple[Any, ...] = (
            title,
            auto_register,
            self.ids_in_headers,
            self._strategy_name,
            normalize_schemas,
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

    def id_bytes(self, found: bytes) -> int:
        """See `Codec`."""
        return frame_bytes(self.kind, found)

    def header_bytes(self, raw: bytes) -> int:
        """See `Codec`: the GUID. An id stays in front of the data, where all readers find it."""
        return frame_bytes(self.kind, raw) if self.ids_in_headers and raw[:1] == _WITH_GUID else 0

    def notes_on(self, use: CodecUse, *, reads: bool, writes: bool) -> Iterable[CodecNote]:
        """See `Codec`."""
        try:
            registry = registry_for(use, is_patient=False)
            return list(
                standing_of(
                    registry,
                    self._subject_of(use),
                    self.kind,
                    lambda: self.schema(registry),
                    lambda schema: self.why_unreadable(registry, schema),
                    reads=reads,
                    writes=writes,
                    auto_register=self.auto_register,
                    needs_guids=self.ids_in_headers,
                    normalize=self._normalize_schemas,
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

    def check_writer(self, schema: Any, texts: Mapping[str, str], frame: bytes) -> None:
        """Raise ModelError for a schema with which other values are written, which would be read wrongly.

        Args:
            schema: as confluent-kafka's client gives it.
            texts: those to which it refers, by name.
            frame: what stands in front of such data.
        """

    def _open(self, use: CodecUse) -> Codec[_T]:
        try:
            from confluent_kafka.serialization import SerializationContext

            registry = registry_for(use)
            serialize, deserialize = self.make(registry)
        except ImportError as error:
            raise _not_installed(type(self).__name__, error, FormatUnusable) from error
        context = SerializationContext(use.name, cast("Any", use.part))
        subject = self._subject_of(use)
        return Codec(
            self.name,
            _encoder(self, registry, serialize, context, subject),
            _decoder(self, registry, deserialize, context, subject),
        )

    @property
    def asks_under_topic(self) -> bool:
        """Whether the deserializer asks for schemas under the topic's subject. Otherwise: under none."""
        return self._strategy_name == _STRATEGIES[0]

    def _subject_of(self, use: CodecUse) -> str:
        """Under which the job's own schema is registered."""
        if self.asks_under_topic:
            return f"{use.name}-{use.part}"
        record_name = cast("str", self._record_name)
        return record_name if self._strategy_name == _STRATEGIES[1] else f"{use.name}-{record_name}"

    def _conf(self) -> dict[str, Any]:
        from confluent_kafka import schema_registry

        # Never the default: that asks the registry which subject a topic is associated with. Not every
        # registry knows that.
        return {"subject.name.strategy": getattr(schema_registry, self._strategy_name)}

    def _writing_conf(self, registry: Registry) -> dict[str, Any]:
        conf = {
            **self._conf(),
            "auto.register.schemas": self.auto_register,
            "normalize.schemas": self._normalize_schemas,
        }
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
                normalize=self._normalize_schemas,
            ),
            deserializer(
                DeclaredClient(registry.client, self.kind, references),
                declared_schema(self._text, self.kind, references),
            ),
        )

    def schema(self, registry: Registry) -> Any:
        """See `RegistryFormat`."""
        found = registered_references(
            registry, self.kind, self._references, register=False, normalize=self._normalize_schemas
        )
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
        subject_name_strategy: confluent-kafka's `record_subject_name_strategy` or
            `topic_record_subject_name_strategy` registers the schema under its name, or under that behind
            the topic's. Default: `topic_subject_name_strategy`, under TOPIC-value or TOPIC-key.
        normalize_schemas: whether the registry compares schemas in their normal form.
        return_record_name: whether records in unions are read as tuples of their full name and a dict, as
            they can be written. Otherwise nothing says which of several like ones a dict was.

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
        subject_name_strategy: SubjectNameStrategy | None = None,
        normalize_schemas: bool = False,
        return_record_name: bool = False,
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
        if is_decimal(parsed):
            raise JobError(
                "The Avro schema is a decimal, which confluent-kafka can't write as a whole key or value.",
                remedy="Put it into a field of a record.",
            )
        self._convert = _Conversion.of(model, "Avro")
        self._text = json.dumps(parsed)
        identity, text = _with_references(self._text, self._references)
        self._returns_names = return_record_name
        if return_record_name and model is not None:
            raise JobError(
                "Avro got model= and return_record_name=True: a model has no place for the names.",
                remedy="Leave one of the two out.",
            )
        super().__init__(
            "avro",
            (*identity, model, return_record_name),
            text,
            _name_in(self._checked, "name"),
            auto_register,
            schema_id_serializer,
            subject_name_strategy,
            normalize_schemas,
        )

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
            names = self._returns_names
            usual = library.AvroDeserializer(knowing, schema, read, names, conf=self._conf())
            # It refuses data of which nothing follows the id: a record without fields, or empty bytes.
            conf = {**self._conf(), "schema.id.deserializer": _id_of_padded}
            of_nothing = library.AvroDeserializer(knowing, schema, read, names, conf=conf)

            def deserialize(raw: bytes, context: Any) -> Any:
                return usual(raw, context) if len(raw) > _FRAME_BYTES else of_nothing(raw + b"\0", context)

            return deserialize

        return self._pair(
            registry, lambda schema: library.AvroSerializer(client, schema, check, conf), deserializer
        )

    def check_value(self, value: Any) -> None:
        """See `RegistryFormat`."""
        self._convert.check(value)

    def check_writer(self, schema: Any, texts: Mapping[str, str], frame: bytes) -> None:  # noqa: ARG002  for formats that need it
        """See `RegistryFormat`."""
        check_avro(schema, texts, self._checked)

    def why_unreadable(self, registry: Registry, schema: Any) -> str | None:
        """See `RegistryFormat`."""
        try:
            texts = texts_of_writer(registry, schema)
        except UnknownSchemaError as error:
            return f"it refers to a schema that the registry doesn't have: {error}"
        except ModelError as error:
            return str(error)
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
        subject_name_strategy: as in `Avro`. The name is the schema's `title`.
        normalize_schemas: as in `Avro`.

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
        subject_name_strategy: SubjectNameStrategy | None = None,
        normalize_schemas: bool = False,
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
        super().__init__(
            "json-schema",
            (*identity, model),
            text,
            _name_in(parsed, "title"),
            auto_register,
            schema_id_serializer,
            subject_name_strategy,
            normalize_schemas,
        )

    def check_key(self, topic: str) -> None:
        """See `RegistryFormat`. Keys are written with sorted names."""

    def make(self, registry: Registry) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import json_schema

        to_plain, from_plain = self._convert.to_json, self._convert.from_json
        library, client = cast("Any", json_schema), registry.client
        write, read = self._pair(
            registry,
            lambda schema: library.JSONSerializer(
                schema, client, to_plain, self._writing_conf(registry), json_encode=_json_text
            ),
            lambda knowing, schema: library.JSONDeserializer(
                schema, from_plain, knowing, self._conf(), json_decode=decode_json
            ),
        )
        return _resolving(write), _resolving(read)

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
        subject_name_strategy: as in `Avro`. The name is the message's, with its package.
        normalize_schemas: as in `Avro`.

    Raises:
        JobError: it isn't a class of messages, or the extra `schema-registry` isn't installed.
    """

    kind = PROTOBUF
    frame_title = "a zero byte, 4 bytes, and the place of the message in its file"

    def __init__(
        self,
        message: type[_T],
        *,
        auto_register: bool = True,
        schema_id_serializer: SchemaIdSerializer | None = None,
        subject_name_strategy: SubjectNameStrategy | None = None,
        normalize_schemas: bool = False,
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
        text = " ".join(str(file.serialized_pb) for file in _files(self._descriptor.file))
        identity = f"{self._descriptor.full_name} {text}"
        super().__init__(
            "protobuf",
            (message,),
            identity,
            self._descriptor.full_name,
            auto_register,
            schema_id_serializer,
            subject_name_strategy,
            normalize_schemas,
        )

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
        read: Callable[..., Any] = library.ProtobufDeserializer(self._message, self._conf(), client)

        def deserialize(raw: bytes, context: Any) -> Any:
            try:
                message = read(raw, context)
            except TypeError as error:  # no descriptors can be made of the writer's schema
                raise ModelError(f"that can't be read ({error})") from error
            if not message.IsInitialized():  # it is no error to Protobuf until it is written
                raise ModelError(f"it lacks {', '.join(message.FindInitializationErrors())}")
            return message

        return library.ProtobufSerializer(self._message, client, self._writing_conf(registry)), deserialize

    def check_value(self, value: Any) -> None:
        """See `RegistryFormat`."""
        if isinstance(value, self._message):
            return
        name, declared = type_of(value), self._message.__name__
        also = ", another class of that name" if name == declared else ""
        raise TypeError(f"{bounded_repr(value)} is of type {name}, but {declared}{also} is declared there")

    def check_writer(self, schema: Any, texts: Mapping[str, str], frame: bytes) -> None:  # noqa: ARG002  for formats that need them
        """See `RegistryFormat`."""
        check_message(schema, frame, self._descriptor)

    def schema(self, registry: Registry) -> Any:
        """See `RegistryFormat`."""
        from confluent_kafka.schema_registry import protobuf

        file = self._descriptor.file
        conf = {**self._writing_conf(registry), "auto.register.schemas": False}
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


def _strategy_name(strategy: object, what: str, record_name: str | None) -> str:
    """The name of a strategy in confluent-kafka.

    Raises:
        JobError: it is another one, or the schema has no name for it. Or the extra isn't installed.
    """
    if strategy is None:
        return _STRATEGIES[0]
    try:
        from confluent_kafka import schema_registry
    except ImportError as error:
        raise _not_installed(what, error) from error
    found = next((name for name in _STRATEGIES if getattr(schema_registry, name) is strategy), None)
    if found is None:
        raise JobError(
            f"{what} got subject_name_strategy={bounded_repr(strategy)}.",
            remedy=f"Give one of confluent_kafka.schema_registry: {', '.join(_STRATEGIES)}.",
        )
    if found != _STRATEGIES[0] and not record_name:
        raise JobError(
            f"{what} got {found}, and its schema has no name, under which it could be registered.",
            remedy="Name it: a record of Avro by its name, a JSON schema by its title.",
        )
    return found


def _name_in(schema: Any, keyword: str) -> str | None:
    found = cast("dict[str, Any]", schema).get(keyword) if isinstance(schema, dict) else None
    return found if isinstance(found, str) else None


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
            try:
                msgspec.json.Decoder(model)
            except TypeError as error:  # what msgspec can't tell apart, for example
                raise JobError(
                    f"model={model.__name__} of {format_name} can't be used: {describe_exception(error)}.",
                    remedy="Correct the type of that field, or leave model= out: then values are dicts.",
                ) from error
        return _Conversion(model)

    @property
    def to_plain(self) -> Callable[[Any, Any], Any] | None:
        """For Avro, which has times, decimals and bytes of its own."""
        if self.model is None:
            return None
        if hasattr(self.model, "model_dump"):
            # The dump still has enums.
            return lambda value, _context: msgspec.to_builtins(
                value.model_dump(by_alias=True), builtin_types=_NATIVE
            )
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
    known: set[bytes] = set()
    """What stands in front of data that can be read."""
    asked_under = subject if kind.asks_under_topic else None

    def decode(raw: bytes) -> Any:
        size = frame_bytes(kind.kind, raw)
        if not size:
            raise ModelError(
                f"it doesn't begin with the id of a schema ({kind.frame_title}), as {name} with a schema "
                f"registry does, but with {bounded_repr(raw[:_FRAME_BYTES])}; and no header "
                f"'__{context.field}_schema_id' of the record has one"
            )
        frame = raw[:size]
        schema_id = id_title(frame)
        try:
            if frame not in known:
                kind.check_writer(*written_with(registry, kind.kind, frame, asked_under), frame)
                known.add(frame)
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
            why = str(error) if isinstance(error, ModelError) else _described(error)
            raise ModelError(
                f"it was written with the schema {schema_id}, and doesn't fit the one that the job declares: "
                f"{why}"
            ) from error

    return decode


def _described(error: BaseException) -> str:
    """The error, with the place in the value, which the JSON serializers leave out."""
    found: Any = error.__context__
    if not hasattr(found, "json_path"):
        return describe_exception(error)
    from jsonschema import exceptions

    closest: Any = cast("Any", exceptions).best_match([found])
    also = "" if closest is found else f"; what comes closest: {closest.message}"
    return (
        describe_exception(error) + also + ("" if closest.json_path == "$" else f", at {closest.json_path}")
    )


def _resolving(function: Callable[..., Any]) -> Callable[..., Any]:
    """A serializer or deserializer of JSON. If the job's schema refers to nothing, no value is to blame."""
    from referencing.exceptions import Unresolvable

    def resolve(argument: Any, context: Any) -> Any:
        try:
            return function(argument, context)
        except Unresolvable as error:
            raise FormatUnusable(
                f"the JSON schema of '{context.topic}-{context.field}' refers to what can't be found: "
                f"{describe_exception(error)}",
                remedy="Correct the $ref, or declare the schema: references=[Reference(...)].",
            ) from error

    return resolve


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

    check = compile_checks(schema)

    def checked(value: Any, context: Any) -> Any:
        plain = value if to_plain is None else to_plain(value, context)
        if check is not None:
            plain = check(plain, "it")
        try:
            validate(plain, schema)
        except ValidationError as error:
            errors: tuple[object, ...] = cast("Any", error).errors
            raise ValueError("; ".join(map(str, errors))) from error
        return plain

    return checked


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


def _files(file: Any) -> Iterator[Any]:
    """The file of a message and those that it imports: with another one of these, it has another id."""
    yield file
    for one in file.dependencies:
        if not one.name.startswith(BUILT_IN):
            yield from _files(one)


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
