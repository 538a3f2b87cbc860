"""`fcluster up --start`: where a job begins to read that has read nothing yet.

Responsible for: finding the offsets and committing them, before any process of the job runs. Rules: a job
that has committed offsets is left as it is; `fcluster reset` is for that. All offsets are committed in one
request, which Kafka accepts as a whole.
"""

from __future__ import annotations

from confluent_kafka import TopicPartition

from fcluster.cli.reset import Say, commit_start
from fcluster.common.errors import IncompatibleState
from fcluster.common.offset_targets import Target, chosen_offsets
from fcluster.common.settings import Settings, with_settings
from fcluster.graph.topology import Topology
from fcluster.kafka.clients import make_admin, make_consumer
from fcluster.kafka.offsets import begin_offsets, end_offsets, offsets_at_time, read_committed_positions
from fcluster.kafka.topics import partition_counts


def set_start(settings: Settings, topology: Topology, target: Target, say: Say) -> None:
    """Commit the offsets at which the job begins.

    Args:
        settings: the resolved settings, with brokers.
        topology: the job's topology.
        target: `--start`.
        say: called with a line.

    Raises:
        IncompatibleState: the job has committed offsets.
        TargetError: a partition doesn't have the offset that is given.
        FclusterError: the brokers can't be reached, or a topic doesn't exist.
    """
    settings = with_settings(settings, reading_group=topology.job)
    admin = make_admin(settings)
    names = [topic.name for topic in topology.sources if not topology.feeders(topic.name)]
    counts = partition_counts(admin, names)
    sources = [TopicPartition(topic, number) for topic, count in counts.items() for number in range(count)]
    begins, ends = begin_offsets(admin, sources), end_offsets(admin, sources, "read-uncommitted")
    consumer = make_consumer(settings, "read-uncommitted", **{"group.id": topology.job})
    try:
        committed = read_committed_positions(consumer, topology.job, sources)
        by_time = offsets_at_time(consumer, sources, target.time_ms) if target.kind == "time" else {}
    finally:
        consumer.close()
    known = [at for at, position in committed.items() if position is not None]
    if known:
        first = min(known, key=lambda at: (at.topic, at.partition))
        raise IncompatibleState(
            f"The job {topology.job!r} has run before: it has committed offsets, for example of "
            f"{first.topic}/{first.partition}.",
            remedy="To go on from there, leave out --start. To begin elsewhere, with empty state: "
            "`fcluster reset JOB --to WHERE`.",
        )
    to = chosen_offsets(
        target,
        {(at.topic, at.partition): offset for at, offset in begins.items()},
        {(at.topic, at.partition): offset for at, offset in ends.items()},
        {(at.topic, at.partition): offset for at, offset in by_time.items()},
        topology.table_topics,
    )
    commit_start(settings, topology, to, admin)
    say(f"the job begins at {target}")
