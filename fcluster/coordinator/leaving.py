"""Leaving: workers whose shards move away before they go.

Responsible for: that a session is leaving, whoever wants it, and that its worker knows. Keeps the rule that
who leaves, leaves: a session that is leaving gets no shards to keep, whatever happens to its connection or to
the coordinator. How its shards move is `ownership`'s. Pure.
"""

from __future__ import annotations

from fcluster.common import messages
from fcluster.coordinator.cluster import Cluster
from fcluster.coordinator.model import Phase, Session, SessionPhase
from fcluster.coordinator.naming import find_worker
from fcluster.coordinator.outbox import Outbox
from fcluster.coordinator.ownership import Ownership

DRAINED_REMEMBERED_MAX = 10_000


class Leaving:
    """Follows who is leaving."""

    def __init__(self, cluster: Cluster, outbox: Outbox, ownership: Ownership) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._ownership = ownership

    def said(self, session: Session) -> None:
        """The session's worker says that it wants to leave."""
        if not session.leaving_said:
            self._outbox.log("info", f"worker {session.worker} (slot {session.slot}) is leaving")
        session.leaving_said = True
        if not session.leaving:
            session.leaving = True
            self._ownership.balance()

    def drain_worker(self, name: str) -> messages.DrainReply | messages.Refused:
        """An operator wants that worker gone."""
        if self._cluster.phase is not Phase.RUNNING:
            return self._cluster.refused(f"the job is stopping ({self._cluster.stop_reason})")
        session = find_worker(name, self._cluster.sessions.values())
        if isinstance(session, str):
            return self._cluster.refused(session)
        self._cluster.drained_workers[session.worker] = None
        if len(self._cluster.drained_workers) > DRAINED_REMEMBERED_MAX:
            del self._cluster.drained_workers[next(iter(self._cluster.drained_workers))]
        if session.phase is SessionPhase.LIVE and session.unlinked_ms is None:
            self.tell(session)
        if not session.leaving:
            self._outbox.log("info", f"draining worker {session.worker} (slot {session.slot})")
            session.leaving = True
            self._ownership.balance()
        others = len(self._cluster.available_slots())
        return messages.DrainReply(
            self._cluster.term, session.slot, session.worker, session.host, session.pid, others
        )

    def tell(self, session: Session) -> None:
        """Tell its worker to leave if an operator wants it; a worker that was told before doesn't mind."""
        if session.worker in self._cluster.drained_workers:
            self._outbox.send(session.peer, messages.Leave(self._cluster.term, session.number))
