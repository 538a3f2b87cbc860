"""What has to be true before a coordinator may lead.

Responsible for: the checks at start, each with an error that names the cause and the remedy. Keeps the rule
that nothing is changed by a check. Must not decide what a leader does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from confluent_kafka import TopicPartition

from fcluster.common.admin_client import AdminClient, KeyRefused
from fcluster.common.discovery import find_leader
from fcluster.common.errors import ClusterConflict, FclusterError, IncompatibleState
from fcluster.common.kafka_clients import make_consumer, read_committed_positions
from fcluster.common.keys import Role
from fcluster.common.security import client_security
from fcluster.common.settings import Settings
from fcluster.common.topology import Topology, incompatibility

_log = logging.getLogger("fcluster.coordinator")

LEADER_ANSWER_MS = 1_000


def check_no_other_leader(settings: Settings, job: str) -> None:
    """Raises ClusterConflict if the coordinator that led the job last still answers."""
    leader = find_leader(settings, job)
    if leader is None:
        return
    try:
        security = client_security(settings, Role.COORDINATOR, leader.address, leader.public_key)
    except FclusterError as error:
        _log.warning("the last coordinator, at %s, can't be asked: %s", leader.address, error.message)
        return  # it ran with other keys, or without; if it lives, its journal is taken from it
    with AdminClient(leader.address, security) as client:
        try:
            answer = client.status(LEADER_ANSWER_MS)
        except KeyRefused as error:
            raise ClusterConflict(
                f"Somebody listens at {leader.address}, where the coordinator of job {job!r} was last, and "
                f"doesn't accept this key: {error.message}.",
                remedy="Give all coordinators of a job the same security.keys.dir, or stop that one first.",
            ) from error
        except FclusterError:
            return  # dead, or somebody else's port by now
    if answer.get("job") == job and answer.get("term") == leader.term:
        raise ClusterConflict(
            f"Job {job!r} is running already: its coordinator is process {leader.pid} on {leader.host}, at "
            f"{leader.address}.",
            remedy="Stop it first (end its `fcluster up` or `fcluster coordinator` with Ctrl-C), or give "
            "this job another name.",
        )


def check_partitions(past: Mapping[str, Any], partitions: Mapping[str, int]) -> None:
    """Raises IncompatibleState if a source has other partitions than the journal (`past`) remembers."""
    for topic, now in partitions.items():
        then = past.get(f"partitions/{topic}", {}).get("count", now)
        if then != now:
            raise IncompatibleState(
                f"The topic {topic!r} has {now} partitions; it had {then} when the job ran last. Keys would "
                "meet other shards' state.",
                remedy="Run the job under another name, which begins with empty state, or copy the records "
                f"to a topic with {then} partitions and read that.",
            )


def check_topology(past: Mapping[str, Any], topology: Topology) -> None:
    """Raises IncompatibleState if state of the topology in the journal (`past`) doesn't fit this one."""
    former = past.get("topology")
    reason = incompatibility(former, topology) if former is not None else None
    if reason is not None:
        raise IncompatibleState(
            f"The job has changed in a way that its state doesn't fit any more. {reason}",
            remedy="Undo that change, or run the job under another name, which begins with empty state.",
        )


def highest_committed_epoch(settings: Settings, job: str, partitions: Mapping[str, int]) -> int:
    """The highest epoch in the group's committed offsets, 0 if there are none.

    Raises:
        KafkaUnavailable: the brokers don't answer.
        IncompatibleState: the offsets were committed by something other than fcluster.
    """
    # Read-uncommitted: workers of a former leader may be in the midst of their transactions, which this
    # must not wait for. What they commit later has a number that the journal has reserved.
    consumer = make_consumer(settings, "read-uncommitted", **{"group.id": job})
    try:
        wanted = [
            TopicPartition(topic, partition)
            for topic, count in partitions.items()
            for partition in range(count)
        ]
        positions = read_committed_positions(consumer, job, wanted)
        return max((position.epoch for position in positions.values() if position), default=0)
    finally:
        consumer.close()
