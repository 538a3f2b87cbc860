"""Timestamps that cannot be meant: microseconds, nanoseconds, negative ones. All windows close."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import Cumulative, Hopping, Job, Session, Sliding, Tumbling, collect, days, minutes
from fcluster.testing import Driver
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
MICROSECONDS, NANOSECONDS = 1_767_225_600_000_000, 1_767_225_600_000_000_000
WINDOWS = (
    Tumbling(10 * MS),
    Hopping(10 * MS, 5 * MS, grace=days(365)),
    Cumulative(10 * MS, 5 * MS),
    Session(minutes(1)),
    Sliding(10 * MS, grace=MS),
)


def windowed(windows: Any, emit: Any = "close", **options: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(windows, name="w", emit=emit, **options)
    stream.aggregate(values=collect()).to(job.topic("out"))
    return job


@pytest.mark.parametrize("emit", ["close", "update", 5 * MS])
@pytest.mark.parametrize("windows", WINDOWS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("at", [MICROSECONDS, 2**60 - 1, 2**60, NANOSECONDS, 2**62, 2**63 - 120_000])
def test_windows_of_absurd_times_close_at_the_end_and_all_before_them_is_late(
    at: int, windows: Any, emit: Any
) -> None:
    with Driver(windowed(windows, emit), partitions=1, auto_barrier=False) as driver:
        driver.send("in", 1, key="k", timestamp=1_000)
        driver.send("in", 2, key="k", timestamp=at)
        driver.barrier()
        driver.crash()
        driver.send("in", 3, key="k", timestamp=1_001)
        driver.finish()
        assert {value for row in driver.read_values("out") for value in row["values"]} == {1, 2}
        assert driver.late == 1


@pytest.mark.parametrize("windows", WINDOWS, ids=lambda one: type(one).__name__)
def test_negative_times_move_no_event_time_and_are_in_no_window(windows: Any) -> None:
    bench = TimersBench(windowed(windows, on_error="skip"))
    for at in (-1, -5, -(2**63)):
        bench.run(1, at)
    assert (bench.clock.now_ms, bench.port.skipped, bench.port.late) == (None, 3, 0)
    bench.run(2, 0)
    assert bench.clock.now_ms == 0
