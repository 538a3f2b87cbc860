"""The reader of source topics, with a scripted consumer."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from fcluster.worker import consuming
from fcluster.worker.consuming import Batch, ReaderEvent, ReadUpTo, SourceReader

UNKNOWN = -1001
"""The offset that librdkafka returns if it doesn't know one (yet)."""


class MarkersOnly:
    """A partition that has only a commit marker after the committed offset.

    The broker's first answer comes late. Until then, neither position nor end is known.
    """

    def __init__(self, end: int, polls_before_answer: int) -> None:
        self._end = end
        self._polls_left = polls_before_answer

    def append_marker(self) -> None:
        """Append an aborted transaction: its records are never seen, but the position moves past its
        marker."""
        self._end += 2

    def poll(self, _timeout_s: float) -> None:
        self._polls_left -= 1

    @property
    def _answered(self) -> bool:
        return self._polls_left <= 0

    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        offset = self._end if self._answered else UNKNOWN
        return [TopicPartition(at.topic, at.partition, offset) for at in partitions]

    def get_watermark_offsets(self, _at: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return (0, self._end) if self._answered else (UNKNOWN, UNKNOWN)

    def incremental_assign(self, _partitions: list[TopicPartition]) -> None: ...

    def incremental_unassign(self, _partitions: list[TopicPartition]) -> None: ...

    def close(self) -> None: ...


def test_partition_with_only_a_marker_left_is_reported_as_read_to_its_end() -> None:
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()

    def make(_fetching: Mapping[str, int]) -> Any:
        return MarkersOnly(end=8, polls_before_answer=3)

    reader = SourceReader(make, events.put, "reader")
    try:
        reader.start({("in", 0): 7})
        assert next_known(events) == ReadUpTo(reader, 1, {("in", 0): 8}, {("in", 0): 8})
    finally:
        reader.close(timeout_s=5)


def test_marker_that_comes_later_moves_the_position_of_an_idle_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consuming, "LOOK_INTERVAL_S", 0.01)
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    consumer: Any = MarkersOnly(end=8, polls_before_answer=1)
    reader = SourceReader(lambda _fetching: consumer, events.put, "reader")
    try:
        reader.start({("in", 0): 7})
        next_known(events)
        consumer.append_marker()
        assert next_known(events) == ReadUpTo(reader, 1, {("in", 0): 10}, {("in", 0): 10})
    finally:
        reader.close(timeout_s=5)


def next_known(events: queue.SimpleQueue[ReaderEvent]) -> ReaderEvent:
    """The next event that reports an end."""
    while True:
        event = events.get(timeout=10)
        if not isinstance(event, ReadUpTo) or event.ends:
            return event


class Steady:
    """Always has a record. Connecting takes until `may_connect` is set."""

    def __init__(self, made: list[Steady], fetching: Mapping[str, int], may_connect: threading.Event) -> None:
        self.fetching = fetching
        self.assigned: dict[int, int] = {}
        self.connected: list[str] = []
        self._may_connect = may_connect
        made.append(self)

    def list_topics(self, topic: str, *, timeout: float) -> None:
        assert timeout > 0
        if self.fetching is consuming.GATHERING_FETCH:
            self._may_connect.wait(10)
        self.connected.append(topic)

    def poll(self, _timeout_s: float) -> Any:
        for partition in self.assigned:
            self.assigned[partition] += 1
            return Record(partition, self.assigned[partition] - 1)
        return None

    def consume(self, _count: int, _timeout_s: float) -> list[Any]:
        return []

    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        return [TopicPartition(at.topic, at.partition, self.assigned[at.partition]) for at in partitions]

    def get_watermark_offsets(self, at: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return 0, self.assigned[at.partition]

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self.assigned |= {at.partition: at.offset for at in partitions}

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for at in partitions:
            del self.assigned[at.partition]

    def close(self) -> None: ...


@dataclass(frozen=True)
class Record:
    """The part of a message that the reader uses."""

    number: int
    at: int

    def error(self) -> None: ...

    def offset(self) -> int:
        return self.at


def test_reader_changes_to_the_gathering_consumer_only_when_that_is_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(step=0.001)  # each call is a millisecond later
    monkeypatch.setattr(consuming, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    made: list[Steady] = []
    may_connect = threading.Event()

    def make(fetching: Mapping[str, int]) -> Any:
        return Steady(made, fetching, may_connect)

    reader = SourceReader(make, events.put, "reader", ["in"])
    offsets: list[int] = []

    def read_until(enough: Callable[[], bool]) -> None:
        while not enough():
            batch = events.get(timeout=10)
            if isinstance(batch, ReadUpTo):
                continue
            assert isinstance(batch, Batch)
            offsets.extend(message.offset() or 0 for message in batch.messages)
            reader.done()

    try:
        reader.start({("in", 0): 0})
        read_until(lambda: len(made) == 2 and len(offsets) > 3000)
        assert made[0].connected == ["in"]
        assert made[0].assigned, "it was closed before the other one was connected"
        may_connect.set()
        read_until(lambda: bool(made[1].assigned))
        read_until(lambda: len(offsets) % 100 == 0)
        assert made[1].connected == ["in"]
        assert not made[0].assigned
    finally:
        reader.close(timeout_s=5)
    assert offsets == list(range(len(offsets))), "records were lost or repeated at the change"


def test_unknown_end_is_left_out_and_not_reported_as_a_number() -> None:
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    reader = SourceReader(lambda _fetching: MarkersOnly(8, 3), events.put, "reader")  # type: ignore[arg-type,return-value]
    try:
        reader.start({("in", 0): 7})
        assert events.get(timeout=10) == ReadUpTo(reader, 1, {("in", 0): 7}, {})
        assert next_known(events) == ReadUpTo(reader, 1, {("in", 0): 8}, {("in", 0): 8})
    finally:
        reader.close(timeout_s=5)


def test_empty_partition_beside_a_busy_one_is_reported_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consuming, "LOOK_INTERVAL_S", 0.01)
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    connected = threading.Event()
    connected.set()
    consumer: Any = Steady([], consuming.PATIENT_FETCH, connected)
    reader = SourceReader(lambda _fetching: consumer, events.put, "reader")
    try:
        reader.start({("in", 0): 0, ("in", 1): 0})
        next_offset = 0
        while not isinstance(told := events.get(timeout=10), ReadUpTo):
            assert isinstance(told, Batch)
            next_offset += len(told.messages)
            reader.done()
    finally:
        reader.close(timeout_s=5)
    assert told.positions == {("in", 0): next_offset, ("in", 1): 0}, "all batches before it are counted"
    assert told.ends["in", 1] == 0


class SlowToTell(Steady):
    """Learns the second partition's end when it is told to."""

    end = UNKNOWN

    def get_watermark_offsets(self, at: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return (0, self.end) if at.partition else (0, 1_000)


def test_ends_that_become_known_are_reported_while_a_slow_handler_leaves_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consuming, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(consuming, "POLL_TIMEOUT_S", 0.01)
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    consumer: Any = SlowToTell([], consuming.PATIENT_FETCH, threading.Event())
    reader = SourceReader(lambda _fetching: consumer, events.put, "reader")
    try:
        reader.start({("in", 0): 0, ("in", 1): 0})
        batches = 0
        while batches < consuming.BATCHES_AHEAD_MAX:  # none of them is ever processed
            batches += isinstance(events.get(timeout=10), Batch)
        consumer.end = 77
        while ("in", 1) not in (told := next_known(events)).ends:  # type: ignore[union-attr]
            pass
    finally:
        reader.close(timeout_s=5)
    assert told == ReadUpTo(reader, 1, {("in", 0): 3, ("in", 1): 0}, {("in", 0): 1_000, ("in", 1): 77})


class Steadfast(Steady):
    """Two partitions in turns, of which one may be paused. Their ends are known."""

    def __init__(self, made: list[Steady], fetching: Mapping[str, int], connect: threading.Event) -> None:
        super().__init__(made, fetching, connect)
        self.paused: set[int] = set()
        self._turns = itertools.count()

    def poll(self, _timeout_s: float) -> Any:
        reading = [partition for partition in self.assigned if partition not in self.paused]
        if not reading:
            return None
        partition = reading[next(self._turns) % len(reading)]
        self.assigned[partition] += 1
        return Record(partition, self.assigned[partition] - 1)

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.paused |= {at.partition for at in partitions}

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {at.partition for at in partitions}

    def get_watermark_offsets(self, _at: TopicPartition, *, cached: bool) -> tuple[int, int]:
        assert cached
        return 0, 1_000


def test_watched_partitions_report_their_position_with_each_batch_and_a_paused_one_stays_there() -> None:
    events: queue.SimpleQueue[ReaderEvent] = queue.SimpleQueue()
    made: list[Any] = []
    connected = threading.Event()
    connected.set()
    consumer: Any = Steadfast(made, consuming.PATIENT_FETCH, connected)
    reader = SourceReader(lambda _fetching: consumer, events.put, "reader")

    def batch() -> Batch:
        event = events.get(timeout=10)
        while isinstance(event, ReadUpTo):
            event = events.get(timeout=10)
        assert isinstance(event, Batch)
        reader.done()
        return event

    try:
        generation = reader.start({("a", 0): 5, ("b", 1): 7}, watched=True)
        first = batch()
        assert first.generation == generation == reader.newest_generation
        assert first.standings in (
            {("a", 0): (6, 1_000), ("b", 1): (7, 1_000)},
            {("a", 0): (5, 1_000), ("b", 1): (8, 1_000)},
        )
        reader.hold(("a", 0))
        while not consumer.paused:
            batch()
        held_at = consumer.assigned[0]
        for _ in range(20):
            read = batch()
        assert read.standings["a", 0] == (held_at, 1_000)
        assert read.generation == generation, "a pause doesn't change the assignment"
        reader.hold(("a", 0), "ahead")
        reader.release(("a", 0))
        for _ in range(20):
            read = batch()
        assert read.standings["a", 0] == (held_at, 1_000), "the other reason is still there"
        reader.release(("a", 0), "ahead")
        while consumer.assigned[0] == held_at:
            batch()
        reader.hold(("a", 0))
        reader.stop({("a", 0)})
        while 0 in consumer.assigned or consumer.paused:
            batch()
        assert set(batch().standings) == {("b", 1)}
    finally:
        reader.close(timeout_s=5)
