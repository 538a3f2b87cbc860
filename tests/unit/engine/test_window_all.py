"""Windows of all records: computed in parts, which one shard gathers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import (
    Aggregate,
    Counted,
    Cumulative,
    Hopping,
    Job,
    Session,
    Sliding,
    Tumbling,
    Watermark,
    count,
    first,
    last,
    mean,
    reduce,
    sum_,
    top_n,
    variance,
)
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver
from tests.unit.engine.test_windows import job_with

MS = timedelta(milliseconds=1)
TEN = Tumbling(10 * MS)


def all_records(windows: Any = TEN, *, delay: int = 0, **fields: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in", key="int", watermark=Watermark(delay)))
    late = job.topic("late", key="int")
    stream.window_all(windows, name="w", late=late).aggregate(**(fields or {"n": count()})).to(
        job.topic("out")
    )
    return job


def send(driver: Driver, *records: tuple[int, Any, int]) -> None:
    """Each as partition, value and timestamp."""
    for partition, value, at in records:
        driver.send(
            "in", value, key=value if isinstance(value, int) else None, timestamp=at, partition=partition
        )


def test_window_contains_the_records_of_all_shards_and_keys_and_closes_once() -> None:
    with Driver(all_records(total=sum_()), partitions=2) as driver:
        send(driver, (0, 1, 3), (1, 2, 5), (0, 3, 12))
        assert driver.read("out") == []  # the other shard is not so far
        send(driver, (1, 4, 11))
        (record,) = driver.read("out")
        assert record.value == {"start": 0, "end": 10, "total": 3}
        assert (record.key, record.timestamp) == (None, 9)
        send(driver, (0, 0, 30), (1, 0, 30))
        assert driver.read_values("out") == [{"start": 10, "end": 20, "total": 7}]


def test_records_need_no_key() -> None:
    with Driver(all_records(), partitions=1) as driver:
        for at in (1, 2, 30):
            driver.send("in", None, timestamp=at)
        assert driver.read_values("out") == [{"start": 0, "end": 10, "n": 2}]


@pytest.mark.parametrize(
    ("windows", "wanted"),
    [
        (Hopping(10 * MS, 5 * MS), [(0, 10, 2), (5, 15, 3), (10, 20, 2)]),
        (Cumulative(20 * MS, 10 * MS), [(0, 10, 2), (0, 20, 4)]),
        (Tumbling(10 * MS, offset=3 * MS), [(-7, 3, 1), (3, 13, 2), (13, 23, 1)]),
    ],
)
def test_windows_of_several_kinds(windows: Any, wanted: Any) -> None:
    with Driver(all_records(windows), partitions=2) as driver:
        send(driver, (0, 1, 2), (1, 1, 7), (0, 1, 12), (1, 1, 14), (0, 1, 100), (1, 1, 100))
        assert [(one["start"], one["end"], one["n"]) for one in driver.read_values("out")] == wanted


def test_aggregates_of_parts_become_those_of_the_whole() -> None:
    fields: dict[str, Any] = {
        "mean": mean(),
        "variance": variance(),
        "first": first(),
        "last": last(),
        "top": top_n(2, by=lambda value: value),
        "product": reduce(lambda one, other: one * other),
    }
    with Driver(all_records(**fields), partitions=3) as driver:
        send(driver, (0, 3, 5), (1, 1, 2), (0, 5, 8), (1, 7, 6), *((number, 0, 50) for number in range(3)))
        (value,) = driver.read_values("out")
        assert value == {
            "start": 0,
            "end": 10,
            "mean": 4.0,
            "variance": 5.0,
            "first": 1,
            "last": 5,
            "top": [7, 5],
            "product": 105,
        }


def test_late_records_are_those_of_their_shard() -> None:
    with Driver(all_records(Tumbling(10 * MS, grace=5 * MS), delay=3), partitions=2) as driver:
        send(driver, (0, 1, 3), (1, 1, 4), (0, 1, 18))  # the clock of the first shard is 15
        send(driver, (0, 7, 9), (1, 1, 9))
        assert [(one.key, one.value) for one in driver.records("late")] == [(7, 7)]
        send(driver, (1, 1, 40), (0, 1, 40))
        assert [one["n"] for one in driver.read_values("out")] == [3, 1]


def test_parts_survive_crashes() -> None:
    with Driver(all_records(), partitions=2, auto_barrier=False) as driver:
        send(driver, (0, 1, 3), (1, 1, 4))
        driver.barrier()
        send(driver, (0, 1, 30))
        driver.crash()
        driver.barrier()
        driver.crash()
        send(driver, (1, 1, 30))
        driver.settle()
        driver.barrier()
        assert driver.read_values("out") == [{"start": 0, "end": 10, "n": 2}]


def test_results_may_go_on_to_windows_behind_a_key_by() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window_all(TEN, name="all").aggregate(n=count())
    stream.key_by(lambda value: "most").window(Tumbling(20 * MS), name="most").aggregate(
        most=top_n(1, by=lambda value: value["n"], of=lambda value: value["n"])
    ).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for at in (1, 2, 12, 100):
            driver.send("in", 1, timestamp=at)
        assert [one["most"] for one in driver.read_values("out")] == [[2]]


# --- declarations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [Session(TEN.size), Sliding(TEN.size), Counted(5), "minutes"])
def test_windows_that_cannot_be_computed_in_parts_are_refused(windows: Any) -> None:
    with pytest.raises(JobError, match=r"window_all\(\) got .*") as caught:
        all_records(windows)
    assert "key_by(lambda value: 'all')" in str(caught.value)


@pytest.mark.parametrize(("emit", "wanted"), [("update", [(1, 1), (2, 2)]), (10 * MS, [(2, 10), (2, 99)])])
def test_what_the_message_says_of_results_before_windows_close_does_it(emit: Any, wanted: Any) -> None:
    job = Job("j")
    stream = job.stream(job.topic("in", key="int"))
    with pytest.raises(JobError, match=r"doesn't go with window_all\(\)") as caught:
        stream.window_all(Tumbling(100 * MS), name="all", emit=emit)
    assert "key_by(lambda value: 'all')" in str(caught.value)
    windows = stream.key_by(lambda value: "all").window(Tumbling(100 * MS), name="w", emit=emit)
    windows.aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions=2) as driver:
        send(driver, (0, 1, 1), (1, 1, 2))
        send(driver, (0, 1, 200), (1, 1, 200))
        found = [(one.value["n"], one.timestamp) for one in driver.read("out") if one.value["start"] == 0]
        assert found == wanted


def test_aggregate_that_cannot_be_merged_is_refused() -> None:
    plain = Aggregate("own", init=int, add=lambda kept, value: kept + value)
    with pytest.raises(JobError, match="without merge=, but it is computed in parts, one for each shard"):
        all_records(own=plain)


def test_change_of_the_windows_is_refused() -> None:
    described = all_records().build(Settings()).describe()
    assert incompatibility(described, all_records(Tumbling(10 * MS, grace=MS)).build(Settings())) is None
    reason = incompatibility(described, all_records(Tumbling(20 * MS)).build(Settings()))
    assert reason is not None
    assert "used to be tumbling (size_ms=10), and now are tumbling (size_ms=20)" in reason
    assert incompatibility(described, job_with(TEN).build(Settings())) is not None
