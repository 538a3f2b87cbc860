"""The slow interpreter of windows that pass results on before they close, where `windows` isn't enough.

Responsible for: `partition_of`, which gives the interpreter of a window step; and the results of windows of
all records. Everything that is due is done
at once here, and all records of what is open are kept.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.windows import (
    FAR_MS,
    PARTITIONS,
    JobPlan,
    Partition,
    Row,
    Timed,
    WindowPlan,
    changed,
    keyless_result,
    windows_of,
)

Told = tuple[int, int, Timed]
"""Start, end and records of a session whose result was passed on."""


def partition_of(plan: WindowPlan) -> Partition:
    """The interpreter of one window step in one partition of the source."""
    of_kind = {"session": Sessions, "sliding": Slides, "counted": Counts}
    return of_kind.get(plan.kind, Partition)(plan) if plan.interval else Partition(plan)


class AtIntervals(Partition):
    """One window step in one partition."""

    def next_of(self, start: int, at: int) -> int:
        """When a window that begins at `start` is passed on that a record at `at` has changed."""
        interval = self.plan.interval
        now = max(0, self.now, start) if self.has_time else at
        return (now // interval + 1) * interval


@dataclass
class _Session:
    rows: Timed
    noted: int = 0
    told: list[Told] = field(default_factory=list[Told])


class Sessions(AtIntervals):
    """Sessions: what was told of times that a session no longer has is withdrawn with its next result."""

    def __init__(self, plan: WindowPlan) -> None:
        super().__init__(plan)
        self._sessions: dict[str, list[_Session]] = defaultdict(list)

    def span(self, session: _Session) -> tuple[int, int]:
        """Start and end."""
        times = [at for at, _value in session.rows]
        return min(times), max(times) + self.plan.size

    def add(self, row: Row) -> None:
        """See `Partition`."""
        plan, sessions = self.plan, self._sessions[row.key]
        near = [
            one
            for one in sorted(sessions, key=self.span)
            if self.span(one)[0] <= row.at + plan.size and row.at <= self.span(one)[1]
        ]
        if not near and row.at + plan.size + plan.grace < self.now:
            self.late.append((row.key, row.at, row.value))
            return
        merged = _Session([])
        for one in near:
            sessions.remove(one)
            merged.rows += one.rows
            merged.told += one.told
        merged.rows.append((row.at, row.value))
        noted = [one.noted for one in near if one.noted]
        merged.noted = min([*noted, self.next_of(self.span(merged)[0], row.at)])
        sessions.append(merged)

    def pass_time(self, now: int) -> None:
        """See `Partition`."""
        self.now, self.has_time = max(self.now, now), True
        while (event := min(self._events(), default=None)) is not None and event[0] <= self.now:
            time, raw_key, is_noted, _start = event
            key = raw_key.decode()
            for session in sorted(self._sessions[key], key=self.span):
                _start, end = self.span(session)
                if is_noted and session.noted == time:
                    session.noted = 0
                    self._tell(key, session, time)
                elif not is_noted and end + self.plan.grace + 1 == time:
                    self._sessions[key].remove(session)
                    self._tell(key, session, end - 1)

    def _events(self) -> list[tuple[int, bytes, int, int]]:
        found: list[tuple[int, bytes, int, int]] = []
        for key, sessions in self._sessions.items():
            for session in sessions:
                start, end = self.span(session)
                found.append((end + self.plan.grace + 1, key.encode(), 0, start))
                found += [(session.noted, key.encode(), 1, start)] if session.noted else []
        return found

    def _tell(self, key: str, session: _Session, at: int) -> None:
        start, end = self.span(session)
        for told_start, told_end, rows in session.told:
            if (told_start, told_end) != (start, end):
                self.emit(key, told_start, told_end, rows, at, withdrawn=True)
        session.told = [(start, end, list(session.rows))]
        self.emit(key, start, end, session.rows, at, withdrawn=False)


class Slides(AtIntervals):
    """Sliding windows."""

    def add(self, row: Row) -> None:
        """See `Partition`."""
        closed = self.now - self.plan.grace if self.now >= 0 else -1
        if row.at + self.plan.size < closed:
            self.late.append((row.key, row.at, row.value))
            return
        before = self.sliding(row.key)
        self.came[row.key].append((closed, (row.at, row.value)))
        for (start, end), rows in self.sliding(row.key).items():
            if end > closed and before.get((start, end)) != rows:
                at = self.next_of(end - 1 - self.plan.size, row.at)
                self.noted.setdefault((end, row.key), at)

    def pass_time(self, now: int) -> None:
        """See `Partition`."""
        before, self.now = self.now, max(self.now, now)
        self.has_time = True
        events: list[tuple[int, bytes, int, int, int]] = []
        for key in list(self.came):
            for start, end in self.sliding(key):
                if before < end + self.plan.grace <= self.now:
                    events.append((end + self.plan.grace, key.encode(), 0, end, start))
                noted = self.noted.get((end, key))
                if noted is not None and noted <= self.now:
                    events.append((noted, key.encode(), 1, end, start))
        for time, raw_key, is_noted, end, start in sorted(events):
            key = raw_key.decode()
            if self.noted.pop((end, key), None) is None and is_noted:
                continue
            rows = self.sliding(key)[start, end]
            self.emit(key, start, end, rows, time if is_noted else end - 1)
        self.tell_late(before)


class Counts(AtIntervals):
    """Counted windows. All records of a key are kept; a window is known by the number of its first one."""

    def add(self, row: Row) -> None:
        """See `Partition`."""
        rows = self.open.setdefault((0, row.key), [])
        rows.append((row.at, row.value))
        size, every = self.plan.size, self.plan.every
        for begin in range(0, len(rows), every):
            own = rows[begin : begin + size]
            if begin + size < len(rows):
                continue
            if begin + size == len(rows):
                self.noted.pop((begin, row.key), None)
                self.emit(row.key, *self._span(own), own, row.at)
                continue
            at = self.next_of(self._span(own)[0], row.at)
            self.noted[begin, row.key] = min(at, self.noted.get((begin, row.key), at))

    def pass_time(self, now: int) -> None:
        """See `Partition`."""
        self.now, self.has_time = max(self.now, now), True
        due = [(at, key.encode(), begin) for (begin, key), at in self.noted.items() if at <= self.now]
        for at, raw_key, begin in sorted(due):
            key = raw_key.decode()
            own = self.open[0, key][begin : begin + self.plan.size]
            del self.noted[begin, key]
            self.emit(key, *self._span(own), own, at)

    def _span(self, rows: Timed) -> tuple[int, int]:
        times = [at for at, _value in rows]
        return min(times), max(times) + 1


# --- windows of all records -------------------------------------------------------------------------------


@dataclass
class _Part:
    rows: Timed
    noted: int


def keyless_at_intervals(plan: JobPlan, rows: list[Row]) -> list[tuple[int, dict[str, Any]]]:
    """The results of a job with windows of all records that passes results on at intervals: timestamp and
    value of each. The result of an interval has what all partitions had told until then.
    """
    (window,) = plan.windows
    told: dict[tuple[int, int], list[tuple[int, Timed]]] = defaultdict(list)
    for partition in range(PARTITIONS):
        _tell_parts(plan, [row for row in rows if row.partition == partition], told)
    found: list[tuple[int, int, int, int, dict[str, Any]]] = []
    for (end, start), parts in told.items():
        everything = [row for _at, part in parts for row in part]
        found.append((end, 0, end, end - 1, keyless_result(start, end, everything)))
        for at in {at for at, _part in parts if at < end + window.grace}:
            so_far = [row for told_at, part in parts if told_at <= at for row in part]
            found.append((at - window.grace, 1, end, at, keyless_result(start, end, so_far)))
    return [(at, value) for *_, at, value in sorted(found, key=lambda one: one[:3])]


def _tell_parts(plan: JobPlan, rows: list[Row], told: dict[tuple[int, int], list[tuple[int, Timed]]]) -> None:
    """What a partition tells: by end and start, when, and the records since the time before. What it tells
    when a window closes has the time when it does."""
    (window,) = plan.windows
    parts: dict[tuple[int, int], _Part] = {}
    now: int | None = None
    for row in [*rows, Row(0, "", FAR_MS + plan.delay, None)]:
        values = [] if row.value is None else changed(window, row.value)
        for value in values:
            for start, end in windows_of(window, row.at):
                at = start if now is None else max(0, now, start)
                at = (at // window.interval + 1) * window.interval
                parts.setdefault((end, start), _Part([], at)).rows.append((row.at, value))
        now = row.at - plan.delay if now is None else max(now, row.at - plan.delay)
        for (end, start), part in list(parts.items()):
            at = min(part.noted, end + window.grace)
            if at <= now:
                told[end, start].append((at, part.rows))
                del parts[end, start]


def keyless_updates(plan: JobPlan, rows: list[Row]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """The results of a job with windows of all records that passes on each update: by start and end, one for
    each record that is in the window. Only of the last one is it known what is in it.
    """
    (window,) = plan.windows
    groups: dict[tuple[int, int], Timed] = defaultdict(list)
    for row in rows:
        for value in changed(window, row.value):
            for start, end in windows_of(window, row.at):
                groups[start, end].append((row.at, value))
    return {
        (start, end): [keyless_result(start, end, timed[: n + 1]) for n in range(len(timed))]
        for (start, end), timed in groups.items()
    }
