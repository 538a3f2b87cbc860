"""The worker's protocol: sessions, shards and epochs, without any I/O.

Responsible for: how a worker reacts to events. `WorkerCore.handle(event, now_ms)` takes one event (a message
arrived, an epoch was flushed, a restore ended) and returns the effects, which the shell in `worker/server.py`
carries out in order. The shell feeds their results back as events. This module has the session, from Hello to
reset, and decides which part gets which event. `owned_shards` has the shards and copies, `epochs` the open
epoch and the one in flight, `departure` the worker's exit. They share `state`.

Invariants that all of them keep together:

- One session, one initialisation of the producers (invariant 8). If a transaction has failed that certainly
  isn't committed, and its producer can go on, the worker aborts what is open and replays it in the same
  session (`_abort`). Any other failure (a fence, an unknown outcome) ends in `_reset`: both producers are
  destroyed, the memory layers are dropped, and the worker asks for a new session. The committed offsets then
  decide what is true; nothing is guessed (invariant 9).
- An epoch is committed only on a `Complete` of the current session and of no older term (invariant 7).
- At most one epoch is in flight (frozen, not yet committed), and one is open after it. The open one commits
  after the one in flight, because a barrier waits for it (invariant 10).
- A shard is released only when everything that it has processed is committed (invariant 12).
- A worker that is leaving keeps processing until its shards have moved. It keeps leaving, whatever happens to
  its session, its connection or its coordinator, and exits within bounded time.

Must not: read a clock, use sockets, Kafka, RocksDB or threads. Records don't pass through here; once for each
batch the shell reports which shards it made dirty.
"""

from __future__ import annotations

from dataclasses import replace

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind
from fcluster.engine.failure import Condemnation
from fcluster.wire import messages
from fcluster.worker.core import events
from fcluster.worker.core.departure import Departure
from fcluster.worker.core.epochs import Epochs
from fcluster.worker.core.events import Effect, Event
from fcluster.worker.core.model import (
    Bounds,
    EpochPhase,
    Identity,
    Phase,
    RecordAt,
    ShardPhase,
    StopRecord,
)
from fcluster.worker.core.owned_shards import OwnedShards
from fcluster.worker.core.pieces import Replays
from fcluster.worker.core.state import CoreState

CONDEMNATIONS_MAX = 8
"""If a record has been condemned this often for one topic or step, and is still refused, the job stops."""


class WorkerCore:
    """One worker's protocol. The module's docstring lists the invariants.

    Attributes:
        state: the worker's state. It may be read; only `handle` changes it.
    """

    def __init__(self, identity: Identity, bounds: Bounds, now_ms: int) -> None:
        self.state = self._now = CoreState(identity, bounds, now_ms)
        self._departure = Departure(self.state)
        self._owned_shards = OwnedShards(self.state, self._departure)
        self._epochs = Epochs(self.state)
        self._hello_sent_ms = now_ms - bounds.hello_retry_ms
        self._replays = Replays()
        self._held: events.OpenProducers | events.AbortEpochs | None = None

    @property
    def orders_heard(self) -> int:
        """See `OwnedShards.orders_heard`."""
        return self._owned_shards.orders_heard

    # --- events ---------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """Returns the effects of `event`, in order. `now_ms` comes from a clock that never goes back."""
        self._now.begin(now_ms)
        if self._now.phase is not Phase.STOPPED:
            self._dispatch(event)
        return self._now.effects

    def _dispatch(self, event: Event) -> None:
        match event:
            case events.RecordsProcessed():
                self._epochs.records_processed(event)
            case events.MessageReceived():
                self._on_message(event.message)
            case events.EpochFlushed():
                self._epochs.flushed(event)
            case events.EpochCommitted():
                self._on_epoch_committed(event)
            case events.Tick():
                self._on_tick()
            case events.Connected():
                self._on_connected()
            case events.ProducersOpened():
                self._on_producers_opened(event)
            case events.EpochsAborted():
                self._on_epochs_aborted(event)
            case events.ShardRestored():
                self._owned_shards.restored(event)
                self._epochs.settle()
            case events.TransactionTorn():
                self._owned_shards.torn(event)
            case events.RestoreFailed():
                self._on_restore_failed(event)
            case events.TransactionFailed():
                self._on_transaction_failed(event)
            case events.EpochFailed():
                self._on_epoch_failed(event)
            case events.HandlerFailed():
                self._on_handler_failed(event)
            case events.StopRecordReached():
                self._owned_shards.stop_record_reached(event)
            case events.JobBroken():
                self._on_job_broken(event)
            case events.WorkerBroken():
                # No message is sent: the session ends with the connection, and other workers take the shards.
                self._now.stop(ExitCode.MISTAKE, event.failure)
            case events.JobEnded(reason, failure):
                self._on_job_ended(reason, failure)
            case events.TerminationRequested():
                self._departure.termination_requested()

    def _on_tick(self) -> None:
        hello_age_ms = self._now.now_ms - self._hello_sent_ms
        overdue = hello_age_ms >= self._now.bounds.hello_retry_ms
        if self._now.phase is Phase.JOINING and self._now.connected and overdue:
            self._say_hello()
        self._begin_held()
        self._epochs.pause_if_unheard()
        self._epochs.refresh_offsets_if_due()
        if self._now.leaving:
            self._departure.follow()

    def invariants(self) -> None:
        """Assert what must hold after every event. Tests and the simulation call it.

        Raises:
            AssertionError: something doesn't hold.
        """
        owned = set(self._now.shards)
        assert self._now.open.shards <= owned, (
            f"open epoch holds {self._now.open.shards - owned}, which are not owned"
        )
        if self._now.in_flight is not None:
            assert self._now.in_flight.epoch <= self._now.epoch_seen
            assert self._now.in_flight.shards <= owned, "a shard was given up before its epoch was committed"
            assert self._now.producers_ready or self._now.aborting, "an epoch in flight without producers"
        assert not self._now.standbys & owned, f"copies of its own shards: {self._now.standbys & owned}"
        if self._now.aborting:
            assert not self._now.open.dirty, "records were processed before the abort"
            flight = self._now.in_flight
            assert flight is None or flight.phase is EpochPhase.COMMITTING, "an aborted epoch in flight"
        if self._now.phase is Phase.JOINING:
            assert not self._now.aborting, "an abort while joining"
            assert not self._now.standbys, "copies while joining"
            assert self._now.session == 0, "a session while joining"
            assert not self._now.shards, "shards while joining"
            assert self._now.in_flight is None, "an epoch in flight while joining"
            assert not self._now.open.dirty, "uncommitted records while joining"
        if self._now.open.dirty:
            assert self._now.producers_ready, "records were processed without producers"
        for shard, owned_shard in self._now.shards.items():
            waiting = owned_shard.phase is ShardPhase.RESTORING
            assert owned_shard.restoring or not waiting, f"nobody restores {shard}"
            if not owned_shard.restoring and owned_shard.phase is not ShardPhase.STOPPED:
                assert owned_shard.position is not None, f"{shard} runs without a position"

    # --- connection and session -----------------------------------------------------------------------

    def _on_connected(self) -> None:
        self._now.connected = True
        self._now.heard_ms = self._now.now_ms
        if self._now.session:
            self._owned_shards.relinked()
        self._say_hello()

    def _say_hello(self) -> None:
        self._hello_sent_ms = self._now.now_ms
        draining = self._now.phase in (Phase.DRAINING, Phase.DRAINED)
        self._now.send(
            messages.Hello(
                worker=self._now.identity.worker,
                host=self._now.identity.host,
                pid=self._now.identity.pid,
                slot=self._now.slot,
                session=self._now.session,
                owned=sorted(self._now.shards),
                epoch=self._now.epoch_seen,
                prepared_epoch=self._epochs.prepared_epoch(),
                dirty=self._now.open.dirty,
                topology=self._now.identity.topology,
                snapshot_store=self._now.identity.snapshot_store,
                version=self._now.identity.version,
                in_flight_epoch=self._now.in_flight.epoch if self._now.in_flight else 0,
                process_space=self._now.identity.process_space,
                leaving=self._now.leaving,
                term=self._now.term,
                draining=draining and not self._now.leaving,
            )
        )

    def _on_message(self, message: messages.FromCoordinator) -> None:
        if not isinstance(message, messages.ToWorker):
            return
        if message.term < self._now.term:
            name = type(message).__name__
            self._now.log(
                "warning", f"refused {name} of term {message.term}, the term is now {self._now.term}"
            )
            return
        self._now.term = message.term
        self._now.heard_ms = self._now.now_ms
        if isinstance(message, messages.Welcome):
            self._on_welcome(message)
        elif isinstance(message, messages.Refused):
            self._on_refused(message)
        elif isinstance(message, messages.Shutdown):
            self._on_shutdown(message)
        elif message.session == self._now.session != 0:
            self._on_session_message(message)
        self._epochs.resume_if_possible()

    def _on_session_message(self, message: messages.ToWorker) -> None:
        match message:
            case messages.Barrier():
                self._epochs.barrier(message)
            case messages.Complete():
                self._epochs.complete(message)
            case messages.Assign() if self._owned_shards.is_new(message):
                self._owned_shards.assign(message)
            case messages.Revoke() if self._owned_shards.is_new(message):
                self._owned_shards.revoke(message)
            case messages.Standby():
                self._owned_shards.keep_standbys(set(message.shards) - set(self._now.shards))
            case messages.Drain():
                self._departure.drain()
            case messages.Leave():
                self._now.drained = True
                self._departure.begin()
            case messages.Dismiss():
                self._departure.leave_at_once()
            case messages.Evicted():
                self._now.log(
                    "warning", f"session {self._now.session} was ended by the coordinator; joining again"
                )
                self._reset()
            case messages.HeartbeatAck():
                self._owned_shards.learn_ends(message.ends)
                self._now.slowest_elsewhere = message.slowest
            case _:
                pass  # RecordNoted: the shell waits for it

    def _on_welcome(self, message: messages.Welcome) -> None:
        if message.adopted:
            if message.session == self._now.session:
                self._now.log("info", f"adopted by the coordinator of term {message.term}")
                self._now.open.reported = False
                self._epochs.report_dirty()
                self._owned_shards.report_stop_records()
                self._owned_shards.report_stopped()
            return
        if self._now.phase is not Phase.JOINING:
            return  # the answer to a Hello that was sent twice
        self._now.session = message.session
        self._now.slot = message.slot
        self._now.epoch_seen = max(self._now.epoch_seen, message.epoch)
        self._now.phase = Phase.STARTING
        self._now.log(
            "info", f"joined as slot {message.slot}, session {message.session}, term {message.term}"
        )
        self._hold(events.OpenProducers(message.session, message.slot, message.internal_topics))

    def _hold(self, effect: events.OpenProducers | events.AbortEpochs) -> None:
        """Begin the replay with this effect once the replay has waited long enough. The session already
        exists, and other parts know it.
        """
        self._held = effect
        self._begin_held()

    def _begin_held(self) -> None:
        if self._held is not None and self._now.now_ms >= self._replays.due_ms:
            self._now.add(self._held)
            self._held = None

    def _on_refused(self, message: messages.Refused) -> None:
        if self._now.phase is not Phase.JOINING:
            return
        if message.retry:
            self._now.log("info", f"not admitted yet: {message.reason}")
        else:
            refused = Failure(FailureKind.CLUSTER, f"refused by the coordinator: {message.reason}")
            self._now.stop(ExitCode.MISTAKE, refused.fitted())

    def _on_shutdown(self, message: messages.Shutdown) -> None:
        if message.session not in (0, self._now.session):
            return
        self._on_job_ended(message.reason, message.failure)

    def _on_job_ended(self, reason: str, failure: Failure | None) -> None:
        """The coordinator says so. Or the journal says so, because there is no leader any more. Uncommitted
        records of this worker were fenced before the end was recorded.
        """
        if failure is not None:
            self._now.stop(ExitCode.JOB_FAILED, failure)
        else:
            self._now.stop(ExitCode.JOB_ENDED, reason)

    def _on_producers_opened(self, event: events.ProducersOpened) -> None:
        if event.session != self._now.session or self._now.phase is not Phase.STARTING:
            return
        self._now.producers_ready = True
        self._now.phase = Phase.ACTIVE
        self._owned_shards.run_restored()
        self._epochs.settle()

    def _on_epoch_committed(self, event: events.EpochCommitted) -> None:
        if self._epochs.committed(event):
            self._replays.committed()
            self._owned_shards.release()
            self._owned_shards.report_stop_records()
            self._departure.finish_drain()

    # --- failures -------------------------------------------------------------------------------------

    def _on_transaction_failed(self, event: events.TransactionFailed) -> None:
        if event.session != self._now.session:
            self._now.log("info", f"from session {event.session}, which is over: {event.reason}")
        elif self._now.aborting and event.abortable:
            pass  # another request of transactions that are going to be aborted
        elif self._now.session:
            times = self._replays.failed(event.reason, self._now.now_ms)
            if event.unexpected and times >= self._now.bounds.epoch_failures_max:
                message = f"an epoch failed {times} times in a row (epoch.failures.max): {event.reason}"
                self._fail_job(Failure(FailureKind.KAFKA, message).fitted())
                return
            self._now.log("warning", f"{event.reason}; replaying from the committed offsets")
            # While a record is looked for, there is one way only.
            if event.abortable and self._now.phase is Phase.ACTIVE and self._now.pieces.records_max is None:
                self._abort()
            else:
                self._reset()

    def _abort(self) -> None:
        """Drop everything uncommitted, but keep the session, the shards and the producers.

        A commit that is under way comes first, in the same thread, and decides where the replay begins.
        """
        self._now.aborting = True
        self._now.producers_ready = False
        self._owned_shards.rewind()
        self._epochs.abort()
        self._owned_shards.release()
        self._hold(events.AbortEpochs(self._now.session))

    def _on_epochs_aborted(self, event: events.EpochsAborted) -> None:
        if event.session != self._now.session or not self._now.aborting:
            return
        self._now.aborting = False
        self._now.producers_ready = True
        self._owned_shards.run_again()
        self._epochs.settle()

    def _on_epoch_failed(self, event: events.EpochFailed) -> None:
        """Replay in smaller pieces until one record stands alone. That record is then condemned."""
        if event.session != self._now.session or not self._now.session:
            return
        failed = self._now.in_flight or self._now.open
        # Without a limit on epochs, the failed epoch may also be the open one, after the one in flight.
        record = event.record or (failed.lone if self._now.pieces.records_max is not None else None)
        if record is not None:
            self._now.log("warning", f"{_named(record)}: {event.condemnation.failure}")
            self._condemn(record, event.condemnation)
            self._now.pieces.condemned()
        else:
            self._now.pieces.failed(failed.records)
            self._now.log(
                "warning",
                f"{event.condemnation.failure}; replaying at most {self._now.pieces.records_max} records at "
                "a time to find the one that causes it",
            )
        self._reset()

    def _condemn(self, record: RecordAt, condemnation: Condemnation) -> None:
        if record.timer:
            condemnation = replace(condemnation, step=record.timer)
        before = [
            one
            for one in self._now.condemned.get(record.shard, ())
            if (one.input, one.offset) == (record.input, record.offset)
            and (one.condemnation.topic, one.condemnation.step) == (condemnation.topic, condemnation.step)
        ]
        if (condemnation.topic or condemnation.step) and len(before) < CONDEMNATIONS_MAX:
            self._now.condemn(record, condemnation)
        elif record.timer:
            # The timer fires before any record at which the shard could stop.
            self._now.condemn(record, replace(condemnation, topic=""))
        else:
            cause = condemnation.failure
            where = f"{record.shard}@{record.offset}"
            failure = Failure.of_record(
                f"{_named(record)}: {cause.message}", cause.remedy, cause.where or where
            )
            self._owned_shards.stop_records[record.shard] = StopRecord(record.offset, failure, record.input)

    def _on_restore_failed(self, event: events.RestoreFailed) -> None:
        if event.session != self._now.session:
            return
        if event.fatal:
            self._now.send(messages.WorkerFailed(self._now.session, event.failure))
        else:
            self._now.log("warning", f"{event.failure}; trying again")
            self._reset()

    def _on_handler_failed(self, event: events.HandlerFailed) -> None:
        """The open epoch contains part of a record's effects: abort it, replay, and stop before that
        record.
        """
        if event.session != self._now.session:
            return
        condemnation = event.condemnation
        is_timer = condemnation is not None and condemnation.is_of_timer
        if condemnation is not None and (condemnation.topic or is_timer):
            timer = condemnation.step if is_timer else ""
            self._condemn(RecordAt(event.shard, event.offset, event.input, timer), condemnation)
        else:
            stop_record = StopRecord(event.offset, event.failure, event.input)
            self._owned_shards.stop_records[event.shard] = stop_record
        self._now.log("error", str(event.failure))
        self._reset()

    def _on_job_broken(self, event: events.JobBroken) -> None:
        if event.session != self._now.session:
            return  # a failure in a previous session, which is being ended
        self._fail_job(event.failure)

    def _fail_job(self, failure: Failure) -> None:
        self._now.log("error", str(failure))
        self._now.send(messages.WorkerFailed(self._now.session, failure))

    def _reset(self) -> None:
        """Drop everything uncommitted, and ask for a new session. This recovers from any failure."""
        self._now.add(events.StopReading(tuple(self._now.shards)))
        self._now.add(events.DropLayers())
        self._now.add(events.DestroyProducers())
        self._owned_shards.forget()
        self._epochs.forget()
        self._now.producers_ready = self._now.aborting = False
        self._now.slowest_elsewhere = ()
        self._held = None
        self._now.session = 0
        self._now.phase = Phase.JOINING
        if self._now.leaving:
            self._now.stop_as_asked()
        elif self._now.connected:
            self._say_hello()


def _named(record: RecordAt) -> str:
    if record.timer:
        return f"the {record.timer} in {record.shard}"
    which = f" of input {record.input + 1}" if record.input else ""
    return f"the record at offset {record.offset}{which} of {record.shard}"
