"""Tables whose rows are forgotten: when, what is told, and that groups stay exact."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job, Session, Table, Tumbling, Watermark, count, milliseconds, minutes, seconds, sum_
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibilities
from fcluster.testing import Driver

KEYS = "abc"
TTL_MS = 20


def test_row_is_forgotten_in_event_time_and_its_group_keeps_what_it_contributed() -> None:
    job = Job("j")
    rows = job.stream(job.topic("in")).table(name="rows", ttl=minutes(1))
    groups = rows.group_by(lambda _: "all", name="g").aggregate(n=count(), sum=sum_())
    groups.to_stream().to(job.topic("out"))
    rows.changes().to(job.topic("changes"))
    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a", timestamp=0)
        driver.send("in", 2, key="a", timestamp=1_000)
        driver.send("in", 5, key="b", timestamp=60_999)
        assert driver.table(rows) == {"a": 2, "b": 5}
        driver.send("in", 6, key="b", timestamp=61_000)
        driver.send("in", 7, key="b", timestamp=61_001)
        assert driver.table(rows) == {"b": 7}
        driver.send("in", 3, key="a", timestamp=61_001)
        assert driver.table(groups) == {"all": {"n": 3, "sum": 2 + 7 + 3}}
        told = [(record.key, record.value) for record in driver.read("changes")]
    assert told[-1] == ("a", {"old": None, "new": 3})
    assert ("a", {"old": 2, "new": None}) not in told


def test_row_of_a_time_in_the_past_is_kept_as_long_as_one_of_the_present() -> None:
    job = Job("j")
    rows = job.stream(job.topic("in")).table(name="rows", ttl=minutes(1))
    rows.to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a", timestamp=600_000)
        driver.send("in", 2, key="b", timestamp=1_000)
        driver.send("in", 3, key="a", timestamp=659_000)
        assert driver.table(rows) == {"a": 3, "b": 2}
        driver.send("in", 3, key="a", timestamp=660_000)
        driver.send("in", 3, key="a", timestamp=660_000)
        assert driver.table(rows) == {"a": 3}


def test_stream_meets_no_row_that_is_forgotten() -> None:
    job = Job("j")
    rows = job.stream(job.topic("rows")).table(name="rows", ttl=seconds(1))
    job.stream(job.topic("in")).join(rows, how="left").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("rows", "row", key="a", timestamp=0)
        driver.send("in", 1, key="a", timestamp=10)
        driver.send("rows", "another", key="b", timestamp=5_000)
        driver.send("in", 2, key="b", timestamp=5_000)
        driver.send("rows", "another", key="b", timestamp=5_001)
        driver.send("in", 3, key="a", timestamp=5_002)
        found = [(record.value["left"], record.value["right"]) for record in driver.read("out")]
    assert found == [(1, "row"), (2, "another"), (3, None)]


def test_rows_of_windows_do_not_pile_up() -> None:
    job, _rows, totals = windows_job(Tumbling(minutes(1)), ttl=minutes(5), emit="update")
    totals.to_stream().to(job.topic("totals"))
    with Driver(job, partitions=1) as driver:
        for minute in range(200):
            driver.send("in", 1, key="a", timestamp=minute * 60_000)
            driver.barrier()
        driver.settle()
        assert driver.table(totals) == {"a": {"n": 200}}
        kept = {name: len(keys) for name, keys in stored(driver).items()}
    assert max(kept["rows//table"], kept["g-members//members"]) <= 8
    assert max(kept["rows//times"], kept["g-members//times"]) <= 20


def stored(driver: Driver) -> dict[str, list[bytes]]:
    """The keys in the stores of all shards, by the name of the store."""
    found: dict[str, list[bytes]] = {}
    for shard in driver._shards.values():  # pyright: ignore[reportPrivateUsage]
        for name in shard.state.tables:
            found.setdefault(name, []).extend(shard._store.keys_of(name))  # pyright: ignore[reportPrivateUsage]
    return found


def windows_job(
    windows: Any, *, ttl: timedelta | None, emit: Any, delay: int = 0
) -> tuple[Job, Table, Table]:
    """The newest result of each window in a table, and the groups of its rows."""
    job = Job("j")
    topic = job.topic("in", watermark=Watermark(max_delay=milliseconds(delay)))
    results = job.stream(topic).window(windows, name="w", emit=emit).aggregate(n=count())
    rows = (
        results.key_by(lambda ctx, result: f"{ctx.key} {result['start']}", name="newest")
        .map(lambda result: None if result.get("withdrawn") else result)
        .table(name="rows", ttl=ttl)
    )
    return job, rows, rows.group_by("key", name="g").aggregate(n=sum_(lambda result: result["n"]))


# --- random ones ----------------------------------------------------------------------------------------


def check_windows(seed: int, ttl_ms: int) -> None:
    """The groups of windows' results are those of a job that keeps all rows for good.

    Partitions are read at very different speeds, and records come late.
    """
    chance = random.Random(seed)
    kind = chance.choice(["tumbling", "session"])
    grace = milliseconds(chance.randrange(4))
    windows = (
        Tumbling(milliseconds(10), grace=grace)
        if kind == "tumbling"
        else Session(milliseconds(6), grace=grace)
    )
    emit = chance.choice(["update", "update", milliseconds(5), "close"])
    delay = chance.randrange(4)
    found: list[Any] = []
    for ttl in (milliseconds(ttl_ms), None):
        job, rows, totals = windows_job(windows, ttl=ttl, emit=emit, delay=delay)
        totals.to_stream().to(job.topic("totals"))
        steps = random.Random(seed)
        sizes = {"in": steps.randrange(1, 4)}
        now_ms = dict.fromkeys(KEYS, 100)
        with Driver(job, partitions=sizes, auto_barrier=False) as driver:
            for _number in range(80):
                # Sometimes one key stays behind, and catches up later.
                key = steps.choice(KEYS if steps.random() < 0.5 else "a")
                now_ms[key] += steps.choice([0, 1, 2, 5, 30])
                driver.send("in", 1, key=key, timestamp=now_ms[key] - steps.choice([0, 0, 0, 3, 9]))
                if steps.random() < 0.2:
                    driver.barrier()
                if steps.random() < 0.1:
                    driver.crash()
            driver.settle()
            found.append(driver.table(totals))
            kept = driver.table(rows)
    assert found[0] == found[1]
    keys = {key.partition(" ")[0] for key in kept}
    own = {key: [row["n"] for row in kept.values() if row["key"] == key] for key in keys}
    assert {key: row["n"] for key, row in found[0].items() if row["n"]} == {k: sum(n) for k, n in own.items()}


@pytest.mark.parametrize("seed", range(40))
def test_groups_of_random_windows_are_exact(seed: int) -> None:
    check_windows(seed, ttl_ms=200)


def test_rows_that_are_forgotten_too_early_are_noticed() -> None:
    def check_all() -> None:
        for seed in range(40):
            check_windows(seed, ttl_ms=1)

    with pytest.raises(AssertionError):
        check_all()


def check_rows(seed: int) -> None:
    """Rows, changes and groups are those of a slow model, wherever barriers and crashes fall."""
    chance = random.Random(seed)
    job = Job("j")
    rows = job.stream(job.topic("in")).table(name="rows", ttl=milliseconds(TTL_MS))
    kept = rows.filter(lambda value: value % 5 != 0)
    groups = kept.group_by(lambda value: "pq"[value % 2], name="g").aggregate(n=count(), sum=sum_())
    rows.changes().to(job.topic("changes"))
    groups.to_stream().to(job.topic("groups"))
    model: dict[str, tuple[int, int]] = {}
    contributed: dict[str, tuple[int, int]] = {}
    counted: dict[str, list[int]] = {}
    told: list[Any] = []
    clock_ms, passed_ms = 0, 0
    with Driver(job, partitions=1, auto_barrier=seed % 3 == 0) as driver:
        for _number in range(80):
            key = chance.choice(KEYS)
            value = chance.choice([None, chance.randrange(20), chance.randrange(20)])
            at_ms = max(1, passed_ms + chance.choice([-30, -5, 0, 1, 3, 15]))
            driver.send("in", value, key=key, timestamp=at_ms)
            if chance.random() < 0.1:
                driver.crash()
            if chance.random() < 0.3:
                driver.barrier()
            clock_ms = max(clock_ms, passed_ms)
            passed_ms = max(passed_ms, at_ms)
            for entries in (model, contributed):
                for one in [one for one, (_value, put_ms) in entries.items() if put_ms + TTL_MS <= clock_ms]:
                    del entries[one]
            old = model.pop(key, (None, 0))[0]
            if value is not None:
                model[key] = (value, max(at_ms, clock_ms))
            if old is not None or value is not None:
                told.append({"old": old, "new": value})
                before = contributed.pop(key, None)
                if before is not None:
                    counted["pq"[before[0] % 2]].remove(before[0])
                if value is not None and value % 5:
                    contributed[key] = (value, max(at_ms, clock_ms))
                    counted.setdefault("pq"[value % 2], []).append(value)
        driver.settle()
        assert driver.read_values("changes") == told
        assert driver.table(rows) == {key: value for key, (value, _put_ms) in model.items()}
        assert driver.table(groups) == {
            group: {"n": len(values), "sum": sum(values)} for group, values in counted.items()
        }


@pytest.mark.parametrize("seed", range(60))
def test_random_rows_are_those_of_the_model(seed: int) -> None:
    check_rows(seed)


# --- what is refused ------------------------------------------------------------------------------------


def test_what_does_not_go_with_a_ttl_is_refused() -> None:
    job = Job("j")
    stream, other = job.stream(job.topic("in")), job.table(job.topic("other"))
    rows = stream.table(name="rows", ttl=minutes(1))
    for join in (
        lambda: rows.join(other),
        lambda: other.join(rows),
        lambda: rows.filter(bool).join(other, on="x", name="n"),
        lambda: other.join(rows, on="x", name="n"),
    ):
        with pytest.raises(JobError, match="has a ttl=, and is joined with another table"):
            join()
    with pytest.raises(JobError, match="got history= and ttl="):
        stream.table(name="t", ttl=minutes(1), history=minutes(1))
    with pytest.raises(JobError, match="ttl"):
        stream.table(name="t", ttl=5)  # type: ignore[arg-type]


def test_ttl_can_be_changed_but_not_added_or_removed() -> None:
    def topology(ttl: timedelta | None) -> Any:
        job = Job("j")
        job.stream(job.topic("in")).table(name="rows", ttl=ttl).to_stream().to(job.topic("out"))
        return job.build(Settings())

    with_ttl, longer, without = (topology(ttl) for ttl in (minutes(1), minutes(2), None))
    assert not list(incompatibilities(with_ttl.describe(), longer))
    (added,) = incompatibilities(without.describe(), with_ttl)
    (removed,) = incompatibilities(with_ttl.describe(), without)
    assert "had no ttl=, and now has one" in added
    assert "had a ttl=, and now has none" in removed
