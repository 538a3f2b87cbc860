"""The worker's protocol: sessions, shards and epochs, without any I/O.

Responsible for: what a worker does when something happened. `WorkerCore.handle(event, now_ms)` takes one
event (a message came, an epoch was flushed, a restore ended) and returns the effects that the shell in
`worker/server.py` carries out, in order, feeding their results back as events.

Invariants kept here:

- One session, one initialisation of the producers. Whatever goes wrong with a transaction (an abort, a
  fence, an outcome that is unknown) ends in `_reset`: both producers are destroyed, the memory layers
  dropped, and the worker asks for a new session. The committed offsets then decide what is true; nothing
  is guessed.
- An epoch is committed only on a `Complete` of the running session and of no older term.
- At most one epoch is in flight (frozen, not yet committed), and one open behind it. The open one
  commits after the one in flight, since a barrier waits for it.
- A shard is given back only when all it has processed is committed.
- A worker that is to leave works on until its shards have moved elsewhere. It stays resolved to leave,
  whatever happens to its session, its connection or its coordinator, and goes within a bound of time.

Must not: read a clock, touch a socket, Kafka, RocksDB or a thread. Records don't pass through here; the
shell reports once a batch which shards they dirtied.
"""

from __future__ import annotations

from collections.abc import Iterable

from fcluster.common import messages
from fcluster.common.ids import ShardId
from fcluster.common.messages import ShardStatus
from fcluster.common.positions import CommittedPosition
from fcluster.worker import events
from fcluster.worker.events import Effect, Event
from fcluster.worker.model import (
    EXIT_DRAINED,
    EXIT_JOB_FAILED,
    EXIT_MISTAKE,
    Bounds,
    EpochPhase,
    Identity,
    InFlight,
    OpenEpoch,
    OwnedShard,
    Phase,
    ShardPhase,
    StopRecord,
)

LEAVING_REPEATED_MS = 1_000


class WorkerCore:
    """One worker's protocol state; see the module's docstring for the rules it keeps."""

    def __init__(self, identity: Identity, bounds: Bounds, now_ms: int) -> None:
        self.identity = identity
        self.bounds = bounds
        self.phase = Phase.JOINING
        self.term = 0
        self.session = 0
        self._order = (0, 0)
        self._released_number = 0
        self.slot = identity.wanted_slot
        self.epoch_seen = 0
        self.shards: dict[ShardId, OwnedShard] = {}
        self.standbys: set[ShardId] = set()
        self.open = OpenEpoch()
        self.in_flight: InFlight | None = None
        self.stop_records: dict[ShardId, StopRecord] = {}
        self.producers_ready = False
        self.paused = False
        self.backlog = False
        self.connected = False
        self.leaving = False
        self.drained = False
        """An operator wants it gone for good."""
        self._leave_by_ms = 0
        self._leaving_since_ms = 0
        self._leaving_said_ms = 0
        self._heard_ms = now_ms
        self._hello_sent_ms = now_ms - bounds.hello_retry_ms
        self._refreshed_ms = now_ms
        self._now_ms = now_ms
        self._effects: list[Effect] = []

    # --- the one entrance -----------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        """What to do about `event`, in order. `now_ms` is a clock that never goes back."""
        self._now_ms = now_ms
        self._effects = []
        if self.phase is not Phase.STOPPED:
            self._dispatch(event)
        return self._effects

    def _dispatch(self, event: Event) -> None:
        match event:
            case events.RecordsProcessed():
                self._on_records_processed(event)
            case events.MessageReceived():
                self._on_message(event.message)
            case events.EpochFlushed():
                self._on_epoch_flushed(event)
            case events.EpochCommitted():
                self._on_epoch_committed(event)
            case events.Tick():
                self._on_tick()
            case events.Connected():
                self._on_connected()
            case events.ProducersOpened():
                self._on_producers_opened(event)
            case events.ShardRestored():
                self._on_shard_restored(event)
            case events.RestoreFailed():
                self._on_restore_failed(event)
            case events.TransactionFailed():
                self._on_transaction_failed(event)
            case events.HandlerFailed():
                self._on_handler_failed(event)
            case events.StopRecordReached():
                self._on_stop_record_reached(event)
            case events.JobBroken():
                self._on_job_broken(event)
            case events.WorkerBroken():
                # Without a word: the session ends with the connection, and others take the shards.
                self._stop(EXIT_MISTAKE, event.reason)
            case events.TerminationRequested():
                self._on_termination_requested()

    def invariants(self) -> None:
        """Assert what must hold after every event (tests and the simulation call it).

        Raises:
            AssertionError: something does not.
        """
        owned = set(self.shards)
        assert self.open.shards <= owned, f"open epoch holds {self.open.shards - owned}, which are not owned"
        if self.in_flight is not None:
            assert self.in_flight.epoch <= self.epoch_seen
            assert self.in_flight.shards <= owned, "a shard was given up before its epoch was committed"
            assert self.producers_ready, "an epoch in flight without producers"
        assert not self.standbys & owned, f"copies of its own shards: {self.standbys & owned}"
        if self.phase is Phase.JOINING:
            assert not self.standbys, "copies while joining"
            assert self.session == 0, "a session while joining"
            assert not self.shards, "shards while joining"
            assert self.in_flight is None, "an epoch in flight while joining"
            assert not self.open.dirty, "uncommitted records while joining"
        if self.open.dirty:
            assert self.producers_ready, "records were processed without producers"
        for shard, owned_shard in self.shards.items():
            waiting = owned_shard.phase is ShardPhase.RESTORING
            assert owned_shard.restoring or not waiting, f"nobody restores {shard}"
            if not owned_shard.restoring:
                assert owned_shard.position is not None, f"{shard} runs without a position"

    # --- connection and session -----------------------------------------------------------------------

    def _on_connected(self) -> None:
        self.connected = True
        self._heard_ms = self._now_ms
        self._say_hello()

    def _say_hello(self) -> None:
        self._hello_sent_ms = self._now_ms
        prepared = self.in_flight if self.in_flight and self.in_flight.phase is EpochPhase.PREPARED else None
        self._send(
            messages.Hello(
                worker=self.identity.worker,
                host=self.identity.host,
                pid=self.identity.pid,
                slot=self.slot,
                session=self.session,
                owned=sorted(self.shards),
                epoch=self.epoch_seen,
                prepared_epoch=prepared.epoch if prepared else 0,
                dirty=self.open.dirty,
                topology=self.identity.topology,
                snapshot_store=self.identity.snapshot_store,
                version=self.identity.version,
                in_flight_epoch=self.in_flight.epoch if self.in_flight else 0,
                process_space=self.identity.process_space,
                leaving=self.leaving,
                term=self.term,
                draining=self.phase in (Phase.DRAINING, Phase.DRAINED) and not self.leaving,
            )
        )

    def _on_message(self, message: messages.FromCoordinator) -> None:
        if not isinstance(message, messages.ToWorker):
            return
        if message.term < self.term:
            name = type(message).__name__
            self._log("warning", f"refused {name} of term {message.term}, now is {self.term}")
            return
        self.term = message.term
        self._heard_ms = self._now_ms
        if isinstance(message, messages.Welcome):
            self._on_welcome(message)
        elif isinstance(message, messages.Refused):
            self._on_refused(message)
        elif isinstance(message, messages.Shutdown):
            self._on_shutdown(message)
        elif message.session == self.session != 0:
            self._on_session_message(message)
        self._resume_if_possible()

    def _on_session_message(self, message: messages.ToWorker) -> None:
        match message:
            case messages.Barrier():
                self._on_barrier(message)
            case messages.Complete():
                self._on_complete(message)
            case messages.Assign() if self._is_new(message):
                self._on_assign(message)
            case messages.Revoke() if self._is_new(message):
                self._on_revoke(message)
            case messages.Standby():
                self._keep_standbys(set(message.shards) - set(self.shards))
            case messages.Drain():
                self._drain()
            case messages.Leave():
                self.drained = True
                self._begin_to_leave()
            case messages.Dismiss():
                self._leave_at_once()
            case messages.Evicted():
                self._log("warning", f"session {self.session} was ended by the coordinator; joining anew")
                self._reset()
            case _:
                pass  # HeartbeatAck: that it came is all it says

    def _on_welcome(self, message: messages.Welcome) -> None:
        if message.adopted:
            if message.session == self.session:
                self._log("info", f"adopted by the coordinator of term {message.term}")
                self.open.reported = False
                self._report_dirty()
                self._report_stop_records()
            return
        if self.phase is not Phase.JOINING:
            return  # an answer to a Hello that was sent twice
        self.session = message.session
        self.slot = message.slot
        self.epoch_seen = max(self.epoch_seen, message.epoch)
        self.phase = Phase.STARTING
        self._log("info", f"joined as slot {message.slot}, session {message.session}, term {message.term}")
        self._effects.append(events.OpenProducers(message.session, message.slot))

    def _on_refused(self, message: messages.Refused) -> None:
        if self.phase is not Phase.JOINING:
            return
        if message.retry:
            self._log("info", f"not admitted yet: {message.reason}")
        else:
            self._stop(EXIT_MISTAKE, f"refused by the coordinator: {message.reason}")

    def _on_shutdown(self, message: messages.Shutdown) -> None:
        if message.session not in (0, self.session):
            return
        self._stop(EXIT_JOB_FAILED if message.failed else 0, message.reason)

    def _on_producers_opened(self, event: events.ProducersOpened) -> None:
        if event.session != self.session or self.phase is not Phase.STARTING:
            return
        self.producers_ready = True
        self.phase = Phase.ACTIVE
        self._run([shard for shard, owned in self.shards.items() if owned.phase is ShardPhase.RESTORED])

    def _on_transaction_failed(self, event: events.TransactionFailed) -> None:
        if event.session != self.session:
            self._log("info", f"of session {event.session}, which is over: {event.reason}")
        elif self.session:
            self._log("warning", f"{event.reason}; replaying from the committed offsets")
            self._reset()

    def _reset(self) -> None:
        """Forget everything uncommitted and ask for a new session: the one way back from any failure."""
        self._effects.append(events.StopReading(tuple(self.shards)))
        self._effects.append(events.DropLayers())
        self._effects.append(events.DestroyProducers())
        self._keep_standbys(set())
        self.producers_ready = False
        self.shards.clear()
        self.open = OpenEpoch()
        self.in_flight = None
        self.session, self._order, self._released_number = 0, (0, 0), 0
        self.phase = Phase.JOINING
        if self.leaving:
            self._stop(self._exit_code, "asked to leave")
        elif self.connected:
            self._say_hello()

    # --- shards ---------------------------------------------------------------------------------------

    @property
    def orders_heard(self) -> int:
        """The number of the last order in this session and term."""
        term, number = self._order
        return number if term == self.term else 0

    def _is_new(self, order: messages.Assign | messages.Revoke) -> bool:
        """Whether it isn't one that came once more. What it is about may belong to somebody else by now."""
        if (order.term, order.number) <= self._order:
            return False
        self._order = (order.term, order.number)
        return True

    def _on_assign(self, message: messages.Assign) -> None:
        if self.phase in (Phase.DRAINING, Phase.DRAINED):
            return
        new = tuple(sorted(shard for shard in message.shards if shard not in self.shards))
        for shard in new:
            self.shards[shard] = OwnedShard(ShardPhase.RESTORING, restoring=True)
        self.standbys -= set(new)
        if new:
            self._effects.append(events.RestoreShards(self.session, new))

    def _keep_standbys(self, wanted: set[ShardId]) -> None:
        if wanted != self.standbys:
            self.standbys = wanted
            self._effects.append(events.KeepStandbys(tuple(sorted(wanted))))

    def _on_shard_restored(self, event: events.ShardRestored) -> None:
        owned = self.shards.get(event.shard)
        if event.session != self.session or owned is None or not owned.restoring:
            return
        owned.restoring = False
        owned.position = event.position
        if owned.phase is ShardPhase.RELEASING:
            self._release()
            return
        owned.phase = ShardPhase.RESTORED
        self.epoch_seen = max(self.epoch_seen, event.position.epoch)
        if self.producers_ready:
            self._run([event.shard])

    def _run(self, shards: Iterable[ShardId]) -> None:
        started: list[ShardStatus] = []
        for shard in shards:
            owned = self.shards[shard]
            assert owned.position is not None
            owned.phase = ShardPhase.RUNNING
            started.append(_status(shard, owned.position))
            if self.phase is Phase.ACTIVE:
                self._effects.append(events.StartReading(shard, owned.position, self.stop_records.get(shard)))
        if started:
            self._send(messages.ShardsRunning(self.session, started))

    def _on_restore_failed(self, event: events.RestoreFailed) -> None:
        if event.session != self.session:
            return
        if event.fatal:
            self._send(messages.WorkerFailed(self.session, event.reason))
        else:
            self._log("warning", f"{event.reason}; trying anew")
            self._reset()

    def _on_revoke(self, message: messages.Revoke) -> None:
        revoked = [shard for shard in message.shards if shard in self.shards]
        self._effects.append(events.StopReading(tuple(revoked)))
        for shard in revoked:
            self.shards[shard].phase = ShardPhase.RELEASING
        # A shard that isn't ours (any more) is answered as well: the coordinator waits for the word.
        self._release(foreign=[shard for shard in message.shards if shard not in self.shards])

    def _release(self, foreign: Iterable[ShardId] = ()) -> None:
        """Let go of the revoked shards that have nothing left to commit.

        A restore that is under way has to end first: it would take the next owner's deltas for damage, and
        its late answer for the one of a second restore, if the shard came back meanwhile.
        """
        free = [
            shard
            for shard, owned in self.shards.items()
            if owned.phase is ShardPhase.RELEASING and not owned.restoring and not self._uncommitted(shard)
        ]
        for shard in free:
            del self.shards[shard]
        if free:
            self._effects.append(events.CloseShards(tuple(free)))
        released = [*free, *foreign]
        if released:
            self._released_number += 1
            self._send(messages.Released(self.session, released, self._released_number))
        self._leave_if_empty()

    def _uncommitted(self, shard: ShardId) -> bool:
        return shard in self.open.shards or (self.in_flight is not None and shard in self.in_flight.shards)

    # --- epochs ---------------------------------------------------------------------------------------

    def _on_records_processed(self, event: events.RecordsProcessed) -> None:
        if not self.open.dirty:
            self.open.opened_ms = self._now_ms
        self.open.shards |= event.shards
        self.open.records += event.records
        self.backlog = event.backlog
        self._report_dirty()
        if self.open.records >= self.bounds.epoch_records_max:
            self._pause(f"the open epoch holds {self.open.records} records")

    def _report_dirty(self) -> None:
        if self.open.dirty and not self.open.reported and self.session:
            self.open.reported = True
            self._send(messages.Dirty(self.session, self.backlog))

    def _on_barrier(self, message: messages.Barrier) -> None:
        if message.epoch <= self.epoch_seen or self.in_flight is not None or not self.producers_ready:
            return  # a repeated message
        self.epoch_seen = message.epoch
        if not self.open.dirty:
            self._send(messages.Prepared(self.session, message.epoch, 0, 0.0, False))
            return
        self.in_flight = InFlight(message.epoch, EpochPhase.PREPARING, frozenset(self.open.shards))
        self.open = OpenEpoch()
        self._effects.append(events.PrepareEpoch(self.session, message.epoch, self.in_flight.shards))

    def _on_epoch_flushed(self, event: events.EpochFlushed) -> None:
        flight = self._flight(event.session, event.epoch, EpochPhase.PREPARING)
        if flight is None:
            return
        flight.phase = EpochPhase.PREPARED
        self._send(
            messages.Prepared(self.session, event.epoch, event.records, event.prepare_ms, self.backlog)
        )

    def _on_complete(self, message: messages.Complete) -> None:
        if self.in_flight is None:
            # An epoch in which this worker had nothing, or the repetition of one that is committed already.
            self._send(messages.Committed(self.session, message.epoch, 0.0, self.open.dirty, []))
            return
        flight = self._flight(message.session, message.epoch, EpochPhase.PREPARED)
        if flight is not None:
            flight.phase = EpochPhase.COMMITTING
            self._effects.append(events.CommitEpoch(self.session, message.epoch))

    def _on_epoch_committed(self, event: events.EpochCommitted) -> None:
        if self._flight(event.session, event.epoch, EpochPhase.COMMITTING) is None:
            return
        self.in_flight = None
        for shard, position in event.positions.items():
            self.shards[shard].position = position
        self._send(
            messages.Committed(
                self.session,
                event.epoch,
                event.commit_ms,
                self.open.dirty,
                [_status(shard, position) for shard, position in event.positions.items()],
            )
        )
        self._release()
        self._report_stop_records()
        self._finish_drain()

    def _flight(self, session: int, epoch: int, phase: EpochPhase) -> InFlight | None:
        """The epoch in flight, if it is the one that is spoken of and stands in `phase`."""
        flight = self.in_flight
        if session != self.session or flight is None or flight.epoch != epoch or flight.phase is not phase:
            return None
        return flight

    # --- records that can't be processed --------------------------------------------------------------

    def _on_handler_failed(self, event: events.HandlerFailed) -> None:
        """The open epoch holds half a record: abort it, replay, and stop before that record."""
        if event.session != self.session:
            return
        self.stop_records[event.shard] = StopRecord(event.offset, event.reason)
        self._log("error", event.reason)
        self._reset()

    def _on_stop_record_reached(self, event: events.StopRecordReached) -> None:
        owned = self.shards.get(event.shard)
        if event.session != self.session or owned is None or owned.phase is not ShardPhase.RUNNING:
            return
        self.stop_records[event.shard] = StopRecord(event.offset, event.reason)
        owned.phase = ShardPhase.BLOCKED
        self._effects.append(events.StopReading((event.shard,)))
        self._report_stop_records()

    def _report_stop_records(self) -> None:
        """Fail the job once everything before the record is committed."""
        for shard, owned in self.shards.items():
            if owned.phase is ShardPhase.BLOCKED and not self._uncommitted(shard):
                self._send(messages.WorkerFailed(self.session, self.stop_records[shard].reason))

    def _on_job_broken(self, event: events.JobBroken) -> None:
        if event.session != self.session:
            return  # a former session's trouble, in the midst of being torn down
        self._log("error", event.reason)
        self._send(messages.WorkerFailed(self.session, event.reason))

    # --- the end --------------------------------------------------------------------------------------

    def _drain(self) -> None:
        if self.phase in (Phase.STARTING, Phase.ACTIVE):
            self.phase = Phase.DRAINING
            self._effects.append(events.StopReading(tuple(self.shards)))
        self._finish_drain()

    def _finish_drain(self) -> None:
        if self.phase is Phase.DRAINING and not self.open.dirty and self.in_flight is None:
            self.phase = Phase.DRAINED
        if self.phase is Phase.DRAINED:
            self._send(messages.Drained(self.session))
            if self.leaving:
                self._leave()

    def _on_termination_requested(self) -> None:
        if self.session == 0 or (self.leaving and self.phase in (Phase.DRAINING, Phase.DRAINED)):
            # What isn't committed is going to be processed anew by somebody else.
            self._stop(self._exit_code, "asked to leave")
        elif self.leaving:
            self._leave_at_once()
        else:
            self._begin_to_leave()

    def _begin_to_leave(self) -> None:
        """Work on until the shards have moved away."""
        if not self.leaving:
            self.leaving, self._leaving_since_ms = True, self._now_ms
            self._leave_by_ms = self._now_ms + self.bounds.leave_timeout_ms
            self._log("info", f"leaving: {len(self.shards)} shards are to move away first")
        if self.phase in (Phase.STARTING, Phase.ACTIVE):
            self._say_leaving()
            self._leave_if_empty()
        else:
            self._finish_drain()  # the whole job drains

    def _say_leaving(self) -> None:
        self._leaving_said_ms = self._now_ms
        self._send(messages.Leaving(self.session))

    def _leave_if_empty(self) -> None:
        active = self.phase in (Phase.STARTING, Phase.ACTIVE)
        if self.leaving and active and not self.shards and self.in_flight is None:
            self._leave()

    def _leave_at_once(self) -> None:
        """Commit what is processed, then go: nobody can take the shards, or there is no time to wait."""
        if not self.leaving:
            self.leaving, self._leaving_since_ms = True, self._now_ms
        self._leave_by_ms = self._now_ms + self.bounds.last_commit_timeout_ms
        self._drain()

    def _follow_leaving(self) -> None:
        overdue = self._now_ms >= self._leave_by_ms
        if self._now_ms - max(self._heard_ms, self._leaving_since_ms) >= self.bounds.leader_patience_ms:
            self._log("warning", "leaving without a last commit: there is no coordinator")
            self._stop(self._exit_code, "asked to leave")
        elif self.phase not in (Phase.STARTING, Phase.ACTIVE):
            if overdue:
                self._log("warning", "leaving without a last commit: it wasn't declared complete in time")
                self._stop(self._exit_code, "asked to leave")
        elif overdue:
            self._log("warning", f"{len(self.shards)} shards have not moved away in time; leaving now")
            self._leave_at_once()
        elif self._now_ms - self._leaving_said_ms >= LEAVING_REPEATED_MS:
            self._say_leaving()

    def _leave(self) -> None:
        self._send(messages.Goodbye(self.session))
        self._stop(self._exit_code, "asked to leave")

    @property
    def _exit_code(self) -> int:
        return EXIT_DRAINED if self.drained else 0

    def _stop(self, code: int, reason: str) -> None:
        self.phase = Phase.STOPPED
        self._effects.append(events.StopReading(tuple(self.shards)))
        self._effects.append(events.Exit(code, reason))

    # --- time -----------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        hello_age_ms = self._now_ms - self._hello_sent_ms
        if self.phase is Phase.JOINING and self.connected and hello_age_ms >= self.bounds.hello_retry_ms:
            self._say_hello()
        if self._now_ms - self._heard_ms >= self.bounds.coordinator_loss_ms and self.open.dirty:
            self._pause("the coordinator has not been heard of")
        if self._now_ms - self._refreshed_ms >= self.bounds.offset_refresh_ms and self.phase is Phase.ACTIVE:
            self._refresh_offsets()
        if self.leaving:
            self._follow_leaving()

    def _refresh_offsets(self) -> None:
        """Commit the offsets of idle shards anew, so that the group's offset retention never expires them."""
        self._refreshed_ms = self._now_ms
        idle = {
            shard
            for shard, owned in self.shards.items()
            if owned.phase is ShardPhase.RUNNING and owned.position is not None and owned.position.epoch > 0
        }
        self.open.shards |= idle
        self._report_dirty()

    def _pause(self, reason: str) -> None:
        if not self.paused:
            self.paused = True
            self._effects.append(events.PauseReading(reason))

    def _resume_if_possible(self) -> None:
        if self.paused and self.open.records < self.bounds.epoch_records_max:
            self.paused = False
            self._effects.append(events.ResumeReading())

    def _send(self, message: messages.FromWorker) -> None:
        self._effects.append(events.Send(message))

    def _log(self, level: str, text: str) -> None:
        self._effects.append(events.Log(level, text))


def _status(shard: ShardId, position: CommittedPosition) -> ShardStatus:
    """A shard's standing as the core knows it: what is committed. The shell's heartbeats tell the rest."""
    return ShardStatus(shard, position.offset, position.offset, -1, False, position.epoch)
