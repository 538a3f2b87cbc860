"""Models of windows whose results are passed on at intervals; see `jobs.Model`.

Responsible for: which results there are at which time, and what is in them. All models keep the records
themselves, and from each record the event time before it. So what is in a result is a matter of definition:
the records that came before event time had reached its time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fcluster.engine.interval_notes import RESULT
from tests.simulation.jobs import (
    BEGIN_MS,
    LATE,
    SINK,
    Expected,
    Model,
    Read,
    SessionsModel,
    SetTimer,
    WindowsModel,
    kept_of,
    result_of,
)
from tests.simulation.more_jobs import CountedModel, CumulativeModel, Rows, SlidingModel

ALL = "all"
"""The name of the windows of all records, and the key of their parts."""


def next_ms(interval_ms: int, start_ms: int, at_ms: int, now_ms: int | None) -> int:
    """When a result is due of a window that begins at `start_ms`, and that a record of `at_ms` has changed
    when event time was `now_ms`.
    """
    reached_ms = at_ms if now_ms is None else max(now_ms, start_ms)
    return (reached_ms // interval_ms + 1) * interval_ms


def _timers(closing: Iterator[SetTimer], noted: Iterator[tuple[int, str]]) -> list[SetTimer]:
    """Windows that close, and results that are noted: time and key."""
    return sorted([*closing, *(SetTimer(at_ms, key, RESULT) for at_ms, key in set(noted))])


# --- windows whose place is known ---------------------------------------------------------------------------


@dataclass
class _Window:
    """An open window.

    Attributes:
        rows: event time before each record (-1: none), its time and value.
        noted: the times of the results that are still to come.
    """

    rows: list[tuple[int, int, Any]] = field(default_factory=list[tuple[int, int, Any]])
    noted: list[int] = field(default_factory=list[int])

    def before(self, at_ms: int) -> Rows:
        """The records that came before event time was so far."""
        return [(own_ms, value) for came_ms, own_ms, value in self.rows if came_ms < at_ms]

    def is_apart(self, at_ms: int) -> bool:
        """Whether the result of that time is due, and a record has come since."""
        return any(came_ms >= at_ms for came_ms, _, _ in self.rows)


class WindowsAtIntervalsModel(WindowsModel):
    """Windows of one size, by end and key.

    Args:
        stage, step, size, every, grace: as in `WindowsModel`.
        interval: as in the job, in milliseconds.
    """

    def __init__(self, stage: str, step: str, size: int, every: int, grace: int, interval: int) -> None:
        super().__init__(stage, step, size, every, grace)
        self._interval = interval

    def begin(self) -> Any:
        return {}

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        key, value, at_ms = self._key_of(read), read.written.data, read.written.time_ms
        taking = [end for end in self._ends(at_ms) if now_ms is None or now_ms < end + self.closes_after_ms]
        came_ms = -1 if now_ms is None else now_ms
        for end in taking:
            window = state.setdefault((end, key), _Window())
            window.rows.append((came_ms, at_ms, value))
            due_ms = self._due_ms(self._start(end), at_ms, now_ms)
            closes_first = due_ms >= end + self.closes_after_ms
            if not closes_first and all(noted_ms <= came_ms for noted_ms in window.noted):
                window.noted.append(due_ms)
        return [] if taking else [Expected(LATE, read.written.name, value)]

    def _due_ms(self, start_ms: int, at_ms: int, now_ms: int | None) -> int:
        return next_ms(self._interval, start_ms, at_ms, now_ms)

    def _key_of(self, read: Read) -> str:
        return read.written.name

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        if clock != "event":
            return []
        return _timers(
            (SetTimer(end + self.closes_after_ms, key, "") for end, key in state),
            ((at_ms, key) for (_, key), window in state.items() for at_ms in window.noted),
        )

    def first_ms(self, state: Any) -> int | None:
        return Model.first_ms(self, state)

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        key, at_ms = timer.key, timer.at_ms
        if timer.name != RESULT:
            end = at_ms - self.closes_after_ms
            window = state.pop((end, key))
            return [self._told(end, key, [(own_ms, value) for _, own_ms, value in window.rows])]
        results: list[Expected] = []
        for (end, of), window in sorted(state.items(), key=lambda item: item[0]):
            if of == key and at_ms in window.noted:
                window.noted.remove(at_ms)
                results.append(self._told(end, key, window.before(at_ms))._replace(timestamp_ms=at_ms))
        return results

    def _told(self, end: int, key: str, rows: Rows) -> Expected:
        return result_of(self._stage, self._step, key, self._start(end), end, rows)

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        windows: dict[tuple[int, str], Any] = {}
        notes: dict[tuple[int, str], list[Any]] = {}
        for (end, key), window in sorted(state.items(), key=lambda item: item[0]):
            pending = [at_ms for at_ms in window.noted if not window.is_apart(at_ms)]
            rows = [(own_ms, value) for _, own_ms, value in window.rows]
            windows[end, key] = [*kept_of(rows), *(pending or [0])]
            for at_ms in window.noted:
                former = [end, kept_of(window.before(at_ms))]
                notes.setdefault((at_ms, key), []).append(end if at_ms in pending else former)
        return (windows, notes), (stored[f"{self._step}//windows"], self._notes_of(stored))

    def _notes_of(self, stored: Mapping[str, Any]) -> dict[tuple[int, str], list[Any]]:
        """What is noted of each time and key, by the ends of the windows."""
        return {
            at: sorted(noted, key=lambda one: one if isinstance(one, int) else one[0])
            for at, noted in stored[f"{self._step}//due"].items()
        }


class CumulativeAtIntervalsModel(WindowsAtIntervalsModel, CumulativeModel):
    """Windows that begin together and grow."""


# --- windows of all records ---------------------------------------------------------------------------------


class PartsModel(WindowsAtIntervalsModel):
    """The parts of windows of all records. A part is told with what has come since the one before.

    Args:
        topic: where the parts go.
    """

    def __init__(self, stage: str, topic: str, size: int, every: int, grace: int, interval: int) -> None:
        super().__init__(stage, f"{ALL}-parts", size, every, grace, interval)
        self._topic = topic

    def _due_ms(self, start_ms: int, at_ms: int, now_ms: int | None) -> int:
        return super()._due_ms(start_ms, start_ms, now_ms)

    def _key_of(self, read: Read) -> str:
        return ""

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        if timer.name != RESULT:
            end = timer.at_ms - self.closes_after_ms
            rows = [(own_ms, value) for _, own_ms, value in state.pop((end, "")).rows]
            return [self._part(end, rows, timer.at_ms)]
        parts: list[Expected] = []
        for (end, of), window in sorted(state.items(), key=lambda item: item[0]):
            if timer.at_ms in window.noted:
                window.noted.remove(timer.at_ms)
                parts.append(self._part(end, window.before(timer.at_ms), timer.at_ms))
                window.rows = [row for row in window.rows if row[0] >= timer.at_ms]
                if not window.rows:
                    del state[end, of]
        return parts

    def _part(self, end: int, rows: Rows, at_ms: int) -> Expected:
        n, idents, newest = kept_of(rows)
        data = {"start": self._start(end), "end": end, "n": n, "idents": idents, "last": newest}
        return Expected(self._topic, ALL, data, at_ms)

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        windows: dict[tuple[int, str], Any] = {}
        notes: dict[tuple[int, str], list[Any]] = {}
        for (end, _), window in sorted(state.items(), key=lambda item: item[0]):
            apart = [at_ms for at_ms in window.noted if window.is_apart(at_ms)]
            own = [row for row in window.rows if row[0] >= max(apart, default=-1)]
            pending = [at_ms for at_ms in window.noted if at_ms not in apart]
            windows[end, ""] = [*kept_of([row[1:] for row in own]), *(pending or [0])]
            from_ms = -1
            for at_ms in sorted(window.noted):
                part = [end, kept_of([row[1:] for row in window.rows if from_ms <= row[0] < at_ms])]
                notes.setdefault((at_ms, ""), []).append(part if at_ms in apart else end)
                from_ms = at_ms
        return (windows, notes), (stored[f"{self._step}//windows"], self._notes_of(stored))


@dataclass
class _Gathered:
    """A window of all records.

    Attributes:
        told: the parts that are in its last result.
        held: the times and values of the others.
    """

    told: list[Any] = field(default_factory=list[Any])
    held: list[tuple[int, Any]] = field(default_factory=list[tuple[int, Any]])

    def take(self, until_ms: float) -> list[Any]:
        """All parts up to that time. From now on, they are in a result."""
        self.told += [part for at_ms, part in self.held if at_ms <= until_ms]
        self.held = [one for one in self.held if one[0] > until_ms]
        return self.told


class GatheredModel(Model):
    """The shard that puts the parts together.

    Args:
        stage: the stage's name.
        grace: as in the job, in milliseconds. Event time here is behind by it.
    """

    has_timers = True

    def __init__(self, stage: str, grace: int) -> None:
        self._stage = stage
        self._grace = grace

    def begin(self) -> dict[int, _Gathered]:
        return {}

    def process(self, state: dict[int, _Gathered], read: Read, now_ms: int | None) -> list[Expected]:
        part = read.written.data
        state.setdefault(part["end"], _Gathered()).held.append((read.written.timestamp_ms, part))
        return []

    def timers(self, state: dict[int, _Gathered], clock: str) -> list[SetTimer]:
        if clock != "event":
            return []
        noted = ((at_ms - self._grace, "") for window in state.values() for at_ms, _ in window.held)
        return _timers((SetTimer(end, "", "") for end in state), noted)

    def fire(self, state: dict[int, _Gathered], timer: SetTimer, event_ms: int | None) -> list[Expected]:
        if timer.name != RESULT:
            parts = state.pop(timer.at_ms).take(float("inf"))
            return [self._result(timer.at_ms, parts, timer.at_ms - 1)]
        told_ms = timer.at_ms + self._grace
        return [
            self._result(end, window.take(told_ms), told_ms)
            for end, window in sorted(state.items())
            if any(at_ms == told_ms for at_ms, _ in window.held)
        ]

    def _result(self, end: int, parts: list[Any], at_ms: int) -> Expected:
        n, idents, (_, newest) = _together(parts)
        data = {"start": parts[0]["start"], "end": end, "n": n, "idents": idents, "last": newest}
        return Expected(SINK, "", told_of_all(data), at_ms)

    def content(
        self, state: dict[int, _Gathered], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        windows: dict[tuple[int, str], Any] = {}
        notes: dict[tuple[int, str], set[int]] = {}
        for end, window in state.items():
            windows[end, ""] = (_together(window.told) if window.told else []), _held(window.held)
            for at_ms, _ in window.held:
                notes.setdefault((at_ms, ""), set()).add(end)
        found: dict[tuple[int, str], Any] = {}
        for at, (together, held) in stored[f"{ALL}//windows"].items():
            kept = [one for fields in together for one in fields]
            found[at] = [sorted(one) if number == 1 else one for number, one in enumerate(kept)], _held(held)
        return (windows, notes), (found, {at: set(ends) for at, ends in stored[f"{ALL}//due"].items()})


def _together(parts: list[Any]) -> list[Any]:
    """What all parts make: how many records, their idents, and time and ident of the newest."""
    idents = sorted(ident for part in parts for ident in part["idents"])
    return [sum(part["n"] for part in parts), idents, max(part["last"] for part in parts)]


def _held(held: Any) -> list[tuple[int, list[int]]]:
    """Times and idents of parts."""
    return sorted((at_ms, sorted(part["idents"])) for at_ms, part in held)


def told_of_all(result: Any) -> dict[str, Any]:
    """Makes the output of a result of all records."""
    return {
        "window": ALL,
        "ident": result["end"] - BEGIN_MS,
        "start": result["start"] - BEGIN_MS,
        "n": result["n"],
        "idents": sorted(result["idents"]),
        "last": result["last"],
    }


# --- sessions -----------------------------------------------------------------------------------------------


@dataclass
class _Note:
    """A result of a session that is still to come.

    Attributes:
        at_ms: its time.
        key: of the session.
        row: one of the session's records. So the session is known, however it grows.
        rows: if it is due and the session has changed since: the records that are in it.
    """

    at_ms: int
    key: str
    row: tuple[int, Any]
    rows: Rows | None = None


@dataclass
class _Noted:
    """The state of sessions at intervals.

    Attributes:
        sessions: as in `SessionsModel`.
        notes: all results that are still to come.
        told: by key: the records of each result that was told and not withdrawn.
    """

    sessions: Any
    notes: list[_Note] = field(default_factory=list[_Note])
    told: dict[str, list[Rows]] = field(default_factory=dict[str, list[Rows]])


class SessionsAtIntervalsModel(SessionsModel):
    """Sessions. A result replaces what was told of times within it.

    Args:
        stage, step, gap, grace: as in `SessionsModel`.
        interval: as in the job, in milliseconds.
    """

    def __init__(self, stage: str, step: str, gap: int, grace: int, interval: int) -> None:
        super().__init__(stage, step, gap, grace)
        self._interval = interval

    def begin(self) -> Any:
        return _Noted(super().begin())

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        key, at_ms, row = read.written.name, read.written.time_ms, (read.written.time_ms, read.written.data)
        self._part(state.sessions, now_ms)
        before = self._cut(state.sessions.open.get(key, []))
        outputs = super().process(state.sessions, read, now_ms)
        if outputs:
            return outputs
        session = next(one for one in self._cut(state.sessions.open[key]) if row in one)
        times_ms = [next_ms(self._interval, session[0][0], at_ms, now_ms)]
        for note in [one for one in state.notes if one.key == key and one.rows is None]:
            if note.row not in session:
                continue
            if now_ms is not None and note.at_ms <= now_ms:
                note.rows = next(one for one in before if note.row in one)
            else:
                state.notes.remove(note)
                times_ms.append(note.at_ms)
        state.notes.append(_Note(min(times_ms), key, row))
        return []

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        closing = iter(super().timers(state.sessions, clock))
        notes = state.notes if clock == "event" else []
        return _timers(closing, ((note.at_ms, note.key) for note in notes))

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        self._part(state.sessions, event_ms)
        sessions, key, at_ms = self._all(state.sessions), timer.key, timer.at_ms
        if timer.name == RESULT:
            noted = [note for note in state.notes if (note.at_ms, note.key) == (at_ms, key)]
            state.notes = [note for note in state.notes if note not in noted]
            results = [
                note.rows
                or next(rows for (_, of), rows in sessions.items() if of == key and note.row in rows)
                for note in noted
            ]
            results.sort(key=lambda rows: rows[0][0])
            return [output for rows in results for output in self._told(state, key, rows, at_ms)]
        end = at_ms - self.closes_after_ms
        rows = sessions[end, key]
        super().fire(state.sessions, timer, event_ms)
        state.notes = [note for note in state.notes if note.key != key or note.row not in rows]
        outputs = self._told(state, key, rows, end - 1)
        state.told[key].remove(rows)
        return outputs

    def _told(self, state: Any, key: str, rows: Rows, at_ms: int) -> list[Expected]:
        """A result, and what it withdraws before."""
        told: list[Rows] = state.told.setdefault(key, [])
        within = [one for one in told if all(row in rows for row in one)]
        state.told[key] = [*(one for one in told if one not in within), rows]
        others = [one for one in sorted(within) if self._times(one) != self._times(rows)]
        return [
            *(self._output(key, one, at_ms, withdrawn=True) for one in others),
            self._output(key, rows, at_ms, withdrawn=False),
        ]

    def _output(self, key: str, rows: Rows, at_ms: int, *, withdrawn: bool) -> Expected:
        result = result_of(self._stage, self._step, key, *self._times(rows), rows)
        return result._replace(data={**result.data, "withdrawn": withdrawn}, timestamp_ms=at_ms)

    def _times(self, rows: Rows) -> tuple[int, int]:
        return rows[0][0], rows[-1][0] + self._gap

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        name = f"{self._step}//sessions"
        plain = {key: [session[:3] for session in sessions] for key, sessions in stored[name].items()}
        sessions = super().content(state.sessions, {**stored, name: plain}, now_ms)
        further = {
            key: [[noted, _in_order(told, 2), _in_order(apart, 3)] for *_, noted, told, apart in found]
            for key, found in stored[name].items()
        }
        wanted: dict[str, list[Any]] = {}
        for (_, key), rows in sorted(self._all(state.sessions).items(), key=lambda item: item[0]):
            notes = [note for note in state.notes if note.key == key and note.row in rows]
            pending = [note.at_ms for note in notes if note.rows is None]
            told = [self._kept(one) for one in state.told.get(key, []) if all(row in rows for row in one)]
            apart = [[note.at_ms, *self._kept(note.rows)] for note in notes if note.rows is not None]
            wanted.setdefault(key, []).append([*(pending or [0]), sorted(told), sorted(apart)])
        times = {(note.at_ms, note.key) for note in state.notes}
        return (sessions[0], wanted, times), (sessions[1], further, set(stored[f"{self._step}//results"]))

    def _kept(self, rows: Rows) -> list[Any]:
        return [*self._times(rows), _sorted_idents(kept_of(rows))]


def _sorted_idents(kept: list[Any]) -> list[Any]:
    return [kept[0], sorted(kept[1]), kept[2]]


def _in_order(results: list[Any], at: int) -> list[Any]:
    """Results of which that field is what the aggregates keep."""
    return sorted([*one[:at], _sorted_idents(one[at])] for one in results)


# --- sliding and counted windows ----------------------------------------------------------------------------


@dataclass
class _SlidNote:
    """A result of a sliding window that is still to come: its time, and end and key of the window. If it is
    due and a record of the key has come since, the records that are in it.
    """

    at_ms: int
    end: int
    key: str
    rows: Rows | None = None


class SlidingAtIntervalsModel(SlidingModel):
    """Sliding windows. Their results are noted as if each were a window of its own.

    Args:
        stage, step, within, grace: as in `SlidingModel`.
        interval: as in the job, in milliseconds.
    """

    def __init__(self, stage: str, step: str, within: int, grace: int, interval: int) -> None:
        super().__init__(stage, step, within, grace)
        self._interval = interval

    def begin(self) -> Any:
        return super().begin(), list[_SlidNote]()

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        slid, notes = state
        key, at_ms = read.written.name, read.written.time_ms
        before = self._of_key(slid, key)
        outputs = super().process(slid, read, now_ms)
        if outputs:
            return outputs
        for note in notes:
            is_due = now_ms is not None and note.at_ms <= now_ms
            if note.key == key and note.rows is None and is_due:
                note.rows = before[note.end]
        noted = {note.end for note in notes if note.key == key and note.rows is None}
        for end, rows in self._of_key(slid, key).items():
            if rows != before.get(end) and end not in noted:
                due_ms = next_ms(self._interval, end - 1 - self._within, at_ms, now_ms)
                notes.append(_SlidNote(due_ms, end, key))
        return []

    def _of_key(self, slid: Any, key: str) -> dict[int, Rows]:
        return {end: rows for end, of, rows in self._open(slid) if of == key}

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        slid, notes = state
        closing = iter(super().timers(slid, clock))
        return _timers(closing, ((note.at_ms, note.key) for note in notes if clock == "event"))

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        slid, notes = state
        key, at_ms = timer.key, timer.at_ms
        if timer.name != RESULT:
            end = at_ms - self.closes_after_ms
            notes[:] = [note for note in notes if (note.end, note.key) != (end, key)]
            return super().fire(slid, timer, event_ms)
        due = [note for note in notes if (note.at_ms, note.key) == (at_ms, key)]
        notes[:] = [note for note in notes if note not in due]
        windows = self._of_key(slid, key)
        return [
            result_of(
                self._stage,
                self._step,
                key,
                note.end - 1 - self._within,
                note.end,
                windows[note.end] if note.rows is None else note.rows,
            )._replace(timestamp_ms=at_ms)
            for note in sorted(due, key=lambda note: note.end)
        ]

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        slid, notes = state
        name = f"{self._step}//sliding"
        records = {key: rows for key, (rows, _) in stored[name].items()}
        wanted, found = super().content(slid, {**stored, name: records}, now_ms)
        results = [
            (key, end, at_ms, *former)
            for key, (_, noted) in stored[name].items()
            for end, at_ms, *former in noted
        ]
        apart = [
            (note.key, note.end, note.at_ms, *([] if note.rows is None else [note.rows])) for note in notes
        ]
        times = {(note.at_ms, note.key) for note in notes}
        stores = sorted(results, key=_place), set(stored[f"{self._step}//results"])
        return (wanted, (sorted(apart, key=_place), times)), (found, stores)


def _place(noted: Any) -> tuple[str, int, int]:
    return noted[0], noted[1], noted[2]


class CountedAtIntervalsModel(CountedModel):
    """Windows of so many records. No record is processed while a result is due.

    Args:
        stage, step, size, every: as in `CountedModel`.
        interval: as in the job, in milliseconds.
    """

    has_timers = True
    may_wait = False

    def __init__(self, stage: str, step: str, size: int, every: int, interval: int) -> None:
        super().__init__(stage, step, size, every)
        self._interval = interval

    def begin(self) -> Any:
        return super().begin(), dict[tuple[str, int], int]()

    def process(self, state: Any, read: Read, now_ms: int | None) -> list[Expected]:
        rows_of, noted = state
        outputs = super().process(rows_of, read, now_ms)
        key, rows = read.written.name, rows_of[read.written.name]
        for begin, own in self._windows(rows):
            if begin + self._size == len(rows):
                noted.pop((key, begin), None)
            elif begin + self._size > len(rows):
                due_ms = next_ms(self._interval, min(own)[0], rows[-1][0], now_ms)
                noted[key, begin] = min(due_ms, noted.get((key, begin), due_ms))
        return outputs

    def timers(self, state: Any, clock: str) -> list[SetTimer]:
        noted = state[1] if clock == "event" else {}
        return _timers(iter(()), ((at_ms, key) for (key, _), at_ms in noted.items()))

    def fire(self, state: Any, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        rows_of, noted = state
        windows = dict(self._windows(rows_of[timer.key]))
        due = sorted(place for place, at_ms in noted.items() if (at_ms, place[0]) == (timer.at_ms, timer.key))
        for place in due:
            del noted[place]
        return [
            self._result(timer.key, windows[begin])._replace(timestamp_ms=timer.at_ms) for _, begin in due
        ]

    def content(self, state: Any, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        rows_of, noted = state
        name = f"{self._step}//counted"
        plain = {
            key: [since, [window[:4] for window in windows]] for key, (since, windows) in stored[name].items()
        }
        counted = super().content(rows_of, {**stored, name: plain}, now_ms)
        found = sorted((key, window[4]) for key, (_, windows) in stored[name].items() for window in windows)
        wanted = sorted(
            (key, noted.get((key, begin), 0))
            for key, rows in rows_of.items()
            for begin, _ in self._windows(rows)
            if begin + self._size > len(rows)
        )
        times = {(at_ms, key) for (key, _), at_ms in noted.items()}
        return (counted[0], wanted, times), (counted[1], found, set(stored[f"{self._step}//results"]))
