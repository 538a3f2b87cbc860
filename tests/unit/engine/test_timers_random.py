"""Timers fire as in a slow and obvious model, whatever the barriers, crashes and batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Job
from fcluster.engine import timers as engine_timers
from fcluster.engine.ordered_keys import encode_time
from tests.unit.engine import planted_bugs
from tests.unit.engine.timers_bench import TimersBench

NAMES = ("a", "b", "ab")
KEYS = (b"", b"\x00", b"k", b"k\x00", b"kk")

Step = tuple[Any, ...]
"""("record", key, timestamp, [(name, at or None, clock)]) or ("wall", now)."""
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("record"),
            st.sampled_from(KEYS),
            st.integers(0, 60),
            st.lists(
                st.tuples(
                    st.sampled_from(NAMES),
                    st.one_of(st.none(), st.integers(0, 80)),
                    st.sampled_from(["event", "processing"]),
                ),
                max_size=3,
            ),
        ),
        st.tuples(st.just("wall"), st.integers(0, 80)),
    ),
    max_size=25,
)


def what_a_timer_does(name: str, at: int, count: int) -> tuple[str, list[Step]]:
    """What a timer writes and sets. Some set themselves again, some cancel another, some fail."""
    actions: list[Step] = []
    if name == "a" and count < 3:
        actions.append(("a", at + 7, "event"))
    if name == "b":
        actions.append(("a", None, "event"))
    if name == "ab":
        actions.append(("b", at - 3 if at > 3 else at, "processing" if count % 2 else "event"))
        if count % 3 == 0:
            actions.append(("ab", max(0, at - 4), "event" if count % 2 else "processing"))
    return f"{name} {at} {count}", actions


def fails(name: str, at: int) -> bool:
    return name == "ab" and at % 5 == 0


# --- the model ----------------------------------------------------------------------------------------


class Model:
    """Keeps all timers in one dict, and searches through it each time."""

    def __init__(self) -> None:
        self.outputs: list[tuple[bytes, str]] = []
        self.timers: dict[tuple[bytes, str], tuple[int, str]] = {}
        self.counts: dict[bytes, int] = {}
        self.now = -1
        self.wall = 0

    def step(self, step: Step) -> None:
        if step[0] == "record":
            _, key, timestamp, actions = step
            self.apply(key, actions)
            self.outputs.append((key, "record"))
            self.now = max(self.now, timestamp)
            self.fire("event", self.now)
        else:
            self.wall = max(self.wall, step[1])
            self.fire("event", self.now)
            self.fire("processing", self.wall)

    def apply(self, key: bytes, actions: list[Step], by: tuple[int, str] | None = None) -> None:
        """Apply set and cancel actions. `by`: time and clock of the timer whose actions they are."""
        for name, at, clock in actions:
            now = self.now if clock == "event" else self.wall
            if at is None:
                self.timers.pop((key, name), None)
            elif by is None or at > (by[0] if clock == by[1] else now):
                self.timers[key, name] = (at, clock)
            else:
                self.timers[key, name] = (now + 1, clock)

    def fire(self, clock: str, now: int) -> None:
        while True:
            due = sorted((at, *of) for of, (at, which) in self.timers.items() if which == clock and at <= now)
            if not due:
                return
            at, key, name = due[0]
            del self.timers[key, name]
            if not fails(name, at):
                count = self.counts[key] = self.counts.get(key, 0) + 1
                text, actions = what_a_timer_does(name, at, count)
                self.apply(key, actions, (at, clock))
                self.outputs.append((key, text))
            if clock == "processing":
                self.fire("event", self.now)


# --- the engine -----------------------------------------------------------------------------------------


def handler(ctx: Any, actions: Any) -> str:
    for name, at, clock in actions:
        if at is None:
            ctx.cancel_timer(name)
        else:
            ctx.timer(name, at=at, clock=clock)
    return "record"


def timer_function(name: str) -> Callable[[Any, Any], Iterator[Any]]:
    def function(_key: Any, ctx: Any) -> Iterator[Any]:
        count = ctx.state["n"] = ctx.state.get("n", 0) + 1
        text, actions = what_a_timer_does(name, ctx.timestamp, count)
        handler(ctx, actions)
        yield text
        if fails(name, ctx.timestamp):
            raise ValueError("no good")

    return function


def job() -> Job:
    made = Job("j")
    source, out = made.topic("in", key="bytes"), made.topic("out", key="bytes")
    timers = {name: timer_function(name) for name in NAMES}
    made.process(source, to=out, name="h", timers=timers, on_error="skip")(handler)
    return made


def run(plan: list[Step], chance: random.Random, *, crashes: bool) -> list[tuple[bytes, str]]:
    """Run the plan, with barriers, crashes, limits and writes to the store at random places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_timers, "READ_AHEAD_TIMERS", chance.choice((1, 2, 5, 64)))
        return run_patched(plan, chance, crashes=crashes)


def run_patched(plan: list[Step], chance: random.Random, *, crashes: bool) -> list[tuple[bytes, str]]:
    bench = TimersBench(job(), cache_entries_max=chance.choice((0, 2, 100)))
    limit = chance.choice((0, 1, 2, 1_000))  # 0: one timer at a time, as when a record is searched for
    bench.timers.at_once_max = limit
    at, wall, is_record = committed = (0, 0, True)

    def barrier() -> None:
        nonlocal committed
        bench.barrier(flush=chance.random() < 0.5)
        committed = (at, wall, is_record)

    while True:
        # After a crash, the new owner first fires the timers that are left. Processing time passes only where
        # the plan
        # says so.
        while bench.timers.event_is_due() if is_record else bench.timers.is_due():
            if crashes and chance.random() < 0.2:
                barrier()
            assert (fire_one(bench) if is_record else bench.timers.fire_due(1)) == 1
        if crashes and chance.random() < 0.15:
            bench.crash()
            bench.timers.at_once_max = limit
            at, wall, is_record = committed
            bench.wall_ms = wall
            continue
        if chance.random() < 0.3:
            barrier()
        if at == len(plan):
            break
        step = plan[at]
        is_record = step[0] == "record"
        if is_record:
            bench.run(step[3], step[2], step[1])
        else:
            wall = bench.wall_ms = max(wall, step[1])
        at += 1
    bench.barrier()
    assert bench.timers.count == expected_timers(plan)
    return [(key, orjson_text(raw)) for _topic, raw, key, *_rest in bench.outputs]


def fire_one(bench: TimersBench) -> int:
    """Fire one timer in event time."""
    before, bench.timers.at_once_max = bench.timers.at_once_max, 1
    fired = bench.timers.fired
    bench.timers.fire_event()
    bench.timers.at_once_max = before
    return bench.timers.fired - fired


def orjson_text(raw: bytes) -> str:
    return raw.decode().strip('"')


def expected(plan: list[Step]) -> list[tuple[bytes, str]]:
    model = Model()
    for step in plan:
        model.step(step)
    return model.outputs


def expected_timers(plan: list[Step]) -> int:
    model = Model()
    for step in plan:
        model.step(step)
    return len(model.timers)


@given(steps, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_barriers_crashes_and_limits_never_change_the_result(plan: list[Step], seed: int) -> None:
    chance = random.Random(seed)
    assert run(plan, chance, crashes=False) == expected(plan)
    assert run(plan, chance, crashes=True) == expected(plan)


def check_many() -> None:
    """Check fixed seeds, for planted bugs."""
    chance = random.Random(7)
    for _ in range(40):
        plan: list[Step] = []
        for _ in range(15):
            actions = [
                (
                    chance.choice(NAMES),
                    chance.choice((None, *range(0, 80, 9))),
                    chance.choice(("event", "processing")),
                )
                for _ in range(chance.randrange(3))
            ]
            plan.append(("record", chance.choice(KEYS), chance.randrange(60), actions))
            if chance.random() < 0.3:
                plan.append(("wall", chance.randrange(80)))
        assert run(plan, chance, crashes=True) == expected(plan)


def test_fixed_plans_pass() -> None:
    check_many()


def test_a_late_timer_that_is_lost_at_a_move_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: a new owner looks for timers only from the clock's time on, so it misses late ones."""
    plain = TimersBench.start

    def start(bench: TimersBench) -> None:
        plain(bench)
        for timers in bench.timers.handlers.values():
            now = bench.clock.now_ms
            if now is not None:
                timers._ahead["event"]._read_until = b"e" + encode_time(now + 1)

    monkeypatch.setattr(TimersBench, "start", start)
    with pytest.raises(AssertionError):
        check_many()


def test_a_scan_that_misses_the_open_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.scan_misses_the_open_layer(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()


def test_a_timer_that_is_not_removed_in_its_epoch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.removals_are_not_in_the_delta(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()
