"""What must be true before a coordinator may lead.

Responsible for: the checks at start. Each error names the cause and the remedy. A check never changes
anything. Must not decide what a leader does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from fcluster.common.errors import IncompatibleState
from fcluster.common.positions import RESET_FINGERPRINT, CommittedPosition
from fcluster.common.settings import Settings
from fcluster.coordinator.core.topics import TOPIC_KEY_PREFIX, Role, lost_topic, roles_of
from fcluster.graph.compatibility import incompatibility, unverified_keys
from fcluster.graph.description import described_inputs
from fcluster.graph.topology import Topology
from fcluster.kafka.offsets import read_committed_positions
from fcluster.kafka.topic_ids import Look, fits, reset_remedy
from fcluster.kafka.topic_looks import look_at_topics, settled_look

_log = logging.getLogger("fcluster.coordinator")

RESETTING_KEY = "resetting"
"""Journal key of a `fcluster reset` that has begun and isn't finished."""


def check_reset(past: Mapping[str, Any], job: str) -> None:
    """Raises IncompatibleState if a reset was interrupted: then the state is neither the old nor the new
    one.
    """
    resetting = past.get(RESETTING_KEY)
    if resetting is not None:
        raise IncompatibleState(
            f"A `fcluster reset` of job {job!r} to {resetting.get('to')} was started and then interrupted.",
            remedy="Run it again to finish it.",
        )


def check_partitions(past: Mapping[str, Any], topology: Topology, partitions: Mapping[str, int]) -> None:
    """Raises IncompatibleState if the partition count of a source differs from the one in the journal
    (`past`).

    For stages without state, additional partitions are fine: they are read too.
    """
    stateless = {topic for stage in topology.stages if stage.changelog is None for topic in stage.topics}
    for topic, now in partitions.items():
        then = past.get(f"partitions/{topic}", {}).get("count", now)
        if then == now or (topic in stateless and now > then):
            continue
        why = "Keys would meet the state of other shards." if now > then else "It must be another topic."
        raise IncompatibleState(
            f"The topic {topic!r} has {now} partitions, but had {then} when the job last ran. {why}",
            remedy=f"Copy the records to a topic with {then} partitions and read that, or start again: "
            f"{reset_remedy(topology.job)}",
        )


def remembered_ids(past: Mapping[str, Any]) -> dict[str, str]:
    """The topic ids in the journal (`past`)."""
    return {
        key.removeprefix(TOPIC_KEY_PREFIX): str(value["id"])
        for key, value in past.items()
        if key.startswith(TOPIC_KEY_PREFIX)
    }


def look_for(admin: AdminClient, topology: Topology, ids: Mapping[str, str]) -> Look:
    """What is there of the job's topics. Where that contradicts an id, brokers are asked again for a while.

    Args:
        admin: a connected client.
        topology: the job, with the actual names of its internal topics.
        ids: the recorded ids of topics.
    """
    expected = dict.fromkeys(roles_of(topology), "") | dict(ids)
    look = functools.partial(look_at_topics, admin)
    doubtful = {topic: topic_id for topic, topic_id in expected.items() if topic_id}
    return {**look(expected.keys() - doubtful.keys()), **settled_look(look, doubtful)}


def check_topics(
    topology: Topology, settings: Settings, ids: Mapping[str, str], look: Look
) -> dict[str, str]:
    """The ids of the job's topics.

    Args:
        topology: the job.
        settings: the setting `sink.missing` says what to do about a missing output topic.
        ids: the recorded ids of the topics.
        look: the topics as they are now.

    Raises:
        MissingTopic: a source that existed before was deleted.
        TopicReplaced: another topic was deleted, or a topic was replaced.
    """
    found = dict(ids)
    for topic, role in roles_of(topology).items():
        if topic not in look:
            continue
        seen, known = look[topic], ids.get(topic, "")
        accepted = role is Role.SINK and settings.sink_missing == "create"
        if known and not accepted and not fits(seen, known):
            raise lost_topic(topology.job, topic, role, known, seen)
        if seen is not None and seen.topic_id:
            found[topic] = seen.topic_id
    return found


def check_topology(past: Mapping[str, Any], topology: Topology) -> None:
    """Raises IncompatibleState if the state of the topology in the journal (`past`) isn't compatible with
    this topology.
    """
    former = past.get("topology")
    if former is None:
        return
    reason = incompatibility(former, topology)
    if reason is not None:
        raise no_longer_fits(topology.job, reason)
    for remark in unverified_keys(former, topology):
        _log.warning("%s", remark)


def no_longer_fits(job: str, reason: str) -> IncompatibleState:
    """The error for a job that has changed so that it can't use its state, for this reason."""
    return IncompatibleState(
        f"The job has changed in such a way that its state no longer fits. {reason}",
        remedy="Undo that change, or run the job under another name, which starts with empty state, or "
        f"reset it: {reset_remedy(job)}",
    )


def check_inputs(
    past: Mapping[str, Any], topology: Topology, committed: Mapping[TopicPartition, CommittedPosition]
) -> None:
    """Raises IncompatibleState if a stage read topics together and only some of them have committed offsets.

    Workers check this too, but not if the job has changed since: a topic without an offset may be new to the
    stage then.

    Args:
        past: the journal.
        topology: the job that will run.
        committed: the committed positions of all its inputs.
    """
    former = described_inputs(past.get("topology") or {})
    for stage in topology.stages:
        together = [topic for topic in stage.topics if topic in former.get(stage.name, ())]
        for partition in {at.partition for at in committed if at.topic in together}:
            found = {topic: committed.get(TopicPartition(topic, partition)) for topic in together}
            missing = [topic for topic, position in found.items() if position is None]
            reset = any(at is not None and at.fingerprint == RESET_FINGERPRINT for at in found.values())
            if missing and not reset:
                raise IncompatibleState(
                    f"The stage {stage.name!r} reads {', '.join(together)} together, and has no committed "
                    f"offset for partition {partition} of {', '.join(missing)}: it was deleted, or has "
                    "expired.",
                    remedy=f"Begin anew: {reset_remedy(topology.job)}",
                )


def committed_positions(
    consumer: Consumer, job: str, partitions: Mapping[str, int]
) -> dict[TopicPartition, CommittedPosition]:
    """The committed position of each partition that the job reads. `job` is the name of the group, which is
    also the consumer's group.

    Raises:
        KafkaUnavailable: the brokers don't answer.
        IncompatibleState: the offsets were not committed by fcluster.
    """
    wanted = [
        TopicPartition(topic, partition) for topic, count in partitions.items() for partition in range(count)
    ]
    positions = read_committed_positions(consumer, job, wanted)
    return {at: position for at, position in positions.items() if position is not None}


def refresh_interval_ms(settings: Settings, remembered_ms: int | None) -> tuple[int, str]:
    """The longest time between two commits of an idle worker, well within what the brokers remember; and a
    warning if that is less than the setting, otherwise "".

    Args:
        settings: the cluster's settings.
        remembered_ms: how long the brokers remember idle transactional ids. None: unknown.
    """
    interval_ms = settings.offset_refresh_interval_ms
    # A worker's two ids are used in turn, and each has to be used before it is forgotten.
    if remembered_ms is None or interval_ms <= remembered_ms // 4:
        return interval_ms, ""
    return remembered_ms // 4, (
        f"the brokers forget transactional ids that are idle for {remembered_ms} ms "
        f"(transactional.id.expiration.ms), but offset.refresh.interval.ms is {interval_ms} ms: an idle "
        "worker's next epoch may have to be run twice. Set offset.refresh.interval.ms to at most "
        f"{remembered_ms // 4} ms."
    )
