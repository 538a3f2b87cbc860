"""How long clients wait for a broker that keeps its connections open and answers nothing."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.common.settings import resolve
from fcluster.coordinator import journal
from fcluster.kafka import clients as kafka_clients
from fcluster.kafka import fencing
from fcluster.kafka.asking import ATTEMPT_TIMEOUT_S
from fcluster.kafka.clients import (
    PRODUCER_SOCKET_TIMEOUT_MS,
    SOCKET_TIMEOUT_MS,
    consumer_config,
    producer_config,
)
from fcluster.kafka.fencing import FENCE_RESTING_WAIT_S, fence_transactional_id
from fcluster.storage import warm_copies as standby
from fcluster.worker.sending import sending_config

HANGS = "socket.timeout.ms"


def settings_of(**of_kafka: object) -> Any:
    flags = {"bootstrap.servers": "a:1"} | {
        f"kafka.{name.replace('_', '.')}": str(value) for name, value in of_kafka.items()
    }
    return resolve(flags, None, {}, {})


def test_no_client_waits_for_a_hanging_broker_as_long_as_librdkafka_would() -> None:
    settings = settings_of()
    for config in (
        consumer_config(settings, "read-committed"),
        kafka_clients._config(settings, "admin.", kafka_clients._CONSUMER_ONLY, {}, {}),
    ):
        assert config[HANGS] == SOCKET_TIMEOUT_MS
    for config in (producer_config(settings), producer_config(settings, "id")):
        assert config[HANGS] == PRODUCER_SOCKET_TIMEOUT_MS > 9_000, (
            "as long as a dead follower counts as in sync, all wait"
        )


def test_no_client_waits_long_for_a_leader_that_is_cut_off_from_the_other_brokers() -> None:
    settings = settings_of()
    for config in (
        consumer_config(settings, "read-committed"),
        producer_config(settings),
        producer_config(settings, "id"),
        kafka_clients._config(settings, "admin.", kafka_clients._CONSUMER_ONLY, {}, {}),
    ):
        assert config["topic.metadata.refresh.interval.ms"] <= SOCKET_TIMEOUT_MS
    users = settings_of(topic_metadata_refresh_interval_ms=60_000)
    assert producer_config(users, "id")["topic.metadata.refresh.interval.ms"] == "60000"


def test_long_lived_clients_can_ask_brokers_that_lead_none_of_their_partitions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If one broker leads all partitions of a client, the client would only be connected to that broker."""
    sparse = "enable.sparse.connections"
    assert sending_config(settings_of())[sparse] is False
    assert standby._CONSUMER[sparse] is False
    assert config_of_journals_producer(monkeypatch)[sparse] is False


def test_no_request_lasts_longer_than_a_transaction() -> None:
    settings = resolve(
        {
            "bootstrap.servers": "a:1",
            "kafka.transaction.timeout.ms": "9000",
            "checkpoint.timeout.ms": "2000",
            "record.timeout.ms": "1000",
            "session.timeout.ms": "1000",
        },
        None,
        {},
        {},
    )
    assert producer_config(settings, "id")[HANGS] <= settings.transaction_timeout_ms + 100


def config_of_journals_producer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: list[dict[str, Any]] = []

    class Connected:
        def list_topics(self, timeout: float) -> None:
            pass

    def make(kind: object, config: dict[str, Any]) -> Any:
        made.append(config)
        return Connected()

    monkeypatch.setattr(kafka_clients, "_make", make)
    journal.journal_producer(settings_of(), "job")
    return made[0]


def test_producer_of_the_journal_waits_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of_journals_producer(monkeypatch)[HANGS] == journal.ANSWER_TIMEOUT_MS < SOCKET_TIMEOUT_MS


def test_value_set_by_the_user_is_kept() -> None:
    settings = settings_of(socket_timeout_ms=30_000)
    assert producer_config(settings, "id")[HANGS] == "30000"
    assert consumer_config(settings, "read-committed")[HANGS] == "30000"


def test_idle_fencing_producer_that_asks_a_hanging_broker_is_soon_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits_s: list[float] = []
    fenced_by: list[str] = []

    class Fencing:
        def __init__(self, name: str) -> None:
            self.name = name

        def list_topics(self, timeout: float) -> None:
            waits_s.append(timeout)
            if self.name == "rested":
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

        def init_transactions(self, timeout: float) -> None:
            fenced_by.append(self.name)

    monkeypatch.setattr(fencing, "make_producer", lambda *_: Fencing("new"))
    ready: Any = [Fencing("rested"), Fencing("rested")]
    fence_transactional_id(settings_of(), "id", ready=ready)
    assert waits_s == [FENCE_RESTING_WAIT_S, FENCE_RESTING_WAIT_S, ATTEMPT_TIMEOUT_S]
    assert fenced_by == ["new"]
    assert not ready
