"""The shards that the worker runs, and the warm copies that it keeps of other workers' shards.

Responsible for: taking shards, running them, stopping them before records that can't be processed, and
releasing them. Invariants:

- An order is carried out once, and never if it comes from an older term (invariant 13).
- A shard is released only when everything that it has processed is committed, and no restore of it is under
  way (invariant 12).
- The worker keeps no copy of a shard that it runs.

Must not: know barriers and commits. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.engine.failure import Condemnation, timer_in
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus
from fcluster.worker.core import events
from fcluster.worker.core.departure import Departure
from fcluster.worker.core.model import OwnedShard, Phase, RecordAt, ShardPhase, StopRecord
from fcluster.worker.core.state import CoreState

ANNOUNCED_RECORDS = 2_000
"""If it isn't known yet which record ends the processes: it is one of this many, or closer when it is looked
for again. The pump announces the first of them one by one, and the others in groups.
"""


class OwnedShards:
    """The shards and copies of a worker.

    Attributes:
        stop_records: those of the shards that have one. Kept after the session ends.
    """

    def __init__(self, state: CoreState, departure: Departure) -> None:
        self.stop_records: dict[ShardId, StopRecord] = {}
        self._now = state
        self._departure = departure
        self._order = (0, 0)
        self._missed_after: int | None = None
        self._is_relinked = False
        self._released_number = 0

    # --- orders ---------------------------------------------------------------------------------------

    @property
    def orders_heard(self) -> int:
        """The number of the last order in this session and term that was heard, as were all before it. If
        one is missing, the coordinator sees that, and ends the session.
        """
        term, number = self._order
        if term != self._now.term:
            return 0
        return number if self._missed_after is None else self._missed_after

    def relinked(self) -> None:
        """There is a new connection. Orders that were lost with the old one don't count as missing: the
        coordinator makes up for them when it hears which shards this worker has.
        """
        self._is_relinked, self._missed_after = True, None

    def is_new(self, order: messages.Assign | messages.Revoke) -> bool:
        """Whether this order isn't a repetition. The shards of a repeated order may belong to another worker
        by now.
        """
        if (order.term, order.number) <= self._order:
            return False
        term, number = self._order
        last = number if term == order.term else 0
        if order.number > last + 1 and not self._is_relinked and self._missed_after is None:
            self._missed_after = last
        self._order, self._is_relinked = (order.term, order.number), False
        return True

    def assign(self, message: messages.Assign) -> None:
        """Take shards. They are restored first."""
        if self._now.phase in (Phase.DRAINING, Phase.DRAINED):
            return
        new = tuple(sorted(shard for shard in message.shards if shard not in self._now.shards))
        self._now.stage_sizes |= message.stages
        self._now.job_start = message.job_start
        for end in message.ends:
            self._now.ends.setdefault(end.shard, {})[end.input] = end.offset
        for overdue in message.overdue:
            self._heed_overdue(overdue)
        for suspect in message.suspects:
            self._heed_suspect(suspect)
        for shard in new:
            self._now.shards[shard] = OwnedShard(ShardPhase.RESTORING, restoring=True)
        self._now.standbys -= set(new)
        if new:
            committed = tuple(at for at in message.committed if at.shard in new)
            self._now.add(events.RestoreShards(self._now.session, new, committed))

    def learn_ends(self, ends: Iterable[messages.EndOffset]) -> None:
        """Ends of inputs that weren't known when their shards were assigned. Repetitions have no effect."""
        for end in ends:
            known = self._now.ends.setdefault(end.shard, {})
            if end.input not in known:
                known[end.input] = end.offset
                owned = self._now.shards.get(end.shard)
                if (
                    owned is not None
                    and owned.phase is ShardPhase.RUNNING
                    and self._now.phase is Phase.ACTIVE
                ):
                    self._now.add(events.EndInput(end))

    def _heed_overdue(self, overdue: messages.OverdueRecord) -> None:
        """A process was ended because of this record. If it happened only once, that may be chance."""
        at = RecordAt(overdue.shard, overdue.offset, overdue.input, timer_in(overdue.step))
        if overdue.times >= messages.OVERDUE_TIMES_MAX and not self._is_condemned(at):
            failure = Failure.of_record(
                f"{overdue.reason}; this happened {overdue.times} times",
                "make the handler faster for such a record, raise record.timeout.ms and "
                "transaction.timeout.ms, or give the step on_error='skip' or a dead-letter topic",
                f"{at.shard}@{at.offset}",
            )
            self._now.condemn(at, Condemnation(failure, step=overdue.step))

    def _heed_suspect(self, suspect: messages.SuspectRecord) -> None:
        """Processes have ended while this record was being processed. Once that may be chance, but not
        several times.
        """
        at = RecordAt(suspect.shard, suspect.offset, suspect.input, timer_in(suspect.step))
        if suspect.times < messages.SUSPECT_TIMES_MAX:
            self._now.suspects[suspect.shard] = suspect
        elif not self._is_condemned(at):
            what = "" if suspect.step else f"{suspect.record}: "
            failure = Failure.of_record(
                f"{what}{suspect.times} worker processes in a row ended or fell silent while they processed "
                "it",
                "find in the workers' logs how they ended (by the signal of a crash in a C extension, or by "
                "SIGKILL where there isn't enough memory), or give the step on_error='skip' or a dead-letter "
                "topic",
                f"{at.shard}@{at.offset}",
            )
            self._now.condemn(at, Condemnation(failure, step=suspect.step))

    def _is_condemned(self, at: RecordAt) -> bool:
        condemned = self._now.condemned.get(at.shard, ())
        if at.timer:
            return any(record.condemnation.step == at.timer for record in condemned)
        return any(
            (record.input, record.offset) == (at.input, at.offset) and not record.condemnation.is_of_timer
            for record in condemned
        )

    def _announced(self, shard: ShardId, position: CommittedPosition) -> tuple[range, ...]:
        """By input: the offsets whose records are announced before they are processed."""
        suspect = self._now.suspects.pop(shard, None)
        if suspect is None:
            return ()
        if suspect.times or suspect.span > 1:
            only = range(suspect.offset, suspect.offset + suspect.span)
            return tuple(
                only if number == suspect.input else range(0) for number in range(len(position.inputs))
            )
        return tuple(range(at.offset, at.offset + ANNOUNCED_RECORDS) for at in position.inputs)

    def revoke(self, message: messages.Revoke) -> None:
        """Release shards."""
        revoked = [shard for shard in message.shards if shard in self._now.shards]
        self._now.add(events.StopReading(tuple(revoked)))
        for shard in revoked:
            self._now.shards[shard].phase = ShardPhase.RELEASING
        # Also answer for a shard that isn't ours (any more): the coordinator waits for the answer.
        self.release(foreign=[shard for shard in message.shards if shard not in self._now.shards])

    def keep_standbys(self, wanted: set[ShardId]) -> None:
        """Keep warm copies of these shards, and of no others."""
        if wanted != self._now.standbys:
            self._now.standbys = wanted
            self._now.add(events.KeepStandbys(tuple(sorted(wanted))))

    def forget(self) -> None:
        """The session is over, and the worker loses everything that it held in it."""
        self.keep_standbys(set())
        self._now.shards.clear()
        self._order, self._released_number = (0, 0), 0
        self._missed_after, self._is_relinked = None, False

    # --- running --------------------------------------------------------------------------------------

    def restored(self, event: events.ShardRestored) -> None:
        """A restore has ended. The shard may no longer be wanted."""
        owned = self._now.shards.get(event.shard)
        if event.session != self._now.session or owned is None or not owned.restoring:
            return
        owned.restoring = False
        owned.position = event.position
        if owned.phase is ShardPhase.RELEASING:
            self.release()
            return
        owned.phase = ShardPhase.RESTORED
        self._now.epoch_seen = max(self._now.epoch_seen, event.position.epoch)
        if self._now.producers_ready:
            self._run([event.shard])

    def torn(self, event: events.TransactionTorn) -> None:
        """Kafka has torn a transaction of a shard. The shard stops, or continues as the user has chosen."""
        owned = self._now.shards.get(event.shard)
        if event.session != self._now.session or owned is None or not owned.restoring:
            return
        self._now.log("error" if event.stopped else "warning", str(event.failure))
        if not event.stopped:
            owned.unsettled = True
            self._now.send(messages.TornTransaction(event.session, event.shard, False, event.failure))
            return
        owned.restoring = False
        if owned.phase is ShardPhase.RELEASING:
            self.release()
            return
        owned.phase, owned.stopped_by = ShardPhase.STOPPED, event.failure
        self.report_stopped()

    def report_stopped(self) -> None:
        """Report which shards are stopped. A repeated report counts once."""
        for shard, owned in self._now.shards.items():
            if owned.phase is ShardPhase.STOPPED and owned.stopped_by is not None:
                self._now.send(messages.TornTransaction(self._now.session, shard, True, owned.stopped_by))

    def run_restored(self) -> None:
        """The producers are ready, so restored shards can run."""
        self._run([shard for shard, owned in self._now.shards.items() if owned.phase is ShardPhase.RESTORED])

    def rewind(self) -> None:
        """Stop all shards: what they have processed is going to be aborted. They run again from their
        committed positions, unless they are being released.
        """
        rewound = [
            shard
            for shard, owned in self._now.shards.items()
            if owned.phase in (ShardPhase.RUNNING, ShardPhase.BLOCKED)
        ]
        for shard in rewound:
            self._now.shards[shard].phase = ShardPhase.RESTORED
        self._now.add(events.StopReading(tuple(rewound)))

    def run_again(self) -> None:
        """The transactions are aborted, so rewound shards can run."""
        waiting = [shard for shard, owned in self._now.shards.items() if owned.phase is ShardPhase.RESTORED]
        self._now.add(events.RewindShards(tuple(waiting)))
        self._run(waiting)

    def _run(self, shards: Iterable[ShardId]) -> None:
        started: list[ShardStatus] = []
        for shard in shards:
            owned = self._now.shards[shard]
            assert owned.position is not None
            owned.phase = ShardPhase.RUNNING
            started += statuses_of(shard, owned.position)
            if self._now.phase is Phase.ACTIVE:
                condemned = tuple(self._now.condemned.get(shard, ()))
                announced = self._announced(shard, owned.position)
                self._now.add(
                    events.StartReading(
                        shard,
                        owned.position,
                        self.stop_records.get(shard),
                        condemned,
                        announced,
                        dict(self._now.ends.get(shard, {})),
                    )
                )
        if started:
            self._now.send(messages.ShardsRunning(self._now.session, started))

    # --- releasing ------------------------------------------------------------------------------------

    def release(self, foreign: Iterable[ShardId] = ()) -> None:
        """Release the revoked shards that have nothing left to commit.

        A running restore has to end first. Otherwise it would mistake the next owner's deltas for damage. And
        if the shard came back in the meantime, the late result could be mistaken for that of a second
        restore.
        """
        free = [
            shard
            for shard, owned in self._now.shards.items()
            if owned.phase is ShardPhase.RELEASING
            and not owned.restoring
            and not self._now.is_uncommitted(shard)
        ]
        for shard in free:
            del self._now.shards[shard]
        if free:
            self._now.add(events.CloseShards(tuple(free)))
        released = [*free, *foreign]
        if released:
            self._released_number += 1
            self._now.send(messages.Released(self._now.session, released, self._released_number))
        self._departure.leave_if_empty()

    # --- records that can't be processed --------------------------------------------------------------

    def stop_record_reached(self, event: events.StopRecordReached) -> None:
        """A shard has reached a record that it can't process."""
        owned = self._now.shards.get(event.shard)
        if event.session != self._now.session or owned is None or owned.phase is not ShardPhase.RUNNING:
            return
        self.stop_records[event.shard] = StopRecord(event.offset, event.failure, event.input)
        owned.phase = ShardPhase.BLOCKED
        self._now.add(events.StopReading((event.shard,)))
        self.report_stop_records()

    def report_stop_records(self) -> None:
        """Fail the job once everything before the record is committed."""
        for shard, owned in self._now.shards.items():
            if owned.phase is ShardPhase.BLOCKED and not self._now.is_uncommitted(shard):
                self._now.send(messages.WorkerFailed(self._now.session, self.stop_records[shard].failure))


def statuses_of(shard: ShardId, position: CommittedPosition) -> list[ShardStatus]:
    """A shard's status in each input, as far as the core knows it: what is committed. The shell's heartbeats
    add the rest.
    """
    return [
        ShardStatus(
            shard,
            at.offset,
            at.offset,
            -1,
            False,
            position.epoch,
            number,
            letters="" if number else position.letters,
        )
        for number, at in enumerate(position.inputs)
    ]
