"""Windows in processing time: which records are in them, when they close, and that none opens again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import (
    Counted,
    Cumulative,
    Hopping,
    Job,
    Session,
    Sliding,
    Tumbling,
    collect,
    count,
    first,
    last,
)
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.engine.runner import UnreadableRecordError
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.outline import outline
from fcluster.testing import Driver
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
TEN = Tumbling(10 * MS)
OLD = 5
"""A timestamp of records that has nothing to do with the clock."""
Result = tuple[str, int, int, Any]


def job_with(windows: Any = TEN, *, emit: Any = "close", on_error: Any = None, **fields: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(
        windows, name="w", emit=emit, clock="processing", on_error=on_error
    )
    stream.aggregate(**(fields or {"n": count()})).to(job.topic("out"))
    return job


def results(values: list[Any], field: str = "n") -> list[Result]:
    return [(value["key"], value["start"], value["end"], value[field]) for value in values]


def play(bench: TimersBench, *steps: tuple[int, Any]) -> None:
    """Process these values at these times, of the key "k"."""
    for wall_ms, value in steps:
        bench.advance(wall_ms)
        bench.run(value, OLD)


# --- which records are in them, and when they close -----------------------------------------------------


def test_record_is_in_the_window_of_the_time_at_which_it_is_processed() -> None:
    bench = TimersBench(job_with(values=collect()))
    play(bench, (101, "a"), (109, "b"), (110, "c"))
    assert results(bench.values(), "values") == [("k", 100, 110, ["a", "b"])]
    assert [output[3] for output in bench.open] == [109], "the window's last millisecond"


def test_window_closes_without_a_record_when_the_clock_reaches_its_end() -> None:
    bench = TimersBench(job_with())
    bench.run(1, OLD)
    assert bench.timers.next_processing_ms() == 10
    assert bench.advance(9) == 0
    assert bench.advance(10) == 1
    assert results(bench.values()) == [("k", 0, 10, 1)]
    assert bench.timers.next_processing_ms() is None


def test_record_needs_no_timestamp() -> None:
    bench = TimersBench(job_with())
    bench.run(1, -1)
    bench.advance(10)
    assert results(bench.values()) == [("k", 0, 10, 1)]


def test_no_event_time_closes_a_window() -> None:
    bench = TimersBench(job_with())
    bench.run(1, 10**12)
    bench.run(1, 10**12 + 1)
    assert bench.values() == []
    assert bench.port.late == 0


def test_windows_that_ended_while_nothing_ran_close_at_the_start() -> None:
    bench = TimersBench(job_with())
    bench.run(1, OLD)
    bench.barrier()
    bench.wall_ms = 7_200_000
    bench.crash()
    assert bench.timers.is_due()
    assert bench.advance(7_200_000) == 1
    assert results(bench.values()) == [("k", 0, 10, 1)]


def test_hopping_and_cumulative_windows() -> None:
    bench = TimersBench(job_with(Hopping(10 * MS, 5 * MS), values=collect()))
    play(bench, (101, 1), (106, 2))
    bench.advance(200)
    found = [("k", 95, 105, [1]), ("k", 100, 110, [1, 2]), ("k", 105, 115, [2])]
    assert results(bench.values(), "values") == found

    bench = TimersBench(job_with(Cumulative(10 * MS, 5 * MS), values=collect()))
    play(bench, (101, 1), (106, 2))
    bench.advance(200)
    assert results(bench.values(), "values") == [("k", 100, 105, [1]), ("k", 100, 110, [1, 2])]


def test_session_ends_when_no_record_was_processed_for_its_gap() -> None:
    bench = TimersBench(job_with(Session(10 * MS), values=collect()))
    play(bench, (100, 1), (110, 2), (121, 3))
    assert results(bench.values(), "values") == [("k", 100, 120, [1, 2])]
    bench.advance(131)
    assert bench.values()[1:] == []
    bench.advance(132)
    assert results(bench.values(), "values")[1:] == [("k", 121, 131, [3])]


def test_sliding_windows() -> None:
    bench = TimersBench(job_with(Sliding(10 * MS)))
    play(bench, (100, 1), (105, 2))
    bench.advance(300)
    assert results(bench.values()) == [("k", 90, 101, 1), ("k", 95, 106, 2), ("k", 101, 112, 1)]


def test_first_and_last_go_by_the_order_of_processing() -> None:
    bench = TimersBench(job_with(first=first(), last=last()))
    bench.wall_ms = 100
    for value, timestamp in (("a", 900), ("b", 1), ("c", 500)):
        bench.run(value, timestamp)
    bench.advance(110)
    (result,) = bench.values()
    assert (result["first"], result["last"]) == ("a", "c")


def test_update_has_the_time_at_which_the_record_was_processed() -> None:
    bench = TimersBench(job_with(emit="update"))
    play(bench, (101, 1), (102, 1), (111, 1))
    assert results(bench.values()) == [("k", 100, 110, 1), ("k", 100, 110, 2), ("k", 110, 120, 1)]
    assert [output[3] for output in bench.open] == [101, 102, 111]


def test_results_are_passed_on_at_intervals_of_the_clock() -> None:
    bench = TimersBench(job_with(emit=4 * MS))
    play(bench, (101, 1), (102, 1))
    bench.advance(103)
    assert bench.values() == []
    bench.advance(104)
    play(bench, (105, 1))
    bench.advance(200)
    ticks = [("k", 100, 110, 2), ("k", 100, 110, 3), ("k", 100, 110, 3)]
    assert results(bench.values()) == ticks, "at 104, at 108, and when it closes"
    assert [output[3] for output in bench.open] == [104, 108, 109]


def test_sessions_pass_results_on_at_intervals_of_the_clock() -> None:
    bench = TimersBench(job_with(Session(10 * MS), emit=8 * MS))
    play(bench, (101, 1))
    bench.advance(104)
    play(bench, (107, 1))
    bench.advance(200)
    found = [(*result[1:], value["withdrawn"]) for result, value in zip(*both(bench), strict=True)]
    assert found == [(101, 111, 1, False), (101, 111, 1, True), (101, 117, 2, False), (101, 117, 2, False)]


def test_result_that_is_due_is_that_of_its_time_although_records_come_before_it_is_passed_on() -> None:
    bench = TimersBench(job_with(emit=4 * MS, values=collect()))
    play(bench, (101, "a"))
    bench.wall_ms = 105
    bench.run("b", OLD)
    bench.advance(200)
    assert [values for *_times, values in results(bench.values(), "values")] == [
        ["a"],
        ["a", "b"],
        ["a", "b"],
    ]


def both(bench: TimersBench) -> tuple[list[Result], list[Any]]:
    return results(bench.values()), bench.values()


# --- a clock that goes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("windows", [TEN, Session(10 * MS), Hopping(10 * MS, 10 * MS)])
def test_window_that_has_closed_is_not_opened_again(windows: Any, crash: bool) -> None:
    bench = TimersBench(job_with(windows))
    play(bench, (100, 1))
    bench.advance(111)
    assert len(bench.values()) == 1
    bench.barrier()
    if crash:
        bench.crash()
    bench.wall_ms = 101
    bench.run(1, OLD)
    bench.advance(200)
    (_, closed, *_rest), (_, start, _end, n) = results(bench.values())
    assert (closed, n) == (100, 1)
    assert start >= 110
    assert bench.port.late == 0


def test_closing_that_is_not_committed_does_not_hold_the_clock_of_the_next_worker() -> None:
    bench = TimersBench(job_with(values=collect()))
    play(bench, (100, 1))
    bench.barrier()
    bench.advance(110)
    bench.crash()
    bench.wall_ms = 105
    bench.run(2, OLD)
    bench.advance(110)
    assert results(bench.values(), "values") == [("k", 100, 110, [1, 2])]


def test_time_does_not_go_back_for_other_keys() -> None:
    bench = TimersBench(job_with())
    play(bench, (100, 1))
    bench.advance(110)
    bench.wall_ms = 90
    bench.run(1, OLD, key=b"other")
    bench.advance(130)
    assert results(bench.values()) == [("k", 100, 110, 1), ("other", 110, 120, 1)]


WINDOWS = [TEN, Hopping(20 * MS, 10 * MS), Cumulative(30 * MS, 10 * MS), Session(7 * MS)]


@pytest.mark.parametrize("windows", WINDOWS, ids=lambda windows: type(windows).__name__)
@pytest.mark.parametrize("seed", range(12))
def test_each_record_counts_once_whatever_happens(windows: Any, seed: int) -> None:
    """Clocks that go back, crashes and barriers at random. The records are read again after a crash."""
    chance = random.Random(seed)
    bench = TimersBench(job_with(windows, values=collect()), cache_entries_max=chance.choice((0, 100)))
    bench.wall_ms = 1_000
    count_max, committed = 60, 0
    while committed < count_max:
        match chance.randrange(5):
            case 0:
                bench.barrier(flush=chance.random() < 0.5)
                committed = bench.offset
            case 1 if chance.random() < 0.3:
                bench.crash()
                bench.wall_ms += chance.randrange(-15, 10)
            case 2:
                bench.wall_ms += chance.randrange(-5, 12)
                bench.timers.fire_due(chance.choice((1, 1_000)))
            case _ if bench.offset < count_max:
                bench.run(bench.offset, OLD, key=b"k%d" % (bench.offset % 2))
            case _:
                pass
    bench.advance(10_000_000)
    found = results(bench.values(), "values")
    assert len({result[:3] for result in found}) == len(found), "no window has two results"
    times = Counter(number for *_window, values in found for number in values)
    if isinstance(windows, Tumbling | Session):
        assert set(times.values()) == {1}
    elif isinstance(windows, Hopping):
        assert set(times.values()) == {2}
    assert sorted(times) == list(range(count_max))


# --- failures -------------------------------------------------------------------------------------------


def fails_at_two(value: Any) -> Any:
    if value["n"] == 2:
        raise ValueError("two")
    return value


def failing(on_error: Any) -> Job:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(TEN, name="w", clock="processing").aggregate(n=count())
    windows.map(fails_at_two, on_error=on_error).to(job.topic("out"))
    return job


def test_window_whose_result_stops_the_job_stays_open_and_takes_no_more_records() -> None:
    bench = TimersBench(failing("stop"))
    play(bench, (100, 1), (101, 1))
    with pytest.raises(UnreadableRecordError, match="two"):
        bench.advance(110)
    bench.barrier()
    bench.crash()
    bench.wall_ms = 110
    bench.run(1, OLD)
    with pytest.raises(UnreadableRecordError, match="two"):
        bench.advance(120)


def test_window_that_is_skipped_is_not_opened_again() -> None:
    bench = TimersBench(failing("skip"))
    play(bench, (100, 1), (101, 1))
    bench.advance(110)
    bench.wall_ms = 105
    bench.run(1, OLD)
    bench.advance(120)
    assert results(bench.values()) == [("k", 110, 120, 1)]


# --- with other steps -----------------------------------------------------------------------------------


def test_all_windows_close_at_the_end_of_a_bounded_run() -> None:
    job = Job("j")
    source = job.topic("in")
    by_clock = job.stream(source).window(Tumbling(timedelta(days=1)), name="w", clock="processing")
    by_clock.aggregate(n=count()).to("out")
    by_time = job.stream(source).window(TEN, name="v").aggregate(n=count())
    by_time.key_by("key").window(TEN, name="x").aggregate(n=count()).to("others")
    with Driver(job, partitions=2) as driver:
        for key in "abc":
            driver.send("in", 1, key=key, timestamp=OLD)
        driver.finish()
        assert sorted(value["key"] for value in driver.read_values("out")) == ["a", "b", "c"]
        assert [value["n"] for value in driver.read_values("others")] == [1, 1, 1]
        assert driver.late == 0


def test_windows_of_all_records() -> None:
    job = Job("j")
    everything = job.stream(job.topic("in", value="text")).window_all(TEN, name="w", clock="processing")
    everything.aggregate(n=count(), values=collect()).to("out")
    with Driver(job, partitions=3, now_ms=100) as driver:
        for number, key in enumerate(["a", "b", "c", None, "d"]):
            driver.send("in", str(number), key=key, timestamp=OLD)
        driver.advance(to_ms=109)
        assert driver.read_values("out") == []
        driver.advance(to_ms=110)
        (record,) = driver.records("out")
        assert record.key is None
        assert record.value["n"] == 5
        assert sorted(record.value["values"]) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("emit", "wanted"), [("update", [1, 2]), (5 * MS, [2, 2])])
def test_windows_of_all_records_pass_results_on_before_they_close(emit: Any, wanted: list[int]) -> None:
    job = Job("j")
    everything = job.stream(job.topic("in")).window_all(TEN, name="w", emit=emit, clock="processing")
    everything.aggregate(n=count()).to("out")
    with Driver(job, partitions=3, now_ms=100) as driver:
        for key in ("a", "b"):
            driver.send("in", 1, key=key, timestamp=OLD)
        driver.advance(to_ms=105)
        driver.advance(to_ms=110)
        found = driver.records("out")
        assert [(one.key, one.value["n"]) for one in found] == [(None, n) for n in wanted]


def test_window_in_processing_time_may_follow_any_window() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(TEN, name="a").aggregate(n=count())
    stream.window(TEN, name="b", clock="processing").aggregate(n=count()).to("out")
    with Driver(job, partitions=1, now_ms=1_000) as driver:
        for at in (1, 2, 11, 21):
            driver.send("in", 1, key="k", timestamp=at)
        driver.advance(by_ms=10)
        assert results(driver.read_values("out")) == [("k", 1_000, 1_010, 2)]
        driver.finish()
        assert results(driver.read_values("out")) == [("k", 1_010, 1_020, 1)]


def test_results_are_not_late_for_windows_of_event_time_behind_a_key_by() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(TEN, name="a", clock="processing").aggregate(n=count())
    stream.key_by("key").window(TEN, name="b").aggregate(n=count()).to("out")
    with Driver(job, partitions=1, now_ms=100) as driver:
        driver.send("in", 1, key="k")
        driver.now_ms = 115
        driver.send("in", 1, key="other")  # event time has passed the first window, which is due
        driver.settle()
        driver.finish()
        assert driver.late == 0
        assert [(start, n) for _, start, _, n in results(driver.read_values("out"))] == [(100, 1), (110, 1)]


def test_timers_of_handlers_in_both_clocks_are_beside_them() -> None:
    job = Job("j")
    source, out = job.topic("in"), job.topic("out")

    @job.process(source, to=out)
    def handler(ctx: Any, _value: Any) -> None:
        ctx.timer("event", at=ctx.timestamp + 5)
        ctx.timer("processing", at=ctx.processing_time + 5, clock="processing")

    @handler.on_timer("event")
    def event(_key: Any, _ctx: Any) -> Any:
        return "event"

    @handler.on_timer("processing")
    def processing(_key: Any, _ctx: Any) -> Any:
        return "processing"

    job.stream(source).window(TEN, name="w", clock="processing").aggregate(n=count()).map(
        lambda result: result["n"]
    ).to(out)
    with Driver(job, partitions=1, now_ms=100) as driver:
        driver.send("in", 1, key="k", timestamp=1)
        driver.advance(by_ms=20)
        assert driver.read_values("out") == ["processing", 1]
        driver.finish()
        assert driver.read_values("out") == ["event"]


# --- declarations ---------------------------------------------------------------------------------------


def declare(windows: Any = TEN, **options: Any) -> Callable[[Job], Any]:
    return lambda job: job.stream(job.topic("in")).window(windows, name="w", **options)


@pytest.mark.parametrize(
    ("declared", "message", "remedy"),
    [
        (declare(clock="wall"), "clock='wall' of the window 'w' is unknown", "clock='processing'"),
        (declare(Counted(3), clock="processing"), "doesn't go with Counted", "Leave it out"),
        (declare(Tumbling(10 * MS, grace=MS), clock="processing"), "grace=1 ms", "Leave out grace="),
        (declare(Session(10 * MS, grace=MS), clock="processing"), "none is late", "Leave out grace="),
        (declare(late="late", clock="processing"), "doesn't go with late=", "Leave out late="),
        (
            lambda job: job.stream(job.topic("in")).window_all(TEN, name="w", late="l", clock="processing"),
            "doesn't go with late=",
            "Leave out late=",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(declared: Any, message: str, remedy: str) -> None:
    with pytest.raises(JobError) as caught:
        declared(Job("j"))
    assert message in str(caught.value)
    assert remedy in str(caught.value.remedy)


def test_window_of_event_time_behind_one_of_processing_time_is_refused() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(TEN, name="a", clock="processing").aggregate(n=count())
    stream.window(TEN, name="b").aggregate(n=count()).to("out")
    with pytest.raises(JobError, match="'b' follows the window 'a' directly") as caught:
        job.build(Settings())
    assert "clock='processing'" in str(caught.value.remedy)


def test_another_clock_is_refused_for_windows_that_may_be_open() -> None:
    job = Job("j")
    job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count()).to("out")
    found = incompatibility(job.build(Settings()).describe(), job_with().build(Settings()))
    assert "used to close in another way, and now close in processing time" in str(found)


def test_outline_names_the_clock() -> None:
    (stage,) = outline(job_with().build(Settings())).stages
    details = [step.details for chain in stage.chains for step in chain.steps]
    assert any(dict(found).get("clock") == "processing time" for found in details)
