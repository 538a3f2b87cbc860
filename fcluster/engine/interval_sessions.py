"""The open sessions of a step that passes results on at intervals, in one shard.

Responsible for: `OpenSessionsAtIntervals`: which results are due at the next interval, and which former ones
they replace. The operator (`operators.session`) passes them on. See `interval_notes` for when. Pure.

    sessions   key of the stream                    ->  [session, ...], in order
    session    [start, end, what is kept, when its result is noted, [told, ...], [apart, ...]]
    told       [start, end, what was kept]          of each result that was passed on and not withdrawn
    apart      [time, start, end, what was kept]    of each result that is due, if records have changed the
                                                    session since
    due        end (8 bytes) | key of the stream    ->  nothing, see `sessions`
    results    time (8 bytes) | key of the stream   ->  nothing: there are results for that time

A session keeps 0 if no result is noted.

Invariants:
- What was told of a session is of times within it. A session that is made of two has what was told of both.
- A result replaces what was told of times within it. What has other times than the result is withdrawn with
  it, right before it. So of each open session, one result at most was passed on and not withdrawn, or several
  that don't overlap, until the next one is passed on.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.sessions import OpenSessions
from fcluster.engine.windows import StepInShard

_START, _END, _KEPT, _NOTED, _TOLD, _APART = range(6)
"""What there is of a session."""
_RESULT: Final = slice(_START, _KEPT + 1)
"""What a result is made of: start, end, what is kept."""
Told = list[Any]


class OpenSessionsAtIntervals(OpenSessions):
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        self.notes = self._notes = IntervalNotes(step, self._forget)

    def nothing_yet(self) -> list[Any]:
        """What a new session has behind what it keeps."""
        return [0, [], []]

    def changing(self, session: list[Any]) -> None:
        """A record is about to change the session. A result that is due is kept apart."""
        at_ms = session[_NOTED]
        if self._notes.is_due(at_ms):
            session[_APART].append([at_ms, *deepcopy(session[_RESULT])])
            session[_NOTED] = 0

    def merged(self, key: bytes, session: list[Any], later: list[Any]) -> None:
        """The session has taken in a later one, which is no longer among those of the key."""
        session[_TOLD] += later[_TOLD]
        session[_APART] += later[_APART]
        noted = sorted(at_ms for at_ms in (session[_NOTED], later[_NOTED]) if at_ms)
        session[_NOTED] = noted[0] if noted else 0
        for at_ms in noted[1:]:
            self._drop(key, at_ms)

    def changed(self, key: bytes, session: list[Any], timestamp_ms: int) -> None:
        """A record of that time has changed the session, or opened it."""
        at_ms, former_ms = self._notes.next_ms(session[_START], timestamp_ms), session[_NOTED]
        if former_ms and former_ms <= at_ms:
            return
        session[_NOTED] = at_ms
        if former_ms:
            self._drop(key, former_ms)
        self._notes.note(key, at_ms)

    def take_noted(self, key: bytes, at_ms: int) -> list[tuple[bool, Told]]:
        """The results of the key that are noted for that time, in the order of the sessions, and what they
        withdraw: whether it is withdrawn; start, end, and what is kept. They are noted no longer.
        """
        taken = self._take(key, at_ms)
        return [one for session, result in taken for one in self.passed_on(session, result)]

    def passed_on(self, session: list[Any], result: Told | None = None) -> list[tuple[bool, Told]]:
        """What the session passes on now, as `take_noted` returns it. `result` is that of a time before."""
        told = session[_RESULT] if result is None else result
        within = [one for one in session[_TOLD] if told[_START] <= one[_START] and one[_END] <= told[_END]]
        others = [one for one in session[_TOLD] if one not in within]
        session[_TOLD] = sorted([*others, deepcopy(told)], key=_times_of)
        withdrawn = [(True, one) for one in within if _times_of(one) != _times_of(told)]
        return [*withdrawn, (False, told)]

    def take_out(self, key: bytes, end_ms: int) -> list[Any]:
        """See `OpenByKey`. Nothing is noted of the session any more."""
        session = super().take_out(key, end_ms)
        for at_ms in sorted({session[_NOTED], *(one[0] for one in session[_APART])} - {0}):
            self._drop(key, at_ms)
        return session

    def _take(self, key: bytes, at_ms: int) -> list[tuple[list[Any], Told]]:
        """The sessions with results that are noted for that time, and the results."""
        found: list[tuple[list[Any], Told]] = []
        for session in self.table.get(key):
            if session[_NOTED] == at_ms:
                session[_NOTED] = 0
                found.append((session, session[_RESULT]))
            found += [(session, one[1:]) for one in session[_APART] if one[0] == at_ms]
            session[_APART] = [one for one in session[_APART] if one[0] != at_ms]
        self._notes.delete(key, at_ms)
        return sorted(found, key=lambda one: _times_of(one[1]))

    def _forget(self, key: bytes, at_ms: int) -> None:
        self._take(key, at_ms)

    def _drop(self, key: bytes, at_ms: int) -> None:
        """Remove a note of the key, unless there is another result for that time."""
        sessions = self.table.get(key)
        if sessions is ABSENT or not any(
            at_ms == one[_NOTED] or any(at_ms == apart[0] for apart in one[_APART]) for one in sessions
        ):
            self._notes.delete(key, at_ms)


def _times_of(told: Told) -> tuple[int, int]:
    return told[_START], told[_END]
