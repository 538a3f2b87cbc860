"""The job in the simulation: a keyed counter with an output for each input, and a second one behind a
repartition. In merged seeds a third one reads two topics: another source, and a repartition of the first.

Responsible for: its topology, what a handler does to a key's state, and where records go. Handlers and the
checks use the same few functions, so a recount is a fold with them over what the sources hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fcluster import Job
from fcluster.common.ids import ShardId, changelog_topic, repartition_topic
from fcluster.common.settings import Settings
from fcluster.graph.topology import Topology

JOB = "sim"
SOURCE, SINK = "in", "out"
MORE = "more"
"""The other source, in merged seeds."""
COUNTS, TOTALS, BOTH = "in", "totals", "more"
"""The names of the stages."""
COUNTS_STORE, TOTALS_STORE, BOTH_STORE = "count", "totals", "both"
MERGED_SEEDS_FROM = 1_000_000
"""Seeds from here on play the merged job. Those below tell the same stories as before there was one."""
GROUPS = 3
FORGET_AT = 6
"""A key's state is deleted when its count gets there, so that deletions are part of the story."""
REPARTITION = repartition_topic(JOB, TOTALS)
CROSSING = repartition_topic(JOB, BOTH_STORE)
REPARTITIONS = (REPARTITION, CROSSING)


class Input(NamedTuple):
    """A record of a source or repartition topic. `ident` names the original one."""

    key: str
    ident: int
    """Rises with time, so it is the record's timestamp as well."""


class Read(NamedTuple):
    """A record as a shard with several inputs gets it, from the input of that number."""

    number: int
    offset: int
    record: Input

    def timestamp(self) -> tuple[int, int]:
        """As of a consumed Kafka message."""
        return 1, self.record.ident


class Output(NamedTuple):
    """What a handler made of the record at `offset` of `shard`'s input `number`."""

    shard: ShardId
    offset: int
    key: str
    ident: int
    count: int
    number: int = 0


def topology(*, merged: bool = False) -> Topology:
    """Two stages: `in` counts by key and feeds `totals`, which counts by group.

    A third one if `merged`: `more` counts by key what comes from another source, and from `in` through a
    repartition of its own.
    """
    job = Job(JOB)
    source, sink = job.topic(SOURCE, value="json"), job.topic(SINK, value="json")

    def count(ctx: Any, record: Any) -> dict[str, Any]:
        raise NotImplementedError

    def totals(ctx: Any, record: Any) -> dict[str, Any]:
        raise NotImplementedError

    def group(record: Any) -> str:
        raise NotImplementedError

    job.stream(source).process(count, name=COUNTS_STORE).to(sink)
    job.stream(source).key_by(group).process(totals, name=TOTALS_STORE).to(sink)
    if merged:
        crossing = job.stream(source).key_by(group, name=BOTH_STORE)
        job.merge(job.topic(MORE), crossing).process(count, name=BOTH_STORE).to(sink)
    built = job.build(Settings())
    assert {stage.name: stage.topics for stage in built.stages} == {
        stage: topics for stage, topics in INPUTS.items() if merged or stage != BOTH
    }, built
    assert all(stage.changelog == changelog_topic(JOB, stage.name) for stage in built.stages), built
    return built


STORES = {COUNTS: COUNTS_STORE, TOTALS: TOTALS_STORE, BOTH: BOTH_STORE}
INPUTS = {COUNTS: (SOURCE,), TOTALS: (REPARTITION,), BOTH: (MORE, CROSSING)}
CHANGELOGS = {stage: changelog_topic(JOB, stage) for stage in STORES}
STAGE_OF_SOURCE = {topic: stage for stage, topics in INPUTS.items() for topic in topics}


def count_in(state: dict[str, Any], record: Input) -> int:
    """Count a record in its key's state; the count so far, which the output tells."""
    count = state.get("count", 0) + 1
    if count == FORGET_AT:
        state.clear()
    else:
        state["count"] = count
        state.setdefault("seen", []).append(record.ident)
    return count


def group_of(key: str) -> str:
    """The key of the second stage."""
    return f"g{int(key[1:]) % GROUPS}"


def partition_of(key: str, partitions: int) -> int:
    """Where records of a key go, in any topic."""
    return int(key[1:]) % partitions


def handle(
    shard: ShardId, read: Read, state: dict[str, Any], partitions: int, *, merged: bool
) -> list[tuple[tuple[str, int], Any]]:
    """What the handlers of the stage do with a record: its outputs, with their topic and partition."""
    record = read.record
    count = count_in(state, record)
    output = Output(shard, read.offset, record.key, record.ident, count, read.number)
    outputs: list[tuple[tuple[str, int], Any]] = [((SINK, partition_of(record.key, partitions)), output)]
    if shard.stage == COUNTS:
        group = group_of(record.key)
        outputs.append(((REPARTITION, partition_of(group, partitions)), Input(group, record.ident)))
        if merged:
            outputs.append(((CROSSING, partition_of(record.key, partitions)), record))
    return outputs
