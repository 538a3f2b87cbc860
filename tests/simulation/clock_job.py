"""The job with windows in processing time. In which windows a record is depends on clocks, crashes and moves,
so there are no models of its stages: `judge` looks at what is there in the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from fcluster import Hopping, Job, Session, Tumbling, collect
from fcluster.common.settings import Settings
from tests.simulation.jobs import JOB, SINK, SOURCE, SimJob, Written, group_of

_MS = timedelta(milliseconds=1)
_SIZE_MS = 40
_CLOCK_ERROR_MS = 2_000
"""So that clocks of hosts differ by more than a shard takes to move."""
_TUMBLING, _HOPPING, _SESSIONS = "tumbling", "hopping", "sessions"
_TIMES = {_TUMBLING: 1, _HOPPING: 2, _SESSIONS: 1}
"""In how many windows of a step each record is."""


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


def judge(idents: Sequence[int], outputs: Mapping[str, list[list[Written]]]) -> str:
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
        wanted = Counter(dict.fromkeys(idents, times))
        if found[step] != wanted:
            return f"records of {step}: too many {found[step] - wanted}, too few {wanted - found[step]}"
    return ""


def _ident(record: Any) -> int:
    return record["ident"]


def _named(step: str) -> Any:
    def named(result: Any) -> Any:
        return {"step": step, **result}

    return named
