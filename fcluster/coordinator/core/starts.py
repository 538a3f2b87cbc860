"""Which start of the job this is. At each start, the copies of global tables are read up to their ends before
anything else (`engine.loading`), and dead letters are counted anew (`letters`).

Responsible for: the number of the job's start. A leadership that finds no worker at work begins a start. Its
number is the leadership's term. A leadership that adopts a session with shards goes on with the start in the
journal: neither a failover nor a worker that is started again is a start of the job.

Invariants:
- The number is journalled before a shard is assigned. So a later leadership that goes on knows it.
- It doesn't change within a leadership. So all workers that have shards were told the same one.

Must not: send it; `ownership` does. Pure.
"""

from __future__ import annotations

from typing import Any

from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.outbox import Outbox

START_KEY = "start"
"""Journal key of the number of the job's last start, if the job has global tables or a limit on dead
letters.
"""


class Starts:
    """The number of the job's start."""

    def __init__(self, cluster: Cluster, outbox: Outbox) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._last = 0
        self._begins = False

    def recover(self, entry: Any) -> None:
        """Take over the journal's entry. None: there is none."""
        self._last = 0 if entry is None else int(entry["number"])

    def goes_on(self) -> bool:
        """A session has returned with shards. Returns whether it is known only now which start this is."""
        if self._cluster.job_start is not None:
            return False
        self._cluster.job_start = self._last
        return True

    def decide(self) -> None:
        """If no session can return any more, and none has returned with shards, this is a new start. It is
        known when the journal holds it.
        """
        cluster = self._cluster
        if cluster.job_start is not None or self._begins or not cluster.started:
            return
        if not cluster.awaits_sessions():
            self._begins = True
            sequence = self._outbox.journal(START_KEY, {"number": cluster.term})
            self._outbox.hold("start", sequence, cluster.term)
