"""A record on its way through the engine, and where its outputs are written.

Responsible for: what the engine needs to know of a record (`SourceRecord`), and the two objects that take
outputs: the shell's port, or a list that holds them back until the record is through. Pure.

On its way a record is `(source record, key, value)`: its key as bytes, its value decoded. Timestamp and
headers stay the same on the way, so steps get them from the source record, and only when they write: reading
headers costs more than a filter does. A consumed Kafka message is a `SourceRecord`; for what isn't read from
Kafka, such as a timer, there is an object with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from fcluster.common.failures import Failure, bounded_text
from fcluster.engine.failure import Condemnation, OutputRefusedError
from fcluster.engine.letter_limit import LetterLimit

if TYPE_CHECKING:
    from fcluster.engine.steps import Place

Headers = Sequence[tuple[str, bytes | None]]
NO_TIMESTAMP_MS: Final = -1
"""Kafka's marker for a record without a timestamp."""
Produce = Callable[..., None]
"""``produce(topic, value, key, timestamp_ms, headers)``, called with positional arguments. The partitioner
chooses by the key, unless a partition follows.
"""

OUTPUT_TROUBLE = (OutputRefusedError, TypeError, ValueError, OverflowError)
"""What `Produce` raises because of the output's own fields."""


HeldOutput = tuple[Any, ...]
"""The place of an output, and the arguments of `Produce`."""
USUAL_FIELDS: Final = 6
"""The number of its elements, if it has no partition."""


class SourceRecord(Protocol):
    """The record that a value comes from. It has the methods of a consumed Kafka message."""

    def key(self) -> Any:
        """The key's bytes, None if it has none."""
        ...

    def value(self) -> Any:
        """The value's bytes, None for a tombstone."""
        ...

    def timestamp(self) -> tuple[int, int]:
        """The kind of the timestamp, and milliseconds since 1970."""
        ...

    def headers(self) -> Any:
        """Pairs of a name and a value, in order; None or empty if there are none."""
        ...

    def topic(self) -> Any:
        """The topic that it was read from."""
        ...

    def partition(self) -> Any:
        """The partition that it was read from."""
        ...

    def offset(self) -> Any:
        """The offset that it was read from."""
        ...


class TimerRecord:
    """A due timer, in place of the record that is processed.

    Args:
        key: the key of the stream, as bytes.
        at_ms: when it was due.
        topic, partition: those of the first input of its shard.
        offset: the offset of the first record there that comes after the timer.
        name: the timer's name.
        title: returns the timer's title.
    """

    __slots__ = ("_at_ms", "_key", "_offset", "_partition", "_title", "_topic", "name")

    def __init__(
        self,
        key: bytes,
        at_ms: int,
        topic: str,
        partition: int,
        offset: int,
        name: str,
        title: Callable[[], str],
    ) -> None:
        self._key = key
        self._at_ms = at_ms
        self._topic = topic
        self._partition = partition
        self._offset = offset
        self.name = name
        self._title = title

    @property
    def title(self) -> str:
        """A description of the timer, which is also the name of its step; see `timers.timer_title`."""
        return self._title()

    def key(self) -> bytes:
        """The key of the stream."""
        return self._key

    def value(self) -> None:
        """A timer has none."""
        return

    def timestamp(self) -> tuple[int, int]:
        """The time at which it was due, as a timestamp that its creator has set."""
        return (1, self._at_ms)

    def headers(self) -> None:
        """A timer has none."""
        return

    def topic(self) -> str:
        """The first input's topic."""
        return self._topic

    def partition(self) -> int:
        """The shard's partition."""
        return self._partition

    def offset(self) -> int:
        """The offset of the record before which it fires."""
        return self._offset


class LaterRecord:
    """A record whose results get a later timestamp than its own, such as that of its partner in a join."""

    __slots__ = ("_at_ms", "_record", "headers", "key", "offset", "partition", "topic", "value")

    def __init__(self, record: SourceRecord, at_ms: int) -> None:
        self._record = record
        self._at_ms = at_ms
        self.key = record.key
        self.value = record.value
        self.headers = record.headers
        self.topic = record.topic
        self.partition = record.partition
        self.offset = record.offset

    def timestamp(self) -> tuple[int, int]:
        """The kind of the record's own timestamp, and the later time."""
        return self._record.timestamp()[0], self._at_ms


class AmendedRecord:
    """A record in which something is replaced before any step sees it. Subclasses say what."""

    __slots__ = ("_record",)

    def __init__(self, record: SourceRecord) -> None:
        self._record = record

    def as_read(self) -> SourceRecord:
        """The record, as it was read."""
        return self._record.as_read() if isinstance(self._record, AmendedRecord) else self._record

    def key(self) -> Any:
        """That of the record."""
        return self._record.key()

    def value(self) -> Any:
        """That of the record."""
        return self._record.value()

    def timestamp(self) -> tuple[int, int]:
        """That of the record."""
        return self._record.timestamp()

    def headers(self) -> Any:
        """Those of the record."""
        return self._record.headers()

    def topic(self) -> Any:
        """That of the record."""
        return self._record.topic()

    def partition(self) -> Any:
        """That of the record."""
        return self._record.partition()

    def offset(self) -> Any:
        """That of the record."""
        return self._record.offset()


class RowRecord:
    """What has become of a row of a table because of a record, in place of that record.

    Args:
        record: the record that has changed a row.
        raw: the bytes of the row's present value, empty if it has none that were read. None: the row was
            deleted, which is a tombstone.
        at_ms: the time of the change.
    """

    __slots__ = ("_at_ms", "_raw", "_record", "headers", "key", "offset", "partition", "topic")

    def __init__(self, record: SourceRecord, raw: bytes | None, at_ms: int) -> None:
        self._record = record
        self._raw = raw
        self._at_ms = at_ms
        self.key = record.key
        self.headers = record.headers
        self.topic = record.topic
        self.partition = record.partition
        self.offset = record.offset

    def value(self) -> bytes | None:
        """See `raw` of the class."""
        return self._raw

    def timestamp(self) -> tuple[int, int]:
        """The kind of the record's own timestamp, and the time of the change."""
        return self._record.timestamp()[0], self._at_ms


class KeptRecord:
    """A record that the state has kept for a while, in place of the timer that gives it up.

    Args:
        timer: the timer.
        raw: what was kept of the value. None: it was null.
        at_ms: the record's timestamp.
        headers: what was kept of its headers.
    """

    __slots__ = ("_at_ms", "_headers", "_raw", "key", "offset", "partition", "topic")

    def __init__(self, timer: TimerRecord, raw: bytes | None, at_ms: int, headers: Headers) -> None:
        self._raw = raw
        self._at_ms = at_ms
        self._headers = headers
        self.key = timer.key
        self.topic = timer.topic
        self.partition = timer.partition
        self.offset = timer.offset

    def value(self) -> bytes | None:
        """See `raw` of the class."""
        return self._raw

    def timestamp(self) -> tuple[int, int]:
        """That of the record, as one that its creator has set."""
        return (1, self._at_ms)

    def headers(self) -> Headers | None:
        """Pairs of a name and a value."""
        return [(name, value) for name, value in self._headers] or None


class PassedRecord:
    """A `Record` of a handler on its way to the steps behind, in place of the record that the handler got.

    Args:
        record: the record that the handler got, or the timer.
        at_ms: the timestamp. None: that of the record.
        headers: replace those of the record, if there is one tuple of them.
        is_tombstone: the handler passes on a null value, which is written as null.
    """

    __slots__ = ("_at_ms", "_headers", "_record", "is_tombstone", "key", "offset", "partition", "topic")

    def __init__(
        self, record: SourceRecord, at_ms: int | None, headers: tuple[Headers | None, ...], is_tombstone: bool
    ) -> None:
        self._record = record
        self._at_ms = at_ms
        self.is_tombstone = is_tombstone
        self.key = record.key
        self._headers = headers
        self.topic = record.topic
        self.partition = record.partition
        self.offset = record.offset

    def headers(self) -> Any:
        """The headers, None if there are none."""
        return self._headers[0] if self._headers else self._record.headers()

    def value(self) -> bytes | None:
        """None for a tombstone, otherwise not None."""
        return None if self.is_tombstone else self._record.value() or b""

    def timestamp(self) -> tuple[int, int]:
        """The kind of the record's own timestamp, and the time."""
        kind, own_ms = self._record.timestamp()
        return kind, own_ms if self._at_ms is None else self._at_ms


_IN_ITS_PLACE: Final = (LaterRecord, RowRecord, PassedRecord)


def origin_of(record: SourceRecord) -> SourceRecord:
    """The record with which the chain has begun, in whose place a step has passed this one on."""
    while isinstance(record, _IN_ITS_PLACE):
        record = record._record  # pyright: ignore[reportPrivateUsage]
    return record


def describe_record(record: SourceRecord) -> str:
    """Which record it is, for messages: topic, partition and offset. Or which timer."""
    if isinstance(record, TimerRecord):
        return record.title
    return f"record {bounded_text(str(record.topic()), 249)}/{record.partition()} at offset {record.offset()}"


def where_of(record: SourceRecord) -> str:
    """The record in the short form for `Failure.where`."""
    return f"{record.topic()}/{record.partition()}@{record.offset()}"


class OutputPort:
    """Where outputs are written. `produce` is replaced at each epoch by that of the epoch's producer.

    Attributes:
        records: how many were written since the process's start.
        skipped: how many records were skipped or became dead letters.
        late: how many records came after their windows had closed.
        letters: the limit on dead letters.
        watermarks_read: how many watermark records were read; they aren't counted as records anywhere.
        stage_sizes: how many shards each stage has, for steps that write to all of them. A stage that reads
            from such a step has state, so it never gets more.
    """

    __slots__ = ("late", "letters", "produce", "records", "skipped", "stage_sizes", "watermarks_read")

    def __init__(self) -> None:
        self.produce: Produce = _not_open
        self.records = 0
        self.skipped = 0
        self.late = 0
        self.watermarks_read = 0
        self.letters = LetterLimit()
        self.stage_sizes: Mapping[str, int] = {}

    def close(self) -> None:
        """Release the producer: what isn't committed is lost. The next epoch sets another one."""
        self.produce = _not_open
        self.letters.clear()


def _not_open(*_arguments: Any) -> None:
    raise AssertionError("a record was processed outside an epoch")


class Refusals:
    """The outputs of one record that count as refused: how often and why, by topic."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, str], list[Failure]] = {}

    def set(self, condemnations: Sequence[Condemnation]) -> None:
        """Set the refusals of the next record. They replace those of the record before."""
        self._failures.clear()
        for one in condemnations:
            if one.topic:
                self._failures.setdefault((one.topic, one.step), []).append(one.failure)

    def check(self, topic: str, place: Place) -> None:
        """Raise OutputRefusedError if the next output to `topic` from `place` has to be refused."""
        failures = self._failures.get((topic, place.name)) or self._failures.get((topic, ""))
        if failures:
            raise OutputRefusedError(failures.pop(0))


class HeldOutputs:
    """Holds a record's outputs back while one of its steps may still fail.

    Args:
        refusals: the refusals, if the record is known to have some. None: nothing is refused here.
    """

    __slots__ = ("entries", "refusals")

    def __init__(self, refusals: Refusals | None = None) -> None:
        self.entries: list[HeldOutput] = []
        self.refusals = refusals

    def at(self, place: Place) -> OutputPort:
        """What the step at `place` uses as its port."""
        port = OutputPort()
        hold, refusals = self.entries.append, self.refusals

        def produce(
            topic: str, value: Any, key: Any, timestamp_ms: Any, headers: Any, partition: int | None = None
        ) -> None:
            if partition is None:
                hold((place, topic, value, key, timestamp_ms, headers))
            else:
                hold((place, topic, value, key, timestamp_ms, headers, partition))

        def produce_unless_refused(topic: str, *fields: Any) -> None:
            refusals.check(topic, place)  # type: ignore[union-attr]
            hold((place, topic, *fields))

        port.produce = produce if refusals is None else produce_unless_refused
        return port
