"""Windows of all records: computed in parts, which one shard gathers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import orjson
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
    collect,
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
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
TEN = Tumbling(10 * MS)


def all_records(windows: Any = TEN, *, delay: int = 0, emit: Any = "close", **fields: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in", key="int", watermark=Watermark(delay)))
    late = job.topic("late", key="int")
    windowed = stream.window_all(windows, name="w", late=late, emit=emit)
    windowed.aggregate(**(fields or {"n": count()})).to(job.topic("out"))
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


# --- results before windows close -----------------------------------------------------------------------


HUNDRED = Tumbling(100 * MS)


def outputs(driver: Driver, field: str = "values") -> list[tuple[int, int, Any]]:
    """Timestamp, start and a field of each new result."""
    return [(one.timestamp, one.value["start"], one.value[field]) for one in driver.read("out")]


def test_result_of_an_interval_has_what_all_shards_had_read_by_then() -> None:
    with Driver(all_records(HUNDRED, emit=10 * MS, values=collect()), partitions=2) as driver:
        send(driver, (0, 3, 3), (0, 12, 12), (0, 25, 25))
        assert outputs(driver) == []  # the other shard isn't so far
        send(driver, (1, 4, 4), (1, 19, 19))
        # The first shard is ahead: what it has told since isn't in it.
        assert outputs(driver) == [(10, 0, [3, 12, 4, 19])]
        send(driver, (1, 31, 31))
        assert outputs(driver) == [(20, 0, [3, 12, 4, 19, 25, 31])]
        send(driver, (0, 150, 150), (1, 130, 130))
        # Nothing of the first window was told at another interval. The next one has changed.
        assert outputs(driver) == [(99, 0, [3, 12, 4, 19, 25, 31]), (110, 100, [150, 130])]


def test_result_of_an_interval_has_the_first_record_of_each_shard() -> None:
    job = all_records(HUNDRED, emit=10 * MS, delay=30, values=collect())
    with Driver(job, partitions=2) as driver:
        send(driver, (0, 3, 3), (0, 12, 12), (0, 45, 45))
        # The other shard had read this one, and nothing else, when its event time came to 10.
        send(driver, (1, 42, 42), (1, 60, 60))
        assert outputs(driver) == [(10, 0, [3, 12, 45, 42])]


def test_results_at_intervals_do_not_wait_for_the_grace() -> None:
    windows = Tumbling(100 * MS, grace=50 * MS)
    with Driver(all_records(windows, emit=10 * MS), partitions=2) as driver:
        send(driver, (0, 1, 3), (1, 1, 4), (0, 1, 12))
        send(driver, (1, 1, 15))
        assert outputs(driver, "n") == [(10, 0, 4)]
        send(driver, (0, 1, 120), (1, 1, 125))
        assert outputs(driver, "n") == [(110, 100, 2)]
        send(driver, (0, 1, 90), (1, 1, 145), (0, 1, 145))
        assert outputs(driver, "n") == [(130, 0, 5), (130, 100, 4)]
        send(driver, (1, 1, 155), (0, 1, 155))
        assert outputs(driver, "n") == [(99, 0, 5), (150, 100, 6)]


def test_nothing_of_a_part_that_was_told_is_kept_in_its_shard() -> None:
    bench = TimersBench(all_records(HUNDRED, emit=10 * MS))
    for at in (3, 7, 12):
        bench.run(at, at)
    bench.barrier()
    assert list(bench.store.keys_of("w-parts//windows")) == []
    assert list(bench.store.keys_of("w-parts//due")) == []
    bench.run(1, 15)
    bench.run(1, 100)
    bench.barrier()
    parts = [
        (value["end"], value["n"], at)
        for _topic, raw, _key, at, *_ in bench.outputs
        if (value := orjson.loads(raw))
    ]
    assert parts == [(100, 3, 10), (100, 1, 20)]


def test_each_record_leads_to_a_result_with_its_timestamp_and_headers() -> None:
    with Driver(
        all_records(Hopping(10 * MS, 5 * MS), emit="update", values=collect()), partitions=2
    ) as driver:
        driver.send("in", 1, timestamp=7, partition=0, headers=[("h", b"x")])
        first, second = driver.read("out")
        assert (first.value, first.timestamp, first.key) == ({"start": 0, "end": 10, "values": [1]}, 7, None)
        assert (second.value["start"], list(second.headers)) == (5, [("h", b"x")])
        send(driver, (1, 2, 8))
        assert outputs(driver) == [(8, 0, [1, 2]), (8, 5, [1, 2])]
        send(driver, (0, 3, 50), (1, 4, 51))
        # Nothing comes of it that windows have closed.
        assert outputs(driver) == [(50, 45, [3]), (50, 50, [3]), (51, 45, [3, 4]), (51, 50, [3, 4])]


def test_results_before_windows_close_survive_crashes() -> None:
    for emit, wanted in ((10 * MS, [(10, 0, 3), (99, 0, 3)]), ("update", [(3, 0, 1), (4, 0, 2), (12, 0, 3)])):
        with Driver(all_records(HUNDRED, emit=emit), partitions=2, auto_barrier=False) as driver:
            send(driver, (0, 1, 3), (1, 1, 4))
            driver.barrier()
            driver.crash()
            send(driver, (0, 1, 12))
            driver.crash()
            driver.settle()
            driver.barrier()
            send(driver, (0, 1, 200), (1, 1, 200))
            driver.crash()
            for _ in range(3):
                driver.settle()
                driver.barrier()
            assert [one for one in outputs(driver, "n") if one[1] == 0] == wanted


def test_results_before_windows_close_may_begin_and_end_with_another_version_of_the_job() -> None:
    """What is open in shards, and on its way between them, is counted however results are passed on."""
    with Driver(all_records(HUNDRED), partitions=2) as driver:
        send(driver, (0, 1, 3), (1, 1, 4))
        driver.restart(all_records(HUNDRED, emit="update"))
        send(driver, (0, 1, 5))
        assert outputs(driver, "n") == [(5, 0, 1)]
        send(driver, (0, 1, 120), (1, 1, 120))
        # What was left in the shards is told when it closes.
        assert [n for _at, start, n in outputs(driver, "n") if start == 0] == [2, 3]
        driver.restart(all_records(HUNDRED))
        send(driver, (0, 1, 230), (1, 1, 230))
        assert outputs(driver, "n") == [(199, 100, 2)]


def test_result_that_fails_at_an_interval_is_skipped_and_its_parts_stay() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window_all(HUNDRED, name="w", emit=10 * MS).aggregate(n=count())

    def fail(value: Any) -> Any:
        if value["n"] == 2:
            raise ValueError("no good")
        return value

    stream.map(fail, on_error="skip").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for at in (3, 12, 25, 31, 150):
            driver.send("in", 1, timestamp=at)
        assert outputs(driver, "n") == [(20, 0, 3), (30, 0, 4), (99, 0, 4), (110, 100, 1)]
        assert driver.skipped == 1  # the result at 10


# --- declarations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [Session(TEN.size), Sliding(TEN.size), Counted(5), "minutes"])
def test_windows_that_cannot_be_computed_in_parts_are_refused(windows: Any) -> None:
    with pytest.raises(JobError, match=r"window_all\(\) got .*") as caught:
        all_records(windows)
    assert "key_by(lambda value: 'all')" in str(caught.value)


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
    assert incompatibility(described, all_records(emit="update").build(Settings())) is None
    reason = incompatibility(described, all_records(emit=MS).build(Settings()))
    assert reason is not None
    assert "now emit at intervals" in reason
