"""Tables with a history: which row a record meets, what changes the present row, and what is forgotten."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.ids import ShardId
from fcluster.engine.history import History
from fcluster.graph.tables import TableStore
from fcluster.testing import Driver, JobStopped

MS = timedelta(milliseconds=1)
Sent = tuple[str, str | None, Any, int]
"""Topic, key, value and timestamp."""


def job_with(history: int = 1_000, **options: Any) -> Job:
    """The stream "s" is joined with the table "t", whose changes go to "told"."""
    job = Job("j")
    table = job.table(job.topic("t"), history=history * MS, **options)
    table.changes().map(lambda change: [change.old, change.new]).to(job.topic("told"))
    job.stream(job.topic("s")).join(table, lambda _value, row: row, how="left").to(job.topic("out"))
    return job


def run(job: Job, *sent: Sent) -> tuple[list[Any], list[Any]]:
    """What the stream's records meet, and which changes are told."""
    with Driver(job, partitions=1) as driver:
        for topic, key, value, at_ms in sent:
            driver.send(topic, value, key=key, timestamp=at_ms)
        return driver.read_values("out"), driver.read_values("told")


def test_record_meets_the_row_of_its_own_time_whenever_it_comes() -> None:
    rows: list[Sent] = [("t", "a", "x", 10), ("t", "a", "y", 20), ("t", "a", None, 30), ("t", "a", "z", 40)]
    asks: list[Sent] = [("s", "a", 1, at) for at in (5, 10, 19, 20, 29, 30, 39, 40, 90)]
    met, told = run(job_with(), *rows, *asks)
    assert met == [None, "x", "x", "y", "y", None, None, "z", "z"]
    assert told == [[None, "x"], ["x", "y"], ["y", None], [None, "z"]]


def test_row_that_comes_late_is_put_into_the_past_and_changes_nothing_now() -> None:
    met, told = run(
        job_with(),
        ("t", "a", "x", 10),
        ("t", "a", "z", 40),
        ("t", "a", "y", 20),
        ("t", "a", None, 30),
        ("t", "a", "z2", 40),
        ("s", "a", 1, 15),
        ("s", "a", 1, 25),
        ("s", "a", 1, 35),
        ("s", "a", 1, 45),
    )
    assert met == ["x", "y", None, "z2"]
    assert told == [[None, "x"], ["x", "z"], ["z", "z2"]]


def test_row_at_the_time_of_a_deletion_replaces_it() -> None:
    met, told = run(
        job_with(),
        ("t", "a", "x", 10),
        ("t", "a", None, 20),
        ("t", "a", "y", 20),
        ("t", "a", None, 20),
        ("t", "a", "late", 15),
        ("s", "a", 1, 12),
        ("s", "a", 1, 17),
        ("s", "a", 1, 25),
    )
    assert met == ["x", "late", None]
    assert told == [[None, "x"], ["x", None], [None, "y"], ["y", None]]


def test_what_is_older_than_the_history_is_forgotten_and_changes_nothing() -> None:
    met, told = run(
        job_with(100),
        ("t", "a", "x", 10),
        ("t", "a", "y", 20),
        ("t", "b", "b", 300),
        ("t", "a", "too late", 199),
        ("t", "c", "too late", 199),
        ("s", "a", 1, 15),
        ("s", "a", 1, 199),
        ("s", "a", 1, 20),
        ("s", "c", 1, 400),
        ("s", "b", 1, 250),
    )
    assert met == [None, "y", "y", None, None]
    assert told == [[None, "x"], ["x", "y"], [None, "b"]]


def test_computed_tables_are_looked_up_as_of_the_record_and_tables_are_joined_with_present_rows() -> None:
    job = Job("j")
    left = job.table(job.topic("l"), history=1_000 * MS)
    right = job.table(job.topic("r"), history=1_000 * MS)
    table = left.map(lambda value: value * 10).join(right, lambda one, other: [one, other], how="left")
    table.to_stream().to(job.topic("told"))
    job.stream(job.topic("s")).join(table, lambda _value, row: row).to(job.topic("out"))
    met, told = run(
        job,
        ("l", "a", 1, 10),
        ("r", "a", 5, 20),
        ("l", "a", 2, 30),
        ("r", "a", 6, 40),
        ("l", "a", 7, 15),
        *(("s", "a", 0, at) for at in (10, 15, 25, 35, 45)),
    )
    assert met == [[10, None], [70, None], [70, 5], [20, 5], [20, 6]]
    assert told == [[10, None], [10, 5], [20, 5], [20, 6]]


def test_record_without_a_timestamp_has_no_place_in_a_history() -> None:
    with Driver(job_with(on_error="skip"), partitions=1) as driver:
        driver.send("t", "x", key="a", timestamp=-1)
        assert (driver.table("t"), driver.skipped) == ({}, 1)
    with pytest.raises(JobStopped, match=r"in the table 't': the record has no timestamp"):
        run(job_with(), ("t", "a", "x", -1))


def test_table_may_get_a_history_later() -> None:
    met, _told = run(job_with(), ("t", "a", "x", 10), ("s", "a", 1, 5), ("s", "a", 1, 10))
    assert met == [None, "x"]


# --- a slow model ---------------------------------------------------------------------------------------


class Model:
    """All versions of all keys, for ever."""

    def __init__(self, history_ms: int) -> None:
        self.versions: dict[str, dict[int, Any]] = {}
        self.history_ms = history_ms
        self.now_ms = 0

    def put(self, key: str, value: Any, at_ms: int) -> bool:
        self.now_ms = max(self.now_ms, at_ms)
        if at_ms < self.now_ms - self.history_ms:
            return False
        versions = self.versions.setdefault(key, {})
        is_newest = at_ms >= max(versions, default=0)
        versions[at_ms] = value
        return is_newest

    def row_at(self, key: str, at_ms: int) -> Any:
        versions = self.versions.get(key, {})
        newest_ms = max(versions, default=0)
        if versions.get(newest_ms) is not None and newest_ms <= at_ms:
            return versions[newest_ms]  # the present row, however old the question is
        if at_ms < self.now_ms - self.history_ms:
            return None
        return versions.get(max((at for at in versions if at <= at_ms), default=-1))


def check(seed: int) -> None:
    """Random rows and questions, with barriers and crashes in between; in the end, nothing is left over."""
    chance = random.Random(seed)
    history_ms = chance.choice([1, 10, 40])
    model, now_ms = Model(history_ms), 50
    expected: list[Any] = []
    job = job_with(history_ms)
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for _ in range(80):
            now_ms += chance.choice([0, 0, 1, 3])
            at_ms, key = now_ms - chance.choice([0, 0, 0, 1, 5, 20, 45]), chance.choice("ab")
            if chance.random() < 0.6:
                value = chance.choice([None, now_ms * 100 + at_ms])
                driver.send("t", value, key=key, timestamp=at_ms)
                model.put(key, value, at_ms)
            else:
                driver.send("s", 0, key=key, timestamp=at_ms)
                expected.append(model.row_at(key, at_ms))
            driver.barrier()  # so that a crash doesn't change the order of what is read
            if chance.random() < 0.1:
                driver.crash()
        assert driver.read_values("out") == expected
        for _ in range(200):
            now_ms += history_ms + 1
            driver.send("t", "last", key="a", timestamp=now_ms)
        driver.settle()
        tables = driver._shards[ShardId("s", 0)].state.tables
        left = {of: len(list(_scan(tables, of))) for of in ("versions", "due")}
        assert left == {"versions": 1, "due": 1}, left


def _scan(tables: Any, of: Any) -> Any:
    return tables[TableStore("t", of).name].scan(b"", b"\xff" * 20) if of == "due" else _versions(tables)


def _versions(tables: Any) -> Any:
    table = tables[TableStore("t", "versions").name]
    for key in (b"a", b"b"):
        group = bytes((1,)) + key
        yield from table.scan(group, group + b"\xff" * 9)


@pytest.mark.parametrize("seed", range(60))
def test_history_is_that_of_the_model_and_is_freed(seed: int) -> None:
    check(seed)


# --- planted bugs ---------------------------------------------------------------------------------------


def assert_caught() -> None:
    """At least one seed notices."""
    for seed in range(30):
        try:
            check(seed)
        except AssertionError:
            return
    raise RuntimeError("nobody has noticed")


PLANTED: dict[str, Callable[..., Any]] = {
    "_forget": lambda history: None,
    "_newest_ms": lambda history, key, present: None,
    "_forgotten_ms": lambda history: 0,
    "row_at": lambda history, key, at_ms: history._rows.row(key),
}


@pytest.mark.parametrize("name", PLANTED)
def test_model_notices_a_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(History, name, PLANTED[name])
    assert_caught()
