"""Avro, JSON Schema and Protobuf with a schema registry: what comes back, what doesn't fit, and what happens
if the registry doesn't help.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, make_dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pydantic
import pytest
from confluent_kafka.schema_registry import Schema

from fcluster import Codec, CodecUse, Context, Job, MapState, Record, ValueState
from fcluster.common.errors import FclusterError, FormatUnusable, JobError
from fcluster.common.settings import Settings
from fcluster.graph.codecs import ModelError, bound_codec, key_codec, value_codec
from fcluster.graph.compatibility import incompatibility
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, registry
from fcluster.testing import Driver, JobStopped
from tests.unit.schema_registry.messages import message_class
from tests.unit.schema_registry.stub import StubRegistry

FIELDS = [{"name": "account", "type": "string"}, {"name": "cents", "type": "long"}]
PAYMENT: dict[str, Any] = {"type": "record", "name": "Payment", "fields": FIELDS}
STATUS = {"name": "status", "type": "string", "default": "new"}
PAYMENT_2: dict[str, Any] = {**PAYMENT, "fields": [*FIELDS, STATUS]}
PAYMENT_JSON: dict[str, Any] = {
    "type": "object",
    "properties": {"account": {"type": "string"}, "cents": {"type": "integer"}},
    "required": ["account", "cents"],
}
PaymentMessage = message_class("Payment", account="STRING", cents="INT64")
KEY: dict[str, Any] = {"type": "record", "name": "Account", "fields": [FIELDS[0]]}
ANN: dict[str, Any] = {"account": "ann", "cents": 5}
IMPATIENT: dict[str, Any] = {
    "schema.registry.max.retries": 1,
    "schema.registry.retries.wait.ms": 1,
    "schema.registry.retries.max.wait.ms": 1,
}


@dataclass
class Payment:
    account: str
    cents: int


class PaymentStruct(msgspec.Struct):
    account: str
    cents: int


class PaymentModel(pydantic.BaseModel):
    account: str
    cents: int


def opened(kind: Codec[Any], topic: str = "payments", part: Any = "value", **settings: Any) -> Codec[Any]:
    """The format, as it is used for a topic."""
    given = {"schema.registry.url": "mock://test", **IMPATIENT, **settings}
    bound = bound_codec(kind, CodecUse(topic, part, MappingProxyType(given)))
    assert isinstance(bound, Codec)
    return bound


FORMATS: list[Any] = [
    pytest.param(Avro(PAYMENT), ANN, id="avro"),
    pytest.param(Avro(PAYMENT, model=Payment), Payment("ann", 5), id="avro-dataclass"),
    pytest.param(Avro(PAYMENT, model=PaymentStruct), PaymentStruct("ann", 5), id="avro-struct"),
    pytest.param(Avro(PAYMENT, model=PaymentModel), PaymentModel(account="ann", cents=5), id="avro-pydantic"),
    pytest.param(JsonSchema(PAYMENT_JSON), ANN, id="json"),
    pytest.param(JsonSchema(PAYMENT_JSON, model=Payment), Payment("ann", 5), id="json-dataclass"),
    pytest.param(
        JsonSchema(PAYMENT_JSON, model=PaymentModel), PaymentModel(account="ann", cents=5), id="json-pydantic"
    ),
    pytest.param(Protobuf(PaymentMessage), PaymentMessage(account="ann", cents=5), id="protobuf"),
]


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "value"), FORMATS)
def test_value_comes_back_and_its_bytes_begin_with_the_id_of_its_schema(kind: Any, value: Any) -> None:
    decode, encode = value_codec(opened(kind))
    raw = encode(value)
    assert raw[:5] == b"\0" + (1).to_bytes(4, "big")
    assert decode(raw) == value
    assert type(decode(raw)) is type(value)
    decode, encode = key_codec(opened(kind, part="key"))
    assert decode(encode(value)) == value
    assert encode(value)[:5] == b"\0" + (1).to_bytes(4, "big"), "the same schema, under another subject"


def test_times_decimals_and_bytes_of_avro_are_those_of_python() -> None:
    @dataclass
    class Transfer:
        at: datetime
        amount: Decimal
        proof: bytes

    schema = {
        "type": "record",
        "name": "Transfer",
        "fields": [
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {
                "name": "amount",
                "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
            },
            {"name": "proof", "type": "bytes"},
        ],
    }
    codec = opened(Avro(schema, model=Transfer))
    transfer = Transfer(datetime(2026, 1, 1, tzinfo=UTC), Decimal("12.34"), b"\0\xff")
    assert codec.decode(codec.encode(transfer)) == transfer


def test_record_is_read_as_the_jobs_own_schema_says() -> None:
    older, newer = opened(Avro(PAYMENT)), opened(Avro(PAYMENT_2))
    assert newer.decode(older.encode(ANN)) == {**ANN, "status": "new"}
    assert older.decode(newer.encode({**ANN, "status": "settled"})) == ANN


def test_schema_is_given_as_text_as_a_dict_or_as_a_file(tmp_path: Path) -> None:
    text = msgspec.json.format(msgspec.json.encode(PAYMENT)).decode()
    (tmp_path / "payment.avsc").write_text(text)
    assert Avro(text) == Avro(PAYMENT) == Avro(tmp_path / "payment.avsc")
    assert hash(Avro(text)) == hash(Avro(PAYMENT))
    assert Avro(PAYMENT) != Avro(PAYMENT_2)
    assert Avro(PAYMENT) != Avro(PAYMENT, model=Payment)
    assert JsonSchema(PAYMENT_JSON) == JsonSchema(dict(PAYMENT_JSON)) != Avro(PAYMENT)
    assert Protobuf(PaymentMessage) == Protobuf(PaymentMessage)


def test_keys_with_equal_values_have_equal_bytes() -> None:
    encode = key_codec(opened(JsonSchema(PAYMENT_JSON), part="key"))[1]
    assert encode(ANN) == encode(dict(reversed(ANN.items())))


# --- in a job ---------------------------------------------------------------------------------------------


def spending(**options: Any) -> tuple[Job, Any, Any]:
    job = Job("spend")
    dead = job.topic("payments-dead", key="bytes", value="bytes")
    payments = job.topic("payments", value=Avro(PAYMENT), on_error=dead)
    totals = job.topic("totals", key=Avro(KEY), value=Avro(PAYMENT, model=Payment, **options))

    def add(ctx: Context[Any], payment: dict[str, Any]) -> Payment:
        assert ctx.key == {"account": payment["account"]}
        ctx.state["cents"] = ctx.state.get("cents", 0) + payment["cents"]
        return Payment(payment["account"], ctx.state["cents"])

    stream = job.stream(payments).filter(lambda payment: payment["cents"] != 0, on_error=dead)
    keyed = stream.key_by(lambda payment: {"account": payment["account"]}, key=Avro(KEY), name="account")
    keyed.process(add, to=totals, on_error=dead)
    return job, payments, totals


def test_job_reads_and_writes_formats_of_a_registry_without_one() -> None:
    job, payments, totals = spending()
    with Driver(job) as driver:
        for cents in (5, 0, 7):
            driver.send(payments, {"account": "ann", "cents": cents})
        driver.crash()
        driver.send(payments, {"account": "ann", "cents": 1})
        assert driver.read_values(totals) == [Payment("ann", 5), Payment("ann", 12), Payment("ann", 13)]
        assert {record.key["account"] for record in driver.records(totals)} == {"ann"}


def test_job_is_declared_and_built_without_a_registry() -> None:
    spending()[0].build(Settings())
    assert not registry._registries


def test_topic_may_be_declared_twice_in_the_same_way() -> None:
    job = Job("spend")
    assert job.topic("payments", value=Avro(PAYMENT)) == job.topic("payments", value=Avro(dict(PAYMENT)))
    with pytest.raises(JobError, match="declared twice, in different ways"):
        job.topic("payments", value=Avro(PAYMENT_2))


def test_other_schema_of_keys_is_incompatible_and_of_values_is_not() -> None:
    def job(key: dict[str, Any], value: dict[str, Any]) -> Any:
        job = Job("spend")
        stream = job.stream(job.topic("payments", value=Avro(value)))
        keyed = stream.key_by("account", key=Avro(key), value=Avro(value), name="account")
        keyed.process(lambda ctx, payment: payment, name="count", to=job.topic("out"))
        return job.build(Settings())

    described = job(KEY, PAYMENT).describe()
    assert incompatibility(described, job(KEY, PAYMENT_2)) is None
    other = {**KEY, "name": "Customer"}
    found = incompatibility(described, job(other, PAYMENT))
    assert found is not None
    assert "used to write keys and values as avro-" in found


@pytest.mark.parametrize("kind", [Avro(KEY), JsonSchema(PAYMENT_JSON), Protobuf(PaymentMessage)], ids=str)
def test_topics_whose_keys_have_the_same_schema_are_joined(kind: Any) -> None:
    job = Job("spend")
    accounts = job.table(job.topic("accounts", key=kind))
    payments = job.topic("payments", key=kind)
    job.stream(payments).join(accounts).to(job.topic("out", key=kind))
    key = PaymentMessage(account="ann") if isinstance(kind, Protobuf) else {"account": "ann"}
    key = {**ANN} if isinstance(kind, JsonSchema) else key
    with Driver(job) as driver:
        driver.send("accounts", "Ann", key=key)
        driver.send(payments, 5, key=key)
        assert [record.value for record in driver.records("out")] == [{"left": 5, "right": "Ann"}]
        assert driver.rows(accounts) == [(key, "Ann")]


# --- what doesn't fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"account": "ann"}', "it doesn't begin with the id of a schema"),
        (b"", "it doesn't begin with the id of a schema"),
        (
            b"\0\0\0\0\x63abc",
            "it was written with the schema 99, which the registry mock://driver doesn't have",
        ),
    ],
)
def test_record_that_is_not_of_the_registry_is_a_dead_letter(raw: bytes, message: str) -> None:
    job, payments, _totals = spending()
    with Driver(job) as driver:
        driver.send_raw(payments, raw)
        (letter,) = driver.dead_letters()
        assert message in letter.error
        assert letter.record.raw_value == raw


def test_record_that_does_not_fit_the_jobs_schema_is_a_dead_letter() -> None:
    job, payments, _totals = spending()
    other: dict[str, Any] = {**PAYMENT, "fields": [{"name": "account", "type": "string"}]}
    with Driver(job) as driver:
        driver.send(payments, ANN)
        url = {"schema.registry.url": "mock://driver"}
        client = next(iter(registry._registries.values())).client
        assert client is registry.registry_for(CodecUse("payments", "value", MappingProxyType(url))).client
        short = bound_codec(Avro(other), CodecUse("payments", "value", MappingProxyType(url)))
        driver.send_raw(payments, value_codec(short)[1]({"account": "ann"}))
        driver.send_raw(payments, value_codec(payments.value)[1](ANN)[:6])
        first, second = driver.dead_letters()
    assert "doesn't fit the one that the job declares: " in first.error
    assert "cents" in first.error
    assert "doesn't fit the one that the job declares: " in second.error


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        (Avro(PAYMENT), {"account": "ann"}, "cents"),
        (Avro(PAYMENT), {**ANN, "cents": "5"}, "cents"),
        (Avro(PAYMENT), {**ANN, "cent": 5}, "cent"),
        (JsonSchema(PAYMENT_JSON), {**ANN, "cents": "5"}, "'5' is not of type 'integer'"),
        (Avro(PAYMENT, model=Payment), Payment("ann", "5"), "cents"),  # type: ignore[arg-type]
    ],
)
def test_value_that_does_not_fit_is_not_written(kind: Any, value: Any, named: str) -> None:
    with pytest.raises(ModelError, match="it doesn't fit the schema of 'payments-value'") as caught:
        value_codec(opened(kind))[1](value)
    assert named in str(caught.value)


def test_json_that_fits_none_of_several_schemas_names_the_field_of_the_closest_one() -> None:
    line = {"type": "object", "properties": {"cents": {"type": "integer"}}, "required": ["cents"]}
    schema = {"properties": {"lines": {"items": {"anyOf": [line, {"type": "null"}]}}}}
    with pytest.raises(ModelError, match=r"closest: '5' is not of type 'integer', at \$\.lines\[1\]\.cents"):
        opened(JsonSchema(schema)).encode({"lines": [{"cents": 5}, {"cents": "5"}]})


@pytest.mark.parametrize("name", ["#/definitions/none", "http://127.0.0.1:1/none.json"])
def test_json_schema_that_refers_to_nothing_stops_the_job(name: str) -> None:
    """Otherwise all records would be dead letters."""
    with pytest.raises(FormatUnusable, match="refers to what can't be found") as caught:
        opened(JsonSchema({"properties": {"a": {"$ref": name}}})).encode({"a": 1})
    assert "Correct the $ref" in caught.value.remedy


@pytest.mark.parametrize("draft", ["draft-04", "draft-06", "draft-07", "2019-09", "2020-12"])
def test_json_schemas_of_all_drafts_are_known(draft: str) -> None:
    old = draft.startswith("draft")
    uri = (
        f"http://json-schema.org/{draft}/schema#" if old else f"https://json-schema.org/draft/{draft}/schema"
    )
    names = "definitions" if old else "$defs"
    schema = {
        "$schema": uri,
        names: {"count": {"type": "integer", "minimum": 0}},
        "properties": {"n": {"$ref": f"#/{names}/count"}, "mail": {"format": "email"}},
    }
    codec = opened(JsonSchema(schema))
    value = {"n": 2**70, "mail": "formats aren't checked"}
    assert codec.decode(codec.encode(value)) == value
    with pytest.raises(ModelError, match=r"-1 is less than the minimum of 0, at \$\.n"):
        codec.encode({"n": -1})


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 1.7),
        ("int", True),
        ("int", 2**31),
        ("long", 12.99),
        ("long", 2**63),
        (["null", "int"], 1.7),
        ("boolean", "false"),
        ("boolean", 1),
        ("string", b"text"),
        ({"type": "array", "items": "int"}, [1, 2.5]),
    ],
)
def test_avro_writes_no_other_value_than_it_is_given(kind: Any, value: Any, part: Any) -> None:
    schema = {"type": "record", "name": "R", "fields": [{"name": "amount", "type": kind}]}
    write = (key_codec if part == "key" else value_codec)(opened(Avro(schema), part=part))[1]
    with pytest.raises(ModelError, match=r"R\.amount"):
        write({"amount": value})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 2**31 - 1),
        ("long", -(2**63)),
        (["null", "int", "double"], 1.7),
        (["null", "int"], None),
        ("boolean", False),
        ({"type": "map", "values": "long"}, {"a": 1}),
        ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, "B"),
        ({"type": "fixed", "name": "F", "size": 2}, b"ab"),
    ],
)
def test_avro_writes_what_fits(kind: Any, value: Any) -> None:
    schema = {"type": "record", "name": "R", "fields": [{"name": "amount", "type": kind}]}
    codec = opened(Avro(schema))
    assert codec.decode(codec.encode({"amount": value})) == {"amount": value}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Avro(PAYMENT, model=Payment), ANN),
        (Protobuf(PaymentMessage), ANN),
        (JsonSchema({}, model=Payment), 5),
    ],
)
def test_object_of_another_class_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="but Payment is declared there"):
        value_codec(opened(kind))[1](value)


def test_model_that_can_not_be_told_from_another_is_refused_when_it_is_declared() -> None:
    @dataclass
    class Other:
        cents: int

    with pytest.raises(
        JobError, match=r"model=Either of Avro can't be used: TypeError: Type unions"
    ) as caught:
        Avro(PAYMENT, model=make_dataclass("Either", [("one", Payment | Other)]))
    assert "leave model= out" in caught.value.remedy


def test_object_that_does_not_fit_its_model_is_named() -> None:
    @dataclass
    class Strict:
        account: int
        cents: int

    raw = opened(Avro(PAYMENT)).encode(ANN)
    with pytest.raises(ModelError, match=r"Expected `int`, got `str` - at `\$\.account`"):
        opened(Avro(PAYMENT, model=Strict)).decode(raw)


def test_output_that_does_not_fit_is_an_error_of_the_step() -> None:
    job = Job("spend")
    dead = job.topic("dead", value="bytes")
    source, sink = job.topic("in"), job.topic("out", value=Avro(PAYMENT))
    job.stream(source).to(sink, on_error=dead)
    with Driver(job) as driver:
        driver.send(source, {"account": "ann"})
        driver.send(source, ANN)
        (letter,) = driver.dead_letters()
        assert "it doesn't fit the schema of 'out-value'" in letter.error
        assert driver.read_values(sink) == [ANN]


# --- registries that don't help ---------------------------------------------------------------------------


def reading_from(url: str, **settings: Any) -> tuple[Driver, Any]:
    job, payments, _totals = spending()
    return Driver(job, settings={"schema.registry.url": url, **IMPATIENT, **settings}), payments


FRAMED = b"\0\0\0\0\x01" + b"\x06ann\x0a"


def test_registry_that_can_not_be_reached_stops_the_job_and_makes_no_dead_letter() -> None:
    with StubRegistry((200, {})) as stub:
        pass  # nothing listens there any more
    driver, payments = reading_from(stub.url)
    with driver, pytest.raises(JobStopped) as stopped:
        driver.send_raw(payments, FRAMED)
    assert f"the schema registry {stub.url} can't be reached" in stopped.value.message
    assert "start the job again if it has stopped: it goes on with this record" in stopped.value.remedy
    assert driver.dead_letters() == []
    assert driver.skipped == 0


def test_handler_that_reads_its_key_makes_no_dead_letter_while_the_registry_is_down() -> None:
    job = Job("spend")
    dead = job.topic("dead", key="bytes", value="bytes")
    payments = job.topic("payments", key=Avro(KEY))
    job.stream(payments).process(lambda ctx, value: ctx.key, name="read", on_error=dead)
    with StubRegistry((503, {"error_code": 50301, "message": "starting"})) as stub:
        driver = Driver(job, settings={"schema.registry.url": stub.url, **IMPATIENT})
        with driver, pytest.raises(JobStopped, match="can't answer"):
            driver.send_raw(payments, b"1", key=FRAMED)
        registry.close_registries()
    assert driver.dead_letters() == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "Not Found", "path": "/schemas/ids/1"}), "HTTP status 404, no message"),
        ((404, {"error_code": 404, "message": "HTTP 404 Not Found"}), "HTTP status 404, HTTP 404 Not Found"),
        ((404, b"<html>"), "HTTP status 404, Unknown Schema Registry Error: b'<html>'"),
        ((200, b"<html>please log in</html>"), "it answered '<html>please log in</html>'"),
        ((200, {"status": "maintenance"}), "its answer has neither a schema nor an id"),
        ((200, b"[]"), "its answer can't be read (TypeError"),
        ((200, b""), "its answer can't be read (AttributeError"),
    ],
)
def test_answer_that_is_not_of_a_registry_stops_the_job(answer: Any, message: str) -> None:
    with StubRegistry(answer) as stub:
        driver, payments = reading_from(stub.url)
        with driver, pytest.raises(JobStopped) as stopped:
            driver.send_raw(payments, FRAMED)
        with pytest.raises(FormatUnusable, match="doesn't answer as a schema registry does"):
            opened(Avro(PAYMENT), **{"schema.registry.url": stub.url}).encode(ANN)
        registry.close_registries()
    assert f"{stub.url} doesn't answer as a schema registry does: {message}" in stopped.value.message
    assert "Check schema.registry.url" in stopped.value.remedy
    assert driver.dead_letters() == []


def test_wrong_answer_is_not_kept() -> None:
    found = (200, {"schema": json.dumps(PAYMENT)})
    with StubRegistry((200, {"status": "maintenance"}), found) as stub:
        codec = opened(Avro(PAYMENT), **{"schema.registry.url": stub.url})
        with pytest.raises(FormatUnusable):
            codec.decode(FRAMED)
        assert codec.decode(FRAMED) == ANN
        registry.close_registries()


def test_schema_that_the_registry_does_not_have_is_the_records_fault() -> None:
    with StubRegistry((404, {"error_code": 40403, "message": "Schema not found"})) as stub:
        driver, payments = reading_from(stub.url)
        with driver:
            driver.send_raw(payments, FRAMED)
            (letter,) = driver.dead_letters()
        with pytest.raises(FormatUnusable, match="when that is to be registered") as caught:
            opened(Avro(PAYMENT), **{"schema.registry.url": stub.url}).encode(ANN)
        registry.close_registries()
    assert f"which the registry {stub.url} doesn't have: Schema not found" in letter.error
    assert "may not register" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message", "remedy"),
    [
        (
            (503, {"error_code": 50301, "message": "starting"}),
            "can't answer (HTTP status 503): starting",
            "log",
        ),
        (
            (401, {"error_code": 401, "message": "who?"}),
            "refuses access (HTTP status 401): who?",
            "user.info",
        ),
    ],
)
def test_registry_that_does_not_answer_stops_the_job(answer: Any, message: str, remedy: str) -> None:
    with StubRegistry(answer) as stub:
        driver, payments = reading_from(stub.url)
        with driver, pytest.raises(JobStopped) as stopped:
            driver.send_raw(payments, FRAMED)
        registry.close_registries()
    assert message in stopped.value.message
    assert remedy in stopped.value.remedy
    assert driver.dead_letters() == []


def test_registry_is_asked_again_until_it_answers() -> None:
    busy, found = (503, {}), (200, {"schema": msgspec.json.encode(PAYMENT).decode()})
    registered = (200, {"id": 7})
    with StubRegistry(busy, busy, found, registered) as stub:
        driver, payments = reading_from(stub.url, **{"schema.registry.max.retries": 5})
        with driver:
            driver.send_raw(payments, FRAMED)
            driver.send_raw(payments, FRAMED)
            assert driver.dead_letters() == []
        registry.close_registries()
    reads = [path for method, path in stub.requests if method == "GET"]
    assert len(reads) == 3, "the schema is kept once it is known"
    assert reads[0].startswith("/schemas/ids/1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (409, {"error_code": 409, "message": "reader lacks cents"}),
            "doesn't go with those that are registered",
        ),
        ((422, {"error_code": 42201, "message": "no"}), "refuses the schema of 'out-value' as invalid"),
        ((403, {"error_code": 403, "message": "no"}), "refuses access"),
    ],
)
def test_schema_that_the_registry_refuses_stops_the_job(answer: Any, message: str) -> None:
    job = Job("spend")
    source, sink = job.topic("in"), job.topic("out", value=Avro(PAYMENT))
    job.stream(source).to(sink, on_error="skip")
    with StubRegistry(answer) as stub:
        driver = Driver(job, settings={"schema.registry.url": stub.url, **IMPATIENT})
        with driver, pytest.raises(JobStopped) as stopped:
            driver.send(source, ANN)
        registry.close_registries()
    assert message in stopped.value.message
    assert driver.skipped == 0


def test_schema_that_may_not_be_registered_has_to_be_there() -> None:
    job, payments, totals = spending(auto_register=False)
    with Driver(job) as driver, pytest.raises(JobStopped, match="the job may not register it") as stopped:
        driver.send(payments, ANN)
    assert "auto_register=True" in stopped.value.remedy
    registry.close_registries()
    job, payments, totals = spending(auto_register=False)
    with Driver(job) as driver:
        driver.send(payments, {**ANN, "cents": 0})
        client = next(iter(registry._registries.values())).client
        client.register_schema("totals-value", Schema(json.dumps(PAYMENT), "AVRO"))
        driver.send(payments, ANN)
        assert driver.read_values(totals) == [Payment("ann", 5)]


def test_registry_that_is_not_set_is_named_with_the_setting() -> None:
    codec = opened(Avro(PAYMENT), **{"schema.registry.url": ""})
    with pytest.raises(FormatUnusable, match=r"schema\.registry\.url isn't set") as caught:
        codec.encode(ANN)
    assert "FCLUSTER_SCHEMA_REGISTRY_URL" in caught.value.remedy


@pytest.mark.parametrize(
    "settings",
    [
        {"schema.registry.url": "localhost:8081"},
        {"schema.registry.url": "http://registry:8081x"},
        {"schema.registry.url": "http://registry:8081,ftp://registry"},
        {"schema.registry.max.retries": "some"},
    ],
)
def test_settings_that_the_client_does_not_take_are_named(settings: dict[str, str]) -> None:
    with pytest.raises(FormatUnusable, match=r"the settings schema\.registry\.\* can't be used"):
        opened(Avro(PAYMENT), **settings).encode(ANN)


def test_password_in_the_url_is_not_shown() -> None:
    with StubRegistry((401, {"error_code": 401, "message": "no"})) as stub:
        url = stub.url.replace("//", "//ann:hunter2@")
        with pytest.raises(FormatUnusable) as caught:
            opened(Avro(PAYMENT), **{"schema.registry.url": url}).encode(ANN)
        registry.close_registries()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["ann:hunter2@registry:8081", "http://ann:hunter2/@registry", "hunter2"])
def test_password_in_what_is_not_a_url_is_not_shown(url: str) -> None:
    with pytest.raises(FormatUnusable, match=r"schema\.registry\.url isn't a URL") as caught:
        opened(Avro(PAYMENT), **{"schema.registry.url": url}).encode(ANN)
    assert "hunter2" not in str(caught.value)


# --- declarations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Avro("payment.avsc"), "The Avro schema isn't valid"),
        (lambda: Avro({"type": "recrod"}), "The Avro schema isn't valid"),
        (lambda: Avro(5), "The Avro schema is 5, a int"),
        (lambda: Avro(Path("no-such-file.avsc")), "can't be read"),
        (lambda: Avro(PAYMENT, model=dict), "is not a model"),
        (lambda: JsonSchema({"type": 5}), "The JSON schema isn't valid"),
        (lambda: Protobuf(dict), "is not a class of messages"),
        (lambda: Protobuf(PaymentMessage()), "is not a class of messages"),
    ],
)
def test_what_can_not_be_used_is_refused_when_it_is_declared(declare: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        declare()


@pytest.mark.parametrize(
    "kind",
    [
        Avro({"type": "map", "values": "string"}),
        Avro({"type": "record", "name": "Point", "fields": [{"name": "x", "type": ["null", "double"]}]}),
        Avro({"type": "array", "items": "float"}),
        Protobuf(message_class("Point", x="DOUBLE")),
    ],
)
def test_key_of_which_equal_values_have_different_bytes_is_refused(kind: Any) -> None:
    with pytest.raises(JobError, match="equal values"):
        Job("spend").topic("payments", key=kind)


@pytest.mark.parametrize(
    "state", [ValueState("last", Avro(PAYMENT)), MapState("all", key=Avro('"string"'))], ids=["value", "key"]
)
def test_state_takes_no_format_of_a_registry(state: Any) -> None:
    job = Job("spend")
    with pytest.raises(JobError, match="can't be used for state, which no other program reads"):
        job.stream(job.topic("in")).process(lambda ctx, value: None, name="keep", states=[state])


def test_key_by_has_to_have_a_name_for_its_schema() -> None:
    job = Job("spend")
    with pytest.raises(JobError, match="has no name, under which its schema could be "):
        job.stream(job.topic("in")).key_by("account", key=Avro(KEY))
    job = Job("spend")
    stream = job.stream(job.topic("in")).key_by(lambda value: value, key=Avro(KEY), name="account")
    stream.process(lambda ctx, value: None, name="count")
    with Driver(job) as driver:
        driver.send("in", {"account": "ann"})
    (subject,) = next(iter(registry._registries.values())).client.get_subjects()
    assert subject.startswith("spend-account-repartition")


@pytest.mark.parametrize(
    ("conf", "limit_s", "timeout_s", "retries"),
    [
        pytest.param({}, 60.0, 5.0, 3, id="defaults"),
        pytest.param({"max.retries": 1_000}, 60.0, 5.0, 6, id="many retries"),
        pytest.param({"max.retries": 1_000, "retries.max.wait.ms": 0}, 60.0, 5.0, 11, id="no pauses"),
        pytest.param({"url": "http://a,http://b"}, 60.0, 5.0, 3, id="two addresses"),
        pytest.param({"timeout": 600.0}, 60.0, 60.0, 0, id="a long timeout"),
        pytest.param({}, 0.2, 0.2, 0, id="little time"),
    ],
)
def test_requests_take_less_time_than_a_record_may(
    conf: dict[str, Any], limit_s: float, timeout_s: float, retries: int
) -> None:
    given = {"url": "http://a", **registry._DEFAULTS, **conf}
    found = registry.within_limit(given, limit_s)
    assert (found["timeout"], found["max.retries"]) == (timeout_s, retries)
    assert {**found, "timeout": 0, "max.retries": 0} == {**given, "timeout": 0, "max.retries": 0}


def test_registry_is_not_asked_for_longer_than_the_settings_allow_for_a_record() -> None:
    settings = {"schema.registry.max.retries": "50", "record.timeout.ms": "1000"}
    codec: Any = opened(Avro(PAYMENT), **settings)
    assert codec.encode(ANN)
    (known,) = registry._registries.values()
    client = known.client._rest_client
    assert (client.max_retries, client.timeout) == (0, 0.2)


def test_schema_that_another_worker_is_registering_is_asked_for_again() -> None:
    busy, registered = (409, {"error_code": 409, "message": "exists"}), (200, {"id": 7})
    with StubRegistry(busy, busy, registered) as stub:
        encode = value_codec(opened(Avro(PAYMENT), **{"schema.registry.url": stub.url}))[1]
        assert encode(ANN)[:5] == b"\0\0\0\0\x07"
        registry.close_registries()


@pytest.mark.parametrize(
    ("package", "declare"),
    [
        ("fastavro", lambda: Avro(PAYMENT)),
        ("jsonschema.validators", lambda: JsonSchema({})),
        ("google.protobuf.message", lambda: Protobuf(PaymentMessage)),
        ("confluent_kafka.schema_registry", lambda: opened(Avro(PAYMENT)).encode(ANN)),
    ],
)
def test_extra_that_is_not_installed_is_named(
    package: str, declare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FclusterError, match="needs packages that aren't installed") as caught:
        declare()
    assert caught.value.remedy == "Run: pip install 'fcluster[schema-registry]'"


def test_record_of_a_handler_is_written_in_the_format_of_its_topic() -> None:
    job = Job("spend")
    source = job.topic("in")
    by_key = job.topic("by-key", key=Avro(KEY), value=Protobuf(PaymentMessage))

    @job.process(source)
    def split(ctx: Context[str], value: dict[str, Any]) -> Record:
        return Record(key={"account": ctx.key}, value=PaymentMessage(cents=value["cents"]), topic=by_key)

    with Driver(job) as driver:
        driver.send(source, {"cents": 5}, key="ann")
        (record,) = driver.records(by_key)
        assert (record.key, record.value) == ({"account": "ann"}, PaymentMessage(cents=5))
