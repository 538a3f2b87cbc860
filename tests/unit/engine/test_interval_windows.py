"""Windows that pass results on at intervals."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Counted, Hopping, Job, Session, Sliding, Tumbling, collect, count
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.engine.ordered_keys import encode_time
from fcluster.graph.compatibility import incompatibility
from fcluster.testing import Driver
from tests.unit.engine.test_windows import results
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
HUNDRED = Tumbling(100 * MS)


def at_intervals(windows: Any = HUNDRED, emit: Any = 10 * MS, **options: Any) -> Job:
    job = Job("j")
    stream = job.stream(job.topic("in")).window(windows, name="w", emit=emit, **options)
    stream.aggregate(values=collect()).to(job.topic("out"))
    return job


def timed(bench: TimersBench) -> list[tuple[int, Any]]:
    """Timestamp and value of each result."""
    return list(zip([at for *_, at, _headers in bench.open], bench.values(), strict=True))


def written(bench: TimersBench) -> list[tuple[int, list[int]]]:
    """Timestamp and values of each result."""
    return [(at, value["values"]) for at, value in timed(bench)]


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


def test_nothing_is_noted_of_a_window_that_closes_before_the_next_interval() -> None:
    bench = TimersBench(at_intervals())
    bench.run(95, 95)
    bench.barrier()
    assert list(bench.store.keys_of("w//due")) == []
    bench.run(203, 203)
    assert written(bench) == [(99, [95])]
    waiting = TimersBench(at_intervals(Tumbling(100 * MS, grace=50 * MS)))
    waiting.run(95, 95)
    waiting.run(120, 120)
    assert written(waiting) == [(100, [95]), (110, [120])]


def test_nothing_remains_in_the_store() -> None:
    bench = TimersBench(at_intervals())
    for at in (3, 12, 55, 101, 203):
        bench.run(at, at)
        bench.barrier()
    bench.run(0, 1_000, key=b"x")
    bench.barrier()
    # The last window, its note and the grace.
    assert len(bench.store.scan(b"", b"\xff", 100, reverse=False)) == 3


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


def test_state_of_former_versions_goes_on() -> None:
    """The bytes are those that versions without intervals for sessions have written."""
    bench = TimersBench(at_intervals())
    tables: Any = bench.state.tables
    window, noted = encode_time(100) + b"k", encode_time(10) + b"k"
    stored = {
        tables["w//windows"].prefix + window: b"\x00[[3],10]",
        tables["w//due"].prefix + noted: b"\x00[100]",
    }
    bench.deltas.append(stored)
    bench.crash()
    bench.run(12, 12)
    bench.run(150, 150)
    assert written(bench) == [(10, [3, 12]), (99, [3, 12]), (110, [150])]


@pytest.mark.parametrize(
    ("windows", "store", "kept"),
    [
        (Session(10 * MS), "w//sessions", [[3, 13, [[1]]]]),
        (Counted(5), "w//counted", [1, [[1, 3, 3, [[1]]]]]),
        (Sliding(10 * MS), "w//sliding", [-1, 11, [[3, -1, b"1"]]]),
    ],
)
def test_other_windows_keep_what_they_kept_before_there_were_intervals(
    windows: Any, store: str, kept: Any
) -> None:
    for emit in ("close", "update"):
        bench = TimersBench(at_intervals(windows, emit))
        bench.run(1, 3)
        table: Any = bench.state.tables[store]
        assert table.get(b"k") == kept
        assert "w//results" not in bench.state.tables


def test_interval_of_no_time_is_refused() -> None:
    with pytest.raises(JobError, match="emit="):
        at_intervals(emit=timedelta())


@pytest.mark.parametrize("windows", [HUNDRED, Session(10 * MS), Sliding(10 * MS), Counted(5)])
def test_change_to_intervals_is_refused_but_another_interval_is_not(windows: Any) -> None:
    described = at_intervals(windows).build(Settings()).describe()
    assert incompatibility(described, at_intervals(windows, emit=20 * MS).build(Settings())) is None
    reason = incompatibility(described, at_intervals(windows, emit="close").build(Settings()))
    assert reason is not None
    assert "used to emit at intervals, and now emit in another way" in reason


# --- sessions -------------------------------------------------------------------------------------------


def in_sessions(grace: int = 100, **options: Any) -> Job:
    return at_intervals(Session(10 * MS, grace=grace * MS), **options)


def told(bench: TimersBench) -> list[tuple[int, str, int, int, list[int]]]:
    """Of each result: timestamp, "-" if it withdraws something, start, end, and values."""
    return [
        (at, "-" if one["withdrawn"] else "+", one["start"], one["end"], one["values"])
        for at, one in timed(bench)
    ]


def test_session_that_has_grown_withdraws_what_was_told_with_its_next_result() -> None:
    bench = TimersBench(in_sessions())
    for at in (103, 107):
        bench.run(at, at)
    assert told(bench) == []
    bench.run(111, 111)
    assert told(bench) == [(110, "+", 103, 121, [103, 107, 111])]
    bench.run(109, 109)
    bench.run(99, 120, key=b"other")
    assert told(bench)[1:] == [(120, "+", 103, 121, [103, 107, 111, 109])]  # the same times: it replaces it
    bench.run(98, 98)
    bench.run(98, 130, key=b"other")
    assert told(bench)[2:] == [
        (130, "-", 103, 121, [103, 107, 111, 109]),
        (130, "+", 98, 121, [103, 107, 111, 109, 98]),
        (130, "+", 120, 140, [99, 98]),
    ]
    bench.run(0, 1_000, key=b"other")
    assert told(bench)[5:] == [  # and once more when they close
        (120, "+", 98, 121, [103, 107, 111, 109, 98]),
        (139, "+", 120, 140, [99, 98]),
    ]


def test_sessions_that_have_become_one_withdraw_both() -> None:
    bench = TimersBench(in_sessions(emit=8 * MS))
    for at in (100, 112, 113):
        bench.run(at, at)
    bench.run(120, 120, key=b"other")
    bench.run(106, 106)
    bench.run(129, 129, key=b"other")
    assert told(bench) == [
        (104, "+", 100, 110, [100]),
        (120, "+", 112, 123, [112, 113]),
        (128, "-", 100, 110, [100]),
        (128, "-", 112, 123, [112, 113]),
        (128, "+", 100, 123, [100, 112, 113, 106]),
        (128, "+", 120, 139, [120, 129]),
    ]


def test_session_that_closes_before_the_next_interval_withdraws_what_was_told() -> None:
    bench = TimersBench(in_sessions(grace=0, emit=30 * MS))
    for at in (85, 92, 99):
        bench.run(at, at)
    assert told(bench) == [(90, "+", 85, 102, [85, 92])]
    bench.run(0, 110, key=b"other")  # event time isn't at 120 yet
    assert told(bench)[1:] == [(108, "-", 85, 102, [85, 92]), (108, "+", 85, 109, [85, 92, 99])]
    bench.barrier()
    assert list(bench.store.keys_of("w//sessions")) == [b"other"]
    assert [key[8:] for key in bench.store.keys_of("w//results")] == [b"other"]


def test_results_that_are_not_withdrawn_are_those_of_all_sessions() -> None:
    bench = TimersBench(in_sessions(grace=20))
    chance = random.Random(3)
    for number in range(300):
        at = max(0, number * 2 - chance.randrange(25))
        bench.run(number, at, key=chance.choice((b"a", b"b", b"c")))
    bench.run(0, 10_000, key=b"other")
    standing: dict[tuple[str, int, int], int] = {}
    withdrawn = 0
    for one in bench.values():
        of = one["key"], one["start"], one["end"]
        if one["withdrawn"]:
            assert standing.pop(of) == len(one["values"])
            withdrawn += 1
        else:
            standing[of] = len(one["values"])
    assert sum(standing.values()) == 300 - bench.port.late
    assert withdrawn > 20


def failing_at_two(windows: Any) -> Job:
    def fail(value: Any) -> Any:
        if len(value["values"]) == 2:
            raise ValueError("no good")
        return value

    job = Job("j")
    stream = job.stream(job.topic("in")).window(windows, name="w", emit=10 * MS)
    stream.aggregate(values=collect()).map(fail, on_error="skip").to(job.topic("out"))
    return job


def test_result_of_a_session_that_failed_has_never_been_told() -> None:
    bench = TimersBench(failing_at_two(Session(10 * MS, grace=100 * MS)))
    for at in (105, 111, 114, 121, 123, 131):
        bench.run(at, at)
    assert bench.port.skipped == 1  # at 110
    assert told(bench) == [
        (120, "+", 105, 131, [105, 111, 114, 121]),
        (130, "-", 105, 131, [105, 111, 114, 121]),
        (130, "+", 105, 141, [105, 111, 114, 121, 123, 131]),
    ]


def test_a_field_named_as_what_withdraws_is_refused() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Session(10 * MS), name="w", emit=10 * MS)
    with pytest.raises(JobError, match="has a field 'withdrawn'"):
        windows.aggregate(withdrawn=count())


# --- sliding and counted windows ------------------------------------------------------------------------


def test_sliding_windows_that_have_changed_are_passed_on() -> None:
    bench = TimersBench(at_intervals(Sliding(10 * MS, grace=50 * MS)))
    bench.run(103, 103)
    bench.run(108, 108)
    bench.run(110, 110)
    found = [(at, one["start"], one["end"], one["values"]) for at, one in timed(bench)]
    assert found == [
        (110, 93, 104, [103]),
        (110, 98, 109, [103, 108]),
        (110, 100, 111, [103, 108, 110]),
        (110, 104, 115, [108, 110]),
        (110, 109, 120, [110]),
    ]
    bench.run(99, 120, key=b"other")
    assert [one["key"] for _at, one in timed(bench)[5:]] == ["other"]  # nothing else has changed
    bench.run(102, 102)  # it changes two of them, and has one of its own
    bench.run(99, 131, key=b"other")
    own = [(at, one["start"], one["end"], one["values"]) for at, one in timed(bench) if one["key"] == "k"]
    assert own[5:] == [
        (130, 92, 103, [102]),
        (130, 93, 104, [103, 102]),
        (130, 98, 109, [103, 108, 102]),
        (130, 100, 111, [103, 108, 110, 102]),
        (130, 103, 114, [103, 108, 110]),
    ]


def test_counted_windows_are_passed_on_before_they_are_full() -> None:
    bench = TimersBench(at_intervals(Counted(3, every=2)))
    for at in (101, 111, 112, 113, 125):
        bench.run(at, at)
    assert written(bench) == [
        (110, [101, 111]),
        (112, [101, 111, 112]),  # it is full, and is passed on with its last record
        (125, [112, 113, 125]),
    ]
    bench.run(0, 1_000, key=b"x")  # the third window is that of the last record
    assert written(bench)[3:] == [(130, [125])]
    bench.barrier()
    assert [key[8:] for key in bench.store.keys_of("w//results")] == [b"x"]


def test_records_wait_for_results_of_counted_windows_and_for_no_others() -> None:
    for windows, waits in ((Counted(9), True), (HUNDRED, False), (Session(10 * MS), False)):
        bench = TimersBench(at_intervals(windows))
        bench.timers.at_once_max = 1
        for number in range(4):
            bench.run(1, 1, key=b"%d" % number)
        bench.run(1, 11, key=b"x")
        assert bench.timers.event_must_fire() is waits


def test_job_with_counted_windows_at_intervals_uses_event_time() -> None:
    (stage,) = at_intervals(Counted(5)).build(Settings()).stages
    assert stage.keeps_time
    job = Job("j")
    tumbling = job.stream(job.topic("in")).window(HUNDRED, name="a").aggregate(n=count())
    tumbling.window(Counted(2), name="b", emit=10 * MS).aggregate(n=count()).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for at in (1, 101, 202, 303):
            driver.send("in", 1, key="k", timestamp=at)
        found = [(one.timestamp, one.value["start"], one.value["n"]) for one in driver.read("out")]
        assert found == [(110, 99, 1), (199, 99, 2)]


def test_counted_windows_at_intervals_are_late_for_windows_behind_them() -> None:
    job = Job("j")
    counted = job.stream(job.topic("in")).window(Counted(2), name="a", emit=10 * MS).aggregate(n=count())
    counted.window(HUNDRED, name="b").aggregate(n=count()).to(job.topic("out"))
    with pytest.raises(JobError, match="results of 'a' would be too late for it"):
        job.build(Settings())


@pytest.mark.parametrize("windows", [Session(10 * MS), Sliding(10 * MS), Counted(5)])
def test_what_other_windows_note_survives_a_crash(windows: Any) -> None:
    with Driver(at_intervals(windows), partitions=1, auto_barrier=False) as driver:
        driver.send("in", 3, key="k", timestamp=3)
        driver.send("in", 8, key="k", timestamp=8)
        driver.barrier()
        driver.send("in", 12, key="k", timestamp=12)
        driver.crash()
        driver.barrier()
        at_ten = [one.value["values"] for one in driver.read("out") if one.timestamp == 10]
        assert [3, 8, 12] in at_ten
