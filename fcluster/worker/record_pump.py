"""Processes the records that were read, with the worker's shards.

Responsible for: cutting batches into chunks, processing a chunk record by record, and ending it early if an
event has come, a record fails, or a limit on the epoch is reached. It opens an epoch with the first record
after a barrier. After each chunk, it reports which shards the open epoch has touched.

Invariants:
- Only the main thread processes records, and it does nothing else during one. So a barrier never falls into
  the middle of a record (invariant 11).
- A record that fails ends its chunk. What follows from the failure is decided before the next record.

Must not: decide what follows from a failure; `core` does. Must not know what a step does with a record.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from operator import length_hint
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message

from fcluster.common.clocks import monotonic_ms
from fcluster.common.errors import FormatUnavailable, failure_of
from fcluster.common.failures import Failure, FailureKind, bounded_text
from fcluster.common.ids import ShardId
from fcluster.engine.calling import Call, GoOn
from fcluster.engine.failure import Condemnation, UnkeptStateError
from fcluster.engine.firing import FIRED_AT_ONCE_MAX, TimerStopsError
from fcluster.engine.records import TimerRecord, where_of
from fcluster.engine.state import ShardState
from fcluster.engine.steps import unavailable_format
from fcluster.graph.drift import keep_step
from fcluster.graph.stages import Stage
from fcluster.storage.store import LOCAL_TROUBLE
from fcluster.wire import messages
from fcluster.worker import chunks, format_waits, handler_processes
from fcluster.worker.announcing import announced_steps
from fcluster.worker.calls import ShardCalls, WaitingCalls
from fcluster.worker.chunks import Chunks
from fcluster.worker.consuming import Batch, ReadFailed, ReadUpTo
from fcluster.worker.core import events
from fcluster.worker.core.model import RecordAt
from fcluster.worker.core.state import CoreState
from fcluster.worker.drift import Drift
from fcluster.worker.ending_inputs import end_times
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.idle_inputs import IdleInputs
from fcluster.worker.inbox import Inbox
from fcluster.worker.leader_link import LeaderLink
from fcluster.worker.processing import (
    HandlerError,
    InputRunner,
    OutputPort,
    RecordError,
    ShardRunner,
    UnreadableRecordError,
    describe_record,
)
from fcluster.worker.record_watch import RecordWatch
from fcluster.worker.running_shards import RunningShards
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.table_waits import TableWaits
from fcluster.worker.timers import DueTimers, place_of_timer
from fcluster.worker.transactions import TransactionLostError
from fcluster.worker.watchdog import Watchdog

_log = logging.getLogger("fcluster.worker")

CLOSING_S_MAX = 0.008
CLOSING_SHARE_MAX = 0.25
"""How long windows close in an epoch while the one before it is still on its way into Kafka: so long,
and this share of the time since the epoch began. The longer that takes, the more would close meanwhile,
and the more the next epoch would have to carry, whose other outputs wait for that. So they wait then,
and leave the processor to the commit.
"""
DRIFT_LOOK_MS = 50.0
"""How often it is looked for shards that are too far ahead of others, while there are records."""
FIRED_BEFORE_THE_END_MAX = 1_000
"""A timer that always sets itself again for the present must not keep the job from ending."""
ANNOUNCED_SINGLY = 20
"""If one of many records may end the process: so many are announced one by one, and the others in groups."""
ANNOUNCED_TOGETHER = 100
"""The size of a group. All records of so small a range are announced one by one."""
_RECORD_GONE = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE})
_TOPIC_UNKNOWN = frozenset(
    {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION, KafkaError._UNKNOWN_TOPIC}
)


class _Undecoded(NamedTuple):
    """A record that couldn't be decoded for now, and has left nothing in the open epoch."""

    record: Message
    error: FormatUnavailable


class RecordPump:
    """See the module's docstring. All methods are for the main thread.

    Args:
        shards: the shards that are read.
        pipeline: processes the epochs.
        core_state: the core's state. It is only read.
        feed: passes an event to the core, and carries out the effects at once.
        inbox: its `interrupts` end a chunk.
        link: announces records that may end the process.
        source_checks: notes which topics were read.
        record_watch: knows the record that is being processed.
        watchdog: watches everything except the records.
        hang_bound_s: how long each of those operations may take.
        on_read: called when everything that was read before a reader's report has been processed.

    Attributes:
        records: how many records were processed since the process started.
        drift: who waits for whom. None: the job has no `max_drift`.
    """

    def __init__(
        self,
        shards: RunningShards,
        pipeline: EpochPipeline,
        core_state: CoreState,
        feed: Callable[[events.Event], None],
        inbox: Inbox,
        link: LeaderLink,
        source_checks: SourceChecks,
        record_watch: RecordWatch,
        watchdog: Watchdog,
        hang_bound_s: float,
        on_read: Callable[[], None],
    ) -> None:
        self._shards = shards
        self._pipeline = pipeline
        self._core_state = core_state
        self._feed = feed
        self._interrupts = inbox.interrupts
        self._link = link
        self._source_checks = source_checks
        self._record_watch = record_watch
        self._watchdog = watchdog
        self._hang_bound_s = hang_bound_s
        self._on_read = on_read
        self._chunks = Chunks()
        self._idle_inputs = IdleInputs()
        keeping_step = keep_step(shards.topology)
        self.drift = Drift(keeping_step) if keeping_step else None
        self._drift_looked_ms = 0.0
        self._table_waits = TableWaits()
        self._format_waits = format_waits.FormatWaits()
        self._timers = DueTimers(shards.timed, inbox, record_watch)
        self._timer_announced = False
        self._announced_group: tuple[InputRunner, range] | None = None
        self._has_fired = False
        self._takes_turns = False
        self._paused = False
        self.records = 0

    # --- what comes in ------------------------------------------------------------------------------------

    def add(self, batch: Batch) -> None:
        """Take records that a reader has read."""
        try:
            rest = self._shards.sort_out(batch)
        except FormatUnavailable as error:  # the time of a record isn't known, so neither is its turn
            batch.reader.done()
            reason = f"the time of a record of {self._shards.topology.job!r} isn't known: {error.message}"
            self._feed(events.TransactionFailed(self._core_state.session, reason, abortable=True))
            return
        if rest is batch.messages:
            self._chunks.add(batch)
        elif rest:
            self._chunks.add(dataclasses.replace(batch, messages=rest))
        else:
            batch.reader.done()

    def pass_time(self, now_ms: float) -> None:
        """Leave inputs that have had no records for too long out of event time, end event time where a
        bounded run is read to its end, and open an epoch if that has to be reported, or that global tables
        are read. `now_ms` never goes back.
        """
        if not self._paused and not self._core_state.waits_for_commit():
            self._table_waits.look(self._shards.runners.values(), now_ms)
            self._keep_step(now_ms)
            held = () if self.drift is None else self.drift.held
            shards = self._idle_inputs.look(self._shards.runners.values(), now_ms, held)
            shards |= {runner.shard for runner in self._shards.runners.values() if runner.has_loaded}
            shards |= end_times(self._shards.runners.values())
            shards = self._core_state.running(shards | self._pipeline.untold(now_ms))
            if shards:
                self._feed(events.RecordsProcessed(shards, 0, self._chunks.backlog, None))

    @property
    def table_waits(self) -> list[ShardId]:
        """The shards that wait for global tables."""
        return self._table_waits.shards

    def _keep_step(self, now_ms: float) -> None:
        """Hold shards that are too far ahead of others in event time. Release those that no longer are."""
        if self.drift is None:
            return
        self._drift_looked_ms = now_ms
        read = filter(self._shards.is_read, self._shards.runners.values())
        turn = self.drift.look(read, self._core_state.slowest_elsewhere, now_ms)
        for runner in turn.hold:
            self._shards.set_held(runner, True)
        for runner in turn.release:
            self._shards.set_held(runner, False)

    def add_told(self, told: ReadUpTo) -> None:
        """A reader has reported its positions: it has no more records for now, or it is time for a report."""
        self._shards.note_told(told)
        if not self._chunks.hold(told):
            self._note_read(told)

    def read_failed(self, failure: ReadFailed) -> None:
        """A reader has met an error that continued reading doesn't fix."""
        where = f"{failure.topic}/{failure.partition}"
        if failure.error.code() in _RECORD_GONE:
            # The restore checks what exists: it names the gap, or continues after it if that is allowed.
            reason = f"the next record of {where} is gone ({failure.error.str()})"
            self._feed(events.TransactionFailed(self._core_state.session, reason))
        elif failure.error.code() in _TOPIC_UNKNOWN:
            # This client may not know the topic yet. The coordinator finds out whether it is gone.
            self._link.say_trouble(f"can't read {where}: {failure.error.str()}; asking the brokers again")
        else:
            _log.warning("reading %s: %s", where, failure.error)

    def add_merged(self) -> None:
        """Take the next records of the shards with several inputs."""
        for batch in self._shards.merged(monotonic_ms()):
            self._chunks.add(batch)

    def add_called(self) -> None:
        """Take the next records whose calls are done, and begin with the calls of others."""
        calls = self._shards.calls
        if not calls.shards:
            return
        calls.collect(monotonic_ms())
        if not self._paused:
            self._begin_calls(calls)
            calls.make(monotonic_ms())
        for batch in calls.batches():
            self._chunks.add(batch)

    def _begin_calls(self, calls: WaitingCalls) -> None:
        """Run the steps in front of calls, for about as long as a chunk of records takes."""
        until_s = time.monotonic() + chunks.AIM_S
        calls.has_more = False
        try:
            for name, shard in list(calls.shards.items()):
                calls.shards[name] = calls.shards.pop(name)  # the next turn begins with the others
                while shard.may_begin:
                    self._begin_calls_of(calls, shard)
                    if self._interrupts or time.monotonic() > until_s:
                        calls.has_more = True
                        return
        finally:
            self._record_watch.record = None

    def _begin_calls_of(self, calls: WaitingCalls, shard: ShardCalls) -> None:
        one, message = shard.next_record()
        if shard.is_behind_end(message):
            shard.leave_out()
            return
        if one.calls is None:
            shard.begun(None)
            return
        self._record_watch.record = message

        def begin(record: Message) -> None:
            calls.begin(shard, one.begin_calls(record))

        if message.offset() in one.announced:
            self._run_announced(one, message, begin)
        else:
            begin(message)

    def _run_between_calls(self, one: InputRunner, record: Any, go_on: GoOn) -> Sequence[Call]:
        """Run the steps between two calls of a record, as those in front of the first one."""
        self._record_watch.record = record
        try:
            if record.offset() not in one.announced:
                return go_on()
            following: list[Call] = []
            self._run_announced(one, record, lambda _record: following.extend(go_on()))
            return following
        finally:
            self._record_watch.record = None

    # --- shards -------------------------------------------------------------------------------------------

    def start(self, effect: events.StartReading, stage: Stage, state: ShardState, port: OutputPort) -> None:
        """Process the shard's records starting at its position.

        Args:
            effect: has the position, and what is known about single records.
            stage: the shard's stage.
            state: the state, restored to that position.
            port: takes its outputs.
        """
        job_start = self._core_state.job_start
        runner = ShardRunner(stage, effect.shard.partition, state, effect.position, port, job_start=job_start)
        for number, end in effect.ends.items():
            runner.inputs[number].stop_at = end
        for record in effect.condemned:
            runner.condemn(record)
        stop = effect.stop_record
        if stop is not None:
            runner.inputs[stop.input].stop_before(stop.offset, stop.failure)
        for one, offsets in zip(runner.inputs, effect.announced, strict=False):
            one.announce(offsets, functools.partial(self._run_announced, one))
        for one in runner.inputs:
            if one.calls is not None:
                one.calls.run_between = functools.partial(self._run_between_calls, one)
        self._shards.start(runner)
        suspicious = any(effect.announced)
        self._timers.start(runner, functools.partial(self._announce_timer, runner) if suspicious else None)

    def end(self, end: messages.EndOffset) -> None:
        """A bounded run ends there in an input of a running shard."""
        self._shards.end(end)

    def pause(self, reason: str) -> None:
        """Process and read nothing until `resume`."""
        _log.info("paused: %s", reason)
        self._paused = True
        self._shards.pause()

    def resume(self) -> None:
        """Resume."""
        self._paused = False
        self._shards.resume()

    @property
    def has_work(self) -> bool:
        """Whether there are records that may be processed now, or timers that may fire."""
        return self._may_work and (bool(self._chunks) or (bool(self._shards.timed) and self._may_fire()))

    def _may_fire(self) -> bool:
        """Whether timers are due that may fire now."""
        return self._timers.must_fire() if self._closed_enough else self._timers.are_due()

    @property
    def _closed_enough(self) -> bool:
        """Whether due windows wait for the commit of the epoch in flight."""
        if self._core_state.in_flight is None:
            return False
        return self._pipeline.closing_s > CLOSING_S_MAX + CLOSING_SHARE_MAX * self._pipeline.open_s

    @property
    def _may_work(self) -> bool:
        return not self._paused and not self._core_state.waits_for_commit()

    def wait_s(self, timeout_s: float) -> float:
        """How long the main thread may wait for events: 0 if there is work, otherwise at most `timeout_s`."""
        if self.has_work:
            return 0.0
        wait_s = self._shards.until_merged_s(timeout_s, monotonic_ms())
        if self._shards.calls.shards and not self._paused:
            wait_s = self._shards.calls.wait_s(wait_s, monotonic_ms())
        if self._shards.timed and self._may_work:
            wait_s = self._timers.wait_s(wait_s)
            if self._closed_enough and self._timers.are_due():
                wait_s = min(wait_s, chunks.AIM_S)  # by then, some may close again
        return wait_s

    # --- chunks -------------------------------------------------------------------------------------------

    def run_chunk(self) -> None:
        """Fire the timers that are due, otherwise process the next records. There has to be work.

        Windows that are due and records take turns. Batches may be small, so a turn of records has as many
        as fit into its time: otherwise they would queue up.
        """
        self._takes_turns = bool(self._shards.timed) and self._timers.are_due()
        if self._takes_turns and self._fires_next():
            self._has_fired = True
            self._fire(self._timers.due(must_fire=self._closed_enough), chunks.AIM_S)
            return
        self._has_fired = False
        if self.drift is not None and (now_ms := monotonic_ms()) - self._drift_looked_ms >= DRIFT_LOOK_MS:
            self._keep_step(now_ms)
        ends_s = time.monotonic() + chunks.AIM_S
        while True:
            self._run_chunk()
            for told in self._chunks.reached():
                self._note_read(told)
            if not (self._takes_turns and self._may_go_on) or _is_past(ends_s):
                return

    @property
    def _may_go_on(self) -> bool:
        """Whether a turn of records may go on with the next batch."""
        is_free = self._may_work and bool(self._chunks) and not self._interrupts
        return is_free and bool(self._shards.timed) and not self._timers.must_fire()

    @property
    def _has_backlog(self) -> bool:
        """Whether epochs should become longer. What came during a turn of windows is no backlog, however many
        batches it is, if the next turn of records is enough for it.
        """
        return self._chunks.waiting_s > chunks.BACKLOG_S if self._takes_turns else self._chunks.backlog

    def _fires_next(self) -> bool:
        if self._closed_enough:
            return self._timers.must_fire()
        return not self._has_fired or not self._chunks or self._timers.must_fire()

    def fire_due(self) -> None:
        """Fire the timers that are due, before the shards stop for good. Later timers stay set."""
        for _ in range(FIRED_BEFORE_THE_END_MAX):
            if not (self._shards.timed and self._may_work and self._timers.are_due()):
                return
            self._fire(self._timers.due(), math.inf)

    def _fire(self, due: Sequence[ShardRunner], turn_s: float) -> None:
        """Fire some of the due timers of each of these shards, for about this time in all."""
        if not self._pipeline.is_open:
            return
        began_s = time.monotonic()
        for number, runner in enumerate(due, start=1):
            if not self._may_work or runner.shard not in self._shards.timed:
                return
            assert runner.timers is not None
            records_max = self._core_state.pieces.records_max
            room = FIRED_AT_ONCE_MAX
            if records_max is not None:
                room = records_max - self._core_state.open.records
            ends_s = began_s + turn_s * number / len(due)
            is_over = functools.partial(_is_past, ends_s)
            failure = self._run(runner, functools.partial(runner.timers.fire_due, room, is_over))
            shards, fired = self._timers.take_fired()
            if fired:
                self._pipeline.count(fired)
                newest = self._timers.newest(runner.shard) if records_max is not None else None
                self._feed(events.RecordsProcessed(shards, fired, self._has_backlog, newest))
            if failure is not None:
                with self._watchdog.bounded(f"handling {type(failure).__name__}", self._hang_bound_s):
                    self._feed(failure)
                return
        self._pipeline.note_closing(time.monotonic() - began_s)
        with self._watchdog.bounded("serving delivery reports", self._hang_bound_s):
            self.hold_back()

    def _run(self, runner: ShardRunner, fire: Callable[[], object]) -> events.Event | None:
        """Fire timers of a shard. Returns what failed."""
        try:
            if not self._pipeline.has_begun:
                self._pipeline.begin()
            fire()
        except Exception as error:  # noqa: BLE001  unexpected ones are raised again
            return self._failure(error, runner.inputs[0], self._record_watch.record)
        finally:
            self._record_watch.record = None
            self._end_announced()
        return None

    def _run_chunk(self) -> None:
        if not self._pipeline.is_open or not self._shards.any_read:
            self._chunks.drop_batch()
            return
        batch, chunk = self._chunks.take()
        started_s = time.monotonic()
        left = self._process(chunk, batch)
        self._chunks.done(left, time.monotonic() - started_s)
        if not self._chunks:
            self._end_announced_group()  # a kill while nothing is to be done is no record's fault
        with self._watchdog.bounded("serving delivery reports", self._hang_bound_s):
            self.hold_back()

    def hold_back(self) -> None:
        """Serve delivery reports, and wait if outputs are produced faster than Kafka accepts them."""
        lost = self._pipeline.hold_back(self._has_backlog)
        if lost is not None:
            self._feed(lost)

    def _note_read(self, told: ReadUpTo) -> None:
        self._shards.note_read(told)
        self._on_read()

    def _process(self, chunk: Sequence[Message], batch: Batch) -> int:
        """Process a chunk. Returns how many of its last records are left because something else had to be
        done.
        """
        current = chunk
        records_max = self._core_state.pieces.records_max
        if records_max is not None or batch.generation < batch.reader.newest_generation:
            current = self._shards.current(chunk, batch)
        if self._shards.timed:
            self._timers.limit(records_max)
        remaining = iter(current)
        waiting = len(current)
        while True:
            if records_max is None:
                failure = self._run_records(remaining)
            else:
                room = records_max - self._core_state.open.records
                failure = self._run_records(islice(remaining, room))
            left = length_hint(remaining)
            if isinstance(failure, _Undecoded):
                left += 1  # that record is tried again
            processed, waiting = waiting - left, left
            self.records += processed
            touched = [one for one in self._shards.inputs if one.last is not None]
            dirty = frozenset(one.shard for one in touched)
            if self._shards.timed:
                timed, fired = self._timers.take_fired()
                dirty |= timed
                processed += fired
            self._pipeline.count(processed)
            for one in touched:
                self._source_checks.read(one.topic, one.partition, one.topic_id)
            if dirty:
                backlog = batch.full or self._has_backlog
                newest = None
                if records_max is not None and len(dirty) == 1:
                    newest = self._shards.runners[next(iter(dirty))].newest()
                self._feed(events.RecordsProcessed(dirty, processed, backlog, newest))
            if isinstance(failure, _Undecoded):
                self._format_waits.note(failure.record, failure.error, monotonic_ms())
                return _left_of(chunk, failure.record)
            if failure is None:
                return left if current is chunk or not left else _left_of(chunk, next(remaining))
            with self._watchdog.bounded(f"handling {type(failure).__name__}", self._hang_bound_s):
                self._feed(failure)
            if not isinstance(failure, events.StopRecordReached):
                return 0  # everything since the last commit will be processed again
            if records_max is not None:
                # Records of the stopped shard aren't part of the piece: they are left out next time.
                return _left_of(chunk, next(remaining)) if left else 0

    def _run_records(self, records: Iterator[Message]) -> events.Event | _Undecoded | None:
        """Process records until there are no more, one fails, or something else happens.

        Returns:
            What failed.
        """
        routes = self._shards.routes
        interrupts, watch = self._interrupts, self._record_watch
        message: Any = None
        runner: Any = None  # the runner of `message`
        try:
            if not self._pipeline.has_begun:
                self._pipeline.begin()
            for message in records:
                runner = routes[message.topic()].get(message.partition())
                if runner is not None:
                    watch.record = message
                    runner.handle(message)
                    runner.last = message
                if interrupts:
                    break
        except Exception as error:  # noqa: BLE001  unexpected ones are raised again
            unavailable = unavailable_format(error)
            if unavailable is not None and _can_stay(error, runner):
                return _Undecoded(message, unavailable)
            return self._failure(error, runner, watch.record or message)
        finally:
            watch.record = None
            self._end_announced()
        return None

    def _failure(self, error: Exception, runner: Any, record: Any) -> events.Event:
        """The failure, when an exception was raised by a record or a timer.

        Args:
            runner: the input's runner. None: no record had begun.
            record: the record that was being processed, or the timer that was being called.
        """
        session = self._core_state.session
        unavailable = unavailable_format(error)
        if unavailable is not None:
            return events.TransactionFailed(session, format_waits.why(record, unavailable), abortable=True)
        match error:
            case UnreadableRecordError():
                at = _place_of(runner, record)
                return events.StopRecordReached(session, at.shard, at.offset, error.failure, at.input)
            case HandlerError():
                at = _place_of(runner, record)
                return events.HandlerFailed(
                    session, at.shard, at.offset, error.failure, error.condemnation, at.input
                )
            case UnkeptStateError():
                return events.EpochFailed(session, error.condemnation, self._only_record(runner, record))
            case TransactionLostError():
                return self._pipeline.lost(session, error, self._only_record(runner, record))
            case _ if isinstance(error, LOCAL_TROUBLE):
                return events.WorkerBroken(failure_of(error, FailureKind.HOST))
            case KafkaException() | RecordError():
                at = _place_of(runner, record)
                failure = Failure.of_record(
                    f"can't write an output of {describe_record(record)}: {error}", where=where_of(record)
                )
                condemnation = Condemnation(failure, step=at.timer) if at.timer else None
                return events.HandlerFailed(session, at.shard, at.offset, failure, condemnation, at.input)
            case _:
                raise error

    def _only_record(self, runner: Any, message: Any) -> RecordAt | None:
        """The current record, if the open epoch can't contain another one."""
        core_state = self._core_state
        if runner is None or core_state.pieces.records_max != 1 or core_state.open.records:
            return None
        return _place_of(runner, message)

    # --- records that may end the process -----------------------------------------------------------------

    def _run_announced(self, one: InputRunner, record: Message, handle: Callable[[Message], None]) -> None:
        """Process a record that may end the process. It is announced to the coordinator first. If it is the
        only one that may do so, so is each step before it begins. If there are many, most of them are
        announced in groups, because each announcement takes a few milliseconds, or fifty on a busy host.
        """
        offsets, offset = one.announced, record.offset() or 0
        behind = offset - offsets.start - ANNOUNCED_SINGLY
        if behind >= 0 and len(offsets) > ANNOUNCED_TOGETHER:
            self._announce_group(one, behind // ANNOUNCED_TOGETHER, record)
            handle(record)
            return
        announce = functools.partial(self._announce, one, record)
        announce("")  # decoding it may end the process too
        try:
            with announced_steps(announce) if len(offsets) == 1 else nullcontext():
                handle(record)
        finally:
            self._link.send(messages.RecordEnded(self._core_state.session))

    def _announce_group(self, one: InputRunner, group: int, record: Message) -> None:
        """Announce this group of records, unless that was the last announcement."""
        start = one.announced.start + ANNOUNCED_SINGLY + group * ANNOUNCED_TOGETHER
        offsets = range(start, min(start + ANNOUNCED_TOGETHER, one.announced.stop))
        if self._announced_group != (one, offsets):
            self._announce(one, record, "", offsets)

    def _end_announced_group(self) -> None:
        """The process has survived what there was of the group."""
        if self._announced_group is not None:
            self._announced_group = None
            self._link.send(messages.RecordEnded(self._core_state.session))

    def _announce_timer(self, runner: ShardRunner, timer: TimerRecord) -> None:
        self._timer_announced = True
        self._announce(runner.inputs[0], timer, timer.title)

    def _end_announced(self) -> None:
        if self._timer_announced:
            self._timer_announced = False
            self._link.send(messages.RecordEnded(self._core_state.session))

    def _announce(
        self, one: InputRunner, record: Message | TimerRecord, step: str, group: range | None = None
    ) -> None:
        """Announce a step of this record, or the group of records at these offsets, of which it is one."""
        if handler_processes.is_forked:
            return
        self._announced_group = None if group is None else (one, group)
        self._link.announce(
            messages.RecordBegun(
                self._core_state.session,
                one.shard,
                (record.offset() or 0) if group is None else group.start,
                bounded_text(step, 1_000),
                describe_record(record),
                one.number,
                1 if group is None else len(group),
            )
        )


def _can_stay(error: BaseException, runner: Any) -> bool:
    """Whether the open epoch can be committed before the record that has raised `error` is tried again. Its
    calls, and its turn among the records of other inputs, have to be found out again as well.
    """
    is_whole = isinstance(error, UnreadableRecordError) and not isinstance(error, TimerStopsError)
    return is_whole and len(runner.stage.inputs) == 1 and runner.calls is None


def _is_past(time_s: float) -> bool:
    return time.monotonic() >= time_s


def _left_of(chunk: Sequence[Message], first: Message) -> int:
    """How many records of the chunk are left, including `first`."""
    return next(len(chunk) - index for index, message in enumerate(chunk) if message is first)


def _place_of(runner: Any, message: Any) -> RecordAt:
    if isinstance(message, TimerRecord):
        return place_of_timer(runner.shard, message)
    return RecordAt(runner.shard, message.offset(), runner.number)
