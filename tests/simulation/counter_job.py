"""The job in the simulation: a keyed counter with an output for each input, and a second one behind a
repartition.

Responsible for: its topology, what a handler does to a key's state, and where records go. Handlers and the
checks use the same few functions, so a recount is a fold with them over what the sources hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fcluster import Job
from fcluster.common.ids import ShardId, changelog_topic, repartition_topic
from fcluster.common.settings import Settings
from fcluster.common.topology import Topology

JOB = "sim"
SOURCE, SINK = "in", "out"
COUNTS, TOTALS = "in", "totals"
"""The names of the two stages."""
COUNTS_STORE, TOTALS_STORE = "count", "totals"
GROUPS = 3
FORGET_AT = 6
"""A key's state is deleted when its count gets there, so that deletions are part of the story."""
REPARTITION = repartition_topic(JOB, TOTALS)


class Input(NamedTuple):
    """A record of a source or repartition topic. `ident` names the original one."""

    key: str
    ident: int


class Output(NamedTuple):
    """What a handler made of the record at `offset` of `shard`'s source."""

    shard: ShardId
    offset: int
    key: str
    ident: int
    count: int


def topology() -> Topology:
    """Two stages: `in` counts by key and feeds `totals`, which counts by group."""
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
    built = job.build(Settings())
    assert [stage.name for stage in built.stages] == [COUNTS, TOTALS], built
    assert [stage.source.name for stage in built.stages] == [SOURCE, REPARTITION], built
    assert all(stage.changelog == changelog_topic(JOB, stage.name) for stage in built.stages), built
    return built


STORES = {COUNTS: COUNTS_STORE, TOTALS: TOTALS_STORE}
SOURCES = {COUNTS: SOURCE, TOTALS: REPARTITION}
CHANGELOGS = {stage: changelog_topic(JOB, stage) for stage in STORES}
STAGE_OF_SOURCE = {topic: stage for stage, topic in SOURCES.items()}


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
    shard: ShardId, offset: int, record: Input, state: dict[str, Any], partitions: int
) -> list[tuple[tuple[str, int], Any]]:
    """What the handlers of the stage do with a record: its outputs, with their topic and partition."""
    count = count_in(state, record)
    output = Output(shard, offset, record.key, record.ident, count)
    outputs: list[tuple[tuple[str, int], Any]] = [((SINK, partition_of(record.key, partitions)), output)]
    if shard.stage == COUNTS:
        group = group_of(record.key)
        outputs.append(((REPARTITION, partition_of(group, partitions)), Input(group, record.ident)))
    return outputs
