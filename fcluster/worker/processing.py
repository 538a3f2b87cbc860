"""Binds the engine to a worker's shards: Kafka messages in, a producer's outputs out, and the shard's own
state.

Responsible for: `ShardRunner`, one running shard with its position; and telling the engine which exceptions
are the worker's own trouble, not a record's. `fcluster.engine` decides what happens to a record.

Must not: know epochs, transactions or the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

from fcluster.common.positions import CommittedPosition
from fcluster.common.topology import Stage
from fcluster.engine.failure import Failure
from fcluster.engine.records import OutputPort, Produce, describe_record
from fcluster.engine.runner import HandlerError, StageRunner, UnreadableRecordError
from fcluster.engine.state import ShardState
from fcluster.engine.steps import Place, RecordError
from fcluster.worker.store import LOCAL_TROUBLE
from fcluster.worker.transactions import TransactionLostError

__all__ = [
    "Failure",
    "HandlerError",
    "OutputPort",
    "Produce",
    "RecordError",
    "ShardRunner",
    "UnreadableRecordError",
    "describe_record",
    "running_step",
]

NOT_THE_RECORDS_DOING: tuple[type[BaseException], ...] = (TransactionLostError, *LOCAL_TROUBLE)
"""Exceptions that `ShardRunner.handle` passes on unchanged, whatever `on_error` says. KeyboardInterrupt isn't
one of them: a worker handles SIGINT, so one that is raised in a handler is the handler's."""


class ShardRunner(StageRunner):
    """One running shard: its position, its state, and the function that processes its records.

    Attributes:
        last: the newest record processed since the last barrier. None if there is none.
        position: the committed position that it started from or last froze. `next_offset` says where it is
            now.
        read_position: how far reading has come, including control records.
        generation: records of earlier generations of the assignment aren't for this runner.
    """

    __slots__ = ("end", "generation", "last", "position", "read_position", "state", "topic")

    def __init__(
        self, stage: Stage, partition: int, state: ShardState, position: CommittedPosition, port: OutputPort
    ) -> None:
        super().__init__(stage, partition, state.tables, port, NOT_THE_RECORDS_DOING)
        self.topic = stage.source.name
        self.state = state
        self.position = position
        self.read_position = position.offset
        self.end = -1
        self.generation = 0
        self.last: Any = None

    @property
    def next_offset(self) -> int:
        """The next record to process."""
        return self.position.offset if self.last is None else self.last.offset() + 1

    def announce(self, offsets: range, run: Callable[[Any, Callable[[Any], None]], None]) -> None:
        """Let `run(record, handle)` process the records at these offsets, after those that are condemned."""
        inner = self.handle

        def announcing(record: Any) -> None:
            if record.offset() in offsets:
                run(record, inner)
            else:
                inner(record)
            if record.offset() >= offsets[-1]:
                self.handle = inner

        if offsets:
            self.handle = announcing

    def stop_before(self, offset: int, reason: str) -> None:
        """Process nothing from `offset` on: `UnreadableRecordError(reason)` is raised there."""
        self.condemn(offset, Failure(reason))


def running_step(frame: FrameType | None) -> str:
    """The name of the step that a thread is in, for `Failure.step`. "" if it is in none.

    Args:
        frame: the thread's innermost frame, as `sys._current_frames` returns it.
    """
    while frame is not None:
        if step := step_of(frame):
            return step
        frame = frame.f_back
    return ""


def step_of(frame: FrameType) -> str:
    """The name of the step whose operator this very frame is in, "" if it is in none."""
    if frame.f_globals.get("__name__", "").startswith("fcluster.engine.operators."):
        place = frame.f_locals.get("rekey_place") or frame.f_locals.get("place")
        if isinstance(place, Place):
            return place.name
    return ""
