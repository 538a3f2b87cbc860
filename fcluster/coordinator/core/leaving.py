"""Leaving: workers whose shards move away before they exit.

Responsible for: recording that a session is leaving, whoever asked for it, and making sure that its worker
knows. Rule: leaving is final. A session that is leaving gets no shards to keep, whatever happens to its
connection or to the coordinator. `ownership` moves its shards. Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.model import Phase, Session, SessionPhase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.worker_names import find_worker
from fcluster.wire import messages

DRAINED_REMEMBERED_MAX = 10_000


class Leaving:
    """Tracks the sessions that are leaving."""

    def __init__(self, cluster: Cluster, outbox: Outbox, ownership: Ownership) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._ownership = ownership

    def said(self, session: Session) -> None:
        """The session's worker says that it is leaving."""
        if not session.leaving_said:
            self._outbox.log("info", f"worker {session.worker} (slot {session.slot}) is leaving")
        session.leaving_said = True
        if not session.leaving:
            session.leaving = True
            self._ownership.balance()

    def drain_worker(self, name: str) -> messages.DrainReply | messages.Refused:
        """An operator drains that worker."""
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
        """Tell the worker to leave, if an operator drains it. Telling it twice does no harm."""
        if session.worker in self._cluster.drained_workers:
            self._outbox.send(session.peer, messages.Leave(self._cluster.term, session.number))
