"""The open windows of all records in the shard that puts their parts together, if results are passed on at
intervals.

Responsible for: `OpenGatheredAtIntervals`: which parts are in the result of which interval. The operator
(`operators.gather`) puts them together and passes results on. Pure.

    windows   end (8 bytes)    ->  [what is put together so far, [[time, part], ...]]
    due       time (8 bytes)   ->  the ends of the windows with parts of that time

A part has as its timestamp the time at which it was passed on. The last one, which is passed on when its
window closes, has the time when it does.

Invariants:
- The result of an interval consists of the parts up to its time, from all shards. It is passed on when all
  shards have passed that time. Windows hold back the event time that is told to stages behind by their grace,
  so that is by the grace before event time here is so far.
- So what is in a result depends only on what each shard has read, not on which of their parts came first.
- A part whose time has passed all the same belongs to the next interval: its shard was left out as idle.
"""

from __future__ import annotations

from typing import Any

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.timers import Timer
from fcluster.engine.windows import OpenWindows, StepInShard
from fcluster.graph.windows import Gathered

Part = dict[str, Any]
_NO_KEY = b""


class OpenGatheredAtIntervals(OpenWindows):
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        gathered = step.window.windows
        assert isinstance(gathered, Gathered)
        self.notes = self._notes = IntervalNotes(step, self._forget, gathered.windows.grace_ms)

    def hold(self, end_ms: int, window: list[Any], part: Part, at_ms: int) -> None:
        """A part of that time has come, of the window with that end."""
        if self._notes.is_due(at_ms):
            at_ms = self._notes.next_ms(0, at_ms)
        window[1].append([at_ms, part])
        ends = self._notes.get(_NO_KEY, at_ms)
        if ends is ABSENT:
            self._notes.note(_NO_KEY, at_ms, [end_ms])
        elif end_ms not in ends:
            ends.append(end_ms)

    def take_noted(self, at_ms: int) -> list[tuple[int, list[Any], list[Part]]]:
        """The windows with parts of that time, by end: what is put together of each so far, and the parts
        that are to be added. They are no longer held.
        """
        ends = sorted(self._notes.get(_NO_KEY, at_ms))
        self._notes.delete(_NO_KEY, at_ms)
        return [(end_ms, *self._take_parts(self.table.get(encode_time(end_ms)), at_ms)) for end_ms in ends]

    def take_out(self, end_ms: int) -> tuple[list[Any], list[Part]]:
        """Close the window with that end. Returns what is put together so far, and the other parts."""
        entry = encode_time(end_ms)
        window = self.table.get(entry)
        times = sorted({at_ms for at_ms, _part in window[1]})
        for at_ms in times:
            ends = self._notes.get(_NO_KEY, at_ms)
            if ends is not ABSENT:  # a result of that time may have been given up
                ends.remove(end_ms)
                if not ends:
                    self._notes.delete(_NO_KEY, at_ms)
        self.table.delete(entry)
        return self._take_parts(window, times[-1] if times else 0)

    def _take_parts(self, window: list[Any], until_ms: int) -> tuple[list[Any], list[Part]]:
        together, held = window
        parts = [part for at_ms, part in held if at_ms <= until_ms]
        held[:] = [one for one in held if one[0] > until_ms]
        return together, parts

    def _forget(self, _key: bytes, at_ms: int) -> None:
        """The parts stay, and are in the next result."""
        self._notes.delete(_NO_KEY, at_ms)

    # --- for `firing` ---------------------------------------------------------------------------------

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.take_out(self._end_ms_of(timer))
