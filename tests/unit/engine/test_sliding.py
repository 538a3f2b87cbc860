"""Sliding windows: which there are, what is in them, and what remains in the store."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Sliding, collect, count
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.engine.runner import HandlerError
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver
from tests.unit.engine.test_windows import TEN, job_with, results
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
WITHIN = Sliding(10 * MS)
FAR = 10_000


@dataclasses.dataclass
class Paid:
    cents: int


def sliding(windows: Any = WITHIN, *, emit: Any = "close", **options: Any) -> Job:
    job = Job("j")
    late = job.topic("late")
    stream = job.stream(job.topic("in")).window(windows, name="w", late=late, emit=emit, **options)
    stream.aggregate(values=collect()).to(job.topic("out"))
    return job


def run(bench: TimersBench, *times: int) -> list[Any]:
    for at in times:
        bench.run(at, at)
    return [one[1:] for one in results(bench.values(), "values")]


def test_each_combination_of_records_that_are_close_enough_is_in_one_window() -> None:
    bench = TimersBench(sliding())
    assert run(bench, 100, 105, 112, FAR) == [
        (90, 101, [100]),
        (95, 106, [100, 105]),
        (101, 112, [105]),
        (102, 113, [105, 112]),
        (106, 117, [112]),
    ]


def test_the_order_of_records_changes_nothing_while_windows_are_open() -> None:
    windows = Sliding(10 * MS, grace=50 * MS)
    ordered = run(TimersBench(sliding(windows)), 100, 105, 112, FAR)
    other = run(TimersBench(sliding(windows)), 112, 100, 105, FAR)
    assert [(start, end, sorted(values)) for start, end, values in other] == ordered
    assert (102, 113, [112, 105]) in other  # in the order in which they were processed


def test_window_that_begins_in_1970_is_there_once() -> None:
    assert run(TimersBench(sliding()), 2, 5, 10, FAR) == [
        (0, 11, [2, 5, 10]),
        (3, 14, [5, 10]),
        (6, 17, [10]),
    ]


def test_records_of_the_same_time_define_one_window() -> None:
    assert run(TimersBench(sliding()), 100, 100, FAR) == [(90, 101, [100, 100])]
    assert run(TimersBench(sliding(Sliding(0 * MS))), 100, 100, 101, FAR) == [
        (100, 101, [100, 100]),
        (101, 102, [101]),
    ]


def test_record_is_only_in_windows_that_have_not_closed() -> None:
    bench = TimersBench(sliding())
    # 101 comes when event time is 108: its own window, which ends with it, has closed.
    assert run(bench, 100, 108, 101, FAR) == [
        (90, 101, [100]),
        (98, 109, [100, 108, 101]),
        (101, 112, [108, 101]),
        (102, 113, [108]),
    ]
    assert bench.port.late == 0


def test_record_whose_windows_have_all_closed_is_late() -> None:
    bench = TimersBench(sliding(Sliding(10 * MS, grace=5 * MS)))
    run(bench, 100, 200)
    bench.run(185, 185)  # [185, 195] is open until 201
    assert bench.port.late == 0
    bench.run(184, 184)
    assert bench.port.late == 1
    assert [topic for topic, *_ in bench.open if topic == "late"] == ["late"]


def test_each_window_that_a_record_changes_is_passed_on_if_asked_for() -> None:
    bench = TimersBench(sliding(Sliding(10 * MS, grace=50 * MS), emit="update"))
    assert run(bench, 100) == [(90, 101, [100])]
    assert run(bench, 112)[1:] == [(102, 113, [112])]
    # It ends one window, is in the one that begins behind 100, and begins one with 112 in it.
    assert run(bench, 106)[2:] == [
        (96, 107, [100, 106]),
        (101, 112, [106]),
        (102, 113, [112, 106]),
        (107, 118, [112]),
    ]
    assert len(run(bench, FAR)) == 7  # nothing when they close


def test_nothing_remains_in_the_store() -> None:
    bench = TimersBench(sliding())
    for at in (100, 105, 112, 106, 300, FAR):
        bench.run(at, at)
        bench.barrier()
    bench.run(0, 2 * FAR, key=b"x")
    bench.barrier()
    bench.run(0, 3 * FAR, key=b"x")
    bench.barrier()
    assert len(bench.store.scan(b"", b"\xff", 100, reverse=False)) == 3  # of the last record, and the grace


def test_due_windows_wait_without_a_change() -> None:
    """More windows are due than close at once. A record that comes in between isn't in them."""
    bench = TimersBench(sliding(Sliding(1_000 * MS)))
    for number in range(150):
        bench.run(0, 5_000, key=b"k%03d" % number)
    bench.run(1, 5_500)
    bench.run(2, 4_900, key=b"k149")
    bench.run(3, 5_500, key=b"k149")
    bench.run(4, 100_000, key=b"z")
    bench.timers.fire_all_events()
    found = [(start, values) for key, start, _, values in results(bench.values(), "values") if key == "k149"]
    assert found == [(4_000, [0]), (4_500, [0, 2, 3]), (4_901, [0, 3]), (5_001, [3])]


def test_windows_survive_a_crash() -> None:
    with Driver(sliding(), partitions=1, auto_barrier=False) as driver:
        driver.send("in", 1, key="k", timestamp=100)
        driver.send("in", 2, key="k", timestamp=105)
        driver.barrier()
        driver.send("in", 3, key="k", timestamp=112)
        driver.crash()
        driver.send("in", 4, key="k", timestamp=FAR)
        driver.barrier()
        assert [one["values"] for one in driver.read_values("out")] == [[1], [1, 2], [2], [2, 3], [3]]


def test_value_that_an_aggregate_cannot_take_fails_when_it_comes() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(WITHIN, name="w")
    windows.aggregate(values=collect(lambda value: value["v"])).to(job.topic("out"))
    bench = TimersBench(job)
    with pytest.raises(HandlerError, match="in the field 'values' of the window 'w': KeyError: 'v'"):
        bench.run({}, 100)


def test_values_of_a_model_are_kept_as_they_are() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in", value=Paid)).window(WITHIN, name="w")
    windows.aggregate(cents=collect(lambda paid: paid.cents)).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for cents, at in [(5, 100), (7, 104), (9, FAR)]:
            driver.send("in", Paid(cents), key="k", timestamp=at)
        assert [one["cents"] for one in driver.read_values("out")] == [[5], [5, 7], [7]]


def test_failed_window_is_skipped_and_those_behind_it_close() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(WITHIN, name="w").aggregate(values=collect())

    def fail(value: Any) -> Any:
        return 1 // (len(value["values"]) - 2) and value

    windows.map(fail, on_error="skip").to(job.topic("out"))
    bench = TimersBench(job)
    assert [values for _start, _end, values in run(bench, 100, 105, 112, FAR)] == [[100], [105], [112]]
    assert bench.port.skipped == 2


def test_change_of_the_windows_or_the_values_is_refused() -> None:
    described = job_with(WITHIN).build(Settings()).describe()
    assert incompatibility(described, job_with(Sliding(10 * MS, grace=MS)).build(Settings())) is None
    for other in (Sliding(11 * MS), TEN):
        reason = incompatibility(described, job_with(other).build(Settings()))
        assert reason is not None
        assert "used to be sliding (within_ms=10)" in reason
    job = Job("j")
    stream = job.stream(job.topic("in", value="text")).window(WITHIN, name="w").aggregate(n=count())
    stream.to(job.topic("out"))
    reason = incompatibility(described, job.build(Settings()))
    assert reason is not None
    assert "keep json values" in reason


def test_declaration_that_cannot_work_is_refused() -> None:
    with pytest.raises(JobError, match="within=5 of Sliding is not a timedelta"):
        Sliding(5)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="out of range"):
        Sliding(-MS)
