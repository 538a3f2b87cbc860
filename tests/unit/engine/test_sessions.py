"""Sessions: how they grow, merge and close, which records are late, and what follows from failures."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Session, collect, count, first, last, sum_
from fcluster.common.settings import Settings
from fcluster.engine.runner import UnreadableRecordError
from fcluster.testing import Driver
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
Closed = tuple[str, int, int, Any]
"""Key, start, end, and the value of the only aggregate."""


def job_with(*, grace: int = 0, late: bool = False, on_error: Any = None, **fields: Any) -> Job:
    """Sessions over the topic "in", whose results go to "out"."""
    job = Job("j")
    dead, for_late = job.topic("dead", value="bytes"), job.topic("late")
    on_error = dead if on_error == "dead" else on_error
    job.stream(job.topic("in")).window(
        Session(10 * MS, grace=grace * MS), name="s", late=for_late if late else None, on_error=on_error
    ).aggregate(**(fields or {"n": count()})).to(job.topic("out"))
    return job


def closed(bench: TimersBench, field: str = "n") -> list[Closed]:
    return [(value["key"], value["start"], value["end"], value[field]) for value in bench.values()]


def test_session_lasts_until_there_is_no_record_for_the_gap() -> None:
    bench = TimersBench(job_with())
    for at in (3, 12, 22):
        bench.run(1, at)
    assert bench.values() == []
    bench.run(1, 31, key=b"other")
    assert bench.values() == []
    bench.run(1, 32, key=b"other")
    assert bench.values() == []  # a record of the same millisecond would still be in it
    bench.run(1, 33, key=b"other")
    assert closed(bench) == [("k", 3, 32, 3)]
    assert [(key, at) for _topic, _value, key, at, _headers in bench.open] == [(b"k", 31)]
    bench.run(1, 44, key=b"x")
    assert closed(bench)[1:] == [("other", 31, 43, 3)]


def updating(**fields: Any) -> Job:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Session(10 * MS, grace=100 * MS), name="s", emit="update")
    windows.aggregate(**fields).to(job.topic("out"))
    return job


def updates(bench: TimersBench, field: str = "n") -> list[tuple[str, int, int, Any]]:
    """Of each update: "-" if it withdraws something, start, end, and the value of a field."""
    signs = {True: "-", False: "+"}
    return [(signs[one["withdrawn"]], one["start"], one["end"], one[field]) for one in bench.values()]


def test_session_that_grows_withdraws_what_it_was() -> None:
    bench = TimersBench(updating(n=count()))
    for at in (100, 105, 103, 98):
        bench.run(1, at)
    assert updates(bench) == [
        ("+", 100, 110, 1),
        ("-", 100, 110, 1),
        ("+", 100, 115, 2),
        ("+", 100, 115, 3),  # within it: the result replaces that of the same session
        ("-", 100, 115, 3),
        ("+", 98, 115, 4),
    ]
    assert [at for _topic, _value, _key, at, _headers in bench.open] == [100, 105, 105, 103, 98, 98]
    bench.run(1, 10_000, key=b"other")
    assert len(bench.values()) == 7  # nothing when the session closes


def test_sessions_that_become_one_withdraw_both() -> None:
    bench = TimersBench(updating(values=collect()))
    for at in (100, 120, 110):
        bench.run(at, at)
    assert updates(bench, "values") == [
        ("+", 100, 110, [100]),
        ("+", 120, 130, [120]),
        ("-", 100, 110, [100]),
        ("-", 120, 130, [120]),
        ("+", 100, 130, [100, 120, 110]),
    ]


def test_records_exactly_the_gap_apart_are_in_one_session() -> None:
    bench = TimersBench(job_with(grace=100))
    for at in (10, 20, 31):
        bench.run(1, at)
    bench.run(1, 1_000)
    assert closed(bench) == [("k", 10, 30, 2), ("k", 31, 41, 1)]


def test_another_record_of_the_same_millisecond_does_not_close_a_session() -> None:
    bench = TimersBench(job_with(late=True))
    for key, at in [(b"k", 10), (b"x", 20), (b"k", 20), (b"x", 31)]:
        bench.run(1, at, key=key)
    assert (closed(bench), bench.port.late) == ([("k", 10, 30, 2), ("x", 20, 30, 1)], 0)


def test_record_between_two_sessions_merges_them() -> None:
    bench = TimersBench(job_with(grace=50, values=collect(), f=first(), z=last(), total=sum_()))
    for at in (1, 20, 40, 11):
        bench.run(at, at)
    bench.run(30, 30)
    bench.run(2, 1_000)
    (row,) = bench.values()
    assert (row["start"], row["end"], sorted(row["values"])) == (1, 50, [1, 11, 20, 30, 40])
    assert (row["f"], row["z"], row["total"]) == (1, 40, 102)


def test_sessions_close_in_the_order_of_their_ends_and_then_of_their_keys() -> None:
    bench = TimersBench(job_with(grace=100))
    for key, at in [(b"b", 30), (b"b", 1), (b"a", 5), (b"a", 30), (b"c", 2), (b"a", 14)]:
        bench.run(1, at, key=key)
    bench.run(1, 1_000, key=b"x")
    assert closed(bench) == [
        ("b", 1, 11, 1),
        ("c", 2, 12, 1),
        ("a", 5, 24, 2),
        ("a", 30, 40, 1),
        ("b", 30, 40, 1),
    ]


def test_late_record_is_one_that_no_open_session_accepts() -> None:
    bench = TimersBench(job_with(grace=5, late=True))
    for at in (10, 35):
        bench.run(at, at)
    assert closed(bench) == [("k", 10, 20, 1)]
    bench.run(19, 19)  # its session would have ended at 29, and closed at 34
    bench.run(26, 26)  # an open session takes it
    bench.run(0, 100, key=b"x")
    assert [value for topic, value, *_rest in bench.open if topic == "late"] == [b"19"]
    assert (closed_of(bench), bench.port.late) == ([("k", 10, 20, 1), ("k", 26, 45, 2)], 1)


def closed_of(bench: TimersBench) -> list[Closed]:
    rows: list[dict[str, Any]] = [value for value in bench.values() if isinstance(value, dict)]
    return [(row["key"], row["start"], row["end"], row["n"]) for row in rows]


def test_endless_session_has_one_note_and_one_entry() -> None:
    bench = TimersBench(job_with())
    for number in range(200):
        bench.run(1, number * 7)
        if number % 13 == 0:
            bench.barrier(flush=number % 2 == 0)
        if number % 37 == 0:
            bench.barrier()
            bench.crash()
    bench.barrier()
    assert bench.values() == []
    assert len(list(bench.store.keys_of("s//due"))) == 1
    assert len(list(bench.store.keys_of("s//sessions"))) == 1
    bench.run(1, 10_000, key=b"x")
    bench.barrier()
    assert closed(bench) == [("k", 0, 1_403, 200)]
    assert [key[8:] for key in bench.store.keys_of("s//due")] == [b"x"]
    assert list(bench.store.keys_of("s//sessions")) == [b"x"]


def test_shorter_grace_closes_open_sessions_earlier() -> None:
    bench = TimersBench(job_with(grace=1_000))
    bench.run(1, 5)
    bench.barrier()
    (bench.stage,) = job_with(grace=0).build(Settings()).stages
    bench.crash()
    bench.run(1, 16, key=b"x")
    assert closed(bench) == [("k", 5, 15, 1)]


@pytest.mark.parametrize("rule", ["skip", "dead"])
def test_record_that_fails_leaves_sessions_as_they_were(rule: str) -> None:
    job = job_with(grace=50, on_error=rule, values=collect(), total=sum_())
    with Driver(job, partitions=1) as driver:
        for value, at in [(1, 1), (3, 18), ("x", 10), ("y", 60), (0, 500)]:
            driver.send("in", value, key="a", timestamp=at, partition=0)
        rows = [(row["start"], row["end"], row["values"]) for row in driver.read_values("out")]
        assert rows == [(1, 11, [1]), (18, 28, [3])]  # the one that failed would have merged them
        assert driver.skipped == 2


def failing_at_close(on_error: Any) -> Job:
    def fail(result: Any) -> Any:
        if "x" in result["values"]:
            result["values"].append("spoilt")
            raise ValueError("no good")
        return result

    job = Job("j")
    sessions = job.stream(job.topic("in")).window(Session(10 * MS, grace=50 * MS), name="s")
    sessions.aggregate(values=collect()).map(fail, on_error=on_error).to(job.topic("out"))
    return job


def test_session_whose_result_stops_the_job_is_named_and_stays_open() -> None:
    bench = TimersBench(failing_at_close("stop"))
    bench.run("x", 5)
    bench.run("later", 40)
    message = (
        r"^timer that closes the session 's' until 1970-01-01T00:00:00.015Z for the key b'k' failed in map "
        r"'fail' .*: ValueError: no good"
    )
    with pytest.raises(UnreadableRecordError, match=message):
        bench.run("", 200, key=b"o")
    bench.barrier()
    bench.crash()
    table: Any = bench.state.tables["s//sessions"]
    assert table.get(b"k") == [[5, 15, [["x"]]], [40, 50, [["later"]]]]
    with pytest.raises(UnreadableRecordError, match="for the key b'k'"):
        bench.run("", 201, key=b"o")


def test_session_whose_result_is_skipped_is_removed_and_the_next_one_closes() -> None:
    bench = TimersBench(failing_at_close("skip"))
    bench.run("x", 5)
    bench.run("later", 40)
    bench.run("", 200, key=b"o")
    assert closed(bench, "values") == [("k", 40, 50, ["later"])]
    assert bench.port.skipped == 1
    bench.barrier()
    assert list(bench.store.keys_of("s//sessions")) == [b"o"]
