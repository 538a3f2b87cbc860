"""The open windows of a step that passes results on at intervals, in one shard.

Responsible for: `OpenWindowsAtIntervals`: for which windows a result is due at the next interval. The
operator (`operators.window`) passes the results on. See `interval_notes` for when. Pure.

    windows   end (8 bytes) | key of the stream    ->  what each aggregate keeps, and when a result is noted
    due       time (8 bytes) | key of the stream   ->  the windows whose results are noted then: the end of
                                                       each, or [end, what each aggregate kept] if a record
                                                       has changed it since

A window keeps 0 if no result is noted, also because it closes before the next interval.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.timers import Timer
from fcluster.engine.windows import OpenWindows, StepInShard

NOTED: Final = -1
"""Where a window keeps when its result is noted: behind its aggregates."""


class OpenWindowsAtIntervals(OpenWindows):
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        self.notes = self._notes = IntervalNotes(step, self._forget)

    def changing(self, key: bytes, end_ms: int, kept: list[Any]) -> None:
        """A record is about to change the window, whose result is due. That is kept apart."""
        windows = self._notes.get(key, kept[NOTED])
        windows[windows.index(end_ms)] = [end_ms, deepcopy(kept[:NOTED])]
        kept[NOTED] = 0

    def changed(self, key: bytes, end_ms: int, kept: list[Any], timestamp_ms: int) -> None:
        """A record of that time has changed the window, whose result isn't noted."""
        at_ms = self._notes.next_ms(self._start_of(end_ms), timestamp_ms)
        if at_ms >= end_ms + self._closes_after_ms:
            return  # it closes before: the note would only be removed then
        kept[NOTED] = at_ms
        windows = self._notes.get(key, at_ms)
        if windows is ABSENT:
            self._notes.note(key, at_ms, [end_ms])
        else:
            windows.append(end_ms)

    def take_noted(self, key: bytes, at_ms: int) -> list[tuple[int, list[Any]]]:
        """The windows of the key whose results are noted for that time, by end, and what they keep. They are
        noted no longer.
        """
        found: list[tuple[int, list[Any]]] = []
        noted: Any
        for noted in self._notes.get(key, at_ms):
            if type(noted) is int:
                kept = self.table.get(encode_time(noted) + key)
                kept[NOTED] = 0
                found.append((noted, kept))
            elif self.table.get(encode_time(noted[0]) + key) is not ABSENT:
                # It may have closed, if the grace used to be longer.
                found.append((noted[0], noted[1]))
        self._notes.delete(key, at_ms)
        return sorted(found, key=lambda one: one[0])

    def _forget(self, key: bytes, at_ms: int) -> None:
        self.take_noted(key, at_ms)

    def closing(self, key: bytes, end_ms: int, kept: list[Any]) -> None:
        """The window closes. Its result isn't noted any more."""
        at_ms = kept[NOTED]
        if not at_ms:
            return
        windows = self._notes.get(key, at_ms)
        windows.remove(end_ms)
        if not windows:
            self._notes.delete(key, at_ms)

    # --- for `firing` ---------------------------------------------------------------------------------

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.closing(timer.key, self._end_ms_of(timer), self.table.get(self._entry_of(timer)))
        super().skipped(timer)
