"""The jobs with results at intervals, and what everybody may expect of these in the end.

Responsible for: the jobs (`docs/simulation.md` lists them). `interval_models` has the models of their stages.
The functions that judge know nothing of those: they look at the source and at the results alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

from fcluster import Counted, Cumulative, Hopping, Job, Session, Sliding, Tumbling, Watermark
from fcluster.common.ids import repartition_topic
from fcluster.common.settings import Settings
from fcluster.engine.clock import END_MS
from tests.simulation.interval_models import (
    ALL,
    CountedAtIntervalsModel,
    CumulativeAtIntervalsModel,
    GatheredModel,
    PartsModel,
    SessionsAtIntervalsModel,
    SlidingAtIntervalsModel,
    WindowsAtIntervalsModel,
    told_of_all,
)
from tests.simulation.jobs import (
    AGAIN,
    AGGREGATES,
    BEGIN_MS,
    COUNT,
    GROUP_OF,
    JOB,
    LATE,
    MAX_DELAY_MS,
    REPARTITION,
    SINK,
    SOURCE,
    TOTALS,
    ForwardModel,
    Model,
    SimJob,
    StageModel,
    Written,
    group_of,
    told_by,
)

_MS = timedelta(milliseconds=1)
_WATERMARK = Watermark(MAX_DELAY_MS)
_PARTS = repartition_topic(JOB, ALL)
_ALL_SIZE, _ALL_GRACE, _ALL_INTERVAL = 12, 4, 4
"""Of the windows of all records. The interval divides the size. So no result but the last one has the last
millisecond of its window as its timestamp.
"""


@cache
def intervals_job() -> SimJob:
    """`in` has tumbling windows and sessions, and `totals`, behind a repartition, has hopping windows."""
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    stream.window(Tumbling(15 * _MS, grace=5 * _MS), late=late, name=COUNT, emit=4 * _MS).aggregate(
        **AGGREGATES
    ).map(told_by(SOURCE, COUNT)).to(sink)
    stream.window(Session(6 * _MS, grace=20 * _MS), late=late, name=AGAIN, emit=3 * _MS).aggregate(
        **AGGREGATES
    ).map(_told_of_session).to(sink)
    stream.key_by(group_of).window(
        Hopping(12 * _MS, 4 * _MS, grace=2 * _MS), late=late, name=TOTALS, emit=5 * _MS
    ).aggregate(**AGGREGATES).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            WindowsAtIntervalsModel(SOURCE, COUNT, 15, 15, 5, 4),
            SessionsAtIntervalsModel(SOURCE, AGAIN, 6, 20, 3),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        TOTALS: WindowsAtIntervalsModel(TOTALS, TOTALS, 12, 4, 2, 5),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True, judge=_judge_sessions)


@cache
def sliding_intervals_job() -> SimJob:
    """`in` has cumulative windows, and `totals`, behind a repartition, has sliding ones."""
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    stream.window(
        Cumulative(12 * _MS, 4 * _MS, grace=3 * _MS), late=late, name=COUNT, emit=5 * _MS
    ).aggregate(**AGGREGATES).map(told_by(SOURCE, COUNT)).to(sink)
    stream.key_by(group_of).window(
        Sliding(5 * _MS, grace=4 * _MS), late=late, name=TOTALS, emit=4 * _MS
    ).aggregate(**AGGREGATES).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            CumulativeAtIntervalsModel(SOURCE, COUNT, 12, 4, 3, 5),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        TOTALS: SlidingAtIntervalsModel(TOTALS, TOTALS, 5, 4, 4),
    }
    return SimJob(job.build(Settings()), models, comes_in_order=True)


@cache
def all_intervals_job() -> SimJob:
    """`in` has windows of all records, whose parts are put together in `all`. `totals`, behind another
    repartition, has counted windows.
    """
    job = Job(JOB)
    source, sink, late = job.topic(SOURCE, watermark=_WATERMARK), job.topic(SINK), job.topic(LATE)
    stream = job.stream(source)
    windows = Tumbling(_ALL_SIZE * _MS, grace=_ALL_GRACE * _MS)
    stream.window_all(windows, late=late, name=ALL, emit=_ALL_INTERVAL * _MS).aggregate(**AGGREGATES).map(
        told_of_all
    ).to(sink)
    stream.key_by(group_of).window(Counted(5, every=2), name=TOTALS, emit=4 * _MS).aggregate(
        **AGGREGATES
    ).map(told_by(TOTALS, TOTALS)).to(sink)
    models: dict[str, Model] = {
        SOURCE: StageModel(
            PartsModel(SOURCE, _PARTS, _ALL_SIZE, _ALL_SIZE, _ALL_GRACE, _ALL_INTERVAL),
            ForwardModel(REPARTITION, GROUP_OF.__getitem__),
        ),
        ALL: GatheredModel(ALL, _ALL_GRACE),
        TOTALS: CountedAtIntervalsModel(TOTALS, TOTALS, 5, 2, 4),
    }
    return SimJob(
        job.build(Settings()), models, has_results=True, comes_in_order=True, judge=_judge_windows_of_all
    )


INTERVALS_JOBS: Sequence[Callable[[], SimJob]] = (intervals_job, sliding_intervals_job, all_intervals_job)


def _told_of_session(result: Any) -> dict[str, Any]:
    return {**told_by(SOURCE, AGAIN)(result), "withdrawn": result["withdrawn"]}


# --- what everybody may expect ------------------------------------------------------------------------------


def _judge_sessions(_source: Sequence[Sequence[Written]], outputs: Mapping[str, list[list[Written]]]) -> str:
    """Whoever follows the results has each record in one session at most, at any time: what is withdrawn was
    passed on before, and what overlaps with it is withdrawn first.
    """
    for part in outputs[SINK]:
        known: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(dict)
        for data in (record.data for record in part if record.data["window"] == AGAIN):
            times, sessions = (data["start"], data["ident"]), known[data["key"]]
            if data["withdrawn"]:
                if sessions.pop(times, None) != data["idents"]:
                    return f"{data} is withdrawn, but wasn't passed on"
                continue
            sessions[times] = data["idents"]
            idents = Counter(ident for one in sessions.values() for ident in one)
            twice = [ident for ident, count in idents.items() if count > 1]
            if twice:
                return f"the records {twice} are in two sessions of {data['key']}: {sessions}"
    return ""


class _InPart(NamedTuple):
    """A record in a window of all records: the window's end, event time of the shard before it (-1: none),
    when its part is told, and its ident.
    """

    end: int
    before_ms: int
    told_ms: int
    ident: int


def _judge_windows_of_all(
    source: Sequence[Sequence[Written]], outputs: Mapping[str, list[list[Written]]]
) -> str:
    """A result has exactly what each shard had read when its event time came so far, and there is one
    whenever a shard has told a part.
    """
    rows = [row for part in source for row in _rows_of(part)]
    found: dict[tuple[int, int], list[int]] = {}
    final: dict[int, list[int]] = {}
    for record in (record for part in outputs[SINK] for record in part if record.data["window"] == ALL):
        end, at_ms = record.data["ident"] + BEGIN_MS, record.timestamp_ms
        if end in final if at_ms == end - 1 else (end, at_ms) in found:
            return f"the window until {end} has two results at {at_ms}"
        if at_ms == end - 1:
            final[end] = record.data["idents"]
        else:
            found[end, at_ms] = record.data["idents"]
    told = {(row.end, row.told_ms) for row in rows if row.told_ms < row.end + _ALL_GRACE}
    missing = {(end, at_ms) for end, at_ms in told if end in final} - set(found)
    if missing or set(found) - told:
        return f"results of windows: missing {sorted(missing)}, too many {sorted(set(found) - told)}"
    for (end, at_ms), idents in [*found.items(), *(((end, END_MS), final[end]) for end in final)]:
        wanted = sorted(row.ident for row in rows if row.end == end and row.before_ms < at_ms)
        if idents != wanted:
            return f"the result at {at_ms} of the window until {end} has {idents}, and not {wanted}"
    return ""


def _rows_of(part: Sequence[Written]) -> Iterator[_InPart]:
    """The records of a partition that aren't late."""
    now_ms = -1
    told: dict[int, int] = {}
    for record in part:
        at_ms = record.timestamp_ms
        end = (at_ms // _ALL_SIZE + 1) * _ALL_SIZE
        if now_ms < end + _ALL_GRACE:
            if told.get(end, -1) <= now_ms:
                told[end] = (max(now_ms, end - _ALL_SIZE) // _ALL_INTERVAL + 1) * _ALL_INTERVAL
            yield _InPart(end, now_ms, told[end], record.data["ident"])
        now_ms = max(now_ms, at_ms - MAX_DELAY_MS)
