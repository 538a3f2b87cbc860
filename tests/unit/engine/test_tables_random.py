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

from fcluster import Job, Table, collect, count, first, last, max_, sum_, top_n
from fcluster.engine import views
from fcluster.engine.entries import EntryTable
from fcluster.engine.operators import changes, group
from fcluster.engine.operators.table import KeepTableOperator
from fcluster.engine.rows import FollowedTable, RowChange, RowTable
from fcluster.testing import Driver

KEYS = "abc"
TOPICS = ("t0", "t1", "t2")
ANOTHER = "t3"
"""Another table of the stream of the last topic."""
Row = tuple[int, int]
"""A value and its time."""
Rows = dict[tuple[str, str], Row]
"""By name of a kept table, and key."""
Sources = tuple[str, ...]
"""The kept tables that a record changes."""


# --- the model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    name: str

    def row(self, rows: Rows, key: str) -> Row | None:
        return rows.get((self.name, key))

    def is_reached(self, before: Rows, after: Rows, key: str, sources: Sources) -> bool:
        return self.name in sources and (
            self.row(before, key) is not None or self.row(after, key) is not None
        )

    def told_at_ms(self, before: Rows, after: Rows, key: str, sources: Sources, at_ms: int) -> int:
        return at_ms


@dataclass(frozen=True)
class Computed:
    """A table whose row is a function of its key and the rows below it; None for no row."""

    below: tuple[Any, ...]
    function: Callable[..., int | None]

    def row(self, rows: Rows, key: str) -> Row | None:
        found = [one.row(rows, key) for one in self.below]
        value = self.function(key, *(None if row is None else row[0] for row in found))
        return None if value is None else (value, max(row[1] for row in found if row is not None))

    def is_reached(self, before: Rows, after: Rows, key: str, sources: Sources) -> bool:
        if not any(one.is_reached(before, after, key, sources) for one in self.below):
            return False
        return self.row(before, key) is not None or self.row(after, key) is not None

    def told_at_ms(self, before: Rows, after: Rows, key: str, sources: Sources, at_ms: int) -> int:
        times_ms: list[int] = []
        for one in self.below:
            if one.is_reached(before, after, key, sources):
                times_ms.append(one.told_at_ms(before, after, key, sources, at_ms))
            elif (row := one.row(after, key)) is not None:
                times_ms.append(row[1])
        return max(times_ms)


Model = Kept | Computed


def changes_of(model: Model, sources: Sources, key: str, before: Rows, after: Rows, at_ms: int) -> list[Any]:
    """What is told of a record that has changed a row of each of `sources`."""
    if not model.is_reached(before, after, key, sources):
        return []
    old, new = model.row(before, key), model.row(after, key)
    time_ms = model.told_at_ms(before, after, key, sources, at_ms)
    return [(None if old is None else old[0], None if new is None else new[0], time_ms)]


# --- random tables --------------------------------------------------------------------------------------


def keeps(divisor: int) -> Callable[[int], bool]:
    return lambda value: value % divisor != 0


def changed(factor: int) -> Callable[[int], int | None]:
    return lambda value: None if value % 7 == factor % 7 else (value * factor + 1) % 1_000


def combined(left: int | None, right: int | None) -> int | None:
    mixed = (17 if left is None else left * 31) + (5 if right is None else right * 3)
    return None if mixed % 11 == 0 else mixed % 1_000


def differing(key: str, value: int) -> int:
    """What a function makes of a value that sees the key, too."""
    return value + ord(key)


def random_table(chance: random.Random, kept: list[tuple[Table, Model]], depth: int) -> tuple[Table, Model]:
    """A table, and its model."""
    kind = chance.choice(["kept", "filter", "map", "join", "join", "join"]) if depth else "kept"
    if kind == "kept":
        return chance.choice(kept)
    table, model = random_table(chance, kept, depth - 1)
    sees_keys = chance.random() < 0.5
    if kind == "filter":
        keep = keeps(chance.choice([2, 3]))
        if sees_keys:
            return table.filter(lambda ctx, value: keep(differing(ctx.key, value))), Computed(
                (model,),
                lambda key, value: value if value is not None and keep(differing(key, value)) else None,
            )
        return table.filter(keep), Computed(
            (model,), lambda _key, value: value if value is not None and keep(value) else None
        )
    if kind == "map":
        change = changed(chance.choice([2, 3]))
        if sees_keys:
            return table.map(lambda ctx, value: change(differing(ctx.key, value))), Computed(
                (model,), lambda key, value: None if value is None else change(differing(key, value))
            )
        return table.map(change), Computed(
            (model,), lambda _key, value: None if value is None else change(value)
        )
    other, other_model = random_table(chance, kept, depth - 1)
    how: Any = chance.choice(["inner", "left", "outer"])

    def joined(_key: str, left: int | None, right: int | None) -> int | None:
        has_row = {
            "inner": left is not None and right is not None,
            "left": left is not None,
            "outer": left is not None or right is not None,
        }
        return combined(left, right) if has_row[how] else None

    return table.join(other, combined, how=how), Computed((model, other_model), joined)


def in_another_table(value: int | None) -> int | None:
    """What a value of the stream is in the other table."""
    return None if value is None or value % 4 == 0 else value + 100


def check(seed: int) -> None:
    """Play the records of a seed, and compare what is told with the model."""
    chance = random.Random(seed)
    job = Job("j")
    kept: list[tuple[Table, Model]] = [(job.table(job.topic(name)), Kept(name)) for name in TOPICS[:2]]
    stream = job.stream(job.topic(TOPICS[2])).filter(lambda value: value != 5)
    kept.append((stream.map(lambda value: value).table(name=TOPICS[2]), Kept(TOPICS[2])))
    kept.append((stream.map(in_another_table).table(name=ANOTHER), Kept(ANOTHER)))
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
            made = {topic: value, ANOTHER: in_another_table(value)} if topic == TOPICS[2] else {topic: value}
            for name, row in made.items():
                rows.pop((name, key), None)
                if row is not None:
                    rows[name, key] = (row, at_ms)
            for at, (_table, model) in enumerate(tables):
                told = changes_of(model, tuple(made), key, before, rows, at_ms)
                expected.setdefault((at, key), []).extend(told)
        driver.settle()
        found: dict[tuple[int, str], list[Any]] = {}
        for at in range(len(tables)):
            for record in driver.records(f"out{at}"):
                found.setdefault((at, record.key), []).append((*record.value, record.timestamp))
    assert found == {where: told for where, told in expected.items() if told}


# --- groups ---------------------------------------------------------------------------------------------


def group_of(value: int) -> str | None:
    return None if value % 5 == 4 else "pqr"[value % 3]


def contributed(value: int) -> int | None:
    return None if value % 7 == 6 else value % 100


def parts_of(sees_keys: bool, key: str, row: Row | None) -> tuple[str | None, int | None]:
    """The group of a row, and what it contributes."""
    seen = None if row is None else differing(key, row[0]) if sees_keys else row[0]
    group = None if seen is None else group_of(seen)
    value = None if seen is None or group is None else contributed(seen)
    return (None, None) if value is None else (group, value)


def count_up(sees_keys: bool, model: Model, rows: Rows) -> dict[str | None, dict[str, Any]]:
    """All groups that have rows, counted anew."""
    found: dict[str | None, list[int]] = {}
    for key in KEYS:
        group, value = parts_of(sees_keys, key, model.row(rows, key))
        if value is not None:
            found.setdefault(group, []).append(value)
    return {group: {"n": len(all_), "sum": sum(all_), "all": sorted(all_)} for group, all_ in found.items()}


_EMPTY = {"n": 0, "sum": 0, "all": []}


def check_groups(seed: int) -> None:
    """Like `check`, for a table of groups of a random table: each group is counted anew for each record."""
    chance = random.Random(f"groups {seed}")
    job = Job("j")
    kept: list[tuple[Table, Model]] = [(job.table(job.topic(name)), Kept(name)) for name in TOPICS[:2]]
    for table, _model in kept:
        table.to_stream().to(job.topic("used"))
    table, model = random_table(chance, kept, 2)
    drops = seed % 2 == 0
    sees_keys = chance.random() < 0.5
    by: Any = (lambda ctx, value: group_of(differing(ctx.key, value))) if sees_keys else group_of
    of: Any = (lambda ctx, value: contributed(differing(ctx.key, value))) if sees_keys else contributed
    grouped = table.group_by(by, name="g", value=of, drop_empty=drops)
    groups = grouped.aggregate(n=count(), sum=sum_(), all=collect())
    groups.to_stream().map(lambda row: row and {**row, "all": sorted(row["all"])}).to(job.topic("out"))
    rows: Rows = {}
    seen: set[str | None] = set()
    expected: dict[str, list[Any]] = {}
    with Driver(job, partitions={"t0": chance.randrange(1, 4)}, auto_barrier=seed % 3 == 0) as driver:
        for number in range(60):
            topic, key = chance.choice(TOPICS[:2]), chance.choice(KEYS)
            value = chance.choice([None, chance.randrange(30), chance.randrange(30)])
            driver.send(topic, value, key=key, timestamp=number + 1)
            if chance.random() < 0.1:
                driver.crash()
            if chance.random() < 0.3:
                driver.barrier()
            before = dict(rows)
            rows.pop((topic, key), None)
            if value is not None:
                rows[topic, key] = (value, number + 1)
            if not model.is_reached(before, rows, key, (topic,)):
                continue
            left, _value = parts_of(sees_keys, key, model.row(before, key))
            entered, _value = parts_of(sees_keys, key, model.row(rows, key))
            now = count_up(sees_keys, model, rows)
            for group in dict.fromkeys((left, entered)):
                if group is not None:
                    seen.add(group)
                    gone = None if drops else _EMPTY
                    expected.setdefault(group, []).append(now.get(group, gone))
        driver.settle()
        found: dict[str, list[Any]] = {}
        for record in driver.records("out"):
            found.setdefault(record.key, []).append(record.value)
        assert found == expected
        final = {group: {**row, "all": sorted(row["all"])} for group, row in driver.table(groups).items()}
        empty: dict[str | None, Any] = {} if drops else dict.fromkeys(seen, _EMPTY)
        assert final == empty | count_up(sees_keys, model, rows)


def check_running(seed: int) -> None:
    """What is computed of all records of a stream, which may come several at a time, counted anew for each
    record. Some of them fail, halfway through the aggregates.
    """
    chance = random.Random(f"running {seed}")
    job = Job("j")
    values = job.stream(job.topic("t")).flat_map(lambda values: values, on_error="stop")
    if seed % 2:
        values = values.key_by(lambda value: KEYS[value % len(KEYS)], name="keyed")
    running = values.aggregate(
        n=count(),
        all=collect(),
        sum=sum_(lambda value: "fails" if value == 13 else value),
        max=max_(),
        top=top_n(2, by=lambda value: value // 3),
        first=first(),
        last=last(),
        name="running",
        on_error="skip",
    )
    # Each in a stage of its own, as a stream of values from a flat_map is used once.
    again = job.stream(job.topic("u")).reduce(lambda a, b: None if a + b > 60 else a + b, name="reduced")
    running.to_stream().to(job.topic("out"))
    again.changes().to(job.topic("reduced-out"))
    came: dict[str, list[Row]] = {}
    reduced: dict[str, int] = {}
    expected: dict[str, list[Any]] = {}
    changed: list[Any] = []
    with Driver(job, partitions={"t": chance.randrange(1, 4)}, auto_barrier=seed % 3 == 0) as driver:
        for _number in range(50):
            key, at_ms = chance.choice(KEYS), chance.randrange(1, 40)
            sent = [chance.randrange(30) for _ in range(chance.choice([0, 1, 1, 2, 3]))]
            driver.send("t", sent, key=key, timestamp=at_ms)
            for value in sent:
                driver.send("u", value, key=key)
                old, new = reduced.pop(key, None), value
                if old is not None:
                    new = old + value
                if new <= 60 or old is None:
                    reduced[key] = new
                changed.append({"old": old, "new": reduced.get(key)})
            if chance.random() < 0.1:
                driver.crash()
            if chance.random() < 0.3:
                driver.barrier()
            if 13 in sent and not seed % 2:
                continue  # a record leaves no trace if one of its values fails
            for value in sent:
                if value != 13:
                    own = KEYS[value % len(KEYS)] if seed % 2 else key
                    came.setdefault(own, []).append((value, at_ms))
                    expected.setdefault(own, []).append(row_of_all(came[own]))
        driver.settle()
        found: dict[str, list[Any]] = {}
        for record in driver.records("out"):
            found.setdefault(record.key, []).append((record.value, record.timestamp))
        assert found == expected
        assert driver.table(running) == {key: rows[-1][0] for key, rows in expected.items()}
        assert driver.read_values("reduced-out") == changed
        assert driver.table(again) == reduced


def row_of_all(came: list[Row]) -> tuple[dict[str, Any], int]:
    """The row of these values and times, and its time."""
    values, times = [value for value, _ in came], [at_ms for _, at_ms in came]
    return {
        "n": len(values),
        "all": values,
        "sum": sum(values),
        "max": max(values),
        "top": sorted(values, key=lambda value: -(value // 3))[:2],
        "first": values[times.index(min(times))],
        "last": values[-1 - times[::-1].index(max(times))],
    }, max(times)


@pytest.mark.parametrize("seed", range(60))
def test_running_aggregates_of_random_records_are_those_that_are_counted_anew(seed: int) -> None:
    check_running(seed)


@pytest.mark.parametrize("seed", range(60))
def test_groups_of_random_tables_are_those_that_are_counted_anew(seed: int) -> None:
    check_groups(seed)


@pytest.mark.parametrize("seed", range(60))
def test_changes_of_random_tables_are_those_of_the_model(seed: int) -> None:
    check(seed)


# --- planted bugs ---------------------------------------------------------------------------------------


def assert_caught(check_seed: Callable[[int], None] = check) -> None:
    """At least one seed notices."""
    for seed in range(20):
        try:
            check_seed(seed)
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

    def side(table: Any, *arguments: Any) -> Any:
        found = plain(table, *arguments)
        return (lambda key, _changes: found(key, {})) if isinstance(table, views.FilteredTable) else found

    monkeypatch.setattr(views, "_compile_side", side)
    assert_caught()


def test_model_notices_a_record_that_is_told_for_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_by_key", lambda changes: {})
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


def test_model_notices_that_nothing_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = group._compile_each

    def each(node: Any, what: str) -> Any:
        return plain(node, what) if what == "add" else lambda kept, value: None

    monkeypatch.setattr(group, "_compile_each", each)
    assert_caught(check_groups)


def test_model_notices_contributions_that_are_not_in_the_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EntryTable.encode_touched

    def encode(table: EntryTable) -> dict[bytes, bytes]:
        return {} if table.name.endswith("//members") else plain(table)

    monkeypatch.setattr(EntryTable, "encode_touched", encode)
    assert_caught(check_groups)


def test_model_notices_that_a_row_that_moves_only_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = group.RegroupOperator.compile

    def compiled(operator: Any, surroundings: Any, following: Any) -> Any:
        def follow(record: Any, key: Any, halves: Any) -> None:
            if halves.new is not None or halves.old is None:
                following(record, key, halves)

        return plain(operator, surroundings, follow)

    monkeypatch.setattr(group.RegroupOperator, "compile", compiled)
    assert_caught(check_groups)


@pytest.mark.parametrize("store", ["//groups", "//table"])
def test_model_notices_running_rows_that_are_not_in_the_delta(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EntryTable.encode_touched

    def encode(table: EntryTable) -> dict[bytes, bytes]:
        return {} if table.name.endswith(store) else plain(table)

    monkeypatch.setattr(EntryTable, "encode_touched", encode)
    assert_caught(check_running)


def test_model_notices_a_failure_that_leaves_half_of_its_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EntryTable, "rollback", lambda table: None)
    assert_caught(check_running)


def test_model_notices_that_a_row_is_as_old_as_its_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FollowedTable.note

    def note(table: FollowedTable, record: Any, change: RowChange) -> None:
        plain(table, record, change._replace(at_ms=record.timestamp()[1]))

    monkeypatch.setattr(FollowedTable, "note", note)
    assert_caught(check_running)
