"""A grace that changes between two runs: what has closed stays closed."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Cumulative, Hopping, Job, Session, Sliding, Tumbling, collect
from fcluster.common.settings import Settings
from fcluster.engine import firing
from fcluster.engine.entries import EntryTable
from fcluster.engine.state import store_prefix
from fcluster.testing import Driver
from tests.unit.engine.timers_bench import TimersBench

MS = timedelta(milliseconds=1)


def of_tens(kind: str, grace: int) -> Any:
    """Windows of 10 ms, or such that a record at 3 is in one that ends at 10 or a little later."""
    if kind == "tumbling":
        return Tumbling(10 * MS, grace=grace * MS)
    if kind == "hopping":
        return Hopping(10 * MS, 5 * MS, grace=grace * MS)
    if kind == "cumulative":
        return Cumulative(10 * MS, 5 * MS, grace=grace * MS)
    if kind == "session":
        return Session(10 * MS, grace=grace * MS)
    return Sliding(10 * MS, grace=grace * MS)


KINDS = ("tumbling", "hopping", "cumulative", "session", "sliding")


def windowed(kind: str, grace: int = 0, emit: Any = "close") -> Job:
    job = Job("j")
    late, out = job.topic("late"), job.topic("out")
    stream = job.stream(job.topic("in")).window(of_tens(kind, grace), name="w", late=late, emit=emit)
    stream.aggregate(values=collect()).to(out)
    return job


def gathered(grace: int) -> Job:
    """Windows of all records."""
    job = Job("j")
    late, out = job.topic("late"), job.topic("out")
    stream = job.stream(job.topic("in")).window_all(of_tens("tumbling", grace), name="w", late=late)
    stream.aggregate(values=collect()).to(out)
    return job


def send(driver: Driver, *times: int, key: str = "k") -> None:
    for at in times:
        driver.send("in", at, key=key, timestamp=at, partition=0)


def values(driver: Driver, topic: str) -> list[Any]:
    """All values that were written to the topic."""
    return [record.value for record in driver.records(topic)]


def results(driver: Driver) -> list[tuple[int, int, list[int]]]:
    driver.settle()
    rows: list[dict[str, Any]] = values(driver, "out")
    return [(row["start"], row["end"], row["values"]) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_window_that_has_closed_stays_closed_with_a_longer_grace(kind: str) -> None:
    with Driver(windowed(kind), partitions=1) as driver:
        send(driver, 3)
        send(driver, 30, key="other")  # nothing is left of the first key
        before = results(driver)
        assert {tuple(found) for _start, _end, found in before} == {(3,)}
        driver.restart(windowed(kind, grace=1_000))
        send(driver, 4)
        assert (driver.late, values(driver, "late")) == (1, [4])
        send(driver, 5_000)
        assert not [row for row in results(driver)[len(before) :] if 4 in row[2]]


@pytest.mark.parametrize("emit", ["update", 5 * MS])
def test_results_before_the_end_are_not_those_of_a_window_that_begins_anew(emit: Any) -> None:
    with Driver(windowed("tumbling", emit=emit), partitions=1) as driver:
        send(driver, 3, 30)
        before = results(driver)
        driver.restart(windowed("tumbling", grace=1_000, emit=emit))
        send(driver, 4)
        assert (results(driver), driver.late) == (before, 1)


def test_windows_of_all_records_have_one_result_and_what_is_late_is_told() -> None:
    with Driver(gathered(0), partitions=1) as driver:
        send(driver, 3, 30)
        assert results(driver) == [(0, 10, [3])]
        driver.restart(gathered(1_000))
        send(driver, 4)
        assert (driver.late, values(driver, "late")) == (1, [4])


def test_window_that_was_open_takes_records_for_the_longer_grace() -> None:
    with Driver(windowed("tumbling", grace=5), partitions=1) as driver:
        send(driver, 3, 14)
        driver.restart(windowed("tumbling", grace=20))
        send(driver, 29, 4)
        assert results(driver) == []
        send(driver, 30)
        assert (results(driver), driver.late) == ([(0, 10, [3, 4])], 0)


def test_each_change_of_the_grace_counts_from_where_event_time_was() -> None:
    with Driver(windowed("tumbling", grace=0), partitions=1) as driver:
        send(driver, 25)
        driver.restart(windowed("tumbling", grace=10))  # what ends by 20 has closed
        send(driver, 45)
        driver.restart(windowed("tumbling", grace=1_000))  # what ends by 30 has closed
        driver.restart(windowed("tumbling", grace=2_000))  # and nothing more
        send(driver, 19, 29, 35)
        assert values(driver, "late") == [19, 29]
        driver.restart(windowed("tumbling", grace=0))
        driver.settle()
        assert results(driver) == [(20, 30, [25]), (30, 40, [35])]
        driver.restart(windowed("tumbling", grace=50))
        send(driver, 36, 41)
        assert values(driver, "late") == [19, 29, 36]


def test_what_had_closed_is_known_after_a_crash_of_the_first_epoch_with_the_longer_grace() -> None:
    with Driver(windowed("tumbling"), partitions=1, auto_barrier=False) as driver:
        send(driver, 3, 30)
        driver.barrier()
        driver.restart(windowed("tumbling", grace=100))
        send(driver, 60)
        driver.crash()
        driver.barrier()
        send(driver, 4, 40)  # 40 would be late if the floor were that of the second start
        driver.barrier()
        driver.crash()
        send(driver, 5, 41, 1_000)
        driver.barrier()
        assert values(driver, "late") == [4, 5]
        assert [found for _start, end, found in results(driver) if end == 50] == [[40, 41]]


def test_window_that_is_due_but_has_not_closed_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = TimersBench(windowed("tumbling"))
    with monkeypatch.context() as patch:
        patch.setattr(firing, "CLOSED_AT_ONCE_MAX", 0)
        for at in (3, 30):
            bench.run(at, at)
    bench.barrier()
    (bench.stage,) = windowed("tumbling", grace=25).build(Settings()).stages
    bench.crash()
    bench.run(4, 4)
    assert (bench.values(), bench.port.late) == ([4], 1)
    bench.run(50, 50)
    assert [value["values"] for value in bench.values()[1:]] == [[3]]


def test_state_of_a_version_that_did_not_remember_the_grace_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with Driver(windowed("tumbling", grace=5), partitions=1) as driver:
        with monkeypatch.context() as patch:
            plain = EntryTable.encode_touched

            def encode(table: EntryTable) -> dict[bytes, bytes]:
                return {} if table.name == "w//grace" else plain(table)

            patch.setattr(EntryTable, "encode_touched", encode)
            send(driver, 3, 14)
        (shard,) = driver._shards.values()
        assert store_prefix("w//grace") not in shard._store._values
        driver.restart(windowed("tumbling", grace=5))
        send(driver, 4, 30, 5)
        assert (results(driver)[0], driver.late) == ((0, 10, [3, 4]), 1)
        driver.restart(windowed("tumbling", grace=100))  # from here on it is remembered
        send(driver, 6)
        assert driver.late == 2


# --- joins of two streams --------------------------------------------------------------------------------


def both(left: Any, right: Any) -> list[Any]:
    return [left, right]


def joined(grace: int, how: Any = "outer") -> Job:
    job = Job("j")
    late, out = job.topic("late"), job.topic("out")
    left, right = job.stream(job.topic("l")), job.stream(job.topic("r"))
    left.join(right, both, within=10 * MS, name="pairs", how=how, grace=grace * MS, late=late).to(out)
    return job


def test_record_that_was_told_to_be_alone_is_in_no_pair_with_a_longer_grace() -> None:
    with Driver(joined(0), partitions=1) as driver:
        for side, at in [("l", 12), ("l", 60), ("r", 24)]:
            driver.send(side, f"{side}{at}", key="k", timestamp=at, partition=0)
        assert values(driver, "out") == [["l12", None]]
        driver.restart(joined(1_000))
        # Its stretch is still kept, and so it would be found.
        assert [key for shard in driver._shards.values() for key in shard._store.keys_of("pairs//left")]
        driver.send("r", "r20", key="k", timestamp=20, partition=0)
        assert ["l12", "r20"] not in values(driver, "out")


def test_record_whose_partners_are_gone_is_late_and_not_told_to_be_alone() -> None:
    with Driver(joined(0), partitions=1) as driver:
        for side, at in [("l", 20), ("r", 25), ("l", 100), ("r", 101)]:
            driver.send(side, f"{side}{at}", key="k", timestamp=at, partition=0)
        driver.restart(joined(1_000))
        driver.send("r", "r26", key="k", timestamp=26, partition=0)
        assert values(driver, "late") == ["r26"]
        driver.advance(to_ms=10_000, clock="event")
        assert [pair for pair in values(driver, "out") if "r26" in pair] == []


# --- whatever changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_each_window_has_one_result_whatever_the_grace_is_from_run_to_run(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    at_ms = 5
    with Driver(windowed(kind), partitions=1, auto_barrier=chance.random() < 0.5) as driver:
        for number in range(80):
            at_ms += chance.choice([0, 1, 1, 3, 9])
            sent_ms = max(1, at_ms - chance.choice([0, 0, 1, 8, 20, 45]))
            driver.send("in", number, key=chance.choice("ab"), timestamp=sent_ms, partition=0)
            if chance.random() < 0.2:
                driver.barrier()
            if chance.random() < 0.1:
                driver.crash()
            if chance.random() < 0.1:
                driver.settle()
                driver.restart(windowed(kind, grace=chance.choice([0, 3, 15, 40])))
        driver.advance(to_ms=10_000, clock="event")
        driver.settle()
        rows: list[dict[str, Any]] = values(driver, "out")
        late: list[int] = values(driver, "late")
    counted = Counter((row["key"], row["start"], row["end"]) for row in rows)
    assert [window for window, times in counted.items() if times > 1] == []
    found = Counter(value for row in rows for value in row["values"])
    assert set(found) | set(late) == set(range(80))
    assert len(late) == len(set(late))
    if kind in ("tumbling", "session"):
        assert set(found.values()) == {1}
    assert not set(found) & set(late)
