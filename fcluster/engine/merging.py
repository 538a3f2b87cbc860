"""Decides which record a shard with several inputs processes next.

The record with the smallest timestamp comes next. If several inputs have the same timestamp, their precedence
decides: tables come first, then the input that is named first. So the order follows from the data, as long as
all inputs have a record in memory.
If an input has none:

- If its end isn't known or not reached, the shard waits for it: the brokers may have more records.
- If it is at its end, the shard waits until the input has been empty for `idle_ms`, then goes on without it.

Before all that, an input that fills a copy of a global table is read alone, until that is loaded.

Within one input, records keep the order of their offsets, whatever their timestamps are. Pure: the shell
reads the records and passes the time in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from fcluster.engine.records import SourceRecord
from fcluster.engine.stamps import OrderMs


def _timestamp_of(record: SourceRecord) -> int:
    return record.timestamp()[1]


class _Waiting:
    """Records of one input that were read but not taken yet, each with its timestamp."""

    __slots__ = ("at_end", "empty_since_ms", "records")

    def __init__(self) -> None:
        self.records: deque[tuple[int, SourceRecord]] = deque()
        self.at_end = False
        self.empty_since_ms: float | None = None


class InputMerge:
    """The records of a shard's inputs, in the order in which to process them.

    Args:
        inputs: the number of inputs.
        unloaded: returns the inputs that are read before the others, as of now; see
            `loading.unloaded_inputs`. None: there are none.
        precedence: the numbers of the inputs, in the order that decides between equal timestamps. None: the
            order of the numbers.
        idle_ms: how long to wait for an input that is at its end; -1: never wait for any input.
        orders: the time of a record, for each input; see `stamps.orders_of`. None: its timestamp.
    """

    def __init__(
        self,
        inputs: int,
        idle_ms: int,
        precedence: Sequence[int] | None = None,
        orders: Sequence[OrderMs] | None = None,
        unloaded: Callable[[], Collection[int]] | None = None,
    ) -> None:
        self._inputs = [_Waiting() for _ in range(inputs)]
        self._in_order = [self._inputs[number] for number in precedence or range(inputs)]
        self._idle_ms = idle_ms
        self._orders = orders or [_timestamp_of] * inputs
        self._unloaded = unloaded

    def add(self, number: int, records: Iterable[SourceRecord]) -> None:
        """The next records that were read from this input."""
        waiting = self._inputs[number]
        order_ms = self._orders[number]
        waiting.records.extend((order_ms(record), record) for record in records)
        waiting.at_end = False
        waiting.empty_since_ms = None

    def note(self, number: int, position: int, end: int | None) -> None:
        """All records before `position` were added. The input ends at `end`, as far as is known.

        An end before the position is outdated, and counts as unknown.
        """
        self._inputs[number].at_end = position == end

    def take(self, now_ms: float, records_max: int) -> list[SourceRecord]:
        """Remove and return the next records, in order.

        Args:
            now_ms: on a clock that never goes back.
            records_max: the most records to return.
        """
        unloaded = self._unloaded_now()
        if unloaded:
            return self._take_of(unloaded, records_max)
        taken: list[SourceRecord] = []
        while len(taken) < records_max:
            first: deque[tuple[int, SourceRecord]] | None = None
            first_ms, has_to_wait = 0, False
            for waiting in self._in_order:
                records = waiting.records
                if not records:
                    has_to_wait |= not self._is_done_without(waiting, now_ms)
                elif first is None or records[0][0] < first_ms:
                    first, first_ms = records, records[0][0]
            if first is None or has_to_wait:
                return taken
            taken.append(first.popleft()[1])
        return taken

    def _unloaded_now(self) -> Collection[int]:
        if self._unloaded is None:
            return ()
        unloaded = self._unloaded()
        if not unloaded:
            self._unloaded = None  # for good
        return unloaded

    def _take_of(self, numbers: Collection[int], records_max: int) -> list[SourceRecord]:
        """The next records of these inputs, which have nothing to do with each other."""
        taken: list[SourceRecord] = []
        for number in sorted(numbers):
            records = self._inputs[number].records
            while records and len(taken) < records_max:
                taken.append(records.popleft()[1])
        return taken

    def _is_done_without(self, waiting: _Waiting, now_ms: float) -> bool:
        if self._idle_ms < 0:
            return True
        if not waiting.at_end:
            waiting.empty_since_ms = None
            return False
        if waiting.empty_since_ms is None:
            waiting.empty_since_ms = now_ms
        return now_ms - waiting.empty_since_ms >= self._idle_ms

    def due_ms(self) -> float | None:
        """When `take` may return something although nothing is added. None: never."""
        if self._unloaded_now() or not any(waiting.records for waiting in self._inputs):
            return None
        due: list[float] = []
        for waiting in self._inputs:
            if not waiting.records:
                if waiting.empty_since_ms is None:
                    return None
                due.append(waiting.empty_since_ms + self._idle_ms)
        return max(due, default=None)

    def count(self, number: int) -> int:
        """How many records of this input are in memory."""
        return len(self._inputs[number].records)
