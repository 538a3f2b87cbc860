"""The jobs with windows in processing time. In which windows a record is depends on clocks, crashes and
moves, so there are no models of their stages: what is there in the end is judged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cache, partial
from typing import Any

from fcluster import Cumulative, Hopping, Job, Session, Sliding, Tumbling, collect
from fcluster.common.settings import Settings
from tests.simulation.jobs import JOB, SINK, SOURCE, SimJob, Written, group_of

_MS = timedelta(milliseconds=1)
_SIZE_MS = 40
_INTERVAL_MS = 10
"""It divides the size. So what has a multiple of it as its timestamp isn't the last result of a window."""
_CLOCK_ERROR_MS = 2_000
"""So that clocks of hosts differ by more than a shard takes to move."""
_TUMBLING, _HOPPING, _SESSIONS = "tumbling", "hopping", "sessions"
_TIMES = {_TUMBLING: 1, _HOPPING: 2, _SESSIONS: 1}
"""In how many windows of a step each record is."""
_CUMULATIVE, _SLIDING, _EARLY_SESSIONS = "cumulative", "sliding", "early-sessions"
_Window = tuple[str, int, int]
"""Key, start and end."""


@cache
def clock_job() -> SimJob:
    """`in` is gathered by key in two kinds of windows and, behind a repartition, in sessions of each group.
    The clocks of hosts differ much.
    """
    job = Job(JOB)
    source, sink = job.topic(SOURCE), job.topic(SINK)
    stream = job.stream(source)
    for name, windows, records in (
        (_TUMBLING, Tumbling(_SIZE_MS * _MS), stream),
        (_HOPPING, Hopping(2 * _SIZE_MS * _MS, _SIZE_MS * _MS), stream),
        (_SESSIONS, Session(_SIZE_MS * _MS), stream.key_by(group_of, name="groups")),
    ):
        gathered = records.window(windows, name=name, clock="processing").aggregate(idents=collect(_ident))
        gathered.map(_named(name)).to(sink)
    return SimJob(job.build(Settings()), awaits_timers=True, judge=judge, clock_error_ms_max=_CLOCK_ERROR_MS)


@cache
def clock_kinds_job(*, bounded: bool = False) -> SimJob:
    """The same with cumulative windows and, behind the repartition, sessions, both with results at intervals,
    and with sliding windows.
    """
    job = Job(JOB)
    source, sink = job.topic(SOURCE), job.topic(SINK)
    stream, interval, size = job.stream(source), _INTERVAL_MS * _MS, _SIZE_MS * _MS
    grouped = stream.key_by(group_of, name="groups")
    for name, windowed in (
        (
            _CUMULATIVE,
            stream.window(Cumulative(2 * size, size), name=_CUMULATIVE, emit=interval, clock="processing"),
        ),
        (_SLIDING, stream.window(Sliding(size), name=_SLIDING, clock="processing")),
        (
            _EARLY_SESSIONS,
            grouped.window(Session(size), name=_EARLY_SESSIONS, emit=interval, clock="processing"),
        ),
    ):
        windowed.aggregate(idents=collect(_ident)).map(_named(name)).to(sink)
    return SimJob(
        job.build(Settings()),
        awaits_timers=True,
        judge=partial(judge_kinds, bounded=bounded),
        clock_error_ms_max=_CLOCK_ERROR_MS,
    )


def judge(source: Sequence[Sequence[Written]], outputs: Mapping[str, list[list[Written]]]) -> str:
    """What is wrong with these results: a record that isn't in as many windows as it has to be, a window with
    two results, or one that was passed on before its end.
    """
    found: dict[str, Counter[int]] = defaultdict(Counter)
    windows: set[tuple[str, str, int, int]] = set()
    for record in (record for part in outputs[SINK] for record in part):
        data = record.data
        window = data["step"], data["key"], data["start"], data["end"]
        if window in windows:
            return f"the window {window} has two results"
        windows.add(window)
        if record.origin is None or record.origin.wall_ms < data["end"]:
            return f"the window {window} has a result before its end"
        found[data["step"]].update(data["idents"])
    for step, times in _TIMES.items():
        wanted = Counter(dict.fromkeys(_idents(source), times))
        if found[step] != wanted:
            return f"records of {step}: too many {found[step] - wanted}, too few {wanted - found[step]}"
    return ""


# --- other kinds of windows, and results at intervals -------------------------------------------------------


def judge_kinds(
    source: Sequence[Sequence[Written]], outputs: Mapping[str, list[list[Written]]], *, bounded: bool
) -> str:
    """What is wrong with these results. In a bounded run, windows close before their time."""
    results: dict[str, list[Written]] = defaultdict(list)
    for record in (record for part in outputs[SINK] for record in part):
        # A final result has the last millisecond of its window.
        if not bounded and (record.origin is None or record.origin.wall_ms < record.timestamp_ms):
            return f"{record.data} is passed on before its time"
        results[record.data["step"]].append(record)
    idents = set(_idents(source))
    judges: dict[str, Callable[[set[int], list[Written]], Iterator[str]]] = {
        _CUMULATIVE: _of_cumulative,
        _SLIDING: _of_sliding,
        _EARLY_SESSIONS: _of_sessions,
    }
    wrong = (f"{step}: {finding}" for step, one in judges.items() for finding in one(idents, results[step]))
    return next(wrong, "")


def _of_cumulative(idents: set[int], results: list[Written]) -> Iterator[str]:
    """Each record is in the windows from its own step on. Results of a window only gain records, and the last
    one comes once.
    """
    newest: dict[_Window, Written] = {}
    for record in results:
        window, former = _window_of(record), newest.get(_window_of(record))
        _, start, end = window
        if former is not None and former.timestamp_ms == end - 1:
            yield f"the window {window} has a result after it has closed"
        if record.timestamp_ms != end - 1:
            if record.timestamp_ms % _INTERVAL_MS or not start < record.timestamp_ms < end:
                yield f"the window {window} has a result at {record.timestamp_ms}"
            if former is not None and not set(former.data["idents"]) < set(record.data["idents"]):
                yield f"the window {window} has the results {former.data} and {record.data}"
        elif former is not None and not set(former.data["idents"]) <= set(record.data["idents"]):
            yield f"the window {window} has lost records: {former.data}, {record.data}"
        newest[window] = record
    within: dict[int, list[_Window]] = defaultdict(list)
    for window, record in newest.items():
        if record.timestamp_ms != window[2] - 1:
            yield f"the window {window} has no last result"
        if len(record.data["idents"]) != len(set(record.data["idents"])):
            yield f"the window {window} has records twice: {record.data}"
        for ident in record.data["idents"]:
            within[ident].append(window)
    if set(within) != idents:
        yield f"records {set(within) ^ idents} are missing, or too many"
    for ident, windows in within.items():
        starts = {start for _, start, _ in windows}
        lengths = sorted(end - start for _, start, end in windows)
        if len(starts) != 1 or lengths not in ([_SIZE_MS, 2 * _SIZE_MS], [2 * _SIZE_MS]):
            yield f"the record {ident} is in the windows {windows}"


def _of_sliding(idents: set[int], results: list[Written]) -> Iterator[str]:
    """A record's time is that of the first window with it, which it has defined. Then everything else is
    known.
    """
    contents = {_window_of(record): sorted(record.data["idents"]) for record in results}
    if len(contents) != len(results):
        yield "a window has two results"
    times: dict[str, dict[int, int]] = defaultdict(dict)
    for (key, _, end), found in contents.items():
        for ident in found:
            times[key][ident] = min(end - 1, times[key].get(ident, end))
    if {ident for of_key in times.values() for ident in of_key} != idents:
        yield f"records are missing, or too many: {times}"
    wanted: dict[_Window, list[int]] = {}
    for key, of_key in times.items():
        for end in {end for at_ms in of_key.values() for end in (at_ms + 1, at_ms + _SIZE_MS + 2)}:
            start = end - 1 - _SIZE_MS
            if own := sorted(ident for ident, at_ms in of_key.items() if start <= at_ms < end):
                wanted[key, start, end] = own
    if contents != wanted:
        yield f"the windows are {contents}, and not {wanted}"


def _of_sessions(idents: set[int], results: list[Written]) -> Iterator[str]:
    """In the end, each record is in one session that isn't withdrawn."""
    known: dict[_Window, list[int]] = {}
    for record in results:
        window, own = _window_of(record), record.data["idents"]
        if not record.data["withdrawn"]:
            known[window] = own
        elif sorted(known.pop(window, ())) != sorted(own):
            yield f"{record.data} is withdrawn, but wasn't passed on"
    found = Counter(ident for own in known.values() for ident in own)
    if found != Counter(idents):
        yield f"the records are not in one session each: {known}"


def _window_of(record: Written) -> _Window:
    data = record.data
    return data["key"], data["start"], data["end"]


def _idents(source: Sequence[Sequence[Written]]) -> list[int]:
    return [record.data["ident"] for part in source for record in part]


def _ident(record: Any) -> int:
    return record["ident"]


def _named(step: str) -> Any:
    def named(result: Any) -> Any:
        return {"step": step, **result}

    return named
