"""`Driver.finish`: the end of a bounded run, at which everything that waits for event time is due."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Tumbling, Watermark, count
from fcluster.engine.clock import END_MS
from fcluster.testing import Driver, JobStopped

MINUTE = Tumbling(timedelta(minutes=1))


def windowed() -> Job:
    """Counts records per key and minute, then results per minute, behind a repartition."""
    job = Job("windowed")
    clicks, counts = job.topic("clicks", watermark=Watermark(max_delay_ms=10_000)), job.topic("counts")
    per_key = job.stream(clicks).window(MINUTE, name="per-key").aggregate(n=count())
    per_minute = per_key.key_by(lambda _result: "all", name="all")
    per_minute.window(MINUTE, name="per-minute").aggregate(keys=count()).to(counts)
    return job


@pytest.mark.parametrize("auto_barrier", [True, False])
@pytest.mark.parametrize("crash", [True, False])
def test_all_windows_close_stage_by_stage(auto_barrier: bool, crash: bool) -> None:
    with Driver(windowed(), partitions=3, auto_barrier=auto_barrier) as driver:
        for number in range(30):
            driver.send("clicks", {}, key=str(number % 7), timestamp=60_000 + 2_000 * number)
        if crash:
            driver.crash()
        driver.settle()
        assert [one["keys"] for one in driver.read_values("counts")] == []
        driver.finish()
        assert [(one["start"], one["keys"]) for one in driver.read_values("counts")] == [(60_000, 7)]
        assert driver.late == 0


def test_empty_partitions_do_not_hold_the_end_back() -> None:
    with Driver(windowed(), partitions=8) as driver:
        driver.send("clicks", {}, key="a", timestamp=60_000)
        driver.finish()
        assert [one["keys"] for one in driver.read_values("counts")] == [1]


def test_job_without_any_record_can_finish() -> None:
    with Driver(windowed()) as driver:
        driver.finish()
        assert driver.read_values("counts") == []


def test_nothing_can_be_sent_after_the_end() -> None:
    with Driver(windowed()) as driver:
        driver.finish()
        with pytest.raises(JobStopped, match="finished"):
            driver.send("clicks", {}, key="a", timestamp=60_000)


def test_stage_upstream_tells_its_end_only_after_its_last_window() -> None:
    """Each timer is an epoch of its own here, so the stage behind would see an end that comes too early."""
    with Driver(windowed(), partitions=1) as driver:
        for minute in range(1, 6):
            driver.send("clicks", {}, key="a", timestamp=60_000 * minute)
            driver.send("clicks", {}, key="b", timestamp=60_000 * minute)
        driver.finish()
        results = driver.read_values("counts")
        assert [(one["start"], one["keys"]) for one in results] == [(60_000 * at, 2) for at in range(1, 6)]
        assert driver.late == 0


def timed() -> Job:
    """A handler that closes what it has counted, reminds once in between, and ticks every second."""
    job = Job("timed")
    orders, done = job.topic("orders", watermark=Watermark()), job.topic("done")

    @job.process(orders, to=done)
    def order(ctx: Any, _order: Any) -> None:
        ctx.timer("close", at=ctx.timestamp + 30_000)
        ctx.timer("tick", at=ctx.timestamp + 1_000)
        ctx.timer("wall", at=ctx.processing_time + 1_000, clock="processing")

    @order.on_timer("close")
    def close(key: str, ctx: Any) -> Any:
        return {"closed": key, "at": ctx.timestamp}

    @order.on_timer("tick")
    def tick(key: str, ctx: Any) -> Any:
        ctx.timer("tick", at=ctx.timestamp + 1_000)
        return {"tick": key, "at": ctx.timestamp}

    @order.on_timer("wall")
    def wall(key: str, ctx: Any) -> Any:
        return {"wall": key}

    return job


def test_timers_in_event_time_fire_and_none_is_set_again() -> None:
    with Driver(timed(), partitions=1) as driver:
        driver.send("orders", {}, key="a", timestamp=1_000)
        driver.finish()
        assert driver.read_values("done") == [{"tick": "a", "at": 2_000}, {"closed": "a", "at": 31_000}]
        assert list(driver.timers("order", "a")) == ["wall"]


def test_event_time_follows_the_timers_that_fire() -> None:
    with Driver(timed(), partitions=1) as driver:
        driver.send("orders", {}, key="a", timestamp=1_000)
        driver.finish()
        assert driver.event_times("order") == {0: 31_000}


def test_window_behind_a_timer_counts_what_the_timer_writes_at_the_end() -> None:
    job = Job("behind")
    orders, done = job.topic("orders", watermark=Watermark()), job.topic("done")

    @job.process(orders, to=job.topic("closed"))
    def order(ctx: Any, _order: Any) -> None:
        ctx.timer("close", at=ctx.timestamp + 600_000)

    @order.on_timer("close")
    def close(key: str, ctx: Any) -> Any:
        return {"closed": key}

    closed = job.stream(job.topic("closed"))
    closed.window(MINUTE, name="closing").aggregate(n=count()).to(done)
    with Driver(job, partitions=2) as driver:
        driver.send(orders, {}, key="a", timestamp=1_000)
        driver.send(orders, {}, key="b", timestamp=5_000)
        driver.finish()
        assert sorted(one["key"] for one in driver.read_values(done)) == ["a", "b"]
        assert driver.late == 0


def test_job_without_event_time_only_settles() -> None:
    job = Job("plain")
    words = job.topic("words", value="text", key="text")
    job.stream(words).map(str.upper).to(job.topic("loud", value="text"))
    with Driver(job, auto_barrier=False) as driver:
        driver.send(words, "a", key="a")
        driver.finish()
        assert driver.read_values("loud") == ["A"]


def test_idle_partition_upstream_does_not_end_event_time_before_its_time() -> None:
    job = windowed()
    with Driver(job, partitions={"clicks": 2}) as driver:
        driver.send("clicks", {}, key="a", timestamp=60_000, partition=0)
        driver.send("clicks", {}, key="b", timestamp=61_000, partition=1)
        driver.set_idle("clicks", 1)
        driver.finish()
        assert [one["keys"] for one in driver.read_values("counts")] == [2]


@pytest.mark.parametrize("timestamp", [1_767_225_600_000_000_000, 2**62, 2**63 - 120_001])
def test_windows_of_timestamps_that_are_no_milliseconds_close_at_the_end_too(timestamp: int) -> None:
    with Driver(windowed(), partitions=2) as driver:
        for number in range(3):
            driver.send("clicks", {}, key=str(number), timestamp=timestamp + number)
        driver.finish()
        assert sum(one["keys"] for one in driver.read_values("counts")) == 3


def test_end_is_far_after_all_times() -> None:
    assert END_MS > 2**63 + 253_402_300_799_999 * 2
