"""Joining: from a worker's Hello to its `Welcome`. Workers that already have a session go to `returning`.

Responsible for: rejecting workers that can't work here, choosing the slot of a new worker, and its first
message. Invariants:

- A worker gets its previous slot if possible. So there are few slots, and few transactional ids.
- A worker that starts afresh ends its previous session, unless its Hello merely crossed the `Welcome`.

Must not: open a session itself; `membership` does, once the slot is fenced. Pure.
"""

from __future__ import annotations

import msgspec

from fcluster.coordinator.core import events
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.ending import Ending
from fcluster.coordinator.core.leaving import Leaving
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import Joiner, Phase, Session, SessionPhase, Slot
from fcluster.coordinator.core.outbox import Outbox
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.returning import Returning
from fcluster.coordinator.core.rounds import EpochNumbers
from fcluster.wire import messages

CROSSING_MS = 500
"""If a Hello comes this soon after a Welcome, it was probably sent before the Welcome arrived. This is less
than a worker waits before it repeats its Hello.
"""
SLOTS_MAX = 10_000
EPOCHS_AHEAD_MAX = 1_000_000
"""Every number that was ever used is below a reservation in the journal, and so below what this leader knows.
A worker that knows a number this much higher doesn't belong to this job, and must not raise the numbers.
"""


class Joining:
    """Admits workers, both new and returning ones."""

    def __init__(
        self,
        cluster: Cluster,
        outbox: Outbox,
        epochs: EpochNumbers,
        ownership: Ownership,
        membership: Membership,
        leaving: Leaving,
        ending: Ending,
        returning: Returning,
    ) -> None:
        self._snapshot_store = cluster.terms.snapshot_store
        """Identity of the store that all workers must see. Empty until the first worker has joined."""
        self._cluster = cluster
        self._outbox = outbox
        self._epochs = epochs
        self._ownership = ownership
        self._membership = membership
        self._leaving = leaving
        self._ending = ending
        self._returning = returning

    def hello(self, peer: bytes, hello: messages.Hello) -> None:
        """A worker sent a Hello."""
        refusal = self._refusal(hello)
        if refusal:
            self._outbox.log("warning", f"refused worker {hello.worker} on {hello.host}: {refusal}")
            self._outbox.send(peer, self._cluster.refused(refusal))
            return
        self._snapshot_store = self._snapshot_store or hello.snapshot_store
        self._epochs.observe(_highest_epoch(hello))
        if hello.session:
            self._returning.hello(peer, hello)
        else:
            self._on_fresh_hello(peer, hello)

    def _refusal(self, hello: messages.Hello) -> str:
        """Why this worker can't work here; empty if it can."""
        if hello.version != self._cluster.terms.version:
            return (
                f"the worker runs fcluster {hello.version}, the coordinator runs "
                f"{self._cluster.terms.version}. Install the same version on all hosts."
            )
        if hello.topology != self._cluster.terms.topology.fingerprint:
            return (
                f"the worker's job file describes another topology ({hello.topology}) than the coordinator's "
                f"({self._cluster.terms.topology.fingerprint}). Start all processes from the same job file."
            )
        if self._snapshot_store and hello.snapshot_store != self._snapshot_store:
            return (
                f"the worker's snapshot store ({hello.snapshot_store}) is not the cluster's "
                f"({self._snapshot_store}). Set 'snapshots' to the same directory or URL on all hosts."
            )
        if hello.slot >= SLOTS_MAX:
            return f"slot {hello.slot} is beyond the limit of {SLOTS_MAX}. Choose a smaller one."
        if _highest_epoch(hello) > self._epochs.highest + EPOCHS_AHEAD_MAX:
            return (
                f"the worker knows epoch {_highest_epoch(hello)}, which this job, now at "
                f"{self._epochs.highest}, never reached. Restart the worker, or the whole cluster if the "
                "journal topic was deleted."
            )
        return ""

    def _on_fresh_hello(self, peer: bytes, hello: messages.Hello) -> None:
        former = self._cluster.session_of_worker.get(hello.worker)
        if former is not None and former.phase is SessionPhase.OPENING:
            # It asks again, perhaps over a new connection. The journal write is already in progress.
            self._membership.link(former, peer)
            return
        if former is not None and self._crosses_welcome(former):
            return
        if former is not None:
            self._cluster.counters.resets += 1
            self._membership.end(former, "began anew", clean=False, rejoins=True, lost=False)
        if self._cluster.phase is not Phase.RUNNING:
            self._ending.turn_away(peer)
            return
        joiner = self._cluster.joiners.get(peer)
        if joiner is None:
            joiner = self._cluster.joiners[peer] = Joiner(peer, hello)
            self._cluster.note_join()
        joiner.hello = msgspec.structs.replace(hello, owned=[])  # starts without copies; lists can be long
        if former is not None:
            self._place(joiner, self._cluster.slots[former.slot])

    def _crosses_welcome(self, session: Session) -> bool:
        """Whether a new Hello of the session's worker crossed our Welcome, which is still on its way.

        If we ended the session then, the worker would find out a moment later, send another Hello, miss the
        next Welcome, and so on. If the worker did start afresh, it will repeat its Hello.
        """
        in_time = self._cluster.now_ms - session.welcomed_ms < CROSSING_MS
        return in_time and not session.spoken and session.unlinked_ms is None

    # --- slots ----------------------------------------------------------------------------------------

    def place_joiners(self) -> None:
        """Give slots to waiting workers, if slots can already be chosen."""
        for joiner in list(self._cluster.joiners.values()):
            if joiner.slot is None:
                self._place(joiner)

    def _place(self, joiner: Joiner, slot: Slot | None = None) -> None:
        """Give the joiner a slot, if possible the one that it asked for. It waits if none can be chosen
        yet.
        """
        slot = slot or self._choose_slot(joiner.hello)
        if slot is None:
            return
        slot.joiner, joiner.slot = joiner, slot.number
        self._membership.pursue(slot)

    def _choose_slot(self, hello: messages.Hello) -> Slot | None:
        if hello.slot >= 0:
            wanted = self._cluster.slots.setdefault(hello.slot, Slot(hello.slot))
            if wanted.session is not None and self._is_superseded(wanted.session, hello):
                self._membership.end(
                    wanted.session, f"replaced by worker {hello.worker}", clean=False, rejoins=True
                )
            if wanted.session is None and wanted.joiner is None:
                return wanted
        if self._cluster.awaits_sessions():
            return None  # keep the number of slots small: some of these will turn out to be free
        for number in range(SLOTS_MAX):
            slot = self._cluster.slots.get(number)
            if slot is None:
                slot = self._cluster.slots[number] = Slot(number)
            if slot.session is None and slot.joiner is None:
                return slot
        return None

    def _is_superseded(self, session: Session, hello: messages.Hello) -> bool:
        """Whether a worker's connection is gone, and its host has started another worker for the same slot:
        then it is dead.

        If this is ever wrong, the fence makes it safe.
        """
        gone = session.phase is SessionPhase.AWAITED or session.suspect_until_ms is not None
        return gone and session.host == hello.host

    # --- the first word -------------------------------------------------------------------------------

    def welcome(self, number: int) -> None:
        """The journal holds the session: tell its worker. Balance the shards afterwards."""
        session = self._cluster.sessions.get(number)
        if session is None:
            return  # its worker died before the journal was written
        if self._cluster.phase is not Phase.RUNNING:
            self._ending.turn_away(session.peer)
            self._membership.end(session, "the job is stopping", clean=True)
            return
        session.phase = SessionPhase.LIVE
        session.heard_ms = session.welcomed_ms = self._cluster.now_ms
        self._cluster.counters.joins += 1
        self._outbox.log("info", f"worker {session.worker} (pid {session.pid}) has slot {session.slot}")
        self._outbox.send(
            session.peer,
            messages.Welcome(
                self._cluster.term,
                number,
                session.slot,
                self._epochs.highest,
                adopted=False,
                internal_topics=self._cluster.terms.topology.renamed_topics,
            ),
        )
        self._leaving.tell(session)
        self._outbox.add(events.PrepareFence(session.slot, soon=False))
        self._ownership.settle(self._cluster.slots[session.slot])


def _highest_epoch(hello: messages.Hello) -> int:
    return max(hello.epoch, hello.prepared_epoch, hello.in_flight_epoch)
