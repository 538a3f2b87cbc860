"""The topics that the job depends on, as they are now and as they were: deleted, replaced, or grown.

Responsible for: judging each check of the topics (`TopicsLooked`) and of the job's consumer group
(`GroupLooked`). Invariants:

- Only what brokers report counts, not what they leave out. A broker may lag behind, so a topic counts as
  deleted or replaced only if that was seen again after `CONFIRM_MS`.
- The id that a topic is compared with is in the journal before anything depends on it.
- Partitions that were added to a source become shards if the stage has no state. If it has state, keys would
  meet the state of other shards, so the new partitions are ignored, and a notice says so.
- A problem is logged once, and is in the status for as long as it lasts. Its end is logged too.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from fcluster.common.errors import FclusterError, failure_of
from fcluster.common.ids import ShardId, journal_topic
from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.ending import FAILED_GRACE_MS, Ending
from fcluster.coordinator.core.model import Phase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.progress import Progress
from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology
from fcluster.kafka.topic_ids import (
    Look,
    TopicSeen,
    fits,
    internal_topic_lost,
    reset_remedy,
    sink_lost,
    source_gone,
    source_replaced,
)

CONFIRM_MS = 1_500
"""Brokers learn of a topic one after another. The slowest broker's answer is outdated by less than this."""
TOPIC_KEY_PREFIX = "topic/"
PARTITIONS_NAMED_MAX = 10


class Role(Enum):
    """What a topic is to the job."""

    SOURCE = "source"
    REPARTITION = "repartition topic"
    CHANGELOG = "changelog"
    SINK = "output topic"
    JOURNAL = "journal"


def roles_of(topology: Topology) -> dict[str, Role]:
    """All topics that the job depends on."""
    roles = {topic.name: Role.SINK for topic in topology.outputs}
    for stage in topology.stages:
        if stage.changelog is not None:
            roles[stage.changelog] = Role.CHANGELOG
        for source in stage.inputs:
            roles[source.topic.name] = Role.REPARTITION if source.internal else Role.SOURCE
    roles[journal_topic(topology.job)] = Role.JOURNAL
    return roles


def topic_key(topic: str) -> str:
    """Journal key of a topic's id."""
    return TOPIC_KEY_PREFIX + topic


def lost_topic(job: str, topic: str, role: Role, former_id: str, seen: TopicSeen | None) -> FclusterError:
    """The error for a topic that was deleted (`seen` is None) or replaced."""
    if role is Role.SOURCE and seen is None:
        return source_gone(job, topic)
    if role is Role.SOURCE and seen is not None:
        return source_replaced(job, topic, former_id, seen.topic_id)
    if role is Role.SINK:
        return sink_lost(job, topic, former_id, seen)
    return internal_topic_lost(job, topic, role.value, former_id, seen)


def _merged_with_fewer(topic: str, more: int, stage: Stage, partitions: int) -> str:
    others = ", ".join(repr(other) for other in stage.topics if other != topic)
    return (
        f"{topic!r} has {more} partitions now, and {others}, which it is merged with in the stage "
        f"{stage.name!r}, not all as many: records in partitions {partitions} to {more - 1} are not read; "
        f"remedy: give all of them {more} partitions"
    )


@dataclass(slots=True)
class _Doubt:
    """What was seen of a topic, and since when."""

    seen: TopicSeen | None
    since_ms: float


class Topics:
    """What happens to the job's topics while the job runs.

    Attributes:
        notices: what a person should take care of, by subject.
    """

    def __init__(
        self, cluster: Cluster, outbox: Outbox, ownership: Ownership, progress: Progress, ending: Ending
    ) -> None:
        self.notices: dict[str, str] = {}
        self._cluster = cluster
        self._outbox = outbox
        self._ownership = ownership
        self._progress = progress
        self._ending = ending
        self._roles = roles_of(cluster.terms.topology)
        self._ids = dict(cluster.terms.topic_ids)
        self._partitions = dict(cluster.terms.partitions)
        self._doubts: dict[str, _Doubt] = {}
        self._stages = cluster.terms.topology.stages_by_topic
        self._seen_partitions = dict(self._partitions)
        self._vouched: dict[str, dict[int, int]] = {}
        """For each source: the committed offset of each partition when the topic was last seen unchanged."""

    @property
    def in_doubt(self) -> bool:
        """Whether another check is wanted soon."""
        return bool(self._doubts)

    # --- topics ---------------------------------------------------------------------------------------

    def looked(self, look: Look) -> None:
        """The topics were checked."""
        if self._cluster.phase not in (Phase.RUNNING, Phase.DRAINING):
            return
        for topic, role in self._roles.items():
            if topic not in look:
                continue
            seen = look[topic]
            if seen is not None and fits(seen, self._ids.get(topic, "")):
                self._is_there(topic, role, seen)
            else:
                self._contradicts(topic, role, seen)

    def _is_there(self, topic: str, role: Role, seen: TopicSeen) -> None:
        self._doubts.pop(topic, None)
        if seen.topic_id and topic not in self._ids:
            self._learn(topic, seen.topic_id)
        if role in (Role.SOURCE, Role.REPARTITION):
            self._vouched[topic] = self._committed(topic)
            if seen.partitions > self._partitions[topic]:
                self._has_grown(topic, seen.partitions)

    def _learn(self, topic: str, topic_id: str) -> None:
        self._ids[topic] = topic_id
        self._outbox.journal(topic_key(topic), {"id": topic_id})

    def _contradicts(self, topic: str, role: Role, seen: TopicSeen | None) -> None:
        now_ms = self._cluster.now_ms
        doubt = self._doubts.get(topic)
        if doubt is None:
            self._doubts[topic] = _Doubt(seen, now_ms)
            return
        doubt.seen = seen
        if now_ms - doubt.since_ms < CONFIRM_MS:
            return
        del self._doubts[topic]
        if role is Role.SINK and self._cluster.settings.sink_missing == "create":
            self._make_sink_anew(topic, seen)
            return
        error = self._error(topic, role, seen)
        # Records must not be committed if their topic isn't the one that the offsets belong to.
        grace_ms = 0 if role in (Role.SOURCE, Role.REPARTITION) else FAILED_GRACE_MS
        self._ending.fail(failure_of(error), grace_ms)

    def _error(self, topic: str, role: Role, seen: TopicSeen | None) -> FclusterError:
        job, former_id = self._cluster.terms.topology.job, self._ids.get(topic, "")
        if role is Role.SOURCE and seen is not None:
            return source_replaced(job, topic, former_id, seen.topic_id, self._affected(topic))
        return lost_topic(job, topic, role, former_id, seen)

    def _affected(self, topic: str) -> str:
        """Which records may have been processed under the old id."""
        vouched, committed = self._vouched.get(topic), self._committed(topic)
        if vouched is None:
            return (
                "Offsets that were committed since this coordinator became leader may belong to the new "
                "topic."
            )
        ranges = [
            f"{topic}/{partition} {vouched.get(partition, 0)} to {offset - 1}"
            for partition, offset in sorted(committed.items())
            if vouched.get(partition, 0) < offset
        ]
        if not ranges:
            return "Nothing was committed since the old topic was last seen."
        more = ", ..." if len(ranges) > PARTITIONS_NAMED_MAX else ""
        return (
            "Committed since the old topic was last seen, so perhaps of the new one: "
            f"{', '.join(ranges[:PARTITIONS_NAMED_MAX])}{more}."
        )

    def _committed(self, topic: str) -> dict[int, int]:
        stage = self._stages[topic]
        number = stage.input_of(topic)
        return {
            shard.partition: inputs[number].committed
            for shard, inputs in self._progress.standings.items()
            if shard.stage == stage.name and number in inputs
        }

    def _make_sink_anew(self, topic: str, seen: TopicSeen | None) -> None:
        if seen is None:
            self._outbox.log(
                "warning", f"the output topic {topic!r} is gone; creating it again (sink.missing)"
            )
            self._ids.pop(topic, None)
            self._outbox.journal(topic_key(topic), None)
            most = max(self._partitions[source.name] for source in self._cluster.terms.topology.sources)
            self._outbox.add(events.MakeTopic(topic, most))
        else:
            self._outbox.log(
                "warning",
                f"the output topic {topic!r} was created again; writing to the new one (sink.missing)",
            )
            self._learn(topic, seen.topic_id)

    # --- growth ---------------------------------------------------------------------------------------

    def _has_grown(self, topic: str, partitions: int) -> None:
        stage, former = self._stages[topic], self._partitions[topic]
        self._seen_partitions[topic] = partitions
        if stage.changelog is None:
            self._read_more(stage)
            return
        self._notice(
            f"partitions of {topic}",
            f"{topic!r} has {partitions} partitions now, but the state of the stage {stage.name!r} belongs "
            f"to the first {former}: records in partitions {former} to {partitions - 1} are not read, and "
            "keys that moved there are missing; remedy: stop the job, then start again with `fcluster "
            f"reset JOB --to earliest`, or copy the records to a topic with {former} partitions and read "
            "that",
        )

    def _read_more(self, stage: Stage) -> None:
        """Read the partitions that all topics of a stage without state have by now."""
        former = self._partitions[stage.topics[0]]
        partitions = min(self._seen_partitions[topic] for topic in stage.topics)
        for topic in stage.topics:
            more = self._seen_partitions[topic]
            about = f"partitions of {topic}"
            if more == partitions:
                self._over(about)
            else:
                self._notice(about, _merged_with_fewer(topic, more, stage, partitions))
        if partitions == former:
            return
        for topic in stage.topics:
            self._partitions[topic] = partitions
            self._outbox.journal(f"partitions/{topic}", {"count": partitions})
            self._outbox.log("info", f"{topic!r} has {partitions} partitions now: reading the new ones")
        self._ownership.add_shards(
            [ShardId(stage.name, partition) for partition in range(former, partitions)]
        )

    # --- the group ------------------------------------------------------------------------------------

    def group_looked(self, foreign: Mapping[tuple[str, int], int], members: Sequence[str] | None) -> None:
        """The job's consumer group was checked.

        Args:
            foreign: offsets in it that fcluster didn't commit.
            members: its members, none of which belong to fcluster. None: unknown, so the last notice stays.
        """
        group = self._cluster.terms.topology.job
        if members:
            self._notice(
                "group members",
                f"the job's consumer group {group!r} has a member that doesn't belong to fcluster: "
                f"{', '.join(sorted(members)[:PARTITIONS_NAMED_MAX])}. While it is there, the job can't "
                "commit; remedy: stop that program, or give it a group.id of its own",
            )
        elif members is not None:
            self._over("group members")
        if foreign:
            found = [f"{topic}/{number} at {offset}" for (topic, number), offset in sorted(foreign.items())]
            named = ", ".join(found[:PARTITIONS_NAMED_MAX])
            self._notice(
                "foreign offsets",
                f"a program other than fcluster committed offsets in the job's consumer group {group!r}: "
                f"{named}. The job's next commit replaces them, but if the job ends before that, it won't "
                "start again; remedy: find out which program commits there. If the job doesn't start: "
                f"{reset_remedy(group)}",
            )
        else:
            self._over("foreign offsets")

    # --- notices --------------------------------------------------------------------------------------

    def _notice(self, about: str, text: str) -> None:
        if self.notices.get(about) != text:
            self._outbox.log("error", text)
        self.notices[about] = text

    def _over(self, about: str) -> None:
        if self.notices.pop(about, None) is not None:
            self._outbox.log("info", f"over: {about}")
