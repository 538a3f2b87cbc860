"""Which worker runs which shard: assigning shards to slots, moving them, and taking them back.

Responsible for: the phases of shards. Invariants:

- A shard's slot is journalled before its session is told (`Assign`; invariant 15). So is the job's start.
- A shard leaves a session only if the session released it, or is over. In the second case it waits until the
  slot is fenced (invariant 2).
- A shard with state moves warm: its owner runs it until its next slot has a warm copy, or the wait took too
  long.
- A session that is leaving gets no shards to keep.

Must not: end sessions (`released` and `objection` say why one can't continue), or know epochs. Pure.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.coordinator.core.assignment import plan
from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.copies import Copies
from fcluster.coordinator.core.losses import suspects_of
from fcluster.coordinator.core.model import HELD_PHASES, Phase, Session, SessionPhase, Shard, ShardPhase, Slot
from fcluster.coordinator.core.outbox import Outbox, assignment_key
from fcluster.coordinator.core.run_end import ends_of
from fcluster.coordinator.core.takeovers import Takeovers
from fcluster.wire import messages

WARMING_MS_MAX = 30_000
"""After this time a shard moves even if its copy at the target isn't warm. The rest is restored there."""


class Ownership:
    """The shards of a cluster and their owners."""

    def __init__(self, cluster: Cluster, outbox: Outbox, copies: Copies, takeovers: Takeovers) -> None:
        self.warming: list[Shard] = []
        self._cluster = cluster
        self._outbox = outbox
        self._copies = copies
        self._takeovers = takeovers
        self._postponed: set[ShardId] = set()
        self._unwritten: deque[Shard] = deque()
        """Assigned shards whose slot isn't in the journal yet, in the order of the writes."""

    def deadlines_ms(self) -> list[float | None]:
        """When something is due if nothing happens before that."""
        cluster = self._cluster
        deadlines: list[float | None] = [shard.warm_until_ms for shard in self.warming]
        if not cluster.assigning and cluster.first_join_ms is not None:
            deadlines.append(cluster.first_join_ms + cluster.settings.initial_rebalance_delay_ms)
        return deadlines

    # --- giving ---------------------------------------------------------------------------------------

    def begin_assigning(self) -> None:
        """The first assignment waits a while for all expected workers, so that shards don't move twice."""
        cluster = self._cluster
        if cluster.assigning or cluster.phase is not Phase.RUNNING or cluster.first_join_ms is None:
            return
        if cluster.awaits_sessions():
            return
        patient = cluster.now_ms < cluster.first_join_ms + cluster.settings.initial_rebalance_delay_ms
        if patient and len(cluster.sessions) < cluster.terms.expected_workers:
            return
        if not cluster.sessions:
            return
        cluster.assigning = True
        for slot in cluster.slots.values():
            self.settle(slot)
        self.balance()

    def add_shards(self, shards: Sequence[ShardId]) -> None:
        """A source has more partitions than before. Their shards need owners."""
        for identity in shards:
            self._cluster.shards.setdefault(identity, Shard(identity))
        self.balance()

    def settle(self, slot: Slot) -> None:
        """Decide about shards that wait for this slot: either its session gets them, or they become free."""
        waiting = [
            shard for shard in self._cluster.shards_of(slot.number) if shard.phase is ShardPhase.WAITING
        ]
        session = slot.session
        if session is not None:
            # If a session has no connection, it learns of its new shards when it reports those that it holds.
            if session.phase is not SessionPhase.LIVE or session.unlinked_ms is not None:
                return
            if session.leaving and self._cluster.assigning:
                for shard in waiting:  # the session was never told of them
                    self._free(shard)
            elif waiting and self._cluster.job_start is not None:
                for shard in waiting:
                    shard.phase, shard.session = ShardPhase.RESTORING, session.number
                    self._takeovers.assigned(shard.identity, self._cluster.now_ms)
                shards = [shard.identity for shard in waiting]
                self._send_assign(session, shards)
        elif slot.fenced and slot.joiner is None and self._cluster.assigning:
            for shard in waiting:
                self._free(shard)

    def settle_all(self) -> None:
        """The job's start is known: shards that have waited for that can be assigned. Those of workers that
        came meanwhile can move.
        """
        for slot in self._cluster.slots.values():
            self.settle(slot)
        self.balance()

    def orphaned(self, slot: Slot) -> list[ShardId]:
        """The slot's session is over. Shards that it may have had wait for the slot's next state."""
        waiting: list[ShardId] = []
        for shard in self._cluster.shards_of(slot.number):
            if shard.phase is not ShardPhase.ASSIGNING:
                shard.phase, shard.session, shard.target = ShardPhase.WAITING, 0, None
                waiting.append(shard.identity)
        return waiting

    def balance(self) -> None:
        """Move as few shards as possible so that all slots have the same number, plus or minus one.

        A shard without an owner goes to a warm copy first. If that upsets the balance, it moves on from
        there, again to a warm copy.
        """
        if not self._cluster.assigning or self._cluster.phase is not Phase.RUNNING:
            return
        available = self._cluster.available_slots()
        if not available:
            self._dismiss_leaving()
        current = {
            shard.identity: slot
            for shard in self._cluster.shards.values()
            if (slot := shard.slot if shard.target is None else shard.target) is not None
        }
        self._postponed.clear()
        leaving: list[Shard] = []
        warmest: Mapping[ShardId, int] | None = None
        for identity, slot in sorted(plan(self._cluster.shards, available, current).items()):
            shard = self._cluster.shards[identity]
            if shard.phase is ShardPhase.FREE:
                if warmest is None:
                    warmest = self._copies.warmest(self._cluster.slots.values())
                self._give(shard, slot, warmest)
            elif shard.phase is ShardPhase.RELEASING:
                shard.target = slot
            elif shard.phase is ShardPhase.WARMING and slot == shard.slot:
                shard.phase, shard.target = ShardPhase.RUNNING, None
            elif shard.phase is ShardPhase.WARMING:
                shard.target = slot
            elif shard.phase in HELD_PHASES and slot != shard.slot and self._linked(shard):
                self._begin_move(shard, slot, leaving)
        self.warming = [shard for shard in self._cluster.shards.values() if shard.phase is ShardPhase.WARMING]
        self._copies.place(self._cluster.shards, self._cluster.slots.values())
        self._copies.tell(self._cluster.shards, self._cluster.slots)
        self._release(leaving)
        self.hand_over_warm()

    def _give(self, shard: Shard, slot: int, warmest: Mapping[ShardId, int]) -> None:
        """Journal the slot of a shard without an owner: the planned slot, or one with a warm copy."""
        if shard.target is None and shard.identity in warmest:
            slot = warmest[shard.identity]
            self._cluster.counters.warm_takeovers += 1
        sequence = self._outbox.journal(assignment_key(shard.identity), {"slot": slot})
        self._cluster.put(shard, slot)
        shard.phase, shard.target, shard.journalled_by = ShardPhase.ASSIGNING, None, sequence
        self._unwritten.append(shard)

    def assignments_written(self, sequence: int) -> None:
        """The journal holds the slots of assigned shards: tell their sessions."""
        written: list[Shard] = []
        while self._unwritten and self._unwritten[0].journalled_by <= sequence:
            written.append(self._unwritten.popleft())
        for shard in written:
            shard.phase = ShardPhase.WAITING
        for number in sorted({shard.slot for shard in written if shard.slot is not None}):
            self.settle(self._cluster.slots[number])
        if written:
            self.balance()

    def runs(self, shard: Shard) -> None:
        """The shard's session says that it runs the shard."""
        if shard.phase is not ShardPhase.RESTORING:
            return
        shard.phase = ShardPhase.RUNNING
        takeover = self._takeovers.runs(shard.identity, self._cluster.now_ms)
        if takeover is not None:
            self._outbox.log("info", takeover.describe())
        if shard.identity in self._postponed:
            self.balance()

    def stops(self, shard: Shard, failure: Failure) -> bool:
        """The shard's session has it and can't run it. Returns whether that is new."""
        if shard.phase not in (ShardPhase.RESTORING, ShardPhase.RUNNING):
            return False
        shard.phase, shard.stopped_by = ShardPhase.STOPPED, failure
        self._takeovers.runs(shard.identity, self._cluster.now_ms)  # no further effect
        if shard.identity in self._postponed:
            self.balance()
        return True

    # --- moving ---------------------------------------------------------------------------------------

    def _begin_move(self, shard: Shard, slot: int, leaving: list[Shard]) -> None:
        """Warm the shard's next slot first, if there is state to be copied."""
        if shard.phase is ShardPhase.STOPPED or not self._copies.keeps_state(shard.identity):
            shard.target = slot
            leaving.append(shard)
        elif shard.phase is ShardPhase.RESTORING:
            # Its owner can't release it in the middle of a restore, so waiting costs nothing.
            self._postponed.add(shard.identity)
        else:
            shard.phase, shard.target = ShardPhase.WARMING, slot
            shard.warm_until_ms = self._cluster.now_ms + WARMING_MS_MAX

    def hand_over_warm(self) -> None:
        """Start to move shards whose next slot has a warm copy by now, or whose wait took too long."""
        if not self.warming or self._cluster.phase is not Phase.RUNNING:
            return
        leaving: list[Shard] = []
        for shard in self.warming:
            if shard.phase is not ShardPhase.WARMING or shard.target is None or not self._linked(shard):
                continue
            target = self._cluster.slots[shard.target]
            warm = self._copies.is_warm(shard.identity, target)
            if warm or (self._cluster.now_ms >= shard.warm_until_ms and target.session is not None):
                self._cluster.counters.cold_moves += not warm
                leaving.append(shard)
        if leaving:
            self._release(leaving)
            self.warming = [shard for shard in self.warming if shard.phase is ShardPhase.WARMING]

    def _release(self, leaving: Sequence[Shard]) -> None:
        """Ask owners to release shards that move to their targets."""
        revoked: dict[int, list[ShardId]] = {}
        for shard in leaving:
            shard.phase = ShardPhase.RELEASING
            self._takeovers.revoked(shard.identity, self._cluster.now_ms)
            revoked.setdefault(shard.session, []).append(shard.identity)
        for number, shards in revoked.items():
            self._revoke(self._cluster.sessions[number], shards)

    def _revoke(self, session: Session, shards: list[ShardId]) -> None:
        self._cluster.counters.moves += len(shards)
        self._outbox.log("info", f"moving {len(shards)} shards away from slot {session.slot}")
        number = self._next_order(session)
        self._outbox.send(session.peer, messages.Revoke(self._cluster.term, session.number, shards, number))
        session.due_ms = self._cluster.now_ms  # they are released with a commit

    def released(self, session: Session, shards: Sequence[ShardId]) -> str:
        """The session has released shards.

        Returns:
            Why the session can't continue. Empty if it can.
        """
        held = [
            shard
            for name in shards
            if (shard := self._cluster.shards.get(name)) and shard.session == session.number
        ]
        if any(shard.phase is not ShardPhase.RELEASING for shard in held):
            # A previous leader requested this. It is unknown which of our own requests it would answer.
            return "released shards that it was not asked to release"
        for shard in held:
            self._free(shard, shard.target)
            self._takeovers.released(shard.identity, self._cluster.now_ms)
        self.balance()
        return ""

    def _dismiss_leaving(self) -> None:
        """Sessions that are leaving need not wait if no worker can take their shards."""
        for session in self._cluster.sessions.values():
            linked = session.phase is SessionPhase.LIVE and session.unlinked_ms is None
            if session.leaving and linked and not session.dismissed:
                session.dismissed = True
                self._outbox.send(session.peer, messages.Dismiss(self._cluster.term, session.number))

    # --- a session that returns -----------------------------------------------------------------------

    def objection(self, session: Session, owned: Collection[ShardId]) -> str:
        """Why the session can't continue with the shards that it holds. Empty if it can."""
        for identity in sorted(owned):
            shard = self._cluster.shards.get(identity)
            if shard is None or shard.slot != session.slot:
                return f"holds {identity}, which it doesn't own"
            if shard.phase is ShardPhase.RELEASING:
                # It is unknown whether it received the request to release the shard. If we repeated the
                # request, the extra answer could be mistaken for a later release by the same session.
                return f"had to release {identity} when its connection closed"
        return ""

    def reconcile(self, session: Session, owned: Collection[ShardId]) -> None:
        """The session has returned with these shards. Its other shards have to be assigned to it again."""
        missing: list[ShardId] = []
        for shard in self._cluster.shards_of(session.slot):
            if shard.phase is ShardPhase.ASSIGNING:
                continue
            if shard.phase is ShardPhase.RELEASING:
                self._free(shard)  # it was released, and only the message was lost
            elif shard.identity in owned:
                if shard.phase is ShardPhase.WAITING:
                    shard.phase, shard.session = ShardPhase.RUNNING, session.number
            elif self._cluster.job_start is not None:
                shard.phase, shard.session, shard.target = ShardPhase.RESTORING, session.number, None
                missing.append(shard.identity)
        if missing:
            self._send_assign(session, missing)

    # --- orders ---------------------------------------------------------------------------------------

    def _send_assign(self, session: Session, shards: list[ShardId]) -> None:
        job_start = self._cluster.job_start
        assert job_start is not None
        number = self._next_order(session)
        overdue = [record for shard in shards for record in self._cluster.overdue.get(shard, ())]
        committed = [
            messages.CommittedOffset(shard, offset, of_input)
            for shard in shards
            for of_input, offset in self._cluster.committed.get(shard, {}).items()
        ]
        self._outbox.send(
            session.peer,
            messages.Assign(
                self._cluster.term,
                session.number,
                shards,
                number,
                overdue,
                suspects_of(self._cluster, shards),
                committed,
                self._stage_sizes(),
                ends_of(self._cluster, shards),
                job_start,
            ),
        )

    def _stage_sizes(self) -> dict[str, int]:
        """What workers have to know in order to report event time to each other, and to write to all shards
        of a stage.
        """
        topology = self._cluster.terms.topology
        if not topology.keeps_time and not topology.has_global_tables:
            return {}
        return dict(Counter(shard.stage for shard in self._cluster.shards))

    def _next_order(self, session: Session) -> int:
        if session.orders_heard == session.orders:
            session.unheard_ms = self._cluster.now_ms
        session.orders += 1
        return session.orders

    def _linked(self, shard: Shard) -> bool:
        return self._cluster.sessions[shard.session].unlinked_ms is None

    def _free(self, shard: Shard, target: int | None = None) -> None:
        self._cluster.put(shard, None)
        shard.phase, shard.session, shard.target = ShardPhase.FREE, 0, target
