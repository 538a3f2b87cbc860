"""Session: like a window that lasts as long as records follow each other closely."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_notes import RESULT
from fcluster.engine.interval_sessions import OpenSessionsAtIntervals
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.operators.window import (
    OfWindow,
    ResultOf,
    apart,
    compile_fields,
    compile_late,
    compile_result,
    in_no_window,
)
from fcluster.engine.records import SourceRecord
from fcluster.engine.sessions import OpenSessions
from fcluster.engine.steps import Step, StepFailure
from fcluster.engine.windows import CLOSE
from fcluster.graph.aggregates import WITHDRAWN
from fcluster.graph.operators import Window
from fcluster.graph.windows import Session


class SessionOperator(OfWindow):
    """Adds each value to the nearby session of its key. `firing` calls the function that closes sessions."""

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, Session)
        open_sessions = cast("OpenSessions", surroundings.timers[node.name])
        result_of = compile_result(node, surroundings)
        closing = self._closing(open_sessions, result_of)
        surroundings.fire[node.name, CLOSE] = (place, self.passing_on(surroundings, following, closing))
        noting = open_sessions if isinstance(open_sessions, OpenSessionsAtIntervals) else None
        if noting is not None:
            told = partial(_told_at, noting, result_of)
            surroundings.fire[node.name, RESULT] = (place, self.passing_on(surroundings, following, told))
        clock, table, note = open_sessions.clock, open_sessions.table, open_sessions.note
        self.name_fields(table, lambda sessions: [session[2] for session in sessions])
        late = compile_late(node, place, surroundings, open_sessions.port)
        gap_ms, closes_after_ms = node.windows.gap_ms, node.closes_after_ms
        floor_ms = open_sessions.floor_ms
        inits, add_all = compile_fields(node)
        merge, updates = _compile_merge(node), node.emit == "update"

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            timestamp_ms = record.timestamp()[1]
            try:
                if key is None or timestamp_ms < 0:
                    raise in_no_window(key)
                end_ms = timestamp_ms + gap_ms
                found = table.get(key)
                sessions: list[list[Any]] = [] if found is ABSENT else found
                now_ms = clock.now_ms
                closed_ms = floor_ms if now_ms is None else now_ms - closes_after_ms
                if closed_ms < floor_ms:
                    closed_ms = floor_ms
                # Of the sessions that take records, it is at most two, because they are more than the gap
                # apart.
                near = [
                    at
                    for at, one in enumerate(sessions)
                    if one[0] <= end_ms and timestamp_ms <= one[1] and closed_ms < one[1]
                ]
                if not near and end_ms <= closed_ms:
                    late(record, key, value)
                    return
                former = [apart(result_of(key, *sessions[at])) for at in near] if updates else []
                if noting is not None:
                    for at in near:
                        noting.changing(sessions[at])
                if not near:
                    session: list[Any] = [timestamp_ms, end_ms, [init() for init in inits]]
                    if noting is not None:
                        session += noting.nothing_yet()
                    at = sum(one[0] < timestamp_ms for one in sessions)
                    if not sessions:
                        table.put(key, sessions)
                    sessions.insert(at, session)
                    note(key, end_ms)
                else:
                    session = sessions[near[0]]
                    if len(near) == 2:
                        session[1], later = sessions[near[1]][1], sessions.pop(near[1])
                        merge(session[2], later[2])
                        if noting is not None:
                            noting.merged(key, session, later)
                    session[0], session[1] = min(session[0], timestamp_ms), max(session[1], end_ms)
                add_all(session[2], value, timestamp_ms)
                if noting is not None:
                    noting.changed(key, session, timestamp_ms)
                for result in former:
                    if (result["start"], result["end"]) != (session[0], session[1]):
                        following(record, key, {**result, WITHDRAWN: True})
                if updates:
                    following(record, key, {**apart(result_of(key, *session)), WITHDRAWN: False})
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _closing(
        self, open_sessions: OpenSessions, result_of: ResultOf
    ) -> Callable[[bytes, int], list[dict[str, Any]]]:
        """What is passed on when a session closes."""
        updates = self._node.emit == "update"

        def results_at(key: bytes, timestamp_ms: int) -> list[dict[str, Any]]:
            session = open_sessions.take_out(key, timestamp_ms + 1)
            if updates:
                return []
            if isinstance(open_sessions, OpenSessionsAtIntervals):
                return _told(result_of, key, open_sessions.passed_on(session))
            return [result_of(key, *session)]

        return results_at


def _told_at(
    windows: OpenSessionsAtIntervals, result_of: ResultOf, key: bytes, at_ms: int
) -> list[dict[str, Any]]:
    return _told(result_of, key, windows.take_noted(key, at_ms))


def _told(result_of: ResultOf, key: bytes, told: list[tuple[bool, list[Any]]]) -> list[dict[str, Any]]:
    """What is passed on of a session at an interval, or when it closes; see
    `OpenSessionsAtIntervals.take_noted`.
    """
    return [{**apart(result_of(key, *result)), WITHDRAWN: withdrawn} for withdrawn, result in told]


def _compile_merge(node: Window) -> Callable[[list[Any], list[Any]], None]:
    merges = tuple(aggregate.merge for _name, aggregate in node.fields)

    def merge_all(kept: list[Any], later: list[Any]) -> None:
        for at, merge in enumerate(merges):
            assert merge is not None, "Stream.window has checked it"
            kept[at] = merge(kept[at], later[at])

    return merge_all
