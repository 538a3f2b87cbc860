"""What a job is once it is built: its stages, and a fingerprint of what its state depends on.

Responsible for: the frozen description that every process of the cluster derives from the same job file.
Invariants: stages come upstream first; a topic is read by one stage only; the topics of a stage have the same
number of partitions and the same kind of key; a store's name is unique in the job; nothing here depends on
the run (names and order come from the job file alone, because they name state). Must not do I/O. Must not
validate a user's job: `fcluster.api` does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fcluster.common.ids import (
    ShardId,
    changelog_topic,
    former_changelog_topic,
    former_repartition_topic,
    repartition_topic,
)
from fcluster.graph.description import (
    DESCRIPTION_FORMAT,
    FORMAT_WITHOUT_STATES,
    FORMAT_WITHOUT_VERSIONS,
    describe_stage,
    essence,
    feeds_of,
)
from fcluster.graph.operators import TopicSpec
from fcluster.graph.stages import Input, Stage, renamed, written_topics


@dataclass(frozen=True)
class Topology:
    """A validated job.

    Attributes:
        job: its name, which is also the consumer group.
        stages: upstream first.
        fingerprint: 12 hex digits, computed from everything that state and committed offsets depend on
            (`describe`). It also differs after compatible changes; `incompatibility` tells which changes
            those are.
        topics: all topics that the job file declares, including those that only `Record(topic=...)` writes
            to.
    """

    job: str
    stages: tuple[Stage, ...]
    fingerprint: str = ""
    topics: tuple[TopicSpec, ...] = ()

    def __post_init__(self) -> None:
        if not self.fingerprint:
            text = json.dumps(essence(self.describe()), sort_keys=True, separators=(",", ":"))
            object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest()[:12])

    def shards(self, partitions: Mapping[str, int]) -> list[ShardId]:
        """All shards, upstream stages first.

        Args:
            partitions: partition count of each topic that a stage reads, by topic name.
        """
        return [
            ShardId(stage.name, partition)
            for stage in self.stages
            for partition in range(partitions[stage.topics[0]])
        ]

    def stage(self, name: str) -> Stage:
        """The stage of that name; KeyError if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def feeders(self, topic: str) -> tuple[Stage, ...]:
        """The stages that write to this topic, as far as the job file shows: records may name topics."""
        return tuple(
            stage for stage in self.stages if any(spec.name == topic for spec in written_topics(stage))
        )

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All topics that the job reads, upstream first."""
        return tuple(source for stage in self.stages for source in stage.inputs)

    @property
    def sources(self) -> tuple[TopicSpec, ...]:
        """The topics that the job reads and that aren't the cluster's own, upstream first."""
        return tuple(source.topic for source in self.inputs if not source.internal)

    @property
    def table_topics(self) -> frozenset[str]:
        """The topics of the user that only fill tables."""
        found = (stage.inputs[number] for stage in self.stages for number in stage.table_inputs)
        return frozenset(source.topic.name for source in found if not source.internal)

    @property
    def stages_by_topic(self) -> dict[str, Stage]:
        """The stage that reads each topic, by the topic's name."""
        return {topic: stage for stage in self.stages for topic in stage.topics}

    @property
    def outputs(self) -> tuple[TopicSpec, ...]:
        """The topics of the user to which the job may write: sinks, dead letters, and declared topics that it
        doesn't read.
        """
        internal = {source.topic.name for source in self.inputs if source.internal}
        sources = {topic.name for topic in self.sources}
        candidates = [topic for stage in self.stages for topic in written_topics(stage)]
        candidates += [topic for topic in self.topics if topic.name not in sources]
        return tuple({topic.name: topic for topic in candidates if topic.name not in internal}.values())

    @property
    def keeps_time(self) -> bool:
        """Whether the job uses event time."""
        return any(stage.keeps_time for stage in self.stages)

    @property
    def has_global_tables(self) -> bool:
        """Whether it has steps that write to all shards of a stage."""
        return any(stage.broadcasts for stage in self.stages)

    def told_topics(self, stage: Stage) -> dict[str, Stage]:
        """The repartition topics to which a stage's event time is written, with the stages that read them."""
        if not stage.keeps_time:
            return {}
        internal = {source.topic.name for source in self.inputs if source.internal}
        sinks = {sink.name for chain in stage.chains for sink in chain.sinks}
        return {name: self.stages_by_topic[name] for name in sorted(sinks & internal)}

    def time_is_needed(self, stage: Stage) -> bool:
        """Whether something in `stage` or downstream of it depends on event time."""
        return stage.needs_time or any(map(self.time_is_needed, self.told_topics(stage).values()))

    @property
    def internal_topics(self) -> tuple[str, ...]:
        """The changelogs and repartition topics, upstream first. (The journal is `ids.journal_topic`.)"""
        names: list[str] = []
        for stage in self.stages:
            names += [source.topic.name for source in stage.inputs if source.internal]
            names += [stage.changelog] if stage.changelog is not None else []
        return tuple(names)

    @property
    def renamed_topics(self) -> dict[str, str]:
        """The internal topics whose names differ from what `build` would choose, by the names that it would
        choose.
        """
        names: dict[str, str] = {}
        for stage in self.stages:
            for source in stage.inputs:
                if source.internal:
                    names[repartition_topic(self.job, source.name)] = source.topic.name
            if stage.changelog is not None:
                names[changelog_topic(self.job, stage.name)] = stage.changelog
        return {built: actual for built, actual in names.items() if built != actual}

    def with_internal_topics(self, names: Mapping[str, str]) -> Topology:
        """The same job with other names for some internal topics. The fingerprint doesn't change.

        Args:
            names: new names, by the present ones (see `former_names`).
        """
        if not names:
            return self
        return replace(self, stages=tuple(renamed(stage, names) for stage in self.stages))

    def describe(self) -> dict[str, Any]:
        """Everything that state and committed offsets depend on, as data for JSON in the journal.

        It names the internal topics too, which identifies them as this job's.

        It leaves out steps without state, the code of handlers, output topics, isolation and error handling.
        They may change freely between runs.
        """
        feeds = {topic: fed for stage in self.stages for topic, fed in feeds_of(stage)}
        form = FORMAT_WITHOUT_STATES
        if any(stage.state_stores or stage.timed_steps or stage.tables for stage in self.stages):
            form = FORMAT_WITHOUT_VERSIONS
        if any(store.state.version > 1 for stage in self.stages for store in stage.state_stores):
            form = DESCRIPTION_FORMAT
        return {
            "format": form,
            "job": self.job,
            "stages": {stage.name: describe_stage(stage, feeds) for stage in self.stages},
        }


def former_names(topology: Topology) -> dict[str, str]:
    """The name that each internal topic had in older versions, where names were ambiguous, by its present
    name.

    Inputs after a stage's first are newer than that, so they have no such name.
    """
    names: dict[str, str] = {}
    for stage in topology.stages:
        first = stage.inputs[0]
        if first.internal:
            names[first.topic.name] = former_repartition_topic(topology.job, stage.name)
        if stage.changelog is not None:
            names[stage.changelog] = former_changelog_topic(topology.job, stage.name)
    return names
