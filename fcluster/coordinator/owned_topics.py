"""Asks Kafka for what `internal_names` needs to know, and refuses topics that don't belong to the job.

Responsible for: the topology that a coordinator may use, in which each internal topic has its actual name. It
never changes anything. Must not create topics.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import TopicPartition

from fcluster.common.errors import IncompatibleState
from fcluster.common.ids import journal_topic
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings, with_settings
from fcluster.coordinator.internal_names import (
    Claim,
    Positions,
    claim_of,
    internal_names,
    not_ours,
    possible_claims,
    shared,
    unowned_topics,
)
from fcluster.graph.topology import Topology, former_names
from fcluster.kafka.clients import Admin, make_consumer
from fcluster.kafka.offsets import end_offsets, read_committed_positions
from fcluster.kafka.topics import existing_topics
from fcluster.wire.discovery import read_journal

_log = logging.getLogger("fcluster.coordinator")


def own_names(settings: Settings, admin: Admin, topology: Topology) -> Topology:
    """The topology with the actual names of its internal topics.

    Raises:
        IncompatibleState: a topic that the job needs has records of another job or program.
        KafkaUnavailable: the brokers don't answer.
    """
    existing = existing_topics(admin)
    past: Mapping[str, Any] = {}
    if journal_topic(topology.job) in existing:
        past = read_journal(settings, topology.job)
        if past and "term" not in past:
            raise IncompatibleState(
                f"The job {topology.job!r} needs the topic {journal_topic(topology.job)!r} for its "
                "journal, but the topic contains records that no coordinator writes.",
                remedy="Give the job another name, or find out which program writes to that topic.",
            )
    description = past.get("topology")
    with _committed(settings, existing, lenient=False) as positions:
        names = internal_names(topology, description, existing, positions)
        named = topology.with_internal_topics(names)
        former = set(former_names(topology).values())
        for topic in names.values():
            if topic in former:
                _refuse_shared(settings, topic, topology.job, existing, positions)
                _log.info("the topic %s keeps its name from an older version", topic)
        for topic, source in unowned_topics(named, description, existing):
            if not positions(topology.job, source) and _holds_records(admin, topic, existing[topic]):
                raise not_ours(topic, topology.job)
    return named


@dataclass(frozen=True, slots=True)
class Found:
    """The internal topics of a job, and what is wrong with them.

    Attributes:
        topology: the job, with the actual names.
        shared: topics that another job has also written to, with that job's claim.
        unowned: topics with records that can't be proven to be this job's.
    """

    topology: Topology
    shared: Mapping[str, Claim]
    unowned: Collection[str]


def found_names(settings: Settings, admin: Admin, topology: Topology, past: Mapping[str, Any]) -> Found:
    """Like `own_names`, for a job that starts again: problems are reported, not refused. Offsets that
    fcluster didn't commit prove nothing.

    Args:
        settings: the cluster's settings.
        admin: lists the topics.
        topology: the job, as it was built.
        past: the contents of the journal.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """
    existing = existing_topics(admin)
    description = past.get("topology")
    with _committed(settings, existing, lenient=True) as positions:
        names = internal_names(topology, description, existing, positions)
        named = topology.with_internal_topics(names)
        former = set(former_names(topology).values())
        claims = {
            topic: claim
            for topic in names.values()
            if topic in former
            and (claim := _claim(settings, topic, topology.job, existing, positions)) is not None
        }
        unowned = [
            topic
            for topic, source in unowned_topics(named, description, existing)
            if not positions(topology.job, source) and _holds_records(admin, topic, existing[topic])
        ]
    return Found(named, claims, unowned)


def _refuse_shared(
    settings: Settings, topic: str, job: str, existing: Mapping[str, int], positions: Positions
) -> None:
    claim = _claim(settings, topic, job, existing, positions)
    if claim is not None:
        raise shared(topic, job, claim)


def _claim(
    settings: Settings, topic: str, job: str, existing: Mapping[str, int], positions: Positions
) -> Claim | None:
    """Another job's claim on the topic."""
    for other in possible_claims(topic, job, existing):
        description = read_journal(with_settings(settings, reading_group=other), other).get("topology")
        claim = claim_of(other, topic, description, positions) if description is not None else None
        if claim is not None:
            return claim
    return None


def _holds_records(admin: Admin, topic: str, partitions: int) -> bool:
    wanted = [TopicPartition(topic, partition) for partition in range(partitions)]
    return any(end_offsets(admin, wanted, "read-uncommitted").values())


@contextlib.contextmanager
def _committed(settings: Settings, existing: Mapping[str, int], *, lenient: bool) -> Generator[Positions]:
    """What groups have committed, by job and topic. It uses one consumer for each job."""
    consumers: dict[str, Any] = {}

    def positions(job: str, topic: str) -> list[CommittedPosition]:
        if topic not in existing:
            return []
        if job not in consumers:
            consumers[job] = make_consumer(settings, "read-uncommitted", **{"group.id": job})
        wanted = [TopicPartition(topic, partition) for partition in range(existing[topic])]
        try:
            found = read_committed_positions(consumers[job], job, wanted)
        except IncompatibleState:
            if lenient:
                return []
            raise
        return [position for position in found.values() if position is not None]

    try:
        yield positions
    finally:
        for consumer in consumers.values():
            consumer.close()
