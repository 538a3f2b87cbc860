"""Which partitions keep step in event time: those of topics with a `max_drift`, and those whose event time
meets theirs further on.

Responsible for: the groups of stages whose partitions wait for each other (`keep_step`). A partition that is
far ahead of the slowest one of its group isn't read on. Stages whose event times never meet needn't wait for
each other, so they are in different groups. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fcluster.graph.stages import Stage
from fcluster.graph.topology import Topology


@dataclass(frozen=True, slots=True)
class KeepsStep:
    """How the shards of a stage keep step with others.

    Attributes:
        group: the name of the group, which is that of its first stage.
        inputs: the numbers of the inputs for whose event time others wait.
        max_drift_ms: how far a shard may be ahead of the slowest input of the group. None: it waits for
            nobody.
    """

    group: str
    inputs: tuple[int, ...]
    max_drift_ms: int | None


def how_far(time_ms: int | None) -> tuple[bool, int]:
    """By this, partitions are ordered: the one for which others wait comes first. None: it hasn't begun."""
    return time_ms is not None, time_ms or 0


def keep_step(topology: Topology) -> Mapping[str, KeepsStep]:
    """How the stages keep step, by their names. Stages that neither wait nor are waited for aren't there.

    Empty if no topic has a `max_drift`.
    """
    group_of = {stage.name: stage.name for stage in topology.stages}
    places = {name: place for place, name in enumerate(group_of)}
    for stage in topology.stages:
        for reader in topology.told_topics(stage).values():
            first, other = sorted((group_of[stage.name], group_of[reader.name]), key=places.__getitem__)
            group_of = {name: first if group == other else group for name, group in group_of.items()}
    found = {
        stage.name: KeepsStep(group_of[stage.name], inputs, _max_drift_ms(stage, inputs))
        for stage in topology.stages
        if (inputs := _inputs(stage, topology))
    }
    held = {one.group for one in found.values() if one.max_drift_ms is not None}
    return {name: one for name, one in found.items() if one.group in held}


def _inputs(stage: Stage, topology: Topology) -> tuple[int, ...]:
    """Topics that others write. What the job itself writes, be it a repartition topic or not, comes no sooner
    if somebody waits for it: the one who waits may be the one who writes it.
    """
    return tuple(
        number
        for number, source in enumerate(stage.inputs)
        if not source.internal
        and number not in stage.timeless_inputs
        and not topology.feeders(source.topic.name)
    )


def _max_drift_ms(stage: Stage, inputs: tuple[int, ...]) -> int | None:
    watermarks = [stage.inputs[number].watermark for number in inputs]
    drifts = [one.max_drift_ms for one in watermarks if one is not None and one.max_drift_ms is not None]
    return min(drifts, default=None)
