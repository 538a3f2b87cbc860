"""The open sessions of one step in one shard: which are due, and the aggregates of each.

Responsible for: `OpenSessions`, which uses the tables that `kinds.make_window_tables` makes. For `firing` it
is the same as `windows.OpenWindows`. The operator (`operators.session`) fills, merges and closes sessions.
Pure.

    sessions   key of the stream                   ->  [[start, end, what is kept], ...], in order
    due        end (8 bytes) | key of the stream   ->  nothing

Invariants:
- The sessions of a key that take records are more than the gap apart. A session that is due may be closer to
  the next one, and comes before it. A session ends the gap after its last record.
- For each key with sessions there is a note in `due`, at the end of its first session or earlier. The note
  isn't moved while records prolong the session, but only when its time has come.
- Sessions are due in the order of their ends, then of the key's bytes.
- A session that has closed is removed in the epoch of its result (invariant 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time
from fcluster.engine.records import OutputPort
from fcluster.engine.timers import ReadAhead, Timer, time_text
from fcluster.engine.windows import BEHIND_ALL, CLOSE, ClockInEventTime, OpenWindows
from fcluster.graph.timers import TimerClock
from fcluster.graph.topology import Window


class OpenSessions:
    """The open sessions of a step. See `windows.OpenWindows` for the arguments.

    Attributes:
        table: the sessions by key.
        clock: the shard's event time.
        port: counts late records.
    """

    def __init__(
        self,
        window: Window,
        tables: Mapping[str, Any],
        clock: ClockInEventTime,
        noted: Callable[[TimerClock, int], None],
        port: OutputPort,
    ) -> None:
        self.step = window.name
        self.clock = clock
        self.port = port
        self.table = cast("EntryTable", tables[window.store.name])
        self._due = cast("EntryTable", tables[window.store.due_name])
        self._grace_ms = window.windows.grace_ms
        self._noted = noted
        self._ahead = ReadAhead(b"", BEHIND_ALL, self._note_of, self._timer_of)

    def note(self, key: bytes, end_ms: int) -> None:
        """A session of the key may be due at this end plus the grace."""
        at_ms = end_ms + self._grace_ms
        timer = Timer(at_ms, key, CLOSE)
        self._due.put(self._note_of(timer), b"")
        self._ahead.add(timer)
        self._noted("event", at_ms)

    def take_out(self, key: bytes, end_ms: int) -> list[Any]:
        """Remove the session of the key with that end, and return it."""
        sessions = self.table.get(key)
        at = next(at for at, session in enumerate(sessions) if session[1] == end_ms)
        session = sessions.pop(at)
        if not sessions:
            self.table.delete(key)
        self._due.delete(encode_time(end_ms) + key)
        if sessions:
            self.note(key, sessions[0][1])
        return session

    # --- for `firing` ---------------------------------------------------------------------------------

    def first(self, clock: TimerClock) -> Timer | None:
        """The session that closes next. Don't call it within a record that may still be undone."""
        if clock != "event":
            return None
        ahead = self._ahead
        while True:
            while ahead.timers:
                timer = ahead.timers[0]
                if self._due.get(self._note_of(timer)) is not ABSENT:
                    if self._is_exact(timer):
                        return timer
                    continue
                del ahead.timers[0]  # its session has closed or was undone
            if ahead.is_all:
                return None
            ahead.read(self._due)

    def _is_exact(self, timer: Timer) -> bool:
        """Whether a session is due then. If not, the note is moved to the end of the first one."""
        sessions = self.table.get(timer.key)
        first_end_ms = None if sessions is ABSENT else sessions[0][1]
        if first_end_ms == timer.at_ms - self._grace_ms:
            return True
        self._due.delete(self._note_of(timer))
        if first_end_ms is not None:
            self.note(timer.key, first_end_ms)
        return False

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: closing it removes it, which is undone if that fails."""

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """See `firing.TimedStep`: the session exists again."""

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        self.take_out(timer.key, timer.at_ms - self._grace_ms)

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        end_ms = timer.at_ms - self._grace_ms
        return (
            f"{TIMER_STEP}that closes the session {self.step!r} until {time_text(end_ms)} for the key "
            f"{bounded_repr(timer.key)}"
        )

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`: the last millisecond of the session."""
        return timer.at_ms - self._grace_ms - 1

    def _note_of(self, timer: Timer) -> bytes:
        return encode_time(timer.at_ms - self._grace_ms) + timer.key

    def _timer_of(self, note: bytes) -> Timer:
        return Timer(decode_time(note) + self._grace_ms, note[TIME_BYTES:], CLOSE)


AnyWindows = OpenWindows | OpenSessions
"""The open windows of a step."""
