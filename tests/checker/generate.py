"""Writes test records to a source topic.

Responsible for: creating topics for tests and filling them, at full speed or at a steady rate. The producer
is idempotent, so a retry doesn't repeat a record. Even so, the checker takes the input from the topic. It
uses none of fcluster's own Kafka code, because an error there must not hide itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import NewTopic

from fcluster.worker import sending
from tests.checker.reading import admin_of, partitions_of
from tests.checker.records import InputRecord, encode_input, generate_records

PARTITIONER = "murmur2_random"
NUDGE_INTERVAL_S = 0.01


def create_topic(brokers: str, topic: str, partitions: int, config: dict[str, str] | None = None) -> None:
    """Create `topic`, and wait until the broker knows it. It is an error if it exists."""
    admin = admin_of(brokers)
    new = NewTopic(topic, num_partitions=partitions, replication_factor=-1, config=config or {})
    admin.create_topics([new])[topic].result(30)
    deadline = time.monotonic() + 30
    while len(partitions_of(brokers, topic)) < partitions:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the broker doesn't show the topic {topic} 30 s after its creation")
        time.sleep(0.05)


def delete_topic(brokers: str, topic: str) -> None:
    """Delete `topic`, and wait until the broker no longer knows it."""
    admin_of(brokers).delete_topics([topic])[topic].result(30)
    deadline = time.monotonic() + 30
    while partitions_of(brokers, topic):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the broker still shows the topic {topic} 30 s after its deletion")
        time.sleep(0.05)


def plain_producer(brokers: str, linger_ms: int = 2000) -> Producer:
    """An idempotent producer that routes keys the way Java clients do.

    Args:
        brokers: bootstrap servers.
        linger_ms: how long records may wait. So long is for those who flush; see fcluster/worker/sending.
    """
    return Producer(
        {
            "bootstrap.servers": brokers,
            "enable.idempotence": True,
            "partitioner": PARTITIONER,
            "linger.ms": linger_ms,
            "sticky.partitioning.linger.ms": 2,
            "socket.timeout.ms": 12_000,  # a broker that hangs keeps its connections; the default is 60 s
            "topic.metadata.refresh.interval.ms": 5_000,  # a broker that was cut off continues as if it led
            "queue.buffering.max.messages": 1_000_000,
            "log_level": 0,  # the brokers of some tests die on purpose
        }
    )


def write_records(brokers: str, topic: str, records: Iterable[InputRecord]) -> int:
    """Write `records` as fast as possible. Returns how many.

    Raises:
        KafkaException: a record could not be delivered.
    """
    with_key = _Sender(plain_producer(brokers), topic)
    count = 0
    for count, record in enumerate(records, start=1):  # noqa: B007
        with_key.send(record)
    with_key.finish()
    return count


class Generator:
    """Writes records at a steady rate in its own thread, until it is stopped or has written enough."""

    def __init__(
        self,
        brokers: str,
        topic: str,
        *,
        rate: float,
        keys: int,
        count_max: int = 10_000_000,
        seed: int = 1,
        hot_keys: int = 0,
    ) -> None:
        self._sender = _Sender(plain_producer(brokers), topic)
        self._rate = rate
        self._sequences: dict[str, int] = {}
        self._make = lambda first_id: generate_records(
            count_max,
            keys=keys,
            seed=seed,
            first_id=first_id,
            sequences=self._sequences,
            hot_keys=hot_keys,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"generator {topic}", daemon=True)
        self._error: BaseException | None = None
        self.written = 0

    def continue_after(self, sequences: dict[str, int]) -> None:
        """Continue where another writer stopped. `sequences` has each key's last sequence."""
        self._sequences = sequences

    def start(self) -> Generator:
        """Begin writing."""
        self._thread.start()
        return self

    def stop(self) -> int:
        """Stop, wait until everything is delivered, and return how many records were written."""
        self._stop.set()
        return self.join()

    def join(self, timeout_s: float = 60) -> int:
        """Wait until all records are written and delivered. Returns how many."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError("the generator doesn't end")
        if self._error is not None:
            raise self._error
        return self.written

    def _run(self) -> None:
        try:
            start = time.monotonic()
            for record in self._make(sum(self._sequences.values())):
                early_s = start + self.written / self._rate - time.monotonic()
                if early_s > 0 and self._stop.wait(early_s):
                    break
                if self._stop.is_set():
                    break
                self._sender.send(record)
                self.written += 1
            self._sender.finish()
        except BaseException as error:  # noqa: BLE001 - raised in the caller of join
            self._error = error


class _Sender:
    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer = producer
        self._topic = topic
        self._failed: KafkaError | None = None
        self._nudged_s = 0.0

    def send(self, record: InputRecord) -> None:
        value = encode_input(record, time.time_ns())
        key = record.key.encode()
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._delivered)
                break
            except BufferError:
                sending.nudge(self._producer)
                self._producer.poll(0.1)
        now_s = time.monotonic()
        if now_s - self._nudged_s > NUDGE_INTERVAL_S:
            self._nudged_s = now_s
            sending.nudge(self._producer)
        else:
            self._producer.poll(0)

    def finish(self) -> None:
        left = sending.flush(self._producer, 60)
        if self._failed is not None:
            raise KafkaException(self._failed)
        if left:
            raise TimeoutError(f"{left} test records are not delivered after 60 s")

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._failed = error
