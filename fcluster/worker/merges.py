"""Puts the records of a shard with several inputs into processing order.

Responsible for: the records of such a shard that were read and wait to be processed (`ShardMerge`), and the
limit on them. `fcluster.engine.merging` decides the order. The next records leave here as a batch, which is
processed like a batch from a reader. Belongs to the main thread.

Must not: process records, or know of epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from confluent_kafka import Message

from fcluster.engine.merging import InputMerge
from fcluster.engine.stamps import OrderMs
from fcluster.worker.consuming import Batch, SourceReader
from fcluster.worker.processing import InputRunner

HELD_ABOVE_RECORDS: Final = 20_000
HELD_ABOVE_BYTES: Final = 8 * 1024 * 1024
"""If more records of an input wait than this, reading that input is paused. A pause discards what the client
has fetched ahead, so it shouldn't happen often.
"""
RELEASED_BELOW: Final = 0.2
"""Reading resumes when less than this share of the limit waits."""
BATCH_RECORDS_MAX: Final = 1_000
ORDERED: Final = 0
OUTDATED: Final = 1
"""Generations of batches. They are outdated once the shard is no longer read."""


class _Bound:
    """How much of an input waits, and whether its reading is paused."""

    __slots__ = ("held", "size_bytes")

    def __init__(self) -> None:
        self.held = False
        self.size_bytes = 0


class ShardMerge:
    """The inputs of one running shard.

    Args:
        inputs: the shard's inputs.
        readers: the reader of each input.
        idle_ms: `max.task.idle.ms`.
        precedence: see `Stage.precedence`. None: the order of the inputs.
        orders, unloaded: see `InputMerge`.

    Attributes:
        held: no records leave for now, because the shard is too far ahead of others; see `drift`.
    """

    def __init__(
        self,
        inputs: Sequence[InputRunner],
        readers: Sequence[SourceReader],
        idle_ms: int,
        precedence: Sequence[int] | None = None,
        orders: Sequence[OrderMs] | None = None,
        unloaded: Callable[[], Collection[int]] | None = None,
    ) -> None:
        self._inputs = inputs
        self._readers = readers
        self._merge = InputMerge(len(inputs), idle_ms, precedence, orders, unloaded)
        self._number_of = {one.topic: one.number for one in inputs}
        self._bounds = [_Bound() for _ in inputs]
        self._positions = [one.begun_at for one in inputs]
        self._given = False
        self.newest_generation = ORDERED
        self.held = False

    def add(self, number: int, messages: Sequence[Message]) -> None:
        """The next records that were read from this input."""
        self._merge.add(number, messages)
        bound = self._bounds[number]
        bound.size_bytes += _size_bytes(messages)
        full = self._merge.count(number) > HELD_ABOVE_RECORDS or bound.size_bytes > HELD_ABOVE_BYTES
        if full and not bound.held:
            bound.held = True
            self._readers[number].hold(self._partition(number))

    def note(self, number: int, position: int, end: int | None) -> None:
        """All records before `position` were added. The partition ends at `end`, as far as is known."""
        self._merge.note(number, position, end)
        self._positions[number] = position
        if end is not None:
            self._inputs[number].end = end
        self._note_read(number)

    def _note_read(self, number: int) -> None:
        """If nothing waits, everything that was read has been processed."""
        if self.newest_generation == ORDERED and not self._given and not self._merge.count(number):
            self._inputs[number].read_position = self._positions[number]

    def next_batch(self, now_ms: float) -> Batch | None:
        """The next records to process. None if they aren't known yet, or if the last batch isn't done."""
        if self._given or self.held:
            return None
        messages: list[Message] = self._merge.take(now_ms, BATCH_RECORDS_MAX)  # type: ignore[assignment]
        if not messages:
            return None
        self._given = True
        self._forget(messages)
        return Batch(self, self.newest_generation, messages, full=len(messages) == BATCH_RECORDS_MAX)

    def _forget(self, messages: Sequence[Message]) -> None:
        """These records no longer wait. Resume reading where there is room again."""
        for message in messages:
            self._bounds[self._number_of[message.topic() or ""]].size_bytes -= len(message)
        for number, bound in enumerate(self._bounds):
            if (
                bound.held
                and self._merge.count(number) < RELEASED_BELOW * HELD_ABOVE_RECORDS
                and bound.size_bytes < RELEASED_BELOW * HELD_ABOVE_BYTES
            ):
                bound.held = False
                self._readers[number].release(self._partition(number))

    def done(self) -> None:
        """See `BatchSource.done`."""
        self._given = False
        for number in range(len(self._inputs)):
            self._note_read(number)

    def due_ms(self) -> float | None:
        """When there may be another batch although nothing is read. None: never."""
        return None if self._given or self.held else self._merge.due_ms()

    def close(self) -> None:
        """The shard is no longer read. Its batches are outdated."""
        self.newest_generation = OUTDATED

    def _partition(self, number: int) -> tuple[str, int]:
        return self._inputs[number].topic, self._inputs[number].partition


def _size_bytes(messages: Sequence[Message]) -> int:
    return sum(map(len, messages))
