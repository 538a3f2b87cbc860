"""How far each shard is, and whether all records that were in the sources at start are committed.

Responsible for: the last known `ShardStatus` of each shard and, with `until_caught_up`, the targets. The goal
is to process what the job's sources hold at start. How much that is after a repartition is known only once
the upstream stages have caught up, so that target is read then. Invariant: a shard that has reached its
target stays caught up, whoever owns it later, because a committed offset never goes back.

Must not: know sessions or time. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from fcluster.common.ids import ShardId
from fcluster.common.messages import ShardStatus
from fcluster.common.topology import Stage, Topology


class Progress:
    """Collects what workers report about their shards.

    Args:
        topology: the job.
        shards: all of them.
        until_caught_up: whether there are targets at all.
    """

    def __init__(self, topology: Topology, shards: Iterable[ShardId], until_caught_up: bool) -> None:
        self.standings: dict[ShardId, ShardStatus] = {}
        self.targets: dict[str, Mapping[int, int]] = {}
        self._until_caught_up = until_caught_up
        self._upstream = {stage.name: _upstream(stage, topology) for stage in topology.stages}
        self._behind: dict[str, set[int]] = {stage.name: set() for stage in topology.stages}
        for shard in shards:
            self._behind[shard.stage].add(shard.partition)
        self._requested: set[str] = set()

    @property
    def caught_up(self) -> bool:
        """Whether there were targets, and all of them are committed."""
        return self._until_caught_up and not any(self._behind.values())

    def waits_only_for(self, stopped: Collection[ShardId]) -> bool:
        """Whether everything that isn't caught up waits for these shards, which are stopped."""
        if not self._until_caught_up or not stopped:
            return False
        if any(stage not in self.targets for stage in self._requested):
            return False  # not known yet
        return all(
            ShardId(stage, partition) in stopped
            for stage in self._requested
            for partition in self._behind[stage]
        )

    def learn(self, status: ShardStatus) -> None:
        """Take in a heartbeat: it says how far the shard has read."""
        known = self.standings.get(status.shard)
        if status.end < 0 and known is not None:
            status = msgspec.structs.replace(status, end=known.end)
        self.standings[status.shard] = status
        self._judge(status)

    def learn_commit(self, status: ShardStatus) -> None:
        """Take in a commit: it says only the committed offset, which may be behind what is read."""
        self._judge(status)
        known = self.standings.get(status.shard)
        if known is not None:
            position = max(known.position, status.position)
            status = msgspec.structs.replace(
                status, position=position, end=max(known.end, status.end), dirty=position > status.committed
            )
        self.standings[status.shard] = status

    def set_target(self, stage: str, offsets: Mapping[int, int]) -> None:
        """The end offsets of the stage's source become the stage's target."""
        if stage not in self._behind:
            return
        self.targets[stage] = dict(offsets)
        for partition in sorted(self._behind[stage]):
            standing = self.standings.get(ShardId(stage, partition))
            if standing is not None:
                self._judge(standing)

    def stages_to_read(self) -> list[str]:
        """Stages whose end offsets are needed now. Each is returned once."""
        if not self._until_caught_up:
            return []
        ready = [
            stage
            for stage, upstream in self._upstream.items()
            if stage not in self._requested and not any(self._behind[name] for name in upstream)
        ]
        self._requested.update(ready)
        return ready

    def _judge(self, status: ShardStatus) -> None:
        behind = self._behind.get(status.shard.stage)
        target = self.targets.get(status.shard.stage, {}).get(status.shard.partition)
        if behind is None or target is None:
            return
        if status.committed >= target or (not status.dirty and status.position >= target):
            behind.discard(status.shard.partition)


def _upstream(stage: Stage, topology: Topology) -> list[str]:
    """The stages that write to a stage after a repartition. None for a user's source topic."""
    if not stage.internal:
        return []
    return [
        feeder.name
        for feeder in topology.stages
        if any(chain.sink is not None and chain.sink.name == stage.source.name for chain in feeder.chains)
    ]
