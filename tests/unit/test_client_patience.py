"""How long clients wait for a broker that keeps its connections and answers nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster.common import kafka_clients
from fcluster.common.kafka_clients import SOCKET_TIMEOUT_MS, consumer_config, producer_config
from fcluster.common.settings import resolve
from fcluster.coordinator import journal

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
        producer_config(settings),
        producer_config(settings, "id"),
        kafka_clients._config(settings, "admin.", kafka_clients._CONSUMER_ONLY, {}, {}),
    ):
        assert config[HANGS] == SOCKET_TIMEOUT_MS


def test_journals_producer_waits_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Connected:
        def list_topics(self, timeout: float) -> None:
            pass

    def make(kind: object, config: dict[str, Any]) -> Any:
        made.append(config)
        return Connected()

    monkeypatch.setattr(kafka_clients, "_make", make)
    journal.journal_producer(settings_of(), "job")
    assert made[0][HANGS] == journal.ANSWER_TIMEOUT_MS < SOCKET_TIMEOUT_MS


def test_users_own_value_counts() -> None:
    settings = settings_of(socket_timeout_ms=30_000)
    assert producer_config(settings, "id")[HANGS] == "30000"
    assert consumer_config(settings, "read-committed")[HANGS] == "30000"
