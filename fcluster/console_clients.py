"""`fcluster consume` and `fcluster produce`: topics on the console, one JSON object a line.

Responsible for: what the two commands read, write and count. They are plain Kafka clients: they join no
group and commit no offset, so they never disturb a job. Must not parse options (that is `cli`) nor know
anything about clusters.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import select
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

import orjson

from fcluster.common.errors import FclusterError, KafkaUnavailable, MissingTopic

CONSUME_BATCH_MAX = 1_000
DELIVERY_TIMEOUT_S = 60.0
"""The brokers may be away for so long before a record counts as not taken."""
FLUSH_TIMEOUT_S = DELIVERY_TIMEOUT_S + 5
PROGRESS_INTERVAL_S = 0.25
METADATA_TIMEOUT_S = 10.0


class InputError(FclusterError):
    """A line on stdin can't be sent."""


class DeliveryError(FclusterError):
    """The brokers didn't take a record."""


class ReadError(FclusterError):
    """The brokers refuse to give records."""


class MessageLike(Protocol):
    """The part of `confluent_kafka.Message` that is used here."""

    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def error(self) -> Any: ...


@contextlib.contextmanager
def kafka_errors() -> Generator[None]:
    """What the Kafka client raises becomes an error for users."""
    from confluent_kafka import KafkaException

    try:
        yield
    except KafkaException as error:
        problem: Any = error.args[0] if error.args else error
        text = problem.str() if hasattr(problem, "str") else str(problem)
        raise KafkaUnavailable(
            f"Kafka refused or didn't answer: {text}", remedy="Check the brokers, and that you have access."
        ) from error


# --- topics ----------------------------------------------------------------------------------------


def near_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that `wanted` may have been meant to be, the likeliest first."""
    visible = sorted(name for name in names if not name.startswith("__"))
    lower = {name.lower(): name for name in visible}
    return [lower[name] for name in difflib.get_close_matches(wanted.lower(), lower, n=3, cutoff=0.6)]


def missing_topic(topic: str, names: Iterable[str], *, creatable: bool = False) -> MissingTopic:
    """The error for a topic that isn't there, naming what may have been meant."""
    existing = [name for name in names if not name.startswith("__")]
    near = near_names(topic, existing)
    if near:
        remedy = "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    elif existing:
        shown = ", ".join(sorted(existing)[:8])
        remedy = f"Topics there: {shown}{', ...' if len(existing) > 8 else ''}."
    else:
        remedy = "The cluster has no topics yet."
    if creatable:
        remedy += " To create it, give --partitions N."
    return MissingTopic(f"topic {topic!r} doesn't exist", remedy=remedy)


def existing_partitions(client: Any, topic: str, *, creatable: bool = False) -> list[int]:
    """The partitions of `topic`, ascending.

    Args:
        client: a Kafka consumer, producer or admin client.

    Raises:
        MissingTopic: it doesn't exist.
    """
    # All topics are listed: asking for one by name would let the broker create it.
    topics = client.list_topics(timeout=METADATA_TIMEOUT_S).topics
    if topic not in topics:
        raise missing_topic(topic, topics, creatable=creatable)
    return sorted(topics[topic].partitions)


# --- consume ---------------------------------------------------------------------------------------


def format_message(message: MessageLike) -> bytes:
    """One line (with its line end) of JSON for a record.

    Keys and values that are JSON stay JSON, character for character, so that no number loses a digit; other
    text becomes a string; what isn't UTF-8 becomes base64, marked by `"key_encoding"`/`"value_encoding"`.
    """
    document: dict[str, Any] = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "timestamp": message.timestamp()[1],
    }
    encodings: dict[str, str] = {}
    document["key"] = _text_or_base64(message.key(), "key", encodings)
    document["value"] = _json_or_text(message.value(), encodings)
    return orjson.dumps({**document, **encodings}, option=orjson.OPT_APPEND_NEWLINE)


def _json_or_text(value: bytes | None, encodings: dict[str, str]) -> Any:
    if value is None:
        return None
    try:
        orjson.loads(value)
    except orjson.JSONDecodeError:
        return _text_or_base64(value, "value", encodings)
    # Line ends in valid JSON are white space between tokens, never part of a string.
    return orjson.Fragment(value.replace(b"\n", b" ").replace(b"\r", b" "))


def _text_or_base64(data: bytes | None, field: str, encodings: dict[str, str]) -> str | None:
    if data is None:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        encodings[f"{field}_encoding"] = "base64"
        return base64.b64encode(data).decode("ascii")


def start_offsets(
    consumer: Any, topic: str, partitions: Sequence[int], from_beginning: bool
) -> dict[int, int]:
    """Where reading begins in each partition: at the oldest record, or after the newest one.

    Resolved before the first poll, so that a record produced after this call is never missed.
    """
    from confluent_kafka import TopicPartition

    offsets: dict[int, int] = {}
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(
            TopicPartition(topic, partition), timeout=METADATA_TIMEOUT_S
        )
        offsets[partition] = low if from_beginning else high
    return offsets


def messages_of(consumer: Any, *, idle: Callable[[], bool] = lambda: True) -> Iterator[list[MessageLike]]:
    """Batches of what the consumer is assigned to, for as long as `idle()` (asked between polls) is true.

    Raises:
        ReadError: the brokers refuse.
    """
    while idle():
        first = consumer.poll(0.2)
        if first is None:
            continue
        batch: list[MessageLike] = [first, *consumer.consume(CONSUME_BATCH_MAX, 0)]
        good = [message for message in batch if message.error() is None]
        if good:
            yield good
        for message in batch:
            _check_read(message.error())


def _check_read(error: Any) -> None:
    if error is None or not _ends_reading(error):
        return
    raise ReadError(
        f"reading failed: {error.str()}",
        remedy="Check that the topic still exists and that you may read it.",
    )


def _ends_reading(error: Any) -> bool:
    from confluent_kafka import KafkaError

    if error.fatal():
        return True
    # The client repairs internal errors (negative codes) such as "all brokers down" itself, but for these.
    lasting = (KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION, KafkaError._AUTHENTICATION)
    return error.code() in lasting or (error.code() > 0 and not error.retriable())


def run_consume(
    consumer: Any, topic: str, output: BinaryIO, *, from_beginning: bool, count_max: int | None = None
) -> int:
    """Print the records of `topic` until `count_max` of them are printed, or for ever; returns their number.

    Each line is flushed before the next wait. The consumer is closed at the end.
    """
    from confluent_kafka import TopicPartition

    printed = 0
    try:
        partitions = existing_partitions(consumer, topic)
        offsets = start_offsets(consumer, topic, partitions, from_beginning)
        consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in offsets.items()])
        if count_max == 0:
            return 0
        for batch in messages_of(consumer, idle=_reader_watch(output)):
            wanted = batch if count_max is None else batch[: count_max - printed]
            output.write(b"".join(map(format_message, wanted)))
            output.flush()
            printed += len(wanted)
            if printed == count_max:
                break
    finally:
        consumer.close()
    return printed


def _reader_watch(output: BinaryIO) -> Callable[[], bool]:
    """Whether someone still reads `output`: `fcluster consume | head` ends although no record comes."""
    try:
        descriptor = output.fileno()
    except OSError:  # a test's
        return lambda: True
    poller = select.poll()
    poller.register(descriptor, 0)
    return lambda: not any(events & (select.POLLERR | select.POLLHUP) for _, events in poller.poll(0))


# --- produce ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A record to send: the line's JSON text as it stood, and the key taken from it."""

    key: bytes | None
    value: bytes


def parse_line(text: bytes, number: int, key_field: str | None) -> Line | None:
    """The record in line `number` (from 1); None for a blank line.

    Raises:
        InputError: it isn't JSON, or has no usable `key_field`.
    """
    value = text.strip()
    if not value:
        return None
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"line {number} isn't JSON: {error.args[0]}: {_excerpt(value)}",
            remedy="Each line must be one complete JSON value.",
        ) from error
    return Line(_key_of(document, number, key_field), value)


def _key_of(document: Any, number: int, key_field: str | None) -> bytes | None:
    if key_field is None:
        return None
    fields = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    key = fields.get(key_field)
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, int | float):
        return orjson.dumps(key)
    if key_field in fields:
        problem = f"has {orjson.dumps(key).decode()[:40]} in field {key_field!r}, which can't be a key"
    else:
        problem = f"has no field {key_field!r} to take the key from"
    raise InputError(
        f"line {number} {problem}",
        remedy="Each line must be an object with a text or a number in that field.",
    )


def _excerpt(value: bytes) -> str:
    text = value[:60].decode("utf-8", "replace")
    return text + ("..." if len(value) > 60 else "")


def records(count: int) -> str:
    """A number of records in words."""
    return "1 record" if count == 1 else f"{count} records"


def create_topic(admin: Any, topic: str, partitions: int) -> None:
    """Create `topic`; one that exists already with that many partitions is fine.

    Raises:
        MissingTopic: it can't be created, or exists with another partition count.
    """
    from confluent_kafka.cimpl import NewTopic

    existing = admin.list_topics(timeout=METADATA_TIMEOUT_S).topics.get(topic)
    if existing is not None:
        if len(existing.partitions) != partitions:
            raise MissingTopic(
                f"topic {topic!r} exists with {len(existing.partitions)} partitions, not {partitions}",
                remedy="Leave out --partitions to write to it as it is.",
            )
        return
    future = admin.create_topics([NewTopic(topic, num_partitions=partitions)])[topic]
    try:
        future.result(METADATA_TIMEOUT_S)
    except Exception as error:
        raise MissingTopic(
            f"topic {topic!r} can't be created: {error}",
            remedy="Create it with your own tools, then leave out --partitions.",
        ) from error


class Progress:
    """A counter on a terminal's line, redrawn a few times a second; silent elsewhere."""

    def __init__(self, topic: str, stream: Any = None) -> None:
        self._topic = topic
        self._stream = stream if stream is not None else sys.stderr
        self._visible: bool = self._stream.isatty()
        self._started = time.monotonic()
        self._drawn = self._started

    def show(self, sent: int) -> None:
        """Redraw, if it is time to."""
        now = time.monotonic()
        if not self._visible or now - self._drawn < PROGRESS_INTERVAL_S:
            return
        self._drawn = now
        rate = sent / (now - self._started)
        self._stream.write(f"\r\x1b[K{sent:,} records to {self._topic}, {rate:,.0f}/s")
        self._stream.flush()

    def clear(self) -> None:
        """Leave the line empty for what is printed next."""
        if self._visible:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Sender:
    """Sends lines to one topic and knows how many the brokers took.

    Args:
        make: builds the producer from extra configuration; only failed deliveries are called back.
    """

    def __init__(self, make: Callable[..., Any], topic: str) -> None:
        self._topic = topic
        self._error: str = ""
        self._failed = 0
        self._produced = 0
        config = {
            "delivery.report.only.error": True,
            "on_delivery": self._on_delivery,
            "linger.ms": 20,
            "message.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
        }
        self.producer = make(**config)

    def _on_delivery(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failed += 1
            self._error = self._error or str(error.str())

    def send(self, line: Line) -> None:
        """Queue one record; waits while the queue is full.

        Raises:
            DeliveryError: an earlier record wasn't taken.
        """
        while True:
            try:
                self.producer.produce(self._topic, value=line.value, key=line.key)
                break
            except BufferError:
                self.producer.poll(0.1)
        self._produced += 1
        if self._produced % 1_000 == 0:
            self.producer.poll(0)
        if self._failed:
            self.raise_failure()

    def finish(self) -> int:
        """Wait until the brokers have taken everything that was queued; returns how many they took."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        # In short steps: a flush in C doesn't see Ctrl-C.
        while (remaining := int(self.producer.flush(0.2))) and time.monotonic() < deadline:
            pass
        if remaining and not self._error:
            self._error = f"the brokers didn't take {remaining} records within {FLUSH_TIMEOUT_S:.0f} s"
        self._failed += remaining
        return self._produced - self._failed

    @property
    def failed(self) -> int:
        """Records known not to be taken."""
        return self._failed

    def raise_failure(self) -> None:
        """Raises:
        DeliveryError: says why records weren't taken, and how many were.
        """
        taken = self.finish()
        raise DeliveryError(
            f"{self._error}; written to {self._topic!r} before: {records(taken)}",
            remedy="Check the brokers, then send the rest.",
        )


def run_produce(
    make: Callable[..., Any],
    topic: str,
    lines: Iterable[bytes],
    *,
    key_field: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Send each line as one record, in order; returns how many were sent.

    Raises:
        InputError: a line is bad; everything before it was sent, nothing from it on.
        DeliveryError: the brokers didn't take all of them.
        MissingTopic: the topic doesn't exist.
    """
    progress = progress if progress is not None else Progress(topic)
    sender = Sender(make, topic)
    existing_partitions(sender.producer, topic, creatable=True)
    count = 0
    try:
        for number, text in enumerate(lines, start=1):
            line = parse_line(text, number, key_field)
            if line is not None:
                sender.send(line)
                count += 1
                progress.show(count)
    except InputError as error:
        progress.clear()
        taken = sender.finish()
        raise InputError(
            f"{error.message}; sent before it: {records(taken)}, nothing after it",
            remedy=error.remedy,
        ) from error
    except KeyboardInterrupt:
        progress.clear()
        sys.stderr.write(f"\ninterrupted; sent to {topic!r}: {records(sender.finish())}\n")
        raise
    taken = sender.finish()
    progress.clear()
    if sender.failed:
        sender.raise_failure()
    return taken
