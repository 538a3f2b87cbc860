"""The writer of epochs on a real broker: what an output looks like to its reader."""

from __future__ import annotations

import pytest
from confluent_kafka import Message

from fcluster.common.settings import Settings
from fcluster.kafka.clients import make_producer
from fcluster.worker.batches import Batches
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.transactions import (
    FrozenEpoch,
    TransactionalWriter,
    TransactionLostError,
    flush,
    waiting_produce,
)
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


def open_writer(kafka: str, job: str) -> TransactionalWriter:
    settings = Settings(bootstrap_servers=kafka)
    batches, waits = Batches(settings, lambda _topic: None), KafkaWaits(Watchdog())
    writer = TransactionalWriter(settings, job, 0, None, batches, waits, lambda _reason: None)
    writer.open()
    return writer


def test_writer_goes_on_after_an_abort(kafka: str, topic_prefix: str) -> None:
    """Two epochs are aborted: one whose outputs are on the broker, and the open one after it."""
    topic = f"{topic_prefix}out"
    create_topic(kafka, topic, 1)
    writer = open_writer(kafka, topic_prefix)
    for values in ([b"aborted"], [b"aborted, too"], None, [b"first"], [b"second"]):
        if values is None:
            writer.abort()
            continue
        transaction = writer.begin()
        for value in values:
            transaction.produce(topic, value, None, TIMESTAMP_MS)
        transaction.flush_outputs()
        if values[0] in (b"first", b"second"):
            transaction.commit(FrozenEpoch(1, 1, []))
    writer.abort()  # nothing is open
    writer.destroy(lambda: None)
    assert read_topic(kafka, topic, READ_COMMITTED, Message.value)[0] == [b"first", b"second"]


def test_fenced_writer_cannot_abort_itself_back(kafka: str, topic_prefix: str) -> None:
    topic = f"{topic_prefix}out"
    create_topic(kafka, topic, 1)
    zombie = open_writer(kafka, topic_prefix)
    transaction = zombie.begin()
    transaction.produce(topic, b"late", None, TIMESTAMP_MS)
    transaction.flush_outputs()
    heir = open_writer(kafka, topic_prefix)
    with pytest.raises(TransactionLostError) as lost:
        zombie.abort()
    assert not lost.value.abortable
    transaction = heir.begin()
    transaction.produce(topic, b"new", None, TIMESTAMP_MS)
    transaction.flush_outputs()
    transaction.commit(FrozenEpoch(1, 1, []))
    for writer in (zombie, heir):
        writer.destroy(lambda: None)
    assert read_topic(kafka, topic, READ_COMMITTED, Message.value)[0] == [b"new"]
