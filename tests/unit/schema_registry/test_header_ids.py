"""Records that have the ids of their schemas in headers, as confluent-kafka's serializers write them."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import header_schema_id_serializer, topic_subject_name_strategy
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from fcluster import CodecUse, Context, Job
from fcluster.engine.framing import compile_framing
from fcluster.engine.records import Headers
from fcluster.graph.codecs import Kind, bound_codec
from fcluster.graph.operators import TopicSpec
from fcluster.graph.stages import Input
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, registry
from fcluster.testing import Driver, JobStopped
from fcluster.testing.topics import StoredRecord, Visibility
from tests.unit.schema_registry.messages import message_class
from tests.unit.schema_registry.stub import StubRegistry

PAYMENT: dict[str, Any] = {
    "type": "record",
    "name": "Payment",
    "fields": [{"name": "account", "type": "string"}, {"name": "at", "type": "long"}],
}
ACCOUNT: dict[str, Any] = {"type": "record", "name": "Account", "fields": [PAYMENT["fields"][0]]}
PAYMENT_JSON: dict[str, Any] = {"type": "object", "required": ["account"]}
PaymentMessage = message_class("Payment", account="STRING", at="INT64")
CONF = {
    "subject.name.strategy": topic_subject_name_strategy,
    "schema.id.serializer": header_schema_id_serializer,
}
TRACE = ("trace", b"t1")
GUID = bytes(range(16))


def payment(account: str = "ann", at: int = 5) -> dict[str, Any]:
    return {"account": account, "at": at}


class Producer:
    """Another program, which writes to a topic of the job."""

    def __init__(self, driver: Driver, topic: Any) -> None:
        self._driver = driver
        self._topic = topic
        settings = MappingProxyType({"schema.registry.url": "mock://driver"})
        self._client = registry.registry_for(CodecUse(topic.name, "value", settings)).client

    def serializer(self, kind: Any) -> Any:
        if isinstance(kind, Protobuf):
            return ProtobufSerializer(PaymentMessage, self._client, CONF)
        if isinstance(kind, JsonSchema):
            return JSONSerializer(json.dumps(PAYMENT_JSON), self._client, conf=CONF)
        return AvroSerializer(self._client, json.dumps(ACCOUNT if kind is KEY else PAYMENT), conf=CONF)

    def send(self, value: Any, key: Any = None, kind: Any = None) -> Any:
        headers: list[tuple[str, bytes | None]] = [TRACE]
        of_value = SerializationContext(self._topic.name, MessageField.VALUE, headers)
        of_key = SerializationContext(self._topic.name, MessageField.KEY, headers)
        raw = None if value is None else self.serializer(kind or VALUE)(value, of_value)
        raw_key = key.encode() if isinstance(key, str) else key and self.serializer(KEY)(key, of_key)
        assert len(headers) == 1 + (raw is not None) + isinstance(key, dict), "or nothing is tested"
        return self._driver.send_raw(self._topic, raw, key=raw_key, headers=headers)


KEY: Avro[Any] = Avro(ACCOUNT)
VALUE: Avro[Any] = Avro(PAYMENT)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        pytest.param(Avro(PAYMENT), payment(), id="avro"),
        pytest.param(JsonSchema(PAYMENT_JSON), payment(), id="json"),
        pytest.param(Protobuf(PaymentMessage), PaymentMessage(account="ann", at=5), id="protobuf"),
    ],
)
def test_value_with_its_id_in_a_header_is_read_like_any_other(kind: Any, value: Any) -> None:
    job = Job("j")
    source, out = job.topic("in", value=kind), job.topic("out", value=kind)
    job.stream(source).filter(lambda value: True).to(out)
    with Driver(job) as driver:
        sent = Producer(driver, source).send(value, kind=kind)
        assert sent.value == value
        (record,) = driver.records(out)
        assert record.value == value
        assert record.raw_value[:1] == b"\0"
        assert record.headers == [TRACE], "the id of the former schema isn't passed on"
        driver.send(source, value)
        assert driver.read_values(out) == [value, value], "ids may be in front of the data as well"


def test_state_tables_and_topics_between_stages_keep_the_ids_with_the_bytes() -> None:
    job = Job("j")
    source = job.topic("in", key=KEY, value=VALUE)
    by_text = job.topic("by-text", value=VALUE)
    accounts = job.table(job.topic("accounts", value=VALUE))
    out = job.topic("out", key="json")

    def count(ctx: Context[Any], value: dict[str, Any]) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return [ctx.key["account"], value["at"], ctx.state["n"]]

    job.stream(source).process(count, name="count", to=out)
    kept = job.stream(source).key_by(lambda value: {"account": value["account"]}, key=KEY, name="again")
    kept.process(lambda ctx, value: value["at"], name="see", to=job.topic("seen", key="json"))
    job.stream(by_text).join(accounts, lambda value, row: row["at"] + value["at"]).to(job.topic("joined"))
    with Driver(job) as driver:
        of_source, of_text = Producer(driver, source), Producer(driver, by_text)
        of_source.send(payment(), {"account": "ann"})
        driver.crash()
        of_source.send(payment(at=6), {"account": "ann"})
        of_source.send(payment("bob"), {"account": "bob"})
        assert driver.read_values(out) == [["ann", 5, 1], ["ann", 6, 2], ["bob", 5, 1]]
        assert driver.read_values("seen") == [5, 6, 5]
        Producer(driver, job.topic("accounts", value=VALUE)).send(payment(at=100), "a")
        assert driver.rows(accounts) == [("a", payment(at=100))]
        driver.crash()
        of_text.send(payment(at=1), "a")
        assert driver.read_values("joined") == [101]


def test_time_in_the_value_orders_records_of_several_topics() -> None:
    job = Job("j")
    first = job.topic("first", value=VALUE, timestamp="at")
    second = job.topic("second", value=VALUE, timestamp="at")
    out = job.topic("out")
    job.merge(job.stream(first), job.stream(second)).map(lambda value: value["at"]).to(out)
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        Producer(driver, first).send(payment(at=7))
        Producer(driver, second).send(payment(at=3))
        driver.settle()
        driver.crash()
        assert sorted(record.timestamp for record in driver.records(out)) == [3, 7]


def test_calls_get_the_value() -> None:
    job = Job("j")
    source, out = job.topic("in", key=KEY, value=VALUE), job.topic("out", key="json")

    async def look_up(_call: Any, value: dict[str, Any]) -> Any:
        return value["at"] + 1

    job.stream(source).map_async(look_up).to(out)
    with Driver(job) as driver:
        Producer(driver, source).send(payment(), {"account": "ann"})
        (record,) = driver.records(out)
        assert (record.key, record.value) == ({"account": "ann"}, 6)


def test_dead_letter_is_as_the_record_was_read() -> None:
    job = Job("j")
    dead = job.topic("dead", key="bytes", value="bytes")
    source = job.topic("in", key=KEY, value=VALUE, on_error=dead, timestamp="at")

    def fail(value: dict[str, Any]) -> None:
        raise ValueError("no good")

    job.stream(source).map(fail, on_error=dead).to(job.topic("out", key="json"))
    with Driver(job) as driver:
        sent = Producer(driver, source).send(payment(), {"account": "ann"})
        unknown = [("__value_schema_id", b"\1" + GUID), TRACE]
        driver.send_raw(source, b"x", headers=unknown)
        failed, unreadable = driver.dead_letters()
        assert (failed.record.raw_key, failed.record.raw_value) == (sent.raw_key, sent.raw_value)
        assert failed.record.headers[:3] == sent.headers
        assert unreadable.record.raw_value == b"x"
        assert unreadable.record.headers[:2] == unknown
        assert "with the schema 00010203-0405-0607-0809-0a0b0c0d0e0f, which" in unreadable.error
        driver.send_raw(source, b"x", headers=[("__key_schema_id", b"\1" + GUID)])
        assert "and no header '__value_schema_id' of the record has one" in driver.dead_letters()[2].error


def test_registry_is_asked_for_the_schema_by_its_guid() -> None:
    found = (200, {"schema": json.dumps(PAYMENT)})
    job = Job("j")
    source, out = job.topic("in", value=VALUE), job.topic("out")
    job.stream(source).to(out)
    with StubRegistry(found) as stub:
        with Driver(job, settings={"schema.registry.url": stub.url}) as driver:
            driver.send_raw(source, b"\x06ann\x0a", headers=[("__value_schema_id", b"\1" + GUID)])
            assert driver.read_values(out) == [payment()]
        assert stub.requests[0][1].startswith("/schemas/guids/00010203-0405-0607-0809-0a0b0c0d0e0f")
        registry.close_registries()


def test_registry_that_knows_no_guids_stops_the_job_and_is_named() -> None:
    job = Job("j")
    source = job.topic("in", value=VALUE, on_error="skip")
    job.stream(source).to(job.topic("out"))
    with StubRegistry((404, {"error_code": 404, "message": "no such path"})) as stub:
        with (
            Driver(job, settings={"schema.registry.url": stub.url}) as driver,
            pytest.raises(JobStopped, match="doesn't know schemas by their GUIDs") as stopped,
        ):
            driver.send_raw(source, b"\x06ann\x0a", headers=[("__value_schema_id", b"\1" + GUID)])
        registry.close_registries()
    assert "prefix_schema_id_serializer" in stopped.value.remedy


# --- records ----------------------------------------------------------------------------------------------


def input_of(key: Kind, value: Kind, *, internal: bool = False) -> Input:
    return Input(TopicSpec("in", key, value), internal)


def record_of(headers: Headers | None, key: bytes | None = b"k", value: bytes | None = b"v") -> StoredRecord:
    return StoredRecord(("in", 0, 0), key, value, 5, headers, 0, Visibility.COMMITTED)


@pytest.mark.parametrize("kind", ["json", "bytes", "text", "int", "msgpack"])
def test_other_codecs_get_their_records_as_they_are(kind: Any) -> None:
    assert compile_framing(input_of(kind, kind)) is None


def test_ids_of_headers_are_put_in_front_and_the_first_one_counts() -> None:
    use = CodecUse("in", "value", MappingProxyType({}))
    frame = compile_framing(input_of("text", bound_codec(VALUE, use)))
    assert frame is not None
    plain = record_of([TRACE])
    assert frame(plain) is plain
    assert frame(record_of(None)).headers() is None
    first = b"\1" + GUID
    headers = [("__value_schema_id", first), TRACE, ("__value_schema_id", b"2"), ("__key_schema_id", b"3")]
    found = frame(record_of(headers))
    assert (found.key(), found.value()) == (b"k", first + b"v"), "keys are text here"
    assert found.headers() == [TRACE, ("__key_schema_id", b"3")]
    longer = frame(record_of([("__value_schema_id", first + b"more")]))
    assert longer.value() == first + b"v", "other programs don't read on, either"
    shorter = frame(record_of([("__value_schema_id", first[:9])]))
    assert (shorter.value(), shorter.headers()) == (b"v", []), "it must not go on in the data"
    assert (found.topic(), found.partition(), found.offset(), found.timestamp()[1]) == ("in", 0, 0, 5)
    deleted = frame(record_of([("__value_schema_id", b"1")], value=None))
    assert (deleted.value(), deleted.headers()) == (None, [])
    assert frame(record_of([("__value_schema_id", None)])).value() == b"v"
