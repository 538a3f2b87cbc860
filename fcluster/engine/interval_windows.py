"""The open windows of a step that passes results on at intervals, in one shard.

Responsible for: `OpenWindowsAtIntervals`: for which windows a result is due at the next interval. The
operator (`operators.window`) passes the results on. Pure.

    windows   end (8 bytes) | key of the stream    ->  what each aggregate keeps, and when a result is noted
    due       time (8 bytes) | key of the stream   ->  the ends of the windows whose results are noted then

Invariants:
- When a record changes a window, a result is noted for the next multiple of the interval in event time,
  after the window's start, unless one is noted already. (The window keeps 0 if none is.) So a window that
  doesn't change passes nothing on, and no result has a time before its window.
- What is noted is removed with its result, or when the window closes: whichever comes first (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time
from fcluster.engine.records import OutputPort
from fcluster.engine.timers import ReadAhead, Timer, time_text
from fcluster.engine.windows import BEHIND_ALL, ClockInEventTime, OpenWindows
from fcluster.graph.operators import Window
from fcluster.graph.timers import TimerClock

RESULT: Final = "result"
"""The name of the timer that passes results on. At the same time and key, it comes after `windows.CLOSE`."""
_NOTED: Final = -1
"""Where a window keeps when its result is noted: behind its aggregates."""


class OpenWindowsAtIntervals(OpenWindows):
    """See the module's docstring, and `OpenInTime` for the arguments."""

    def __init__(
        self,
        window: Window,
        tables: Mapping[str, Any],
        clock: ClockInEventTime,
        noted: Callable[[TimerClock, int], None],
        port: OutputPort,
    ) -> None:
        super().__init__(window, tables, clock, noted, port)
        self._interval_ms = window.interval_ms
        self._notes = cast("EntryTable", tables[window.store.due_name])
        self._notes_ahead = ReadAhead(b"", BEHIND_ALL, _note_of, _timer_of)

    def changed(self, key: bytes, end_ms: int, kept: list[Any], timestamp_ms: int) -> None:
        """A record of that time has changed the window."""
        if kept[_NOTED]:
            return
        now_ms = self.clock.now_ms
        now_ms = timestamp_ms if now_ms is None else max(0, now_ms, self._start_of(end_ms))
        at_ms = now_ms - now_ms % self._interval_ms + self._interval_ms
        kept[_NOTED] = at_ms
        timer = Timer(at_ms, key, RESULT)
        note = _note_of(timer)
        ends = self._notes.get(note)
        if ends is not ABSENT:
            ends.append(end_ms)
            return
        self._notes.put(note, [end_ms])
        self._notes_ahead.add(timer)
        self._noted("event", at_ms)

    def take_noted(self, key: bytes, at_ms: int) -> list[tuple[int, list[Any]]]:
        """The windows of the key whose results are noted for that time, by end, and what they keep. They are
        noted no longer.
        """
        note = encode_time(at_ms) + key
        ends = sorted(self._notes.get(note))
        self._notes.delete(note)
        found = [(end_ms, self.table.get(encode_time(end_ms) + key)) for end_ms in ends]
        for _end_ms, kept in found:
            kept[_NOTED] = 0
        return found

    def closing(self, key: bytes, end_ms: int, kept: list[Any]) -> None:
        """The window closes. Its result isn't noted any more."""
        if not kept[_NOTED]:
            return
        note = encode_time(kept[_NOTED]) + key
        ends = self._notes.get(note)
        ends.remove(end_ms)
        if not ends:
            self._notes.delete(note)

    # --- for `firing` ---------------------------------------------------------------------------------

    def first(self, clock: TimerClock) -> Timer | None:
        """See `firing.TimedStep`."""
        closing = super().first(clock)
        noted = self._notes_ahead.first(self._notes, self._is_noted) if clock == "event" else None
        return min((timer for timer in (closing, noted) if timer is not None), default=None)

    def _is_noted(self, timer: Timer) -> bool:
        return self._notes.get(_note_of(timer)) is not ABSENT

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        if timer.name == RESULT:
            self.take_noted(timer.key, timer.at_ms)
            return
        self.closing(timer.key, self._end_ms_of(timer), self.table.get(self._entry_of(timer)))
        super().skipped(timer)

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        if timer.name != RESULT:
            return super().title(timer)
        return (
            f"{TIMER_STEP}that passes on the windows {self.step!r} at {time_text(timer.at_ms)} for the key "
            f"{bounded_repr(timer.key)}"
        )

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`: when it is passed on, or the last millisecond before the end."""
        return timer.at_ms if timer.name == RESULT else super().timestamp_ms(timer)


def _note_of(timer: Timer) -> bytes:
    return encode_time(timer.at_ms) + timer.key


def _timer_of(note: bytes) -> Timer:
    return Timer(decode_time(note), note[TIME_BYTES:], RESULT)
