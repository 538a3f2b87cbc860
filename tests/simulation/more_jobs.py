"""More jobs in the simulation: one with the other kinds of windows, one with tables, and one with running
aggregates. In all of them, the records of a source have their times in their values.

Responsible for: the jobs (`docs/simulation.md` lists them) and the models of their stages; see `jobs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from typing import Any

from fcluster import Counted, Cumulative, Job, Sliding, Watermark, collect, count, sum_
from fcluster.common.settings import Settings
from tests.simulation.jobs import (
    AGAIN,
    AGGREGATES,
    COUNT,
    GROUP_OF,
    GROUPS,
    JOB,
    LATE,
    MAX_DELAY_MS,
    MORE,
    REPARTITION,
    SINK,
    SOURCE,
    TOTALS,
    Expected,
    ForwardModel,
    Model,
    Read,
    SetTimer,
    SimJob,
    StageModel,
    WindowsModel,
    group_of,
    kept_of,
    result_of,
    told_by,
)

_MS = timedelta(milliseconds=1)
_WATERMARK = Watermark(MAX_DELAY_MS)
Rows = list[tuple[int, Any]]
"""Times and values of records, in the order in which they were processed."""


# --- other kinds of windows ---------------------------------------------------------------------------------


class CumulativeModel(WindowsModel):
    """Windows that begin together and grow. `size` is that of the longest."""

    def _ends(self, at_ms: int) -> list[int]:
        start = self._start(at_ms + 1)
        return [end for end in range(start + self._every, start + self._size + 1, self._every) if at_ms < end]

    def _start(self, end: int) -> int:
        return (end - 1) // self._size * self._size


class CountedModel(Model):
    """Windows of so many records. All records of a key are kept, to be simple."""

    def __init__(self, stage: str, step: str, size: int, every: int) -> None:
        self._stage = stage
        self._step = step
        self._size = size
        self._every = every

    def begin(self) -> dict[str, Rows]:
        return {}

    def process(self, state: dict[str, Rows], read: Read, now_ms: int | None) -> list[Expected]:
        key = read.written.name
        rows = state.setdefault(key, [])
        rows.append((read.written.time_ms, read.written.data))
        full = [own for begin, own in self._windows(rows) if begin + self._size == len(rows)]
        return [self._result(key, own)._replace(timestamp_ms=rows[-1][0]) for own in full]

    def content(
        self, state: dict[str, Rows], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        wanted: dict[str, Any] = {}
        for key, rows in state.items():
            opened = [
                [len(own), min(own)[0], max(own)[0], kept_of(own)]
                for begin, own in self._windows(rows)
                if begin + self._size > len(rows)
            ]
            if opened or len(rows) % self._every:
                wanted[key] = [len(rows) % self._every, opened]
        return wanted, stored[f"{self._step}//counted"]

    def _windows(self, rows: Rows) -> list[tuple[int, Rows]]:
        """The number of the first record, and the records of each window."""
        return [(begin, rows[begin : begin + self._size]) for begin in range(0, len(rows), self._every)]

    def _result(self, key: str, rows: Rows) -> Expected:
        times = [at_ms for at_ms, _ in rows]
        return result_of(self._stage, self._step, key, min(times), max(times) + 1, rows)


class _Slid:
    """The state of sliding windows.

    Attributes:
        came: by key: all records, each with the time up to which windows had closed when it came.
        closed: end and key of the windows that have closed.
        late: key and number of the records that were in no result.
    """

    def __init__(self) -> None:
        self.came: dict[str, list[tuple[int, int, Any]]] = {}
        self.closed: set[tuple[int, str]] = set()
        self.late: set[tuple[str, int]] = set()


class SlidingModel(Model):
    """Sliding windows. It finds those of a key anew each time, from all its records.

    Args:
        stage: the stage's name.
        step: the name of the window.
        within, grace: as in the job, in milliseconds.
    """

    has_timers = True
    shows_closing = False
    """A window that has no records closes as well."""

    def __init__(self, stage: str, step: str, within: int, grace: int) -> None:
        self._stage = stage
        self._step = step
        self._within = within
        self.closes_after_ms: int = grace

    def begin(self) -> _Slid:
        return _Slid()

    def process(self, state: _Slid, read: Read, now_ms: int | None) -> list[Expected]:
        key, value, at_ms = read.written.name, read.written.data, read.written.time_ms
        closed_ms = -1 if now_ms is None else now_ms - self.closes_after_ms
        if at_ms + self._within < closed_ms:
            return [Expected(LATE, key, value)]
        state.came.setdefault(key, []).append((closed_ms, at_ms, value))
        return []

    def timers(self, state: _Slid, clock: str) -> list[SetTimer]:
        if clock != "event":
            return []
        ends = [(end, key) for end, key, _ in self._open(state)]
        ends += [(end, key) for end, key, _ in self._to_be_late(state)]
        return sorted(SetTimer(end + self.closes_after_ms, key, "") for end, key in ends)

    def fire(self, state: _Slid, timer: SetTimer, event_ms: int | None) -> list[Expected]:
        end = timer.at_ms - self.closes_after_ms
        rows = next((rows for at, key, rows in self._open(state) if (at, key) == (end, timer.key)), None)
        if rows is None:
            number = next(
                number for at, key, number in self._to_be_late(state) if (at, key) == (end, timer.key)
            )
            state.late.add((timer.key, number))
            _closed_ms, at_ms, value = state.came[timer.key][number]
            return [Expected(LATE, timer.key, value, at_ms)]
        state.closed.add((end, timer.key))
        return [result_of(self._stage, self._step, timer.key, end - 1 - self._within, end, rows)]

    def content(self, state: _Slid, stored: Mapping[str, Any], now_ms: int | None) -> tuple[Any, Any]:
        """A record stays until the window that begins behind it has closed, and it has been told if it is
        late. If that window has no records, nobody sees when it closes: once it is due, the record may be
        gone.
        """
        found = stored[f"{self._step}//sliding"]
        closed_ms = -1 if now_ms is None else now_ms - self.closes_after_ms
        needed = [(key, row) for _, key, rows in self._open(state) for row in rows]
        must: dict[str, Rows] = {}
        may: dict[str, Rows] = {}
        lost = {(key, number) for _, key, number in self._to_be_late(state)}
        for key, came in state.came.items():
            for number, (_, at_ms, value) in enumerate(came):
                over_ms = at_ms + self._within + 2
                if (key, number) in lost:
                    may.setdefault(key, []).append((at_ms, value))
                    must.setdefault(key, []).append((at_ms, value))
                elif (over_ms, key) not in state.closed and (key, number) not in state.late:
                    may.setdefault(key, []).append((at_ms, value))
                    if over_ms > closed_ms or (key, (at_ms, value)) in needed:
                        must.setdefault(key, []).append((at_ms, value))
        gone = {key: rows for key, rows in must.items() if any(row not in found.get(key, []) for row in rows)}
        extra = {key: rows for key, rows in found.items() if any(row not in may.get(key, []) for row in rows)}
        return ({}, {}), (gone, extra)

    def _open(self, state: _Slid) -> Iterator[tuple[int, str, Rows]]:
        """End, key and records of each window that hasn't closed."""
        for end, key, rows in self._windows(state):
            if (end, key) not in state.closed:
                yield end, key, rows

    def _to_be_late(self, state: _Slid) -> Iterator[tuple[int, str, int]]:
        """Of each record that is in no window so far and wasn't told as late: when it is, its key, and its
        number.
        """
        spans = [(end, key) for end, key, _ in self._windows(state)]
        for key, came in state.came.items():
            for number, (closed_ms, at_ms, _) in enumerate(came):
                is_in_one = any(
                    of == key and closed_ms < end and end - 1 - self._within <= at_ms < end
                    for end, of in spans
                )
                if not is_in_one and (key, number) not in state.late:
                    yield at_ms + self._within + 2, key, number

    def _windows(self, state: _Slid) -> Iterator[tuple[int, str, Rows]]:
        """End, key and records of each window that there has been."""
        for key, came in state.came.items():
            ends = {end for _, at_ms, _ in came for end in (at_ms + 1, at_ms + self._within + 2)}
            for end in ends:
                in_time = [(at_ms, value) for closed_ms, at_ms, value in came if closed_ms < end]
                is_defined = any(end in (at_ms + 1, at_ms + self._within + 2) for at_ms, _ in in_time)
                rows = [row for row in in_time if end - 1 - self._within <= row[0] < end]
                if is_defined and rows:
                    yield end, key, rows


@cache
def sliding_job() -> SimJob:
    """`in` has cumulative and counted windows. `totals`, behind a repartition, has sliding ones."""
    job = Job(JOB)
    source = job.topic(SOURCE, watermark=_WATERMARK, timestamp="at")
    sink, late = job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    stream.window(Cumulative(12 * _MS, 4 * _MS, grace=3 * _MS), late=late, name=COUNT).aggregate(
        **AGGREGATES
    ).map(told_by(SOURCE, COUNT)).to(sink)
    stream.window(Counted(3, every=2), name=AGAIN).aggregate(**AGGREGATES).map(told_by(SOURCE, AGAIN)).to(
        sink
    )
    stream.key_by(group_of).window(Sliding(5 * _MS, grace=4 * _MS), late=late, name=TOTALS).aggregate(
        **AGGREGATES
    ).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            CumulativeModel(SOURCE, COUNT, 12, 4, 3),
            CountedModel(SOURCE, AGAIN, 3, 2),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        TOTALS: SlidingModel(TOTALS, TOTALS, 5, 4),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True, stamped=frozenset({SOURCE}))


# --- tables -------------------------------------------------------------------------------------------------

TABLE = "rows"
"""The name of the table."""


class TableModel(Model):
    """A table, a stream that is joined with it, and what its rows contribute to groups."""

    has_timers = True
    """It has none. But what comes of its records depends on the order in which both inputs are read."""

    def begin(self) -> dict[str, tuple[int, Any]]:
        return {}

    def process(self, state: dict[str, tuple[int, Any]], read: Read, now_ms: int | None) -> list[Expected]:
        key, value, at_ms = read.written.name, read.written.data, read.written.time_ms
        _, row = state.get(key, (0, None))
        if read.topic() == SOURCE:
            return [Expected(SINK, key, _with_row(value, row))]
        if value is None:
            state.pop(key, None)
        else:
            state[key] = at_ms, value
        old, new = _group_of_row(row), _group_of_row(value)
        if old == new:
            return [] if new is None else [Expected(REPARTITION, new, [row, value])]
        lost = [] if old is None else [Expected(REPARTITION, old, [row, None])]
        return lost if new is None else [*lost, Expected(REPARTITION, new, [None, value])]

    def content(
        self, state: dict[str, tuple[int, Any]], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        members = {key: (_group_of_row(row), row) for key, (_, row) in state.items()}
        kept = next(found for name, found in stored.items() if name.endswith("//members"))
        return (state, members), (stored[f"{TABLE}//table"], kept)


class GroupsModel(Model):
    """Groups of rows: in each group, the time of its last change, and its rows."""

    def begin(self) -> dict[str, tuple[int, list[Any]]]:
        return {}

    def process(self, state: dict[str, Any], read: Read, now_ms: int | None) -> list[Expected]:
        group, (old, new) = read.written.name, read.written.data
        at_ms, rows = state.get(group, (0, []))
        rows = [*rows]
        if old is not None:
            rows.remove(old)
        if new is not None:
            rows.append(new)
        state[group] = at_ms, rows = max(at_ms, read.written.time_ms), rows
        return [Expected(SINK, group, _group_output(_totals(rows)), at_ms)]

    def content(
        self, state: dict[str, Any], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        found = {
            group: [at_ms, members, [n, total, sorted(idents)]]
            for group, (at_ms, members, (n, total, idents)) in stored[f"{TOTALS}//groups"].items()
        }
        wanted = {
            group: [at_ms, len(rows), list(_totals(rows).values())] for group, (at_ms, rows) in state.items()
        }
        return wanted, found


def _with_row(record: Any, row: Any) -> dict[str, Any]:
    return {"stage": SOURCE, "ident": record["ident"], "row": -1 if row is None else row["ident"]}


def _group_of_row(row: Any) -> str | None:
    """Rows of a key are in different groups, so they leave one for another."""
    return None if row is None else GROUPS[row["ident"] // 2 % len(GROUPS)]


def _totals(rows: list[Any]) -> dict[str, Any]:
    idents = sorted(row["ident"] for row in rows)
    return {"n": len(idents), "total": sum(idents), "idents": idents}


def _group_output(totals: Any) -> dict[str, Any]:
    return {"stage": TOTALS, "ident": totals["total"], "n": totals["n"], "idents": sorted(totals["idents"])}


def _ident(row: Any) -> int:
    return row["ident"]


@cache
def tables_job() -> SimJob:
    """`in` is joined with the table of `more`. `totals`, behind a repartition, are groups of its rows."""
    job = Job(JOB)
    source = job.topic(SOURCE, watermark=_WATERMARK, timestamp="at")
    rows, sink = job.topic(MORE, watermark=_WATERMARK), job.topic(SINK)
    table = job.table(rows, name=TABLE)
    job.stream(source).join(table, _with_row, how="left").to(sink)
    groups = table.group_by(_group_of_row, name=TOTALS).aggregate(
        n=count(), total=sum_(_ident), idents=collect(_ident)
    )
    groups.to_stream().map(_group_output).to(sink)
    models: dict[str, Model] = {SOURCE: TableModel(), TOTALS: GroupsModel()}
    return SimJob(
        job.build(Settings()),
        models,
        has_results=True,
        comes_in_order=True,
        stamped=frozenset({SOURCE}),
        tables=frozenset({MORE}),
    )


# --- running aggregates -------------------------------------------------------------------------------------


class RunningModel(Model):
    """What is computed of all records of each key: the time of the latest, and their numbers."""

    def begin(self) -> dict[str, tuple[int, list[int]]]:
        return {}

    def process(self, state: dict[str, Any], read: Read, now_ms: int | None) -> list[Expected]:
        key = read.written.name
        at_ms, idents = state.get(key, (0, []))
        state[key] = at_ms, idents = max(at_ms, read.written.time_ms), [*idents, read.written.data["ident"]]
        return [Expected(SINK, key, _running_output(_running(idents)), at_ms)]

    def content(
        self, state: dict[str, Any], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        wanted = {
            key: [at_ms, len(idents), list(_running(idents).values())]
            for key, (at_ms, idents) in state.items()
        }
        return wanted, stored[f"{COUNT}//groups"]


class ReducedModel(Model):
    """The sum of the numbers of each group, which begins anew at certain sums."""

    def begin(self) -> dict[str, tuple[int, Any]]:
        return {}

    def process(self, state: dict[str, Any], read: Read, now_ms: int | None) -> list[Expected]:
        group, at_ms = read.written.name, read.written.time_ms
        value: Any = {**read.written.data}
        if group in state:
            former_ms, former = state.pop(group)
            at_ms, value = max(at_ms, former_ms), _added_up(former, value)
        if value is not None:
            state[group] = at_ms, value
        return [Expected(SINK, group, _reduced_output(value), at_ms)]

    def content(
        self, state: dict[str, Any], stored: Mapping[str, Any], now_ms: int | None
    ) -> tuple[Any, Any]:
        return state, stored[f"{TOTALS}//table"]


def _running(idents: list[int]) -> dict[str, Any]:
    return {"n": len(idents), "total": sum(idents), "idents": idents}


def _running_output(row: Any) -> dict[str, Any]:
    return {"stage": SOURCE, "ident": row["total"], "n": row["n"], "idents": row["idents"]}


def _added_up(reduced: Any, record: Any) -> Any:
    total = reduced["ident"] + record["ident"]
    return None if total % 3 == 0 else {"ident": total}


def _reduced_output(reduced: Any) -> dict[str, Any]:
    return {"stage": TOTALS, "ident": -1 if reduced is None else reduced["ident"]}


@cache
def running_job() -> SimJob:
    """`in` is aggregated by key, without an end. `totals`, behind a repartition, reduces it by group."""
    job = Job(JOB)
    source, sink = job.topic(SOURCE, watermark=_WATERMARK, timestamp="at"), job.topic(SINK)
    stream = job.stream(source)
    running = stream.aggregate(n=count(), total=sum_(_ident), idents=collect(_ident), name=COUNT)
    running.to_stream().map(_running_output).to(sink)
    reduced = stream.key_by(group_of).reduce(_added_up, name=TOTALS)
    reduced.to_stream().map(_reduced_output).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(RunningModel(), ForwardModel(REPARTITION, GROUP_OF.__getitem__)),
        TOTALS: ReducedModel(),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True, stamped=frozenset({SOURCE}))
