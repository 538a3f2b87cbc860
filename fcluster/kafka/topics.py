"""The topics of a job: their partition counts, and the topics that fcluster creates.

Responsible for: the plan of a job's internal topics and missing output topics, and their settings; creating
them. Existing topics aren't changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (
    AdminClient,
    NewTopic,  # pyright: ignore[reportPrivateImportUsage]
)

from fcluster.common.errors import IncompatibleState, KafkaUnavailable, MissingTopic
from fcluster.common.ids import colliding_topic, journal_topic
from fcluster.common.offsets import NotKnownYetError
from fcluster.common.settings import Settings
from fcluster.graph.stages import Stage, check_copartitioned
from fcluster.graph.topology import Topology
from fcluster.kafka.asking import (
    ATTEMPT_TIMEOUT_S,
    POLL_INTERVAL_S,
    REQUEST_TIMEOUT_S,
    ask_until_known,
    asking,
    cause_of,
    is_not_known_yet,
    unavailable,
    untyped,
)
from fcluster.kafka.durability import Replication, broker_settings, replications
from fcluster.kafka.missing import missing_topic
from fcluster.kafka.topic_ids import reset_remedy

TOPIC_CREATION_TIMEOUT_S: Final = 30.0
_IF_MISSING: Final = "Correct the name in the job file, or create the topic (`fcluster produce` can do that)."


def partition_counts(admin: AdminClient, topics: Iterable[str]) -> dict[str, int]:
    """The number of partitions of each topic.

    Raises:
        MissingTopic: one doesn't exist.
        KafkaUnavailable: the brokers don't answer.
    """
    existing = existing_topics(admin)
    wanted = list(topics)
    for topic in wanted:
        if topic not in existing:
            raise missing_topic(topic, existing, _IF_MISSING)
    return {topic: existing[topic] for topic in wanted}


def ensure_internal_topics(admin: AdminClient, topology: Topology, settings: Settings) -> dict[str, int]:
    """Create what the job needs besides its sources: internal topics, and missing output topics.

    A repartition or output topic gets as many partitions as the source from which it is written; a changelog
    gets as many as its stage's inputs. A repartition topic that is merged with other topics gets as many as
    they have. Existing topics aren't changed. Calling it again does no harm.

    Returns:
        The partition counts of all these topics, and of the sources.

    Raises:
        MissingTopic: a source that the job doesn't write itself doesn't exist.
        IncompatibleState: a source no longer has the partition count with which its stage's state was
            written, or it has another count than a topic with which it is merged.
        KafkaUnavailable: the brokers don't answer, or refuse.
    """
    plan = plan_topics(topology, existing_topics(admin))
    _create_topics(admin, plan.missing, settings)
    return plan.counts


def plan_topics(topology: Topology, existing: Mapping[str, int]) -> TopicPlan:
    """What `ensure_internal_topics` would create.

    Args:
        topology: the job's topology.
        existing: the partition counts of all existing topics.

    Raises:
        MissingTopic, IncompatibleState: as there.
    """
    plan = TopicPlan(topology, existing)
    plan.want(journal_topic(topology.job), 1, _JOURNAL_CONFIG)
    for stage in topology.stages:
        plan.add_stage(stage)
    most = max(plan.counts[topic.name] for topic in topology.sources)
    for topic in topology.outputs:
        plan.want(topic.name, most, {})
    return plan


def check_creation(admin: AdminClient, plan: TopicPlan, settings: Settings) -> None:
    """Ask the brokers whether the missing topics of the plan could be created. Nothing is created.

    Raises:
        KafkaUnavailable: they couldn't, for the reason in the message, or the brokers don't answer.
    """
    _create_topics(admin, plan.missing, settings, only_ask=True)


# Data that only we read may never expire by time; we delete processed records by offset.
_KEPT_CONFIG: Final = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
_AHEAD: Final = "message.timestamp.after.max.ms"
_ANY_TIMES: Final = {_AHEAD: str(2**63 - 1)}
"""Kafka 4 refuses timestamps that are more than an hour ahead, unless the topic says otherwise. What a source
has accepted must be accepted on the way through the job, too.
"""
_REPARTITION_CONFIG: Final = {
    **_KEPT_CONFIG,
    **_ANY_TIMES,
    "message.timestamp.type": "CreateTime",  # records keep their timestamps
    "segment.bytes": str(64 * 1024 * 1024),
}
_CHANGELOG_CONFIG: Final = {**_KEPT_CONFIG, "segment.bytes": str(64 * 1024 * 1024)}
_JOURNAL_CONFIG: Final = {
    "cleanup.policy": "compact",
    "min.cleanable.dirty.ratio": "0.1",
    "segment.bytes": str(16 * 1024 * 1024),
    "segment.ms": "600000",  # only closed segments are compacted; the journal grows slowly
}


class TopicPlan:
    """The required topics, derived stage by stage, upstream first.

    Attributes:
        counts: the partition counts of all of them, by name.
        missing: those to be created: partition count and settings, by name.
    """

    def __init__(self, topology: Topology, existing: Mapping[str, int]) -> None:
        self._job = topology.job
        self._existing = existing
        self._repartition_topics = {source.topic.name for source in topology.inputs if source.internal}
        self._readers = topology.stages_by_topic
        self._copies = {stage.topics[number] for stage in topology.stages for number in stage.copies}
        self.counts: dict[str, int] = {}
        self.missing: dict[str, tuple[int, Mapping[str, str]]] = {}

    def want(self, topic: str, partitions: int, config: Mapping[str, str]) -> None:
        if topic in self.counts:
            return
        if topic not in self._existing:
            other = colliding_topic(topic, self._existing)
            if other is not None:
                raise _collides(topic, other)
            self.missing[topic] = (partitions, config)
        self.counts[topic] = self._existing.get(topic, partitions)

    def add_stage(self, stage: Stage) -> None:
        copies = {stage.topics[number] for number in stage.copies}
        for topic in sorted(stage.topics, key=copies.__contains__):
            if topic in copies:
                # Not when the table's stage is added: what the others have may not be known then.
                self.want(topic, self.counts[stage.topics[0]], _REPARTITION_CONFIG)
            if topic not in self.counts:
                if topic not in self._existing:
                    raise missing_topic(topic, self._existing, _IF_MISSING)
                self.counts[topic] = self._existing[topic]
        check_copartitioned(stage, self.counts)
        source = stage.topics[0]
        count = self.counts[source]
        if stage.changelog is not None:
            self.want(stage.changelog, count, _CHANGELOG_CONFIG)
            if self.counts[stage.changelog] != count:
                raise _partitions_changed(
                    self._job, source, count, stage.changelog, self.counts[stage.changelog]
                )
        for sink in (sink for chain in stage.chains for sink in chain.sinks):
            if sink.name in self._copies:
                continue
            if sink.name in self._repartition_topics:
                self.want(sink.name, self._merged_count(sink.name, count), _REPARTITION_CONFIG)
            else:
                self.want(sink.name, count, {})
        for topic in stage.dead_letter_topics:
            self.want(topic.name, count, _ANY_TIMES)

    def _merged_count(self, topic: str, feeding: int) -> int:
        """How many partitions a repartition topic gets. If it is merged with other topics: as many as those
        have or will have. Otherwise: as many as the stage that feeds it has.
        """
        others = self._readers[topic].topics
        for counts in (self._existing, self.counts):
            known = [counts[other] for other in others if other in counts]
            if known:
                return known[0]
        return feeding


def _collides(topic: str, other: str) -> MissingTopic:
    return MissingTopic(
        f"The topic {topic!r} doesn't exist, and can't be created because {other!r} exists: Kafka treats "
        "'.' and '_' in topic names as equal.",
        remedy="If the name of the topic is misspelt, correct it (for a journal, that of the job); otherwise "
        "choose a name that differs in another character.",
    )


def _partitions_changed(job: str, source: str, now: int, changelog: str, then: int) -> IncompatibleState:
    return IncompatibleState(
        f"The topic {source!r} has {now} partitions, but had {then} when the state in {changelog!r} was "
        "written: keys would meet the state of other shards.",
        remedy=f"Copy the records to a topic with {then} partitions and read that, or start again: "
        + reset_remedy(job),
    )


def existing_topics(admin: AdminClient) -> dict[str, int]:
    """The number of partitions of each existing topic.

    Raises:
        KafkaUnavailable: the brokers don't answer.
    """

    def ask() -> dict[str, int]:
        topics = admin.list_topics(timeout=ATTEMPT_TIMEOUT_S).topics
        counts: dict[str, int] = {}
        for name, topic in topics.items():
            if topic.error is None or (topic.partitions and is_not_known_yet(topic.error)):
                counts[name] = len(topic.partitions)
            elif is_not_known_yet(topic.error):
                # It exists, but the broker can't tell its partition count yet.
                raise NotKnownYetError(f"the partitions of {name!r} are not known yet: {topic.error.str()}")
        return counts

    with asking(admin, "listing topics"):
        return ask_until_known(ask, REQUEST_TIMEOUT_S)


def _create_topics(
    admin: AdminClient,
    missing: Mapping[str, tuple[int, Mapping[str, str]]],
    settings: Settings,
    *,
    only_ask: bool = False,
) -> None:
    if not missing:
        return
    with asking(settings, "listing the brokers"):
        defaults = broker_settings(admin)
        ways = replications(admin, settings.replication_factor, defaults)
    left = dict(missing)
    if f"log.{_AHEAD}" not in defaults:  # before Kafka 3.6, or we may not see it
        left = {name: (count, _without_times(config)) for name, (count, config) in missing.items()}
    for number, way in enumerate(ways, 1):
        left = _try_to_create(admin, left, way, settings, last=number == len(ways), only_ask=only_ask)
    if not only_ask:
        _wait_for_leaders(admin, settings, list(missing))


def _without_times(config: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in config.items() if name != _AHEAD}


def _try_to_create(
    admin: AdminClient,
    missing: Mapping[str, tuple[int, Mapping[str, str]]],
    way: Replication,
    settings: Settings,
    *,
    last: bool,
    only_ask: bool,
) -> dict[str, tuple[int, Mapping[str, str]]]:
    """Create the topics, or only ask whether they could be created. Returns those for which there are too few
    brokers for the replicas, unless this was the last way to try.
    """
    if not missing:
        return {}
    new = [
        NewTopic(name, partitions, way.factor, config={**config, **way.config})
        for name, (partitions, config) in missing.items()
    ]
    futures: dict[str, Future[None]] = untyped(admin).create_topics(
        new,
        request_timeout=TOPIC_CREATION_TIMEOUT_S,
        operation_timeout=TOPIC_CREATION_TIMEOUT_S,
        validate_only=only_ask,
    )
    refused = dict[str, tuple[int, Mapping[str, str]]]()
    for name, future in futures.items():
        try:
            future.result()
        except KafkaException as error:
            cause = cause_of(error)
            if cause.name() == "INVALID_REPLICATION_FACTOR" and not last:
                refused[name] = missing[name]
            elif cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise unavailable(settings, f"creating the topic {name!r}", cause) from error
    return refused


def create_output_topic(admin: AdminClient, topic: str, partitions: int, settings: Settings) -> None:
    """Create a topic that the job writes to. It is no error if it already exists.

    Raises:
        KafkaUnavailable: the brokers don't answer, or refuse.
    """
    _create_topics(admin, {topic: (partitions, {})}, settings)


def _wait_for_leaders(admin: AdminClient, settings: Settings, topics: Sequence[str]) -> None:
    deadline = time.monotonic() + TOPIC_CREATION_TIMEOUT_S
    while True:
        with asking(settings, "listing topics"):
            known = admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        waiting = [name for name in topics if not _has_leaders(known.get(name))]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise KafkaUnavailable(
                f"The new topic {waiting[0]!r} has no leaders after {TOPIC_CREATION_TIMEOUT_S:g} s.",
                remedy="Check the brokers' logs, then start again.",
            )
        time.sleep(POLL_INTERVAL_S)


def _has_leaders(topic: Any) -> bool:
    if topic is None or topic.error is not None or not topic.partitions:
        return False
    return all(partition.leader >= 0 for partition in topic.partitions.values())
