"""Windows: when they close, which records are late, what follows from failures, and what remains in the
store."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from fcluster import (
    Aggregate,
    Hopping,
    Job,
    Session,
    Table,
    Tumbling,
    Watermark,
    collect,
    count,
    first,
    last,
    reduce,
    sum_,
)
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.engine.runner import HandlerError, UnreadableRecordError
from fcluster.engine.state import store_prefix
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver, JobStopped
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
TEN = Tumbling(10 * MS)
Windowed = tuple[str, int, int, Any]
"""Key, start, end, and the value of the only aggregate."""


def job_with(windows: Any = TEN, *, late: bool = False, on_error: Any = None, **fields: Any) -> Job:
    """Windows over the topic "in", whose results go to "out"."""
    job = Job("j")
    dead, for_late = job.topic("dead", value="bytes"), job.topic("late")
    on_error = dead if on_error == "dead" else on_error
    job.stream(job.topic("in")).window(
        windows, name="w", late=for_late if late else None, on_error=on_error
    ).aggregate(**(fields or {"n": count()})).to(job.topic("out"))
    return job


def results(values: list[Any], field: str = "n") -> list[Windowed]:
    return [(value["key"], value["start"], value["end"], value[field]) for value in values]


def written(driver: Driver, field: str = "n") -> list[Windowed]:
    return results(driver.read_values("out"), field)


def send_all(driver: Driver, records: list[tuple[str, Any, int]]) -> None:
    for key, value, timestamp in records:
        driver.send("in", value, key=key, timestamp=timestamp, partition=0)


# --- when they close ------------------------------------------------------------------------------------


def test_window_closes_once_when_event_time_reaches_its_end() -> None:
    bench = TimersBench(job_with())
    bench.run(1, 3)
    bench.run(1, 9, key=b"other")
    assert bench.values() == []
    bench.run(1, 10)
    assert results(bench.values()) == [("k", 0, 10, 1), ("other", 0, 10, 1)]
    assert [(key, at) for _topic, _value, key, at, _headers in bench.open] == [
        (b"k", 9),
        (b"other", 9),
    ]  # key, timestamp
    bench.run(1, 30)
    assert results(bench.values())[2:] == [("k", 10, 20, 1)]


def test_window_waits_for_its_grace_and_accepts_late_records_until_then() -> None:
    bench = TimersBench(job_with(Tumbling(10 * MS, grace=5 * MS)))
    for at in (3, 12, 4, 14, 5):
        bench.run(1, at)
    assert bench.values() == []
    bench.run(1, 15)
    assert results(bench.values()) == [("k", 0, 10, 3)]


def test_due_windows_close_in_the_order_of_their_ends_and_then_of_their_keys() -> None:
    bench = TimersBench(job_with(Tumbling(10 * MS, grace=20 * MS)))
    for key, at in [(b"b", 21), (b"a", 22), (b"b", 11), (b"c", 1), (b"a\x00", 2)]:
        bench.run(1, at, key=key)
    bench.run(1, 100, key=b"x")
    assert results(bench.values()) == [
        ("a\x00", 0, 10, 1),
        ("c", 0, 10, 1),
        ("b", 10, 20, 1),
        ("a", 20, 30, 1),
        ("b", 20, 30, 1),
    ]


def test_hopping_windows_share_their_records() -> None:
    bench = TimersBench(job_with(Hopping(10 * MS, 5 * MS), values=collect()))
    for at in (1, 5, 9, 12, 40):
        bench.run(at, at)
    assert results(bench.values(), "values") == [
        ("k", 0, 10, [1, 5, 9]),
        ("k", 5, 15, [5, 9, 12]),
        ("k", 10, 20, [12]),
    ]


def test_first_and_last_go_by_timestamps_and_by_order_where_those_are_equal() -> None:
    bench = TimersBench(job_with(TEN, f=first(), z=last()))
    for value, at in [("b", 5), ("a", 3), ("a2", 3), ("c", 7), ("d", 7), ("e", 6)]:
        bench.run(value, at)
    bench.run("", 10)
    assert results(bench.values(), "f") == [("k", 0, 10, "a")]
    assert results(bench.values(), "z") == [("k", 0, 10, "d")]


def test_results_pass_the_steps_that_follow() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).filter(lambda value: value != "x").map(lambda value: value * 2)
    windowed = stream.window(TEN, name="w").aggregate(total=sum_())
    windowed.filter(lambda result: result["total"] > 10).map(lambda result: result["total"]).to(
        job.topic("out")
    )
    with Driver(job, partitions=1) as driver:
        send_all(driver, [("a", 1, 1), ("a", 2, 2), ("b", 5, 2), ("b", "x", 3), ("b", 4, 9), ("a", 100, 10)])
        assert driver.read_values("out") == [18]


def test_results_are_counted_by_a_handler_behind_them_and_by_a_further_window_behind_a_key_by() -> None:
    job = Job("j")

    def keep(ctx: Any, result: Any) -> Any:
        ctx.state["windows"] = ctx.state.get("windows", 0) + 1
        return {**result, **ctx.state}

    totals = job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count())
    totals.process(keep).key_by(lambda _result: "all").window(Tumbling(20 * MS), name="ww").aggregate(
        n=sum_(lambda result: result["n"]), windows=collect(lambda result: [result["key"], result["windows"]])
    ).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        send_all(driver, [(key, None, at) for at in range(1, 60, 3) for key in "ab"])
        assert driver.late == 0
        assert driver.read_values("out") == [
            {
                "key": "all",
                "start": 0,
                "end": 20,
                "n": 14,
                "windows": [["a", 1], ["b", 1], ["a", 2], ["b", 2]],
            },
            {
                "key": "all",
                "start": 20,
                "end": 40,
                "n": 12,
                "windows": [["a", 3], ["b", 3], ["a", 4], ["b", 4]],
            },
        ]


@pytest.mark.parametrize("grace", [0, 7, 25])
def test_results_are_never_late_for_a_window_behind_them(grace: int) -> None:
    """Whatever the barriers, and however many windows close at once."""
    job = Job("j")
    totals = job.stream(job.topic("in")).window(Tumbling(10 * MS, grace=grace * MS), name="w")
    totals.aggregate(n=count()).key_by(lambda _result: "all").window(TEN, name="ww").aggregate(
        n=sum_(lambda result: result["n"])
    ).to(job.topic("out"))
    with Driver(job, partitions=2) as driver:
        for at in range(1, 200):
            driver.send("in", None, key=f"k{at % 9}", timestamp=at, partition=at % 2)
        for partition in range(2):
            driver.send("in", None, key="end", timestamp=1_000, partition=partition)
        assert driver.late == 0
        counted = written(driver)
        assert [(start, n) for _key, start, _end, n in counted][:19] == [
            (start, 9 if not start else 10) for start in range(0, 190, 10)
        ]


def test_event_time_is_told_only_up_to_windows_that_have_closed() -> None:
    bench = TimersBench(job_with(Tumbling(10 * MS, grace=5 * MS)))
    bench.clock.tell_with(bench.timers.told_ms)
    bench.timers.at_once_max = 1
    assert bench.clock.told_ms is None
    for key in (b"a", b"b", b"c"):
        bench.run(1, 3, key=key)
    assert bench.clock.told_ms == -2
    bench.run(1, 100)  # one window closes, two are left
    assert len(bench.values()) == 1
    assert bench.clock.told_ms == 14 - 5
    bench.timers.fire_due(2)
    assert bench.clock.told_ms == 95


def test_day_in_berlin_is_counted_by_its_date_there() -> None:
    days = Tumbling(timedelta(days=1), timezone="Europe/Berlin")
    with Driver(job_with(days), partitions=1) as driver:
        spring = 1_774_738_800_000  # 2026-03-29T00:00 in Berlin, a day of 23 hours
        hour = 3_600_000
        send_all(driver, [("a", None, spring + at * hour) for at in range(-1, 26)])
        assert written(driver) == [
            ("a", spring - 24 * hour, spring, 1),
            ("a", spring, spring + 23 * hour, 23),
        ]


# --- what is late -----------------------------------------------------------------------------------------


def test_late_records_are_written_unchanged_to_their_topic_and_counted() -> None:
    with Driver(job_with(late=True), partitions=1) as driver:
        send_all(driver, [("a", 1, 5), ("a", 2, 20)])
        driver.send("in", {"x": None}, key="a", timestamp=19, headers=[("h", "v")], partition=0)
        driver.send("in", None, key="b", timestamp=1, partition=0)
        assert driver.late == 2
        assert [(late.key, late.value, late.timestamp, late.headers) for late in driver.records("late")] == [
            ("a", {"x": None}, 19, [("h", b"v")]),
            ("b", None, 1, []),
        ]
        assert written(driver) == [("a", 0, 10, 1)]


def test_late_records_without_a_topic_are_only_counted() -> None:
    with Driver(job_with(), partitions=1) as driver:
        send_all(driver, [("a", 1, 5), ("a", 2, 20), ("a", 3, 19), ("a", 4, 25)])
        assert (driver.late, driver.skipped) == (1, 0)
        driver.advance(to_ms=100, clock="event")
        assert written(driver) == [("a", 0, 10, 1), ("a", 20, 30, 2)]


def test_late_key_is_encoded_as_its_topic_says() -> None:
    job = Job("j")
    late = job.topic("late", key="json")
    job.stream(job.topic("in", key="int")).window(TEN, name="w", late=late).aggregate(n=count()).to(
        job.topic("out", key="int")
    )
    with Driver(job, partitions=1) as driver:
        for at in (15, 3):
            driver.send("in", "v", key=7, timestamp=at, partition=0)
        assert [(one.raw_key, one.key, one.value) for one in driver.records("late")] == [(b"7", 7, "v")]


def test_record_with_an_open_window_is_not_late() -> None:
    with Driver(job_with(Hopping(10 * MS, 5 * MS)), partitions=1) as driver:
        send_all(driver, [("a", 1, 12), ("a", 1, 8), ("a", 1, 30)])
        assert (written(driver), driver.late) == ([("a", 5, 15, 2), ("a", 10, 20, 1)], 0)


@pytest.mark.parametrize("emit", ["close", "update"])
def test_late_record_counts_only_in_those_of_its_windows_whose_grace_is_not_over(emit: Any) -> None:
    job = Job("j")
    windows = Hopping(10 * MS, 5 * MS, grace=40 * MS)
    updated = job.stream(job.topic("in")).window(windows, name="w", emit=emit, late=job.topic("late"))
    updated.aggregate(values=collect()).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        # Event time is 150. All windows of 104 are over: the last one ended at 110. That of 105 ends at 115.
        send_all(
            driver, [("a", "x", 150), ("a", "y", 103), ("a", "z", 104), ("a", "o", 105), ("a", "p", 109)]
        )
        assert [row.timestamp for row in driver.records("late")] == [103, 104]
        send_all(driver, [("a", "q", 155)])  # closes the window from 105 to 115
        send_all(driver, [("a", "r", 108)])
        assert [row.timestamp for row in driver.records("late")] == [103, 104, 108]
        closed = [("a", 105, 115, ["o", "p"])]
        updates = [
            ("a", 145, 155, ["x"]),
            ("a", 150, 160, ["x"]),
            ("a", 105, 115, ["o"]),
            ("a", 105, 115, ["o", "p"]),
            ("a", 150, 160, ["x", "q"]),
            ("a", 155, 165, ["q"]),
        ]
        assert written(driver, "values") == (closed if emit == "close" else updates)


def test_record_of_a_window_that_never_was_is_late_when_its_grace_is_over() -> None:
    windows = Tumbling(10 * MS, grace=40 * MS)
    with Driver(job_with(windows, late=True), partitions=1) as driver:
        send_all(driver, [("a", 1, 150), ("a", 1, 100), ("a", 1, 109), ("b", 1, 5), ("a", 1, 110)])
        assert [row.timestamp for row in driver.records("late")] == [100, 109, 5]
        driver.advance(to_ms=1_000, clock="event")
        assert written(driver) == [("a", 110, 120, 1), ("a", 150, 160, 1)]


def test_windows_of_two_streams_are_joined_as_tables_once_both_have_closed() -> None:
    job = Job("j")

    def closed(topic: str) -> Table[Any, Any]:
        stream = job.stream(job.topic(topic)).window(Hopping(10 * MS, 5 * MS), name=topic)
        by_window = stream.aggregate(values=collect()).key_by(
            lambda one: [one["key"], one["start"]], key="json", name=f"{topic}-by-window"
        )
        return by_window.table(name=f"{topic}-windows")

    closed("left").join(
        closed("right"), lambda left, right: [left["values"], right["values"]]
    ).to_stream().to(job.topic("out", key="json"))
    with Driver(job, partitions=1) as driver:
        for topic, key, value, at in (
            ("left", "a", "x", 6),
            ("left", "b", "y", 7),
            ("left", "a", "z", 12),
            ("right", "a", "r", 9),
            ("left", "a", "-", 40),
            ("right", "c", "s", 8),
        ):
            driver.send(topic, value, key=key, timestamp=at)
        assert driver.read("out") == []
        driver.send("right", "-", key="c", timestamp=40)
        found = sorted((row.key, row.value) for row in driver.read("out"))
        assert found == [(["a", 0], [["x"], ["r"]]), (["a", 5], [["x", "z"], ["r"]])]


def test_each_update_is_emitted_if_the_job_says_so() -> None:
    job = Job("j")
    windowed = job.stream(job.topic("in")).window(Hopping(10 * MS, 5 * MS), name="w", emit="update")
    windowed.aggregate(values=collect()).map(lambda result: {**result, "last": result["values"].pop()}).to(
        job.topic("out")
    )
    with Driver(job, partitions=1) as driver:
        send_all(driver, [("a", 1, 6), ("a", 2, 11), ("b", 3, 8), ("a", 4, 9), ("a", 5, 30), ("a", 6, 10)])
        assert driver.late == 1
        written_rows = driver.records("out")
        rows = [(row.timestamp, *results([row.value], "last")[0]) for row in written_rows]
        assert rows == [
            (6, "a", 0, 10, 1),
            (6, "a", 5, 15, 1),
            (11, "a", 5, 15, 2),
            (11, "a", 10, 20, 2),
            (8, "b", 5, 15, 3),
            (9, "a", 5, 15, 4),
            (30, "a", 25, 35, 5),
            (30, "a", 30, 40, 5),
        ]
        assert driver.records("out")[5].value["values"] == [1, 2]  # what `map` changed isn't in the state
        driver.crash()
        driver.advance(to_ms=100, clock="event")
        assert len(driver.records("out")) == 8


def test_watermark_delay_keeps_windows_open() -> None:
    job = Job("j")
    source = job.topic("in", watermark=Watermark(max_delay_ms=10))
    job.stream(source).window(TEN, name="w").aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        send_all(driver, [("a", 1, 5), ("a", 1, 19), ("a", 1, 9)])
        assert written(driver) == []
        send_all(driver, [("a", 1, 20)])
        assert written(driver) == [("a", 0, 10, 2)]


def test_late_records_are_late_in_every_replay() -> None:
    with Driver(job_with(late=True), partitions=1, auto_barrier=False) as driver:
        send_all(driver, [("a", 1, 5), ("a", 2, 30), ("a", 3, 6)])
        driver.crash()
        driver.barrier()
        driver.crash()
        send_all(driver, [("a", 4, 7)])
        driver.settle()
        assert [late.value for late in driver.records("late")] == [3, 4]
        assert driver.late == 2


# --- failures ---------------------------------------------------------------------------------------------


def test_aggregate_that_fails_stops_the_job_and_names_the_window() -> None:
    with (
        Driver(job_with(total=sum_()), partitions=1) as driver,
        pytest.raises(JobStopped, match=r"offset 1 failed in the field 'total' of the window 'w': TypeError"),
    ):
        send_all(driver, [("a", 1, 1), ("a", "x", 2)])


@pytest.mark.parametrize("rule", ["skip", "dead"])
def test_record_that_fails_in_one_aggregate_counts_in_none(rule: str) -> None:
    job = job_with(Hopping(10 * MS, 5 * MS), on_error=rule, n=count(), total=sum_(), values=collect())
    with Driver(job, partitions=1) as driver:
        send_all(driver, [("a", 1, 6), ("a", "x", 7), ("new", "x", 8), ("a", 2, 9), ("a", 0, 100)])
        assert written(driver, "values") == [("a", 0, 10, [1, 2]), ("a", 5, 15, [1, 2])]
        assert driver.skipped == 2
        assert [letter.handler for letter in driver.dead_letters()] == (["w"] * 2 if rule == "dead" else [])


NO_TIME = "the record has no timestamp (behind a key_by, 0 is none): it is in no window; filter it out before"


def test_record_without_key_or_timestamp_is_a_failure() -> None:
    with Driver(job_with(on_error="dead"), partitions=1) as driver:
        driver.send("in", 1, timestamp=5, partition=0)
        driver.send("in", 1, key="a", timestamp=-1, partition=0)
        assert [letter.error for letter in driver.dead_letters()] == [
            "the record has no key, so it is in no window; give it one with key_by() first",
            NO_TIME,
        ]


def failing_result(on_error: Any, *, behind: bool = False) -> Job:
    """The results of windows that contain "x" fail, in the window or in the step after it."""
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    rule = dead if on_error == "dead" else on_error

    def fail(value: Any) -> Any:
        if "x" in str(value):
            raise ValueError("no good")
        return value

    stream = job.stream(job.topic("in")).window(TEN, name="w", on_error=rule)
    values = reduce(lambda one, other: one + other)
    if not behind:
        failing = replace(values, result=lambda kept: fail(values.result(kept)))
        stream.aggregate(values=failing).to(job.topic("out"))
        return job

    def spoil(result: Any) -> Any:
        result["values"].append("spoilt")
        return fail(result)

    stream.aggregate(values=values).map(spoil, on_error=rule).to(job.topic("out"))
    return job


@pytest.mark.parametrize("behind", [False, True])
def test_window_whose_result_stops_the_job_is_named_and_stays_open(behind: bool) -> None:
    bench = TimersBench(failing_result("stop", behind=behind))
    bench.run(["ok"], 1, key=b"a")
    bench.run(["x"], 2, key=b"b")
    with pytest.raises(
        UnreadableRecordError,
        match=r"^timer that closes the window 'w' from 1970-01-01T00:00:00.000Z to 1970-01-01T00:00:00.010Z "
        r"for the key b'b' failed in .*: ValueError: no good",
    ):
        bench.run(["z"], 15)
    assert bench.offset == 3  # the record is processed
    bench.barrier()
    assert len(bench.values()) == 1  # the result for "a"
    bench.crash()
    with pytest.raises(UnreadableRecordError, match="for the key b'b'"):
        bench.run(["z"], 16)
    windows = bench.timers.steps["w"]
    table: Any = bench.state.tables["w//windows"]
    timer = windows.first("event")
    assert timer is not None
    assert timer.key == b"b"
    assert table.get((10).to_bytes(8, "big") + b"b") == [[["x"]]]  # unchanged by `spoil`


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("rule", ["skip", "dead"])
def test_window_whose_result_is_skipped_is_removed(rule: str, behind: bool) -> None:
    bench = TimersBench(failing_result(rule, behind=behind))
    bench.run(["ok"], 1, key=b"a")
    bench.run(["x"], 2, key=b"b")
    bench.run(["z"], 15)
    outputs = [(topic, key) for topic, _value, key, *_rest in bench.open]
    assert outputs == [("out", b"a"), *([("dead", b"b")] if rule == "dead" else [])]
    assert bench.port.skipped == 1
    bench.barrier()
    bench.crash()
    bench.run(["z"], 30)
    assert [key for topic, _value, key, *_rest in bench.open if topic == "out"] == [b"k"]


def test_result_that_kafka_refuses_follows_the_rule() -> None:
    bench = TimersBench(job_with(on_error="skip"))
    bench.run(1, 1)
    bench.refuses = lambda topic, _value: topic == "out"
    bench.run(1, 10)
    assert (bench.open, bench.port.skipped) == ([], 1)
    bench.barrier()
    assert not [entry for entry in bench.store.keys_of("w//windows") if entry.startswith(bytes(7) + b"\x0a")]


def test_condemned_window_fails_when_it_closes() -> None:
    """As if the broker found its result too large, or its functions hung."""
    bench = TimersBench(job_with(on_error="skip"))
    bench.run(1, 1)
    timer = bench.timers.steps["w"].first("event")
    assert timer is not None
    title = bench.timers.steps["w"].title(timer)
    bench.timers.condemn(Condemnation(Failure.of_record("it hangs"), step=title))
    bench.run(1, 10)
    assert (bench.values(), bench.port.skipped) == ([], 1)
    assert Condemnation(Failure.of_record(""), step=title).is_of_timer


def test_value_that_state_cannot_hold_is_found_with_its_record() -> None:
    job = job_with(values=collect(lambda value: {value} if value == "x" else value), on_error="skip")
    with Driver(job, partitions=1) as driver:
        send_all(driver, [("a", "ok", 1), ("a", "x", 2), ("a", "", 10)])
        assert written(driver, "values") == [("a", 0, 10, ["ok"])]
        assert driver.skipped == 1


def test_refused_second_output_aborts_the_epoch_and_condemns_the_window() -> None:
    job = Job("j")
    out = job.topic("out")
    windowed = job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count())
    windowed.flat_map(lambda result: [result["n"], "too large"]).to(out, on_error="skip")
    bench = TimersBench(job)
    bench.refuses = lambda _topic, value: value == b'"too large"'
    bench.run(1, 1)
    with pytest.raises(HandlerError) as failed:
        bench.run(1, 10)
    assert failed.value.condemnation.is_of_timer
    bench.crash()
    bench.run(1, 1)
    bench.timers.condemn(failed.value.condemnation)
    bench.run(1, 10)
    assert (bench.values(), bench.port.skipped) == ([], 1)


# --- what is left of them ---------------------------------------------------------------------------------


def test_closed_windows_leave_nothing_in_the_store() -> None:
    bench = TimersBench(job_with(Hopping(10 * MS, 2 * MS)))
    for at in range(1, 40):
        bench.run(1, at, key=b"%d" % (at % 3))
        if at % 7 == 0:
            bench.barrier()
    bench.run(1, 1_000)
    bench.barrier()
    assert len(list(bench.store.keys_of("w//windows"))) == 5  # the windows of the last record
    bench.crash()
    bench.run(1, 2_000, key=b"k")
    bench.barrier()
    assert len(list(bench.store.keys_of("w//windows"))) == 5
    assert len(bench.values()) == len({(value["key"], value["end"]) for value in bench.values()})


def test_window_that_opens_and_closes_in_one_epoch_is_not_in_its_delta() -> None:
    bench = TimersBench(job_with())
    bench.run(1, 1)
    bench.run(1, 25)
    bench.barrier()
    (delta,) = bench.deltas
    assert [key[4:] for key in delta if key != store_prefix("w//grace")] == [(30).to_bytes(8, "big") + b"k"]


def test_windows_left_by_a_crash_close_before_the_next_record() -> None:
    bench = TimersBench(job_with())
    bench.timers.at_once_max = 1
    for key in (b"a", b"b", b"c"):
        bench.run(1, 1, key=key)
    bench.run(1, 50)
    assert len(bench.values()) == 1
    bench.barrier()
    bench.crash()
    bench.run(2, 51)
    assert results(bench.values()) == [(key, 0, 10, 1) for key in "abc"]


# --- a job that changes, and what can't be declared -------------------------------------------------------


def described(job: Job) -> Any:
    return job.build(Settings()).describe()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (job_with(Tumbling(10 * MS, grace=MS)), None),
        (
            job_with(Tumbling(20 * MS)),
            r"used to be tumbling \(size_ms=10\), and now are tumbling \(size_ms=20\)",
        ),
        (job_with(Hopping(10 * MS, 5 * MS)), r"now are hopping \(size_ms=10, every_ms=5\)"),
        (job_with(TEN, n=sum_()), "used to compute n=count, and now compute n=sum"),
        (job_with(TEN, n=count(), m=count()), "now compute n=count, m=count"),
    ],
)
def test_changed_windows_are_refused_unless_only_their_grace_changed(
    changed: Job, message: str | None
) -> None:
    reason = incompatibility(described(job_with()), changed.build(Settings()))
    if message is None:
        assert reason is None
    else:
        assert re.search(message, reason or "")


def test_renamed_window_and_one_that_becomes_a_handler_are_refused() -> None:
    def built(name: str, windowed: bool) -> Any:
        job = Job("j")
        stream = job.stream(job.topic("in"))
        if windowed:
            stream.window(TEN, name=name).aggregate(n=count()).to(job.topic("out"))
        else:
            stream.process(lambda _ctx, value: value, name=name, to=job.topic("out"))
        return job.build(Settings())

    assert "renamed to 'v'" in str(incompatibility(built("w", True).describe(), built("v", True)))
    assert incompatibility(built("w", True).describe(), built("w", False)) == (
        "The step 'w' has state as a window, and is now a handler."
    )
    assert incompatibility(built("w", False).describe(), built("w", True)) == (
        "The step 'w' has state as a handler, and is now a window."
    )


def test_description_of_a_job_without_windows_is_unchanged() -> None:
    job = Job("j")
    job.stream(job.topic("in")).process(lambda _ctx, value: value, name="h", to=job.topic("out"))
    assert "windows" not in str(described(job))
    assert described(job)["format"] == 1
    assert described(job_with())["format"] == 2


def nothing_after(job: Job) -> None:
    job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count())


def two_in_a_row(job: Job) -> None:
    first_one = job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count())
    first_one.map(len).window(TEN, name="v").aggregate(n=count()).to(job.topic("out"))


def same_name(job: Job) -> None:
    for topic in ("in", "other"):
        job.stream(job.topic(topic)).window(TEN, name="w").aggregate(n=count()).to(job.topic("out"))


def no_windows(job: Job) -> None:
    job.stream(job.topic("in")).window(cast("Any", 10), name="w")


def wrong_name(job: Job) -> None:
    job.stream(job.topic("in")).window(TEN, name="a b")


def wrong_emit(job: Job) -> None:
    job.stream(job.topic("in")).window(TEN, name="w", emit=cast("Any", "always"))


def withdrawn_field(job: Job) -> None:
    windows = job.stream(job.topic("in")).window(Session(10 * MS), name="w", emit="update")
    windows.aggregate(withdrawn=count())


def sessions_that_cannot_be_merged(job: Job) -> None:
    job.stream(job.topic("in")).window(Session(10 * MS), name="w").aggregate(
        n=Aggregate("mine", int, lambda kept, _value: kept)
    )


def unknown_topic(job: Job) -> None:
    job.stream(job.topic("in")).window(TEN, name="w", late=cast("Any", 5))


def used_twice(job: Job) -> None:
    stream = job.stream(job.topic("in")).window(TEN, name="w").aggregate(n=count())
    stream.to(job.topic("out"))
    stream.to(job.topic("other"))


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (nothing_after, "ends in a window with nothing after it"),
        (two_in_a_row, "'v' follows the window 'w' directly"),
        (same_name, "are named 'w'"),
        (used_twice, "output of 'w' is used in 2 places"),
        (no_windows, "window\\(\\) got 10"),
        (wrong_name, "The window name 'a b'"),
        (wrong_emit, "emit='always' of the window 'w' is unknown"),
        (withdrawn_field, "has a field 'withdrawn', but each result has a field of that name already"),
        (sessions_that_cannot_be_merged, "has an aggregate without merge="),
        (unknown_topic, "late= got 5"),
    ],
)
def test_windows_that_cannot_run_are_refused(declare: Callable[[Job], None], message: str) -> None:
    def build() -> None:
        job = Job("j")
        declare(job)
        job.build(Settings())

    with pytest.raises(JobError, match=message) as refused:
        build()
    assert refused.value.remedy


def test_stage_behind_a_key_by_has_the_name_of_the_window_there() -> None:
    job = Job("j")
    job.stream(job.topic("in")).key_by("k").window(TEN, name="per-k").aggregate(n=count()).to(
        job.topic("out")
    )
    stages = job.build(Settings()).stages
    assert [stage.name for stage in stages] == ["in", "per-k"]
    assert stages[1].changelog is not None
    assert [topic.name for topic in job.build(Settings()).outputs] == ["out"]
