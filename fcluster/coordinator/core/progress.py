"""How far each shard has come, and whether everything that belongs to the run is committed: the records that
were in the sources at the start, or those of a bounded run.

Responsible for: the last known `ShardStatus` of each shard and input and, with `until_caught_up`, the
targets. The goal is to process what the job's sources contain at the start. How much that is after a
repartition is known only once the upstream stages have caught up, so the target is read then. A bounded run
(`RunEnd`) has its targets from the beginning, and a stage with event time is done once event time has ended
in it. Invariant: a shard that has reached an input's target stays caught up there, whoever owns it later,
because a committed offset never goes back.

Must not: know sessions or time. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.run_end import RunEnd
from fcluster.graph.stages import Input
from fcluster.graph.topology import Topology
from fcluster.wire.messages import ShardStatus

StageInput = tuple[str, int]
"""An input of a stage: the stage's name and the input's number."""


class Progress:
    """Collects what workers report about their shards.

    Args:
        topology: the job.
        shards: all shards.
        until_caught_up: whether there are targets at all.
        run_end: where the run ends; then there are targets, too.
    """

    def __init__(
        self,
        topology: Topology,
        shards: Iterable[ShardId],
        until_caught_up: bool,
        run_end: RunEnd | None = None,
    ) -> None:
        self.standings: dict[ShardId, dict[int, ShardStatus]] = {}
        """By shard and by input number."""
        self.targets: dict[StageInput, Mapping[int, int]] = {}
        self.has_targets = until_caught_up or run_end is not None
        """Whether the job ends when something is committed."""
        self._ends_time_of = {stage.name for stage in topology.stages if run_end and stage.keeps_time}
        self._inputs_of = {stage.name: range(len(stage.inputs)) for stage in topology.stages}
        self._upstream = {
            (stage.name, number): _upstream(source, topology)
            for stage in topology.stages
            for number, source in enumerate(stage.inputs)
        }
        self._behind: dict[StageInput, set[int]] = {one: set() for one in self._upstream}
        for shard in shards:
            for number in self._inputs_of[shard.stage]:
                self._behind[shard.stage, number].add(shard.partition)
        self._requested: set[StageInput] = set()
        for stage in topology.stages if run_end is not None else ():
            for number, source in enumerate(stage.inputs):
                offsets = run_end.offsets.get(source.topic.name) if run_end is not None else None
                if offsets is not None and not source.internal:
                    # A partition that was added later has no record that belongs to the run.
                    partitions = self._behind[stage.name, number]
                    self._requested.add((stage.name, number))
                    self.targets[stage.name, number] = {at: offsets.get(at, 0) for at in partitions}

    @property
    def caught_up(self) -> bool:
        """Whether there were targets, and all of them are committed."""
        return self.has_targets and not any(self._behind.values())

    def waits_only_for(self, stopped: Collection[ShardId]) -> bool:
        """Whether everything that isn't caught up waits for these shards, which are stopped."""
        if not self.has_targets or not stopped:
            return False
        if any(one not in self.targets for one in self._requested):
            return False  # its target isn't known yet
        return all(
            ShardId(one[0], partition) in stopped
            for one in self._requested
            for partition in self._behind[one]
        )

    def learn(self, status: ShardStatus) -> None:
        """Note a heartbeat, which says how far the shard has read."""
        known = self.standing(status.shard, status.input)
        if status.end < 0 and known is not None:
            status = msgspec.structs.replace(status, end=known.end)
        self._keep(status)
        if self.has_targets:
            self._judge(status)

    def learn_commit(self, status: ShardStatus) -> None:
        """Note a commit. It contains only the committed offset, which may be behind what was read."""
        if self.has_targets:
            self._judge(status)
        standings = self.standings.get(status.shard)
        known = None if standings is None else standings.get(status.input)
        if standings is None or known is None:
            self._keep(status)
            return
        # By position and without calls, because this comes with each epoch of each shard.
        position = known.position if known.position > status.position else status.position
        standings[status.input] = ShardStatus(
            status.shard,
            position,
            status.committed,
            known.end if known.end > status.end else status.end,
            position > status.committed,
            status.epoch,
            status.input,
            known.time if status.time is None else status.time,
        )

    def standing(self, shard: ShardId, number: int = 0) -> ShardStatus | None:
        """The shard's status in that input. None if it hasn't been reported yet."""
        standings = self.standings.get(shard)
        return None if standings is None else standings.get(number)

    def _keep(self, status: ShardStatus) -> None:
        standings = self.standings.get(status.shard)
        if standings is not None and status.input in standings:
            standings[status.input] = status
        elif status.input in self._inputs_of.get(status.shard.stage, ()):
            self.standings.setdefault(status.shard, {})[status.input] = status

    def set_target(self, stage: str, offsets: Mapping[int, int], number: int = 0) -> None:
        """The end offsets of an input of the stage become its target there."""
        if (stage, number) not in self._behind:
            return
        self.targets[stage, number] = dict(offsets)
        for partition in sorted(self._behind[stage, number]):
            standing = self.standing(ShardId(stage, partition), number)
            if standing is not None:
                self._judge(standing)

    def inputs_to_read(self) -> list[StageInput]:
        """The inputs whose end offsets are needed now. Each is returned once."""
        if not self.has_targets:
            return []
        ready = [
            one
            for one, upstream in self._upstream.items()
            if one not in self._requested and not any(self._behind[feeder] for feeder in upstream)
        ]
        self._requested.update(ready)
        return ready

    def _judge(self, status: ShardStatus) -> None:
        one = (status.shard.stage, status.input)
        behind = self._behind.get(one)
        target = self.targets.get(one, {}).get(status.shard.partition)
        if behind is None or target is None:
            return
        if status.shard.stage in self._ends_time_of:
            is_done = status.time is not None and status.time.ended
        else:
            is_done = status.committed >= target or (not status.dirty and status.position >= target)
        if is_done:
            behind.discard(status.shard.partition)

    @property
    def inputs_behind(self) -> int:
        """How many inputs of shards haven't reached their targets."""
        return sum(map(len, self._behind.values()))

    @property
    def records_left(self) -> int:
        """How many offsets are left to be read, as far as the targets are known."""
        return sum(
            max(0, target - (0 if standing is None else standing.position))
            for (stage, number), targets in self.targets.items()
            for partition, target in targets.items()
            if partition in self._behind[stage, number]
            for standing in [self.standing(ShardId(stage, partition), number)]
        )


def _upstream(source: Input, topology: Topology) -> list[StageInput]:
    """The inputs of the stages that write to the source: a repartition topic, or a topic of the user that the
    job itself writes. None for other sources.
    """
    return [
        (feeder.name, number)
        for feeder in topology.feeders(source.topic.name)
        for number in range(len(feeder.inputs))
    ]
