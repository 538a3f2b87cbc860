"""A reader that runs next to the job and remembers what it saw, and when.

Responsible for: one consumer in one thread, from the beginning of a topic, read_committed or
read_uncommitted. It keeps raw values and decodes them after the run, so that it doesn't slow down the job
that it watches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import orjson
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from tests.checker.reading import known_partitions, new_consumer
from tests.checker.records import InputRecord, OutputRecord, decode_input, decode_output


class LiveReader:
    """Reads `topic` until it is stopped."""

    def __init__(self, brokers: str, topic: str, isolation: str) -> None:
        self.topic = topic
        self.isolation = isolation
        self._seen: dict[int, list[tuple[int, bytes | None, int]]] = {}
        self._reached: dict[int, int] = {}
        self._stop = threading.Event()
        self._moved = threading.Condition()
        self._error: BaseException | None = None
        self._brokers = brokers
        self._thread = threading.Thread(target=self._run, name=f"{isolation} reader of {topic}", daemon=True)

    def start(self) -> LiveReader:
        """Begin reading. Returns once the reader has reached the topic's present end."""
        partitions = known_partitions(self._brokers, self.topic)
        self._seen = {partition: [] for partition in partitions}
        self._thread.start()
        self.wait_for(dict.fromkeys(partitions, 0), timeout_s=30)
        return self

    def wait_for(self, ends: Mapping[int, int], timeout_s: float) -> None:
        """Wait until the reader has passed the offsets `ends` of its partitions.

        Raises:
            TimeoutError: it hasn't.
        """
        deadline = time.monotonic() + timeout_s
        with self._moved:
            while any(self._reached.get(partition, -1) < end for partition, end in ends.items()):
                self._raise_error()
                if not self._moved.wait(min(0.5, max(0.0, deadline - time.monotonic()))) and (
                    time.monotonic() >= deadline
                ):
                    raise TimeoutError(
                        f"the {self.isolation} reader of {self.topic} is at {self._reached}, "
                        f"not at {dict(ends)}"
                    )

    def stop(self) -> None:
        """End the thread. What was seen can be read afterwards."""
        self._stop.set()
        self._thread.join(30)
        if self._thread.is_alive():
            raise TimeoutError("the live reader doesn't end")
        self._raise_error()

    def seen(self) -> dict[int, list[OutputRecord]]:
        """What was read, by partition, in the order of reading."""
        return {
            partition: [decode_output(value, partition, offset) for offset, value, _ in rows]
            for partition, rows in self._seen.items()
        }

    def seen_inputs(self) -> dict[int, list[InputRecord]]:
        """What was read from a topic of source records, or from one that they pass through."""
        return {
            partition: [decode_input(value, partition, offset) for offset, value, _ in rows]
            for partition, rows in self._seen.items()
        }

    def count(self) -> int:
        """How many records have been read so far."""
        return sum(len(rows) for rows in self._seen.values())

    def newest_ns(self) -> dict[int, int]:
        """By partition: the producer's clock in the last record that was read there. 0 if there is none."""
        return {
            partition: decode_output(rows[-1][1], partition, rows[-1][0]).produced_at_ns if rows else 0
            for partition, rows in self._seen.items()
        }

    def timed_rows(self) -> list[tuple[OutputRecord, int]]:
        """What has been read so far, each record with the reader's clock at that time."""
        return [
            (decode_output(value, partition, offset), seen_at_ns)
            for partition, rows in self._seen.items()
            for offset, value, seen_at_ns in list(rows)
        ]

    def times_ns(self) -> dict[tuple[int, int], int]:
        """By partition and offset: the reader's clock when that record was read."""
        return {
            (partition, offset): seen_at_ns
            for partition, rows in self._seen.items()
            for offset, _value, seen_at_ns in list(rows)
        }

    def produced_ns(self) -> dict[int, int]:
        """By record id: the producer's clock when it wrote the source record."""
        rows = [row for partition in self._seen.values() for row in partition]
        return {record["id"]: record["at"] for record in (orjson.loads(value or b"") for _, value, _ in rows)}

    def first_seen_ns(self) -> dict[int, int]:
        """By record id: this host's clock when the record, or an output of it, was first read."""
        first: dict[int, int] = {}
        for rows in self._seen.values():
            for _, value, seen_at_ns in rows:
                number = orjson.loads(value or b"")["id"]
                first[number] = min(seen_at_ns, first.get(number, seen_at_ns))
        return first

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            consumer = new_consumer(
                self._brokers, self.isolation, **{"auto.offset.reset": "earliest", "fetch.wait.max.ms": 5}
            )
            try:
                consumer.assign([TopicPartition(self.topic, partition, 0) for partition in self._seen])
                while not self._stop.is_set():
                    first = consumer.poll(0.1)
                    if first is not None:
                        self._take([first, *consumer.consume(1000, 0)])
            finally:
                consumer.close()
        except BaseException as error:  # noqa: BLE001 - raised in the next caller
            self._error = error

    def _take(self, messages: Sequence[Message]) -> None:
        now_ns = time.time_ns()
        with self._moved:
            for message in messages:
                error = message.error()
                partition, offset = message.partition(), message.offset()
                if error is None:
                    self._seen[partition].append((offset, message.value(), now_ns))
                    self._reached[partition] = offset + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._reached[partition] = max(offset, self._reached.get(partition, 0))
                elif error.fatal() or not error.retriable():
                    if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT):
                        continue
                    raise KafkaException(error)
            self._moved.notify_all()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the `values` are (nearest rank).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
