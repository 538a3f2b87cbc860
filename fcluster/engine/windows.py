"""The open windows of one step in one shard: which are due, and the aggregates of each.

Responsible for: `OpenInTime`, which windows and sessions share, and `OpenWindows`, over the table that
`kinds.make_window_tables` makes. For `firing`, a window is a timer in event time or, with
`clock="processing"`, in processing time: it is due when that reaches the window's end plus its grace, and for
a session a millisecond later, because a record exactly at its end belongs to it. The operator
(`operators.window`) fills windows and closes the due ones. Pure.

    end (8 bytes) | key of the stream  ->  what each aggregate keeps, in the order of the fields

Invariants:
- A window is open from its first record until it has closed. Event time decides: a record is late for a
  window if event time has reached its end plus its grace, whether the window has already closed or never had
  a record. In processing time no record is late (`engine.processing_time`).
- Windows are due in the order of their ends, then of the key's bytes. They are found by a range scan over all
  layers, so the order doesn't depend on where barriers fell.
- A window that has closed is deleted in the epoch of its result (invariant 6). With a longer grace after a
  restart it stays closed; see `grace`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.grace import closed_floor
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time
from fcluster.engine.records import OutputPort
from fcluster.engine.timers import ReadAhead, Timer, time_text
from fcluster.graph.operators import Window
from fcluster.graph.timers import TimerClock
from fcluster.graph.windows import InTime

if TYPE_CHECKING:
    from fcluster.engine.interval_notes import IntervalNotes

CLOSE: Final = ""
"""The name of the timer that closes a window. No handler's timer has this name."""
BEHIND_ALL: Final = b"\xff" * TIME_BYTES
"""Greater than all keys that begin with a time."""


class ClockInEventTime(Protocol):
    """A shard's event-time clock, or the processing time of a step that goes by it. Implemented by
    `engine.clock.EventClock` and `engine.processing_time.ProcessingTime`.
    """

    @property
    def now_ms(self) -> int | None:
        """Milliseconds since 1970. None before the first record."""
        ...


@dataclass(frozen=True, slots=True)
class StepInShard:
    """A step with windows in one shard: what its open windows are made from.

    Attributes:
        window: the declaration of the step.
        tables: the shard's tables, by the name of the store.
        clock: the shard's event time, or the step's processing time.
        noted: called with the clock and time of each timer that is set.
        port: counts late records.
    """

    window: Window
    tables: Mapping[str, Any]
    clock: ClockInEventTime
    noted: Callable[[TimerClock, int], None]
    port: OutputPort

    @property
    def table(self) -> EntryTable:
        """What is open."""
        return cast("EntryTable", self.tables[self.window.store.name])


class OpenInTime:
    """What is open in a step until its clock is `closes_after_ms` behind its end: windows, sessions.

    For `firing` it is a `TimedStep`.

    Args:
        step: the step.
        due_name: the store whose keys are those of `_entry_of`, in the order in which they are due.

    Attributes:
        table: what is open.
        clock: the time by which it closes.
        goes_by: which clock that is.
        port: counts late records.
        notes: when results are passed on at intervals. None: they aren't.
        floor_ms: what has closed for good, by its end; see `grace.closed_floor`.
    """

    notes: IntervalNotes | None = None

    def __init__(self, step: StepInShard, due_name: str) -> None:
        window = step.window
        self.step = window.name
        self.clock = step.clock
        self.goes_by: TimerClock = window.clock
        self.port = step.port
        self.table = step.table
        self._due = cast("EntryTable", step.tables[due_name])
        self._closes_after_ms = window.closes_after_ms
        kept_grace = cast("EntryTable", step.tables[window.store.grace_name])
        self.floor_ms = closed_floor(kept_grace, self._closes_after_ms, step.clock.now_ms)
        self._noted = step.noted
        self._ahead = ReadAhead(b"", BEHIND_ALL, self._entry_of, self._timer_of)

    def _note(self, key: bytes, end_ms: int) -> Timer:
        """Something of the key with this end may be due."""
        timer = Timer(end_ms + self._closes_after_ms, key, CLOSE)
        self._ahead.add(timer)
        self._noted(self.goes_by, timer.at_ms)
        return timer

    def first(self, clock: TimerClock) -> Timer | None:
        """What closes next. Don't call it within a record that may still be undone."""
        return self._ahead.first(self._due, self._is_due) if clock == self.goes_by else None

    def _is_due(self, timer: Timer) -> bool:
        return self._due.get(self._entry_of(timer)) is not ABSENT and self._is_exact(timer)

    def _is_exact(self, timer: Timer) -> bool:  # noqa: ARG002  for sessions
        """Whether something is due then. If not, its entry is moved."""
        return True

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: closing removes it, which is undone if that fails."""

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: it exists again."""

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`: the last millisecond before the end."""
        return self._end_ms_of(timer) - 1

    def _end_ms_of(self, timer: Timer) -> int:
        return timer.at_ms - self._closes_after_ms

    def _entry_of(self, timer: Timer) -> bytes:
        return encode_time(self._end_ms_of(timer)) + timer.key

    def _timer_of(self, entry: bytes) -> Timer:
        return Timer(decode_time(entry) + self._closes_after_ms, entry[TIME_BYTES:], CLOSE)


class OpenWindows(OpenInTime):
    """The open windows of a step. `table` has the aggregates of each window, by `_entry_of`."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step, step.window.store.name)
        windows = step.window.windows
        assert isinstance(windows, InTime)
        self._start_of = windows.start_of()

    def opened(self, key: bytes, end_ms: int) -> None:
        """The window has received its first record."""
        self._note(key, end_ms)

    # --- for `firing` ---------------------------------------------------------------------------------

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.table.delete(self._entry_of(timer))

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        end_ms = self._end_ms_of(timer)
        return window_title(self.step, self._start_of(end_ms), end_ms, timer.key)


class OpenByKey(OpenInTime):
    """What is open of a key is kept together, and a note says when the first of it is due, or earlier.
    `table` has it by key.
    """

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step, step.window.store.due_name)

    def note(self, key: bytes, end_ms: int) -> None:
        """Something of the key with this end may be due."""
        self._due.put(self._entry_of(self._note(key, end_ms)), b"")

    @abstractmethod
    def take_out(self, key: bytes, end_ms: int) -> list[Any]:
        """Close what has that end, and return what was kept of it."""

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.take_out(timer.key, self._end_ms_of(timer))


def window_title(step: str, start_ms: int, end_ms: int, key: bytes) -> str:
    """The timer that closes a window, in messages."""
    return (
        f"{TIMER_STEP}that closes the window {step!r} from {time_text(start_ms)} to {time_text(end_ms)} "
        f"for the key {bounded_repr(key)}"
    )
