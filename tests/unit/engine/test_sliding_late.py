"""Sliding windows: a record that is late for the window that ends with it is in a later one, or late."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job, Sliding, collect
from fcluster.engine import sliding as engine_sliding
from fcluster.testing import Driver
from tests.fuzz.interval_windows import partition_of
from tests.fuzz.windows import Row, WindowPlan
from tests.unit.engine.test_windows_random import run_job
from tests.unit.engine.timers_bench import TimersBench
from tests.unit.worker.processing_bench import FakeMessage

MS = timedelta(milliseconds=1)
FAR = 10_000
HEADERS = [("trace", b"1"), ("empty", None)]


def job_of(
    within: int = 10,
    grace: int = 0,
    *,
    emit: Any = "close",
    late: bool = True,
    fails: Any = (),
    **options: Any,
) -> Job:
    job = Job("j")
    source = job.topic("in", key="bytes")
    out, lates = (job.topic(name, key="bytes") for name in ("out", "late"))
    windows = Sliding(within * MS, grace=grace * MS)
    stream = job.stream(source)
    if late:
        options["late"] = lates
    stream = stream.window(windows, name="w", emit=emit, **options).aggregate(values=collect())

    def show(result: dict[str, Any]) -> list[Any]:
        if set(result["values"]) & set(fails):
            raise ValueError("no good")
        return [result["start"], result["end"], result["values"]]

    stream.map(show, on_error="skip").to(out)
    return job


def late_of(bench: TimersBench) -> list[tuple[Any, ...]]:
    """Key, value, timestamp and headers of each late record."""
    rows = [*bench.outputs, *bench.open]
    return [(key, raw, at, headers) for topic, raw, key, at, headers in rows if topic == "late"]


def results_of(bench: TimersBench) -> list[Any]:
    return [value for value in bench.values() if isinstance(value, list)]


def send(bench: TimersBench, value: int, at: int, key: bytes = b"k", headers: Any = None) -> None:
    record: Any = FakeMessage(str(value).encode(), key, bench.offset, headers, timestamp=at)
    bench.runner.handle(record)


def test_record_that_is_in_no_window_is_late_when_none_can_come_any_more() -> None:
    bench = TimersBench(job_of())
    send(bench, 1, 150, b"other")
    send(bench, 2, 145, headers=HEADERS)
    assert bench.port.late == 0  # a window that ends in 151 may still come
    bench.barrier()
    bench.crash()
    send(bench, 3, 156, b"other")
    assert bench.port.late == 0
    send(bench, 4, 157, b"other")
    assert (bench.port.late, late_of(bench)) == (1, [(b"k", b"2", 145, HEADERS)])
    bench.barrier()
    send(bench, 5, FAR)
    send(bench, 6, 3 * FAR, b"other")
    assert len(late_of(bench)) == 1
    assert not [one for one in results_of(bench) if 2 in one[2]]


@pytest.mark.parametrize("emit", ["close", "update", 7 * MS])
def test_record_that_gets_into_a_later_window_is_not_late(emit: Any) -> None:
    bench = TimersBench(job_of(emit=emit))
    send(bench, 1, 150, b"other")
    send(bench, 2, 145)
    send(bench, 3, 155)
    send(bench, 4, FAR, b"other")
    assert (bench.port.late, late_of(bench)) == (0, [])
    assert [145, 156, [2, 3]] in results_of(bench)


def test_it_defines_a_window_of_later_records_also_if_it_is_late() -> None:
    bench = TimersBench(job_of())
    send(bench, 1, 150, b"other")
    send(bench, 2, 145)
    send(bench, 3, 156)
    send(bench, 4, FAR, b"other")
    assert late_of(bench) == [(b"k", b"2", 145, None)]
    assert [146, 157, [3]] in results_of(bench)


def test_records_of_one_time_are_each_late_in_order() -> None:
    bench = TimersBench(job_of(grace=5))
    send(bench, 1, 160, b"other")
    for value in (2, 3, 2):
        send(bench, value, 150)
    send(bench, 4, 167, b"other")
    assert [raw for _key, raw, *_ in late_of(bench)] == [b"2", b"3", b"2"]
    bench.barrier()
    send(bench, 5, FAR, b"other")
    assert bench.port.late == 3


def test_without_a_topic_it_is_counted_and_no_headers_are_kept() -> None:
    bench = TimersBench(job_of(late=False))
    send(bench, 1, 150, b"other")
    send(bench, 2, 145, headers=HEADERS)
    bench.barrier()
    assert not [raw for delta in bench.deltas for raw in delta.values() if b"trace" in raw]
    send(bench, 3, FAR, b"other")
    assert bench.port.late == 1


def test_headers_are_kept_only_of_records_that_may_be_late() -> None:
    bench = TimersBench(job_of())
    send(bench, 1, 150, b"other")
    send(bench, 2, 150, headers=HEADERS)
    bench.barrier()
    assert not [raw for delta in bench.deltas for raw in delta.values() if b"trace" in raw]
    send(bench, 3, 145, headers=HEADERS)
    bench.barrier()
    assert [raw for delta in bench.deltas for raw in delta.values() if b"trace" in raw]


def test_window_that_fails_takes_no_late_record_with_it() -> None:
    bench = TimersBench(job_of(fails={3}))
    send(bench, 1, 150, b"other")
    send(bench, 2, 145)
    send(bench, 3, 156)  # the window [146, 156] fails when the record at 145 is late
    send(bench, 4, FAR, b"other")
    assert (bench.port.skipped, late_of(bench)) == (1, [(b"k", b"2", 145, None)])


def test_late_record_that_cannot_be_written_takes_no_other_one_with_it() -> None:
    bench = TimersBench(job_of(on_error="skip"))
    send(bench, 1, 150, b"other")
    for value in (2, 3, 4):
        send(bench, value, 145)
    bench.refuses = lambda topic, value: (topic, value) == ("late", b"3")
    bench.run(5, FAR, b"other")
    assert [raw for _key, raw, *_ in late_of(bench)] == [b"2", b"4"]


def test_state_that_knows_no_headers_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier version, records that are in no window are dropped without a word, as they were there."""
    with Driver(job_of(), partitions=1) as driver:
        with monkeypatch.context() as patch:
            plain = engine_sliding.OpenSliding.add

            def add(self: Any, *arguments: Any) -> Any:
                records = plain(self, *arguments)
                for one in records or ():
                    del one[engine_sliding.HEADERS :]
                return records

            patch.setattr(engine_sliding.OpenSliding, "add", add)
            driver.send("in", 1, key=b"other", timestamp=150)
            driver.send("in", 2, key=b"k", timestamp=145)
        driver.restart(job_of())
        driver.send("in", 3, key=b"k", timestamp=144)
        driver.send("in", 4, key=b"other", timestamp=FAR)
        assert [record.value for record in driver.records("late")] == [3]


def test_tombstone_is_late_as_a_tombstone_with_the_last_window_of_a_bounded_run() -> None:
    with Driver(job_of(), partitions=1) as driver:
        driver.send("in", 1, key=b"other", timestamp=150)
        driver.send("in", None, key=b"k", timestamp=145)
        assert driver.late == 0
        driver.finish()
        assert [(one.key, one.value, one.timestamp) for one in driver.records("late")] == [(b"k", None, 145)]
        assert driver.late == 1


def test_no_record_is_late_in_processing_time() -> None:
    job = Job("j")
    windows = job.stream(job.topic("in")).window(Sliding(10 * MS), name="w", clock="processing")
    windows.aggregate(values=collect()).to("out")
    with Driver(job, partitions=1, now_ms=1_000) as driver:
        for number in range(30):
            driver.send("in", number, key="ab"[number % 2], timestamp=5_000 - 100 * number)
            if number % 3 == 0:
                driver.advance(by_ms=number)
        driver.finish()
        found = {value for row in driver.read_values("out") for value in row["values"]}
        assert (found, driver.late) == (set(range(30)), 0)


# --- whatever comes -----------------------------------------------------------------------------------------

drawn: Any = st.lists(
    st.tuples(st.sampled_from([b"a", b"b"]), st.integers(0, 9), st.sampled_from([0, 0, 1, 4, 9, 14, 25])),
    min_size=1,
    max_size=30,
)
plans: Any = st.builds(
    WindowPlan,
    kind=st.just("sliding"),
    size=st.integers(0, 12),
    every=st.just(1),
    offset=st.just(0),
    grace=st.just(0) | st.integers(1, 9),
    updates=st.booleans(),
    before=st.just(""),
    counted=st.just(value=False),
    interval=st.just(0) | st.integers(1, 12),
).filter(lambda plan: not (plan.interval and plan.updates))


@given(plans, drawn, st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_each_record_is_in_a_result_or_late_once(plan: WindowPlan, drawn: Any, seed: int) -> None:
    check(plan, drawn, seed)


def check(plan: WindowPlan, drawn: Any, seed: int) -> None:
    rows, now = list[tuple[bytes, int, int]](), 0
    for number, (key, step, late) in enumerate(drawn):
        now += step
        rows.append((key, max(0, now - late), number))
    rows.append((b"end", now + 100, len(rows)))
    emit: Any = plan.interval * MS if plan.interval else "update" if plan.updates else "close"
    made = job_of(plan.size, plan.grace, emit=emit)
    outputs = run_job(made, rows, random.Random(seed), crashes=True)
    late = [value for topic, _key, value, _at in outputs if topic == "late"]
    assert [at for topic, _key, _value, at in outputs if topic == "late"] == [rows[one][1] for one in late]
    found = {value for topic, _key, shown, _at in outputs if topic == "out" for value in shown[2]}
    assert max(Counter(late).values(), default=1) == 1
    assert not found & set(late)
    expected = set(range(len(rows)))
    assert found | set(late) | ({len(rows) - 1} - found) == expected  # the last one's window is still open
    model = partition_of(plan)
    for key, at, value in rows:
        model.add(Row(0, key.decode(), at, value))
        model.pass_time(at)
    assert sorted(late) == sorted(value for _key, _at, value in model.late)


def check_many() -> None:
    """Check fixed seeds, for planted bugs."""
    chance = random.Random(3)
    for seed in range(60):
        plan = WindowPlan("sliding", 5, 1, 0, seed % 4, updates=False, before="", counted=False)
        steps = [(chance.choice([b"a", b"b"]), chance.randrange(9), chance.randrange(15)) for _ in range(25)]
        check(plan, steps, seed)


def test_fixed_plans_pass() -> None:
    check_many()


def test_records_that_are_forgotten_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: what no window had is removed without a word."""
    plain = engine_sliding.OpenSliding.take_out

    def take_out(self: Any, key: bytes, end_ms: int) -> Any:
        for one in self.table.get(key)[engine_sliding.RECORDS]:
            del one[engine_sliding.HEADERS :]
        return plain(self, key, end_ms)

    monkeypatch.setattr(engine_sliding.OpenSliding, "take_out", take_out)
    with pytest.raises(AssertionError):
        check_many()


def test_records_that_are_late_although_a_window_had_them_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: a window that has a record leaves it to be told as late."""
    plain = engine_sliding.OpenSliding.records_of

    def records_of(self: Any, records: Any, end_ms: int) -> Any:
        return [list(one) for one in plain(self, records, end_ms)]

    monkeypatch.setattr(engine_sliding.OpenSliding, "records_of", records_of)
    with pytest.raises(AssertionError):
        check_many()
