"""A record at the last moment at which a window or a join takes it is in it, however partitions interleave.

Records are in order in each partition, and their topics have no delay. So none is late: what is the result
follows from the records alone. Many of them have the same timestamp, or are exactly as far apart as the step
allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fcluster import Cumulative, Hopping, Job, Session, Sliding, Tumbling, collect
from fcluster.engine.clock import EventClock
from fcluster.engine.pairs import OpenPairs
from fcluster.engine.windows import OpenInTime
from fcluster.graph.operators import Window
from fcluster.testing import Driver

MS = timedelta(milliseconds=1)
PARTITIONS = 2
LONG_MS = 5
"""The gap of sessions, the size of windows, the interval of joins, and the distance of many records."""
FAR_MS = 10_000
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}

Rows = list[tuple[str, int, int]]
"""Key, time and number of each record of a topic."""
Spans = list[tuple[int, int]]
"""Start and end of each window that records of these times define. The end isn't in it."""


# --- the model ----------------------------------------------------------------------------------------------


def sessions(times: list[int]) -> Spans:
    ordered = sorted(times)
    begins = [ordered[0], *(after for before, after in pairwise(ordered) if after - before > LONG_MS)]
    ends = [*(before for before, after in pairwise(ordered) if after - before > LONG_MS), ordered[-1]]
    return [(begin, end + LONG_MS) for begin, end in zip(begins, ends, strict=True)]


def sliding(times: list[int]) -> Spans:
    return [(at - LONG_MS, at + 1) for at in times] + [(at + 1, at + LONG_MS + 2) for at in times]


def tumbling(times: list[int]) -> Spans:
    return [(at // LONG_MS * LONG_MS, at // LONG_MS * LONG_MS + LONG_MS) for at in times]


def hopping(times: list[int]) -> Spans:
    return [(end - 2 * LONG_MS, end) for _start, first in tumbling(times) for end in (first, first + LONG_MS)]


def cumulative(times: list[int]) -> Spans:
    begins = [at // (2 * LONG_MS) * 2 * LONG_MS for at in times]
    return [(begin, begin + LONG_MS) for begin in begins] + [(begin, begin + 2 * LONG_MS) for begin in begins]


WINDOWS: dict[str, tuple[Any, Callable[[list[int]], Spans]]] = {
    "session": (Session(LONG_MS * MS), sessions),
    "sliding": (Sliding(LONG_MS * MS), sliding),
    "tumbling": (Tumbling(LONG_MS * MS), tumbling),
    "hopping": (Hopping(2 * LONG_MS * MS, LONG_MS * MS), hopping),
    "cumulative": (Cumulative(2 * LONG_MS * MS, LONG_MS * MS), cumulative),
}


def windows_of(spans_of: Callable[[list[int]], Spans], rows: Rows) -> list[Any]:
    """Key, start, end and numbers of each window, from all records at once."""
    of_key: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for key, at, number in rows:
        of_key[key].append((at, number))
    found: set[Any] = set()
    for key, timed in of_key.items():
        for start, end in spans_of([at for at, _ in timed]):
            numbers = tuple(sorted(number for at, number in timed if start <= at < end))
            if numbers:
                found.add((key, start, end, numbers))
    return sorted(found)


def pairs_of(left: Rows, right: Rows) -> list[Any]:
    """Of an outer join: the numbers of each pair, and of each record that stays alone."""
    near = {
        (number, other)
        for key, at, number in left
        for other_key, other_at, other in right
        if key == other_key and abs(at - other_at) <= LONG_MS
    }
    alone = [(number, -1) for _, _, number in left if number not in {one for one, _ in near}]
    others = [(-1, number) for _, _, number in right if number not in {one for _, one in near}]
    return sorted([*near, *alone, *others])


# --- the engine ---------------------------------------------------------------------------------------------


def windows_job(windows: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("l")).key_by("k", name="k")
    stream.window(windows, name="w").aggregate(numbers=collect(_number)).to(job.topic("out"))
    return job


def join_job() -> Job:
    job = Job("j")
    left, right = (job.stream(job.topic(side)).key_by("k", name=f"{side}k") for side in "lr")
    joined = left.join(right, _numbers, within=LONG_MS * MS, name="pairs", how="outer")
    joined.to(job.topic("out"))
    return job


def _number(value: Any) -> int:
    return value["n"]


def _numbers(left: Any, right: Any) -> list[int]:
    return [-1 if one is None else one["n"] for one in (left, right)]


_later = st.sampled_from((0, 0, 0, LONG_MS, LONG_MS, LONG_MS, 1, LONG_MS - 1, LONG_MS + 1))
_times = st.lists(st.tuples(st.sampled_from("ab"), _later), min_size=2, max_size=6)
"""Of a partition: key of each record, and how much later it is than the one before."""
plans: Any = st.tuples(st.tuples(*[_times] * PARTITIONS), st.tuples(*[_times] * PARTITIONS))
orders: Any = st.lists(
    st.tuples(st.integers(0, 2 * PARTITIONS - 1), st.sampled_from(("", "barrier", "barrier", "crash"))),
    max_size=24,
)
"""Which partition of both topics comes next, and what happens behind its record."""


def run(job: Job, sides: str, plan: Any, order: Any) -> tuple[list[Any], dict[str, Rows]]:
    """What a job writes, and what it was given."""
    rows: dict[str, Rows] = {side: [] for side in sides}
    waiting: list[tuple[str, int, Rows]] = []
    for side, partitions in zip(sides, plan, strict=False):
        for partition, drawn in enumerate(partitions):
            at, own = LONG_MS, list[tuple[str, int, int]]()
            for key, later in drawn:
                at += later
                own.append((key, at, sum(map(len, rows.values()))))
                rows[side].append(own[-1])
            waiting.append((side, partition, own))
    with Driver(job, partitions=PARTITIONS, auto_barrier=False) as driver:
        for number, (at_once, what) in enumerate([*order, *[(n, "") for n in range(60)]]):
            side, partition, own = waiting[at_once % len(waiting)]
            if own:
                key, at, number = own.pop(0)
                driver.send(side, {"k": key, "n": number}, timestamp=at, partition=partition)
            if what:
                getattr(driver, what)()
        assert not any(own for _side, _partition, own in waiting)
        driver.settle()
        for _ in range(2):  # the repartition hears of event time with a commit
            driver.advance(to_ms=FAR_MS, clock="event")
            driver.settle()
        assert driver.late == 0
        return driver.read_values("out"), rows


def check_windows(name: str, plan: Any, order: Any) -> None:
    windows, spans_of = WINDOWS[name]
    found, rows = run(windows_job(windows), "l", plan, order)
    in_order = sorted((one["key"], one["start"], one["end"], tuple(sorted(one["numbers"]))) for one in found)
    assert in_order == windows_of(spans_of, rows["l"])


def check_join(plan: Any, order: Any) -> None:
    found, rows = run(join_job(), "lr", plan, order)
    assert sorted(map(tuple, found)) == pairs_of(rows["l"], rows["r"])


CHECKS: dict[str, Callable[[Any, Any], None]] = {
    **{name: partial(check_windows, name) for name in WINDOWS},
    "join": check_join,
}


def search(name: str, examples: int, **options: Any) -> None:
    """Check so many examples."""

    @settings(max_examples=examples, **options, **SETTINGS)
    @given(plans, orders)
    def check(plan: Any, order: Any) -> None:
        CHECKS[name](plan, order)

    check()


@pytest.mark.parametrize("name", CHECKS)
def test_interleaving_of_partitions_decides_nothing(name: str) -> None:
    search(name, examples=40)


# --- it must be able to fail --------------------------------------------------------------------------------


def sessions_close_at_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record closes the session of another key to which the next record of its millisecond belongs."""
    monkeypatch.setattr(Window, "closes_after_ms", property(lambda window: window.windows.grace_ms))


class Ahead:
    """The shard's event time, and a millisecond."""

    def __init__(self, clock: EventClock) -> None:
        self._clock = clock

    @property
    def now_ms(self) -> int | None:
        return None if self._clock.now_ms is None else self._clock.now_ms + 1


def what_has_closed_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still open is decided by a clock that is a millisecond fast."""
    for one in (OpenInTime, OpenPairs):
        _plant(monkeypatch, one)


def _plant(monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    plain = opened.__init__

    def init(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        self.clock = Ahead(self.clock)

    monkeypatch.setattr(opened, "__init__", init)


@pytest.mark.parametrize(
    ("plant", "name"),
    [(sessions_close_at_their_ends, "session"), *((what_has_closed_is_ahead, name) for name in CHECKS)],
)
def test_what_closes_a_millisecond_too_early_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        search(name, examples=500, phases=[Phase.generate])
