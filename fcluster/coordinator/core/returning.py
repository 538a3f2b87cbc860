"""Returning: a worker that lost its connection, or its coordinator, but not its session.

Responsible for: resuming such a session, and repeating what was lost with the connection. Rule: a session
continues only with shards that it owns; otherwise it is evicted. Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.leaving import Leaving
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import Phase, Session, SessionPhase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.rounds import Rounds
from fcluster.coordinator.core.starts import Starts
from fcluster.wire import messages


class Returning:
    """Resumes sessions."""

    def __init__(
        self,
        cluster: Cluster,
        outbox: Outbox,
        starts: Starts,
        rounds: Rounds,
        ownership: Ownership,
        membership: Membership,
        leaving: Leaving,
    ) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._starts = starts
        self._rounds = rounds
        self._ownership = ownership
        self._membership = membership
        self._leaving = leaving

    def hello(self, peer: bytes, hello: messages.Hello) -> None:
        """A worker says which session it has, and what it holds."""
        session = self._cluster.sessions.get(hello.session)
        if session is None or session.worker != hello.worker or session.phase is SessionPhase.OPENING:
            self._outbox.send(peer, messages.Evicted(self._cluster.term, hello.session))
            return
        if hello.leaving:
            self._leaving.said(session)
        if session.phase is not SessionPhase.AWAITED and session.unlinked_ms is None and session.peer == peer:
            # This Hello was sent on an old connection and arrived on the new one. Nothing was lost since the
            # last Hello, so this one has no news, and it is older than what was sent in the meantime.
            self._send_adoption(session)
            return
        owned = set(hello.owned)
        objection = self._ownership.objection(session, owned)
        if hello.draining and self._cluster.phase is Phase.RUNNING:
            objection = objection or (
                "stopped for the end of the job, but its coordinator died before that was complete"
            )
        if objection:
            self._membership.evict(session, objection, peer)
            return
        if session.phase is SessionPhase.AWAITED:
            self._adopt(session)
        self._membership.link(session, peer)
        session.spoken = True
        self._send_adoption(session)
        self._rounds.returned(session, hello, self._cluster.now_ms)
        goes_on = bool(owned) and self._starts.goes_on()
        self._ownership.reconcile(session, owned)
        if goes_on:
            self._ownership.settle_all()
        if self._cluster.phase is Phase.DRAINING:
            session.phase = SessionPhase.LIVE
            if self._cluster.ending_told:
                self._outbox.send(peer, messages.Drain(self._cluster.term, session.number))
        self._leaving.tell(session)
        self._ownership.balance()

    def _send_adoption(self, session: Session) -> None:
        number, slot = session.number, session.slot
        welcome = messages.Welcome(
            self._cluster.term,
            number,
            slot,
            self._rounds.numbers.highest,
            adopted=True,
            internal_topics=self._cluster.terms.topology.renamed_topics,
        )
        self._outbox.send(session.peer, welcome)

    def _adopt(self, session: Session) -> None:
        session.phase = SessionPhase.LIVE
        session.standbys_told = None
        session.interval_ms = self._cluster.settings.commit_interval_min_ms
        self._cluster.counters.adoptions += 1
        self._outbox.add(events.PrepareFence(session.slot, soon=False))
        self._cluster.note_join()
        self._outbox.log("info", f"adopted worker {session.worker} with slot {session.slot}")
