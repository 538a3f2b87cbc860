"""Sessions and their slots: opening, ending, and the fence between one session and the next.

Responsible for: a slot's path from the end of a session through the fence to the next session. Invariants:

- A session is journalled before its `Welcome`, and its end before its slot is fenced.
- A slot that isn't fenced opens no session, and a fence of it is running or scheduled (invariant 2).
- The only message that a session gets after its end says that it is over.

Must not: decide who is dead (`liveness`) or who may join (`joining`). Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.losses import Losses
from fcluster.coordinator.core.model import Joiner, Session, SessionPhase, Slot
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.rounds import Rounds
from fcluster.coordinator.core.takeovers import Takeovers
from fcluster.wire import messages

FENCE_RETRY_MS = 250
FENCE_RETRY_MS_MAX = 1_000
_SESSIONS_IN_TERM = 1_000_000_000


class Membership:
    """Opens and ends sessions, and fences their slots."""

    def __init__(
        self,
        cluster: Cluster,
        outbox: Outbox,
        rounds: Rounds,
        ownership: Ownership,
        takeovers: Takeovers,
        losses: Losses,
    ) -> None:
        self.suspects: dict[int, Session] = {}
        """Sessions, by number, that count as dead unless they soon send a message."""
        self.retrying: dict[int, Slot] = {}
        """Slots, by number, whose fence failed and will be retried."""
        self._cluster = cluster
        self._outbox = outbox
        self._rounds = rounds
        self._ownership = ownership
        self._takeovers = takeovers
        self._losses = losses
        self._opened = 0

    def deadlines_ms(self) -> list[float | None]:
        """When something is due if nothing happens before that."""
        return [slot.fence_retry_ms for slot in self.retrying.values()]

    # --- opening --------------------------------------------------------------------------------------

    def pursue(self, slot: Slot) -> None:
        """Bring a slot without a session to its next state: fenced, then a session for the worker that
        waits for it.
        """
        if slot.session is not None:
            return
        if not slot.fenced:
            if not slot.fencing and slot.fence_retry_ms is None:
                self.fence(slot)
        elif slot.joiner is not None:
            self._open(slot, slot.joiner)
        self._ownership.settle(slot)

    def _open(self, slot: Slot, joiner: Joiner) -> None:
        self._opened += 1
        assert self._opened < _SESSIONS_IN_TERM
        hello = joiner.hello
        session = Session(
            number=self._cluster.term * _SESSIONS_IN_TERM + self._opened,
            slot=slot.number,
            worker=hello.worker,
            host=hello.host,
            pid=hello.pid,
            peer=joiner.peer,
            phase=SessionPhase.OPENING,
            heard_ms=self._cluster.now_ms,
            interval_ms=self._cluster.settings.commit_interval_min_ms,
            leaving=hello.worker in self._cluster.drained_workers,
        )
        del self._cluster.joiners[joiner.peer]
        slot.joiner, slot.session, slot.fenced = None, session, False
        self._cluster.sessions[session.number] = session
        self._cluster.session_of_worker[session.worker] = session
        self._cluster.session_of_peer[session.peer] = session
        self._outbox.hold("welcome", self._outbox.journal_slot(slot), session.number)

    def link(self, session: Session, peer: bytes) -> None:
        """The session's worker now uses this connection, and knows what was lost with the old one."""
        if self._cluster.session_of_peer.get(session.peer) is session:
            del self._cluster.session_of_peer[session.peer]
        session.peer, self._cluster.session_of_peer[peer] = peer, session
        session.unlinked_ms = None
        session.orders_heard = session.orders  # its report about its shards makes up for lost messages
        session.dismissed = False
        self.hear(session)

    def hear(self, session: Session) -> None:
        """The session's worker has shown that it is alive."""
        session.heard_ms = self._cluster.now_ms
        if session.suspect_until_ms is not None and not session.process_ended:
            session.suspect_until_ms = None
            del self.suspects[session.number]

    # --- ending ---------------------------------------------------------------------------------------

    def evict(self, session: Session, reason: str, peer: bytes | None = None) -> None:
        """End a session whose worker may be alive, and tell the worker."""
        self._cluster.counters.evictions += 1
        self._outbox.send(peer or session.peer, messages.Evicted(self._cluster.term, session.number))
        self.end(session, reason, clean=False)

    def end(
        self, session: Session, reason: str, *, clean: bool, rejoins: bool = False, lost: bool = True
    ) -> None:
        """End a session: nothing is sent to it from now on. Its slot is fenced unless it left cleanly.

        Args:
            session: any session that hasn't ended.
            reason: the reason, for the log.
            clean: whether it has nothing uncommitted and won't begin anything.
            rejoins: whether its worker, or that worker's successor, is asking for the slot right now.
            lost: whether it is unknown what its worker was doing: it ended, hung or was cut off. False if it
                is `clean`.
        """
        slot = self._cluster.slots[session.slot]
        self._outbox.log(
            "info" if clean or rejoins else "warning",
            f"session of worker {session.worker} (slot {slot.number}) is over: {reason}",
        )
        del self._cluster.sessions[session.number]
        del self._cluster.session_of_worker[session.worker]
        if self._cluster.session_of_peer.get(session.peer) is session:
            del self._cluster.session_of_peer[session.peer]
        self.suspects.pop(session.number, None)
        self._rounds.ended(session, self._cluster.now_ms)
        slot.session, slot.fenced = None, clean
        if clean:
            self._outbox.add(events.ForgetFence(slot.number))
        if lost and not clean:
            self._losses.lost(session)
        waiting = self._ownership.orphaned(slot)
        sequence = self._outbox.journal_slot(slot)
        if not clean:
            slot.fencing = True
            self._outbox.hold("fence", sequence, slot.number)
            since_ms = session.heard_ms if session.unlinked_ms is None else session.unlinked_ms
            self._takeovers.begin(slot.number, waiting, reason, since_ms, self._cluster.now_ms)
        if not rejoins:
            self.pursue(slot)
            self._ownership.balance()

    # --- fences ---------------------------------------------------------------------------------------

    def fence(self, slot: Slot) -> None:
        """Fence at once: the end of the slot's last session is already in the journal."""
        slot.fencing, slot.fence_retry_ms = True, None
        self.retrying.pop(slot.number, None)
        self._outbox.add(events.FenceSlot(slot.number))

    def fenced(self, number: int) -> None:
        """The slot is fenced."""
        slot = self._cluster.slots[number]
        if not slot.fencing:
            return
        self._cluster.counters.fences += 1
        if slot.fence_failures:
            self._outbox.log("info", f"slot {number} is fenced, after {slot.fence_failures} failed attempts")
        slot.fencing, slot.fenced, slot.fence_failures = False, True, 0
        self._takeovers.fenced(number, self._cluster.now_ms)
        self._outbox.journal_slot(slot)
        self.pursue(slot)
        self._ownership.balance()

    def fence_failed(self, number: int, reason: str) -> None:
        """The slot couldn't be fenced. It is retried at growing intervals, without limit."""
        slot = self._cluster.slots[number]
        if not slot.fencing:
            return
        self._cluster.counters.fence_failures += 1
        delay_ms = min(FENCE_RETRY_MS_MAX, FENCE_RETRY_MS * 2 ** min(slot.fence_failures, 10))
        slot.fence_failures += 1
        slot.fencing, slot.fence_retry_ms = False, self._cluster.now_ms + delay_ms
        self.retrying[number] = slot
        if slot.fence_failures == 1:
            self._outbox.log(
                "warning", f"slot {number} can't be fenced yet, its shards are waiting: {reason}; retrying"
            )

    def retry_fences(self) -> None:
        """Retry the fences that are due."""
        for slot in list(self.retrying.values()):
            if slot.fence_retry_ms is not None and self._cluster.now_ms >= slot.fence_retry_ms:
                self.fence(slot)
