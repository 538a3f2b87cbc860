"""Windows of a number of records."""

from __future__ import annotations

from typing import Any

import pytest

from fcluster import Counted, Job, Tumbling, collect, count
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver
from tests.unit.engine.test_windows import TEN, job_with, results
from tests.unit.engine.timers_bench import TimersBench


def three(every: int | None = None, **options: Any) -> Job:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Counted(3, every), name="w", **options)
    windows.aggregate(values=collect()).to(job.topic("out"))
    return job


def send(driver: Driver, *values: int, key: str = "k", at: int = 5) -> None:
    for value in values:
        driver.send("in", value, key=key, timestamp=at + value)


def values_of(driver: Driver) -> list[list[int]]:
    return [one["values"] for one in driver.read_values("out")]


def test_window_closes_with_its_last_record_and_is_that_of_its_key() -> None:
    with Driver(three(), partitions=1) as driver:
        send(driver, 1, 2)
        send(driver, 7, 8, key="other")
        assert values_of(driver) == []
        send(driver, 3, 4, 5)
        assert values_of(driver) == [[1, 2, 3]]
        send(driver, 9, key="other")
        assert values_of(driver) == [[7, 8, 9]]


def test_result_has_the_times_of_its_records_and_the_timestamp_of_the_last_one() -> None:
    with Driver(three(), partitions=1) as driver:
        for at in (50, 20, 30):
            driver.send("in", at, key="k", timestamp=at)
        (record,) = driver.records("out")
        assert record.value == {"key": "k", "start": 20, "end": 51, "values": [50, 20, 30]}
        assert (record.key, record.timestamp) == ("k", 30)


def test_windows_overlap_if_they_begin_more_often() -> None:
    with Driver(three(every=2), partitions=1) as driver:
        send(driver, *range(8))
        assert values_of(driver) == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


def test_each_update_is_passed_on_if_asked_for() -> None:
    with Driver(three(every=2, emit="update"), partitions=1) as driver:
        send(driver, 1, 2, 3, 4)
        assert values_of(driver) == [[1], [1, 2], [1, 2, 3], [3], [3, 4]]


def test_full_window_leaves_nothing_in_the_store() -> None:
    bench = TimersBench(three())
    for number in range(3):
        bench.run(number, number)
        bench.barrier()
    assert results(bench.values(), "values") == [("k", 0, 3, [0, 1, 2])]
    assert not bench.store.scan(b"", b"\xff", 10, reverse=False)


@pytest.mark.parametrize("lost", [1, 2])
def test_open_window_survives_a_crash(lost: int) -> None:
    with Driver(three(), partitions=1, auto_barrier=False) as driver:
        send(driver, 1, 2)
        driver.barrier()
        send(driver, *range(3, 3 + lost))
        driver.crash()
        driver.barrier()
        send(driver, 3 + lost)
        driver.barrier()
        assert values_of(driver) == [[1, 2, 3]]


def test_job_with_counted_windows_alone_uses_no_event_time() -> None:
    (stage,) = three().build(Settings()).stages
    assert not stage.keeps_time
    assert stage.windows
    assert stage.changelog is not None


def test_counted_windows_may_follow_others_and_precede_them() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(TEN, name="a").aggregate(n=count())
    stream.window(Counted(2), name="b").aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for at in (1, 11, 21):
            driver.send("in", 1, key="k", timestamp=at)
        assert [(one["start"], one["end"], one["n"]) for one in driver.read_values("out")] == [(9, 20, 2)]


def test_record_that_fails_is_in_no_window() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Counted(2), name="w", on_error="skip")
    windows.aggregate(values=collect(lambda value: value["v"])).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for value in ({"v": 1}, {}, {"v": 2}):
            driver.send("in", value, key="k", timestamp=1)
        driver.send("in", {"v": 3}, timestamp=1)
        assert values_of(driver) == [[1, 2]]
        assert driver.skipped == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "size=0 of Counted"),
        ((True,), "size=True of Counted"),
        ((3, 4), "every=4 of Counted"),
        ((2_000, 1), "each record is in 2000 windows"),
    ],
)
def test_declaration_that_cannot_work_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Counted(*arguments)


def test_late_records_are_refused_as_there_are_none() -> None:
    job = Job("j")
    with pytest.raises(JobError, match="no record is late for such windows"):
        job.stream(job.topic("in")).window(Counted(2), name="w", late=job.topic("late"))


def test_change_of_the_number_or_the_kind_is_refused() -> None:
    described = job_with(Counted(3)).build(Settings()).describe()
    assert incompatibility(described, job_with(Counted(3)).build(Settings())) is None
    for other in (Counted(4), Counted(3, 1), TEN, Tumbling(TEN.size * 3)):
        reason = incompatibility(described, job_with(other).build(Settings()))
        assert reason is not None
        assert "used to be counted (size=3, every=3)" in reason
