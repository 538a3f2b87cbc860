"""Connects the engine to a worker's shards: Kafka messages in, a producer's outputs out, and the shard's own
state.

Responsible for: `ShardRunner`, one running shard with its position and its inputs; and telling the engine
which exceptions are caused by the worker, and not by a record. `fcluster.engine` decides what happens to a
record.

Must not: know epochs, transactions or the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

from fcluster.common.clocks import wall_ms
from fcluster.common.failures import Failure
from fcluster.common.ids import ShardId
from fcluster.common.letter_counts import decode_counts, encode_counts
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.engine.changelog import Delta
from fcluster.engine.clock import EventClock
from fcluster.engine.failure import Condemnation
from fcluster.engine.firing import TimerRunner, make_timers
from fcluster.engine.loading import loaded_marks, unloaded_inputs
from fcluster.engine.records import OutputPort, Produce, TimerRecord, describe_record
from fcluster.engine.runner import HandlerError, StageRunner, UnreadableRecordError
from fcluster.engine.state import ShardState
from fcluster.engine.steps import Place, RecordError
from fcluster.engine.watermarks import OwnRecord, make_clock
from fcluster.graph.stages import Stage
from fcluster.storage.store import LOCAL_TROUBLE
from fcluster.worker.core.model import Condemned, RecordAt
from fcluster.worker.transactions import TransactionLostError

__all__ = [
    "Failure",
    "HandlerError",
    "InputRunner",
    "OutputPort",
    "Produce",
    "RecordError",
    "ShardRunner",
    "UnreadableRecordError",
    "describe_record",
    "running_step",
]

NOT_THE_RECORDS_DOING: tuple[type[BaseException], ...] = (TransactionLostError, *LOCAL_TROUBLE)
"""Exceptions that `InputRunner.handle` passes on unchanged, whatever `on_error` says. KeyboardInterrupt isn't
one of them: a worker handles SIGINT, so a KeyboardInterrupt raised in a handler is the handler's own.
"""


class InputRunner(StageRunner):
    """One input of a running shard: its position, and the function that processes its records.

    Attributes:
        shard: the shard that it belongs to.
        topic: the topic that it reads.
        last: the newest record processed since the last barrier. None if there is none.
        begun_at: the offset at the last barrier. `next_offset` is the current one.
        topic_id: the id of the topic; see `CommittedPosition`.
        read_position: the position of reading, including control records.
        end: where the partition ends. -1 if unknown.
        end_at_start: where it ended when that was first known. -1 before.
        stop_at: in a bounded run, the first record that isn't processed. None: not known, or there is none.
        announced: the offsets at which the process may end; see `announce`.
        generation: records of earlier generations of the assignment aren't for this runner.
    """

    __slots__ = (
        "announced",
        "begun_at",
        "end",
        "end_at_start",
        "generation",
        "last",
        "read_position",
        "shard",
        "stop_at",
        "topic",
        "topic_id",
    )

    def __init__(
        self,
        stage: Stage,
        partition: int,
        state: ShardState,
        at: InputOffset,
        port: OutputPort,
        number: int,
        clock: EventClock | None,
        timers: TimerRunner | None,
    ) -> None:
        super().__init__(stage, partition, state.tables, port, NOT_THE_RECORDS_DOING, number, clock, timers)
        self.shard = ShardId(stage.name, partition)
        self.topic = stage.topics[number]
        self.topic_id = at.topic_id
        self.begun_at = self.read_position = at.offset
        self.end = self.end_at_start = -1
        self.stop_at: int | None = None
        self.generation = 0
        self.announced = range(0)
        self.last: Any = None

    @property
    def next_offset(self) -> int:
        """The next record to process."""
        return self.begun_at if self.last is None else self.last.offset() + 1

    @property
    def has_loaded(self) -> bool:
        """Whether everything is processed that it had when it was started. Don't call it within a record."""
        if self.end_at_start < 0:
            self.end_at_start = self.end
        read_to = max(self.read_position, self.next_offset)
        return self.is_read or 0 <= self.end_at_start <= read_to

    @property
    def is_read(self) -> bool:
        """Whether it is read to the end of a bounded run."""
        return self.stop_at is not None and max(self.read_position, self.next_offset) >= self.stop_at

    def passed(self, record: Any) -> None:
        """See `StageRunner.passed`: the record counts as processed, even if what follows fails."""
        self.last = record

    def announce(self, offsets: range, run: Callable[[Any, Callable[[Any], None]], None]) -> None:
        """Make `run(record, handle)` process the records at these offsets, after the condemned ones."""
        inner = self.handle
        self.announced = offsets

        def announcing(record: Any) -> None:
            if record.offset() in offsets:
                run(record, inner)
            else:
                inner(record)
            if record.offset() >= offsets[-1]:
                self.handle = inner

        if offsets:
            self.handle = announcing

    def stop_before(self, offset: int, failure: Failure) -> None:
        """Process no record at `offset` or later: `UnreadableRecordError(failure)` is raised there."""
        self.condemn(offset, Condemnation(failure))

    def freeze(self) -> InputOffset:
        """The epoch ends here. Returns the position."""
        self.begun_at, self.last = self.next_offset, None
        time = "" if self.clock is None else self.clock.encode(self.number)
        return InputOffset(self.begun_at, self.topic_id, time)


class ShardRunner:
    """One running shard: its position, its state, and the runners that process its inputs.

    Args:
        wall_ms: processing time, in milliseconds since 1970.
        job_start: the number of the job's start; 0 if it doesn't need it.

    Attributes:
        position: the committed position from which it started, or that it last froze. The inputs have the
            current one.
        inputs: in the stage's order.
        clock: its event time; None if the job doesn't use event time.
        timers: its handlers' timers. None if they set none.
        unloaded: see `loading.unloaded_inputs`.
    """

    __slots__ = (
        "_fired_after",
        "_job_start",
        "_letters",
        "_loading",
        "clock",
        "inputs",
        "position",
        "shard",
        "stage",
        "state",
        "timers",
        "unloaded",
    )

    def __init__(
        self,
        stage: Stage,
        partition: int,
        state: ShardState,
        position: CommittedPosition,
        port: OutputPort,
        wall_ms: Callable[[], int] = wall_ms,
        job_start: int = 0,
    ) -> None:
        self.stage = stage
        self.shard = ShardId(stage.name, partition)
        self.state = state
        self.position = position
        self.clock = make_clock(stage, position)
        self._fired_after = -1
        self._loading = {number for number, _step in stage.broadcasts}
        """The inputs with rows of global tables, until it is told that they are read."""
        self._job_start = job_start
        self._letters = port.letters.of(self.shard)
        self._letters.restore(decode_counts(position.letters, job_start, stage.dead_letter_names))
        self.unloaded = unloaded_inputs(stage, state.tables, job_start)
        self.timers = make_timers(
            stage,
            partition,
            state.tables,
            port,
            NOT_THE_RECORDS_DOING,
            self.clock,
            wall_ms,
            lambda: self.inputs[0].next_offset,
            self.unloaded,
        )
        self.inputs = tuple(
            InputRunner(stage, partition, state, at, port, number, self.clock, self.timers)
            for number, at in enumerate(position.inputs)
        )

    @property
    def is_touched(self) -> bool:
        """Whether a record was processed or a timer has fired since the last barrier."""
        return self._fired_after == self.position.epoch or any(one.last is not None for one in self.inputs)

    def take_fired(self) -> int:
        """How many timers have fired since the last call."""
        if self.timers is None or not self.timers.fired:
            return 0
        fired, self.timers.fired = self.timers.fired, 0
        self._fired_after = self.position.epoch
        return fired

    def freeze(self, epoch: int, fingerprint: str) -> Delta | None:
        """End the open epoch, which commits `position`. Returns the delta, None if no state has changed.

        Raises:
            ProcessingError: a state can't be stored.
        """
        delta = self.state.freeze(epoch)
        first, *further = [one.freeze() for one in self.inputs]
        if delta is not None:
            named = zip(self.stage.topics[1:], further, strict=True)
            offsets = {topic: at.offset for topic, at in named}
            delta = replace(delta, source_offset=first.offset, further_offsets=offsets)
        self.position = CommittedPosition(
            offset=first.offset,
            epoch=epoch,
            state_epoch=self.position.state_epoch if delta is None else epoch,
            fingerprint=fingerprint,
            topic_id=first.topic_id,
            further=tuple(further),
            clock=first.clock,
            letters=encode_counts(self._job_start, self.stage.dead_letter_names, self._letters.counts),
        )
        return delta

    @property
    def has_loaded(self) -> bool:
        """Whether the stages downstream have to be told that it has read what its global tables had."""
        return bool(self._loading) and all(self.inputs[number].has_loaded for number in self._loading)

    def take_loaded_marks(self, sizes: Mapping[str, int]) -> list[OwnRecord]:
        """What has to be told of its global tables in this epoch. It counts as told.

        Args:
            sizes: how many shards each stage has.
        """
        if not self.has_loaded:
            return []
        self._loading.clear()
        return loaded_marks(self.stage, self.shard.partition, sizes, self._job_start)

    def newest(self) -> RecordAt | None:
        """The newest record since the last barrier, if all processed records are from one input."""
        touched = [one for one in self.inputs if one.last is not None]
        if len(touched) != 1:
            return None
        return RecordAt(self.shard, touched[0].last.offset(), touched[0].number)

    def condemn(self, record: Condemned) -> None:
        """See `StageRunner.condemn` and `TimerRunner.condemn`."""
        if record.condemnation.is_of_timer:
            if self.timers is not None:
                self.timers.condemn(record.condemnation)
        elif record.input < len(self.inputs):
            self.inputs[record.input].condemn(record.offset, record.condemnation)

    def find_unkept(self) -> Condemnation | None:
        """See `StageRunner.find_unkept`."""
        return self.inputs[0].find_unkept()


def running_step(frame: FrameType | None) -> str:
    """The name of the step that a thread is running, for `Condemnation.step`. "" if it runs none.

    Args:
        frame: the thread's innermost frame, as `sys._current_frames` returns it.
    """
    while frame is not None:
        if step := step_of(frame):
            return step
        frame = frame.f_back
    return ""


def step_of(frame: FrameType) -> str:
    """The name of the step whose operator this frame belongs to, "" if there is none."""
    if frame.f_globals.get("__name__", "").startswith("fcluster.engine.operators."):
        timer = frame.f_locals.get("timer_record")
        if isinstance(timer, TimerRecord):
            return timer.title
        place = frame.f_locals.get("rekey_place") or frame.f_locals.get("place")
        if isinstance(place, Place):
            return place.name
    return ""
