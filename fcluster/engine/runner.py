"""Takes each record of a shard's input through all chains of that input, and handles failures.

Invariants:
- A record is decoded once for all its chains, before any of them runs. A record that can't be decoded leads
  to at most one dead letter, by the rule of the source.
- A failure is handled by the rule of the step in which it happened. "skip" and a dead-letter topic: the chain
  leaves no other trace of the record. Its outputs were held back, and the states that it touched are
  restored. "stop": `HandlerError` is raised, and the caller aborts the open epoch.
- If a record stops the job (`UnreadableRecordError`), none of its chains has left anything in the open epoch,
  so the epoch may be committed.
- If one chain changes its value, other chains don't see that (invariant 4).
- A record that fails in a step that several chains share is one failure (`engine.shared_steps`).
- A record advances event time after it has gone through all its chains. Watermark records go through no
  chain; apart from that they are treated like records.

Must not: know about epochs, transactions or the coordinator. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fcluster.common.errors import FormatUnusable, ProcessingError, failure_of
from fcluster.common.failures import Failure, frame_of
from fcluster.common.ids import ShardId
from fcluster.engine.call_results import CallResults
from fcluster.engine.calling import InputCalls, RecordCalls
from fcluster.engine.clock import EventClock, UnreadableClockError
from fcluster.engine.compile import CompiledChain, compile_chain, is_tolerant
from fcluster.engine.context import AnyTable, KeyTimers
from fcluster.engine.dead_letters import dead_letter_trouble, write_dead_letter
from fcluster.engine.failure import Condemnation, UnkeptStateError
from fcluster.engine.framing import compile_framing
from fcluster.engine.letter_limit import ShardLetters
from fcluster.engine.operators.base import EventMs
from fcluster.engine.pairs import AnyOpen
from fcluster.engine.records import (
    NO_TIMESTAMP_MS,
    OUTPUT_TROUBLE,
    USUAL_FIELDS,
    HeldOutput,
    HeldOutputs,
    OutputPort,
    Refusals,
    SourceRecord,
    describe_record,
    where_of,
)
from fcluster.engine.shared_steps import SharedSteps
from fcluster.engine.stamps import Stamper, TimestampError
from fcluster.engine.steps import Place, RecordError, StepFailure
from fcluster.engine.watermarks import is_watermark, watermarks_in
from fcluster.graph.codecs import ModelError, data_looks_like, decoding_trouble, value_codec
from fcluster.graph.operators import TopicSpec
from fcluster.graph.stages import Input, Stage

if TYPE_CHECKING:
    from fcluster.engine.firing import TimerRunner

RunChain = Callable[[SourceRecord, bytes | None, Any], None]


class UnreadableRecordError(RecordError):
    """The record stops the job. None of its changes are in the open epoch, which may be committed."""


class HandlerError(RecordError):
    """A step failed in the middle of a record. The open epoch must be aborted.

    Attributes:
        condemnation: what to pass to `condemn` of the record's shard before the replay.
    """

    def __init__(self, failure: Failure, condemnation: Condemnation | None = None) -> None:
        super().__init__(failure)
        self.condemnation = condemnation or Condemnation(failure)


class StageRunner:
    """Processes the records of one input of a shard, in order: call `handle` for each.

    A shard with several inputs has one runner for each. They share its tables and its port.

    Args:
        stage: the shard's stage.
        partition: the shard's partition.
        tables: the tables of the shard's state, by the name of the store.
        port: takes the outputs.
        passing: the shell's exceptions that no record causes. They are raised unchanged.
        number: the input's number.
        clock: the shard's event time, shared by its inputs. None: the job doesn't use event time.
        timers: the shard's timers, if its handlers set some. Shared by its inputs.

    Attributes:
        calls: the calls that records wait for. None: there are none. Otherwise `begin_calls` comes first for
            each record, and `handle` when they are done.
        handle: processes one record. It raises `HandlerError`, `UnreadableRecordError`, `UnkeptStateError`,
            or an exception in `passing`. `condemn` replaces it, so read the attribute again for each record.
    """

    __slots__ = (
        "_careful",
        "_chains",
        "_condemned",
        "_decode",
        "_frame",
        "_passing",
        "_port",
        "_results",
        "_source",
        "_stamper",
        "_tables",
        "_timers",
        "calls",
        "clock",
        "handle",
        "number",
        "partition",
        "stage",
    )

    def __init__(
        self,
        stage: Stage,
        partition: int,
        tables: Mapping[str, AnyTable],
        port: OutputPort,
        passing: tuple[type[BaseException], ...],
        number: int = 0,
        clock: EventClock | None = None,
        timers: TimerRunner | None = None,
    ) -> None:
        self.stage = stage
        self.partition = partition
        self.number = number
        self.clock = clock
        self._source = stage.inputs[number]
        self._chains = stage.chains_of(number)
        self._tables = tables
        self._port = port
        self._passing = passing
        self._condemned: dict[int, list[Condemnation]] = {}
        self._careful: _CarefulRun | None = None
        self._decode = value_codec(self._source.topic.value)[0]
        timestamp = self._source.timestamp
        self._stamper = None if timestamp is None else Stamper(timestamp, self._source.topic.value)
        self._timers = timers
        self._frame = compile_framing(self._source)
        calls = InputCalls(self._source, self._chains, partition)
        self.calls = calls if calls.chains else None
        self._results = calls.results
        self.handle: Callable[[SourceRecord], None] = self._keep_time(self._compile())

    def passed(self, record: SourceRecord) -> None:
        """Called when a record is through, before the timers that are due after it fire. For shells. Only
        called if there are timers.
        """

    def begin_calls(self, record: SourceRecord) -> RecordCalls:
        """Begin with the calls of a record, in advance. `calls` isn't None."""
        assert self.calls is not None
        if self._frame is not None:
            record = self._frame(record)
        if self.clock is not None and self._source.internal and is_watermark(record):
            return RecordCalls(self.calls, record, record, (), ())  # it goes through no chain
        return self.calls.begin(record, self._condemned.get(record.offset(), ()))

    def condemn(self, offset: int, condemnation: Condemnation) -> None:
        """Let the record at `offset` fail as `condemnation` says when it comes, by the rule of the
        responsible step.

        With "stop", `UnreadableRecordError` is raised then, and none of the record's changes are in the open
        epoch. With "skip" or a dead letter, the record's chain leaves no other trace, and processing
        continues. May be called several times for an offset, if another failure is found after the first one,
        but only before the record comes.
        """
        if not self._condemned:
            self._guard()
        self._condemned.setdefault(offset, []).append(condemnation)

    def find_unkept(self) -> Condemnation | None:
        """Whether the open epoch holds a state that can't be stored. Returns what to condemn the record with
        whose handlers ran last. It looks at all keys touched since the barrier, so it is for replays in small
        pieces.
        """
        for table in self._tables.values():
            try:
                table.encode_touched()
            except ProcessingError as error:
                return Condemnation(failure_of(error), step=table.step)
        return None

    def _guard(self) -> None:
        fast, condemned = self.handle, self._condemned
        careful = self._keep_time(self._run_condemned)

        def guarded(record: SourceRecord) -> None:
            offset = record.offset()
            condemnations = condemned.get(offset)
            if condemnations is not None:
                if self._source.internal and is_watermark(record):
                    raise UnreadableRecordError(condemnations[0].failure)
                careful(record)
            else:
                fast(record)
            if offset >= max(condemned):
                condemned.clear()
                self.handle = fast

        self.handle = guarded

    def _run_condemned(self, record: SourceRecord) -> None:
        if self._careful is None:
            self._careful = _CarefulRun(
                self.stage,
                self.number,
                self.partition,
                self._tables,
                self._port,
                self._passing,
                self._timed_steps,
                self._stamper,
                self._results,
                self._event_ms,
            )
        self._careful.run(record, self._condemned[record.offset()])

    @property
    def _timed_steps(self) -> Mapping[str, KeyTimers | AnyOpen]:
        return {} if self._timers is None else self._timers.steps

    def _event_ms(self) -> int | None:
        return None if self.clock is None else self.clock.now_ms

    # --- time -----------------------------------------------------------------------------------------

    def _keep_time(self, run: Callable[[SourceRecord], None]) -> Callable[[SourceRecord], None]:
        """`run`, plus the effects of each record on the shard's event time, plus the timers that are due."""
        if self.clock is not None and self._source.internal:
            run = _hearing(run, self.clock, self.number, self._port)
        elif self.clock is not None and self._stamper is not None:
            run = _observing_stamps(run, self.clock, self.number, self._stamper)
        elif self.clock is not None:
            run = _observing(run, self.clock, self.number)
        if self._timers is not None:
            run = self._timed(run, self._timers)
        frame = self._frame
        return run if frame is None else lambda record: run(frame(record))

    def _timed(
        self, run: Callable[[SourceRecord], None], timers: TimerRunner
    ) -> Callable[[SourceRecord], None]:
        passed = self.passed

        def handle(record: SourceRecord) -> None:
            if timers.event_must_fire():
                timers.fire_all_events()  # timers that were due before a restart
            run(record)
            passed(record)
            if not timers.behind and timers.event_is_due():
                timers.fire_event()

        return handle

    # --- compiling ------------------------------------------------------------------------------------

    def _compile(self) -> Callable[[SourceRecord], None]:
        port, chains = self._port, self._chains
        letters = port.letters.of(ShardId(self.stage.name, self.partition))
        shared, results = SharedSteps(chains), self._results
        place = _source_place(self.stage, self.number)
        on_unreadable = _compile_unreadable(self._source, place, port, letters)
        runs: list[RunChain] = []
        for chain in chains:
            held = HeldOutputs() if is_tolerant(chain) else None
            compiled = compile_chain(
                chain,
                self.stage,
                self.partition,
                self._tables,
                port,
                self._passing,
                held,
                self._timed_steps,
                results,
                self._event_ms,
            )
            runs.append(
                _stopping(compiled, self._passing)
                if held is None
                else _tolerant(compiled, held, port, letters, self._passing, shared)
            )
        if self._stamper is not None:
            return _compile_stamped(self._decode, self._stamper, runs, on_unreadable)
        if len(runs) == 1 and not is_tolerant(chains[0]):
            return _compile_plain(self._decode, compiled.step, compiled.name, self._passing, on_unreadable)  # pyright: ignore[reportPossiblyUnboundVariable]
        if len(runs) == 1:
            return _compile_one(self._decode, runs[0], on_unreadable)
        is_immutable = self._source.topic.value in ("text", "bytes", "int")
        needs_copies = [not is_immutable and chain.follows is None for chain in chains]
        return _compile_several(self._decode, runs, needs_copies, on_unreadable)


def _observing(
    run: Callable[[SourceRecord], None], clock: EventClock, number: int
) -> Callable[[SourceRecord], None]:
    """For a user's topic: the timestamps of its records advance the time."""
    source = clock.source(number)

    def handle(record: SourceRecord) -> None:
        run(record)
        timestamp_ms = record.timestamp()[1]
        if timestamp_ms > source.passed_ms:
            clock.observe(number, timestamp_ms)

    return handle


def _observing_stamps(
    run: Callable[[SourceRecord], None], clock: EventClock, number: int, stamper: Stamper
) -> Callable[[SourceRecord], None]:
    """For a user's topic whose values have their time. Without a usable one, a record doesn't move event
    time.
    """
    source = clock.source(number)

    def handle(record: SourceRecord) -> None:
        stamper.last_ms = NO_TIMESTAMP_MS
        run(record)
        if stamper.last_ms > source.passed_ms:
            clock.observe(number, stamper.last_ms)

    return handle


def _hearing(
    run: Callable[[SourceRecord], None], clock: EventClock, number: int, port: OutputPort
) -> Callable[[SourceRecord], None]:
    """For a repartition topic: only its watermark records advance the time."""

    def handle(record: SourceRecord) -> None:
        if record.key() is not None or not is_watermark(record):  # a record with a key is data
            run(record)
            return
        try:
            clock.heard(number, *watermarks_in(record))
        except UnreadableClockError as error:
            failure = Failure.of_record(f"{describe_record(record)}: {error}", where=where_of(record))
            raise UnreadableRecordError(failure) from error
        port.watermarks_read += 1

    return handle


def _compile_plain(
    decode: Callable[[bytes], Any],
    step: Callable[[SourceRecord, bytes | None, Any], None],
    chain: str,
    passing: tuple[type[BaseException], ...],
    on_unreadable: Callable[[SourceRecord, BaseException], None],
) -> Callable[[SourceRecord], None]:
    """One chain in which every failure stops: the fastest way."""
    passing = (UnkeptStateError, *passing)

    def handle(record: SourceRecord) -> None:
        raw = record.value()
        if raw is None:
            value = None  # a tombstone
        else:
            try:
                value = decode(raw)
            except BaseException as error:  # noqa: BLE001  a codec may raise anything
                return on_unreadable(record, error)
        try:
            step(record, record.key(), value)
        except passing:
            raise
        except BaseException as error:
            raise HandlerError(step_failure_of(error, chain).of(record)) from error
        return None

    return handle


def _compile_one(
    decode: Callable[[bytes], Any],
    run: RunChain,
    on_unreadable: Callable[[SourceRecord, BaseException], None],
) -> Callable[[SourceRecord], None]:
    def handle(record: SourceRecord) -> None:
        raw = record.value()
        try:
            value = None if raw is None else decode(raw)
        except BaseException as error:  # noqa: BLE001
            return on_unreadable(record, error)
        run(record, record.key(), value)
        return None

    return handle


def _compile_several(
    decode: Callable[[bytes], Any],
    runs: Sequence[RunChain],
    needs_copies: Sequence[bool],
    on_unreadable: Callable[[SourceRecord, BaseException], None],
) -> Callable[[SourceRecord], None]:
    """Several chains.

    Args:
        needs_copies: for each of them, whether it may change the value that it gets.
    """
    first, *_rest = runs
    others = list(zip(runs, needs_copies, strict=True))[1:]

    def handle(record: SourceRecord) -> None:
        raw = record.value()
        try:
            value = None if raw is None else decode(raw)
        except BaseException as error:  # noqa: BLE001
            return on_unreadable(record, error)
        key = record.key()
        first(record, key, value)
        for run, needs_copy in others:
            # Each chain gets its own value. Decoding again is the fastest way to copy it.
            run(record, key, decode(raw) if needs_copy and raw is not None else value)
        return None

    return handle


def _compile_stamped(
    decode: Callable[[bytes], Any],
    stamper: Stamper,
    runs: Sequence[RunChain],
    on_unreadable: Callable[[SourceRecord, BaseException], None],
) -> Callable[[SourceRecord], None]:
    """The values have the time of their records. All chains get the record with that time."""
    first, *others = runs
    stamp = stamper.stamp

    def handle(record: SourceRecord) -> None:
        raw = record.value()
        try:
            value = None if raw is None else decode(raw)
            stamped = stamp(record, value)
        except BaseException as error:  # noqa: BLE001
            return on_unreadable(record, error)
        key = record.key()
        first(stamped, key, value)
        for run in others:
            run(stamped, key, None if raw is None else decode(raw))
        return None

    return handle


def _stopping(chain: CompiledChain, passing: tuple[type[BaseException], ...]) -> RunChain:
    """A chain in which every failure stops."""
    step, name = chain.step, chain.name
    passing = (UnkeptStateError, *passing)

    def run(record: SourceRecord, key: bytes | None, value: Any) -> None:
        try:
            step(record, key, value)
        except passing:
            raise
        except BaseException as error:
            raise HandlerError(step_failure_of(error, name).of(record)) from error

    return run


def _tolerant(
    chain: CompiledChain,
    held: HeldOutputs,
    port: OutputPort,
    letters: ShardLetters,
    passing: tuple[type[BaseException], ...],
    shared: SharedSteps,
) -> RunChain:
    """A chain in which some failures are tolerated."""
    step, tables, name = chain.step, chain.tables, chain.name
    entries = held.entries
    passing = (HandlerError, UnkeptStateError, *passing)

    def run(record: SourceRecord, key: bytes | None, value: Any) -> None:
        for table in tables:
            table.begin_undo()
        try:
            step(record, key, value)
            if entries:
                release(entries, port, record)
        except passing:
            entries.clear()
            raise
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to a place, or to the chain
            failure = step_failure_of(error, name)
            for table in tables:
                table.rollback()
            entries.clear()
            if not shared.is_handled(failure.place, record):
                _tolerate(failure, record, port, letters)

    return run


def release(entries: list[HeldOutput], port: OutputPort, record: SourceRecord) -> None:
    """Pass a record's held outputs to the port.

    Raises:
        StepFailure: the first output is refused; nothing is written.
        HandlerError: a later output is refused.
    """
    produce = port.produce
    entry: Any = None
    try:
        for entry in entries:
            if len(entry) == USUAL_FIELDS:
                _place, topic, value, key, timestamp_ms, headers = entry  # faster than a slice
                produce(topic, value, key, timestamp_ms, headers)
            else:
                produce(*entry[1:])
    except OUTPUT_TROUBLE as error:
        failure = StepFailure(entry[0], error)
        if entry is entries[0]:
            raise failure from error
        # Outputs that were already written are undone with the epoch. In the replay, the record fails before
        # it writes.
        known = Condemnation(failure.cause, topic=entry[1], step=failure.place.name)
        raise HandlerError(failure.of(record), known) from error
    port.records += len(entries)
    entries.clear()


def _tolerate(failure: StepFailure, record: SourceRecord, port: OutputPort, letters: ShardLetters) -> None:
    """Do what its rule says, without holding outputs back: the chain has left no trace."""
    rule = failure.rule
    if rule == "stop":
        raise HandlerError(failure.of(record)) from failure.error
    port.skipped += 1
    if isinstance(rule, TopicSpec):
        try:
            write_dead_letter(port.produce, rule, record, failure.place.name, failure.describe(), letters)
        except RecordError as error:
            raise HandlerError(dead_letter_trouble(record, error)) from error
        port.records += 1


def step_failure_of(error: BaseException, chain: str) -> StepFailure:
    """The place in the chain where something failed."""
    if isinstance(error, StepFailure):
        return error
    # An exception that no step expects. It isn't tolerated.
    return StepFailure(Place(chain, f"in {chain!r}", "stop"), error, frame_of(error))


def _compile_unreadable(
    source: Input, place: Place, port: OutputPort, letters: ShardLetters
) -> Callable[[SourceRecord, BaseException], None]:
    def on_unreadable(record: SourceRecord, error: BaseException) -> None:
        failure = _unreadable(source.topic, place, record, error)
        if failure.rule == "stop":
            raise UnreadableRecordError(_unreadable_failure(source, record, failure)) from error
        _tolerate(failure, record, port, letters)

    return on_unreadable


def _source_place(stage: Stage, number: int) -> Place:
    source, chains = stage.inputs[number], stage.chains_of(number)
    name = chains[0].name if len(chains) == 1 else source.name
    return Place(name, "to be decoded", source.on_error)


def _unreadable(source: TopicSpec, place: Place, record: SourceRecord, error: BaseException) -> StepFailure:
    if isinstance(error, TimestampError):
        return StepFailure(replace(place, doing="to get its timestamp"), error)
    trouble = decoding_trouble(source.value, record.value(), error)
    # A model's error says it all: what fits where, and in words of the job's author.
    return StepFailure(place, RecordError(str(trouble)) if isinstance(trouble, ModelError) else trouble)


def _unreadable_failure(source: Input, record: SourceRecord, failure: StepFailure) -> Failure:
    name = source.topic.name
    if isinstance(failure.error, TimestampError):
        remedy = (
            "correct what writes such records, or let them be skipped or go to a dead-letter topic: "
            f"job.topic({name!r}, timestamp=..., on_error=...)"
        )
        message = f"{describe_record(record)} has no usable timestamp: {failure.describe()}"
        return Failure.of_record(message, remedy, where_of(record))
    if isinstance(failure.error, FormatUnusable):
        return failure.of(record)
    message = f"{describe_record(record)} can't be decoded: {failure.describe()}"
    of_model = isinstance(failure.error, RecordError)
    hint = "" if of_model else data_looks_like(source.topic.value, record.value())
    message += f"; {hint}" if hint else ""
    correct = (
        "correct what writes such records or the model"
        if of_model
        else f"declare {name!r} with the kind of data that it holds"
    )
    remedy = (
        f"{correct}, or let such records be skipped or go to a dead-letter topic: "
        f"job.topic({name!r}, on_error=...)"
    )
    return Failure.of_record(message, "" if source.internal else remedy, where_of(record))


class _CarefulRun:
    """Processes a record that is known to fail. All its outputs are held back, whatever the rules say, so
    that it can be undone as a whole.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        partition: int,
        tables: Mapping[str, AnyTable],
        port: OutputPort,
        passing: tuple[type[BaseException], ...],
        timers: Mapping[str, KeyTimers | AnyOpen],
        stamper: Stamper | None,
        results: CallResults,
        event_ms: EventMs,
    ) -> None:
        self._source = stage.inputs[number]
        self._stamper = stamper
        self._port = port
        self._letters = port.letters.of(ShardId(stage.name, partition))
        self._tables = tables
        self._passing = (UnkeptStateError, *passing)
        self._refusals = Refusals()
        self._shared = SharedSteps(stage.chains_of(number))
        self._source_place = _source_place(stage, number)
        self._decode = value_codec(self._source.topic.value)[0]
        self._chains = [
            compile_chain(
                chain,
                stage,
                partition,
                tables,
                port,
                passing,
                HeldOutputs(self._refusals),
                timers,
                results,
                event_ms,
            )
            for chain in stage.chains_of(number)
        ]

    def run(self, record: SourceRecord, condemnations: Sequence[Condemnation]) -> None:
        """Process `record`, which fails as `condemnations` say."""
        steps = {
            name: one.failure
            for one in condemnations
            if one.step and not one.topic
            for name in self._shared.names(one.step)
        }
        for one in condemnations:
            known = any(one.step in chain.places for chain in self._chains)
            if not one.topic and not known:
                raise UnreadableRecordError(one.failure)
        self._refusals.set(condemnations)
        for table in self._tables.values():
            table.begin_undo()
        try:
            outputs, skipped = self._collect(record, steps)
        except BaseException:
            for table in self._tables.values():
                table.rollback()
            for chain in self._chains:
                assert chain.held is not None
                chain.held.entries.clear()
            raise
        self._port.skipped += skipped
        if outputs:
            try:
                release(outputs, self._port, record)
            except StepFailure as failure:
                known_now = Condemnation(failure.cause, topic=outputs[0][1], step=failure.place.name)
                raise HandlerError(failure.of(record), known_now) from failure

    def _collect(self, record: SourceRecord, steps: Mapping[str, Failure]) -> tuple[list[HeldOutput], int]:
        """All outputs of the record, and how many of its chains failed."""
        outputs: list[HeldOutput] = []
        raw = record.value()
        try:
            value = None if raw is None else self._decode(raw)
            stamped = record if self._stamper is None else self._stamper.stamp(record, value)
        except BaseException as error:
            failure = _unreadable(self._source.topic, self._source_place, record, error)
            if failure.rule == "stop":
                raise UnreadableRecordError(_unreadable_failure(self._source, record, failure)) from error
            self._dead_letter(record, failure, outputs)
            return outputs, 1
        skipped = 0
        for chain in self._chains:
            assert chain.held is not None
            try:
                for name, known in steps.items():
                    if name in chain.places:
                        raise StepFailure(chain.places[name], RecordError(known))
                chain.step(stamped, record.key(), None if raw is None else self._decode(raw))
                outputs += chain.held.entries
            except self._passing:
                raise
            except BaseException as error:  # noqa: BLE001
                failure = step_failure_of(error, chain.name)
                if failure.rule == "stop":
                    raise UnreadableRecordError(failure.of(record)) from failure.error
                for table in chain.tables:
                    table.rollback()
                if not self._shared.is_handled(failure.place, stamped):
                    self._dead_letter(stamped, failure, outputs)
                    skipped += 1
            chain.held.entries.clear()
        return outputs, skipped

    def _dead_letter(self, record: SourceRecord, failure: StepFailure, outputs: list[HeldOutput]) -> None:
        rule = failure.rule
        if not isinstance(rule, TopicSpec):
            return

        def produce(*arguments: Any) -> None:
            self._refusals.check(arguments[0], failure.place)
            outputs.append((failure.place, *arguments))

        try:
            write_dead_letter(produce, rule, record, failure.place.name, failure.describe(), self._letters)
        except RecordError as error:
            raise UnreadableRecordError(dead_letter_trouble(record, error)) from error
