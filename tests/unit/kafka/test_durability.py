"""How topics are created, and which warnings there are about topics that can lose committed records."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.kafka.durability import (
    Replication,
    TopicCare,
    broker_settings,
    look_for_risks,
    replications,
    risks,
)

WELL = TopicCare(3, 2, False)


class Brokers:
    """The part of an admin client that is used here. A setting of None is hidden from the user."""

    def __init__(
        self, count: int, settings: dict[str, str] | None, topics: dict[str, int] | None = None
    ) -> None:
        self._settings = settings
        self._metadata = SimpleNamespace(
            brokers={node: node for node in range(1, count + 1)},
            topics={
                name: SimpleNamespace(
                    error=None, partitions={0: SimpleNamespace(replicas=list(range(1, n + 1)))}
                )
                for name, n in (topics or {}).items()
            },
        )

    def list_topics(self, timeout: float) -> Any:
        return self._metadata

    def describe_configs(self, resources: list[Any], request_timeout: float) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for resource in resources:
            future: Future[Any] = Future()
            if self._settings is None:
                future.set_exception(KafkaException(KafkaError(KafkaError.CLUSTER_AUTHORIZATION_FAILED)))
            else:
                entries = {name: SimpleNamespace(value=value) for name, value in self._settings.items()}
                future.set_result(entries)
            found[resource] = future
        return found


BARE = {"default.replication.factor": "1", "min.insync.replicas": "1"}
IN_SYNC = {"min.insync.replicas": "2"}


@pytest.mark.parametrize(
    ("brokers", "settings", "factor", "expected"),
    [
        (1, BARE, -1, [Replication(-1, {})]),
        (3, BARE, -1, [Replication(3, IN_SYNC), Replication(2, {}), Replication(-1, {})]),
        # One of three is down. The other two are visible, and Kafka places a replica on the third as well.
        (2, BARE, -1, [Replication(3, IN_SYNC), Replication(2, {}), Replication(-1, {})]),
        (3, None, -1, [Replication(3, IN_SYNC), Replication(2, {}), Replication(-1, {})]),
        (3, {**BARE, "default.replication.factor": "3"}, -1, [Replication(-1, IN_SYNC)]),
        (5, {"default.replication.factor": "5", **IN_SYNC}, -1, [Replication(-1, {})]),
        (3, BARE, 1, [Replication(1, {})]),
        (3, BARE, 3, [Replication(3, IN_SYNC)]),
        (3, {**BARE, **IN_SYNC}, 3, [Replication(3, {})]),
    ],
)
def test_replication_factor_is_what_the_brokers_allow(
    brokers: int, settings: dict[str, str] | None, factor: int, expected: list[Replication]
) -> None:
    admin: Any = Brokers(brokers, settings)
    assert list(replications(admin, factor, broker_settings(admin))) == expected


def test_single_broker_gets_no_warning() -> None:
    assert risks({"flights": TopicCare(1, 1, True)}, {}, 1) == []


def test_safe_topics_get_no_warning() -> None:
    assert risks({"flights": WELL, "unseen": TopicCare(3, None, None)}, {"__consumer_offsets": WELL}, 3) == []


def test_each_kind_of_risk_is_one_bounded_line_with_its_remedy() -> None:
    cares = {f"topic-{number}": TopicCare(1, 1, False) for number in range(1000)}
    cares |= {"thin": TopicCare(3, 1, False), "unclean": TopicCare(3, 2, True)}
    lone, thin, unclean = risks(cares, {}, 3)
    assert lone.startswith("topic-0, topic-1, topic-10 and 997 more: only one replica")
    assert thin.startswith("thin: min.insync.replicas=1")
    assert unclean.startswith("unclean: unclean.leader.election.enable=true")
    for line in (lone, thin, unclean):
        assert "Remedy: kafka-" in line
        assert len(line) < 300


def test_future_topics_of_kafka_itself_are_judged_by_the_brokers_settings() -> None:
    (line,) = risks({"flights": WELL}, {"__transaction_state": TopicCare(1, 1, False)}, 3)
    assert line.startswith("__transaction_state: only one replica")
    assert "settings transaction.state.log.replication.factor and transaction.state.log.min.isr" in line
    assert risks({"__transaction_state": WELL}, {"__transaction_state": TopicCare(1, 1, False)}, 3) == []


def test_hidden_settings_get_no_warning() -> None:
    admin: Any = Brokers(3, None, {"flights": 3})
    assert look_for_risks(admin, ["flights", "not-there"]) == []


def test_replicas_on_brokers_that_are_down_count_as_several_brokers() -> None:
    admin: Any = Brokers(1, BARE, {"flights": 3})
    (line,) = look_for_risks(admin, ["flights"])
    assert line.startswith("flights: min.insync.replicas=1")


def test_silent_brokers_do_not_stop_a_job() -> None:
    admin: Any = Brokers(3, BARE)

    def silent(timeout: float) -> Any:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    admin.list_topics = silent
    assert look_for_risks(admin, ["flights"]) == []
