"""Tables that are followed, computed and joined: which changes are told, when, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Change, Job, Record, Table
from fcluster.engine.memory import StateMemory
from fcluster.engine.rows import row_of, time_of_row
from fcluster.engine.state import ShardState, StoreMeta, store_prefix
from fcluster.graph.tables import TableStore
from fcluster.testing import Driver, JobStopped
from tests.unit.engine.memory_store import MemoryStore

Sent = tuple[str, str | None, Any, int]
"""Topic, key, value and timestamp."""
Told = tuple[str, Any, int]
"""Key, value and timestamp."""


def told(grow: Callable[[Job], Table], *sent: Sent, changes: bool = False) -> list[Told]:
    """The changes of the table that are told for these records."""
    job = Job("j")
    table = grow(job)
    stream = table.changes().map(lambda change: [change.old, change.new]) if changes else table.to_stream()
    stream.to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for topic, key, value, at_ms in sent:
            driver.send(topic, value, key=key, timestamp=at_ms)
        found = driver.records("out")
        assert all(record.raw_value is None for record in found if record.value is None)
        return [(record.key, record.value, record.timestamp) for record in found]


def plain(job: Job) -> Table:
    return job.table(job.topic("t"), on_error="skip")


def even(value: int) -> bool:
    return value % 2 == 0


# --- changes of a table ---------------------------------------------------------------------------------


def test_each_change_of_a_row_is_told_and_deleting_nothing_is_none() -> None:
    sent = [
        ("t", "a", None, 1),
        ("t", "a", "x", 2),
        ("t", "a", "x", 3),
        ("t", None, "lost", 4),
        ("t", "b", "y", 5),
        ("t", "a", None, 4),
        ("t", "a", None, 6),
        ("t", "a", "z", 3),
    ]
    assert told(plain, *sent) == [
        ("a", "x", 2),
        ("a", "x", 3),
        ("b", "y", 5),
        ("a", None, 4),
        ("a", "z", 3),
    ]
    assert [value for _key, value, _at in told(plain, *sent, changes=True)] == [
        [None, "x"],
        ["x", "x"],
        [None, "y"],
        ["x", None],
        [None, "z"],
    ]


def test_row_that_is_filtered_out_counts_as_deleted_but_only_if_it_was_there() -> None:
    sent = [("t", "a", value, at) for at, value in enumerate([1, 2, 4, 3, 5, None, 6, None], start=1)]
    assert told(lambda job: plain(job).filter(even), *sent) == [
        ("a", 2, 2),
        ("a", 4, 3),
        ("a", None, 4),
        ("a", 6, 7),
        ("a", None, 8),
    ]


def test_mapped_rows_have_both_values_and_none_is_no_row() -> None:
    def half(value: int) -> int | None:
        return value // 2 if value % 2 == 0 else None

    sent = [("t", "a", value, at) for at, value in enumerate([3, 4, 8, 5, 7, 2], start=1)]
    assert told(lambda job: plain(job).map(half), *sent, changes=True) == [
        ("a", [None, 2], 2),
        ("a", [2, 4], 3),
        ("a", [4, None], 4),
        ("a", [None, 1], 6),
    ]


def test_functions_may_change_what_they_get() -> None:
    def spoil(value: dict[str, Any]) -> dict[str, Any]:
        value["n"] += 1
        return value

    def grow(job: Job) -> Table:
        table = plain(job).map(spoil)
        return table.join(table.map(spoil), lambda left, right: [left, right])

    assert told(grow, ("t", "a", {"n": 1}, 1), ("t", "a", {"n": 5}, 2), changes=True) == [
        ("a", [None, [{"n": 2}, {"n": 3}]], 1),
        ("a", [[{"n": 2}, {"n": 3}], [{"n": 6}, {"n": 7}]], 2),
    ]


def test_values_that_were_read_are_written_with_their_bytes_and_headers() -> None:
    job = Job("j")
    job.table(job.topic("t")).filter(lambda value: value).to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send_raw("t", b'{"a" : 1}', key=b"a", headers=[("of", b"it")])
        driver.send("t", None, key="a", headers=[("of", b"tombstone")])
        found = [(record.raw_value, record.headers) for record in driver.records("out")]
        assert found == [(b'{"a" : 1}', [("of", b"it")]), (None, [("of", b"tombstone")])]


def test_json_null_in_a_topic_is_a_row_for_joins_of_streams_but_no_value_to_be_told() -> None:
    job = Job("j")
    table = job.table(job.topic("t"))
    table.to_stream().to(job.topic("out"))
    job.stream(job.topic("s")).join(table).to(job.topic("joined"))
    with Driver(job, partitions=1) as driver:
        driver.send_raw("t", b"null", key=b"a")
        driver.send("s", 1, key="a")
        assert driver.read_values("joined") == [{"left": 1, "right": None}]
        driver.send("t", 5, key="a")
        driver.send_raw("t", b"null", key=b"a")
        assert driver.read_values("out") == [5, None]


def test_change_is_written_as_an_object_and_a_handler_gets_it_like_any_value() -> None:
    job = Job("j")
    table = job.table(job.topic("t"))
    table.changes().to(job.topic("out"))

    def seen(ctx: Any, change: Any) -> None:
        ctx.state.setdefault("seen", []).append([change.old, change.new, ctx.timestamp])

    table.changes().process(seen)
    with Driver(job, partitions=1) as driver:
        driver.send("t", 1, key="a", timestamp=5)
        driver.send("t", None, key="a", timestamp=7)
        assert driver.read_values("out") == [{"old": None, "new": 1}, {"old": 1, "new": None}]
        assert driver.state("seen", "a") == {"seen": [[None, 1, 5], [1, None, 7]]}
    assert Change(None, 1) == Change(None, 1) != Change(1, None)


# --- a table of a stream --------------------------------------------------------------------------------


def test_newest_value_of_a_stream_is_a_table_and_none_deletes_its_row() -> None:
    def grow(job: Job) -> Table:
        stream = job.stream(job.topic("s")).filter(lambda value: value != 0)
        return stream.map(lambda value: None if value in (None, "gone") else [value]).table(name="kept")

    sent = [("s", "a", value, at) for at, value in enumerate([0, 1, 2, "gone", None, 3, None], start=1)]
    assert told(grow, *sent, changes=True) == [
        ("a", [None, [1]], 2),
        ("a", [[1], [2]], 3),
        ("a", [[2], None], 4),
        ("a", [None, [3]], 6),
        ("a", [[3], None], 7),
    ]


def test_each_value_of_a_record_is_a_change() -> None:
    def grow(job: Job) -> Table:
        return job.stream(job.topic("s")).flat_map(lambda values: values).table(name="kept")

    assert told(grow, ("s", "a", [1, 2, None], 1), ("s", "a", [], 2), changes=True) == [
        ("a", [None, 1], 1),
        ("a", [1, 2], 1),
        ("a", [2, None], 1),
    ]


def test_table_behind_a_key_by_is_filled_from_all_partitions_and_survives() -> None:
    job = Job("j")
    stream = job.stream(job.topic("s")).key_by("of").map(lambda value: value["n"])
    table = stream.table(name="kept")
    table.to_stream().to(job.topic("out"))
    assert [stage.name for stage in Driver(job).topology.stages] == ["s", "kept"]
    with Driver(job, partitions=3) as driver:
        for number in range(9):
            driver.send("s", {"of": "abc"[number % 3], "n": number}, key=str(number))
        driver.crash()
        assert driver.table(table) == {"a": 6, "b": 7, "c": 8}
        assert sorted(driver.read_values("out")) == list(range(9))


def test_merged_streams_fill_one_table_and_a_change_is_told_once() -> None:
    def grow(job: Job) -> Table:
        stream = job.stream(job.topic("s"))
        merged = job.merge(
            stream.filter(even), stream.filter(lambda value: value == 4), job.stream(job.topic("r"))
        )
        return merged.table(name="kept")

    assert told(grow, ("s", "a", 2, 1), ("r", "a", 7, 2), ("s", "a", 4, 3), changes=True) == [
        ("a", [None, 2], 1),
        ("a", [2, 7], 2),
        ("a", [7, 4], 3),
        ("a", [4, 4], 3),
    ]


def test_table_of_a_tables_stream_is_up_to_date_for_all_who_read_it() -> None:
    job = Job("j")
    topic = job.topic("t")
    out = job.topic("out")
    job.stream(topic).join(job.table(topic).to_stream().map(lambda v: v * 10).table(name="tens")).to(out)
    with Driver(job, partitions=1) as driver:
        driver.send("t", 1, key="a")
        driver.send("t", 2, key="a")
        assert driver.read_values("out") == [{"left": 1, "right": 10}, {"left": 2, "right": 20}]


def test_record_that_changes_both_tables_of_a_join_is_told_once_from_what_was_told_to_what_is() -> None:
    def grow(job: Job) -> Table:
        stream = job.stream(job.topic("s"))
        left = stream.table(name="left")
        others = stream.map(lambda value: None if value is None or value % 5 == 0 else -value)
        return left.join(others.table(name="right"), lambda a, b: [a, b], how="left")

    sent = [("s", "a", value, at) for at, value in enumerate([1, 2, 5, 7, None, 3], start=1)]
    assert told(grow, *sent, changes=True) == [
        ("a", [None, [1, -1]], 1),
        ("a", [[1, -1], [2, -2]], 2),
        ("a", [[2, -2], [5, None]], 3),
        ("a", [[5, None], [7, -7]], 4),
        ("a", [[7, -7], None], 5),
        ("a", [None, [3, -3]], 6),
    ]


def test_topic_that_is_two_tables_is_told_once() -> None:
    def grow(job: Job) -> Table:
        topic = job.topic("t")
        all_rows = job.stream(topic).table(name="all")
        return job.table(topic).filter(even).join(all_rows, lambda a, b: [a, b], how="outer")

    assert told(grow, ("t", "a", 2, 1), ("t", "a", 3, 2), ("t", "a", None, 3), changes=True) == [
        ("a", [None, [2, 2]], 1),
        ("a", [[2, 2], [None, 3]], 2),
        ("a", [[None, 3], None], 3),
    ]


def test_several_changes_of_a_record_in_both_tables_follow_each_other() -> None:
    def grow(job: Job) -> Table:
        values = job.stream(job.topic("s")).flat_map(lambda values: values)
        left, right = values.table(name="left"), values.map(lambda value: -value).table(name="right")
        return left.join(right, lambda a, b: [a, b])

    assert told(grow, ("s", "a", [1, 2, 3], 1), ("s", "a", [4], 2), ("s", "b", [5, 5], 3), changes=True) == [
        ("a", [None, [1, -3]], 1),  # the other table's changes count with the first one
        ("a", [[1, -3], [2, -3]], 1),
        ("a", [[2, -3], [3, -3]], 1),
        ("a", [[3, -3], [4, -4]], 2),
        ("b", [None, [5, -5]], 3),
        ("b", [[5, -5], [5, -5]], 3),
    ]


def test_table_behind_a_handler_that_yields_records_is_told() -> None:
    def grow(job: Job) -> Table:
        def later(ctx: Any, value: Any) -> Record:
            return Record(value=value, timestamp=ctx.timestamp + 10)

        return job.stream(job.topic("s")).process(later).table(name="kept")

    assert told(grow, ("s", "a", 1, 1)) == [("a", 1, 11)]


def test_table_of_pairs_of_two_streams_is_told_whichever_record_is_later() -> None:
    def grow(job: Job) -> Table:
        left, right = job.stream(job.topic("l")), job.stream(job.topic("r"))
        pairs = left.join(right, lambda a, b: [a, b], within=timedelta(milliseconds=10), name="pairs")
        return pairs.table(name="kept")

    assert told(grow, ("l", "a", 1, 5), ("r", "a", 2, 7), ("l", "a", 3, 6)) == [
        ("a", [1, 2], 7),
        ("a", [3, 2], 7),
    ]


def test_changes_of_a_table_of_a_tables_stream_are_told() -> None:
    def grow(job: Job) -> Table:
        return plain(job).to_stream().map(lambda value: value * 10).table(name="tens")

    assert told(grow, ("t", "a", 1, 1), ("t", "a", 2, 2)) == [("a", 10, 1), ("a", 20, 2)]


def test_rows_may_be_kept_as_a_model() -> None:
    from dataclasses import dataclass

    @dataclass
    class Price:
        cents: int

    job = Job("j")
    table = job.stream(job.topic("s")).map(Price).table(name="kept", value=Price)
    table.map(lambda price: price.cents).to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("s", 5, key="a")
        driver.crash()
        driver.send("s", 6, key="a")
        assert driver.table("kept") == {"a": Price(6)}
        assert driver.read_values("out") == [5, 6]


# --- joins of tables ------------------------------------------------------------------------------------


def text(left: Any, right: Any) -> str:
    return f"{left}{right}".replace("None", "-")


def joined(how: Any) -> Callable[[Job], Table]:
    return lambda job: job.table(job.topic("l")).join(job.table(job.topic("r")), text, how=how)


SIDES: list[Sent] = [
    ("l", "k", None, 1),
    ("r", "k", None, 2),
    ("l", "k", "A", 3),  # only left
    ("l", "k", "B", 9),
    ("r", "k", "a", 4),  # both
    ("r", "k", "b", 12),
    ("l", "k", "C", 5),
    ("l", "k", None, 6),  # only right
    ("l", "k", None, 7),
    ("r", "k", "c", 8),
    ("l", "k", "D", 2),
    ("r", "k", None, 1),  # only left again
    ("r", "k", None, 3),
    ("l", "k", None, 10),  # nothing
    ("l", "k", None, 11),
    ("r", "k", "d", 4),
    ("r", "k", None, 5),
]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("inner", "Ba@9 Bb@12 Cb@12 None@12 Dc@8 None@2"),
        ("left", "A-@3 B-@9 Ba@9 Bb@12 Cb@12 None@12 Dc@8 D-@2 None@10"),
        ("outer", "A-@3 B-@9 Ba@9 Bb@12 Cb@12 -b@12 -c@8 Dc@8 D-@2 None@10 -d@4 None@5"),
    ],
)
def test_join_of_two_tables_in_each_transition(how: str, expected: str) -> None:
    assert " ".join(f"{value}@{at}" for _key, value, at in told(joined(how), *SIDES)) == expected


def test_join_tells_former_rows_and_rows_of_other_keys_are_not_touched() -> None:
    sent = [("l", "a", 1, 1), ("r", "b", 2, 2), ("r", "a", 3, 3), ("l", "a", 4, 4), ("r", "a", None, 5)]
    assert told(joined("left"), *sent, changes=True) == [
        ("a", [None, "1-"], 1),
        ("a", ["1-", "13"], 3),
        ("a", ["13", "43"], 4),
        ("a", ["43", "4-"], 5),
    ]


def test_change_that_reaches_a_join_on_several_ways_is_told_once() -> None:
    def grow(job: Job) -> Table:
        left, right = job.table(job.topic("l")), job.table(job.topic("r"))
        return left.join(right, text).join(right.filter(lambda value: value != "x"), text, how="left")

    sent = [
        ("l", "k", "A", 1),
        ("r", "k", "a", 2),
        ("r", "k", "x", 3),
        ("l", "k", "B", 4),
        ("r", "k", None, 5),
    ]
    assert told(grow, *sent, changes=True) == [
        ("k", [None, "Aaa"], 2),
        ("k", ["Aaa", "Ax-"], 3),
        ("k", ["Ax-", "Bx-"], 4),
        ("k", ["Bx-", None], 5),
    ]


def test_change_that_a_filter_hides_does_not_reach_the_join() -> None:
    def grow(job: Job) -> Table:
        left, right = job.table(job.topic("l")), job.table(job.topic("r"))
        return left.filter(even).join(right, text, how="outer")

    assert told(grow, ("r", "k", "x", 1), ("l", "k", 1, 2), ("l", "k", 3, 3), ("l", "k", 4, 4)) == [
        ("k", "-x", 1),
        ("k", "4x", 4),
    ]


def test_table_is_joined_with_itself_and_by_default_as_a_dict() -> None:
    def grow(job: Job) -> Table:
        table = plain(job)
        return table.join(table)

    assert told(grow, ("t", "a", 1, 1), ("t", "a", None, 2)) == [
        ("a", {"left": 1, "right": 1}, 1),
        ("a", None, 2),
    ]


def test_stream_is_joined_with_a_computed_table() -> None:
    job = Job("j")
    names, prices = job.table(job.topic("names")), job.table(job.topic("prices"))
    offers = names.join(prices.filter(even), lambda name, cents: [name, cents], how="left")
    job.stream(job.topic("s")).join(offers, lambda value, row: [value, row], how="left").to(job.topic("out"))
    (stage,) = Driver(job).topology.stages
    assert (stage.name, stage.topics, stage.table_inputs) == ("s", ("s", "names", "prices"), {1, 2})
    with Driver(job, partitions=2) as driver:
        driver.send("s", 1, key="a")
        driver.send("names", "pen", key="a")
        driver.send("prices", 3, key="a")
        driver.send("s", 2, key="a")
        driver.send("prices", 4, key="a")
        driver.send("s", 3, key="a")
        assert driver.read_values("out") == [[1, None], [2, ["pen", None]], [3, ["pen", 4]]]


# --- failures -------------------------------------------------------------------------------------------


def no_bad(value: Any) -> Any:
    if value == "bad":
        raise ValueError("no good")
    return f"<{value}>"


def test_row_that_fails_stops_the_job_and_names_the_function_and_the_table() -> None:
    with pytest.raises(
        JobStopped, match=r"t/0 at offset 1 failed in map 'no_bad' of the table 't': .*no good"
    ):
        told(lambda job: plain(job).map(no_bad), ("t", "a", 1, 1), ("t", "a", "bad", 2))


def test_row_that_fails_is_skipped_or_becomes_a_dead_letter_and_later_counts_as_no_row() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    table = job.table(job.topic("t"))
    table.map(no_bad, on_error=dead).changes().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for value in ("x", "bad", "y", None):
            driver.send("t", value, key="a")
        assert driver.table(table) == {}
        assert driver.read_values("out") == [
            {"old": None, "new": "<x>"},
            {"old": None, "new": "<y>"},
            {"old": "<y>", "new": None},
        ]
        (letter,) = driver.dead_letters()
        assert (letter.record.raw_value, letter.handler) == (b'"bad"', "map 'no_bad' of the table 't'")


def test_stream_record_that_meets_a_row_that_fails_follows_the_rule_of_the_table() -> None:
    job = Job("j")
    table = job.table(job.topic("t")).map(no_bad, on_error="skip")
    job.stream(job.topic("s")).join(table).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", "bad", key="a")
        driver.send("s", 1, key="a")
        driver.send("t", "good", key="a")
        driver.send("s", 2, key="a")
        assert driver.read_values("out") == [{"left": 2, "right": "<good>"}]
        assert driver.skipped == 1


def test_left_join_passes_on_the_records_that_meet_a_row_that_is_skipped() -> None:
    job = Job("j")
    table = job.table(job.topic("t")).map(no_bad, on_error="skip").filter(bool)
    job.stream(job.topic("s")).join(table, how="left").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", "bad", key="a")
        driver.send("s", 1, key="a")
        driver.send("t", "good", key="a")
        driver.send("s", 2, key="a")
        assert driver.read_values("out") == [{"left": 1, "right": None}, {"left": 2, "right": "<good>"}]
        assert driver.skipped == 0


def test_left_join_with_a_row_that_fails_is_a_dead_letter_or_stops_if_the_table_says_so() -> None:
    job = Job("j")
    table = job.table(job.topic("t")).map(no_bad, on_error=job.topic("dead", value="bytes"))
    job.stream(job.topic("s")).join(table, how="left").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", "bad", key="a")
        driver.send("s", 1, key="a")
        (letter,) = driver.dead_letters()
        assert (letter.record.raw_value, letter.handler) == (b"1", "map 'no_bad' of the table 't'")
        assert driver.read_values("out") == []
        assert driver.rows(table) == []
    job = Job("j")
    strict = job.table(job.topic("t")).map(no_bad)
    job.stream(job.topic("s")).join(strict, how="left").to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", "bad", key="a")
        with pytest.raises(ValueError, match="no good"):
            driver.table(strict)
        with pytest.raises(JobStopped, match="map 'no_bad' of the table 't'"):
            driver.send("s", 1, key="a")


@pytest.mark.parametrize("rule", ["skip", "dead letter"])
def test_row_that_fails_on_the_other_side_of_a_join_of_tables_counts_as_no_row(rule: str) -> None:
    job = Job("j")
    on_error: Any = rule if rule == "skip" else job.topic("dead", value="bytes")
    right = job.table(job.topic("right")).map(no_bad, on_error=on_error)
    joined = job.table(job.topic("left")).join(right, how="left")
    joined.changes().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for topic, value in (("left", 1), ("right", "bad"), ("left", 2), ("right", "good"), ("left", 3)):
            driver.send(topic, value, key="a")
        rows = [{"left": 1, "right": None}, {"left": 2, "right": None}]
        rows += [{"left": 2, "right": "<good>"}, {"left": 3, "right": "<good>"}]
        assert driver.read_values("out") == [
            {"old": old, "new": new} for old, new in zip([None, *rows], rows, strict=False)
        ]
        assert driver.skipped == 1, "the record of the row that fails, and no other"


def test_chain_that_fails_behind_a_table_leaves_the_row_and_the_other_chains() -> None:
    job = Job("j")
    table = job.table(job.topic("t"))
    table.to_stream().map(no_bad, on_error="skip").to(job.topic("out"))
    table.to_stream().to(job.topic("plain"))
    with Driver(job, partitions=1) as driver:
        for value in ("x", "bad"):
            driver.send("t", value, key="a")
        assert driver.table(table) == {"a": "bad"}
        assert driver.read_values("out") == ["<x>"]
        assert driver.read_values("plain") == ["x", "bad"]


def test_record_that_fails_in_front_of_its_table_changes_no_row_and_tells_nothing() -> None:
    job = Job("j")

    def some(values: list[Any]) -> Any:
        for value in values:
            yield no_bad(value)

    table = job.stream(job.topic("s")).flat_map(some, on_error="skip").table(name="kept")
    table.to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("s", ["x"], key="a")
        driver.send("s", ["y", "bad"], key="a")
        assert driver.table(table) == {"a": "<x>"}
        assert driver.read_values("out") == ["<x>"]
        assert driver.skipped == 1


# --- rows -----------------------------------------------------------------------------------------------


def test_row_of_an_older_version_has_no_time_and_is_rewritten_when_it_is_put() -> None:
    store, prefix = MemoryStore(), store_prefix("t//table")
    store.apply({prefix + b"a": b"\x00" + b"[1]", prefix + b"b": b"\x00[2]"}, StoreMeta(1, 1))
    state = ShardState(store, [TableStore("t")], StateMemory(0))
    rows: Any = state.tables["t//table"]
    assert rows.row(b"a") == row_of(-1, b"[1]")
    assert time_of_row(rows.row(b"b")) == -1
    rows.put(b"a", row_of(7, b"[3]"))
    delta = state.freeze(2)
    assert delta is not None
    assert delta.changes == {prefix + b"a": b"\x01" + (7).to_bytes(8, "big") + b"[3]"}
