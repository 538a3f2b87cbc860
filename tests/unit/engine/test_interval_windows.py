"""Windows that pass results on at intervals."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import Counted, Hopping, Job, Session, Sliding, Tumbling, collect, count
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver
from tests.unit.engine.test_windows import TEN, results
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
HUNDRED = Tumbling(100 * MS)


def at_intervals(windows: Any = HUNDRED, emit: Any = 10 * MS, **options: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(windows, name="w", emit=emit, **options)
    stream.aggregate(values=collect()).to(job.topic("out"))
    return job


def written(bench: TimersBench) -> list[tuple[int, list[int]]]:
    """Timestamp and values of each result."""
    times = [at for *_, at, _headers in bench.open]
    return list(zip(times, (value["values"] for value in bench.values()), strict=True))


def test_windows_that_have_changed_are_passed_on_when_event_time_passes_an_interval() -> None:
    bench = TimersBench(at_intervals())
    for at in (3, 7):
        bench.run(at, at)
    assert written(bench) == []
    bench.run(12, 12)
    assert written(bench) == [(10, [3, 7, 12])]  # what is in it when its turn comes
    bench.run(15, 15)
    bench.run(34, 34)
    assert written(bench)[1:] == [(20, [3, 7, 12, 15, 34])]
    bench.run(99, 99)
    assert written(bench)[2:] == [(40, [3, 7, 12, 15, 34, 99])]
    bench.run(150, 150)
    # A window has closed; the next one has changed.
    assert written(bench)[3:] == [(99, [3, 7, 12, 15, 34, 99]), (110, [150])]
    bench.run(170, 170)
    assert written(bench)[5:] == [(160, [150, 170])]


def test_no_result_has_a_time_before_its_window() -> None:
    bench = TimersBench(at_intervals())
    bench.run(3, 3)
    bench.run(205, 205)  # event time has passed 10, 20 and so on, but this window had not begun then
    assert written(bench) == [(10, [3]), (99, [3])]
    bench.run(211, 211)
    assert written(bench)[2:] == [(210, [205, 211])]


def test_nothing_is_passed_on_if_nothing_changes() -> None:
    bench = TimersBench(at_intervals())
    bench.run(1, 3)
    for at in (11, 21, 31):
        bench.run(0, at, key=b"other")
    assert [key for _topic, _value, key, *_ in bench.open] == [b"k", *[b"other"] * 3]


def test_several_windows_of_a_key_are_passed_on_in_the_order_of_their_ends() -> None:
    bench = TimersBench(at_intervals(Hopping(40 * MS, 20 * MS)))
    bench.run(1, 25)
    bench.run(2, 31)
    assert [one[1:3] for one in results(bench.values(), "values")] == [(0, 40), (20, 60)]


def test_nothing_remains_in_the_store() -> None:
    bench = TimersBench(at_intervals())
    for at in (3, 12, 55, 101, 203):
        bench.run(at, at)
        bench.barrier()
    bench.run(0, 1_000, key=b"x")
    bench.barrier()
    assert len(bench.store.scan(b"", b"\xff", 100, reverse=False)) == 2  # the last window and its note


def test_what_is_noted_survives_a_crash() -> None:
    with Driver(at_intervals(), partitions=1, auto_barrier=False) as driver:
        driver.send("in", 3, key="k", timestamp=3)
        driver.barrier()
        driver.send("in", 12, key="k", timestamp=12)
        driver.crash()
        driver.barrier()
        assert [one["values"] for one in driver.read_values("out")] == [[3, 12]]


def test_windows_that_fail_at_an_interval_are_skipped_and_go_on() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(HUNDRED, name="w", emit=10 * MS).aggregate(n=count())

    def fail(value: Any) -> Any:
        if value["n"] == 2:
            raise ValueError("no good")
        return value

    stream.map(fail, on_error="skip").to(job.topic("out"))
    bench = TimersBench(job)
    for at in (3, 12, 25, 31):
        bench.run(at, at)
    assert [one["n"] for one in bench.values()] == [3, 4]
    assert bench.port.skipped == 1


@pytest.mark.parametrize("windows", [Session(TEN.size), Sliding(TEN.size), Counted(5)])
def test_other_windows_are_refused(windows: Any) -> None:
    with pytest.raises(JobError, match="doesn't go with"):
        at_intervals(windows)
    with pytest.raises(JobError, match="emit="):
        at_intervals(emit=timedelta())


def test_change_to_intervals_is_refused_but_another_interval_is_not() -> None:
    described = at_intervals().build(Settings()).describe()
    assert incompatibility(described, at_intervals(emit=20 * MS).build(Settings())) is None
    reason = incompatibility(described, at_intervals(emit="close").build(Settings()))
    assert reason is not None
    assert "used to emit at intervals, and now emit in another way" in reason
