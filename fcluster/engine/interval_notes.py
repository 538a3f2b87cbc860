"""When a step of windows passes results on at intervals, in one shard.

Responsible for: `IntervalNotes`. For `firing`, a note is a timer by the clock of the step. What is passed on
then is known to those who keep the windows: `interval_windows`, `interval_parts`, `interval_gathered`,
`interval_sessions`, `interval_sliding`, `interval_counted`. Pure.

    time (8 bytes) | key of the stream   ->  what those who keep the windows note

Invariants:
- When a record changes a window, a result is noted for the next multiple of the interval by that clock,
  after the window's start, unless one is noted for that time or before it. So a window that doesn't change
  passes nothing on, and no result has a time before its window.
- Records may come while results are due (see `firing`). A result that is due is that of the window as it was
  then: before a record changes the window, this is kept apart. So it doesn't depend on batches.
- A note is removed with its results, or when the last of its windows closes: whichever comes first
  (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time
from fcluster.engine.timers import ReadAhead, Timer, time_text
from fcluster.engine.windows import BEHIND_ALL, StepInShard
from fcluster.graph.timers import TimerClock

RESULT: Final = "result"
"""The name of the timer that passes results on. At the same time and key, it comes after `windows.CLOSE`."""


class IntervalNotes:
    """The notes of a step. For `firing`, it is a `TimedStep`.

    Args:
        step: the step.
        forget: called with the key and time of results that have failed and are given up.
        ahead_ms: results are passed on so much earlier than event time reaches what is noted.
    """

    def __init__(self, step: StepInShard, forget: Callable[[bytes, int], None], ahead_ms: int = 0) -> None:
        window = step.window
        self._step = window.name
        self._interval_ms = window.interval_ms
        self._table = cast("EntryTable", step.tables[window.store.notes_name])
        self._clock = step.clock
        self._goes_by: TimerClock = window.clock
        self._noted = step.noted
        self._forget = forget
        self._ahead_ms = ahead_ms
        self._read_ahead = ReadAhead(b"", BEHIND_ALL, self._note_of, self._timer_of)

    def next_ms(self, start_ms: int, timestamp_ms: int) -> int:
        """When a window's result is passed on.

        Args:
            start_ms: of the window.
            timestamp_ms: of the record that has changed it.
        """
        now_ms = self._clock.now_ms
        now_ms = timestamp_ms if now_ms is None else max(0, now_ms + self._ahead_ms, start_ms)
        return now_ms - now_ms % self._interval_ms + self._interval_ms

    def is_due(self, at_ms: int) -> bool:
        """Whether what is noted for that time is to be passed on without the present record. 0: nothing is
        noted.
        """
        now_ms = self._clock.now_ms
        return now_ms is not None and 0 < at_ms <= now_ms + self._ahead_ms

    def get(self, key: bytes, at_ms: int) -> Any:
        """What is noted for that time, or `ABSENT`."""
        return self._table.get(encode_time(at_ms) + key)

    def note(self, key: bytes, at_ms: int, value: Any = b"") -> None:
        """Note that results of the key are passed on then."""
        note = encode_time(at_ms) + key
        timer = self._timer_of(note)
        self._table.put(note, value)
        self._read_ahead.add(timer)
        self._noted(self._goes_by, timer.at_ms)

    def delete(self, key: bytes, at_ms: int) -> None:
        """Nothing of the key is passed on then any more."""
        self._table.delete(encode_time(at_ms) + key)

    # --- for `firing` ---------------------------------------------------------------------------------

    def first(self, clock: TimerClock) -> Timer | None:
        """See `firing.TimedStep`."""
        return self._read_ahead.first(self._table, self._is_noted) if clock == self._goes_by else None

    def _is_noted(self, timer: Timer) -> bool:
        return self._table.get(self._note_of(timer)) is not ABSENT

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: its function removes the note, which is undone if that fails."""

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: it is noted as before."""

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self._forget(timer.key, self.timestamp_ms(timer))

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        return (
            f"{TIMER_STEP}that passes on the windows {self._step!r} at {time_text(self.timestamp_ms(timer))} "
            f"for the key {bounded_repr(timer.key)}"
        )

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`: what is noted."""
        return timer.at_ms + self._ahead_ms

    def _note_of(self, timer: Timer) -> bytes:
        return encode_time(self.timestamp_ms(timer)) + timer.key

    def _timer_of(self, note: bytes) -> Timer:
        return Timer(decode_time(note) - self._ahead_ms, note[TIME_BYTES:], RESULT)
