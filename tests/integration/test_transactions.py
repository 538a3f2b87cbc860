"""The writer of epochs on a real broker: what an output looks like to its reader."""

from __future__ import annotations

from confluent_kafka import Message

from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_producer
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.transactions import flush, waiting_produce
from fcluster.worker.watchdog import Watchdog
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic

TIMESTAMP_MS = 1_356_998_400_000


def test_output_has_key_timestamp_and_headers(kafka: str, topic_prefix: str) -> None:
    topic = f"{topic_prefix}out"
    create_topic(kafka, topic, 1)
    producer = make_producer(Settings(bootstrap_servers=kafka))
    produce = waiting_produce(producer)
    produce(topic, b"plain", b"k", TIMESTAMP_MS)
    produce(topic, b"with", None, TIMESTAMP_MS + 1, [("a", b"1"), ("a", b"2")])
    produce(topic, None, b"k", TIMESTAMP_MS + 2)
    flush(producer, KafkaWaits(Watchdog()))

    def row(message: Message) -> tuple[object, ...]:
        return message.value(), message.key(), message.timestamp()[1], message.headers()

    assert read_topic(kafka, topic, READ_COMMITTED, row)[0] == [
        (b"plain", b"k", TIMESTAMP_MS, None),
        (b"with", None, TIMESTAMP_MS + 1, [("a", b"1"), ("a", b"2")]),
        (None, b"k", TIMESTAMP_MS + 2, None),
    ]
