"""Fires a shard's timers when they are due. A window that closes is such a timer.

Responsible for: `TimerRunner`, which knows when the shard's next timers are due, calls their functions, and
handles their failures.

Invariants:
- A shard processes no record while a handler's event-time timer is due. Which timers fire depends on what the
  shard has read, and in which order. It doesn't depend on batches, or on where barriers fell.
- Windows that are due may wait: records that follow can't change what is in them, since event time alone
  says what is late. So a million of them don't keep records waiting. Their results still have one order. The
  same holds for results that windows pass on at intervals: records that come meanwhile don't change what is
  in them (`interval_notes`). In a stage whose handlers set timers they don't wait, because a handler behind
  them could see the difference. Nor do they in a stage with counted windows at intervals, which are closed
  by records.
- When event time has ended (a bounded run), all event-time timers and all windows are due, also those in
  processing time. They fire in the usual order, and event time follows those that go by it. A timer's
  function can't set another one in event time then: one that sets itself again would never come to an end.
- Due timers fire in the order of time, then of the key's bytes, then of the name, then of the handlers in the
  job. Timers that are set in the meantime are put into that order. One that a timer sets for no later than
  its own time waits until the clock moves on. So whatever timers do, those that are due come to an end, and
  the next record is processed.
- In a stage with copies of global tables, timers wait like records until the copies are loaded: what comes of
  them may be joined. They count as due meanwhile, so event time doesn't pass them.
- A timer is removed in the epoch in which it fires. If it fails with "skip" or a dead-letter topic, it is
  removed and leaves no other trace. If it fails with "stop", it stays set, and none of its changes are in the
  open epoch, which may be committed.

A timer's outputs are always held back until its function has returned, and its changes can be undone. This
costs more than a record does. In return, a failing timer never aborts an epoch with other records in it.

Must not: know about epochs, transactions or the coordinator. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, cast

from fcluster.common.errors import ProcessingError, failure_of
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.engine.call_results import CallResults
from fcluster.engine.clock import END_MS, EventClock
from fcluster.engine.compile import CompiledChain, compile_chain
from fcluster.engine.context import AnyTable
from fcluster.engine.dead_letters import dead_letter_trouble, write_dead_letter
from fcluster.engine.entries import EntryTable
from fcluster.engine.failure import Condemnation, UnkeptStateError
from fcluster.engine.interval_counted import CountedAtIntervals
from fcluster.engine.interval_gathered import OpenGatheredAtIntervals
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.interval_parts import OpenPartsAtIntervals
from fcluster.engine.interval_sessions import OpenSessionsAtIntervals
from fcluster.engine.interval_sliding import OpenSlidingAtIntervals
from fcluster.engine.interval_windows import OpenWindowsAtIntervals
from fcluster.engine.loading import Unloaded
from fcluster.engine.pairs import AnyOpen, OpenPairs
from fcluster.engine.processing_time import ProcessingTime
from fcluster.engine.records import HeldOutputs, OutputPort, Produce, Refusals, TimerRecord
from fcluster.engine.runner import HandlerError, UnreadableRecordError, release, step_failure_of
from fcluster.engine.sessions import AnyWindows, OpenSessions
from fcluster.engine.sliding import OpenSliding
from fcluster.engine.steps import Place, RecordError, StepFailure
from fcluster.engine.timers import NEVER_MS, HandlerTimers, Timer
from fcluster.engine.windows import ClockInEventTime, OpenInTime, OpenWindows, StepInShard
from fcluster.graph.counted import Counted
from fcluster.graph.operators import JoinStreams, Process, TimedOperator, TopicSpec, Window
from fcluster.graph.sliding import Sliding
from fcluster.graph.stages import Stage
from fcluster.graph.timers import TIMER_CLOCKS, TimerClock
from fcluster.graph.windows import Gathered, Session

FIRED_AT_ONCE_MAX: Final = 1_000
"""How many timers fire after one record before the shell gets a turn."""
CLOSED_AT_ONCE_MAX: Final = 100
"""How many windows close after one record, where others may wait for the records that follow. If more are
due, no window closes in a record's call until `fire_due` has closed them: records pass quickly.
"""


_OPEN: Final[Mapping[type, type[OpenSessions | OpenSliding]]] = {Session: OpenSessions, Sliding: OpenSliding}
"""What is open in a window step, where it isn't `OpenWindows`."""
_OPEN_AT_INTERVALS: Final[
    Mapping[type, type[OpenSessionsAtIntervals | OpenSlidingAtIntervals | OpenGatheredAtIntervals]]
] = {
    Gathered: OpenGatheredAtIntervals,
    Session: OpenSessionsAtIntervals,
    Sliding: OpenSlidingAtIntervals,
}
"""The same, if results are passed on at intervals."""


class TimerStopsError(UnreadableRecordError):
    """A timer stops the job. None of its changes are in the open epoch, which may be committed.

    Attributes:
        timer: the timer.
    """

    def __init__(self, failure: Failure, timer: TimerRecord) -> None:
        super().__init__(failure)
        self.timer = timer


class EventTime(Protocol):
    """A shard's event-time clock. Implemented by `engine.clock.EventClock`."""

    @property
    def now_ms(self) -> int | None:
        """Milliseconds since 1970. None before the first record."""
        ...

    @property
    def due_ms(self) -> int | None:
        """What is set for this time or an earlier one is due."""
        ...

    @property
    def ended(self) -> bool:
        """Whether event time has ended, so that everything is due."""
        ...

    def follow(self, fired_ms: int, /) -> None:
        """Event time has ended, and what was set for this time fires."""
        ...


class TimedStep(Protocol):
    """A step of the job in which something happens because time has passed.

    `timers.HandlerTimers`, `windows.OpenWindows`, `sessions.OpenSessions`, `interval_notes.IntervalNotes` and
    `pairs.OpenPairs` are some.
    """

    def first(self, clock: TimerClock, /) -> Timer | None:
        """What is due next by that clock. Don't call it within a record that may still be undone."""
        ...

    def take(self, clock: TimerClock, timer: Timer, /) -> None:
        """It is about to be called. What this changes isn't undone if it fails."""
        ...

    def put(self, clock: TimerClock, timer: Timer, /) -> None:
        """It has failed and stops the job: it is due as before. What it changed has been undone."""
        ...

    def skipped(self, timer: Timer, /) -> None:
        """It has failed and is given up. What it changed has been undone."""
        ...

    def title(self, timer: Timer, /) -> str:
        """Which one, for messages; see `timers.timer_title`."""
        ...

    def timestamp_ms(self, timer: Timer, /) -> int:
        """Of what comes of it, in milliseconds since 1970."""
        ...


@dataclass(slots=True)
class _Compiled:
    """A step with timers, and the chain through which its outputs go.

    Attributes:
        clock: the processing time of a step whose windows go by it.
    """

    name: str
    timers: TimedStep
    clock: ProcessingTime | None = None
    chain: CompiledChain | None = None


class TimerRunner:
    """The timers of a running shard.

    Args:
        stage, partition: the shard.
        tables: the tables of its state, by the name of the store.
        port: takes the outputs.
        passing: see `StageRunner`.
        clock: the shard's event time.
        wall_ms: returns the processing time, in milliseconds since 1970.
        next_offset: returns the offset of the next record of the shard's first input.
        unloaded: see `loading.unloaded_inputs`.

    Attributes:
        steps: the steps in which something may be due, by name.
        handlers: the timers of each handler among them.
        fired: how many have fired. The shell may reset it.
        at_once_max: how many fire at most in one call of `fire_event`.
        begun: called with each timer before its function.
        behind: whether windows are due that wait for `fire_due`.
        left: called if more timers are due than may fire at once: `fire_due` has to be called before the next
            record.
        interrupts: if it isn't empty, somebody waits, and no more than one timer fires at once.
    """

    def __init__(
        self,
        stage: Stage,
        partition: int,
        tables: Mapping[str, AnyTable],
        port: OutputPort,
        passing: tuple[type[BaseException], ...],
        clock: EventTime,
        wall_ms: Callable[[], int],
        next_offset: Callable[[], int],
        unloaded: Unloaded | None = None,
    ) -> None:
        self._stage = stage
        self._partition = partition
        self._tables = tables
        self._port = port
        self._letters = port.letters.of(ShardId(stage.name, partition))
        self._passing = (UnkeptStateError, *passing)
        self._clock = clock
        self._wall_ms = wall_ms
        self._next_offset = next_offset
        self._unloaded = unloaded
        self.steps: Mapping[str, HandlerTimers | AnyOpen] = {
            step.name: self._timers_of(step) for step in stage.timed_steps
        }
        self.handlers: Mapping[str, HandlerTimers] = {
            name: step for name, step in self.steps.items() if isinstance(step, HandlerTimers)
        }
        self._compiled = [
            _Compiled(name, timers, _processing_time_of(step))
            for name, step in self.steps.items()
            for timers in _timers_within(step)
        ]
        self._in_processing_time = [one.timers for one in self._compiled if one.clock is not None]
        self._refusals = Refusals()
        self._condemned: dict[str, list[Condemnation]] = {}
        self._results_late_ms = stage.results_late_ms
        self._holds_back = bool(stage.windows or stage.joins)
        self._may_wait = not stage.timed_processes and not any(
            isinstance(step, CountedAtIntervals) for step in self.steps.values()
        )
        # Lower bounds: the store is searched only when one of them is reached.
        self._next_ms: dict[TimerClock, int] = dict.fromkeys(TIMER_CLOCKS, -1)
        # At the end of event time, windows in processing time are due, too.
        self._nothing_ms: dict[TimerClock, int] = dict.fromkeys(TIMER_CLOCKS, NEVER_MS)
        if self._in_processing_time:
            self._nothing_ms["event"] = END_MS
        self.fired = 0
        self.at_once_max = FIRED_AT_ONCE_MAX
        self.begun: Callable[[TimerRecord], None] = _nothing
        self.behind = False
        self.left: Callable[[], None] = _nothing
        self.interrupts: Sequence[None] = ()

    @property
    def count(self) -> int:
        """How many timers are set."""
        return sum(timers.count for timers in self.handlers.values())

    # --- when -----------------------------------------------------------------------------------------

    def event_is_due(self) -> bool:
        """Whether an event-time timer is due. It may have to wait for a global table."""
        return self._first_event() is not None

    def event_must_fire(self) -> bool:
        """Whether an event-time timer is due that has to fire before the next record is processed."""
        return not self._may_wait and self._first_event() is not None and self._may_fire()

    def must_fire(self) -> bool:
        """Whether a timer of any clock is due that has to fire before the next record is processed."""
        return not self._may_wait and self.is_due()

    def is_due(self) -> bool:
        """Whether a timer of any clock is due, and may fire."""
        is_due = self.event_is_due() or self._first_due("processing", self._wall_ms()) is not None
        return is_due and self._may_fire()

    def _may_fire(self) -> bool:
        """Whether timers don't have to wait for a global table."""
        if self._unloaded is not None and not self._unloaded():
            self._unloaded = None  # for good
        return self._unloaded is None

    def next_processing_ms(self) -> int | None:
        """When a processing-time timer may be due. None: none is set, or they have to wait for a global
        table. The time is a lower bound.
        """
        if not self._may_fire():
            return None
        if self._next_ms["processing"] < 0:
            self._first_due("processing", 0)
        next_ms = self._next_ms["processing"]
        return None if next_ms == NEVER_MS else next_ms

    def condemn(self, condemnation: Condemnation) -> None:
        """Let the timer that the condemnation names as its `step` fail with it, when it is called or with its
        next output to the condemnation's `topic`. May be called several times for a timer.
        """
        self._condemned.setdefault(condemnation.step, []).append(condemnation)

    def told_ms(self, due_ms: int | None) -> int | None:
        """What the stages behind may take for the event time of this shard, if that is `due_ms`.

        A window's result has a timestamp in the window. It is late by the window's grace when it is written,
        and by more if the window is due, but hasn't closed yet. So is a record that found no partner in a
        join. They aren't to be late for those behind. If event time has ended, they aren't told so before
        all that is due has fired.
        """
        waits = self._unloaded is not None  # and so do timers that are due
        if due_ms is None or not (self._holds_back or waits or due_ms == END_MS):
            return due_ms
        found = self._first_event()
        if due_ms == END_MS:
            if found is None:
                return END_MS
            due_ms = self._clock.now_ms
            if due_ms is None:
                return None
        waiting = [None if found is None else found[1]]
        waiting += [step.first("processing") for step in self._in_processing_time]
        return min([due_ms, *(one.at_ms - 1 for one in waiting if one is not None)]) - self._results_late_ms

    # --- firing ---------------------------------------------------------------------------------------

    def fire_event(self) -> None:
        """Fire due event-time timers, at most `at_once_max`. Calls `left` if there are more that must fire.
        If they may wait, this does nothing until `fire_due` has caught up. While timers wait for a global
        table, it does nothing either.

        Raises:
            TimerStopsError: a timer stops the job. None of its changes are in the open epoch.
            HandlerError: a timer failed, and the epoch must be aborted. Pass the failure to `condemn`. Also
            UnkeptStateError, and the exceptions in `passing`.
        """
        if self.behind or not self._may_fire():
            return
        fired_max = min(self.at_once_max, CLOSED_AT_ONCE_MAX) if self._may_wait else self.at_once_max
        fired = 0
        while (found := self._first_event()) is not None:
            if fired >= fired_max or (fired and self.interrupts):
                self.behind = self._may_wait
                if not self._may_wait:
                    self.left()
                return
            self._fire(*found, "event")
            fired += 1

    def fire_all_events(self) -> None:
        """Like `fire_event`, until no more timers are due."""
        while (found := self._first_event()) is not None:
            self._fire(*found, "event")
        self.behind = False

    def fire_due(self, fired_max: int, is_over: Callable[[], bool] = lambda: False) -> int:
        """Fire due timers of both clocks, event time first. Returns how many have fired.

        Args:
            fired_max: at most so many fire.
            is_over: whether others have their turn. It is asked after each timer.

        Raises:
            What `fire_event` raises.
        """
        now_ms = self._wall_ms()
        fired = 0
        while fired < fired_max and not (fired and (self.interrupts or is_over())):
            if (found := self._first_event()) is not None:
                self._fire(*found, "event")
            elif (found := self._first_due("processing", now_ms)) is not None:
                self._fire(*found, "processing")
            else:
                break
            fired += 1
        if self.behind and self._first_event() is None:
            self.behind = False
        return fired

    # --- within ---------------------------------------------------------------------------------------

    def _timers_of(self, step: TimedOperator) -> HandlerTimers | AnyOpen:
        if isinstance(step, Process):
            return HandlerTimers(
                step, self._tables, self._noted, self._event_ms, self._wall_ms, lambda: self._clock.ended
            )
        if isinstance(step, JoinStreams):
            return OpenPairs(step, self._tables, self._clock, self._noted, self._port)
        return self._windows_of(step)

    def _windows_of(self, step: Window) -> AnyWindows:
        clock: ClockInEventTime = self._clock
        if step.clock == "processing":
            clock = ProcessingTime(cast("EntryTable", self._tables[step.store.clock_name]), self._wall_ms)
        in_shard = StepInShard(step, self._tables, clock, self._noted, self._port)
        if isinstance(step.windows, Counted):
            return CountedAtIntervals(in_shard)
        of_kind: type[OpenWindows | OpenSessions | OpenSliding]
        if step.emit == "interval":
            in_time = OpenPartsAtIntervals if step.is_part else OpenWindowsAtIntervals
            of_kind = _OPEN_AT_INTERVALS.get(type(step.windows), in_time)
        else:
            of_kind = _OPEN.get(type(step.windows), OpenWindows)
        return of_kind(in_shard)

    def _event_ms(self) -> int | None:
        return self._clock.now_ms

    def _noted(self, clock: TimerClock, at_ms: int) -> None:
        self._next_ms[clock] = min(self._next_ms[clock], at_ms)

    def _first_event(self) -> tuple[_Compiled, Timer] | None:
        due_ms = self._clock.due_ms
        return None if due_ms is None else self._first_due("event", due_ms)

    def _first_due(self, clock: TimerClock, now_ms: int) -> tuple[_Compiled, Timer] | None:
        if self._next_ms[clock] > now_ms:
            return None
        found = self._first(clock)
        next_ms = self._next_ms[clock] = self._nothing_ms[clock] if found is None else found[1].at_ms
        return found if next_ms <= now_ms else None

    def _first(self, clock: TimerClock) -> tuple[_Compiled, Timer] | None:
        found: tuple[_Compiled, Timer] | None = None
        all_windows = clock == "event" and self._clock.ended
        for handler in self._compiled:
            timer = handler.timers.first("processing" if all_windows and handler.clock is not None else clock)
            if timer is not None and (found is None or timer < found[1]):
                found = handler, timer
        return found

    def _fire(self, handler: _Compiled, timer: Timer, clock: TimerClock) -> None:
        record = TimerRecord(
            timer.key,
            handler.timers.timestamp_ms(timer),
            self._stage.inputs[0].topic.name,
            self._partition,
            self._next_offset(),
            timer.name,
            partial(handler.timers.title, timer),
        )
        self.begun(record)
        chain = self._chain_of(handler)
        held = chain.held
        assert held is not None
        condemnations = self._condemned.get(record.title, ()) if self._condemned else ()
        if clock == "event" and self._clock.ended and handler.clock is None:
            self._clock.follow(timer.at_ms)
        # This comes before what can be undone: a skipped timer is removed as well.
        handler.timers.take(clock, timer)
        for table in chain.tables:
            table.begin_undo()
        timers = handler.timers if isinstance(handler.timers, HandlerTimers) else None
        if timers is not None:
            timers.firing = clock, timer.at_ms
        try:
            self._run(chain, handler, timer, record, condemnations)
        except self._passing:
            raise
        except HandlerError as error:
            # Outputs that were already written are undone with the epoch. In the replay, the timer fails
            # before it writes.
            condemnation = dataclasses.replace(error.condemnation, step=record.title)
            raise HandlerError(error.failure, condemnation) from error
        except BaseException as error:  # noqa: BLE001  whatever it is, the timer has failed
            for table in chain.tables:
                table.rollback()
            held.entries.clear()
            self._judge(step_failure_of(error, chain.name), handler, timer, record, clock)
        finally:
            if timers is not None:
                timers.firing = None
            held.entries.clear()
            for table in chain.tables:
                table.end_undo()
        if condemnations:
            del self._condemned[record.title]
        self.fired += 1

    def _run(
        self,
        chain: CompiledChain,
        handler: _Compiled,
        timer: Timer,
        record: TimerRecord,
        condemnations: Sequence[Condemnation],
    ) -> None:
        place, call = chain.timers[handler.name, timer.name]
        # Whichever of its outputs to that topic comes first is refused.
        self._refusals.set([dataclasses.replace(one, step="") for one in condemnations])
        for one in condemnations:
            if not one.topic:
                raise StepFailure(place, RecordError(one.failure))
        if handler.clock is not None:
            handler.clock.closing(timer.at_ms)
        call(record, timer.key)
        try:
            for table in chain.tables:
                table.check_changed()
        except ProcessingError as error:
            raise StepFailure(place, RecordError(failure_of(error))) from error
        assert chain.held is not None
        if chain.held.entries:
            release(chain.held.entries, self._port, record)

    def _judge(
        self,
        failure: StepFailure,
        handler: _Compiled,
        timer: Timer,
        record: TimerRecord,
        clock: TimerClock,
    ) -> None:
        rule = failure.rule
        stops_with = failure.of(record)
        if rule != "stop":
            self._port.skipped += 1
            if not isinstance(rule, TopicSpec):
                _give_up(handler, timer)
                return
            step, produce = failure.place.name, self._checked_produce(failure.place)
            try:
                write_dead_letter(produce, rule, record, step, failure.describe(), self._letters)
            except RecordError as error:
                stops_with = dead_letter_trouble(record, error)
            else:
                _give_up(handler, timer)
                self._port.records += 1
                return
        handler.timers.put(clock, timer)
        raise TimerStopsError(stops_with, record) from failure.error

    def _checked_produce(self, place: Place) -> Produce:
        def produce(topic: str, *fields: Any) -> None:
            self._refusals.check(topic, place)
            self._port.produce(topic, *fields)

        return produce

    def _chain_of(self, handler: _Compiled) -> CompiledChain:
        """Compiled when the first timer fires. All chains that contain the handler continue in the same
        way.
        """
        if handler.chain is None:
            chain = next(
                chain
                for chain in self._stage.chains
                if handler.name in (step.name for step in chain.stateful)
            )
            handler.chain = compile_chain(
                chain,
                self._stage,
                self._partition,
                self._tables,
                self._port,
                self._passing,
                HeldOutputs(self._refusals),
                self.steps,
                CallResults(),  # no calls follow a step with timers
                self._event_ms,
            )
        return handler.chain


def make_timers(
    stage: Stage,
    partition: int,
    tables: Mapping[str, AnyTable],
    port: OutputPort,
    passing: tuple[type[BaseException], ...],
    clock: EventClock | None,
    wall_ms: Callable[[], int],
    next_offset: Callable[[], int],
    unloaded: Unloaded | None = None,
) -> TimerRunner | None:
    """The timers of a shard. None if nothing in it depends on time. See `TimerRunner`."""
    if not stage.timed_steps:
        return None
    assert clock is not None, "a stage with timers keeps time"
    runner = TimerRunner(stage, partition, tables, port, passing, clock, wall_ms, next_offset, unloaded)
    clock.tell_with(runner.told_ms)
    return runner


def _timers_within(step: HandlerTimers | AnyOpen) -> Iterator[TimedStep]:
    """What is due in a step, by the clock: what closes, and results at intervals."""
    if not isinstance(step, CountedAtIntervals):
        yield step
    notes: IntervalNotes | None = None if isinstance(step, HandlerTimers | OpenPairs) else step.notes
    if notes is not None:
        yield notes


def _processing_time_of(step: HandlerTimers | AnyOpen) -> ProcessingTime | None:
    """The processing time of a step whose windows go by it."""
    if isinstance(step, OpenInTime) and isinstance(step.clock, ProcessingTime):
        return step.clock
    return None


def _give_up(handler: _Compiled, timer: Timer) -> None:
    """The timer has failed, and what it changed has been undone. It won't fire again."""
    if handler.clock is not None:
        handler.clock.closing(timer.at_ms)
    handler.timers.skipped(timer)


def _nothing(*_arguments: object) -> None:
    pass
