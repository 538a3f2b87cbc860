"""The records of a join of two streams that may still find a partner, in one shard.

Responsible for: `OpenPairs`, over the tables that `kinds.make_pair_tables` makes: which records are kept, and
when one of them has stayed alone for good. For `firing` it is a `TimedStep`, like `windows.OpenWindows`. The
operator (`operators.stream_join`) fills it and looks partners up. Pure.

    left, right   end (8 bytes) | key of the stream   ->  [[timestamp, value as bytes, has a partner], ...]
    due           closing time (8 bytes) | ended key of the stream | what is due   ->  nothing

Records are kept in stretches of time, which are as long as the interval of the join. So the partners of a
record are in two stretches at most, and are found without a scan. A stretch is identified by its end.

Invariants:
- A record closes when its time and the interval behind it have passed. It is open while event time hasn't
  passed its closing and the grace. Two records become a pair if both are open when the later one comes.
  Event time alone decides that, whether a record is still stored or not. A record that has closed stays
  closed, with a longer grace after a restart, too; see `grace`.
- There is a note in `due` for each time at which records of a key are alone, if the join passes those on, and
  for the end of each stretch. What they stand for is removed in the same epoch (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.grace import closed_floor
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time, ended, take_ended
from fcluster.engine.records import OutputPort
from fcluster.engine.sessions import AnyWindows
from fcluster.engine.timers import ReadAhead, Timer, time_text
from fcluster.engine.windows import BEHIND_ALL, ClockInEventTime
from fcluster.graph.joins import Side
from fcluster.graph.operators import JoinStreams
from fcluster.graph.timers import TimerClock

ALONE: Final[Mapping[Side, str]] = {"left": "left", "right": "right"}
"""What is due when a record has found no partner: the name of its timer."""
OVER: Final[Mapping[Side, str]] = {"left": "left over", "right": "right over"}
"""What is due when a stretch can be removed. At the same time it comes after `ALONE`."""
_SIDE_OF: Final[Mapping[str, Side]] = {
    **{name: side for side, name in ALONE.items()},
    **{name: side for side, name in OVER.items()},
}


class OpenPairs:
    """The open records of both sides of a join.

    Args:
        join: either side's step.
        tables: the shard's tables, by the name of the store.
        clock: the shard's event time.
        noted: called with the clock and time of each timer that is set.
        port: counts late records.

    Attributes:
        sides: the table of each side.
        due: the table of notes.
        clock: the shard's event time.
        port: counts late records.
        floor_ms: what has closed for good, by its closing; see `grace.closed_floor`.
    """

    def __init__(
        self,
        join: JoinStreams,
        tables: Mapping[str, Any],
        clock: ClockInEventTime,
        noted: Callable[[TimerClock, int], None],
        port: OutputPort,
    ) -> None:
        self.step = join.name
        self.clock = clock
        self.port = port
        self.sides: Mapping[Side, EntryTable] = {
            "left": cast("EntryTable", tables[join.store.left_name]),
            "right": cast("EntryTable", tables[join.store.right_name]),
        }
        self.due = cast("EntryTable", tables[join.store.due_name])
        self._open_ms: Mapping[Side, int] = {"left": join.open_ms("left"), "right": join.open_ms("right")}
        self._grace_ms = join.grace_ms
        kept_grace = cast("EntryTable", tables[join.store.grace_name])
        self.floor_ms = closed_floor(kept_grace, join.grace_ms, clock.now_ms)
        self._noted = noted
        self._ahead = ReadAhead(b"", BEHIND_ALL, self._entry_of, self._timer_of)

    def note(self, key: bytes, timestamp_ms: int, name: str) -> None:
        """Something is due when a record of this time has closed, and isn't noted yet."""
        timer = Timer(timestamp_ms + self._open_ms[_SIDE_OF[name]] + self._grace_ms + 1, key, name)
        self.due.put_new(self._entry_of(timer), b"")
        self._ahead.add(timer)
        self._noted("event", timer.at_ms)

    def forget(self, key: bytes, timestamp_ms: int, name: str) -> None:
        """What was noted isn't due any more, or is done."""
        self.due.delete(_due_key(timestamp_ms + self._open_ms[_SIDE_OF[name]], key, name))

    # --- for `firing` ---------------------------------------------------------------------------------

    def first(self, clock: TimerClock) -> Timer | None:
        """See `firing.TimedStep`."""
        return self._ahead.first(self.due, self._is_due) if clock == "event" else None

    def _is_due(self, timer: Timer) -> bool:
        return self.due.get(self._entry_of(timer)) is not ABSENT

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: its function removes it, which is undone if that fails."""

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: it exists again."""

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.forget(timer.key, self.timestamp_ms(timer), timer.name)

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        what = f"{TIMER_STEP}{timer.name!r} of the join {self.step!r}"
        return f"{what} for the key {bounded_repr(timer.key)} at {time_text(self.timestamp_ms(timer))}"

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`: that of the record, or the last one of the stretch."""
        return timer.at_ms - self._grace_ms - 1 - self._open_ms[_SIDE_OF[timer.name]]

    def _entry_of(self, timer: Timer) -> bytes:
        return _due_key(timer.at_ms - self._grace_ms - 1, timer.key, timer.name)

    def _timer_of(self, entry: bytes) -> Timer:
        key, name_at = take_ended(entry, TIME_BYTES)
        return Timer(decode_time(entry) + self._grace_ms + 1, key, entry[name_at:].decode())


def _due_key(closes_ms: int, key: bytes, name: str) -> bytes:
    """In the order of the timers. The grace isn't in it, so that it may change between two runs."""
    return encode_time(closes_ms) + ended(key) + name.encode()


AnyOpen = AnyWindows | OpenPairs
"""What is open in a step until event time has come far enough."""
