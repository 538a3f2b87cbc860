"""The worker's epochs: which one is open, which one is in flight, and the messages about them.

Responsible for: an epoch's path from its first record over the barrier to the commit. Invariants:

- An epoch is committed only on a `Complete` of the current session (invariant 7).
- At most one epoch is in flight (frozen, not yet committed), and one is open after it. The open one commits
  after the one in flight, because a barrier waits for it (invariant 10).
- The open epoch doesn't grow beyond its limit: reading is paused.

Must not: know what happens to a shard whose records are committed. Pure.
"""

from __future__ import annotations

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.wire import messages
from fcluster.worker.core import events
from fcluster.worker.core.model import EpochPhase, InFlight, OpenEpoch, Phase, ShardPhase
from fcluster.worker.core.owned_shards import statuses_of
from fcluster.worker.core.state import CoreState


class Epochs:
    """The open epoch and the one in flight."""

    def __init__(self, state: CoreState) -> None:
        self._now = state
        self._refreshed_ms = state.now_ms

    # --- the open one ---------------------------------------------------------------------------------

    def records_processed(self, event: events.RecordsProcessed) -> None:
        """A batch was processed."""
        self._now.open.shards |= event.shards
        self._now.open.records += event.records
        self._now.open.lone = None
        if self._now.open.records == 1 and len(event.shards) == 1:
            self._now.open.lone = event.newest
        # A small piece must be committed at once.
        self._now.backlog = event.backlog and self._now.pieces.records_max is None
        self.report_dirty()
        if self._now.open.records >= self._now.bounds.epoch_records_max:
            self._pause(f"the open epoch holds {self._now.open.records} records")

    def report_dirty(self) -> None:
        """Tell the coordinator, once, that there is something to commit."""
        if self._now.open.dirty and not self._now.open.reported and self._now.session:
            self._now.open.reported = True
            self._now.send(messages.Dirty(self._now.session, self._now.backlog))

    def settle(self) -> None:
        """Commit the positions of shards that continue after a torn transaction. Then offset and delta
        agree.
        """
        if self._now.phase is not Phase.ACTIVE:
            return
        for shard, owned in self._now.shards.items():
            if owned.unsettled and owned.phase is ShardPhase.RUNNING:
                owned.unsettled = False
                self._now.open.shards.add(shard)
        self.report_dirty()

    def refresh_offsets_if_due(self) -> None:
        """Commit the offsets of idle shards again, so that the group's offset retention never expires
        them.
        """
        age_ms = self._now.now_ms - self._refreshed_ms
        if age_ms < self._now.bounds.offset_refresh_ms or self._now.phase is not Phase.ACTIVE:
            return
        self._refreshed_ms = self._now.now_ms
        idle = {
            shard
            for shard, owned in self._now.shards.items()
            if owned.phase is ShardPhase.RUNNING and owned.position is not None and owned.position.epoch > 0
        }
        self._now.open.shards |= idle
        self.report_dirty()

    def pause_if_unheard(self) -> None:
        """Without a coordinator, processed records can't be committed."""
        silence_ms = self._now.now_ms - self._now.heard_ms
        if silence_ms >= self._now.bounds.coordinator_loss_ms and self._now.open.dirty:
            self._pause("no messages from the coordinator")

    def _pause(self, reason: str) -> None:
        if not self._now.paused:
            self._now.paused = True
            self._now.add(events.PauseReading(reason))

    def resume_if_possible(self) -> None:
        """Continue reading, if the open epoch isn't too large."""
        if self._now.paused and self._now.open.records < self._now.bounds.epoch_records_max:
            self._now.paused = False
            self._now.add(events.ResumeReading())

    # --- the one in flight ----------------------------------------------------------------------------

    def barrier(self, message: messages.Barrier) -> None:
        """The open epoch ends here."""
        repeated = message.epoch <= self._now.epoch_seen or self._now.in_flight is not None
        if repeated or not (self._now.producers_ready or self._now.aborting):
            return
        self._now.epoch_seen = message.epoch
        if not self._now.open.dirty:
            self._now.send(messages.Prepared(self._now.session, message.epoch, 0, 0.0, False))
            return
        opened = self._now.open
        self._now.in_flight = InFlight(
            message.epoch, EpochPhase.PREPARING, frozenset(opened.shards), opened.records, opened.lone
        )
        self._now.open = OpenEpoch()
        self._now.add(events.PrepareEpoch(self._now.session, message.epoch, self._now.in_flight.shards))

    def flushed(self, event: events.EpochFlushed) -> None:
        """The whole epoch is in its transaction."""
        flight = self._flight(event.session, event.epoch, EpochPhase.PREPARING)
        if flight is None:
            return
        flight.phase = EpochPhase.PREPARED
        self._now.send(
            messages.Prepared(
                self._now.session, event.epoch, event.records, event.prepare_ms, self._now.backlog
            )
        )

    def complete(self, message: messages.Complete) -> None:
        """The epoch may be committed."""
        if self._now.in_flight is None:
            # This worker has no records in the epoch, or the message repeats one for an epoch that is already
            # committed.
            self._now.send(
                messages.Committed(self._now.session, message.epoch, 0.0, self._now.open.dirty, [])
            )
            return
        flight = self._flight(message.session, message.epoch, EpochPhase.PREPARED)
        if flight is not None:
            flight.phase = EpochPhase.COMMITTING
            self._now.add(events.CommitEpoch(self._now.session, message.epoch))

    def committed(self, event: events.EpochCommitted) -> bool:
        """The transaction is committed. Returns whether it was the epoch in flight."""
        if self._flight(event.session, event.epoch, EpochPhase.COMMITTING) is None:
            return False
        assert self._now.in_flight is not None
        self._now.pieces.committed(self._now.in_flight.records)
        self._now.in_flight = None
        for shard, position in event.positions.items():
            self._now.shards[shard].position = position
            self._forget_condemned(shard, position)
        self._now.send(
            messages.Committed(
                self._now.session,
                event.epoch,
                event.commit_ms,
                self._now.open.dirty,
                [
                    status
                    for shard, position in event.positions.items()
                    for status in statuses_of(shard, position)
                ],
                event.letter,
            )
        )
        return True

    def _forget_condemned(self, shard: ShardId, position: CommittedPosition) -> None:
        condemned = self._now.condemned.pop(shard, ())
        left = [
            record
            for record in condemned
            if record.input < len(position.inputs) and record.offset >= position.inputs[record.input].offset
        ]
        if left:
            self._now.condemned[shard] = left

    def prepared_epoch(self) -> int:
        """The epoch in flight, if it is prepared and waits for its `Complete`, otherwise 0."""
        flight = self._now.in_flight
        return flight.epoch if flight is not None and flight.phase is EpochPhase.PREPARED else 0

    def abort(self) -> None:
        """Drop everything that isn't committed, except an epoch whose commit is under way."""
        self._now.open = OpenEpoch()
        flight = self._now.in_flight
        if flight is None or flight.phase is EpochPhase.COMMITTING:
            return
        self._now.in_flight = None
        if flight.phase is EpochPhase.PREPARING:
            # Nobody has to wait for this worker: it has nothing in that epoch any more.
            self._now.send(messages.Prepared(self._now.session, flight.epoch, 0, 0.0, False))

    def forget(self) -> None:
        """The session is over, so drop everything that isn't committed."""
        self._now.open = OpenEpoch()
        self._now.in_flight = None

    def _flight(self, session: int, epoch: int, phase: EpochPhase) -> InFlight | None:
        """The epoch in flight, if it has this number and is in `phase`."""
        flight = self._now.in_flight
        if session != self._now.session or flight is None:
            return None
        return flight if flight.epoch == epoch and flight.phase is phase else None
