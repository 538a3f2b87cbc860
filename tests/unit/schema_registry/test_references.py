"""Schemas that refer to those of other subjects: declared ones, and those with which others have written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import Schema, SchemaReference, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.serialization import SerializationContext

from fcluster import Codec, CodecUse, Job
from fcluster.common.errors import FormatUnusable, JobError
from fcluster.graph.codecs import CodecNote, ModelError, bound_codec, key_codec, value_codec
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, Reference, registry
from fcluster.testing import Driver
from tests.unit.schema_registry.messages import importing_class
from tests.unit.schema_registry.stub import StubRegistry

COUNTRY: dict[str, Any] = {
    "type": "record",
    "name": "Country",
    "namespace": "shop",
    "fields": [{"name": "code", "type": "string"}],
}
ADDRESS: dict[str, Any] = {
    "type": "record",
    "name": "shop.Address",
    "fields": [{"name": "city", "type": "string"}, {"name": "country", "type": "Country"}],
}
ORDER: dict[str, Any] = {
    "type": "record",
    "name": "shop.Order",
    "fields": [{"name": "to", "type": "Address"}, {"name": "made_in", "type": "shop.Country"}],
}
COUNTRY_REF = Reference("shop.Country", COUNTRY, subject="countries")
ADDRESS_REF = Reference("shop.Address", ADDRESS, references=[COUNTRY_REF])
AVRO: Avro[Any] = Avro(ORDER, references=[ADDRESS_REF, COUNTRY_REF])
VALUE: dict[str, Any] = {"to": {"city": "Bern", "country": {"code": "CH"}}, "made_in": {"code": "IT"}}

COUNTRY_JSON: dict[str, Any] = {
    "definitions": {"code": {"type": "string", "maxLength": 2}},
    "type": "object",
    "properties": {"code": {"$ref": "#/definitions/code"}},
}
ADDRESS_JSON: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"$ref": "country.json"}},
    "required": ["city"],
}
ORDER_JSON: dict[str, Any] = {
    "type": "object",
    "properties": {"to": {"$ref": "address.json"}, "made_in": {"$ref": "country.json#"}},
}
COUNTRY_JSON_REF = Reference("country.json", COUNTRY_JSON, subject="countries-json")
ADDRESS_JSON_REF = Reference("address.json", ADDRESS_JSON, references=[COUNTRY_JSON_REF])
JSON: JsonSchema[Any] = JsonSchema(ORDER_JSON, references=[ADDRESS_JSON_REF, COUNTRY_JSON_REF])


@dataclass
class Country:
    code: str


@dataclass
class Address:
    city: str
    country: Country


@dataclass
class Order:
    to: Address
    made_in: Country


FORMATS = [
    pytest.param(AVRO, "shop.Address", id="avro"),
    pytest.param(JSON, "address.json", id="json"),
]
CONF = {"subject.name.strategy": topic_subject_name_strategy}
CONTEXT = SerializationContext("orders", "value")  # type: ignore[arg-type]


def use_of(topic: str = "orders", part: Any = "value", url: str = "mock://references") -> CodecUse:
    quick = {"max.retries": 1, "retries.wait.ms": 1, "retries.max.wait.ms": 1}
    settings = {"schema.registry.url": url, **{f"schema.registry.{name}": n for name, n in quick.items()}}
    return CodecUse(topic, part, MappingProxyType(settings))


def opened(kind: Codec[Any], **use: Any) -> Codec[Any]:
    bound = bound_codec(kind, use_of(**use))
    assert isinstance(bound, Codec)
    return bound


def client() -> Any:
    return registry.registry_for(use_of()).client


def test_declared_references_are_registered_in_front_of_the_schema_that_refers_to_them() -> None:
    codec = opened(AVRO)
    raw = codec.encode(VALUE)
    assert codec.decode(raw) == VALUE
    assert set(client().get_subjects()) == {"countries", "shop.Address", "orders-value"}
    address = client().get_latest_version("shop.Address").schema
    assert address.references == [SchemaReference("shop.Country", "countries", 1)]
    order = client().get_latest_version("orders-value").schema
    assert json.loads(order.schema_str) == ORDER
    assert order.references == [
        SchemaReference("shop.Address", "shop.Address", 1),
        SchemaReference("shop.Country", "countries", 1),
    ]


def test_json_schemas_refer_to_others() -> None:
    codec = opened(JSON)
    assert codec.decode(codec.encode(VALUE)) == VALUE
    names = [one.name for one in client().get_latest_version("orders-value").schema.references]
    assert names == ["address.json", "country.json"]
    with pytest.raises(
        ModelError, match=r"of 'orders-value': .*'Bernese' is too long, at \$\.to\.country\.code"
    ):
        codec.encode({"to": {"city": "x", "country": {"code": "Bernese"}}})


def test_field_of_a_referenced_type_is_named_if_it_does_not_fit() -> None:
    with pytest.raises(ModelError, match=r"of 'orders-value': .*shop\.Address\.city"):
        opened(AVRO).encode({**VALUE, "to": {**VALUE["to"], "city": 5}})
    with pytest.raises(ModelError, match=r"shop\.Country\.code"):
        opened(AVRO).encode({**VALUE, "made_in": {"code": None}})


def test_objects_of_a_model_are_read_and_written_with_references() -> None:
    order = Order(Address("Bern", Country("CH")), Country("IT"))
    for kind in (
        Avro(ORDER, model=Order, references=[ADDRESS_REF, COUNTRY_REF]),
        JsonSchema(ORDER_JSON, model=Order, references=[ADDRESS_JSON_REF, COUNTRY_JSON_REF]),
    ):
        codec = opened(kind, topic=kind.name)
        assert codec.decode(codec.encode(order)) == order


def written_elsewhere(kind: Any, value: Any) -> bytes:
    """What another program writes, whose schema refers to others."""
    is_avro = kind is AVRO
    country, address, order = (
        (COUNTRY, ADDRESS, ORDER) if is_avro else (COUNTRY_JSON, ADDRESS_JSON, ORDER_JSON)
    )
    names = ("shop.Country", "shop.Address") if is_avro else ("country.json", "address.json")
    at_country, at_address = SchemaReference(names[0], "c", 1), SchemaReference(names[1], "a", 1)
    client().register_schema("c", Schema(json.dumps(country), kind.kind))
    client().register_schema("a", Schema(json.dumps(address), kind.kind, [at_country]))
    schema = Schema(json.dumps(order), kind.kind, [at_address, at_country])
    if is_avro:
        return AvroSerializer(client(), schema, conf=CONF)(value, CONTEXT) or b""
    return JSONSerializer(schema, client(), conf=CONF)(value, CONTEXT) or b""


@pytest.mark.parametrize("kind", [AVRO, JSON], ids=["avro", "json"])
def test_what_others_wrote_with_references_is_read_whatever_the_job_declares(kind: Any) -> None:
    raw = written_elsewhere(kind, VALUE)
    subjects = set(client().get_subjects())
    assert opened(kind).decode(raw) == VALUE, "the job's own references aren't registered"
    if kind is AVRO:
        city = {"type": "record", "name": "Address", "fields": [{"name": "city", "type": "string"}]}
        alone = Avro({"type": "record", "name": "Order", "fields": [{"name": "to", "type": city}]})
        assert opened(alone).decode(raw) == {"to": {"city": "Bern"}}
        newer = {
            **COUNTRY,
            "fields": [*COUNTRY["fields"], {"name": "eu", "type": "boolean", "default": False}],
        }
        country = Reference("shop.Country", newer)
        address = Reference("shop.Address", ADDRESS, references=[country])
        read = opened(Avro(ORDER, references=[address, country])).decode(raw)
        assert read["made_in"] == {"code": "IT", "eu": False}
    else:
        assert opened(JsonSchema({"type": "object"})).decode(raw) == VALUE
    assert set(client().get_subjects()) == subjects, "reading registers nothing"


def test_record_whose_schema_refers_to_what_the_registry_does_not_have_is_to_blame() -> None:
    order = {"schema": json.dumps(ORDER), "references": [SchemaReference("shop.Address", "a", 3).to_dict()]}
    missing = (404, {"error_code": 40402, "message": "Version 3 not found."})
    with StubRegistry((200, order), missing) as stub:
        with pytest.raises(ModelError, match=r"1, which refers to one that the registry .*version 3 of 'a'"):
            opened(AVRO, url=stub.url).decode(b"\0\0\0\0\x01" + b"\x06ann\x0a")
        registry.close_registries()


def test_reference_that_the_registry_refuses_is_named() -> None:
    with StubRegistry((422, {"error_code": 42201, "message": "Invalid schema"})) as stub:
        with pytest.raises(FormatUnusable, match="refuses the schema of 'countries' as invalid"):
            opened(AVRO, url=stub.url).encode(VALUE)
        registry.close_registries()


@pytest.mark.parametrize(("kind", "name"), FORMATS)
def test_reference_that_the_job_may_not_register_has_to_be_there(kind: Any, name: str) -> None:
    schema, references = (ORDER, kind._references) if kind is AVRO else (ORDER_JSON, kind._references)
    strict = type(kind)(schema, references=references, auto_register=False)
    message = r"'orders-value' refers to one that the schema registry .* isn't registered under 'countries"
    with pytest.raises(FormatUnusable, match=message):
        opened(strict).encode(VALUE)
    opened(kind).encode(VALUE)
    assert opened(strict).decode(opened(strict).encode(VALUE)) == VALUE
    assert name in client().get_subjects()


def test_job_declares_and_uses_references_in_the_driver(tmp_path: Path) -> None:
    (tmp_path / "address.avsc").write_text(json.dumps(ADDRESS))
    address = Reference("shop.Address", tmp_path / "address.avsc", references=[COUNTRY_REF])
    job = Job("ship")
    orders = job.topic("orders", key=Avro(ADDRESS, references=[COUNTRY_REF]), value=AVRO)
    assert orders == job.topic(
        "orders",
        key=Avro(ADDRESS, references=[COUNTRY_REF]),
        value=Avro(ORDER, references=[address, COUNTRY_REF]),
    )
    out = job.topic("out", key="json", value=JSON)
    job.stream(orders).to(out)
    with Driver(job) as driver:
        driver.send(orders, VALUE, key=VALUE["to"])
        assert driver.read_values(out) == [VALUE]
    other = Reference("shop.Country", {**COUNTRY, "doc": "another"}, subject="countries")
    named = [
        Avro(ADDRESS, references=[one]).name_for(use_of(part="key"))
        for one in (COUNTRY_REF, other, COUNTRY_REF)
    ]
    assert named[0] == named[2] != named[1], "a key's name has the fingerprint of the references, too"


FLOAT = {"type": "record", "name": "F", "fields": [{"name": "x", "type": "float"}]}


@pytest.mark.parametrize(
    ("declare", "message", "remedy"),
    [
        (
            lambda: Avro(ORDER),
            "has the type 'shop.Address', which neither Avro nor the schema itself knows",
            "references=[Reference('shop.Addr",
        ),
        (
            lambda: Avro(ORDER, references=[Reference("shop.Address", ADDRESS), COUNTRY_REF]),
            "The Avro schema 'shop.Address' has the type 'shop.Country'",
            "Reference('shop.Country'",
        ),
        (lambda: Avro(ORDER, references=["address.avsc"]), "Avro got references=", "Give a list"),  # type: ignore[list-item]
        (lambda: Avro(ORDER, references=ADDRESS_REF), "Avro got references=", "Give a list"),  # type: ignore[arg-type]
        (lambda: Reference("", ADDRESS), "Reference got '' as its name", "Give the name"),
        (lambda: Reference("a", Path("no-such-file")), "The 'a' schema 'no-such-file' can't be read", "Path"),
        (
            lambda: Avro(ORDER, references=[Reference("shop.Country", ADDRESS), ADDRESS_REF]),
            "two different references with the name 'shop.Country'",
            "Declare it once",
        ),
        (
            lambda: JsonSchema(ORDER_JSON, references=[ADDRESS_JSON_REF, Reference("country.json", {})]),
            "two different references with the name 'country.json'",
            "Declare it once",
        ),
        (
            lambda: JsonSchema(ORDER_JSON, references=[COUNTRY_JSON_REF]),
            "refers to 'address.json', which isn't declared",
            "Reference('address.json'",
        ),
        (
            lambda: JsonSchema({"$id": "http://shop/order.json", **ORDER_JSON}, references=JSON._references),
            "refers to 'address.json' (which means 'http://shop/address.json' there), which isn't declared",
            "Reference('http://shop/address.json'",
        ),
        (
            lambda: JsonSchema({"$ref": "a"}, references=[Reference("a", {"type": 5})]),
            "The JSON schema 'a' isn't valid",
            "Correct it",
        ),
        (
            lambda: Job("j").topic("t", key=Avro('["null", "F"]', references=[Reference("F", FLOAT)])),
            "has the type 'float'",
            "Use keys",
        ),
    ],
)
def test_references_that_can_not_be_used_are_refused_when_they_are_declared(
    declare: Any, message: str, remedy: str
) -> None:
    with pytest.raises(JobError) as caught:
        declare()
    assert message in caught.value.message
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/definitions/a", "definitions": {"a": {"$id": "inner.json"}, "b": {"$ref": "inner.json"}}},
        {"$id": "http://shop/order.json", "$ref": "http://json-schema.org/draft-07/schema#"},
        {"const": {"$ref": "not-a-reference"}, "properties": {"$ref": {"type": "string"}}},
    ],
)
def test_references_within_a_json_schema_and_to_the_web_need_no_declaration(schema: Any) -> None:
    JsonSchema(schema)


# --- what `fcluster check` says ---------------------------------------------------------------------------


def said(kind: Any, *, writes: bool = True) -> list[CodecNote]:
    bound = kind.notes_on(use_of(), reads=True, writes=writes)
    first, *others = bound
    assert first.message.endswith("answers")
    return others


@pytest.fixture
def patient_client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Notes ask the same stand-in for a registry that the codecs use."""
    one = registry.registry_for(use_of())
    monkeypatch.setattr("fcluster.schema_registry.formats.registry_for", lambda _use, is_patient=True: one)
    one.client.test_compatibility = lambda *_subject_and_schema: True
    return one.client


@pytest.mark.parametrize("kind", [AVRO, JSON], ids=["avro", "json"])
def test_check_compares_schemas_with_their_references(kind: Any, patient_client: Any) -> None:
    assert "nothing is registered" in said(kind)[0].message
    opened(kind).encode(VALUE)
    subjects = patient_client.get_subjects()
    assert [(note.level, note.message) for note in said(kind)] == [
        ("ok", "the job's schema is version 1 of 'orders-value'"),
        ("ok", "the job can read 1 version of 'orders-value'"),
    ]
    assert patient_client.get_subjects() == subjects


def test_check_reads_what_was_written_with_references(patient_client: Any) -> None:
    written_elsewhere(AVRO, VALUE)
    writing, reading = said(AVRO)
    assert writing.level == "note"
    assert writing.message == (
        "the job's schema for 'orders-value' refers to others, of which one isn't there: the schema "
        "'shop.Country' isn't registered under 'countries'; the job registers it with the first record"
    )
    assert (reading.level, reading.message) == ("ok", "the job can read 1 version of 'orders-value'")
    must = {**ORDER, "fields": [*ORDER["fields"], {"name": "cents", "type": "long"}]}
    (note,) = said(Avro(must, references=[ADDRESS_REF, COUNTRY_REF]), writes=False)
    assert note.level == "error"
    assert "cents" in note.message
    strict = Avro(ORDER, references=[ADDRESS_REF, COUNTRY_REF], auto_register=False)
    assert said(strict)[0].level == "error"


def test_check_says_that_nothing_is_known_of_a_json_schema_whose_references_are_missing(
    patient_client: Any,
) -> None:
    written_elsewhere(JSON, VALUE)
    (note,) = said(JSON, writes=False)
    assert (note.level, "isn't known" in note.message) == ("note", True)


def test_check_compares_protobuf_files_that_import_others(patient_client: Any) -> None:
    order = Protobuf(importing_class("Order", "Address"))
    patient_client.register_schema("orders-value", Schema("", "PROTOBUF"))
    assert "a file that 'Order.proto' imports isn't registered" in said(order)[0].message
    message = order._message()
    message.inner.text = "Bern"
    codec = opened(order)
    raw = value_codec(codec)[1](message)
    assert codec.decode(raw) == message
    assert said(order)[0].message == "the job's schema is version 2 of 'orders-value'"
    assert key_codec(opened(order, part="key"))[0](raw) == message
