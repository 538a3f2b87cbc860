"""Which partition of the cluster is the farthest behind in event time, for the workers whose partitions wait
for it.

Responsible for: collecting what workers say of the partitions that they read (`WorkerStats.slowest`), and
telling each of them the slowest one of the others (`HeartbeatAck.slowest`). A worker looks at its own
partitions itself, many times a second. What a session said is forgotten with the session, so nobody waits for
a worker that is gone.

Must not: know the job, or decide who waits. Pure.
"""

from __future__ import annotations

from typing import Final

from fcluster.coordinator.core.cluster import Cluster
from fcluster.graph.drift import how_far
from fcluster.wire.messages import SlowestInput

COUNT_GAP_MS: Final = 100
"""With many workers, the slowest ones aren't looked for again at each heartbeat."""


class SlowestInputs:
    """See the module's docstring."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._said: dict[int, list[SlowestInput]] = {}
        self._slowest: dict[str, list[tuple[int, SlowestInput]]] = {}
        """For each group, the slowest of the two sessions that are the farthest behind."""
        self._counted_ms = float("-inf")

    def learn(self, session: int, slowest: list[SlowestInput]) -> None:
        """Note what a session says of its own partitions."""
        if slowest:
            self._said[session] = slowest
        else:
            self._said.pop(session, None)

    def elsewhere(self, session: int) -> list[SlowestInput]:
        """The slowest partitions of the other sessions, one for each group that has one."""
        if not self._said:
            return []
        if self._cluster.now_ms - self._counted_ms >= COUNT_GAP_MS:
            self._count()
        return [
            next(one for number, one in found if number != session)
            for found in self._slowest.values()
            if any(number != session for number, _ in found)
        ]

    def _count(self) -> None:
        self._counted_ms = self._cluster.now_ms
        for number in self._said.keys() - self._cluster.sessions.keys():
            del self._said[number]
        slowest: dict[str, list[tuple[int, SlowestInput]]] = {}
        for number, said in self._said.items():
            for one in said:
                slowest.setdefault(one.group, []).append((number, one))
        self._slowest = {
            group: sorted(found, key=lambda pair: how_far(pair[1].time_ms))[:2]
            for group, found in slowest.items()
        }
