"""What `fcluster check` says about the schemas of a job's topics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import (
    RegisteredSchema,
    Schema,
    SchemaRegistryError,
    header_schema_id_serializer,
)

from fcluster import CodecUse, Job
from fcluster.cli import check
from fcluster.common.errors import FormatUnusable
from fcluster.common.settings import Settings
from fcluster.graph.codecs import CodecNote
from fcluster.schema_registry import Avro, JsonSchema, formats, registry
from fcluster.schema_registry.registry import Registry
from tests.unit.schema_registry.stub import StubRegistry

USE = CodecUse("payments", "value", MappingProxyType({}))
SUBJECT = "payments-value"
FIELDS = [{"name": "account", "type": "string"}, {"name": "cents", "type": "long"}]
STATUS = {"name": "status", "type": ["null", "string"], "default": None}


def avro(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": "Payment", "fields": list(fields)}


def json_schema(*required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required)}


class FakeClient:
    """A registry's client, with the schemas of one subject, oldest first."""

    def __init__(self, kind: str, schemas: Sequence[Any], *, is_compatible: bool = True) -> None:
        self.registered = [
            RegisteredSchema(SUBJECT, number, 100 + number, None, Schema(json.dumps(schema), kind))
            for number, schema in enumerate(schemas, start=1)
        ]
        self.is_compatible = is_compatible

    def get_versions(self, subject: str) -> list[int]:
        if not self.registered:
            raise SchemaRegistryError(404, 40401, f"Subject '{subject}' not found.")
        return [one.version or 0 for one in self.registered]

    def get_version(self, _subject: str, version: int) -> RegisteredSchema:
        return self.registered[version - 1]

    def lookup_schema(self, _subject: str, schema: Schema, _normalize: bool) -> RegisteredSchema:
        for one in self.registered:
            if json.loads(one.schema.schema_str or "") == json.loads(schema.schema_str or ""):
                return one
        raise SchemaRegistryError(404, 40403, "Schema not found")

    def test_compatibility(self, *_subject_and_schema: Any) -> bool:
        return self.is_compatible

    def unused(self, *_arguments: Any) -> Any:
        raise AssertionError("checking changes nothing")

    get_schema = get_schema_by_guid = register_schema_full_response = unused


def notes(
    monkeypatch: pytest.MonkeyPatch,
    declared: Any,
    client: FakeClient,
    *,
    reads: bool = True,
    writes: bool = False,
) -> list[CodecNote]:
    """What is said after the line that the registry answers."""
    found = Registry(client, "http://registry")
    monkeypatch.setattr(formats, "registry_for", lambda _use, is_patient: found)
    first, *others = declared.notes_on(USE, reads=reads, writes=writes)
    assert first == CodecNote("ok", "the schema registry http://registry answers")
    return others


def test_versions_that_can_be_read_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient("AVRO", [avro(*FIELDS), avro(*FIELDS, STATUS), avro(FIELDS[0], FIELDS[1])])
    assert notes(monkeypatch, Avro(avro(*FIELDS, STATUS)), client) == [
        CodecNote("ok", "the job can read 3 versions of 'payments-value'")
    ]


def test_newest_version_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient("AVRO", [avro(*FIELDS), avro(FIELDS[0])])
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS)), client)
    assert note.level == "error"
    assert note.message.startswith("records with version 2 of 'payments-value'")
    assert "can't be read with the job's schema: " in note.message
    assert "cents" in note.message
    assert "a default" in note.remedy


def test_older_version_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient("AVRO", [avro(FIELDS[0]), avro(*FIELDS)])
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS)), client)
    assert note.level == "warning"
    assert "version 1 of 'payments-value'" in note.message


def test_registry_without_guids_is_named_if_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient("AVRO", [avro(*FIELDS)])
    kind: Avro[Any] = Avro(avro(*FIELDS), schema_id_serializer=header_schema_id_serializer)
    note, *_others = notes(monkeypatch, kind, client, reads=False, writes=True)
    assert note.level == "error"
    assert "has no GUID for the newest version of 'payments-value'" in note.message
    assert notes(monkeypatch, kind, client, reads=True)[0].level == "ok"
    (one,) = client.registered
    client.registered = [
        RegisteredSchema(SUBJECT, 1, 101, "00010203-0405-0607-0809-0a0b0c0d0e0f", one.schema)
    ]
    assert notes(monkeypatch, kind, client, reads=False, writes=True)[0].level == "ok"


def test_schema_of_another_type_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient("JSON", [json_schema("cents")])
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS)), client, writes=True)
    assert note.level == "error"
    assert note.message == "'payments-value' has schemas of the type JSON, and the job declares AVRO"
    assert note.remedy


@pytest.mark.parametrize(
    ("options", "writes", "level", "said"),
    [
        ({}, False, "note", "records can be read all the same"),
        ({}, True, "note", "the job registers its schema with the first record"),
        ({"auto_register": False}, True, "error", "and the job doesn't do it (auto_register=False)"),
    ],
)
def test_subject_without_schemas(
    options: Any, writes: bool, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS), **options), FakeClient("AVRO", []), writes=writes)
    assert note.level == level
    assert note.message.startswith("nothing is registered under 'payments-value' yet")
    assert said in note.message
    assert bool(note.remedy) == (level == "error")


@pytest.mark.parametrize(
    ("registered", "is_compatible", "options", "level", "said"),
    [
        ([FIELDS], True, {}, "ok", "the job's schema is version 1 of 'payments-value'"),
        ([FIELDS], True, {"auto_register": False}, "ok", "the job's schema is version 1"),
        ([[FIELDS[0]]], True, {}, "note", "will register its schema under 'payments-value'"),
        ([[FIELDS[0]]], False, {}, "error", "the registry will refuse the job's schema for 'payments-value'"),
        ([[FIELDS[0]]], True, {"auto_register": False}, "error", "isn't one of those that are registered"),
    ],
)
def test_schema_that_is_written(
    registered: list[Any],
    is_compatible: bool,
    options: Any,
    level: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = FakeClient("AVRO", [avro(*fields) for fields in registered], is_compatible=is_compatible)
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS), **options), client, reads=False, writes=True)
    assert note.level == level
    assert said in note.message
    assert bool(note.remedy) == (level == "error")


@pytest.mark.parametrize(
    ("registered", "is_compatible", "level", "said"),
    [
        (["cents"], True, "ok", "the job can read 1 version"),
        ([], True, "ok", "the job's schema goes with the newest one of 'payments-value'"),
        ([], False, "warning", "doesn't go with the newest one"),
    ],
)
def test_json_schema_that_is_read_is_compared_by_the_registry(
    registered: list[str], is_compatible: bool, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient("JSON", [json_schema(*registered)], is_compatible=is_compatible)
    (note,) = notes(monkeypatch, JsonSchema(json_schema("cents")), client)
    assert (note.level, said in note.message) == (level, True)


def test_avro_that_refers_to_other_schemas_is_compared_by_the_registry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = FakeClient("AVRO", [avro({"name": "account", "type": "other.Account"})])
    (note,) = notes(monkeypatch, Avro(avro(*FIELDS)), client)
    assert note == CodecNote("ok", "the job's schema goes with the newest one of 'payments-value'")


# --- in fcluster check ----------------------------------------------------------------------------------


def findings(url: str | None) -> list[check.Finding]:
    """What is said about a job that reads and writes schemas."""
    job = Job("j")
    source = job.topic("in", key=Avro(avro(FIELDS[0])), value=Avro(avro(*FIELDS)))
    job.stream(source).to(job.topic("out", key=Avro(avro(FIELDS[0])), value=Avro(avro(*FIELDS))))
    given: dict[str, str] = {} if url is None else {"url": url}
    settings = Settings(bootstrap_servers="localhost:1", schema_registry=given)
    checks = check._Checks(settings, job.build(settings))
    checks._formats()
    registry.close_registries()
    return checks.findings


def test_registry_that_answers_is_named_once() -> None:
    with StubRegistry((404, {"error_code": 40401, "message": "Subject not found."})) as stub:
        found = findings(stub.url)
    assert [one.subject for one in found] == ["formats"] * 5
    assert found[0] == check.Finding("ok", "formats", f"the schema registry {stub.url} answers")
    assert {one.level for one in found[1:]} == {"note"}
    named = [one.message.split("'")[1] for one in found[1:]]
    assert sorted(named) == ["in-key", "in-value", "out-key", "out-value"]
    assert {method for method, _path in stub.requests} == {"GET"}


def test_registry_that_cannot_be_reached_is_one_error() -> None:
    with StubRegistry((200, {})) as stub:
        pass  # nothing listens there any more
    (error,) = findings(stub.url)
    assert error.level == "error"
    assert f"the schema registry {stub.url} can't be reached" in error.message
    assert "Start the registry, or correct schema.registry.url" in error.remedy


def test_registry_that_is_not_named_is_one_error() -> None:
    (error,) = findings(None)
    assert "needs a schema registry, but schema.registry.url isn't set" in error.message
    assert "fcluster.toml" in error.remedy


def test_job_without_formats_of_a_registry_is_not_asked_about() -> None:
    job = Job("j")
    job.stream(job.topic("in")).to(job.topic("out"))
    settings = Settings(bootstrap_servers="localhost:1")
    checks = check._Checks(settings, job.build(settings))
    checks._formats()
    assert checks.findings == []


def test_page_that_is_no_registry_is_an_error() -> None:
    with StubRegistry((200, b"<html>log in</html>")) as stub:
        settings = MappingProxyType({"schema.registry.url": stub.url})
        use = CodecUse("payments", "value", settings)
        with pytest.raises(FormatUnusable, match="doesn't answer as a schema registry does"):
            Avro(avro(*FIELDS)).notes_on(use, reads=True, writes=False)
        registry.close_registries()
