"""Random jobs with windows, and a slow interpreter that computes their results without the engine.

Responsible for: what Hypothesis draws (`WindowPlan`, `JobPlan`, records and what happens between them), the
real job of a plan, and what has to come out of it. There are two kinds of plans:

- *Direct*: windows on a source. Records may come in any order, so some of them are late. The interpreter goes
  through the records of a partition one by one, with a clock of its own. Every output is known, in order.
  (`interval_windows` has it for sessions, sliding and counted windows that pass results on at intervals.)
- *Crossed*: windows behind a repartition, and maybe windows of their results behind another one. What is late
  there depends on when event time crosses. So records are out of order by the watermark's delay at most, none
  may be late, and the interpreter sorts all records into windows without any clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

from hypothesis import strategies as st

from fcluster import (
    Counted,
    Cumulative,
    Hopping,
    Job,
    Session,
    Sliding,
    Tumbling,
    Watermark,
    approx_distinct,
    collect,
    count,
    count_distinct,
    first,
    last,
    max_,
    mean,
    min_,
    sum_,
    top_n,
)

Kind = Literal["tumbling", "hopping", "session", "cumulative", "counted", "sliding"]
Before = Literal["", "filter", "twice", "changed"]
Between = Literal["", "barrier", "crash", "settle"]

KEYS = ("a", "b", "ä", "")
PARTITIONS = 2
FAR_MS = 100_000
"""After all windows of the records that are drawn."""


@dataclass(frozen=True)
class WindowPlan:
    """A window and the steps around it.

    Attributes:
        kind: the kind of windows.
        size, every, offset, grace: in milliseconds. The size of a session is its gap. The size of cumulative
            windows is so many times `every`. Counted ones have size and `every` in records. The size of
            sliding ones is what their records are within.
        updates: whether it emits a result for each record.
        interval: emits results at intervals of so many milliseconds; 0: it doesn't.
        before: the step before it.
        counted: whether a handler with state numbers its results of each key.
    """

    kind: Kind
    size: int
    every: int
    offset: int
    grace: int
    updates: bool
    before: Before
    counted: bool
    interval: int = 0


@dataclass(frozen=True)
class JobPlan:
    """A job with one source.

    Attributes:
        delay: of the source's watermark, in milliseconds.
        windows: of a direct job: its chains. Of a crossed one: the windows, and those of their results.
        crossed: whether each of them is behind a repartition.
        stamped: whether the times are in the values, and Kafka's timestamps mean nothing.
    """

    delay: int
    windows: tuple[WindowPlan, ...]
    crossed: bool
    stamped: bool = False


@dataclass(frozen=True)
class Row:
    """A record of the source, or a result that crosses a repartition."""

    partition: int
    key: str
    at: int
    value: Any


def partition_of_key(key: str) -> int:
    """The partition that the records of a key are in, in a direct job."""
    return KEYS.index(key) % PARTITIONS


# --- what is drawn ----------------------------------------------------------------------------------------


def _windows(*, crossed: bool) -> Any:
    def fit(plan: WindowPlan) -> bool:
        in_time = not crossed or plan.kind != "counted"
        at_intervals = not (plan.interval and plan.updates)
        return in_time and at_intervals and plan.every <= plan.size and plan.offset < plan.every

    return st.builds(
        WindowPlan,
        kind=st.sampled_from(("tumbling", "hopping", "session", "cumulative", "counted", "sliding")),
        size=st.integers(1, 20),
        every=st.integers(1, 9),
        offset=st.just(0) | st.integers(0, 8),
        grace=st.just(0) | st.integers(1, 15),
        updates=st.just(value=False) if crossed else st.booleans(),
        before=st.sampled_from(("", "filter", "twice", "changed")),
        counted=st.just(value=False) if crossed else st.booleans(),
        interval=st.just(0) if crossed else st.just(0) | st.integers(1, 12),
    ).filter(fit)


direct_jobs = st.builds(
    JobPlan,
    delay=st.integers(0, 12),
    windows=st.lists(_windows(crossed=False), min_size=1, max_size=2).map(tuple),
    crossed=st.just(value=False),
    stamped=st.booleans(),
)
crossed_jobs = st.builds(
    JobPlan,
    delay=st.integers(0, 12),
    windows=st.lists(_windows(crossed=True), min_size=1, max_size=2).map(tuple),
    crossed=st.just(value=True),
    stamped=st.booleans(),
)
keyless_jobs = st.builds(
    JobPlan,
    delay=st.integers(0, 12),
    windows=_windows(crossed=True)
    .filter(lambda plan: plan.kind in ("tumbling", "hopping", "cumulative"))
    .map(lambda plan: (plan,)),
    crossed=st.just(value=True),
    stamped=st.booleans(),
)
early_keyless_jobs = st.builds(
    JobPlan,
    delay=st.integers(0, 12),
    windows=_windows(crossed=False)
    .filter(lambda plan: plan.kind in ("tumbling", "hopping", "cumulative"))
    .filter(lambda plan: plan.updates or plan.interval > 0)
    .map(lambda plan: (replace(plan, counted=False),)),
    crossed=st.just(value=True),
    stamped=st.booleans(),
)
_draws = st.tuples(
    st.integers(0, PARTITIONS - 1),
    st.sampled_from(KEYS),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 9),
)
draws: Any = st.lists(_draws, max_size=20)
between: Any = st.lists(st.sampled_from(("", "", "barrier", "crash", "settle")), max_size=20)


def rows_of(plan: JobPlan, drawn: list[tuple[int, str, int, int, int]]) -> list[Row]:
    """The records, in the order in which they are written. Each is drawn as partition, key, by how much the
    time of its partition goes on, by how much it is late, and a number.
    """
    times, rows = [20] * PARTITIONS, list[Row]()
    for partition, key, step, late, number in drawn:
        if not plan.crossed:
            partition = partition_of_key(key)  # so that an output's key tells its partition
        times[partition] += step
        late = min(late, plan.delay) if plan.crossed else late * (1 + number % 3)
        rows.append(Row(partition, key, max(1, times[partition] - late), number))
    return rows


# --- the real job -----------------------------------------------------------------------------------------

_MS = timedelta(milliseconds=1)
AGGREGATES: dict[str, Callable[[], Any]] = {
    "n": count,
    "total": sum_,
    "least": min_,
    "most": max_,
    "mean": mean,
    "first": first,
    "last": last,
    "values": collect,
    "top": lambda: top_n(2, by=lambda value: value),
    "different": count_distinct,
    "about": approx_distinct,
}
KEYLESS_AGGREGATES: dict[str, Callable[[Any], Any]] = {
    "n": lambda _of: count(),
    "total": sum_,
    "least": min_,
    "most": max_,
    "mean": mean,
    "values": collect,
    "top": lambda of: top_n(2, by=of, of=of),
    "different": count_distinct,
    "about": approx_distinct,
}
_CHANGES: dict[Before, Callable[[Any], list[Any]]] = {
    "": lambda value: [value],
    "filter": lambda value: [value] if value % 3 else [],
    "twice": lambda value: [value, value + 1],
    "changed": lambda value: [value * 7 % 10],
}
"""What comes of a value before the window."""


def declared(plan: WindowPlan) -> Any:
    """The windows, as a job declares them."""
    grace = plan.grace * _MS
    if plan.kind == "session":
        return Session(plan.size * _MS, grace=grace)
    if plan.kind == "counted":
        return Counted(plan.size, plan.every)
    if plan.kind == "sliding":
        return Sliding(plan.size * _MS, grace=grace)
    if plan.kind == "cumulative":
        every = plan.every * _MS
        return Cumulative(plan.size * every, every, grace=grace, offset=plan.offset * _MS)
    if plan.kind == "hopping":
        return Hopping(plan.size * _MS, plan.every * _MS, grace=grace, offset=plan.offset * _MS)
    return Tumbling(plan.size * _MS, grace=grace, offset=plan.offset % plan.size * _MS)


def build(plan: JobPlan) -> Job:
    """The job. Window n writes late records to `late-n`. In a direct job, it writes its results to `out-n`.
    In a crossed one, the last window writes them to `out`.
    """
    job = Job("j")
    source = job.topic("in", watermark=Watermark(plan.delay), timestamp="at" if plan.stamped else None)
    stream: Any = job.stream(source)
    if plan.stamped and not plan.crossed:
        stream = stream.map(_number)
    for number, window in enumerate(plan.windows):
        late = job.topic(f"late-{number}") if window.kind != "counted" else None
        if plan.crossed:
            stream = stream.key_by(_crossing_key if number == 0 else _result_key, name=f"k{number}")
        steps = stream
        if window.before and not (plan.crossed and number):
            steps = stream.flat_map(_of_value(window.before, crossed=plan.crossed))
        fields = {name: make() for name, make in AGGREGATES.items()}
        if plan.crossed:
            value_of = _number if number == 0 else _result_n
            fields = {"n": count(), "total": sum_(value_of), "values": collect(value_of)}
        emit: Any = "update" if window.updates else window.interval * _MS if window.interval else "close"
        results = steps.window(declared(window), name=f"w{number}", late=late, emit=emit).aggregate(**fields)
        if window.counted:
            results = results.process(_numbered, name=f"h{number}")
        if plan.crossed:
            stream = results
        else:
            results.to(job.topic(f"out-{number}"))
    if plan.crossed:
        stream.to(job.topic("out"))
    return job


def build_keyless(plan: JobPlan) -> Job:
    """A job with windows of all records, which writes its results to `out`."""
    job = Job("j")
    source = job.topic("in", watermark=Watermark(plan.delay), timestamp="at" if plan.stamped else None)
    (window,) = plan.windows
    stream: Any = job.stream(source)
    if window.before:
        stream = stream.flat_map(_of_value(window.before, crossed=True))
    emit: Any = "update" if window.updates else window.interval * _MS if window.interval else "close"
    all_records = stream.window_all(declared(window), name="w", late=job.topic("late"), emit=emit)
    fields = {name: make(_number) for name, make in KEYLESS_AGGREGATES.items()}
    all_records.aggregate(**fields).to(job.topic("out"))
    return job


def _of_value(before: Before, *, crossed: bool) -> Callable[[Any], list[Any]]:
    change = _CHANGES[before]
    if crossed:
        return lambda value: [{**value, "v": changed} for changed in change(value["v"])]
    return change


def _crossing_key(value: Any) -> str:
    return value["k"]


def _result_key(result: Any) -> str:
    return f"all {len(result['key'])}"


def _number(value: Any) -> int:
    return value["v"]


def _result_n(result: Any) -> int:
    return result["n"]


def _numbered(ctx: Any, result: Any) -> Any:
    ctx.state["n"] = number = ctx.state.get("n", 0) + 1
    return {**result, "number": number}


def changed(plan: WindowPlan, value: Any) -> list[Any]:
    """What comes to the window of a value."""
    return _CHANGES[plan.before](value)


def sent(plan: JobPlan, row: Row) -> tuple[Any, int]:
    """The value and the timestamp of a record, as they are written to the topic."""
    if not plan.stamped:
        return {"k": row.key, "v": row.value} if plan.crossed else row.value, row.at
    return {"k": row.key, "v": row.value, "at": row.at}, row.at * 7 % 101


# --- the interpreter --------------------------------------------------------------------------------------

Timed = list[tuple[int, Any]]
"""The records of a window, in the order in which they were processed: time and value."""


def result_of(key: str, start: int, end: int, rows: Timed) -> dict[str, Any]:
    """The result of a window, computed from all its records at once."""
    values = [value for _at, value in rows]
    earliest, newest = min(at for at, _ in rows), max(at for at, _ in rows)
    return {
        "key": key,
        "start": start,
        "end": end,
        "n": len(values),
        "total": sum(values),
        "least": min(values),
        "most": max(values),
        "mean": sum(values) / len(values),
        "first": next(value for at, value in rows if at == earliest),
        "last": next(value for at, value in reversed(rows) if at == newest),
        "values": values,
        "top": sorted(values, reverse=True)[:2],
        "different": len(set(values)),
        "about": len(set(values)),
    }


def windows_of(plan: WindowPlan, at: int) -> list[tuple[int, int]]:
    """Start and end of the windows of known size that a time is in."""
    every, offset = plan.every, plan.offset
    if plan.kind == "cumulative":
        size = plan.size * every
        (start,) = (one for one in range(at - size + 1, at + 1) if (one - offset) % size == 0)
        return [(start, end) for end in range(start + every, start + size + 1, every) if at < end]
    if plan.kind == "tumbling":
        every, offset = plan.size, plan.offset % plan.size
    starts = [start for start in range(at - plan.size + 1, at + 1) if (start - offset) % every == 0]
    return [(start, start + plan.size) for start in starts if start >= 0 or plan.kind == "tumbling"]


def sessions_of(plan: WindowPlan, rows: Timed) -> list[Timed]:
    """Records, cut into sessions."""
    sessions: list[Timed] = []
    for row in sorted(rows, key=lambda row: row[0]):
        if sessions and row[0] - sessions[-1][-1][0] <= plan.size:
            sessions[-1].append(row)
        else:
            sessions.append([row])
    return sessions


def sliding(within: int, rows: Timed) -> dict[tuple[int, int], Timed]:
    """The sliding windows of records, by start and end: one that ends with each record, and one that begins
    behind each record.
    """
    spans = {(max(0, at - within), max(at, within) + 1) for at, _value in rows}
    spans |= {(at + 1, at + within + 2) for at, _value in rows}
    found = {(start, end): [row for row in rows if start <= row[0] < end] for start, end in spans}
    return {span: own for span, own in found.items() if own}


def _by_end(one: tuple[int, bytes, int, Any]) -> tuple[int, bytes]:
    return one[:2]


class Partition:
    """One window step in one partition of the source."""

    def __init__(self, plan: WindowPlan) -> None:
        self.plan = plan
        self.out: list[tuple[str, int, Any]] = []
        """Key, timestamp and value of each output."""
        self.late: list[tuple[str, int, Any]] = []
        self.now = -1
        self.has_time = False
        self.open: dict[tuple[int, str], Timed] = {}
        """By end and key. Of sessions: by 0 and key, all records whose session hasn't closed."""
        self.came: dict[str, list[tuple[int, tuple[int, Any]]]] = defaultdict(list)
        """Of sliding windows: all records of a key, each with what had closed when it came."""
        self._numbers: dict[str, int] = defaultdict(int)
        self.noted: dict[tuple[int, str], int] = {}
        """When a result of a window is passed on at an interval."""

    def add(self, row: Row) -> None:
        """A record comes to the window."""
        plan = self.plan
        if plan.kind == "counted":
            self._count(row)
            return
        if plan.kind == "sliding":
            self._slide(row)
            return
        if plan.kind == "session":
            rows = [*self.open.get((0, row.key), []), (row.at, row.value)]
            within = next(one for one in sessions_of(plan, rows) if one[-1][0] >= row.at >= one[0][0])
            if within[-1][0] + plan.size + plan.grace < self.now:
                self.late.append((row.key, row.at, row.value))
                return
            before = sessions_of(plan, rows[:-1])
            self.open[0, row.key] = rows
            if plan.updates:
                self._update(row, before, within)
            return
        taking = [window for window in windows_of(plan, row.at) if self.now < window[1] + plan.grace]
        for start, end in taking:
            rows = self.open.setdefault((end, row.key), [])
            rows.append((row.at, row.value))
            if plan.interval:
                now = max(0, self.now, start) if self.has_time else row.at
                self.noted.setdefault((end, row.key), (now // plan.interval + 1) * plan.interval)
            if plan.updates:
                self.emit(row.key, start, end, rows, row.at)
        if not taking:
            self.late.append((row.key, row.at, row.value))

    def _update(self, row: Row, before: list[Timed], session: Timed) -> None:
        """A session has become this one. The former ones are withdrawn, unless their times are the same."""
        gap = self.plan.size
        start, end = session[0][0], session[-1][0] + gap
        for former in before:
            former_start, former_end = former[0][0], former[-1][0] + gap
            is_in = all(one in session for one in former)
            if is_in and (former_start, former_end) != (start, end):
                self.emit(row.key, former_start, former_end, former, row.at, withdrawn=True)
        self.emit(row.key, start, end, session, row.at, withdrawn=False)

    def _count(self, row: Row) -> None:
        """A record comes to windows that are counted. All records of the key are kept, to be simple."""
        rows = self.open.setdefault((0, row.key), [])
        rows.append((row.at, row.value))
        size, every = self.plan.size, self.plan.every
        for begin in range(0, len(rows), every):
            own = rows[begin : begin + size]
            is_full = begin + size == len(rows)
            if is_full or (self.plan.updates and begin + size > len(rows)):
                times = [at for at, _value in own]
                self.emit(row.key, min(times), max(times) + 1, own, row.at)

    def _slide(self, row: Row) -> None:
        """A record comes to sliding windows."""
        plan, closed = self.plan, self.now - self.plan.grace if self.now >= 0 else -1
        if row.at + plan.size < closed:
            self.late.append((row.key, row.at, row.value))
            return
        before = self.sliding(row.key)
        self.came[row.key].append((closed, (row.at, row.value)))
        if plan.updates:
            for (start, end), rows in sorted(self.sliding(row.key).items(), key=lambda one: one[0][1]):
                if end > closed and before.get((start, end)) != rows:
                    self.emit(row.key, start, end, rows, row.at)

    def sliding(self, key: str) -> dict[tuple[int, int], Timed]:
        """The sliding windows of a key that there have been so far."""
        came = self.came[key]
        ends = {end for _closed, (at, _) in came for _start, end in sliding(self.plan.size, [(at, 0)])}
        ends |= {at + self.plan.size + 2 for _closed, (at, _) in came}
        found: dict[tuple[int, int], Timed] = {}
        for end in ends:
            rows = [row for closed, row in came if closed < end]
            found |= {span: own for span, own in sliding(self.plan.size, rows).items() if span[1] == end}
        return found

    def tell_late(self, before: int) -> None:
        """Event time has moved from `before`: which records can be in no sliding window any more, and are in
        none.
        """
        found: list[tuple[int, bytes, int, Any]] = []
        for key, came in self.came.items():
            in_results = [row for rows in self.sliding(key).values() for row in rows]
            for _closed, row in came:
                over = row[0] + self.plan.size + 2
                is_over = before < over + self.plan.grace <= self.now
                if is_over and not any(one is row for one in in_results):
                    found.append((over, key.encode(), *row))
        self.late += [
            (raw_key.decode(), at, value) for _over, raw_key, at, value in sorted(found, key=_by_end)
        ]

    def pass_time(self, now: int) -> None:
        """Event time has moved."""
        if self.plan.kind == "counted":
            return
        before, self.now = self.now, max(self.now, now)
        now = self.now
        if self.plan.kind == "sliding":
            closing = [
                (end, key.encode(), start, rows)
                for key in list(self.came)
                for (start, end), rows in self.sliding(key).items()
                if before < end + self.plan.grace <= now
            ]
            for end, raw_key, start, rows in sorted(closing, key=lambda one: one[:2]):
                if not self.plan.updates:
                    self.emit(raw_key.decode(), start, end, rows, end - 1)
            self.tell_late(before)
            return
        due: list[tuple[int, bytes, Timed]] = []
        for (end, key), rows in self.open.items():
            if self.plan.kind != "session":
                due.append((end, key.encode(), rows))
                continue
            due += [
                (session[-1][0] + self.plan.size, key.encode(), session)
                for session in sessions_of(self.plan, rows)
            ]
        self.has_time = True
        if self.plan.interval:
            self._pass_on(due)
            return
        for end, raw_key, rows in sorted(due, key=lambda one: one[:2]):
            is_session = self.plan.kind == "session"  # a record exactly at its end is in it
            if end + self.plan.grace + is_session > now:
                continue
            key, start = raw_key.decode(), rows[0][0]
            if self.plan.kind == "session":
                self.open[0, key] = [row for row in self.open[0, key] if row not in rows]
            else:
                start = next(one[0] for one in windows_of(self.plan, rows[0][0]) if one[1] == end)
                del self.open[end, key]
            if not self.plan.updates:
                self.emit(key, start, end, rows, end - 1)

    def _pass_on(self, due: list[tuple[int, bytes, Timed]]) -> None:
        """Results at intervals, and of windows that close, in the order of time, key, and closing first."""
        events = [(end + self.plan.grace, key, 0, end, rows) for end, key, rows in due]
        ends = {(end, key.decode()): rows for end, key, rows in due}
        noted = [(at, of[1].encode(), 1, of[0], ends[of]) for of, at in self.noted.items()]
        for at, raw_key, is_noted, end, rows in sorted((*events, *noted), key=lambda one: one[:4]):
            key = raw_key.decode()
            if (
                at > self.now
                or (end, key) not in self.open
                or (is_noted and self.noted.get((end, key)) != at)
            ):
                continue
            start = next(one[0] for one in windows_of(self.plan, rows[0][0]) if one[1] == end)
            self.noted.pop((end, key), None)
            if not is_noted:
                del self.open[end, key]
            self.emit(key, start, end, rows, at if is_noted else end - 1)

    def emit(self, key: str, start: int, end: int, rows: Timed, at: int, **further: Any) -> None:
        result = {**result_of(key, start, end, rows), **further}
        if self.plan.counted:
            self._numbers[key] += 1
            result["number"] = self._numbers[key]
        self.out.append((key, at, result))


def direct(
    plan: JobPlan, rows: list[Row], partition_of: Callable[[WindowPlan], Partition]
) -> dict[str, list[list[tuple[str, int, Any]]]]:
    """The outputs of a direct job, by topic and by partition of the source. All windows close at the end.

    Args:
        partition_of: gives the interpreter of a window step.
    """
    steps = [[partition_of(window) for _ in range(PARTITIONS)] for window in plan.windows]
    for row in rows:
        for window, partitions in zip(plan.windows, steps, strict=True):
            for value in _CHANGES[window.before](row.value):
                partitions[row.partition].add(Row(row.partition, row.key, row.at, value))
        for partitions in steps:
            partitions[row.partition].pass_time(row.at - plan.delay)
    found: dict[str, list[list[tuple[str, int, Any]]]] = {}
    for number, partitions in enumerate(steps):
        for partition in partitions:
            partition.pass_time(FAR_MS)
        found[f"out-{number}"] = [partition.out for partition in partitions]
        if plan.windows[number].kind != "counted":
            found[f"late-{number}"] = [partition.late for partition in partitions]
    return found


def crossed(plan: JobPlan, rows: list[Row]) -> list[tuple[Any, ...]]:
    """The results of a crossed job, sorted: each is key, start, end, count, sum, sorted values."""
    given = [
        Row(0, row.key, row.at, value)
        for row in rows
        for value in _CHANGES[plan.windows[0].before](row.value)
    ]
    found: list[tuple[Any, ...]] = []
    for window in plan.windows:
        groups: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
        of_key: dict[str, Timed] = defaultdict(list)
        for row in given:
            of_key[row.key].append((row.at, row.value))
        for key, timed in of_key.items():
            if window.kind == "session":
                for session in sessions_of(window, timed):
                    span = session[0][0], session[-1][0] + window.size
                    groups[key, *span] += [value for _, value in session]
                continue
            if window.kind == "sliding":
                for span, rows in sliding(window.size, timed).items():
                    groups[key, *span] += [value for _, value in rows]
                continue
            for at, value in timed:
                for start, end in windows_of(window, at):
                    groups[key, start, end].append(value)
        found = [(*of, len(values), sum(values), sorted(values)) for of, values in groups.items()]
        given = [
            Row(0, f"all {len(key)}", end - 1, len(values)) for (key, _start, end), values in groups.items()
        ]
    return sorted(found)


def keyless(plan: JobPlan, rows: list[Row]) -> list[dict[str, Any]]:
    """The results of a job with windows of all records, in the order of their ends."""
    (window,) = plan.windows
    groups: dict[tuple[int, int], Timed] = defaultdict(list)
    for row in rows:
        for value in _CHANGES[window.before](row.value):
            for start, end in windows_of(window, row.at):
                groups[end, start].append((row.at, value))
    found: list[dict[str, Any]] = []
    for (end, start), timed in sorted(groups.items()):
        found.append(keyless_result(start, end, timed))
    return found


def keyless_result(start: int, end: int, timed: Timed) -> dict[str, Any]:
    """The result of a window of all records, with sorted values."""
    result = result_of("", start, end, timed)
    wanted = {"start": start, "end": end, **{name: result[name] for name in KEYLESS_AGGREGATES}}
    return {**wanted, "values": sorted(wanted["values"])}
