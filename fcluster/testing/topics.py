"""Kafka's topics as a test needs them: partitions in memory, with transactions and isolation levels.

Responsible for: deciding what a reader of either isolation level sees, before and after a transaction ends.
There is one transaction at a time. Records keep their offsets forever. A record of an aborted transaction
stays where it is, and only "read-uncommitted" sees it. (A real broker also writes control records, which take
offsets too. They aren't written here.) Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Generic, cast

from fcluster.common.failures import bounded_repr
from fcluster.common.isolation import Isolation
from fcluster.engine.framing import framed
from fcluster.graph.codecs import decode_value, id_header, key_codec
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.operators import TopicSpec
from fcluster.graph.partitioner import partition_of

Header = tuple[str, bytes | None]
_CREATE_TIME = 1
"""The client's constant for a timestamp that the producer set."""


class Visibility(Enum):
    """Who can read a record."""

    COMMITTED = "everybody"
    OPEN = "read-uncommitted, and everybody once the transaction is committed"
    ABORTED = "read-uncommitted only"


class StoredRecord:
    """A record in a partition. It has the methods of a consumed message (`engine.records.SourceRecord`).

    Attributes:
        sequence: increases over all topics in the order in which records were written.
        visibility: who can read it.
    """

    __slots__ = ("_headers", "_key", "_place", "_timestamp_ms", "_value", "sequence", "visibility")

    def __init__(
        self,
        place: tuple[str, int, int],
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int,
        headers: Sequence[Header] | None,
        sequence: int,
        visibility: Visibility,
    ) -> None:
        self._place = place
        self._key = key
        self._value = value
        self._timestamp_ms = timestamp_ms
        self._headers = list(headers) if headers else None
        self.sequence = sequence
        self.visibility = visibility

    def topic(self) -> str:
        """Its topic's name."""
        return self._place[0]

    def partition(self) -> int:
        """Its partition."""
        return self._place[1]

    def offset(self) -> int:
        """Its offset in the partition."""
        return self._place[2]

    def key(self) -> bytes | None:
        """The key's bytes, None if it has none."""
        return self._key

    def value(self) -> bytes | None:
        """The value's bytes, None for a tombstone."""
        return self._value

    def timestamp(self) -> tuple[int, int]:
        """The kind of the timestamp, and milliseconds since 1970; -1 if it has none."""
        return _CREATE_TIME, self._timestamp_ms

    def headers(self) -> list[Header] | None:
        """Its headers in order, None if it has none."""
        return self._headers


class TopicRecord(Generic[K_co, V_co]):
    """A record of a topic, as a reader receives it.

    Attributes:
        topic: its topic's name.
        partition: its partition.
        offset: its offset in the partition.
        timestamp: milliseconds since 1970; -1 if it has none.
        headers: pairs of a name and a value, in order.
        raw_key: the key's bytes. None if it has none.
        raw_value: the value's bytes. None if it has none.
    """

    __slots__ = ("_spec", "headers", "offset", "partition", "raw_key", "raw_value", "timestamp", "topic")

    def __init__(self, spec: TopicSpec[Any, Any], record: StoredRecord) -> None:
        self._spec = spec
        self.topic = record.topic()
        self.partition = record.partition()
        self.offset = record.offset()
        self.raw_key = record.key()
        self.raw_value = record.value()
        self.timestamp = record.timestamp()[1]
        self.headers: list[Header] = list(record.headers() or ())

    @property
    def key(self) -> K_co:
        """The key, decoded as declared for the topic. None if it has none. Raises what the codec raises."""
        raw = framed(self.raw_key, self._spec.key, id_header(self._spec.key, "key"), self.headers)
        return cast("Any", None) if raw is None else key_codec(self._spec.key)[0](raw)

    @property
    def value(self) -> V_co:
        """The value, decoded as declared for the topic. None for a tombstone. Raises what the codec
        raises.
        """
        raw = framed(self.raw_value, self._spec.value, id_header(self._spec.value, "value"), self.headers)
        return cast("Any", None) if raw is None else decode_value(self._spec.value, raw)

    def __repr__(self) -> str:
        key, value = bounded_repr(self.raw_key), bounded_repr(self.raw_value, 200)
        where = f"{self.topic}/{self.partition} at {self.offset}"
        return f"<TopicRecord {where}: key={key}, value={value}, timestamp={self.timestamp}>"


class Partition:
    """The records of one partition, by offset."""

    def __init__(self) -> None:
        self.records: list[StoredRecord] = []
        self._first_open: int | None = None

    def add(self, record: StoredRecord) -> None:
        """Append a record."""
        if record.visibility is Visibility.OPEN and self._first_open is None:
            self._first_open = record.offset()
        self.records.append(record)

    def end_transaction(self) -> None:
        """None of its records is open any more."""
        self._first_open = None

    def first_from(self, offset: int, isolation: Isolation) -> StoredRecord | None:
        """The first record at or after `offset` that a reader receives. None if there is none yet."""
        return next(self.read(offset, isolation), None)

    def read(self, offset: int, isolation: Isolation) -> Iterator[StoredRecord]:
        """The records from `offset` on that a reader receives. "read-committed" stops before an open one."""
        takes_all = isolation == "read-uncommitted"
        end = len(self.records) if takes_all or self._first_open is None else self._first_open
        for index in range(offset, end):
            record = self.records[index]
            if takes_all or record.visibility is Visibility.COMMITTED:
                yield record


class Topics:
    """All topics.

    Args:
        partitions: the partition count of each topic.
    """

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self._topics = {name: tuple(Partition() for _ in range(count)) for name, count in partitions.items()}
        self._sequence = 0
        self._open: list[StoredRecord] = []

    @property
    def sequence(self) -> int:
        """The sequence of the last written record."""
        return self._sequence

    def partitions(self, topic: str) -> tuple[Partition, ...]:
        """The topic's partitions."""
        return self._topics[topic]

    def counts_of(self, names: Iterable[str]) -> dict[str, int]:
        """The partition counts of those of the topics that there are."""
        return {name: len(self._topics[name]) for name in names if name in self._topics}

    def add_missing(self, partitions: Mapping[str, int]) -> None:
        """Create those of the topics that don't exist."""
        for name, count in partitions.items():
            self._topics.setdefault(name, tuple(Partition() for _ in range(count)))

    def partition_for(self, topic: str, key: bytes | None, value: bytes | None) -> int:
        """Where a producer writes a record without a given partition.

        Without a key, a real producer chooses at random. Here the value decides, so that all runs are alike.
        """
        return partition_of(value or b"" if key is None else key, len(self._topics[topic]))

    def add(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int,
        headers: Sequence[Header] | None,
        visibility: Visibility,
    ) -> StoredRecord:
        """Write a record. If it is OPEN, it belongs to the transaction."""
        target = self._topics[topic][partition]
        self._sequence += 1
        place = (topic, partition, len(target.records))
        record = StoredRecord(place, key, value, timestamp_ms, headers, self._sequence, visibility)
        target.add(record)
        if visibility is Visibility.OPEN:
            self._open.append(record)
        return record

    def commit(self) -> None:
        """Commit the transaction: every reader sees its records."""
        self._end(Visibility.COMMITTED)

    def abort(self) -> None:
        """Abort the transaction: only "read-uncommitted" sees its records."""
        self._end(Visibility.ABORTED)

    def _end(self, visibility: Visibility) -> None:
        for record in self._open:
            record.visibility = visibility
            self._topics[record.topic()][record.partition()].end_transaction()
        self._open.clear()
