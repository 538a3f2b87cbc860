"""Ids of schemas that a job writes to headers, and ids in headers that it must not pass on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
from confluent_kafka.schema_registry import (
    header_schema_id_serializer,
    prefix_schema_id_serializer,
    topic_subject_name_strategy,
)
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufDeserializer, ProtobufSerializer
from confluent_kafka.serialization import SerializationContext

from fcluster import Codec, CodecUse, Context, Job, Record, Tumbling, Watermark, count, seconds
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.engine.dead_letters import write_dead_letter
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.framing import compile_parting, without_stale_ids
from fcluster.engine.letter_limit import LetterLimit
from fcluster.graph.operators import TopicSpec
from fcluster.schema_registry import Avro, JsonSchema, Protobuf, registry
from fcluster.testing import Driver, JobStopped
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
TO_HEADERS = header_schema_id_serializer
CONF = {"subject.name.strategy": topic_subject_name_strategy, "schema.id.serializer": TO_HEADERS}
READING = {"subject.name.strategy": topic_subject_name_strategy}
TRACE = ("trace", b"t1")
KEY_ID, VALUE_ID = ("__key_schema_id", b"\1" + bytes(16)), ("__value_schema_id", b"\1" + bytes(range(16)))


def payment(account: str = "ann", at: int = 5) -> dict[str, Any]:
    return {"account": account, "at": at}


def client_of(driver_url: str = "mock://driver") -> Any:
    settings = MappingProxyType({"schema.registry.url": driver_url})
    return registry.registry_for(CodecUse("any", "value", settings)).client


def in_headers(schema: Any) -> Avro[Any]:
    return Avro(schema, schema_id_serializer=TO_HEADERS)


def names_of(record: Any) -> list[str]:
    return [name for name, _value in record.headers]


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        pytest.param(in_headers(PAYMENT), payment("annabel"), id="avro"),
        pytest.param(JsonSchema(PAYMENT_JSON, schema_id_serializer=TO_HEADERS), payment(), id="json"),
        pytest.param(
            Protobuf(PaymentMessage, schema_id_serializer=TO_HEADERS),
            PaymentMessage(account="ann", at=5),
            id="protobuf",
        ),
    ],
)
def test_value_is_written_as_by_other_programs_that_write_ids_to_headers(kind: Any, value: Any) -> None:
    job = Job("j")
    source, out = job.topic("in", value="json"), job.topic("out", value=kind)
    job.stream(source).map(lambda _value: value).to(out)
    with Driver(job) as driver:
        driver.send(source, 1, headers=[TRACE])
        (record,) = driver.records(out)
        assert record.value == value
        context = SerializationContext("out", "value", [TRACE])
        client: Any = client_of()
        writer: Any
        reader: Any
        if isinstance(kind, Protobuf):
            writer = ProtobufSerializer(PaymentMessage, client, CONF)
            reader = ProtobufDeserializer(PaymentMessage, READING, client)
        elif isinstance(kind, JsonSchema):
            writer = JSONSerializer(json.dumps(PAYMENT_JSON), client, conf=CONF)
            reader = JSONDeserializer(None, schema_registry_client=client, conf=READING)
            assert json.loads(record.raw_value or b"") == value, "so programs without a registry read it"
        else:
            writer = AvroSerializer(client, json.dumps(PAYMENT), conf=CONF)
            reader = AvroDeserializer(client, conf=READING)
        if isinstance(kind, JsonSchema):
            writer(value, context)
        else:
            assert writer(value, context) == record.raw_value
        assert context.headers == record.headers
        assert reader(record.raw_value, SerializationContext("out", "value", record.headers)) == value


def test_keys_have_ids_in_headers_and_the_data_alone_chooses_the_partition() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out", key=in_headers(ACCOUNT), value=in_headers(PAYMENT))
    raw = job.topic("raw", key="bytes")
    job.stream(source).key_by(lambda value: {"account": value["account"]}).to(out)
    job.stream(source).key_by(lambda value: b"\x06ann", key="bytes").to(raw)
    with Driver(job, partitions=8) as driver:
        driver.send(source, payment())
        (record,), (same,) = driver.records(out), driver.records(raw)
        assert (record.key, record.value) == ({"account": "ann"}, payment())
        assert (record.raw_key, record.raw_value) == (b"\x06ann", b"\x06ann\x0a")
        assert names_of(record) == ["__key_schema_id", "__value_schema_id"]
        assert record.partition == same.partition


def test_null_keys_and_values_get_no_ids() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out", key=in_headers(ACCOUNT), value=in_headers(PAYMENT))
    job.process(source, name="p", to=out)(lambda ctx, value: Record(key=None, value=None, headers=[TRACE]))
    with Driver(job) as driver:
        driver.send(source, 1)
        (record,) = driver.records(out)
        assert (record.raw_key, record.raw_value, record.headers) == (None, None, [TRACE])


def test_state_tables_and_topics_between_stages_have_the_same_keys() -> None:
    """Also in the same partitions, whoever has written them."""
    key, value = in_headers(ACCOUNT), in_headers(PAYMENT)
    job = Job("j")
    source = job.topic("in")
    accounts = job.table(job.topic("accounts", key=key, value=value))
    by_account = job.stream(source).key_by(
        lambda one: {"account": one["account"]}, key=key, value=value, name="account"
    )

    def add(ctx: Context[Any], one: dict[str, Any]) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + one["at"]
        return {**one, "at": ctx.state["n"]}

    by_account.join(accounts, lambda one, row: {**one, "at": one["at"] + row["at"]}).to(
        job.topic("joined", key=key, value=value)
    )
    by_account.process(add, name="add", to=job.topic("added", key=key, value=value))
    with Driver(job, partitions=8) as driver:
        for name in ("ann", "bob", "eve"):
            driver.send("accounts", payment(name, 100), key={"account": name})
            driver.send(source, payment(name))
            driver.crash()
            driver.send(source, payment(name, 6))
        assert [one["at"] for one in driver.read_values("joined")] == [105, 106] * 3
        assert [one["at"] for one in driver.read_values("added")] == [5, 11] * 3
        rows = {key["account"]: row["at"] for key, row in driver.rows(accounts)}
        assert rows == {"ann": 100, "bob": 100, "eve": 100}


def test_records_on_their_way_are_read_when_the_format_of_a_repartition_has_changed() -> None:
    def job_with(value: Any) -> Job:
        job = Job("j")
        stream = job.stream(job.topic("in")).key_by("account", value=value, name="account")
        stream.map(lambda one: one["at"]).to(job.topic("out"))
        return job

    before, after = Avro(PAYMENT), in_headers(PAYMENT)
    with Driver(job_with(before), auto_barrier=False) as driver:
        for number, value in enumerate((after, before, after)):
            driver.send("in", payment(at=number))
            driver._commit()  # the second stage hasn't read it yet
            driver.restart(job_with(value))
        driver.settle()
        assert driver.read_values("out") == [0, 1, 2]


def test_driver_sends_as_the_topic_says() -> None:
    job = Job("j")
    source = job.topic("in", key=in_headers(ACCOUNT), value=in_headers(PAYMENT))
    job.stream(source).map(lambda one: one["at"]).to(job.topic("out", key="json"))
    with Driver(job) as driver:
        sent = driver.send(source, payment(), key={"account": "ann"}, headers=[TRACE])
        assert names_of(sent) == ["trace", "__key_schema_id", "__value_schema_id"]
        again = driver.send(source, payment(at=6), key={"account": "ann"}, headers=sent.headers)
        assert again.headers == sent.headers, "each id is there once"
        assert (again.raw_key, again.value) == (b"\x06ann", payment(at=6))
        (first, _second) = driver.records("out")
        assert (first.key, first.value, first.headers) == ({"account": "ann"}, 5, [TRACE])


def test_registry_without_guids_stops_the_job_and_nothing_becomes_a_dead_letter() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out", value=in_headers(PAYMENT))
    job.stream(source).map(lambda one: one, on_error="skip").to(out)
    with StubRegistry((200, {"id": 5})) as stub:
        with (
            Driver(job, settings={"schema.registry.url": stub.url}) as driver,
            pytest.raises(JobStopped, match="gives no GUID for a schema") as stopped,
        ):
            driver.send(source, payment())
        registry.close_registries()
    assert "leave out schema_id_serializer=" in stopped.value.remedy


def test_declaration_takes_the_functions_of_the_client() -> None:
    assert Avro(PAYMENT, schema_id_serializer=prefix_schema_id_serializer) == Avro(PAYMENT)
    assert in_headers(PAYMENT) != Avro(PAYMENT)
    use = CodecUse("in", "key", MappingProxyType({}))
    assert in_headers(ACCOUNT).name_for(use) == f"{Avro(ACCOUNT).name_for(use)}-guid", "other bytes"
    wrong: Any = "header"
    for declare in (
        lambda: Avro(PAYMENT, schema_id_serializer=wrong),
        lambda: JsonSchema(PAYMENT_JSON, schema_id_serializer=wrong),
        lambda: Protobuf(PaymentMessage, schema_id_serializer=wrong),
    ):
        with pytest.raises(JobError, match="got schema_id_serializer='header'") as refused:
            declare()
        assert "header_schema_id_serializer of confluent_kafka.schema_registry" in refused.value.remedy


def test_topics_with_keys_in_both_forms_are_not_joined() -> None:
    job = Job("j")
    accounts = job.table(job.topic("accounts", key=Avro(ACCOUNT)))
    stream = job.stream(job.topic("in")).key_by(lambda one: one, key=in_headers(ACCOUNT), name="account")
    stream.join(accounts, lambda one, row: one).to(job.topic("out", key="json"))
    with pytest.raises(JobError, match="whose keys are of different kinds"):
        Driver(job)


# --- ids that are stale -----------------------------------------------------------------------------------


def passed_on(kind: Any, build: Any, **topics: Any) -> Any:
    """The record that comes of one with ids in its headers and the key and value b"1"."""
    job = Job("j")
    source = job.topic("in", key="bytes", value=kind)
    out = job.topic("out", **topics)
    build(job, job.stream(source), out)
    with Driver(job) as driver:
        driver.send_raw(source, b"1", key=b"1", headers=[KEY_ID, TRACE, VALUE_ID])
        driver.settle()
        (record,) = driver.records(out)
        return record


def through_handler(result: Any) -> Any:
    def build(job: Job, stream: Any, out: Any) -> None:
        stream.process(lambda ctx, value: result(ctx, value), name="p", to=out)

    return build


BOTH = [KEY_ID, TRACE, VALUE_ID]


@pytest.mark.parametrize(
    ("kind", "build", "kept"),
    [
        pytest.param("bytes", lambda job, one, out: one.filter(bool).to(out), BOTH, id="filtered"),
        pytest.param("bytes", lambda job, one, out: one.map(bytes).to(out), BOTH, id="mapped to the same"),
        pytest.param("bytes", lambda job, one, out: one.map(lambda _: b"2").to(out), BOTH[:2], id="mapped"),
        pytest.param("json", lambda job, one, out: one.map(lambda _: 2).to(out), BOTH[:2], id="json"),
        pytest.param(
            "bytes",
            lambda job, one, out: one.key_by(lambda _: b"k", key="bytes").to(out),
            BOTH[1:],
            id="another key",
        ),
        pytest.param(
            "bytes",
            lambda job, one, out: one.key_by(lambda _: b"k", key="bytes", name="k").filter(bool).to(out),
            BOTH[1:],
            id="another key, through a topic",
        ),
        pytest.param("bytes", through_handler(lambda ctx, _: Record()), BOTH, id="record of nothing"),
        pytest.param("bytes", through_handler(lambda ctx, _: Record(value=b"2")), BOTH[:2], id="record"),
        pytest.param("json", through_handler(lambda ctx, _: Record(key=b"2")), BOTH[1:], id="record's key"),
        pytest.param(
            "json",
            through_handler(lambda ctx, _: Record(value=2, headers=[*ctx.headers, ("more", b"")])),
            [*BOTH[:2], ("more", b"")],
            id="its own headers again",
        ),
        pytest.param(
            "json",
            through_handler(lambda ctx, _: Record(value=2, headers=[(VALUE_ID[0], b"mine")])),
            [(VALUE_ID[0], b"mine")],
            id="json with an id of the job's own",
        ),
        pytest.param(
            "bytes",
            through_handler(lambda ctx, _: Record(value=b"2", headers=ctx.headers)),
            BOTH,
            id="bytes with the headers that the job wants",
        ),
        pytest.param("bytes", through_handler(lambda ctx, _: Record(value=None)), BOTH[:2], id="tombstone"),
    ],
)
def test_id_is_passed_on_with_the_same_bytes_only(kind: Any, build: Any, kept: Any) -> None:
    assert passed_on(kind, build, key="bytes", value=kind).headers == kept


def test_id_is_not_passed_on_behind_a_handler_whose_headers_go_through_further_steps() -> None:
    def build(job: Job, stream: Any, out: Any) -> None:
        def changed(ctx: Context[Any], value: Any) -> Any:
            return Record(value=2, headers=ctx.headers)

        stream.process(changed, name="p").map(lambda value: value).to(out)

    assert passed_on("json", build, key="bytes").headers == BOTH[:2]


def test_formats_with_ids_leave_out_what_was_in_headers() -> None:
    def build(job: Job, stream: Any, out: Any) -> None:
        def changed(ctx: Context[Any], value: Any) -> Any:
            return Record(key={"account": "ann"}, value=payment(), headers=[*ctx.headers, (*VALUE_ID,)])

        stream.process(changed, name="p", to=out)

    record = passed_on("json", build, value=Avro(PAYMENT), key=Avro(ACCOUNT))
    assert record.headers == [TRACE]
    assert (record.key, record.value) == ({"account": "ann"}, payment())


def test_row_of_a_table_does_not_get_the_id_of_another_record() -> None:
    assert without_stale_ids([VALUE_ID], Sent(b"k", b"v", [VALUE_ID]), b"k", b"v") == [VALUE_ID]
    assert without_stale_ids([VALUE_ID], Sent(b"k", b"v", [VALUE_ID]), b"k", b"row") == []


class Sent:
    """A record that was read."""

    def __init__(self, key: bytes | None, value: bytes | None, headers: Any) -> None:
        self._fields = key, value, headers

    def key(self) -> Any:
        return self._fields[0]

    def value(self) -> Any:
        return self._fields[1]

    def headers(self) -> Any:
        return self._fields[2]

    def timestamp(self) -> tuple[int, int]:
        return 1, 5

    def topic(self) -> Any:
        return "in"

    def partition(self) -> Any:
        return 0

    def offset(self) -> Any:
        return 7


def test_stub_of_a_dead_letter_keeps_the_id_of_its_key() -> None:
    written: list[Any] = []

    def produce(*fields: Any) -> None:
        if fields[1] is not None:
            raise OutputRefusedError(refusal)
        written.append(fields)

    refusal = Failure.of_record("it is too large", "raise the limit")
    record, letters = Sent(b"k", b"v", [TRACE, VALUE_ID, KEY_ID]), LetterLimit().of(ShardId("in", 0))
    write_dead_letter(produce, TopicSpec("dead", "bytes", "bytes"), record, "step", "bad", letters)
    (fields,) = written
    assert fields[2] == b"k"
    assert fields[4][0] == KEY_ID
    assert VALUE_ID not in fields[4]
    assert TRACE not in fields[4]


def test_topics_without_ids_need_nothing() -> None:
    plain: Codec[Any] = Codec("own", bytes, bytes)
    for kind in ("json", "bytes", plain):
        assert compile_parting(TopicSpec("out", "text", kind)) is None


# --- one form of each key ---------------------------------------------------------------------------------

FORMS = {"in front": Avro(ACCOUNT), "in headers": in_headers(ACCOUNT)}


@pytest.mark.parametrize("read", FORMS)
@pytest.mark.parametrize("declared", FORMS)
@pytest.mark.parametrize("written", FORMS)
def test_equal_keys_are_equal_bytes_whatever_writes_them(read: str, declared: str, written: str) -> None:
    job = Job("j")
    source = job.topic("in", key=FORMS[declared], watermark=Watermark())
    out = job.topic("out", key=FORMS[written])
    stream = job.stream(source)
    stream.to(out)

    def answer(ctx: Context[Any], value: Any) -> Iterator[Any]:
        yield value
        yield Record(value=value)
        yield Record(value=value, topic=out)
        yield Record(key=ctx.key, value=value)

    stream.process(answer, name="answer", to=out)
    stream.window(Tumbling(seconds(1)), late=out, name="w").aggregate(n=count()).to(out)
    with Driver(job) as driver:
        key: Any = {"account": "ann"}
        headers: list[Any] = []
        conf = CONF if read == "in headers" else READING
        serialize = AvroSerializer(client_of(), json.dumps(ACCOUNT), conf=conf)
        raw = serialize(key, SerializationContext("in", "key", headers))
        for at in (10_000, 20_000, 5_000):  # the last one is late
            driver.send_raw(source, b"1", key=raw, timestamp=at, headers=headers)
        records = driver.records(out)
        assert driver.late == 1
        assert len(records) == 3 * 5 + 2
        assert {record.key["account"] for record in records} == {"ann"}
        forms = {(record.raw_key, tuple(record.headers)) for record in records}
        assert len(forms) == 1
        ((raw, found),) = forms
        if written == "in headers":
            assert raw == b"\x06ann"
            assert [name for name, _id in found] == ["__key_schema_id"]
        else:
            assert raw is not None
            assert (raw[:1], found) == (b"\0", ())


@pytest.mark.parametrize(
    ("read", "written", "raw", "expected"),
    [("text", "json", b"a", b'"a"'), ("json", "text", b'"a"', b"a"), ("bytes", "text", b"a", b"a")],
)
def test_record_without_a_key_has_the_key_of_its_topic(
    read: Any, written: Any, raw: bytes, expected: bytes
) -> None:
    job = Job("j")
    source, out = job.topic("in", key=read), job.topic("out", key=written)

    @job.process(source, to=out)
    def answer(ctx: Context[Any], value: Any) -> Iterator[Record]:
        yield Record(value=value)
        yield Record(value=value, topic=out)

    with Driver(job) as driver:
        driver.send_raw(source, b"1", key=raw)
        driver.send_raw(source, b"1")
        assert [record.raw_key for record in driver.records(out)] == [expected, expected, None, None]


def test_record_without_a_value_has_that_of_its_topic() -> None:
    job = Job("j")
    source = job.topic("in", value=in_headers(PAYMENT))
    outs = [
        job.topic("avro", value=Avro(PAYMENT)),
        job.topic("headers", value=in_headers(PAYMENT)),
        job.topic("json"),
        job.topic("bytes", value="bytes"),
    ]

    @job.process(source)
    def spread(ctx: Context[Any], value: Any) -> Iterator[Record]:
        for out in outs:
            yield Record(topic=out)

    with Driver(job) as driver:
        sent = driver.send(source, payment())
        driver.send(source, None)
        avro, headers, plain, raw = map(driver.records, outs)
        assert avro[0].value == headers[0].value == plain[0].value == payment()
        assert (avro[0].raw_value or b"")[:1] == b"\0"
        assert (headers[0].raw_value, names_of(headers[0])) == (sent.raw_value, ["__value_schema_id"])
        found = (sent.headers[0][1] or b"") + (sent.raw_value or b"")
        assert raw[0].raw_value == found, "bytes have the id in front"
        assert [names_of(avro[0]), names_of(plain[0]), names_of(raw[0])] == [[], [], []]
        assert [records[1].value for records in (avro, headers, plain, raw)] == [None] * 4
