"""A producer is made to look for coordinators again. Other clients aren't."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from fcluster.kafka import waking
from tests.harness import wait_until


@pytest.fixture(scope="module")
def brokers() -> Generator[str]:
    """Bootstrap servers of librdkafka's mock of three brokers."""
    producer = Producer({"test.mock.num.brokers": 3})
    metadata: Any = producer.list_topics(timeout=10)
    yield ",".join(f"{broker.host}:{broker.port}" for broker in metadata.brokers.values())
    producer.flush(1)


class Lines:
    """The client's log lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, _level: int, line: str, *arguments: object) -> None:
        self.lines.append(line % arguments if arguments else line)

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)


def test_opened_and_closed_connection_makes_waiting_requests_look_again(brokers: str) -> None:
    log = Lines()
    config = {"bootstrap.servers": brokers, "enable.sparse.connections": False, "debug": "broker"}
    producer = Producer(config, logger=log)
    producer.list_topics(timeout=10)

    def ups_and_downs() -> int:
        producer.poll(0.05)
        return min(
            log.count("/bootstrap: Broker changed state APIVERSION_QUERY -> UP"),
            log.count("/bootstrap: Broker changed state UP -> DOWN"),
        )

    def woken(before: int) -> bool:
        # While librdkafka still has a connection of that name from its start, it opens no other one.
        assert waking.look_again(producer, f"127.0.0.1:1,PLAINTEXT://{brokers.partition(',')[0]}")
        return ups_and_downs() > before

    for _ in range(5):
        before = ups_and_downs()
        wait_until(lambda before=before: woken(before), "a connection opens and closes", 10, 0.1)
    producer.list_topics(timeout=10)


def test_producer_is_not_woken_while_no_broker_accepts_connections(brokers: str) -> None:
    producer = Producer({"bootstrap.servers": brokers})
    assert not waking.look_again(producer, "127.0.0.1:1")


@pytest.mark.parametrize("other", [b"", b"12345678", 7, "text", {}], ids=repr)
def test_object_that_does_not_begin_with_a_producers_handle_is_not_touched(brokers: str, other: Any) -> None:
    # In the place of the handle there is a length, a number, or the end of the object.
    assert not waking.look_again(other, brokers)


def test_other_clients_are_not_touched(brokers: str) -> None:
    consumer: Any = Consumer({"bootstrap.servers": brokers, "group.id": "any"})
    try:
        assert not waking.look_again(consumer, brokers)
    finally:
        consumer.close()


def test_library_without_the_function_is_not_called(brokers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = Producer({"bootstrap.servers": brokers})
    monkeypatch.setattr(waking, "_library", lambda: None)
    assert not waking.look_again(producer, brokers)
