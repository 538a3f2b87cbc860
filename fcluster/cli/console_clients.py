"""`fcluster consume` and `fcluster produce`: topics on the console, one JSON object per line.

Responsible for: what the two commands read, write and count. They are plain Kafka clients: they join no group
and commit no offset, so they never disturb a job. Must not parse options (`commands` does that), and must not
know anything about clusters.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol, cast

import orjson

from fcluster.common.errors import FclusterError, KafkaUnavailable, MissingTopic
from fcluster.common.ids import colliding_topic
from fcluster.common.offsets import known_offset
from fcluster.kafka.missing import missing_topic
from fcluster.kafka.troubles import Trouble, trouble_of

CONSUME_BATCH_MAX = 1_000
DELIVERY_TIMEOUT_S = 60.0
"""How long the brokers may be down before a record counts as not delivered."""
FLUSH_TIMEOUT_S = DELIVERY_TIMEOUT_S + 5
PROGRESS_INTERVAL_S = 0.25
METADATA_TIMEOUT_S = 10.0
MISSING_S = 1.5
"""A topic counts as missing once the brokers have not known it for this long: a broker that has just started,
or a topic that has just been created, needs a moment.
"""
MISSING_POLL_S = 0.1
SKIPS_SHOWN_MAX = 20
_TO_CREATE = "To create it, give --partitions N."


class InputError(FclusterError):
    """A line on stdin can't be sent."""


class DeliveryError(FclusterError):
    """The brokers didn't accept a record."""


class ReadError(FclusterError):
    """The brokers refuse to deliver records."""


class MessageLike(Protocol):
    """The part of `confluent_kafka.Message` that is used here."""

    def topic(self) -> str | None: ...
    def partition(self) -> int | None: ...
    def offset(self) -> int | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def headers(self) -> Any: ...
    def error(self) -> Any: ...


@contextlib.contextmanager
def kafka_errors() -> Generator[None]:
    """Turns exceptions of the Kafka client into errors for users."""
    from confluent_kafka import KafkaException

    try:
        yield
    except KafkaException as error:
        problem: Any = error.args[0] if error.args else error
        text = problem.str() if hasattr(problem, "str") else str(problem)
        raise KafkaUnavailable(
            f"Kafka refused or didn't answer: {text}",
            remedy="Check the brokers, and that you have access to them.",
        ) from error


# --- topics ----------------------------------------------------------------------------------------


def existing_partitions(client: Any, topic: str, *, creatable: bool = False) -> list[int]:
    """The partitions of `topic`, ascending.

    Args:
        client: a Kafka consumer, producer or admin client.

    Raises:
        MissingTopic: the topic doesn't exist.
        KafkaUnavailable: it isn't known whether the topic exists.
    """
    began_s = time.monotonic()
    while True:
        # All topics are listed: asking for one by name would let the broker create it.
        metadata = client.list_topics(timeout=METADATA_TIMEOUT_S)
        found = metadata.topics.get(topic)
        if found is not None and found.error is None and found.partitions:
            return sorted(found.partitions)
        waited_s = time.monotonic() - began_s
        unknown = _unknown(metadata, found)
        if not unknown and waited_s >= MISSING_S:
            raise missing_topic(topic, metadata.topics, _TO_CREATE if creatable else "")
        if waited_s >= METADATA_TIMEOUT_S:
            raise KafkaUnavailable(
                f"can't tell after {METADATA_TIMEOUT_S:g} s whether topic {topic!r} exists: {unknown}",
                remedy="Check the brokers' logs, then try again.",
            )
        time.sleep(MISSING_POLL_S)


def _unknown(metadata: Any, found: Any) -> str:
    """Why this answer doesn't tell whether the topic exists. Empty if it does."""
    if not metadata.brokers:
        return "the brokers don't know each other yet"
    if found is None:
        return ""
    error = found.error
    if error is None:
        return "it has no partitions yet"
    return "" if trouble_of(error.code()) is Trouble.TOPIC_GONE else str(error.str())


# --- consume ---------------------------------------------------------------------------------------


def format_message(message: MessageLike, *, headers: bool = False) -> bytes:
    """One line (with its line end) of JSON for a record.

    Keys and values that are JSON stay JSON, character for character, so that no number loses a digit. Other
    text becomes a string. What isn't UTF-8 becomes base64, marked by `"key_encoding"`/`"value_encoding"`. A
    record without a value is marked by `"tombstone"`, which distinguishes it from the JSON value null. A dead
    letter has its origin and reason in `"dead_letter"`.

    Args:
        message: the record.
        headers: whether to show its headers too, as pairs of a name and text (or null, or ``{"base64":
            ...}``).
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
    extra: dict[str, Any] = dict(encodings)
    if message.value() is None:
        extra["tombstone"] = True
    pairs = _headers_of(message)
    letter = _dead_letter(pairs)
    if letter:
        extra["dead_letter"] = letter
    if headers:
        extra["headers"] = [[_shown(name), _shown(value)] for name, value in pairs]
    return orjson.dumps({**document, **extra}, option=orjson.OPT_APPEND_NEWLINE)


def _headers_of(message: MessageLike) -> list[tuple[str | bytes, bytes | None]]:
    try:
        return list(message.headers() or ())
    except UnicodeDecodeError as error:  # a header's name isn't UTF-8: then the client returns none
        return [("unreadable headers", str(error).encode())]


_DEAD_LETTER = "fcluster."


def _dead_letter(pairs: Sequence[tuple[str | bytes, bytes | None]]) -> dict[str, Any]:
    """What the worker recorded about a failed record: "error", "topic" and so on."""
    noted = {
        name.removeprefix(_DEAD_LETTER): _shown(value)
        for name, value in pairs
        if isinstance(name, str) and name.startswith(_DEAD_LETTER)
    }
    return noted if "error" in noted else {}


def _shown(data: str | bytes | None) -> Any:
    if data is None or isinstance(data, str):
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


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
    """The offset at which reading begins in each partition: the oldest record, or the end.

    They are determined before the first poll, so that a record produced after this call is never missed.
    """
    from confluent_kafka import TopicPartition

    from fcluster.kafka.asking import ATTEMPT_TIMEOUT_S, ask_until_known

    def ask(partition: int) -> int:
        at = TopicPartition(topic, partition)
        low, high = consumer.get_watermark_offsets(at, timeout=ATTEMPT_TIMEOUT_S) or (None, None)
        return known_offset(low if from_beginning else high, f"{topic}/{partition}")

    offsets: dict[int, int] = {}
    for partition in partitions:
        # If a topic has just been created, or its leader has moved, the broker that is asked first may not be
        # the leader.
        offsets[partition] = ask_until_known(partial(ask, partition), METADATA_TIMEOUT_S)
    return offsets


def messages_of(consumer: Any, *, idle: Callable[[], bool] = lambda: True) -> Iterator[list[MessageLike]]:
    """Batches of records from the consumer's assignment, for as long as `idle()` (called between polls) is
    true.

    Raises:
        ReadError: the brokers refuse the read.
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
    # The client fixes internal errors (negative codes) such as "all brokers down" by itself, except for
    # these.
    lasting = (KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION, KafkaError._AUTHENTICATION)
    return error.code() in lasting or (error.code() > 0 and not error.retriable())


def run_consume(
    consumer: Any,
    topic: str,
    output: BinaryIO,
    *,
    from_beginning: bool,
    count_max: int | None = None,
    headers: bool = False,
) -> int:
    """Print records of `topic` until `count_max` of them are printed, or forever. Returns how many were
    printed.

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
            output.write(b"".join(format_message(message, headers=headers) for message in wanted))
            output.flush()
            printed += len(wanted)
            if printed == count_max:
                break
    finally:
        consumer.close()
    return printed


def _reader_watch(output: BinaryIO) -> Callable[[], bool]:
    """Whether `output` still has a reader, so that `fcluster consume | head` ends even if no record comes."""
    try:
        descriptor = output.fileno()
    except OSError:  # in a test
        return lambda: True
    poller = select.poll()
    poller.register(descriptor, 0)
    return lambda: not any(events & (select.POLLERR | select.POLLHUP) for _, events in poller.poll(0))


# --- produce ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A record to send: the line's number, its JSON text as it was, and its key."""

    number: int
    key: bytes | None
    value: bytes


def parse_line(text: bytes, number: int, key_field: str | None) -> Line | None:
    """The record in line `number` (counted from 1). None for a blank line.

    Raises:
        InputError: the line isn't JSON, or has no usable `key_field`.
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
    return Line(number, _key_of(document, value, number, key_field), value)


def _key_of(document: Any, text: bytes, number: int, key_field: str | None) -> bytes | None:
    if key_field is None:
        return None
    fields = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    key = fields.get(key_field)
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, float):
        # It may be an integer beyond 64 bits, which has lost digits as a float.
        exact: Any = json.loads(text)[key_field]
        return str(exact).encode() if isinstance(exact, int) else orjson.dumps(key)
    if isinstance(key, int):
        return orjson.dumps(key)
    if key_field in fields:
        problem = f"has {orjson.dumps(key).decode()[:40]} in field {key_field!r}, which can't be a key"
    else:
        problem = f"has no field {key_field!r} to take the key from"
    raise InputError(
        f"line {number} {problem}",
        remedy="Each line must be an object with text or a number in that field.",
    )


def _excerpt(value: bytes) -> str:
    text = value[:60].decode("utf-8", "replace")
    return text + ("..." if len(value) > 60 else "")


def records(count: int) -> str:
    """A number of records in words."""
    return "1 record" if count == 1 else f"{count} records"


def create_topic(admin: Any, topic: str, partitions: int) -> None:
    """Create `topic`. An existing topic with that many partitions is fine.

    Raises:
        MissingTopic: the topic can't be created, or exists with another partition count.
    """
    from confluent_kafka.cimpl import KafkaError, NewTopic

    from fcluster.kafka.durability import broker_settings, replications

    topics = admin.list_topics(timeout=METADATA_TIMEOUT_S).topics
    existing = topics.get(topic)
    other = colliding_topic(topic, topics) if existing is None else None
    if other is not None:
        raise MissingTopic(
            f"topic {topic!r} can't be created because {other!r} exists: Kafka treats '.' and '_' in topic "
            "names as equal",
            remedy=f"Write to {other!r}, or choose a name that differs in another character.",
        )
    if existing is not None:
        if len(existing.partitions) != partitions:
            raise MissingTopic(
                f"topic {topic!r} already exists with {len(existing.partitions)} partitions, not "
                f"{partitions}",
                remedy="Leave out --partitions to write to the existing topic.",
            )
        return
    ways = replications(admin, -1, broker_settings(admin))
    for number, way in enumerate(ways, 1):
        new = NewTopic(topic, partitions, way.factor, config=dict(way.config))
        try:
            admin.create_topics([new])[topic].result(METADATA_TIMEOUT_S)
        except Exception as error:
            cause = error.args[0] if error.args else None
            too_few = isinstance(cause, KafkaError) and cause.name() == "INVALID_REPLICATION_FACTOR"
            if too_few and number < len(ways):
                continue  # there are fewer brokers than the topic should have replicas
            raise MissingTopic(
                f"can't create topic {topic!r}: {error}",
                remedy="Create it with your own tools, then leave out --partitions.",
            ) from error
        return


class Progress:
    """A counter on a terminal line, redrawn a few times a second. Elsewhere it prints nothing."""

    def __init__(self, topic: str, stream: Any = None) -> None:
        self._topic = topic
        self._stream = stream if stream is not None else sys.stderr
        self._visible: bool = self._stream.isatty()
        self._started = time.monotonic()
        self._drawn = self._started

    def show(self, sent: int) -> None:
        """Redraw, if it is time for that."""
        now = time.monotonic()
        if not self._visible or now - self._drawn < PROGRESS_INTERVAL_S:
            return
        self._drawn = now
        rate = sent / (now - self._started)
        self._stream.write(f"\r\x1b[K{sent:,} records to {self._topic}, {rate:,.0f}/s")
        self._stream.flush()

    def clear(self) -> None:
        """Clear the line for the next output."""
        if self._visible:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


@dataclass(frozen=True)
class _Failure:
    line: Line
    place: int
    """Its position among the sent records, counted from 0."""
    error: Any


class Sender:
    """Sends lines to one topic, and knows which of them the brokers accepted.

    Brokers refuse a whole batch of records. So refused records are sent again one by one. Then it is known
    which line is the cause, and the other lines of the batch are sent.

    Args:
        make: creates the producer from additional configuration. Its callback is called only for failed
            deliveries.
        topic: the topic to write to.
        skip: called with a line's number and the reason, for each line that can't be sent. None: the first
            such line is an error.
    """

    def __init__(
        self, make: Callable[..., Any], topic: str, skip: Callable[[int, str], None] | None = None
    ) -> None:
        self._topic = topic
        self._skip = skip
        self._failures: list[_Failure] = []
        self._queued = 0
        self._lost = 0
        self._skipped = 0
        config = {
            "delivery.report.only.error": True,
            "linger.ms": 20,
            "message.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
        }
        self.producer = make(**config)

    def send(self, line: Line) -> None:
        """Queue one record. Waits while the queue is full.

        Raises:
            DeliveryError: this or an earlier record isn't accepted.
        """
        self._queue(line, self._queued)
        if self._queued % 1_000 == 0:
            self.producer.poll(0)
        if self._failures:
            self._settle()

    def finish(self) -> int:
        """Wait until the result of every queued record is known. Returns how many were accepted.

        Raises:
            DeliveryError: a record isn't accepted.
        """
        self._settle()
        return self.taken

    @property
    def taken(self) -> int:
        """How many records the brokers have accepted, as far as is known: all except those that are known to
        have failed.
        """
        return self._queued - self._lost

    def _queue(self, line: Line, place: int) -> None:
        from confluent_kafka import KafkaException

        report = partial(self._on_delivery, line, place)
        while True:
            try:
                self.producer.produce(self._topic, value=line.value, key=line.key, on_delivery=report)
                break
            except BufferError:
                self.producer.poll(0.1)
            except KafkaException as error:
                self._failures.append(_Failure(line, place, error.args[0]))
                break
        self._queued += 1

    def _on_delivery(self, line: Line, place: int, error: Any, _message: Any) -> None:
        if error is not None:
            self._failures.append(_Failure(line, place, error))

    def _settle(self) -> None:
        """Find out which records were accepted. Send refused records again one by one.

        Raises:
            DeliveryError: the message names the line that wasn't accepted and the reason, and says how many
                were.
        """
        self._flush()
        failures = sorted(self._failures, key=lambda failure: failure.line.number)
        self._failures = []
        self._lost += len(failures)
        for failure in failures:
            self._judge(self._alone(failure))

    def _alone(self, failure: _Failure) -> _Failure | None:
        """The result of sending that record alone. None if it is accepted."""
        if trouble_of(failure.error.code()) is Trouble.PASSING:
            return failure  # it was tried for as long as the brokers may be down
        self._queued -= 1  # the same record once more
        self._queue(failure.line, failure.place)
        self._flush()
        found, self._failures = self._failures, []
        if not found:
            self._lost -= 1
        return found[0] if found else None

    def _judge(self, failure: _Failure | None) -> None:
        if failure is None:
            return
        code = failure.error.code()
        trouble = trouble_of(code)
        if trouble in (Trouble.PASSING, Trouble.TOPIC_GONE, Trouble.FORBIDDEN):
            raise DeliveryError(
                f"{failure.error.str()}, line {failure.line.number}; {self._written(failure)}",
                remedy="Check the brokers, and that you may write to the topic, then send the rest.",
            )
        reason = f"Kafka refuses it: {failure.error.str()}"
        if self._skip is None:
            raise DeliveryError(
                f"line {failure.line.number}: {reason}; {self._written(failure)}",
                remedy=_refusal_remedy(code),
            )
        self._skipped += 1
        self._skip(failure.line.number, reason)

    def _written(self, failure: _Failure) -> str:
        before = failure.place - self._skipped
        after = self.taken - before
        text = f"written to {self._topic!r} before it: {records(before)}"
        return f"{text}, and after it: {records(after)}" if after > 0 else text

    def _flush(self) -> None:
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        # Flush in short steps, because a flush in C doesn't notice Ctrl-C.
        while (remaining := int(self.producer.flush(0.2))) and time.monotonic() < deadline:
            pass
        if remaining:
            self._lost += remaining
            raise DeliveryError(
                f"the brokers didn't acknowledge {records(remaining)} within {FLUSH_TIMEOUT_S:.0f} s; "
                f"written to {self._topic!r}: {records(self.taken)}",
                remedy="Check the brokers, then send the rest.",
            )


def _refusal_remedy(code: int) -> str:
    from confluent_kafka import KafkaError

    way_on = "Send the rest, or use --skip-errors to leave out lines that are refused."
    if code == KafkaError.MSG_SIZE_TOO_LARGE:
        return (
            "Make the line smaller, or raise the topic's max.message.bytes and, for this command, "
            f"kafka.producer.message.max.bytes. {way_on}"
        )
    if code == KafkaError.INVALID_RECORD:
        return f"A compacted topic takes no record without a key: use --key-field. {way_on}"
    return f"Compare the line with the topic's settings. {way_on}"


class _Skips:
    """Lines that were left out. The first few are reported as they are found."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, number: int, reason: str) -> None:
        self.count += 1
        if self.count <= SKIPS_SHOWN_MAX:
            sys.stderr.write(f"skipped line {number}: {reason}\n")
        elif self.count == SKIPS_SHOWN_MAX + 1:
            sys.stderr.write("more lines are skipped; from here on they are only counted\n")


@dataclass(frozen=True)
class Sent:
    """The result of `run_produce`: how many records were sent, and how many lines were left out."""

    count: int
    skipped: int = 0


def run_produce(
    make: Callable[..., Any],
    topic: str,
    lines: Iterable[bytes],
    *,
    key_field: str | None = None,
    skip_errors: bool = False,
    progress: Progress | None = None,
) -> Sent:
    """Send each line as one record, in order. Returns how many were sent.

    Args:
        make: creates the producer.
        topic: the topic to write to.
        lines: JSON values. Blank lines are ignored.
        key_field: the field of the value that becomes the key.
        skip_errors: leave out lines that can't be sent, and report them on stderr.
        progress: shows progress.

    Raises:
        InputError: a line isn't valid. Everything before it was sent, and nothing after it.
        DeliveryError: the brokers didn't accept all of them. Everything before the named line was sent, and
            perhaps some lines after it.
        MissingTopic: the topic doesn't exist.
    """
    progress = progress if progress is not None else Progress(topic)
    skips = _Skips()

    def skip(number: int, reason: str) -> None:
        progress.clear()
        skips.note(number, reason)

    sender = Sender(make, topic, skip if skip_errors else None)
    existing_partitions(sender.producer, topic, creatable=True)
    count = 0
    try:
        for number, text in enumerate(lines, start=1):
            try:
                line = parse_line(text, number, key_field)
            except InputError as error:
                if not skip_errors:
                    raise
                skip(number, error.message.removeprefix(f"line {number} "))
                continue
            if line is not None:
                sender.send(line)
                count += 1
                progress.show(count)
        return Sent(sender.finish(), skips.count)
    except InputError as error:
        taken = sender.finish()
        raise InputError(
            f"{error.message}; sent before it: {records(taken)}, nothing after it",
            remedy=f"{error.remedy} To leave out such lines, use --skip-errors.",
        ) from error
    except KeyboardInterrupt:
        progress.clear()
        with contextlib.suppress(DeliveryError):
            sender.finish()
        sys.stderr.write(f"\ninterrupted; sent to {topic!r}: {records(sender.taken)}\n")
        raise
    finally:
        progress.clear()
