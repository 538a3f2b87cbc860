"""Random jobs with windows: wherever barriers and crashes fall, and however partitions interleave, the
results that a slow interpreter computes are committed, each once.

A fixed choice of examples runs with the other tests; `make fuzz EXAMPLES=...` draws others, and more.
`tests/unit/engine/test_windows_random.py` also varies batches, caches, and when due windows close. The
simulation varies the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fcluster import Counted
from fcluster.api import windowed
from fcluster.engine import runner
from fcluster.engine.changelog import Delta
from fcluster.engine.clock import EventClock
from fcluster.engine.interval_gathered import OpenGatheredAtIntervals
from fcluster.engine.interval_notes import IntervalNotes
from fcluster.engine.interval_parts import OpenPartsAtIntervals
from fcluster.engine.interval_windows import OpenWindowsAtIntervals
from fcluster.engine.operators import session
from fcluster.engine.sliding import OpenSliding
from fcluster.engine.windows import OpenInTime
from fcluster.testing import Driver, JobStopped, shards
from tests.fuzz import interval_windows, windows
from tests.fuzz.interval_windows import partition_of
from tests.fuzz.windows import FAR_MS, PARTITIONS, JobPlan, Row, WindowPlan, partition_of_key

EXAMPLES = int(os.environ.get("FCLUSTER_FUZZ_EXAMPLES", "0"))
SETTINGS: dict[str, Any] = {
    "derandomize": not EXAMPLES,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def play(driver: Driver, plan: JobPlan, rows: list[Row], between: list[str]) -> None:
    """Write the records, with barriers and crashes between them, and let all windows close."""
    for row, what in zip_longest(rows, between[: len(rows)], fillvalue=""):
        assert isinstance(row, Row)
        value, timestamp = windows.sent(plan, row)
        driver.send("in", value, key=row.key, timestamp=timestamp, partition=row.partition)
        if what:
            getattr(driver, what)()
    driver.settle()
    for _ in range(len(plan.windows) + 1):  # each repartition hears of event time with a commit
        driver.advance(to_ms=FAR_MS, clock="event")
        driver.settle()


def without_order(output: tuple[str, int, Any]) -> tuple[str, int, Any]:
    """An output of a session. When two become one, there is no order in which their values were read."""
    key, at, value = output
    return key, at, {**value, "values": sorted(value["values"])} if isinstance(value, dict) else value


def check_direct(plan: JobPlan, drawn: Any, between: list[str]) -> None:
    """Run a job with windows on its source, and compare all outputs."""
    rows = windows.rows_of(plan, drawn)
    with Driver(windows.build(plan), partitions=PARTITIONS, auto_barrier=not between) as driver:
        play(driver, plan, rows, between)
        late = 0
        for topic, by_partition in windows.direct(plan, rows, partition_of).items():
            late += sum(map(len, by_partition)) if topic.startswith("late") else 0
            found = [(one.key, one.timestamp, one.value) for one in driver.records(topic)]
            for partition, wanted in enumerate(by_partition):
                own = [output for output in found if partition_of_key(output[0]) == partition]
                assert list(map(without_order, own)) == list(map(without_order, wanted))
        assert driver.late == late


def check_crossed(plan: JobPlan, drawn: Any, between: list[str]) -> None:
    """Run a job with windows behind repartitions, and compare the results."""
    rows = windows.rows_of(plan, drawn)
    with Driver(windows.build(plan), partitions=PARTITIONS, auto_barrier=not between) as driver:
        play(driver, plan, rows, between)
        assert driver.late == 0
        found = sorted(
            (one["key"], one["start"], one["end"], one["n"], one["total"], sorted(one["values"]))
            for one in driver.read_values("out")
        )
        assert found == windows.crossed(plan, rows)


def check_keyless(plan: JobPlan, drawn: Any, between: list[str]) -> None:
    """Run a job with windows of all records, and compare the results."""
    rows = windows.rows_of(plan, drawn)
    with Driver(windows.build_keyless(plan), partitions=PARTITIONS, auto_barrier=not between) as driver:
        play(driver, plan, rows, between)
        assert driver.late == 0
        found = [{**one, "values": sorted(one["values"])} for one in driver.read_values("out")]
        assert found == windows.keyless(plan, rows)


def check_early_keyless(plan: JobPlan, drawn: Any, between: list[str]) -> None:
    """Run a job with windows of all records that pass results on before they close, and compare these."""
    rows = windows.rows_of(plan, drawn)
    with Driver(windows.build_keyless(plan), partitions=PARTITIONS, auto_barrier=not between) as driver:
        play(driver, plan, rows, between)
        assert driver.late == 0
        outputs = [
            (one.timestamp, {**one.value, "values": sorted(one.value["values"])})
            for one in driver.records("out")
        ]
        if not plan.windows[0].updates:
            assert outputs == interval_windows.keyless_at_intervals(plan, rows)
            return
        found: dict[tuple[int, int], list[Any]] = {}
        for _at, value in outputs:
            found.setdefault((value["start"], value["end"]), []).append(value)
        wanted = interval_windows.keyless_updates(plan, rows)
        assert {span: [one["n"] for one in own] for span, own in found.items()} == {
            span: [one["n"] for one in own] for span, own in wanted.items()
        }
        assert {span: own[-1] for span, own in found.items()} == {
            span: own[-1] for span, own in wanted.items()
        }


@settings(max_examples=EXAMPLES or 250, **SETTINGS)
@given(windows.direct_jobs, windows.draws, windows.between)
def test_odd_jobs_with_windows_do_what_the_interpreter_says(
    plan: JobPlan, drawn: Any, between: list[str]
) -> None:
    check_direct(plan, drawn, between)


@settings(max_examples=EXAMPLES or 150, **SETTINGS)
@given(windows.crossed_jobs, windows.draws, windows.between)
def test_odd_jobs_with_windows_behind_repartitions_do_what_the_interpreter_says(
    plan: JobPlan, drawn: Any, between: list[str]
) -> None:
    check_crossed(plan, drawn, between)


@settings(max_examples=EXAMPLES or 100, **SETTINGS)
@given(windows.keyless_jobs, windows.draws, windows.between)
def test_odd_windows_of_all_records_do_what_the_interpreter_says(
    plan: JobPlan, drawn: Any, between: list[str]
) -> None:
    check_keyless(plan, drawn, between)


@settings(max_examples=EXAMPLES or 150, **SETTINGS)
@given(windows.early_keyless_jobs, windows.draws, windows.between)
def test_odd_windows_of_all_records_pass_on_before_they_close_what_the_interpreter_says(
    plan: JobPlan, drawn: Any, between: list[str]
) -> None:
    check_early_keyless(plan, drawn, between)


# --- it must be able to fail ----------------------------------------------------------------------------


def removals_are_not_in_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed window comes back after a restore."""
    plain = shards.encode_delta

    def encode(delta: Delta) -> list[bytes]:
        return plain(replace(delta, changes={key: value for key, value in delta.changes.items() if value}))

    monkeypatch.setattr(shards, "encode_delta", encode)


def event_time_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late record gets in after a restore."""
    monkeypatch.setattr(EventClock, "restore", lambda *_: None)


def sessions_lose_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """When two sessions become one, the later one's records are lost."""
    monkeypatch.setattr(session, "_compile_merge", lambda _node: lambda _kept, _later: None)


def a_window_closes_without_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes as soon as event time reaches its end."""
    plain = OpenInTime.__init__

    def init(self: OpenInTime, *rest: Any) -> None:
        plain(self, *rest)
        self._closes_after_ms = 0  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(OpenInTime, "__init__", init)


def event_time_is_reported_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are late for the next windows."""
    monkeypatch.setattr(EventClock, "told_ms", property(lambda clock: clock.now_ms))


def one_part_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of all records keep the part that came last."""
    plain = windowed.gathered

    def gathered(fields: Any) -> Any:
        last = tuple((name, replace(one, merge=lambda _kept, later: later)) for name, one in fields)
        return plain(last)

    monkeypatch.setattr(windowed, "gathered", gathered)


def records_slide_into_windows_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record gets into sliding windows that have closed, or define some."""
    plain = OpenSliding.add

    def add(self: OpenSliding, key: bytes, timestamp_ms: int, _closed_ms: int, *kept: Any) -> Any:
        return plain(self, key, timestamp_ms, -1, *kept)

    monkeypatch.setattr(OpenSliding, "add", add)


def counted_windows_forget_where_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window begins as if it were the first one."""
    monkeypatch.setattr(Counted, "step", property(lambda windows: windows.size))


def intervals_go_by_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next interval is that behind the record, not that behind event time."""
    plain = IntervalNotes.next_ms

    def next_ms(self: IntervalNotes, _start_ms: int, timestamp_ms: int) -> int:
        return plain(self, timestamp_ms, timestamp_ms)

    monkeypatch.setattr(IntervalNotes, "next_ms", next_ms)


def parts_are_added_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of an interval has parts of later times, of shards that are ahead."""
    plain = OpenGatheredAtIntervals._take_parts  # pyright: ignore[reportPrivateUsage]

    def take_parts(self: OpenGatheredAtIntervals, window: list[Any], _until_ms: int) -> Any:
        return plain(self, window, 10**9)

    monkeypatch.setattr(OpenGatheredAtIntervals, "_take_parts", take_parts)


def parts_are_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was passed on at an interval doesn't begin anew."""
    monkeypatch.setattr(OpenPartsAtIntervals, "take_noted", OpenWindowsAtIntervals.take_noted)


def kafka_moves_event_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event time follows Kafka's timestamps, although the times are in the values."""

    def observe(run: Any, clock: EventClock, number: int, _stamper: Any) -> Any:
        return runner._observing(run, clock, number)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(runner, "_observing_stamps", observe)


@pytest.mark.parametrize(
    ("plant", "check", "jobs"),
    [
        (kafka_moves_event_time, check_direct, windows.direct_jobs),
        (event_time_is_reported_too_early, check_keyless, windows.keyless_jobs),
        (one_part_is_enough, check_keyless, windows.keyless_jobs),
        (parts_are_added_as_they_come, check_early_keyless, windows.early_keyless_jobs),
        (parts_are_told_again, check_early_keyless, windows.early_keyless_jobs),
        (records_slide_into_windows_that_are_due, check_direct, windows.direct_jobs),
        (counted_windows_forget_where_they_begin, check_direct, windows.direct_jobs),
        (intervals_go_by_the_records, check_direct, windows.direct_jobs),
        (removals_are_not_in_the_delta, check_direct, windows.direct_jobs),
        (event_time_is_not_restored, check_direct, windows.direct_jobs),
        (sessions_lose_one_side, check_crossed, windows.crossed_jobs),
        (a_window_closes_without_its_grace, check_direct, windows.direct_jobs),
        (event_time_is_reported_too_early, check_crossed, windows.crossed_jobs),
    ],
)
def test_planted_bug_in_windows_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[JobPlan, Any, list[str]], None],
    jobs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)

    @settings(max_examples=2_000, phases=[Phase.generate], **SETTINGS)
    @given(jobs, windows.draws, windows.between)
    def search(plan: JobPlan, drawn: Any, between: list[str]) -> None:
        check(plan, drawn, between)

    with pytest.raises((AssertionError, JobStopped)):
        search()


def test_plan_that_is_written_down_is_run() -> None:
    """The comparison compares something: a plan, with what comes of it."""
    window = WindowPlan("session", 5, 1, 0, 2, updates=False, before="", counted=True)
    plan = JobPlan(delay=3, windows=(window,), crossed=False)
    drawn = [(0, "a", 0, 0, 1), (0, "a", 8, 0, 2), (0, "a", 0, 3, 3), (0, "a", 9, 0, 4), (0, "a", 0, 9, 5)]
    rows = windows.rows_of(plan, drawn)
    assert [row.at for row in rows] == [20, 28, 25, 37, 10]
    outputs = windows.direct(plan, rows, partition_of)
    assert [(at, one["values"], one["number"]) for _, at, one in outputs["out-0"][0]] == [
        (32, [1, 3, 2], 1),
        (41, [4], 2),
    ]
    assert outputs["late-0"][0] == [("a", 10, 5)]
    check_direct(plan, drawn, ["crash", "", "barrier", "crash", ""])
