"""How the checker reads Kafka in cases that are less simple than they look."""

from __future__ import annotations

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.checker.check import check_no_open_transactions, wait_until_committed
from tests.checker.generate import create_topic


@pytest.fixture
def topic(kafka: str, topic_prefix: str) -> str:
    create_topic(kafka, f"{topic_prefix}in", 1)
    return f"{topic_prefix}in"


@pytest.fixture
def producer(kafka: str, topic_prefix: str) -> Producer:
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": f"{topic_prefix}id"})
    producer.list_topics(timeout=30)
    producer.init_transactions(30)
    return producer


def write(producer: Producer, topic: str, count: int) -> None:
    producer.begin_transaction()
    for _ in range(count):
        producer.produce(topic, b"x")
    assert producer.flush(30) == 0


def commit_offset(kafka: str, group: str, topic: str, offset: int) -> None:
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": group})
    consumer.commit(offsets=[TopicPartition(topic, 0, offset)], asynchronous=False)
    consumer.close()


def test_markers_after_the_committed_offset_are_not_waited_for(
    kafka: str, topic: str, producer: Producer
) -> None:
    write(producer, topic, 3)
    producer.commit_transaction(30)
    write(producer, topic, 2)
    producer.abort_transaction(30)
    commit_offset(kafka, f"{topic}-job", topic, 3)
    wait_until_committed(kafka, f"{topic}-job", [topic], 10)


def test_record_after_the_committed_offset_is_waited_for(kafka: str, topic: str, producer: Producer) -> None:
    write(producer, topic, 3)
    producer.commit_transaction(30)
    commit_offset(kafka, f"{topic}-job", topic, 2)
    with pytest.raises(TimeoutError, match="committed up to 2, and a record is at 2"):
        wait_until_committed(kafka, f"{topic}-job", [topic], 0.5)


def test_open_transaction_is_waited_for_and_found(kafka: str, topic: str, producer: Producer) -> None:
    write(producer, topic, 3)
    with pytest.raises(TimeoutError, match="has an open transaction at 0 of 3"):
        wait_until_committed(kafka, f"{topic}-job", [topic], 0.5)
    verdict = check_no_open_transactions(kafka, f"{topic}-job", topic, timeout_s=0.5)
    assert verdict.counts["open"] == 1, verdict.report()
    producer.abort_transaction(30)
    assert check_no_open_transactions(kafka, f"{topic}-job", topic).ok
