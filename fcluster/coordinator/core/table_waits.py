"""Which stages wait for global tables at the start of the job, and how far these are, for the status.

Responsible for: combining which shards wait, as their owners report it, with how far the shards are that read
the tables' topics. `engine.loading` decides what is waited for. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.model import Shard, ShardPhase
from fcluster.coordinator.core.progress import Progress
from fcluster.graph.stages import Stage


def describe_table_waits(cluster: Cluster, progress: Progress) -> list[dict[str, Any]]:
    """An entry for each stage of which shards wait. None if nobody waits. -1: unknown."""
    waiting = [
        shard
        for session in cluster.sessions.values()
        for shard in (session.stats.table_waits if session.stats is not None else ())
        if shard in cluster.shards and cluster.shards[shard].session == session.number
    ]
    if not waiting:
        return []
    return [
        _describe(stage, own, cluster, progress)
        for stage in cluster.terms.topology.stages
        if (own := [shard for shard in waiting if shard.stage == stage.name])
    ]


def _describe(stage: Stage, waiting: list[ShardId], cluster: Cluster, progress: Progress) -> dict[str, Any]:
    tables: list[dict[str, Any]] = []
    for number, copy in stage.copies.items():
        for feeder in cluster.terms.topology.feeders(stage.topics[number]):
            readers = _shards_of(feeder, cluster)
            sources = [
                source
                for source, step in feeder.broadcasts
                if any(topic.name == stage.topics[number] for topic in step.topics)
            ]
            tables += [
                {
                    "table": copy.copy_of,
                    "topic": feeder.topics[source],
                    "shards": len(readers),
                    "shards_running": sum(
                        one.phase in (ShardPhase.RUNNING, ShardPhase.WARMING) for one in readers
                    ),
                    "records_left": _left([one.identity for one in readers], source, progress),
                    "copies_left": _left(waiting, number, progress),
                }
                for source in sources
            ]
    return {
        "stage": stage.name,
        "shards": len(_shards_of(stage, cluster)),
        "shards_waiting": len(waiting),
        "tables": tables,
    }


def _shards_of(stage: Stage, cluster: Cluster) -> list[Shard]:
    return [shard for shard in cluster.shards.values() if shard.identity.stage == stage.name]


def _left(shards: Iterable[ShardId], number: int, progress: Progress) -> int:
    """How many offsets the shards have left to read in that input."""
    standings = [progress.standing(shard, number) for shard in shards]
    if not all(standing is not None and standing.end >= 0 for standing in standings):
        return -1
    return sum(max(0, one.end - one.position) for one in standings if one is not None)
