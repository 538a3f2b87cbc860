"""The counted windows of a step that passes results on at intervals, in one shard.

Responsible for: `CountedAtIntervals`: for which windows a result is due at the next interval. The operator
(`operators.counted`) fills windows and passes results on. See `interval_notes` for when. Pure.

    counted   key of the stream                    ->  as in `operators.counted`; a window has behind what it
                                                       keeps when its result is noted, or 0
    results   time (8 bytes) | key of the stream   ->  nothing: there are results for that time

A window closes with a record, and its last result would overtake one that is due. So records of the shard
wait until all results that are due are passed on (`firing`), and nothing has to be kept apart.
"""

from __future__ import annotations

from typing import Any

from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.windows import StepInShard

_EARLIEST, _NOTED = 1, 4
"""What there is of a window, among other things."""


class CountedAtIntervals:
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        self._table = step.table
        self.notes = self._notes = IntervalNotes(step, self._forget)

    def changed(self, key: bytes, windows: list[list[Any]], timestamp_ms: int) -> None:
        """A record of that time was added to all of these windows, which are those of the key."""
        for window in windows:
            at_ms, former_ms = self._notes.next_ms(window[_EARLIEST], timestamp_ms), window[_NOTED]
            if former_ms and former_ms <= at_ms:
                continue
            window[_NOTED] = at_ms
            self._drop(key, windows, former_ms)
            self._notes.note(key, at_ms)

    def full(self, key: bytes, window: list[Any], others: list[list[Any]]) -> None:
        """The window is full. Its result isn't noted any more."""
        self._drop(key, others, window[_NOTED])

    def take_noted(self, key: bytes, at_ms: int) -> list[list[Any]]:
        """The windows of the key whose results are noted for that time, oldest first. They are noted no
        longer.
        """
        _since, windows = self._table.get(key)
        taken = [window for window in windows if window[_NOTED] == at_ms]
        for window in taken:
            window[_NOTED] = 0
        self._notes.delete(key, at_ms)
        return taken

    def _forget(self, key: bytes, at_ms: int) -> None:
        self.take_noted(key, at_ms)

    def _drop(self, key: bytes, windows: list[list[Any]], at_ms: int) -> None:
        """Remove a note of the key, unless one of these windows has a result for that time."""
        if at_ms and all(window[_NOTED] != at_ms for window in windows):
            self._notes.delete(key, at_ms)
