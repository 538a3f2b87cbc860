"""Whether Kafka has completed the failover from a dead broker, with librdkafka's mock of three brokers."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from confluent_kafka import Producer

from fcluster.common.ids import journal_topic
from fcluster.common.settings import Settings
from fcluster.kafka import failover

BROKERS = 3


@pytest.fixture(scope="module")
def brokers() -> Generator[list[tuple[str, int]]]:
    """Host and port of each broker."""
    producer = Producer({"test.mock.num.brokers": BROKERS})
    metadata: Any = producer.list_topics(journal_topic("job"), timeout=10)  # creates the topic
    yield [(broker.host, broker.port) for broker in metadata.brokers.values()]
    producer.flush(1)


@pytest.fixture
def settings(brokers: list[tuple[str, int]]) -> Settings:
    return Settings(bootstrap_servers=",".join(f"{host}:{port}" for host, port in brokers))


def test_failover_is_over_when_all_brokers_accept_connections(settings: Settings) -> None:
    assert failover.failover_is_over(settings, "job", waited_s=0, timeout_s=10)


def test_failover_is_not_over_while_a_listed_broker_refuses_connections(
    settings: Settings, brokers: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = brokers[-1]

    def connect(host: str, port: int) -> bool:
        return (host, port) != died

    monkeypatch.setattr(failover, "accepts_connections", connect)
    assert not failover.failover_is_over(settings, "job", waited_s=1, timeout_s=10)
    assert not failover.failover_is_over(
        settings, "job", waited_s=failover.UNREACHABLE_S_MAX - 1, timeout_s=10
    )


def test_wait_for_a_broker_that_only_this_process_cannot_reach_is_bounded(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:

    def connect(host: str, port: int) -> bool:
        return False

    monkeypatch.setattr(failover, "accepts_connections", connect)
    assert failover.failover_is_over(settings, "job", waited_s=failover.UNREACHABLE_S_MAX, timeout_s=10)


def test_port_without_a_listener_accepts_no_connection(brokers: list[tuple[str, int]]) -> None:
    host, port = brokers[0]
    assert failover.accepts_connections(host, port)
    assert not failover.accepts_connections(host, 1)


def test_failover_is_not_over_while_kafka_does_not_answer() -> None:
    settings = Settings(bootstrap_servers="127.0.0.1:1")
    assert not failover.failover_is_over(settings, "job", waited_s=100, timeout_s=0.1)
