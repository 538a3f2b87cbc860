"""Results at intervals are those of a slow and obvious model, whatever the barriers, crashes and batches, and
however many records come before they are passed on."""

from __future__ import annotations

import random
from copy import deepcopy
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job, collect, count
from fcluster.engine.interval_sessions import OpenSessionsAtIntervals
from fcluster.engine.interval_sliding import OpenSlidingAtIntervals
from fcluster.engine.interval_windows import OpenWindowsAtIntervals
from tests.fuzz.interval_windows import partition_of
from tests.fuzz.windows import Row, WindowPlan, declared
from tests.unit.engine import planted_bugs
from tests.unit.engine.test_windows_random import KEYS, Plan, run_job

Output = tuple[str, bytes, Any, int]
"""Topic, key, value and timestamp."""


def at_intervals(kind: Any, interval: int, *, size: int = 10, every: int = 4, grace: int = 0) -> WindowPlan:
    return WindowPlan(kind, size, every, 0, grace, updates=False, before="", counted=False, interval=interval)


WINDOWS = {
    "tumbling": at_intervals("tumbling", 4, grace=20),
    "hopping": at_intervals("hopping", 7, grace=9),
    "sessions": at_intervals("session", 2, size=4, grace=30),
    "longer sessions": at_intervals("session", 3, size=9),
    "rare results of sessions": at_intervals("session", 40, size=3),
    "sliding": at_intervals("sliding", 6, grace=11),
    "sliding without grace": at_intervals("sliding", 9),
    "counted": at_intervals("counted", 6, size=4, every=2),
}
Drawn = list[tuple[bytes, int, int, int]]
"""Of each record: key, by how much time goes on, by how much it is late, and a value."""
drawn: Any = st.lists(
    st.tuples(st.sampled_from(KEYS[:3]), st.integers(0, 8), st.integers(0, 12), st.integers(1, 30)),
    max_size=30,
)


def plan_of(drawn: Drawn) -> Plan:
    """Records that mostly go on in time, and one after all windows."""
    plan, now = Plan(), 0
    for key, step, late, value in drawn:
        now += step
        plan.append((key, max(0, now - late), value))
    return [*plan, (KEYS[0], now + 200, 1)]


def job(windows: WindowPlan) -> Job:
    made = Job("j")
    source = made.topic("in", key="bytes")
    out, late = (made.topic(name, key="bytes") for name in ("out", "late"))
    late_of_time: Any = None if windows.kind == "counted" else late
    emit = timedelta(milliseconds=windows.interval)
    results = made.stream(source).window(declared(windows), name="w", late=late_of_time, emit=emit)
    results.aggregate(n=count(), values=collect()).map(_shown).to(out)
    return made


def _shown(result: dict[str, Any]) -> list[Any]:
    return [result["start"], result["end"], result["n"], result["values"], result.get("withdrawn")]


def model(windows: WindowPlan, plan: Plan) -> list[Output]:
    """The expected output: late records in order, then results in order."""
    partition = partition_of(windows)
    for key, at, value in plan:
        partition.add(Row(0, key.decode(), at, value))
        partition.pass_time(at)
    late: list[Output] = [("late", key.encode(), value, at) for key, at, value in partition.late]
    return late + [("out", key.encode(), _shown(value), at) for key, at, value in partition.out]


def run(windows: WindowPlan, plan: Plan, chance: random.Random, *, crashes: bool) -> list[Output]:
    """What the engine gives. Of sliding windows, a record that is late when it comes doesn't wait for those
    that are found to be late when windows close.
    """
    outputs = run_job(job(windows), plan, chance, crashes=crashes)
    return in_order(windows, outputs)


def in_order(windows: WindowPlan, outputs: list[Output]) -> list[Output]:
    if windows.kind != "sliding":
        return outputs
    late = sorted(one for one in outputs if one[0] == "late")
    return late + [one for one in outputs if one[0] != "late"]


@given(st.sampled_from(sorted(WINDOWS)), drawn, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_barriers_crashes_and_limits_never_change_the_results(name: str, drawn: Drawn, seed: int) -> None:
    plan, chance = plan_of(drawn), random.Random(seed)
    expected = in_order(WINDOWS[name], model(WINDOWS[name], plan))
    assert run(WINDOWS[name], plan, chance, crashes=False) == expected
    assert run(WINDOWS[name], plan, chance, crashes=True) == expected


def check_many() -> None:
    """Check fixed seeds, for planted bugs."""
    chance = random.Random(7)
    for number in range(160):
        windows = list(WINDOWS.values())[number % len(WINDOWS)]
        steps = [(chance.choice(KEYS[:2]), chance.randrange(6), chance.randrange(12)) for _ in range(25)]
        plan = plan_of([(key, step, late, value) for value, (key, step, late) in enumerate(steps)])
        expected = in_order(windows, model(windows, plan))
        assert run(windows, plan, chance, crashes=True) == expected


def test_fixed_plans_pass() -> None:
    check_many()


@pytest.mark.parametrize("kept", [OpenWindowsAtIntervals, OpenSessionsAtIntervals, OpenSlidingAtIntervals])
def test_records_that_get_into_results_that_are_due_are_caught(
    kept: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "changing", lambda *_: None)
    with pytest.raises(AssertionError):
        check_many()


def test_a_session_that_withdraws_what_it_is_now_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: what was told isn't kept apart from what the session keeps, so it changes with it."""
    plain = OpenSessionsAtIntervals.passed_on

    def passed_on(self: OpenSessionsAtIntervals, session: list[Any], result: Any = None) -> Any:
        found = plain(self, session, result)
        for told in session[4]:
            if told[:2] == session[:2]:
                told[2] = session[2]
        return [(withdrawn, deepcopy(one)) for withdrawn, one in found]

    monkeypatch.setattr(OpenSessionsAtIntervals, "passed_on", passed_on)
    with pytest.raises(AssertionError):
        check_many()


def test_sessions_that_forget_what_was_told_of_one_side_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: when two sessions become one, what was told of the later one isn't withdrawn."""
    plain = OpenSessionsAtIntervals.merged

    def merged(self: OpenSessionsAtIntervals, key: bytes, session: list[Any], later: list[Any]) -> None:
        plain(self, key, session, [*later[:4], [], later[5]])

    monkeypatch.setattr(OpenSessionsAtIntervals, "merged", merged)
    with pytest.raises(AssertionError):
        check_many()


def test_results_that_are_not_removed_in_their_epoch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.removals_are_not_in_the_delta(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()


def test_a_scan_that_misses_the_open_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.scan_misses_the_open_layer(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()
