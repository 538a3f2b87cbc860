"""Whether committed records are safe: replicas of the topics that fcluster creates, and warnings about topics
with too few.

Responsible for: the number of replicas of a topic that the job needs, given what the brokers offer; and
pointing out where a topic can lose committed records (`docs/kafka.md` has the reasons). With a single broker
there is nothing to choose and nothing to warn about. If the brokers don't show us a setting, there is no
warning about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,  # pyright: ignore[reportPrivateImportUsage]
)

REPLICAS: Final = 3
"""One broker may be down for maintenance, and another one may die."""
IN_SYNC_MIN: Final = 2
REQUEST_TIMEOUT_S: Final = 10.0
NAMES_MAX: Final = 3
"""A line names at most this many topics, and counts the rest."""

_MIN_IN_SYNC: Final = "min.insync.replicas"
_UNCLEAN: Final = "unclean.leader.election.enable"
KAFKAS_OWN: Final[Mapping[str, tuple[str, str]]] = {
    "__consumer_offsets": ("offsets.topic.replication.factor", _MIN_IN_SYNC),
    "__transaction_state": ("transaction.state.log.replication.factor", "transaction.state.log.min.isr"),
}
"""Kafka's own topics that a commit writes to, and the broker settings with which they are created."""


@dataclass(frozen=True)
class Replication:
    """How a topic is created.

    Attributes:
        factor: the number of replicas. -1: the brokers' default.
        config: additional settings of the topic.
    """

    factor: int
    config: Mapping[str, str]


def replications(admin: AdminClient, factor: int, defaults: Mapping[str, str]) -> Sequence[Replication]:
    """Ways to create topics, best first. If the brokers refuse one because there are too few of them, the
    next one is tried.

    Args:
        admin: a connected client.
        factor: the setting `replication.factor`, -1 if it isn't given. Then it is 3, or the brokers' default
            if that is higher, on a cluster with three brokers.
        defaults: the settings of the brokers; see `broker_settings`.

    Raises:
        KafkaException: the brokers don't answer.
    """
    brokers = len(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers)
    if factor >= 0:
        return [_with_in_sync(Replication(factor, {}), defaults)]
    default = _number(defaults, "default.replication.factor", 1)
    if default >= REPLICAS or brokers < 2:
        return [_with_in_sync(Replication(-1, {}), defaults, default)]
    # Brokers that are down count too: Kafka places replicas on them. Only Kafka knows how many there are.
    wanted = [_with_in_sync(Replication(count, {}), defaults) for count in (REPLICAS, 2)]
    return [*wanted, _with_in_sync(Replication(-1, {}), defaults, default)]


def _with_in_sync(wanted: Replication, defaults: Mapping[str, str], factor: int | None = None) -> Replication:
    """Two of three replicas have to acknowledge, unless the brokers already require that."""
    enough = _number(defaults, _MIN_IN_SYNC, 1) >= IN_SYNC_MIN
    if (wanted.factor if factor is None else factor) < REPLICAS or enough:
        return wanted
    return replace(wanted, config={_MIN_IN_SYNC: str(IN_SYNC_MIN)})


# --- warnings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopicCare:
    """How a topic is kept: its number of replicas, how many of them have to acknowledge a record, and whether
    a replica that has missed records may become leader. None: we lack the permission to see it.
    """

    replicas: int
    in_sync_min: int | None
    unclean: bool | None


def risks(cares: Mapping[str, TopicCare], to_come: Mapping[str, TopicCare], nodes: int) -> list[str]:
    """Lines that name what can lose committed records, and the remedy, one for each kind of risk.

    Args:
        cares: of existing topics, by name.
        to_come: Kafka's own topics that it hasn't created yet, according to its settings.
        nodes: the number of brokers in the cluster.
    """
    if nodes < 2:
        return []
    every = {**{name: care for name, care in to_come.items() if name not in cares}, **cares}
    lines = [
        _line(
            [name for name, care in every.items() if care.replicas == 1],
            to_come.keys() - cares.keys(),
            "only one replica, so it is lost with its broker's disk, and unavailable without that broker; "
            "Kafka 4.3 also loses ends of transactions meanwhile (KAFKA-20734)",
            "kafka-reassign-partitions adds replicas",
        ),
        _line(
            [
                name
                for name, care in every.items()
                if care.replicas > 1 and care.in_sync_min is not None and care.in_sync_min < IN_SYNC_MIN
            ],
            to_come.keys() - cares.keys(),
            "min.insync.replicas=1, so a committed record may be on only one broker",
            "kafka-configs --alter --add-config min.insync.replicas=2",
        ),
        _line(
            [name for name, care in every.items() if care.unclean],
            to_come.keys() - cares.keys(),
            "unclean.leader.election.enable=true, so a broker that has missed committed records may "
            "become leader",
            "kafka-configs --alter --add-config unclean.leader.election.enable=false",
        ),
    ]
    return [line for line in lines if line]


def _line(names: Sequence[str], to_come: Iterable[str], what: str, remedy: str) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:NAMES_MAX])
    more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
    own = [setting for name in names if name in to_come for setting in KAFKAS_OWN[name]]
    before = (
        f", and before Kafka creates its own topics: the broker settings {' and '.join(dict.fromkeys(own))}"
        if own
        else ""
    )
    return f"{shown}{more}: {what}. Remedy: {remedy}{before}."


def look_for_risks(admin: AdminClient, topics: Iterable[str]) -> list[str]:
    """The lines of `risks` for those of these topics that exist, and for Kafka's own topics that commits
    write to. What can't be seen (no permission, no answer) is left out, because this must never stop a job.
    """
    try:
        found = admin.list_topics(timeout=REQUEST_TIMEOUT_S)
    except KafkaException:
        return []
    wanted = [name for name in dict.fromkeys([*topics, *KAFKAS_OWN]) if _has_partitions(found, name)]
    replicas = {
        name: min(len(partition.replicas) for partition in found.topics[name].partitions.values())
        for name in wanted
    }
    nodes = {*found.brokers} | {
        node
        for name in wanted
        for partition in found.topics[name].partitions.values()
        for node in partition.replicas
    }
    if len(nodes) < 2:
        return []
    configs = _describe(admin, [ConfigResource(ConfigResource.Type.TOPIC, name) for name in wanted])
    cares = {name: _care(replicas[name], configs.get(name, {})) for name in wanted}
    defaults = broker_settings(admin)
    to_come = {
        name: _care(
            _number(defaults, factor, REPLICAS), {**defaults, _MIN_IN_SYNC: defaults.get(in_sync, "")}
        )
        for name, (factor, in_sync) in KAFKAS_OWN.items()
        if name not in cares and factor in defaults
    }
    return risks(cares, to_come, len(nodes))


def _has_partitions(found: Any, name: str) -> bool:
    topic = found.topics.get(name)
    return topic is not None and topic.error is None and bool(topic.partitions)


def _care(replicas: int, config: Mapping[str, str]) -> TopicCare:
    in_sync = config.get(_MIN_IN_SYNC, "")
    unclean = config.get(_UNCLEAN)
    return TopicCare(
        replicas, int(in_sync) if in_sync.isdigit() else None, None if unclean is None else unclean == "true"
    )


# --- asking --------------------------------------------------------------------------------------------


def broker_settings(admin: AdminClient) -> Mapping[str, str]:
    """The settings of one of the brokers; empty if we lack the permission to see them.

    Raises:
        KafkaException: the brokers don't answer.
    """
    broker = next(iter(admin.list_topics(timeout=REQUEST_TIMEOUT_S).brokers))
    return _describe(admin, [ConfigResource(ConfigResource.Type.BROKER, str(broker))]).get(str(broker), {})


def _describe(admin: AdminClient, resources: Sequence[ConfigResource]) -> dict[str, Mapping[str, str]]:
    """The settings of each resource that we have the permission to see, by its name."""
    if not resources:
        return {}
    untyped: Any = admin
    ask: Callable[..., Mapping[Any, Future[Any]]] = untyped.describe_configs
    found = dict[str, Mapping[str, str]]()
    for resource, future in ask(list(resources), request_timeout=REQUEST_TIMEOUT_S).items():
        try:
            entries = future.result()
        except KafkaException:
            continue
        found[resource.name] = {
            name: entry.value for name, entry in entries.items() if entry.value is not None
        }
    return found


def _number(settings: Mapping[str, str], name: str, otherwise: int) -> int:
    value = settings.get(name, "")
    return int(value) if value.isdigit() else otherwise
