"""Schemas to which other schemas refer, and which a registry has under subjects of their own.

Responsible for: what a job declares of them, registering them in front of the schema that refers to them, and
resolving names. Invariant: declaring and reading need none of the declared schemas in the registry; they are
looked for, or registered, when the first record is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urljoin

from fcluster.common.errors import FormatUnusable, JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.codecs import ModelError
from fcluster.schema_registry.registry import Registry, UnknownSchemaError
from fcluster.schema_registry.texts import bad_schema, parsed_schema

_LOCAL: Final = "\0"
"""Begins the subjects of declared schemas for `DeclaredClient`. No subject of a registry does."""
BUILT_IN: Final = ("google/protobuf/", "google/type/", "confluent/")
"""Protobuf files that aren't looked for in a registry: all programs have them."""
_FETCHED: Final = ("http://", "https://")


class Reference:
    """A schema of another subject, to which a schema refers.

    Example::

        address = Reference("shop.Address", Path("address.avsc"), subject="addresses-value")
        orders = job.topic("orders", value=Avro(Path("order.avsc"), references=[address]))

    Attributes:
        name: what the schemas call it that refer to it. Avro: the full name of the type. JSON Schema: what
            stands in `$ref`, without `#` and what follows.
        schema: the schema, as JSON text, as a dict, or as the path of a file with it.
        subject: the subject under which it is registered. Default: its name.
        references: the schemas to which it refers itself.

    Raises:
        JobError: the schema isn't JSON, or another argument is wrong.
    """

    def __init__(
        self,
        name: str,
        schema: str | Path | Mapping[str, Any],
        *,
        subject: str | None = None,
        references: Sequence[Reference] = (),
    ) -> None:
        for what, text in (("name", name), ("subject", name if subject is None else subject)):
            if not isinstance(text, str) or not text:  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
                raise JobError(
                    f"Reference got {bounded_repr(text)} as its {what}.",
                    remedy="Give the name that the schemas use which refer to it, and the subject as text.",
                )
        self.name = name
        self.subject = subject or name
        self.parsed = parsed_schema(schema, repr(name))
        self.text = json.dumps(self.parsed)
        self.references = checked_references(references, f"Reference({name!r})")

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is equal for equal references."""
        return (self.name, self.subject, self.text, *(one.identity for one in self.references))


def checked_references(references: object, what: str) -> tuple[Reference, ...]:
    """The argument `references=`, for `what`.

    Raises:
        JobError: it isn't a list of references.
    """
    if isinstance(references, list | tuple):
        given = cast("Sequence[object]", references)
        found = tuple(one for one in given if isinstance(one, Reference))
        if len(found) == len(given):
            return found
    raise JobError(
        f"{what} got references={bounded_repr(cast('object', references))}.",
        remedy="Give a list: references=[Reference('shop.Address', Path('address.avsc'))].",
    )


def all_references(references: Sequence[Reference]) -> dict[str, Reference]:
    """The references and those to which they refer, by name, the inner ones first.

    Raises:
        JobError: two different ones have the same name.
    """
    found: dict[str, Reference] = {}
    for one in _walk(references):
        known = found.setdefault(one.name, one)
        if known.identity != one.identity:
            raise JobError(
                f"There are two different references with the name {one.name!r}.",
                remedy="Declare it once, and give that to all schemas that refer to it.",
            )
    return found


def _walk(references: Sequence[Reference]) -> Iterator[Reference]:
    for one in references:
        yield from _walk(one.references)
        yield one


# --- names ------------------------------------------------------------------------------------------------


def avro_schema(schema: Any, texts: Mapping[str, str]) -> Any:
    """An Avro schema, parsed by fastavro, with the named types of other schemas in it.

    Args:
        schema: the schema, as JSON holds it.
        texts: the other schemas, by name.

    Raises:
        What fastavro raises.
    """
    from fastavro.repository.base import AbstractSchemaRepository, SchemaRepositoryError
    from fastavro.schema import load_schema

    found = {"": json.dumps(schema)}
    for name, text in texts.items():
        found |= {name: text, _full_name(json.loads(text), name): text}

    class Texts(AbstractSchemaRepository):
        def load(self, name: str) -> Any:
            if name not in found:
                raise SchemaRepositoryError(name)
            return json.loads(found[name])

    return load_schema("", repo=Texts())


def _full_name(schema: Any, name: str) -> str:
    if not isinstance(schema, dict) or "name" not in schema:
        return name
    parts = cast("dict[str, Any]", schema)
    space = parts.get("namespace")
    return f"{space}.{parts['name']}" if space and "." not in parts["name"] else parts["name"]


def checked_avro(schema: Any, references: Sequence[Reference], what: str) -> Any:
    """See `avro_schema`, for what a job declares.

    Raises:
        JobError: a schema isn't valid, or a name in it isn't declared.
    """
    from fastavro import schema as library

    texts = {name: one.text for name, one in all_references(references).items()}
    for one in references:
        checked_avro(one.parsed, one.references, f"Avro schema {one.name!r}")
    try:
        return avro_schema(schema, texts)
    except library.UnknownType as error:
        name: object = cast("Any", error).name
        if not isinstance(name, str):
            raise bad_schema(what, error) from error
        raise JobError(
            f"The {what} has the type {name!r}, which neither Avro nor the schema itself knows.",
            remedy=f"Correct it. If it is the schema of another subject, declare that: "
            f"references=[Reference({name!r}, Path(...))].",
        ) from error
    except Exception as error:  # what fastavro raises
        raise bad_schema(what, error) from error


def check_json_references(schema: Any, references: Sequence[Reference], what: str, base: str = "") -> None:
    """Check that what a JSON Schema refers to is declared, so that a misspelt name isn't the fault of each
    record.

    Args:
        base: the URI of the schema.

    Raises:
        JobError: it isn't.
    """
    for one in references:
        check_json_references(one.parsed, one.references, f"JSON schema {one.name!r}", one.name)
    own = cast("dict[str, Any]", schema).get("$id") if isinstance(schema, dict) else None
    base = urljoin(base, own) if isinstance(own, str) else base
    known = {"", base, *all_references(references), *(urljoin(base, one) for one in _texts_of(schema, "$id"))}
    names = [one.name for one in references]
    for said in _texts_of(schema, "$ref"):
        uri = urljoin(base, said).partition("#")[0]
        name = said.partition("#")[0]
        if uri in known or (uri.startswith(_FETCHED) and name not in names):
            continue
        means = f" (which means {uri!r} there)" if uri != name else ""
        raise JobError(
            f"The {what} refers to {name!r}{means}, which isn't declared.",
            remedy=f"Correct it, or declare the schema: references=[Reference({uri!r}, Path(...))].",
        )


def _texts_of(schema: Any, keyword: str) -> Iterator[str]:
    """What a keyword of a JSON Schema says, at all places."""
    if isinstance(schema, list):
        for one in cast("list[Any]", schema):
            yield from _texts_of(one, keyword)
    elif isinstance(schema, dict):
        for name, one in cast("dict[str, Any]", schema).items():
            if name == keyword and isinstance(one, str):
                yield one
            elif name not in ("const", "enum", "default", "examples"):
                yield from _texts_of(one, keyword)


# --- in the registry --------------------------------------------------------------------------------------


class DeclaredClient:
    """A client of the registry that also knows the declared references, for reading.

    Args:
        client: the client.
        kind: the type of the schemas.
        references: what is declared.
    """

    def __init__(self, client: Any, kind: str, references: Sequence[Reference]) -> None:
        self._client = client
        self._schemas = {
            _LOCAL + name: declared_schema(one.text, kind, one.references)
            for name, one in all_references(references).items()
        }

    def get_version(self, subject: str, version: int, *options: Any, **named: Any) -> Any:
        """See confluent-kafka's client."""
        from confluent_kafka.schema_registry import RegisteredSchema

        schema = self._schemas.get(subject)
        if schema is not None:
            return RegisteredSchema(subject, version, None, None, schema)
        return self._client.get_version(subject, version, *options, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def declared_schema(text: str, kind: str, references: Sequence[Reference]) -> Any:
    """A schema whose references a `DeclaredClient` knows."""
    from confluent_kafka.schema_registry import Schema, SchemaReference

    return Schema(text, kind, [SchemaReference(one.name, _LOCAL + one.name, 1) for one in references])


def registered_references(
    registry: Registry, kind: str, references: Sequence[Reference], *, register: bool, normalize: bool
) -> list[Any]:
    """The references as a registered schema has them, with their versions.

    Args:
        registry: the registry.
        kind: the type of the schemas.
        references: what is declared.
        register: whether they are registered if they aren't.
        normalize: whether the registry compares them in their normal form.

    Raises:
        UnknownSchemaError: one isn't registered.
        FormatUnusable: the registry can't be asked, or refuses one.
    """
    from confluent_kafka.schema_registry import Schema, SchemaReference

    found: list[Any] = []
    for one in references:
        inner = registered_references(registry, kind, one.references, register=register, normalize=normalize)
        asked = (one.subject, Schema(one.text, kind, inner), normalize)
        if register:
            registry.ask("register_schema_full_response", *asked, subject=one.subject)
        try:
            version = registry.ask("lookup_schema", *asked, subject=one.subject).version
        except UnknownSchemaError as error:
            raise UnknownSchemaError(
                f"the schema {one.name!r} isn't registered under {one.subject!r}"
            ) from error
        found.append(SchemaReference(one.name, one.subject, version))
    return found


def serializer_with_references(
    registry: Registry,
    kind: str,
    references: Sequence[Reference],
    make: Callable[[list[Any]], Callable[..., Any]],
    *,
    register: bool,
    normalize: bool,
) -> Callable[[Any, Any], bytes]:
    """A serializer that is made when the first record is written, because it needs the references' versions.

    Args:
        registry, kind, references, register, normalize: see `registered_references`.
        make: makes confluent-kafka's serializer with the references.
    """
    made: list[Callable[..., Any]] = []

    def serialize(value: Any, context: Any) -> bytes:
        if not made:
            try:
                found = registered_references(
                    registry, kind, references, register=register, normalize=normalize
                )
            except UnknownSchemaError as error:
                raise FormatUnusable(
                    f"the schema of '{context.topic}-{context.field}' refers to one that the schema registry "
                    f"{registry.url} doesn't have: {error}",
                    remedy="Register it, or declare the format with auto_register=True.",
                ) from error
            made.append(make(found))
        return made[0](value, context)

    return serialize


def texts_of_writer(
    registry: Registry,
    schema: Any,
    form: str | None = None,
    above: frozenset[tuple[str, int]] = frozenset(),
) -> dict[str, str]:
    """The texts of all schemas to which a registered one refers, by name.

    Args:
        registry: the registry.
        schema: as confluent-kafka's client gives it.
        form: in which the texts are.
        above: the schemas, as subject and version, that refer to this one.

    Raises:
        ModelError: one refers to itself.
        UnknownSchemaError: the registry doesn't have one of them.
        FormatUnusable: it can't be asked.
    """
    found: dict[str, str] = {}
    for one in schema.references or ():
        if one.name.startswith(BUILT_IN):
            continue
        place = (one.subject, one.version)
        if place in above:
            raise ModelError(f"it refers to version {one.version} of {one.subject!r}, which refers to itself")
        inner = registry.ask("get_version", *place, True, form, subject=one.subject).schema
        found |= texts_of_writer(registry, inner, form, above | {place})
        found[one.name] = inner.schema_str
    return found
