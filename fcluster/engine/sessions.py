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

from typing import Any

from fcluster.common.failures import bounded_repr
from fcluster.engine.entries import ABSENT
from fcluster.engine.failure import TIMER_STEP
from fcluster.engine.interval_counted import CountedAtIntervals
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.sliding import OpenSliding
from fcluster.engine.timers import Timer, time_text
from fcluster.engine.windows import OpenByKey, OpenWindows


class OpenSessions(OpenByKey):
    """The open sessions of a step. `table` has the sessions by key."""

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

    def _is_exact(self, timer: Timer) -> bool:
        """Whether a session is due then. If not, the note is moved to the end of the first one."""
        sessions = self.table.get(timer.key)
        first_end_ms = None if sessions is ABSENT else sessions[0][1]
        if first_end_ms == self._end_ms_of(timer):
            return True
        self._due.delete(self._entry_of(timer))
        if first_end_ms is not None:
            self.note(timer.key, first_end_ms)
        return False

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        end_ms = self._end_ms_of(timer)
        return (
            f"{TIMER_STEP}that closes the session {self.step!r} until {time_text(end_ms)} for the key "
            f"{bounded_repr(timer.key)}"
        )


AnyWindows = OpenWindows | OpenSessions | OpenSliding | CountedAtIntervals
"""The open windows of a step."""
