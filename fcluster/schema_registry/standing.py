"""What a registry says about the schema of a topic before the job starts: for `fcluster check`.

Responsible for: asking without changing anything, and one line for each thing that is known. A registry that
doesn't answer is an error that is raised; everything else is a note about one subject.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

from fcluster.common.failures import describe_exception
from fcluster.graph.codecs import CodecNote
from fcluster.schema_registry.references import avro_schema
from fcluster.schema_registry.registry import Registry, UnknownSchemaError

VERSIONS_MAX: Final = 20
"""How many versions of a subject are looked at, from the newest one."""
SAMPLES: Final = 20
"""How many values of a schema are made to find out whether they can be read with another one."""

WhyUnreadable = Callable[[Any], str | None]
"""Why values of a registered schema can't be read. Empty: they can. None: it isn't known."""


def standing_of(
    registry: Registry,
    subject: str,
    kind: str,
    schema_of: Callable[[], Any],
    why_unreadable: WhyUnreadable,
    *,
    reads: bool,
    writes: bool,
    auto_register: bool,
    needs_guids: bool,
    normalize: bool,
) -> Iterator[CodecNote]:
    """What is known about a topic's schema.

    Args:
        registry: the registry.
        subject: under which the job's schema is registered.
        kind: the type of the job's schema.
        schema_of: gives the job's schema, as confluent-kafka's client takes it. Raises UnknownSchemaError if
            the registry doesn't have a schema to which that refers.
        why_unreadable: whether other schemas can be read.
        reads, writes: what the job does with the topic.
        auto_register: whether the job registers its schema.
        needs_guids: whether the job writes schemas' GUIDs to headers.
        normalize: whether the registry compares schemas in their normal form.

    Raises:
        FormatUnusable: the registry can't be asked.
    """
    try:
        versions = list(registry.ask("get_versions", subject, subject=subject))
    except UnknownSchemaError:
        versions = []
    yield CodecNote("ok", f"the schema registry {registry.url} answers")
    if not versions:
        yield _nothing_registered(subject, writes, auto_register)
        return
    newest_first = sorted(versions, reverse=True)[:VERSIONS_MAX]
    found = {
        version: registry.ask("get_version", subject, version, subject=subject) for version in newest_first
    }
    texts = {version: one.schema for version, one in found.items()}
    newest = texts[newest_first[0]]
    if writes and needs_guids and found[newest_first[0]].guid is None:
        yield CodecNote(
            "error",
            f"the registry has no GUID for the newest version of {subject!r}, and the job writes that to "
            "headers",
            "Use a registry that has them, or leave out schema_id_serializer= of the format.",
        )
    # A registry leaves the type out if it is Avro.
    registered = newest.schema_type or "AVRO"
    if registered != kind:
        yield CodecNote(
            "error",
            f"{subject!r} has schemas of the type {registered}, and the job declares {kind}",
            "Declare the format in which the records are.",
        )
        return
    try:
        schema = schema_of()
    except UnknownSchemaError as error:
        schema = known = None
        if writes:
            yield _reference_missing(subject, str(error), auto_register)
    else:
        known = _version_of(registry, subject, schema, normalize)
        if writes:
            yield _writing(registry, subject, schema, known, auto_register)
    if reads:
        yield _reading(registry, subject, schema, known, texts, why_unreadable)


def _reference_missing(subject: str, what: str, auto_register: bool) -> CodecNote:
    said = f"the job's schema for {subject!r} refers to others, of which one isn't there: {what}"
    if auto_register:
        return CodecNote("note", f"{said}; the job registers it with the first record")
    return CodecNote(
        "error",
        f"{said}, and the job doesn't do it (auto_register=False)",
        "Register it, or leave auto_register=False out.",
    )


def _nothing_registered(subject: str, writes: bool, auto_register: bool) -> CodecNote:
    what = f"nothing is registered under {subject!r} yet"
    if not writes:
        return CodecNote(
            "note",
            f"{what}; records can be read all the same if their producers register schemas elsewhere",
        )
    if auto_register:
        return CodecNote("note", f"{what}; the job registers its schema with the first record")
    return CodecNote(
        "error",
        f"{what}, and the job doesn't do it (auto_register=False)",
        "Register the schema, or leave auto_register=False out.",
    )


def _version_of(registry: Registry, subject: str, schema: Any, normalize: bool) -> int | None:
    """The version under which the schema is registered."""
    try:
        return registry.ask("lookup_schema", subject, schema, normalize, subject=subject).version
    except UnknownSchemaError:
        return None


def _writing(
    registry: Registry, subject: str, schema: Any, known: int | None, auto_register: bool
) -> CodecNote:
    if known is not None:
        return CodecNote("ok", f"the job's schema is version {known} of {subject!r}")
    if not auto_register:
        return CodecNote(
            "error",
            f"the job's schema isn't one of those that are registered under {subject!r}, and the job doesn't "
            "register it (auto_register=False)",
            "Register it, or declare one of those that are registered.",
        )
    if registry.ask("test_compatibility", subject, schema, subject=subject):
        return CodecNote(
            "note", f"the job will register its schema under {subject!r}; it goes with those that are there"
        )
    return CodecNote(
        "error",
        f"the registry will refuse the job's schema for {subject!r}, because it doesn't go with those that "
        "are registered",
        "Give new fields a default, and keep those that readers need; or change the compatibility level of "
        "the subject in the registry.",
    )


def _reading(
    registry: Registry,
    subject: str,
    schema: Any,
    known: int | None,
    older: dict[int, Any],
    why_unreadable: WhyUnreadable,
) -> CodecNote:
    newest, is_known = max(older), True
    for version, written in older.items():
        why = "" if version == known else why_unreadable(written)
        is_known = is_known and why is not None
        if why:
            return CodecNote(
                "error" if version == newest else "warning",
                f"records with version {version} of {subject!r} can't be read with the job's schema: {why}",
                "Give fields that only the job's schema has a default, and keep their types; or declare the "
                "registered schema.",
            )
    if is_known:
        return CodecNote("ok", f"the job can read {_versions(len(older))} of {subject!r}")
    if schema is None:
        return CodecNote(
            "note",
            f"whether the job can read {subject!r} isn't known, because of what its schema refers to",
        )
    if known == newest or registry.ask("test_compatibility", subject, schema, subject=subject):
        return CodecNote("ok", f"the job's schema goes with the newest one of {subject!r}")
    return CodecNote(
        "warning",
        f"the registry says that the job's schema doesn't go with the newest one of {subject!r}, so records "
        "may not be valid under it",
        "Declare the registered schema, or give the topic an on_error.",
    )


def why_avro_is_unreadable(reader: Any, writer: str, texts: Mapping[str, str]) -> str | None:
    """Whether values of an Avro schema can be read with another one: some are made, and read. See
    `WhyUnreadable`.

    Args:
        reader: the schema to read with, parsed by fastavro.
        writer: the other one, as text.
        texts: the schemas to which that refers, by name.
    """
    import fastavro
    from fastavro.utils import generate_many

    library = cast("Any", fastavro)
    try:
        parsed = avro_schema(json.loads(writer), texts)
        samples = list(generate_many(parsed, SAMPLES))
    except Exception:  # noqa: BLE001  fastavro can't make values of it
        return None
    for sample in samples:
        buffer = io.BytesIO()
        try:
            library.schemaless_writer(buffer, parsed, sample)
        except Exception:  # noqa: BLE001
            return None
        buffer.seek(0)
        try:
            library.schemaless_reader(buffer, parsed, reader)
        except Exception as error:  # noqa: BLE001  what fastavro raises
            return describe_exception(error)
    return ""


def _versions(count: int) -> str:
    return "1 version" if count == 1 else f"{count} versions"
