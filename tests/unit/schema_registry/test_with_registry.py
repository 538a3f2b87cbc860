"""Jobs and confluent-kafka's own serializers and deserializers, at a registry that knows ids and GUIDs: what
they write to each other, what is broken on the way, and schemas that change while a job runs.
"""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka.schema_registry import (
    header_schema_id_serializer,
    prefix_schema_id_serializer,
    record_subject_name_strategy,
    topic_record_subject_name_strategy,
    topic_subject_name_strategy,
)
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import SerializationContext
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from fcluster import CodecUse, Job, ValueState
from fcluster.common.errors import FormatUnavailable, FormatUnusable, JobError
from fcluster.graph.codecs import ModelError, bound_codec
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, registry
from fcluster.testing import Driver, JobStopped
from tests.secured_kafka import make_authority, make_keystore
from tests.unit.schema_registry.local import LocalRegistry
from tests.unit.schema_registry.messages import classes

ACCOUNT: dict[str, Any] = {
    "type": "record",
    "name": "Account",
    "fields": [{"name": "account", "type": "string"}],
}
CENTS = {"name": "cents", "type": "long"}
PAYMENT: dict[str, Any] = {"type": "record", "name": "Payment", "fields": [*ACCOUNT["fields"], CENTS]}
PAYMENT_JSON: dict[str, Any] = {
    "type": "object",
    "properties": {"account": {"type": "string"}, "cents": {"type": "integer"}},
    "required": ["account"],
}
Payment, Refund, Line = classes(
    """
    name: "payment.proto" package: "shop" syntax: "proto3"
    message_type { name: "Refund" field { name: "cents" number: 1 type: TYPE_INT64 } }
    message_type {
      name: "Payment"
      field { name: "account" number: 1 type: TYPE_STRING }
      field { name: "cents" number: 2 type: TYPE_INT64 }
      nested_type { name: "Line" field { name: "text" number: 1 type: TYPE_STRING } }
    }
    """,
    names=["shop.Payment", "shop.Refund", "shop.Payment.Line"],
)
ANN = {"account": "annabel", "cents": 5}
FORMATS: dict[str, tuple[Any, Any]] = {
    "avro": (Avro, ANN),
    "json": (JsonSchema, ANN),
    "protobuf": (Protobuf, Payment(account="annabel", cents=5)),
}
FORMATS_BY_KIND: dict[Any, Any] = dict(FORMATS.values())
SCHEMAS: dict[Any, Any] = {Avro: PAYMENT, JsonSchema: PAYMENT_JSON, Protobuf: Payment}
STRATEGY = {"subject.name.strategy": topic_subject_name_strategy}
VALUE_ID = "__value_schema_id"
SERIALIZERS = {"headers": header_schema_id_serializer, "front": prefix_schema_id_serializer}


class Other:
    """Another program at the same registry, with confluent-kafka's own client."""

    def __init__(self, server: LocalRegistry) -> None:
        self.client = server.client()

    def write(
        self,
        kind: Any,
        value: Any,
        topic: str,
        part: str = "value",
        *,
        ids: str = "front",
        schema: Any = None,
    ) -> tuple[bytes, list[Any]]:
        """The bytes and headers of a value."""
        conf = {**STRATEGY, "schema.id.serializer": SERIALIZERS[ids]}
        schema = SCHEMAS[kind] if schema is None else schema
        serialize: Any
        if kind is Protobuf:
            serialize = ProtobufSerializer(schema, self.client, conf)
        elif kind is JsonSchema:
            serialize = JSONSerializer(json.dumps(schema), self.client, conf=conf)
        else:
            serialize = AvroSerializer(self.client, json.dumps(schema), conf=conf)
        headers: list[Any] = []
        return serialize(value, SerializationContext(topic, part, headers)), headers  # type: ignore[arg-type]

    def read(self, kind: Any, raw: bytes, headers: Any, topic: str, part: str = "value") -> Any:
        """What it reads, without knowing any schema."""
        deserialize: Any
        if kind is Protobuf:
            deserialize = ProtobufDeserializer(SCHEMAS[kind], STRATEGY, self.client)
        elif kind is JsonSchema:
            deserialize = JSONDeserializer(None, schema_registry_client=self.client, conf=STRATEGY)
        else:
            deserialize = AvroDeserializer(self.client, conf=STRATEGY)
        return deserialize(raw, SerializationContext(topic, part, headers))  # type: ignore[arg-type]


def settings_of(server: LocalRegistry, **more: Any) -> dict[str, Any]:
    conf = {"url": server.url, "max.retries": 1, "retries.wait.ms": 1, "retries.max.wait.ms": 1, **more}
    return {f"schema.registry.{name}": value for name, value in conf.items()}


@contextmanager
def running(job: Job, server: LocalRegistry, **more: Any) -> Iterator[Driver]:
    with Driver(job, settings=settings_of(server, **more), partitions=1) as driver:
        yield driver
    registry.close_registries()


def certified(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """The certificate of an authority, and what serves with one that it has signed."""
    authority = make_authority(directory, "authority")
    make_keystore(directory, authority)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "broker.pem", directory / "broker.key")
    return authority, tls


def opened(kind: Any, topic: str = "in", **settings: Any) -> Any:
    """A codec as it is used for values of a topic."""
    given = {"schema.registry.url": "mock://test", **settings}
    return bound_codec(kind, CodecUse(topic, "value", MappingProxyType(given)))


def format_of(kind: Any, schema: Any = None, ids: str = "front", **options: Any) -> Any:
    schema = SCHEMAS[kind] if schema is None else schema
    return kind(schema, schema_id_serializer=SERIALIZERS[ids], **options)


def copying(kind: Any, *, written: str = "front", schema: Any = None) -> tuple[Job, Any, Any]:
    """A job that writes what it reads, with a dead-letter topic."""
    job = Job("copy")
    dead = job.topic("dead", key="bytes", value="bytes")
    source = job.topic("in", value=format_of(kind, schema), on_error=dead)
    out = job.topic("out", value=format_of(kind, schema, written))
    job.stream(source).map(lambda value: value).to(out)
    return job, source, out


# --- to and fro -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("read", "written"), [("front", "headers"), ("headers", "front")])
@pytest.mark.parametrize("name", FORMATS)
def test_keys_and_values_go_through_a_job_from_one_program_to_another(
    name: str, read: str, written: str
) -> None:
    kind, value = FORMATS[name]

    def copying_keys() -> Job:
        job = Job("copy")
        source = job.topic("in", key=format_of(kind, ids=read), value=format_of(kind))
        out = job.topic("out", key=format_of(kind, ids=written), value=format_of(kind, ids=written))
        job.stream(source).map(lambda value: value).to(out)
        return job

    with LocalRegistry() as server, running(copying_keys(), server) as driver:
        writer, reader = Other(server), Other(server)
        key, key_headers = writer.write(kind, value, "in", "key", ids=read)
        raw, headers = writer.write(kind, value, "in", ids=read)
        assert len(headers) == (read == "headers")
        for restarted in (False, True):
            if restarted:
                registry.close_registries()
                driver.restart(copying_keys(), settings=settings_of(server))
            server.requests.clear()
            driver.send_raw("in", raw, key=key, headers=key_headers + headers)
            record = driver.records("out")[-1]
            assert (record.key, record.value) == (value, value)
            path = "/schemas/guids/" if read == "headers" else "/schemas/ids/"
            assert any(asked.startswith(path) for _method, asked in server.requests)
            assert reader.read(kind, record.raw_key or b"", record.headers, "out", "key") == value
            assert reader.read(kind, record.raw_value or b"", record.headers, "out") == value
            assert len(record.headers) == 2 * (written == "headers")


@pytest.mark.parametrize("message", [Refund(cents=5), Payment(account="a"), Line(text="x")])
def test_message_that_is_not_the_first_of_its_file_comes_back(message: Any) -> None:
    schema = type(message)
    job, source, out = copying(Protobuf, schema=schema, written="headers")
    with LocalRegistry() as server, running(job, server) as driver:
        other = Other(server)
        for ids in SERIALIZERS:
            raw, headers = other.write(Protobuf, message, "in", ids=ids, schema=schema)
            driver.send_raw(source, raw, headers=headers)
            record = driver.records(out)[-1]
            assert (record.value, type(record.value)) == (message, schema)
            read: Any = ProtobufDeserializer(schema, STRATEGY, other.client)
            context = SerializationContext("out", "value", record.headers)  # type: ignore[arg-type]
            assert read(record.raw_value, context) == message


def test_registry_may_answer_a_registration_with_the_text_of_a_protobuf_schema() -> None:
    """The client keeps that for the id, and asks for no descriptor any more."""
    job = Job("j")
    stream = job.stream(job.topic("in", value=Protobuf(Payment)))
    keyed = stream.key_by(lambda value: value.account, value=Protobuf(Payment), name="account")
    keyed.filter(bool).to(job.topic("out", value=Protobuf(Payment)))
    with LocalRegistry() as server, running(job, server) as driver:
        server.answers_with_schemas = True
        driver.send("in", Payment(account="ann"))
        assert driver.read_values("out") == [Payment(account="ann")]


def test_registry_without_descriptors_stops_the_job() -> None:
    job, source, _out = copying(Protobuf)
    with LocalRegistry(serializes=False) as server:
        raw, _headers = Other(server).write(Protobuf, Payment(), "in")
        with (
            pytest.raises(JobStopped, match="gives Protobuf schemas as text only") as stopped,
            running(job, server) as driver,
        ):
            driver.send_raw(source, raw)
    assert "has both" in stopped.value.remedy


# --- what is broken ---------------------------------------------------------------------------------------

GUID = UUID(int=7).bytes
DATA = {Avro: b"\x06ann\x0a", JsonSchema: b'{"account": "ann"}', Protobuf: b"\x0a\x03ann"}
NO_ID = "it doesn't begin with the id of a schema"


BROKEN: list[tuple[bytes, bytes | None, str]] = [
    (b"\0\0\0\0\x63\0", None, "with the schema 99, which the registry"),
    (b"\1" + GUID + b"\0", None, f"{UUID(int=7)}, which"),
    (b"", b"\1" + GUID + b"\0", f"{UUID(int=7)}, which"),
    (b"", b"\1" + GUID[:9], NO_ID),
    (b"", b"\x07garbage", f"{NO_ID} ("),
    (b"\x07", None, f"and no header '{VALUE_ID}' of the record has one"),
    (b"\1" + GUID[:2], None, NO_ID),
]
"""What stands in front of the data, what its header has, and what is said about it."""


@pytest.mark.parametrize("kind", SCHEMAS)
def test_records_whose_schemas_are_not_known_are_dead_letters_that_say_where_they_were(kind: Any) -> None:
    job, source, out = copying(kind)
    with LocalRegistry() as server, running(job, server) as driver:
        good, _headers = Other(server).write(kind, FORMATS_BY_KIND[kind], "in")
        driver.send_raw(source, good)
        for front, header, _message in BROKEN:
            data = front + (b"" if front == BROKEN[-1][0] else DATA[kind])
            driver.send_raw(source, data, headers=[] if header is None else [(VALUE_ID, header)])
        driver.send_raw(source, good)
        letters = driver.dead_letters()
        assert len(letters) == len(BROKEN)
        for offset, (letter, (front, header, message)) in enumerate(
            zip(letters, BROKEN, strict=True), start=1
        ):
            assert message in letter.error
            assert (letter.record.raw_value or b"").startswith(front)
            found = dict(letter.record.headers)
            assert found.get(VALUE_ID) == header
            where = [found[f"fcluster.{name}"] for name in ("topic", "partition", "offset")]
            assert where == [b"in", b"0", str(offset).encode()]
        assert len(driver.records(out)) == 2


@pytest.mark.parametrize("declared", SCHEMAS)
def test_record_with_the_schema_of_another_subject_is_not_read_as_something_else(declared: Any) -> None:
    # The declared format, that of another subject with its schema and value, and what is said.
    others: list[tuple[Any, Any, Any, Any, str]] = [
        (Avro, JsonSchema, None, ANN, "that is of the type JSON, not AVRO"),
        (Avro, Avro, ACCOUNT, {"account": "a"}, "it is of the type Account, not of the type Payment"),
        (Avro, Avro, {"type": "bytes"}, b"ab", "it is of the type bytes, not of the type Payment"),
        (JsonSchema, Avro, None, ANN, "that is of the type AVRO, not JSON"),
        (Protobuf, Avro, None, ANN, "that is of the type AVRO, not PROTOBUF"),
        (Protobuf, Protobuf, Refund, Refund(cents=5), "it is a shop.Refund, not a shop.Payment"),
        (Protobuf, Protobuf, Line, Line(text="x"), "it is a shop.Payment.Line, not a shop.Payment"),
    ]
    job, source, out = copying(declared)
    with LocalRegistry() as server, running(job, server) as driver:
        other = Other(server)
        for of, kind, schema, value, message in others:
            if of is declared:
                raw, _headers = other.write(kind, value, "other", schema=schema)
                driver.send_raw(source, raw)
                error = driver.dead_letters()[-1].error
                assert "doesn't fit the one that the job declares: " in error
                assert message in error
        assert driver.records(out) == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_data_that_is_cut_off_is_a_dead_letter_or_read_by_its_format(kind: Any) -> None:
    job, source, _out = copying(kind)
    with LocalRegistry() as server, running(job, server) as driver:
        raw, _headers = Other(server).write(kind, FORMATS_BY_KIND[kind], "in")
        for size in range(len(raw)):
            driver.send_raw(source, raw[:size])
        letters = driver.dead_letters()
        # Protobuf has no end: what is left of its fields is a message.
        assert len(letters) == len(raw) if kind is not Protobuf else len(raw) - 3
        assert all("doesn't fit" in one.error or NO_ID in one.error for one in letters)


@pytest.mark.parametrize(
    "index", [b"\xff" * 1_000_000, b"\x02" + b"\xff" * 1_000_000, b"\x80\x80\x0c" + b"\0" * 1_000_000]
)
def test_place_of_a_message_that_does_not_end_takes_no_time(index: bytes) -> None:
    """It took a minute, and then the time for a record was over."""
    codec: Any = opened(Protobuf(Payment))
    with pytest.raises(ModelError, match="4 bytes, and the place of the message in its file"):
        codec.decode(b"\0\0\0\0\1" + index)
    registry.close_registries()


# --- schemas that change, and what they refer to ----------------------------------------------------------

WITH_CURRENCY = {
    **PAYMENT,
    "fields": [*PAYMENT["fields"], {"name": "currency", "type": "string", "default": "EUR"}],
}
WITHOUT_CENTS = {**PAYMENT, "fields": PAYMENT["fields"][:1]}


@dataclass
class Total:
    cents: int = 0


@dataclass
class TotalByCurrency:
    cents: dict[str, int] = field(default_factory=dict)


def totals(schema: Any, state: ValueState[Any], add: Any) -> Job:
    job = Job("totals")
    dead = job.topic("dead", key="bytes", value="bytes")
    source = job.topic("in", value=Avro(schema), on_error=dead)
    job.process(source, name="add", states=[state], to=job.topic("out"))(add)
    return job


def test_schema_changes_while_a_job_runs_and_the_job_after_it() -> None:
    """New versions come in the middle of a batch. Then the job takes the new one, and its state migrates."""

    def add(ctx: Any, value: Any) -> Any:
        total = ctx.value(former).get(Total())
        total.cents += value["cents"]
        ctx.value(former).set(total)
        return total.cents

    def add_by_currency(ctx: Any, value: Any) -> Any:
        total = ctx.value(present).get(TotalByCurrency())
        total.cents[value["currency"]] = total.cents.get(value["currency"], 0) + value["cents"]
        ctx.value(present).set(total)
        return total.cents

    former: ValueState[Any] = ValueState("total", Total)
    present: ValueState[Any] = ValueState(
        "total", TotalByCurrency, version=2, migrate={1: lambda old: TotalByCurrency({"EUR": old["cents"]})}
    )
    with LocalRegistry() as server, running(totals(PAYMENT, former, add), server) as driver:
        other = Other(server)

        def send(schema: Any, **more: Any) -> None:
            value = {"account": "annabel", "cents": 5, **more}
            lacking = value.keys() - {one["name"] for one in schema["fields"]}
            value = {name: part for name, part in value.items() if name not in lacking}
            raw, _headers = other.write(Avro, value, "in", schema=schema)
            driver.send_raw("in", raw, key=b'"k"')

        send(PAYMENT)
        send(WITH_CURRENCY, currency="USD")
        send(WITHOUT_CENTS)
        send(PAYMENT)
        assert driver.read_values("out") == [5, 10, 15]
        (letter,) = driver.dead_letters()
        assert "No default value for field cents in Payment" in letter.error
        driver.restart(totals(WITH_CURRENCY, present, add_by_currency), settings=settings_of(server))
        send(PAYMENT)
        send(WITH_CURRENCY, currency="USD")
        assert driver.read_values("out")[-2:] == [{"EUR": 20}, {"EUR": 20, "USD": 5}]


@pytest.mark.parametrize("kind", ["AVRO", "JSON", "PROTOBUF"])
def test_references_in_a_circle_are_the_fault_of_the_record(kind: str) -> None:
    (ring,) = classes('name: "r.proto" syntax: "proto3" message_type { name: "Payment" }', names=["Payment"])
    texts = {
        "AVRO": json.dumps({**PAYMENT, "fields": [{"name": "a", "type": "Ring"}]}),
        "JSON": '{"$ref": "Ring"}',
        "PROTOBUF": b64encode(ring.DESCRIPTOR.file.serialized_pb).decode(),
    }
    declared = {"AVRO": Avro, "JSON": JsonSchema, "PROTOBUF": Protobuf}[kind]
    job, source, _out = copying(declared)
    ring_reference = {"name": "Ring", "subject": "rings", "version": 1}
    with LocalRegistry() as server, running(job, server) as driver:
        server.put("rings", kind, texts[kind], [ring_reference])
        number = server.put("in-value", kind, texts[kind], [ring_reference])
        driver.send_raw(source, b"\0" + number.to_bytes(4, "big") + b"\0\x02\x02")
        (letter,) = driver.dead_letters()
        assert "it refers to version 1 of 'rings', which refers to itself" in letter.error


def serialized(text: str) -> str:
    """A file of Protobuf as a registry gives it."""
    return b64encode(text_format.Parse(text, FileDescriptorProto()).SerializeToString()).decode()


@pytest.mark.parametrize("kind", SCHEMAS)
def test_schema_that_can_not_be_read_is_the_fault_of_the_record(kind: Any) -> None:
    # Texts that a registry has as schemas, and what is said about records with them.
    hostile: dict[Any, list[tuple[str, str]]] = {
        Avro: [
            ("{", "that isn't Avro (JSONDecodeError"),
            ("null", "that isn't Avro"),
            ('{"type": {"type": 5}}', "that isn't Avro"),
            ('{"type": "record", "name": 5, "fields": []}', "that isn't Avro"),
            (
                json.dumps({**PAYMENT, "fields": [{"name": "a", "type": "Gone"}]}),
                "has the type 'Gone', which it",
            ),
            ("[" * 5_000 + "]" * 5_000, "that isn't Avro (RecursionError"),
        ],
        JsonSchema: [("{", "JSONDecodeError"), ("[" * 5_000 + "]" * 5_000, "depth limit")],
        Protobuf: [
            ("", "that has no message at [1]"),
            ("////", "that can't be read"),
            (
                serialized(
                    'dependency: "gone.proto" message_type { name: "A" } message_type { name: "Payment" }'
                ),
                "that can't be read (Couldn't build proto file into descriptor pool: Depends on file 'gone",
            ),
            (
                serialized('message_type { name: "Payment" } message_type { name: "Payment" }'),
                "duplicate symbol 'Payment'",
            ),
        ],
    }
    job, source, out = copying(kind)
    with LocalRegistry() as server, running(job, server) as driver:
        good, _headers = Other(server).write(kind, FORMATS_BY_KIND[kind], "in")
        for text, message in hostile[kind]:
            number = server.put_unread(kind.kind, text)
            driver.send_raw(source, b"\0" + number.to_bytes(4, "big") + good[5:])
            assert message in driver.dead_letters()[-1].error
        driver.send_raw(source, good)
        assert len(driver.dead_letters()) == len(hostile[kind])
        assert len(driver.records(out)) == 1


# --- how schemas are found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "kind", "schema", "subject"),
    [
        (record_subject_name_strategy, Avro, {**PAYMENT, "namespace": "shop"}, "shop.Payment"),
        (topic_record_subject_name_strategy, Avro, {**PAYMENT, "namespace": "shop"}, "out-shop.Payment"),
        (record_subject_name_strategy, JsonSchema, {**PAYMENT_JSON, "title": "Payment"}, "Payment"),
        (topic_record_subject_name_strategy, Protobuf, Payment, "out-shop.Payment"),
        (topic_subject_name_strategy, Protobuf, Payment, "out-value"),
    ],
)
def test_subject_is_named_by_the_strategy(strategy: Any, kind: Any, schema: Any, subject: str) -> None:
    declared = kind(schema, subject_name_strategy=strategy)
    job = Job("j")
    source, out = job.topic("in"), job.topic("out", value=declared)
    value = FORMATS_BY_KIND[kind]
    job.stream(source).map(lambda _value: value).to(out)
    with LocalRegistry() as server, running(job, server) as driver:
        driver.send(source, 1)
        assert driver.read_values(out) == [value]
        assert server.subjects() == [subject]
        use = CodecUse("out", "value", MappingProxyType(settings_of(server)))
        notes = list(declared.notes_on(use, reads=False, writes=True))
        assert notes[-1].message == f"the job's schema is version 1 of {subject!r}"
    assert declared != kind(schema) or strategy is topic_subject_name_strategy


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Avro(PAYMENT, subject_name_strategy=str),
        lambda: JsonSchema(PAYMENT_JSON, subject_name_strategy=record_subject_name_strategy),
        lambda: Avro(["null", "string"], subject_name_strategy=topic_record_subject_name_strategy),
    ],
)
def test_strategy_that_gives_no_subject_is_refused_when_it_is_declared(declare: Any) -> None:
    with pytest.raises(
        JobError, match=r"got (subject_name_strategy=|(topic_)?record_subject_name_strategy, and)"
    ):
        declare()


def test_schema_may_be_found_in_its_normal_form() -> None:
    """Another program has registered it with its parts in another order."""
    reordered = {name: PAYMENT[name] for name in ("fields", "name", "type")}
    with LocalRegistry() as server:
        number = server.put("in-value", "AVRO", reordered)
        settings = settings_of(server)
        strict = opened(Avro(PAYMENT, auto_register=False), **settings)
        with pytest.raises(FormatUnusable, match="the job may not register it"):
            strict.encode(ANN)
        normal = opened(Avro(PAYMENT, auto_register=False, normalize_schemas=True), **settings)
        assert normal.encode(ANN)[:5] == b"\0" + number.to_bytes(4, "big")
        registry.close_registries()


# --- registries that are hard to reach --------------------------------------------------------------------


def test_registry_with_a_password_a_certificate_of_its_own_and_a_dead_one_in_front(tmp_path: Path) -> None:
    ca, tls = certified(tmp_path)
    with LocalRegistry() as dead:
        pass
    with LocalRegistry(user_info="ann:s3cret", tls=tls) as server:
        url = f"{dead.url},{server.url}"
        quick = {"schema.registry.max.retries": 0, "schema.registry.url": url}
        with pytest.raises(FormatUnusable, match="certificate verify failed"):
            opened(Avro(PAYMENT), **quick).encode(ANN)
        trusted = {**quick, "schema.registry.ssl.ca.location": str(ca)}
        with pytest.raises(FormatUnusable, match=r"refuses access \(HTTP status 401\): Unauthorized"):
            opened(Avro(PAYMENT), **trusted).encode(ANN)
        known = {**trusted, "schema.registry.basic.auth.user.info": "ann:s3cret"}
        codec = opened(Avro(PAYMENT), **known)
        assert codec.decode(codec.encode(ANN)) == ANN
        missing = {**known, "schema.registry.ssl.ca.location": str(tmp_path / "nothing.pem")}
        with pytest.raises(
            FormatUnusable,
            match=r"can't be used: schema\.registry\.ssl\.ca\.location is '.*nothing.*, and FileNotFound",
        ):
            opened(Avro(PAYMENT), **missing).encode(ANN)
        registry.close_registries()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_registry_in_trouble_is_waited_for(status: int) -> None:
    with LocalRegistry() as server:
        server.troubles = [(status, {"error_code": status, "message": "not now"})] * 2
        settings = {**settings_of(server), "schema.registry.max.retries": 1}
        codec = opened(Avro(PAYMENT), **settings)
        with pytest.raises(FormatUnavailable, match=rf"\(HTTP status {status}\): not now"):
            codec.encode(ANN)
        assert codec.decode(codec.encode(ANN)) == ANN
        registry.close_registries()


def test_registry_that_is_too_slow_is_waited_for() -> None:
    with LocalRegistry() as server:
        server.pause_s = 0.5
        settings = {**settings_of(server), "schema.registry.timeout": 0.05, "schema.registry.max.retries": 0}
        codec = opened(Avro(PAYMENT), **settings)
        with pytest.raises(FormatUnavailable, match="can't be reached: ReadTimeout"):
            codec.encode(ANN)
        registry.close_registries()
