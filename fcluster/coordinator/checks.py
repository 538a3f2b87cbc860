"""What has to be true before a coordinator may lead.

Responsible for: the checks at start, each with an error that names the cause and the remedy. Keeps the rule
that nothing is changed by a check. Must not decide what a leader does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from fcluster.common.errors import IncompatibleState
from fcluster.common.kafka_clients import read_committed_positions
from fcluster.common.topology import Topology, incompatibility, unverified_keys

_log = logging.getLogger("fcluster.coordinator")


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
    if former is None:
        return
    reason = incompatibility(former, topology)
    if reason is not None:
        raise IncompatibleState(
            f"The job has changed in a way that its state doesn't fit any more. {reason}",
            remedy="Undo that change, or run the job under another name, which begins with empty state.",
        )
    for remark in unverified_keys(former, topology):
        _log.warning("%s", remark)


def highest_committed_epoch(consumer: Consumer, job: str, partitions: Mapping[str, int]) -> int:
    """The highest epoch in the committed offsets of the group `job`,
    which the consumer belongs to; 0 if none.

    Raises:
        KafkaUnavailable: the brokers don't answer.
        IncompatibleState: the offsets were committed by something other than fcluster.
    """
    wanted = [
        TopicPartition(topic, partition) for topic, count in partitions.items() for partition in range(count)
    ]
    positions = read_committed_positions(consumer, job, wanted)
    return max((position.epoch for position in positions.values() if position), default=0)
