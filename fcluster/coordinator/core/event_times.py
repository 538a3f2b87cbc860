"""The event time of each stage, and how many timers are set in it, for the status document.

Responsible for: combining what workers report of each shard (`TimeStatus`). A stage's event time is that of
its slowest shard that isn't idle. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.progress import Progress
from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology
from fcluster.wire.messages import TimeStatus

IDLE_SHOWN_MAX = 100


def describe_event_times(
    topology: Topology, shards: Iterable[ShardId], progress: Progress
) -> list[dict[str, Any]]:
    """An entry for each stage, upstream first; none if the job doesn't use event time. -1: unknown."""
    if not topology.keeps_time:
        return []
    by_stage: dict[str, list[ShardId]] = {}
    for shard in shards:
        by_stage.setdefault(shard.stage, []).append(shard)
    return [_describe(stage, sorted(by_stage.get(stage.name, [])), progress) for stage in topology.stages]


def _describe(stage: Stage, shards: list[ShardId], progress: Progress) -> dict[str, Any]:
    times = {shard: _times_of(stage, shard, progress) for shard in shards}
    idle = [
        {"topic": stage.topics[number], "partition": shard.partition}
        for shard, inputs in times.items()
        for number, one in zip(_counted(stage), inputs, strict=True)
        if one is not None and one.idle
    ]
    ahead = [
        (shard, one)
        for shard, inputs in times.items()
        if (one := inputs[0]) is not None and one.ahead_ms >= 0
    ]
    ahead.sort(key=lambda found: -found[1].ahead_ms)
    running = {
        shard: inputs for shard, inputs in times.items() if not all(one and one.idle for one in inputs)
    }
    slowest = min(running, key=lambda shard: _time_ms(running[shard]), default=None)
    # If all shards are idle, none holds the others back.
    shown = max(times, key=lambda shard: _time_ms(times[shard]), default=None) if slowest is None else slowest
    time_ms = -1 if shown is None else _time_ms(times[shown])
    said_ms = max((one.wall_ms for one in times.get(shown, []) if one is not None), default=0) if shown else 0
    timers = [max((one.timers for one in inputs if one), default=-1) for inputs in times.values()]
    return {
        "stage": stage.name,
        "time_ms": time_ms,
        "behind_ms": max(0, said_ms - time_ms) if said_ms and time_ms >= 0 else -1,
        "timers": sum(timers) if min(timers, default=-1) >= 0 else -1,
        "held_back_by": None if slowest is None else _held_back_by(stage, slowest, running[slowest]),
        "ahead": [_ahead(stage, shard, one) for shard, one in ahead[:IDLE_SHOWN_MAX]],
        "ahead_inputs": len(ahead),
        "idle": idle[:IDLE_SHOWN_MAX],
        "idle_inputs": len(idle),
        "idle_upstream": max(
            (one.idle_upstream for inputs in times.values() for one in inputs if one is not None), default=0
        ),
    }


def _ahead(stage: Stage, shard: ShardId, one: TimeStatus) -> dict[str, Any]:
    """A shard that isn't read on, because it is too far ahead of others."""
    topic = next(source.topic.name for source in stage.inputs if not source.internal)
    return {
        "topic": topic,
        "partition": shard.partition,
        "ahead_ms": one.ahead_ms,
        "ahead_of": one.ahead_of,
    }


def _times_of(stage: Stage, shard: ShardId, progress: Progress) -> list[TimeStatus | None]:
    standings = [progress.standing(shard, number) for number in _counted(stage)]
    return [None if standing is None else standing.time for standing in standings]


def _counted(stage: Stage) -> list[int]:
    """The inputs that event time depends on."""
    return [number for number in range(len(stage.inputs)) if number not in stage.timeless_inputs]


def _time_ms(inputs: list[TimeStatus | None]) -> int:
    """The event time of a shard. All its inputs report the same."""
    known = next((one for one in inputs if one is not None), None)
    return -1 if known is None or known.now_ms is None else known.now_ms


def _held_back_by(stage: Stage, shard: ShardId, inputs: list[TimeStatus | None]) -> dict[str, Any]:
    """The input that the slowest shard waits for. For a repartition topic, also the shard upstream."""
    waited_for = [
        (number, one)
        for number, one in zip(_counted(stage), inputs, strict=True)
        if one is None or not one.idle
    ]
    number, one = min(waited_for, key=lambda waited: _watermark_ms(waited[1]))
    return {
        "topic": stage.topics[number],
        "partition": shard.partition,
        "upstream": -1 if one is None else one.slowest,
    }


def _watermark_ms(one: TimeStatus | None) -> int:
    return -1 if one is None or one.watermark_ms is None else one.watermark_ms
