"""Fixes where a bounded run ends (`--end`), when its first leader takes over.

Responsible for: deciding whether this leader begins a bounded run, continues one, or neither; and finding the
offsets at which it ends. Rules: the offsets are found once. They go into the leader's first write to the
journal, before any worker can join. From then on the journal decides, and not the options of a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from fcluster.common.errors import ClusterConflict, IncompatibleState
from fcluster.common.isolation import Isolation
from fcluster.common.offset_targets import Target, chosen_offsets
from fcluster.coordinator.core.run_end import RUN_END_KEY, RunEnd
from fcluster.graph.topology import Topology
from fcluster.kafka.offsets import begin_offsets, end_offsets, offsets_at_time
from fcluster.kafka.topic_ids import reset_remedy


def recorded_end(
    past: Mapping[str, Any], topology: Topology, wanted: Target | None, *, takes_over: bool
) -> RunEnd | None:
    """The end of the run that the journal (`past`) says is under way. None if none is.

    Args:
        wanted: `--end` of this process.
        takes_over: whether this process continues the run of another leader, whatever `wanted` is.

    Raises:
        IncompatibleState: event time has ended in the last run.
        ClusterConflict: a run to another end isn't complete.
    """
    document = past.get(RUN_END_KEY)
    recorded = None if document is None else RunEnd.of_document(document)
    if takes_over:
        return recorded
    if recorded is not None and recorded.is_over:
        raise IncompatibleState(
            f"The job {topology.job!r} has come to its end ({recorded.text}): its windows are closed, and "
            "all records that follow would be late.",
            remedy=f"Begin anew: {reset_remedy(topology.job)}",
        )
    if recorded is not None and wanted is not None and not _is_same(recorded, wanted):
        raise ClusterConflict(
            f"a run of the job {topology.job!r} to another end ({recorded.text}) isn't complete",
            remedy="Complete it: start it again with the same --end, or without it. Or give it up: "
            f"{reset_remedy(topology.job)}",
        )
    return recorded


def fix_end(
    topology: Topology, counts: Mapping[str, int], wanted: Target, admin: Any, consumer: Consumer
) -> RunEnd:
    """The end of a run that begins now.

    Args:
        topology: the job, with the actual names of its internal topics.
        counts: the partition counts of its sources.
        wanted: `--end`.
        admin: a connected client.
        consumer: any connected consumer.

    Raises:
        TargetError: the offsets that are given aren't those of the job's sources.
        KafkaUnavailable: the brokers don't answer.
    """
    sources: dict[str, Isolation] = {
        source.topic.name: source.topic.isolation
        for source in topology.inputs
        if not source.internal and not topology.feeders(source.topic.name)
    }
    partitions = [TopicPartition(topic, number) for topic in sources for number in range(counts[topic])]
    begins = begin_offsets(admin, partitions)
    ends = {
        at: end
        for isolation in set(sources.values())
        for at, end in end_offsets(
            admin, [at for at in partitions if sources[at.topic] == isolation], isolation
        ).items()
    }
    by_time = offsets_at_time(consumer, partitions, wanted.time_ms) if wanted.kind == "time" else {}
    chosen = chosen_offsets(
        wanted,
        {(at.topic, at.partition): offset for at, offset in begins.items()},
        {(at.topic, at.partition): offset for at, offset in ends.items()},
        # A record of that time may belong to a transaction that is still open.
        {(at.topic, at.partition): min(offset, ends[at]) for at, offset in by_time.items()},
    )
    offsets: dict[str, dict[int, int]] = {topic: {} for topic in sources}
    for (topic, partition), offset in chosen.items():
        offsets[topic][partition] = offset
    return RunEnd(str(wanted), offsets)


def _is_same(recorded: RunEnd, wanted: Target) -> bool:
    if wanted.kind != "offsets":
        return str(wanted) == recorded.text
    given = {topic: dict[int, int]() for topic, _partition in wanted.offsets}
    for (topic, partition), offset in wanted.offsets.items():
        given[topic][partition] = offset
    return all(recorded.offsets.get(topic) == offsets for topic, offsets in given.items())
