"""Which workers are dead: closed connections, ended processes, silence, and workers that are stuck.

Responsible for: noticing when a session can no longer be waited for, and ending it. Rule: a coordinator that
was itself suspended doesn't mistake its own absence for that of its workers. If it is ever wrong, the fence
makes it safe. Must not: check all sessions at each event. It checks them only a few times within the shortest
limit. Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import EpochPhase, Session, SessionPhase
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.rounds import Rounds

SUSPICION_GRACE_MS = 150
"""If a closed connection isn't restored within this time, the worker counts as dead. If the worker's host
says that the process has ended, there is no such grace.
"""
ABSENCE_NOTICED_MS = 1_000
"""If nothing called for this long while there was work, the coordinator itself was suspended."""


class Liveness:
    """Watches the sessions of a cluster."""

    def __init__(
        self, cluster: Cluster, outbox: Outbox, rounds: Rounds, ownership: Ownership, membership: Membership
    ) -> None:
        self._cluster = cluster
        self._outbox = outbox
        self._rounds = rounds
        self._ownership = ownership
        self._membership = membership
        self._sweep_ms = max(20.0, min(300.0, cluster.settings.session_timeout_ms / 10))
        self._next_sweep_ms = cluster.now_ms
        self._absence_ms_min = max(ABSENCE_NOTICED_MS, 2 * self._sweep_ms)

    def deadlines_ms(self) -> list[float | None]:
        """When something is due if nothing happens before that."""
        deadlines = [session.suspect_until_ms for session in self._membership.suspects.values()]
        if self._cluster.sessions:
            deadlines.append(self._next_sweep_ms)
        return deadlines

    def notice_absence(self, now_ms: float) -> None:
        """A coordinator that was stopped or swapped out must not mistake its own absence for that of its
        workers.
        """
        absence_ms = now_ms - self._cluster.now_ms
        if absence_ms < self._absence_ms_min:
            return
        for session in self._cluster.sessions.values():
            session.heard_ms += absence_ms
            session.epoch_phase_ms += absence_ms
            session.unheard_ms += absence_ms
            if session.suspect_until_ms is not None:
                session.suspect_until_ms += absence_ms
            if session.unlinked_ms is not None:
                session.unlinked_ms += absence_ms

    def disconnected(self, peer: bytes) -> None:
        """A connection has closed."""
        joiner = self._cluster.joiners.pop(peer, None)
        if joiner is not None and joiner.slot is not None:
            slot = self._cluster.slots[joiner.slot]
            slot.joiner = None  # if it is alive, it sends another Hello
            self._membership.pursue(slot)
            self._ownership.balance()
        session = self._cluster.session_of_peer.get(peer)
        if session is not None:
            if session.unlinked_ms is None:
                session.unlinked_ms = self._cluster.now_ms
                session.standbys_told = None
                self._rounds.unlinked(session, self._cluster.now_ms)
                self._outbox.add(events.PrepareFence(session.slot, soon=True))
            self._suspect(session)

    def process_ended(self, worker: str) -> None:
        """Messages that the process has sent are handled first, because the end of its connection comes after
        them.
        """
        session = self._cluster.session_of_worker.get(worker)
        if session is not None:
            session.process_ended = True
            self._suspect(session)

    def _suspect(self, session: Session) -> None:
        if session.suspect_until_ms is None:
            session.suspect_until_ms = self._cluster.now_ms + SUSPICION_GRACE_MS
            self._membership.suspects[session.number] = session
        if session.process_ended and session.unlinked_ms is not None:
            session.suspect_until_ms = self._cluster.now_ms

    def end_suspects(self) -> None:
        """End suspected sessions that didn't send a message in time."""
        for session in list(self._membership.suspects.values()):
            if session.suspect_until_ms is not None and self._cluster.now_ms >= session.suspect_until_ms:
                self._cluster.counters.deaths += 1
                reason = "its process exited" if session.process_ended else "its connection closed"
                self._membership.end(session, reason, clean=False)

    def sweep(self) -> None:
        """Check for silent and stuck workers: a few times within the shortest limit, not at each event."""
        if self._cluster.now_ms < self._next_sweep_ms:
            return
        self._next_sweep_ms = self._cluster.now_ms + self._sweep_ms
        for session in list(self._cluster.sessions.values()):
            if self._cluster.now_ms - session.heard_ms >= self._cluster.settings.session_timeout_ms:
                self._cluster.counters.deaths += 1
                awaited = session.phase is SessionPhase.AWAITED
                reason = "did not come back" if awaited else "sent no heartbeat in time"
                self._membership.end(session, reason, clean=False)
                continue
            reason = self._stuck(session)
            if reason:
                self._membership.evict(session, reason)

    def _others_get_on(self, session: Session) -> bool:
        """Whether Kafka has committed newer epochs of other workers than this worker's epoch. Then perhaps
        only this worker can't reach the brokers.
        """
        return any(
            other.committed_epoch > session.epoch
            for other in self._cluster.sessions.values()
            if other is not session
        )

    def _stuck(self, session: Session) -> str:
        """Why the session, though alive, can no longer be waited for. Empty if it can."""
        settings, now_ms = self._cluster.settings, self._cluster.now_ms
        if session.stats is not None and session.stats.kafka_wait and not self._others_get_on(session):
            # It isn't stuck: it waits for brokers that may be down, and limits that itself. Another worker
            # would wait for the same brokers.
            session.epoch_phase_ms = session.unheard_ms = now_ms
        # record.timeout.ms, and the worker itself, handle a handler that is busy with one record. What waits
        # for the end of that record counts as late only from then on.
        epoch_age_ms = now_ms - max(session.epoch_phase_ms, session.busy_ms)
        if session.epoch_phase is not EpochPhase.NONE and epoch_age_ms >= settings.checkpoint_timeout_ms:
            return f"is {session.epoch_phase.value} epoch {session.epoch} beyond checkpoint.timeout.ms"
        unheard = session.orders_heard < session.orders
        if unheard and now_ms - max(session.unheard_ms, session.busy_ms) >= settings.checkpoint_timeout_ms:
            return "did not learn which shards to run or to release"
        if session.unlinked_ms is not None and now_ms - session.unlinked_ms >= settings.session_timeout_ms:
            return "lost its connection and never reported its shards"
        return ""
