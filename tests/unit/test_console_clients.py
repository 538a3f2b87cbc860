from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common.errors import KafkaUnavailable, MissingTopic
from fcluster.console_clients import (
    DeliveryError,
    InputError,
    Progress,
    ReadError,
    format_message,
    kafka_errors,
    near_names,
    parse_line,
    run_consume,
    run_produce,
)


class FakeMessage:
    def __init__(
        self, value: bytes | None, key: bytes | None = b"k", offset: int = 7, error: KafkaError | None = None
    ) -> None:
        self._value, self._key, self._offset, self._error = value, key, offset, error

    def topic(self) -> str:
        return "flights"

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return (1, 1_700_000_000_000)

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def error(self) -> KafkaError | None:
        return self._error


def line_of(value: bytes | None, key: bytes | None = b"k") -> dict[str, Any]:
    line = format_message(FakeMessage(value, key))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return json.loads(line)


# --- the format of a line ------------------------------------------------------------------------------


def test_line_has_the_documented_fields_in_their_order() -> None:
    document = line_of(b'{"n": 1}')
    assert list(document) == ["topic", "partition", "offset", "timestamp", "key", "value"]
    assert document == {
        "topic": "flights",
        "partition": 3,
        "offset": 7,
        "timestamp": 1_700_000_000_000,
        "key": "k",
        "value": {"n": 1},
    }


def test_value_that_is_not_json_is_printed_as_text() -> None:
    assert line_of("grüße {".encode())["value"] == "grüße {"


def test_value_that_is_not_text_is_printed_as_marked_base64() -> None:
    document = line_of(b"\xff\x00")
    assert base64.b64decode(document["value"]) == b"\xff\x00"
    assert document["value_encoding"] == "base64"
    assert "key_encoding" not in document


def test_key_that_is_not_text_is_printed_as_marked_base64() -> None:
    document = line_of(b"1", key=b"\x00\xfe")
    assert base64.b64decode(document["key"]) == b"\x00\xfe"
    assert document["key_encoding"] == "base64"


def test_missing_key_and_value_are_null() -> None:
    document = line_of(None, key=None)
    assert document["key"] is None
    assert document["value"] is None


def test_json_keeps_digits_that_a_float_would_lose() -> None:
    line = format_message(FakeMessage(b'{"n": 12345678901234567890.123456789}'))
    assert b"12345678901234567890.123456789" in line


def test_json_over_several_lines_is_printed_on_one() -> None:
    assert line_of(b'{\r\n  "n":\n 1\n}')["value"] == {"n": 1}


@given(
    st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists, max_leaves=5)
)
def test_any_json_value_comes_out_as_it_went_in(value: Any) -> None:
    assert line_of(json.dumps(value, indent=1).encode())["value"] == value


@given(st.binary(), st.binary())
def test_any_bytes_make_one_readable_line(value: bytes, key: bytes) -> None:
    line_of(value, key)


# --- consume -------------------------------------------------------------------------------------------


class FakeConsumer:
    def __init__(self, messages: Sequence[FakeMessage] = (), topics: Sequence[str] = ("flights",)) -> None:
        self._messages = list(messages)
        self._topics = {name: SimpleNamespace(partitions={1: None, 0: None}) for name in topics}
        self.assigned: dict[int, int] = {}
        self.closed = False

    def list_topics(self, timeout: float) -> Any:
        return SimpleNamespace(topics=self._topics)

    def get_watermark_offsets(self, partition: Any, timeout: float) -> tuple[int, int]:
        return (10 + partition.partition, 90 + partition.partition)

    def assign(self, partitions: Sequence[Any]) -> None:
        self.assigned = {p.partition: p.offset for p in partitions}

    def poll(self, timeout: float) -> FakeMessage | None:
        if not self._messages:
            raise KeyboardInterrupt
        return self._messages.pop(0)

    def consume(self, count: int, timeout: float) -> list[FakeMessage]:
        taken, self._messages = self._messages[:count], self._messages[count:]
        return taken

    def close(self) -> None:
        self.closed = True


def consume(consumer: FakeConsumer, **options: Any) -> list[dict[str, Any]]:
    output = io.BytesIO()
    try:
        run_consume(consumer, "flights", output, **{"from_beginning": False, **options})
    except KeyboardInterrupt:
        pass
    assert consumer.closed
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_consume_begins_after_the_newest_record() -> None:
    consumer = FakeConsumer()
    consume(consumer)
    assert consumer.assigned == {0: 90, 1: 91}


def test_consume_from_the_beginning_begins_at_the_oldest_record() -> None:
    consumer = FakeConsumer()
    consume(consumer, from_beginning=True)
    assert consumer.assigned == {0: 10, 1: 11}


def test_consume_ends_after_the_wanted_number_of_records() -> None:
    consumer = FakeConsumer([FakeMessage(b"1", offset=n) for n in range(5)])
    assert [document["offset"] for document in consume(consumer, count_max=3)] == [0, 1, 2]


def test_consume_prints_what_came_before_an_interrupt() -> None:
    consumer = FakeConsumer([FakeMessage(b"1"), FakeMessage(b"2")])
    assert [document["value"] for document in consume(consumer)] == [1, 2]


def test_consume_waits_out_what_the_client_repairs_itself() -> None:
    lost = FakeMessage(None, error=KafkaError(KafkaError._ALL_BROKERS_DOWN))
    assert len(consume(FakeConsumer([lost, FakeMessage(b"1")]))) == 1


def test_consume_ends_when_the_topic_may_not_be_read() -> None:
    refused = FakeMessage(None, error=KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(ReadError):
        consume(FakeConsumer([refused]))


def test_consume_of_a_missing_topic_names_near_ones() -> None:
    consumer = FakeConsumer(topics=("flight", "flight-totals", "x", "__consumer_offsets"))
    with pytest.raises(MissingTopic) as raised:
        consume(consumer)
    assert raised.value.message == "topic 'flights' doesn't exist"
    assert raised.value.remedy == "Did you mean 'flight' or 'flight-totals'?"
    assert consumer.closed


def test_near_names_ignore_case_and_internal_topics() -> None:
    assert near_names("flights", ["Flights", "__flights"]) == ["Flights"]


def test_error_of_the_client_becomes_one_for_users() -> None:
    with pytest.raises(KafkaUnavailable, match="timed out"), kafka_errors():
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "it timed out"))


# --- produce -------------------------------------------------------------------------------------------


class FakeProducer(FakeConsumer):
    """Takes records until `refuse_from`; its queue is full once, at the second record."""

    def __init__(self, on_delivery: Callable[[Any, Any], None], refuse_from: int | None) -> None:
        super().__init__()
        self.sent: list[tuple[bytes | None, bytes]] = []
        self._on_delivery = on_delivery
        self._refuse_from = refuse_from
        self._full_once = True

    def produce(self, topic: str, value: bytes, key: bytes | None) -> None:
        if len(self.sent) == 1 and self._full_once:
            self._full_once = False
            raise BufferError
        self.sent.append((key, value))

    def poll(self, timeout: float) -> None:
        return None

    def flush(self, timeout: float) -> int:
        if self._refuse_from is not None:
            for _ in self.sent[self._refuse_from :]:
                self._on_delivery(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "too large"), None)
            self._refuse_from = None
        return 0


class Produced:
    def __init__(
        self, lines: Sequence[bytes], key_field: str | None = None, refuse_from: int | None = None
    ) -> None:
        self.producer: FakeProducer | None = None
        self._refuse_from = refuse_from
        self.run = lambda: run_produce(self._make, "flights", lines, key_field=key_field)

    def _make(self, **extra: Any) -> FakeProducer:
        assert extra["delivery.report.only.error"]
        self.producer = FakeProducer(extra["on_delivery"], self._refuse_from)
        return self.producer

    @property
    def sent(self) -> list[tuple[bytes | None, bytes]]:
        assert self.producer is not None
        return self.producer.sent


def test_produce_sends_lines_as_they_stand_in_order() -> None:
    produced = Produced([b'{"a":  1}\n', b"\n", b"2.50\r\n", b'"x"'])
    assert produced.run() == 3
    assert produced.sent == [(None, b'{"a":  1}'), (None, b"2.50"), (None, b'"x"')]


@pytest.mark.parametrize(
    ("value", "key"),
    [('"UA"', b"UA"), ("12", b"12"), ("1.50", b"1.5"), ("true", b"true"), ('"ä"', "ä".encode())],
)
def test_produce_takes_the_key_from_its_field(value: str, key: bytes) -> None:
    line = parse_line(f'{{"carrier": {value}}}'.encode(), 1, "carrier")
    assert line is not None
    assert line.key == key


def test_produce_stops_at_a_bad_line_and_says_how_many_were_sent() -> None:
    produced = Produced([b"1", b"2", b"", b"{oops", b"5"])
    with pytest.raises(InputError) as raised:
        produced.run()
    assert raised.value.message.startswith("line 4 isn't JSON:")
    assert raised.value.message.endswith("sent before it: 2 records, nothing after it")
    assert [value for _, value in produced.sent] == [b"1", b"2"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"x": 1}', "line 1 has no field 'carrier' to take the key from"),
        (b"[1]", "line 1 has no field 'carrier' to take the key from"),
        (b'{"carrier": null}', "line 1 has null in field 'carrier', which can't be a key"),
        (b'{"carrier": {"a": 1}}', "line 1 has {\"a\":1} in field 'carrier', which can't be a key"),
    ],
)
def test_produce_refuses_a_line_without_a_usable_key(line: bytes, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_line(line, 1, "carrier")
    assert raised.value.message == problem


def test_produce_refuses_bytes_that_are_not_text() -> None:
    with pytest.raises(InputError, match="line 9 isn't JSON"):
        parse_line(b'"\xff"', 9, None)


def test_produce_that_the_brokers_refuse_says_why_and_how_many_were_taken() -> None:
    produced = Produced([b"1", b"2", b"3"], refuse_from=2)
    with pytest.raises(DeliveryError) as raised:
        produced.run()
    assert raised.value.message == "too large; written to 'flights' before: 2 records"


def test_produce_to_a_missing_topic_says_how_to_create_it() -> None:
    produced = Produced([b"1"])
    with pytest.raises(MissingTopic) as raised:
        run_produce(produced._make, "nosuch", [b"1"])
    assert "--partitions" in raised.value.remedy
    assert produced.sent == []


def test_progress_is_silent_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress("flights", stream)
    progress.show(5)
    progress.clear()
    assert stream.getvalue() == ""
