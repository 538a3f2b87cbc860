"""Reads the two sides that the checker compares from Kafka.

Responsible for: committed offsets, end offsets, and the records of a topic from its beginning to an end. It
uses none of fcluster's own Kafka code, because an error there must not hide itself.

A read ends on the partition's end-of-partition event, not on its last record: commit markers take offsets
too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from tests.checker.records import InputRecord, MalformedRecord, OutputRecord, decode_input, decode_output

READ_COMMITTED = "read_committed"
READ_UNCOMMITTED = "read_uncommitted"

_R = TypeVar("_R")


@functools.cache
def admin_of(brokers: str) -> AdminClient:
    """One admin client for each bootstrap string, because they are costly to create and safe to share. They
    outlive some brokers, and would complain once a second.
    """
    return AdminClient({"bootstrap.servers": brokers, "log_level": 0})


def forget_admins() -> None:
    """Close them, for brokers that won't exist any more."""
    admin_of.cache_clear()


def partitions_of(brokers: str, topic: str) -> list[int]:
    """The partitions of `topic`, in order. Empty if there is no such topic."""
    # This asks for all topics: asking for one by name would create it on brokers with auto-creation.
    known = admin_of(brokers).list_topics(timeout=30).topics
    return sorted(known[topic].partitions) if topic in known else []


def known_partitions(brokers: str, topic: str, timeout_s: float = 30) -> list[int]:
    """The partitions of a topic that exists. A broker that hasn't heard of a new topic yet shows no
    partitions, and a reader of nothing would find no fault.

    Raises:
        TimeoutError: no broker shows the topic.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (partitions := partitions_of(brokers, topic)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no broker shows the topic {topic}")
        time.sleep(0.05)
    return partitions


def topics_with_prefix(brokers: str, prefix: str) -> list[str]:
    """The names of all topics that begin with `prefix`."""
    names = admin_of(brokers).list_topics(timeout=30).topics
    return sorted(name for name in names if name.startswith(prefix))


def end_offsets(brokers: str, topics: Iterable[str], isolation: str) -> dict[tuple[str, int], int]:
    """The end of each partition: the last stable offset for read_committed, otherwise the high watermark."""
    admin = admin_of(brokers)
    level = IsolationLevel.READ_COMMITTED if isolation == READ_COMMITTED else IsolationLevel.READ_UNCOMMITTED
    names = list(topics)
    deadline = time.monotonic() + 60
    while True:
        try:
            # This is done each time, because it also makes the client look for the leaders.
            known = admin.list_topics(timeout=30).topics
            wanted = {
                TopicPartition(topic, partition): OffsetSpec.latest()
                for topic in names
                for partition in known[topic].partitions
            }
            futures = admin.list_offsets(wanted, isolation_level=level, request_timeout=30)
            found = {(at.topic, at.partition): future.result().offset for at, future in futures.items()}
            if all(offset >= 0 for offset in found.values()) or time.monotonic() > deadline:
                return found  # a negative one is librdkafka's "unknown"
        except KafkaException:
            # A leader has moved, or a broker is down. (An unknown topic is a KeyError above.)
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def committed_offsets(brokers: str, group: str) -> dict[tuple[str, int], int]:
    """The group's last committed offsets, by topic and partition, ignoring pending ones.

    They are read as read_uncommitted, which the broker answers at once: neither answer contains pending
    offsets. A job at full speed nearly always has pending offsets in some partition.
    """
    found = committed_positions(brokers, group, READ_UNCOMMITTED)
    return {at: offset for at, (offset, _metadata) in found.items()}


# The group's coordinator has just started, or is moving: there is no answer, so ask again.
_COORDINATOR_MOVES = frozenset(
    {
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError._TRANSPORT,
    }
)


def _committed(consumer: Consumer, wanted: list[TopicPartition]) -> list[TopicPartition]:
    deadline = time.monotonic() + 30
    while True:
        try:
            return consumer.committed(wanted, timeout=30)
        except KafkaException as error:
            if error.args[0].code() not in _COORDINATOR_MOVES or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def committed_positions(
    brokers: str, group: str, isolation: str = READ_COMMITTED
) -> dict[tuple[str, int], tuple[int, str]]:
    """The group's committed offsets and their metadata. Being read_committed, this waits until none are
    pending.

    A consumer asks, because librdkafka crashes when an admin client asks a group coordinator that isn't
    ready.

    Raises:
        TimeoutError: they stay pending for 30 s.
    """
    consumer = new_consumer(brokers, isolation, **{"group.id": group})
    try:
        topics = consumer.list_topics(timeout=30).topics
        wanted = [
            TopicPartition(name, partition)
            for name, topic in topics.items()
            if not name.startswith("__")
            for partition in topic.partitions
        ]
        found = _committed(consumer, wanted)
    except KafkaException as error:
        if error.args[0].code() != KafkaError._TIMED_OUT:
            raise
        raise TimeoutError(f"offsets of the group {group} stay pending in an open transaction") from error
    finally:
        consumer.close()
    return {(at.topic, at.partition): (at.offset, at.metadata or "") for at in found if at.offset >= 0}


def new_consumer(brokers: str, isolation: str, **extra: object) -> Consumer:
    """A consumer without a group, for `assign`."""
    return Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "fcluster-checker",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "isolation.level": isolation,
            "fetch.wait.max.ms": 20,
            "socket.timeout.ms": 8_000,  # a broker that hangs keeps its connections; the default is 60 s
            "topic.metadata.refresh.interval.ms": 5_000,  # a broker that was cut off continues as if it led
            "log_level": 0,  # the brokers of some tests die on purpose
            **extra,
        }
    )


def read_topic(
    brokers: str,
    topic: str,
    isolation: str,
    decode: Callable[[Message], _R],
    *,
    until: Mapping[int, int] | None = None,
    timeout_s: float = 120,
) -> dict[int, list[_R]]:
    """The records of `topic`, by partition, from its beginning to its end.

    Args:
        brokers: bootstrap servers.
        topic: the topic's name.
        isolation: read_committed or read_uncommitted.
        decode: turns each message into what is kept.
        until: by partition, the offset before which to stop. Other partitions are left out. Without it, all
            partitions are read to their ends.
        timeout_s: the time limit of the whole read.

    Raises:
        TimeoutError: the end was not reached in time. (An open transaction keeps a reader from reaching it).
    """
    ends = {at[1]: end for at, end in end_offsets(brokers, [topic], isolation).items()}
    if until is not None:
        ends = dict(until)
    found: dict[int, list[_R]] = {partition: [] for partition in ends}
    open_partitions = {partition for partition, end in ends.items() if end > 0}
    if not open_partitions:
        return found
    consumer = new_consumer(brokers, isolation, **{"auto.offset.reset": "earliest"})
    deadline = time.monotonic() + timeout_s
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in sorted(open_partitions)])
        while open_partitions:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} {sorted(open_partitions)} not read to {ends} in {timeout_s} s")
            for message in consumer.consume(5000, 0.2):
                partition, offset = message.partition(), message.offset()
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                if error is None and offset < ends[partition]:
                    found[partition].append(decode(message))
                if offset + (error is None) >= ends[partition]:
                    open_partitions.discard(partition)
    finally:
        consumer.close()
    return found


def first_record_from(
    brokers: str, positions: Mapping[tuple[str, int], int], timeout_s: float = 30
) -> tuple[str, int, int] | None:
    """Topic, partition and offset of any record that a read_committed reader finds from `positions` on.

    None if there are only markers and aborted records up to the last stable offsets.

    Raises:
        TimeoutError: the ends were not reached in time.
    """
    unread = set(positions)
    if not unread:
        return None
    consumer = new_consumer(brokers, READ_COMMITTED)
    deadline = time.monotonic() + timeout_s
    try:
        consumer.assign([TopicPartition(*at, offset) for at, offset in positions.items()])
        while unread:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{sorted(unread)} not read to their ends in {timeout_s} s")
            for message in consumer.consume(100, 0.2):
                topic, partition = message.topic(), message.partition()
                error = message.error()
                if error is None:
                    return topic, partition, message.offset()
                if error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                unread.discard((topic, partition))
    finally:
        consumer.close()
    return None


def read_input(
    brokers: str,
    topic: str,
    until: Mapping[int, int] | None = None,
    isolation: str = READ_COMMITTED,
) -> list[InputRecord]:
    """The source records before the offsets in `until` (without it, all of them), by partition and offset."""
    parts = read_topic(
        brokers,
        topic,
        isolation,
        lambda message: decode_input(message.value(), message.partition(), message.offset()),
        until=until,
    )
    return [record for partition in sorted(parts) for record in parts[partition]]


def read_output(
    brokers: str, topic: str, isolation: str = READ_COMMITTED
) -> tuple[dict[int, list[OutputRecord]], list[str]]:
    """The output by partition, and the records that aren't output records at all."""
    malformed: list[str] = []
    parts = read_topic(brokers, topic, isolation, lambda message: decode_or_note(message, malformed))
    return {
        partition: [row for row in rows if row is not None] for partition, rows in parts.items()
    }, malformed


def decode_or_note(message: Message, malformed: list[str]) -> OutputRecord | None:
    """The output record in `message`, or a note in `malformed`."""
    try:
        return decode_output(message.value(), message.partition(), message.offset())
    except MalformedRecord as error:
        malformed.append(str(error))
        return None
