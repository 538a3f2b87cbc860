"""Random tables, computed of kept ones, do what a slow model says, wherever barriers and crashes fall.

The model computes each table as a whole, before and after each record. It knows nothing of bytes, chains or
how changes find their way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from fcluster import Job, Table
from fcluster.engine import views
from fcluster.engine.operators.table import KeepTableOperator
from fcluster.engine.rows import RowChange, RowTable
from fcluster.testing import Driver

KEYS = "abc"
TOPICS = ("t0", "t1", "t2")
Row = tuple[int, int]
"""A value and its time."""
Rows = dict[tuple[str, str], Row]
"""By name of a kept table, and key."""


# --- the model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    name: str

    def row(self, rows: Rows, key: str) -> Row | None:
        return rows.get((self.name, key))

    def is_reached(self, before: Rows, after: Rows, key: str, source: str) -> bool:
        return source == self.name and (self.row(before, key) is not None or self.row(after, key) is not None)

    def told_at_ms(self, before: Rows, after: Rows, key: str, source: str, at_ms: int) -> int:
        return at_ms


@dataclass(frozen=True)
class Computed:
    """A table whose row is a function of the rows below it; None for no row."""

    below: tuple[Any, ...]
    function: Callable[..., int | None]

    def row(self, rows: Rows, key: str) -> Row | None:
        found = [one.row(rows, key) for one in self.below]
        value = self.function(*(None if row is None else row[0] for row in found))
        return None if value is None else (value, max(row[1] for row in found if row is not None))

    def is_reached(self, before: Rows, after: Rows, key: str, source: str) -> bool:
        if not any(one.is_reached(before, after, key, source) for one in self.below):
            return False
        return self.row(before, key) is not None or self.row(after, key) is not None

    def told_at_ms(self, before: Rows, after: Rows, key: str, source: str, at_ms: int) -> int:
        times_ms: list[int] = []
        for one in self.below:
            if one.is_reached(before, after, key, source):
                times_ms.append(one.told_at_ms(before, after, key, source, at_ms))
            elif (row := one.row(after, key)) is not None:
                times_ms.append(row[1])
        return max(times_ms)


Model = Kept | Computed


def changes_of(model: Model, source: str, key: str, before: Rows, after: Rows, at_ms: int) -> list[Any]:
    """What is told of a record that has changed a row of `source`."""
    if not model.is_reached(before, after, key, source):
        return []
    old, new = model.row(before, key), model.row(after, key)
    time_ms = model.told_at_ms(before, after, key, source, at_ms)
    return [(None if old is None else old[0], None if new is None else new[0], time_ms)]


# --- random tables --------------------------------------------------------------------------------------


def keeps(divisor: int) -> Callable[[int], bool]:
    return lambda value: value % divisor != 0


def changed(factor: int) -> Callable[[int], int | None]:
    return lambda value: None if value % 7 == factor % 7 else (value * factor + 1) % 1_000


def combined(left: int | None, right: int | None) -> int | None:
    mixed = (17 if left is None else left * 31) + (5 if right is None else right * 3)
    return None if mixed % 11 == 0 else mixed % 1_000


def random_table(chance: random.Random, kept: list[tuple[Table, Model]], depth: int) -> tuple[Table, Model]:
    """A table, and its model."""
    kind = chance.choice(["kept", "filter", "map", "join", "join", "join"]) if depth else "kept"
    if kind == "kept":
        return chance.choice(kept)
    table, model = random_table(chance, kept, depth - 1)
    if kind == "filter":
        keep = keeps(chance.choice([2, 3]))
        return table.filter(keep), Computed(
            (model,), lambda value: value if value is not None and keep(value) else None
        )
    if kind == "map":
        change = changed(chance.choice([2, 3]))
        return table.map(change), Computed((model,), lambda value: None if value is None else change(value))
    other, other_model = random_table(chance, kept, depth - 1)
    how: Any = chance.choice(["inner", "left", "outer"])

    def joined(left: int | None, right: int | None) -> int | None:
        has_row = {
            "inner": left is not None and right is not None,
            "left": left is not None,
            "outer": left is not None or right is not None,
        }
        return combined(left, right) if has_row[how] else None

    return table.join(other, combined, how=how), Computed((model, other_model), joined)


def check(seed: int) -> None:
    """Play the records of a seed, and compare what is told with the model."""
    chance = random.Random(seed)
    job = Job("j")
    kept: list[tuple[Table, Model]] = [(job.table(job.topic(name)), Kept(name)) for name in TOPICS[:2]]
    stream = job.stream(job.topic(TOPICS[2])).filter(lambda value: value != 5)
    kept.append((stream.map(lambda value: value).table(name=TOPICS[2]), Kept(TOPICS[2])))
    for table, _model in kept:
        table.to_stream().to(job.topic("used"))
    tables = [random_table(chance, kept, 3) for _ in range(2)]
    for number, (table, _model) in enumerate(tables):
        table.changes().map(lambda change: [change.old, change.new]).to(job.topic(f"out{number}"))
    auto = seed % 3 == 0
    rows: Rows = {}
    expected: dict[tuple[int, str], list[Any]] = {}
    with Driver(job, partitions=chance.randrange(1, 4), auto_barrier=auto) as driver:
        for number in range(60):
            topic, key = chance.choice(TOPICS), chance.choice(KEYS)
            value = chance.choice([None, chance.randrange(30), chance.randrange(30)])
            at_ms = chance.randrange(1, 100) if auto else number + 1
            driver.send(topic, value, key=key, timestamp=at_ms)
            if chance.random() < 0.1:
                driver.crash()
            if not auto and chance.random() < 0.3:
                driver.barrier()
            if topic == TOPICS[2] and value == 5:
                continue
            before = dict(rows)
            rows.pop((topic, key), None)
            if value is not None:
                rows[topic, key] = (value, at_ms)
            for at, (_table, model) in enumerate(tables):
                told = changes_of(model, topic, key, before, rows, at_ms)
                expected.setdefault((at, key), []).extend(told)
        driver.settle()
        found: dict[tuple[int, str], list[Any]] = {}
        for at in range(len(tables)):
            for record in driver.records(f"out{at}"):
                found.setdefault((at, record.key), []).append((*record.value, record.timestamp))
    assert found == {where: told for where, told in expected.items() if told}


@pytest.mark.parametrize("seed", range(60))
def test_changes_of_random_tables_are_those_of_the_model(seed: int) -> None:
    check(seed)


# --- planted bugs ---------------------------------------------------------------------------------------


def assert_caught() -> None:
    """At least one seed notices."""
    for seed in range(20):
        try:
            check(seed)
        except AssertionError:
            return
    raise RuntimeError("nobody has noticed")


def test_model_notices_a_row_that_is_read_when_it_has_been_put_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = RowTable.note

    def note(table: RowTable, record: Any, change: RowChange) -> None:
        plain(table, record, change._replace(old=change.new if change.old is not None else None))

    monkeypatch.setattr(RowTable, "note", note)
    assert_caught()


def test_model_notices_a_change_that_is_told_although_there_was_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_lenient", lambda apply, on_error: lambda *values: 0)
    assert_caught()


def test_model_notices_a_join_that_sees_only_one_way_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = views._compile_side

    def side(table: Any, delta: Any, *arguments: Any) -> Any:
        return plain(table, None if isinstance(table, views.FilteredTable) else delta, *arguments)

    monkeypatch.setattr(views, "_compile_side", side)
    assert_caught()


def test_model_notices_times_of_rows_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "time_of_row", lambda row: -1)
    assert_caught()


def test_model_notices_changes_that_are_followed_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = KeepTableOperator.compile
    late: list[Any] = []

    def compiled(operator: Any, surroundings: Any, following: Any) -> Any:
        step = plain(operator, surroundings, following)

        def step_late(*record: Any) -> None:
            late.append(record)
            if len(late) > 1:
                step(*late.pop(0))

        return step_late

    monkeypatch.setattr(KeepTableOperator, "compile", compiled)
    assert_caught()
