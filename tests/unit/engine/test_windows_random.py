"""Windows give the same results as a slow and obvious model, whatever the barriers, crashes and batches, and
however partitions interleave."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import Aggregate, Hopping, Job, Session, Tumbling, Watermark, collect, count, sum_
from fcluster.engine import firing
from fcluster.engine import timers as engine_timers
from fcluster.engine.operators.window import WindowOperator
from fcluster.engine.windows import OpenWindows
from fcluster.testing import Driver
from tests.unit.engine import planted_bugs
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)
KEYS = (b"", b"\x00", b"k", b"k\x00", b"kk")
WINDOWS = {
    "tumbling": Tumbling(10 * MS),
    "with grace": Tumbling(10 * MS, grace=13 * MS, offset=3 * MS),
    "hopping": Hopping(12 * MS, 5 * MS, grace=2 * MS),
    "tight": Hopping(4 * MS, 1 * MS, offset=timedelta()),
    "sessions": Session(3 * MS),
    "sessions with grace": Session(5 * MS, grace=14 * MS),
}
BAD = 13
"""A value that fails in the last aggregate. If the result is a multiple of it, the window's result fails."""

Plan = list[tuple[bytes, int, int]]
"""Key, timestamp and value of each record."""
Result = tuple[str, bytes, list[Any]]
"""Topic, key, and: start, end and the ordered values of a window, or the value of a late record."""
AnyWindows = Tumbling | Hopping | Session
plans: Any = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 90), st.integers(1, 30)), max_size=30)


# --- the model ----------------------------------------------------------------------------------------


def model(windows: AnyWindows, plan: Plan) -> list[Result]:
    """The expected output: late records in order, then results in order."""
    of_kind: Any = model_of_sessions if isinstance(windows, Session) else model_of_size
    return sorted(of_kind(windows, plan), key=lambda one: one[0])


def model_of_size(windows: Tumbling | Hopping, plan: Plan) -> list[Result]:
    """All windows in one dict, searched through after each record."""
    size, grace = windows.size // MS, windows.grace_ms
    every = windows.every // MS if isinstance(windows, Hopping) else size
    offset = windows.offset // MS
    least = 0 if isinstance(windows, Hopping) else -size
    starts = [start for start in range(offset - size * every, 200, every) if start >= least]
    opened: dict[tuple[int, bytes], list[int]] = {}
    found: list[Result] = []
    now = -1
    for key, at, value in plan:
        within = [start for start in starts if start <= at < start + size]
        taking = [start for start in within if now < start + size + grace]
        if value != BAD:
            for start in taking:
                opened.setdefault((start, key), []).append(value)
        if not taking:
            found.append(("late", key, [value]))
        now = max(now, at)
        for start, one in sorted(opened):
            if start + size + grace <= now:
                values = opened.pop((start, one))
                if sum(values) % BAD:
                    found.append(("out", one, [start, start + size, sorted(values)]))
    return found


def model_of_sessions(windows: Session, plan: Plan) -> list[Result]:
    """All records of a key that haven't closed, split into sessions again each time."""
    gap, grace = windows.gap_ms, windows.grace_ms
    opened: dict[bytes, list[tuple[int, int]]] = {}
    found: list[Result] = []
    now = -1

    def sessions(rows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        cut: list[list[tuple[int, int]]] = []
        for row in sorted(rows):
            if cut and row[0] <= cut[-1][-1][0] + gap:
                cut[-1].append(row)
            else:
                cut.append([row])
        return cut

    for key, at, value in plan:
        rows = opened.setdefault(key, [])
        within = next(one for one in sessions([*rows, (at, value)]) if (at, value) in one)
        if within[-1][0] + gap + grace < now:
            found.append(("late", key, [value]))
        elif value != BAD:
            rows.append((at, value))
        now = max(now, at)
        due = [
            (session[-1][0] + gap, one, session)
            for one, rows in opened.items()
            for session in sessions(rows)
            if session[-1][0] + gap + grace < now
        ]
        for end, one, session in sorted(due):
            opened[one] = [row for row in opened[one] if row not in session]
            values = [value for _at, value in session]
            if sum(values) % BAD:
                found.append(("out", one, [session[0][0], end, sorted(values)]))
    return found


# --- the engine -----------------------------------------------------------------------------------------


def no_multiple(total: int) -> int:
    if not total % BAD:
        raise ValueError("no good")
    return total


def job(windows: AnyWindows) -> Job:
    made = Job("j")
    source = made.topic("in", key="bytes")
    out, late = (made.topic(name, key="bytes") for name in ("out", "late"))

    def add(kept: int, value: int) -> int:
        if value == BAD:
            raise ValueError("no good")
        return kept + value

    made.stream(source).window(windows, name="w", late=late, on_error="skip").aggregate(
        n=count(),
        values=collect(),
        total=Aggregate("total", int, add, no_multiple, merge=lambda kept, later: kept + later),
    ).map(lambda result: [result["start"], result["end"], sorted(result["values"])]).to(out)
    return made


class Run:
    """Runs the plan, with barriers, crashes, limits and writes to the store at random places."""

    def __init__(self, made: Job, plan: Plan, chance: random.Random, crashes: bool) -> None:
        self.plan, self.chance, self.crashes = plan, chance, crashes
        # Keys are bytes here, which JSON can't hold: `map` drops them.
        self.bench = TimersBench(made, cache_entries_max=chance.choice((0, 2, 100)))
        self.limit = chance.choice((0, 1, 2, 1_000))
        self.bench.timers.at_once_max = self.limit
        self.at = self.committed = 0

    def barrier(self) -> None:
        self.bench.barrier(flush=self.chance.random() < 0.5)
        self.committed = self.at

    def go(self) -> list[tuple[str, bytes, Any, int]]:
        """Topic, key, value and timestamp of each output."""
        bench, chance = self.bench, self.chance
        while True:
            while bench.timers.event_is_due() and chance.random() < 0.7:  # windows may wait
                if self.crashes and chance.random() < 0.2:
                    self.barrier()
                assert bench.timers.fire_due(1) == 1
            if self.crashes and chance.random() < 0.15:
                bench.crash()
                bench.timers.at_once_max = self.limit
                self.at = self.committed
                continue
            if chance.random() < 0.3:
                self.barrier()
            if self.at == len(self.plan):
                if bench.timers.event_is_due():
                    continue
                break
            key, at, value = self.plan[self.at]
            bench.run(value, at, key)
            self.at += 1
        bench.barrier()
        # Late records don't wait for windows that are due, so only the order within each kind is defined.
        outputs = sorted(bench.outputs, key=lambda one: one[0])
        return [(topic, key, orjson.loads(raw), at) for topic, raw, key, at, *_rest in outputs]


def run_job(
    made: Job, plan: Plan, chance: random.Random, *, crashes: bool
) -> list[tuple[str, bytes, Any, int]]:
    """The committed outputs: topic, key, value and timestamp of each. Those of a topic are in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_timers, "READ_AHEAD_TIMERS", chance.choice((1, 2, 5, 64)))
        patch.setattr(firing, "CLOSED_AT_ONCE_MAX", chance.choice((0, 1, 3, 100)))
        return Run(made, plan, chance, crashes).go()


def run(windows: AnyWindows, plan: Plan, chance: random.Random, *, crashes: bool) -> list[Result]:
    outputs = run_job(job(windows), plan, chance, crashes=crashes)
    return [(topic, key, value if topic == "out" else [value]) for topic, key, value, _at in outputs]


@given(st.sampled_from(sorted(WINDOWS)), plans, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_barriers_crashes_and_limits_never_change_the_result(name: str, plan: Plan, seed: int) -> None:
    chance = random.Random(seed)
    expected = model(WINDOWS[name], plan)
    assert run(WINDOWS[name], plan, chance, crashes=False) == expected
    assert run(WINDOWS[name], plan, chance, crashes=True) == expected


def check_many() -> None:
    """Check fixed seeds, for planted bugs."""
    chance = random.Random(7)
    for number in range(60):
        windows = list(WINDOWS.values())[number % len(WINDOWS)]
        plan = [(chance.choice(KEYS), chance.randrange(90), chance.randrange(1, 30)) for _ in range(20)]
        assert run(windows, plan, chance, crashes=True) == model(windows, plan)


def test_fixed_plans_pass() -> None:
    check_many()


def test_a_record_that_reopens_a_closed_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: a window counts as closed if its entry is gone, whatever event time is."""
    plain = WindowOperator.compile

    class Timeless:
        """Windows without a clock."""

        def __init__(self, windows: OpenWindows) -> None:
            self.clock = self
            self.now_ms = None
            self.table, self.port, self.opened = windows.table, windows.port, windows.opened
            self.floor_ms = windows.floor_ms

    def compile_it(operator: WindowOperator, surroundings: Any, following: Any) -> Any:
        timers = {name: Timeless(one) for name, one in surroundings.timers.items()}
        changed = type(surroundings)(
            **{
                name: getattr(surroundings, name)
                for name in surroundings.__slots__
                if name not in ("timers", "fire")
            },
            timers=timers,
            fire=surroundings.fire,
        )
        return plain(operator, changed, following)

    monkeypatch.setattr(WindowOperator, "compile", compile_it)
    with pytest.raises(AssertionError):
        check_many()


def test_a_closed_window_that_is_not_removed_in_its_epoch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.removals_are_not_in_the_delta(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()


def test_a_scan_that_misses_the_open_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    planted_bugs.scan_misses_the_open_layer(monkeypatch)
    with pytest.raises(AssertionError):
        check_many()


# --- over a repartition ---------------------------------------------------------------------------------

PARTITIONS = 3
DELAY_MS = 15

Stream = list[tuple[int, str, int, int]]
"""Partition, key, timestamp and value of each record."""


def records(chance: random.Random, number: int) -> Stream:
    """Timestamps of each partition increase, out of order by at most the delay. Partitions differ."""
    made: Stream = []
    for partition in range(PARTITIONS):
        at = 1 + chance.randrange(60)
        for _ in range(number):
            at += chance.randrange(8)
            jitter = chance.randrange(DELAY_MS)
            made.append((partition, chance.choice("abcd"), max(1, at - jitter), chance.randrange(100)))
    return made


def two_stages(windows: Tumbling | Hopping, further: Tumbling) -> Job:
    """Windows behind a repartition, and windows over their results behind a second repartition."""
    made = Job("j")
    source = made.topic("in", watermark=Watermark(max_delay_ms=DELAY_MS))
    out, totals = made.topic("out"), made.topic("totals")
    stream = made.stream(source).key_by("k", name="k")
    stream.window(windows, name="w").aggregate(n=count(), total=sum_(lambda value: value["v"])).to(out)
    stream.window(windows, name="again").aggregate(n=count()).key_by(
        lambda _result: "all", name="all"
    ).window(further, name="ww").aggregate(n=sum_(lambda result: result["n"]), windows=count()).to(totals)
    return made


def slow_counts(windows: Tumbling | Hopping, stream: Stream) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Count and sum, by key, start and end."""
    found: dict[tuple[str, int, int], list[int]] = {}
    ends_of, start_of = windows.ends_of(), windows.start_of()
    for _partition, key, at, value in stream:
        for end in ends_of(at):
            found.setdefault((key, start_of(end), end), []).append(value)
    return {window: (len(values), sum(values)) for window, values in found.items()}


@given(st.sampled_from(["tumbling", "hopping"]), st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_interleaving_of_partitions_does_not_change_the_result_over_repartitions(
    name: str, seed: int
) -> None:
    chance = random.Random(seed)
    windows, further = WINDOWS[name], Tumbling(40 * MS)
    stream = records(chance, 12)
    left = {
        partition: [one for one in stream if one[0] == partition][::-1] for partition in range(PARTITIONS)
    }
    with Driver(
        two_stages(windows, further), partitions=PARTITIONS, auto_barrier=chance.random() < 0.3
    ) as driver:
        while any(left.values()):
            partition = chance.choice([number for number, rest in left.items() if rest])
            for _ in range(chance.randrange(1, 6)):
                if left[partition]:
                    _number, key, at, value = left[partition].pop()
                    driver.send("in", {"k": key, "v": value}, timestamp=at, partition=partition)
            if chance.random() < 0.2:
                driver.crash()
            if chance.random() < 0.3:
                driver.barrier()
        driver.settle()
        for _ in range(3):  # each repartition gets the event time at a barrier
            driver.advance(to_ms=10_000, clock="event")
            driver.settle()
        assert driver.late == 0
        counted = slow_counts(windows, stream)
        rows = driver.read_values("out")
        assert len(rows) == len(counted)
        assert {(row["key"], row["start"], row["end"]): (row["n"], row["total"]) for row in rows} == counted
        results = [(0, "all", end - 1, n) for (_key, _start, end), (n, _sum) in counted.items()]
        totals = {
            (row["key"], row["start"], row["end"]): (row["windows"], row["n"])
            for row in driver.read_values("totals")
        }
        assert totals == slow_counts(further, results)
