from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from confluent_kafka import KafkaError, KafkaException
from hypothesis import given
from hypothesis import strategies as st

from fcluster.cli import console_clients
from fcluster.cli.console_clients import (
    DeliveryError,
    InputError,
    Progress,
    ReadError,
    Sent,
    existing_partitions,
    format_message,
    kafka_errors,
    parse_line,
    run_consume,
    run_produce,
)
from fcluster.common.errors import KafkaUnavailable, MissingTopic


class FakeMessage:
    def __init__(
        self,
        value: bytes | None,
        key: bytes | None = b"k",
        offset: int = 7,
        error: KafkaError | None = None,
        headers: list[tuple[str, bytes | None]] | None = None,
    ) -> None:
        self._value, self._key, self._offset, self._error = value, key, offset, error
        self._headers = headers

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

    def headers(self) -> list[tuple[str, bytes | None]] | None:
        return self._headers

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


def test_tombstone_is_distinguished_from_the_json_value_null() -> None:
    assert line_of(None)["tombstone"] is True
    assert "tombstone" not in line_of(b"null")


def test_headers_are_shown_on_request_whatever_they_contain() -> None:
    headers: list[tuple[str, bytes | None]] = [
        ("a", b"1"),
        ("a", b"\xff\x00"),
        ("e", b""),
        ("none", None),
    ]
    message = FakeMessage(b"1", headers=headers)
    assert "headers" not in json.loads(format_message(message))
    shown = json.loads(format_message(message, headers=True))["headers"]
    assert shown == [["a", "1"], ["a", {"base64": "/wA="}], ["e", ""], ["none", None]]
    assert json.loads(format_message(FakeMessage(b"1"), headers=True))["headers"] == []


def test_dead_letter_always_shows_its_reason_and_origin() -> None:
    headers: list[tuple[str, bytes | None]] = [
        ("fcluster.error", "KeyError: 'grüße'".encode()),
        ("fcluster.handler", b"count"),
        ("fcluster.topic", b"orders"),
        ("fcluster.partition", b"3"),
        ("fcluster.offset", b"17"),
        ("own", b"x"),
    ]
    letter = json.loads(format_message(FakeMessage(b"{", headers=headers)))["dead_letter"]
    assert letter == {
        "error": "KeyError: 'grüße'",
        "handler": "count",
        "topic": "orders",
        "partition": "3",
        "offset": "17",
    }


def test_header_named_like_ours_does_not_make_a_dead_letter() -> None:
    message = FakeMessage(b"1", headers=[("fcluster.topic", b"x")])
    assert "dead_letter" not in json.loads(format_message(message))


def test_json_over_several_lines_is_printed_on_one() -> None:
    assert line_of(b'{\r\n  "n":\n 1\n}')["value"] == {"n": 1}


@given(
    st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists, max_leaves=5)
)
def test_any_json_value_is_printed_unchanged(value: Any) -> None:
    assert line_of(json.dumps(value, indent=1).encode())["value"] == value


@given(st.binary(), st.binary())
def test_any_bytes_make_one_readable_line(value: bytes, key: bytes) -> None:
    line_of(value, key)


# --- consume -------------------------------------------------------------------------------------------


def topic_of(*partitions: int, error: KafkaError | None = None) -> Any:
    return SimpleNamespace(partitions=dict.fromkeys(partitions or (1, 0)), error=error)


class FakeConsumer:
    def __init__(self, messages: Sequence[FakeMessage] = (), topics: Sequence[str] = ("flights",)) -> None:
        self._messages = list(messages)
        self._topics = {name: topic_of() for name in topics}
        self.assigned: dict[int, int] = {}
        self.closed = False

    def list_topics(self, timeout: float) -> Any:
        return SimpleNamespace(topics=self._topics, brokers={1: None})

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


def test_consume_starts_after_the_newest_record() -> None:
    consumer = FakeConsumer()
    consume(consumer)
    assert consumer.assigned == {0: 90, 1: 91}


def test_consume_from_the_beginning_starts_at_the_oldest_record() -> None:
    consumer = FakeConsumer()
    consume(consumer, from_beginning=True)
    assert consumer.assigned == {0: 10, 1: 11}


def test_consume_asks_again_if_a_new_topic_has_no_leader_yet_or_an_offset_is_unknown() -> None:
    class Fresh(FakeConsumer):
        answers: ClassVar[list[Any]] = [KafkaError.NOT_LEADER_FOR_PARTITION, None, (-1001, -1001)]

        def get_watermark_offsets(self, partition: Any, timeout: float) -> Any:
            answer = self.answers.pop(0) if self.answers else (10, 90)
            if isinstance(answer, int):
                raise KafkaException(KafkaError(answer))
            return answer

    consumer = Fresh()
    consume(consumer)
    assert consumer.assigned == {0: 90, 1: 90}


def test_consume_ends_after_the_wanted_number_of_records() -> None:
    consumer = FakeConsumer([FakeMessage(b"1", offset=n) for n in range(5)])
    assert [document["offset"] for document in consume(consumer, count_max=3)] == [0, 1, 2]


def test_consume_prints_what_came_before_an_interrupt() -> None:
    consumer = FakeConsumer([FakeMessage(b"1"), FakeMessage(b"2")])
    assert [document["value"] for document in consume(consumer)] == [1, 2]


def test_consume_ignores_errors_that_the_client_recovers_from() -> None:
    lost = FakeMessage(None, error=KafkaError(KafkaError._ALL_BROKERS_DOWN))
    assert len(consume(FakeConsumer([lost, FakeMessage(b"1")]))) == 1


def test_consume_ends_when_the_topic_may_not_be_read() -> None:
    refused = FakeMessage(None, error=KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(ReadError):
        consume(FakeConsumer([refused]))


def test_consume_of_a_missing_topic_suggests_similar_ones() -> None:
    consumer = FakeConsumer(topics=("flight", "flight-totals", "x", "__consumer_offsets"))
    with pytest.raises(MissingTopic) as raised:
        consume(consumer)
    assert raised.value.message == "The topic 'flights' doesn't exist."
    assert raised.value.remedy == "Did you mean 'flight' or 'flight-totals'?"
    assert consumer.closed


def test_topic_that_the_brokers_do_not_know_yet_is_waited_for() -> None:
    late = FakeConsumer()
    fresh = KafkaError(KafkaError.LEADER_NOT_AVAILABLE)
    answers = [
        SimpleNamespace(topics={}, brokers={}),
        SimpleNamespace(topics={}, brokers={1: None}),
        SimpleNamespace(topics={"flights": topic_of(error=fresh)}, brokers={1: None}),
        SimpleNamespace(topics={"flights": SimpleNamespace(partitions={}, error=None)}, brokers={1: None}),
        SimpleNamespace(topics={"flights": topic_of(2, 0, 1)}, brokers={1: None}),
    ]
    late.list_topics = lambda timeout: answers.pop(0)  # type: ignore[method-assign]
    assert existing_partitions(late, "flights") == [0, 1, 2]
    assert not answers


def test_unknown_topic_state_does_not_count_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_clients, "METADATA_TIMEOUT_S", 0.3)
    monkeypatch.setattr(console_clients, "MISSING_S", 0.1)
    consumer = FakeConsumer()
    consumer.list_topics = lambda timeout: SimpleNamespace(topics={}, brokers={})  # type: ignore[method-assign]
    with pytest.raises(KafkaUnavailable, match="whether topic 'flights' exists"):
        existing_partitions(consumer, "flights")


def test_error_of_the_client_becomes_an_error_for_users() -> None:
    with pytest.raises(KafkaUnavailable, match="timed out"), kafka_errors():
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "it timed out"))


# --- produce -------------------------------------------------------------------------------------------


class FakeProducer(FakeConsumer):
    """Sends what is queued as one batch, which is refused as a whole because of one of its records. Its
    queue is
    full once, at the second record."""

    def __init__(self, refused: Mapping[bytes, int], too_large: Sequence[bytes]) -> None:
        super().__init__()
        self.sent: list[tuple[bytes | None, bytes]] = []
        self._refused, self._too_large = refused, too_large
        self._batch: list[tuple[bytes | None, bytes, Callable[[Any, Any], None]]] = []
        self._full_once = True

    def produce(
        self, topic: str, value: bytes, key: bytes | None, on_delivery: Callable[[Any, Any], None]
    ) -> None:
        if len(self._batch) == 1 and self._full_once:
            self._full_once = False
            raise BufferError
        if value in self._too_large:
            raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "too large"))
        self._batch.append((key, value, on_delivery))

    def poll(self, timeout: float) -> None:
        return None

    def flush(self, timeout: float) -> int:
        batch, self._batch = self._batch, []
        code = next((self._refused[value] for _, value, _ in batch if value in self._refused), None)
        if code is None:
            self.sent += [(key, value) for key, value, _ in batch]
        else:
            for _, _, on_delivery in batch:
                on_delivery(KafkaError(code, "no thanks"), None)
        return 0


class Produced:
    def __init__(
        self,
        lines: Sequence[bytes],
        key_field: str | None = None,
        *,
        refused: Mapping[bytes, int] | None = None,
        too_large: Sequence[bytes] = (),
        skip_errors: bool = False,
    ) -> None:
        self.producer = FakeProducer(refused or {}, too_large)
        self.run = lambda: run_produce(
            self._make, "flights", lines, key_field=key_field, skip_errors=skip_errors
        )

    def _make(self, **extra: Any) -> FakeProducer:
        assert extra["delivery.report.only.error"]
        return self.producer

    @property
    def sent(self) -> list[tuple[bytes | None, bytes]]:
        return self.producer.sent


def test_produce_sends_lines_unchanged_and_in_order() -> None:
    produced = Produced([b'{"a":  1}\n', b"\n", b"2.50\r\n", b'"x"'])
    assert produced.run() == Sent(3)
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


def test_line_that_kafka_refuses_is_named_with_the_number_sent_before() -> None:
    produced = Produced([b"1", b"", b"2", b"3", b"4"], refused={b"3": KafkaError.INVALID_RECORD})
    with pytest.raises(DeliveryError) as raised:
        produced.run()
    assert raised.value.message == (
        "line 4: Kafka refuses it: no thanks; written to 'flights' before it: 2 records"
    )
    assert "--skip-errors" in raised.value.remedy
    assert "--key-field" in raised.value.remedy
    assert [value for _, value in produced.sent] == [b"1", b"2"]


def test_line_that_the_client_refuses_is_named_too() -> None:
    produced = Produced([b"1", b"2", b"3"], too_large=[b"2"])
    with pytest.raises(DeliveryError) as raised:
        produced.run()
    assert raised.value.message.startswith("line 2: Kafka refuses it: too large; written to 'flights' before")
    assert "max.message.bytes" in raised.value.remedy
    assert [value for _, value in produced.sent] == [b"1"]


def test_refused_lines_are_skipped_and_named_and_all_others_are_sent_in_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    produced = Produced(
        [b"1", b"2", b"oops", b"3", b"4", b"5"],
        refused={b"2": KafkaError.INVALID_RECORD, b"4": KafkaError.MSG_SIZE_TOO_LARGE},
        too_large=[b"3"],
        skip_errors=True,
    )
    assert produced.run() == Sent(2, skipped=4)
    assert [value for _, value in produced.sent] == [b"1", b"5"]
    said = capsys.readouterr().err
    assert "skipped line 2: Kafka refuses it: no thanks" in said
    assert "skipped line 3: isn't JSON" in said
    assert "skipped line 4: Kafka refuses it: too large" in said
    assert "skipped line 5: Kafka refuses it: no thanks" in said


def test_many_skipped_lines_are_counted_and_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    produced = Produced([b"oops"] * 1000 + [b"1"], skip_errors=True)
    assert produced.run() == Sent(1, skipped=1000)
    assert len(capsys.readouterr().err.splitlines()) < 30


@pytest.mark.parametrize("code", [KafkaError._MSG_TIMED_OUT, KafkaError.TOPIC_AUTHORIZATION_FAILED])
def test_line_is_not_skipped_because_of_other_failures(code: int) -> None:
    produced = Produced([b"1", b"2"], refused={b"1": code}, skip_errors=True)
    with pytest.raises(DeliveryError) as raised:
        produced.run()
    assert raised.value.message == "no thanks, line 1; written to 'flights' before it: 0 records"


def test_bad_line_after_a_refused_one_does_not_hide_it() -> None:
    produced = Produced([b"1", b"oops"], refused={b"1": KafkaError.INVALID_RECORD})
    with pytest.raises(DeliveryError, match="line 1: Kafka refuses it"):
        produced.run()


@pytest.mark.parametrize("number", [2**64, -(2**70), 10**30 + 1])
def test_integer_beyond_64_bits_is_not_rounded_as_a_key(number: int) -> None:
    line = parse_line(f'{{"id": {number}}}'.encode(), 1, "id")
    assert line is not None
    assert line.key == str(number).encode()


@pytest.mark.parametrize("text", [b'{"id": NaN}', b'{"id": Infinity}', b"NaN", b"[-Infinity]"])
def test_nan_and_infinity_are_refused_because_json_lacks_them(text: bytes) -> None:
    with pytest.raises(InputError, match="line 1 isn't JSON"):
        parse_line(text, 1, None)


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
