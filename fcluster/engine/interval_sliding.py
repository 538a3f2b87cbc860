"""The sliding windows of a step that passes results on at intervals, in one shard.

Responsible for: `OpenSlidingAtIntervals`: for which windows a result is due at the next interval. The
operator (`operators.sliding`) computes the results and passes them on. See `interval_notes` for when. Pure.

    sliding   key of the stream                    ->  [closed, noted, [record, ...], [result, ...]]; see
                                                       `engine.sliding`
    result    [end, time]                          that is noted: the end of its window, and for when
              [end, time, [record, ...]]           the same, if it is due and records have come since: what
                                                   was in the window
    due       end (8 bytes) | key of the stream    ->  nothing, see `engine.sliding`
    results   time (8 bytes) | key of the stream   ->  nothing: there are results for that time
"""

from __future__ import annotations

from typing import Any, Final

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.sliding import RECORDS, Kept, OpenSliding
from fcluster.engine.windows import StepInShard

_RESULTS: Final = 3
"""Where the results of a key are noted, in its entry."""
_END, _AT, _FORMER = range(3)
"""What is noted of a result."""


class OpenSlidingAtIntervals(OpenSliding):
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        self.notes = self._notes = IntervalNotes(step, self._forget)

    def _new_entry(self) -> list[Any]:
        return [*super()._new_entry(), []]

    def changing(self, key: bytes) -> None:
        """A record of the key is about to be kept. Results that are due are kept apart."""
        entry = self.table.get(key)
        if entry is ABSENT:
            return
        for result in entry[_RESULTS]:
            if len(result) == _FORMER and self._notes.is_due(result[_AT]):
                result.append(self.records_of(entry[RECORDS], result[_END]))

    def changed(self, key: bytes, timestamp_ms: int) -> None:
        """A record of that time was kept."""
        entry = self.table.get(key)
        results = entry[_RESULTS]
        noted = {result[_END] for result in results if len(result) == _FORMER}
        for end_ms in self.changed_by(entry[RECORDS]):
            if end_ms not in noted:
                at_ms = self._notes.next_ms(self.start_of(end_ms), timestamp_ms)
                results.append([end_ms, at_ms])
                self._notes.note(key, at_ms)

    def take_noted(self, key: bytes, at_ms: int) -> list[tuple[int, list[Kept]]]:
        """The windows of the key whose results are noted for that time, by end, and the records in them. They
        are noted no longer.
        """
        entry = self.table.get(key)
        taken = sorted(result for result in entry[_RESULTS] if result[_AT] == at_ms)
        entry[_RESULTS] = [result for result in entry[_RESULTS] if result[_AT] != at_ms]
        self._notes.delete(key, at_ms)
        return [
            (end_ms, former[0] if former else self.records_of(entry[RECORDS], end_ms))
            for end_ms, _at_ms, *former in taken
        ]

    def take_out(self, key: bytes, end_ms: int) -> list[Kept]:
        """See `OpenByKey`. Nothing is noted of the window any more."""
        entry = self.table.get(key)
        noted = sorted({result[_AT] for result in entry[_RESULTS] if result[_END] == end_ms})
        results = entry[_RESULTS] = [result for result in entry[_RESULTS] if result[_END] != end_ms]
        for at_ms in noted:
            if all(result[_AT] != at_ms for result in results):
                self._notes.delete(key, at_ms)
        return super().take_out(key, end_ms)

    def _forget(self, key: bytes, at_ms: int) -> None:
        self.take_noted(key, at_ms)
