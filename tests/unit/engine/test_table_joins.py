"""Streams that are joined with tables: which row a record meets, failures, and what is left of both."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from fcluster import Codec, Job, Tumbling, Watermark, count
from fcluster.common.settings import Settings
from fcluster.graph.codecs import decode_json, encode_json
from fcluster.testing import Driver, JobStopped

Sent = tuple[str, str | None, Any, int]
"""Topic, key, value and timestamp."""


def joined_job(how: Any = "inner", with_: Any = None, **options: Any) -> Job:
    """The stream "s", joined with the table "t"; results go to "out"."""
    job = Job("j")
    table = job.table(job.topic("t"), on_error=options.pop("table_on_error", None))
    job.stream(job.topic("s")).join(table, with_, how=how, **options).to(job.topic("out"))
    return job


def run(job: Job, *sent: Sent) -> list[tuple[Any, int]]:
    """What is written for these records, of one partition: values and timestamps."""
    with Driver(job, partitions=1) as driver:
        for topic, key, value, at_ms in sent:
            driver.send(topic, value, key=key, timestamp=at_ms)
        return [(record.value, record.timestamp) for record in driver.records("out")]


def value_only(left: Any, _right: Any) -> Any:
    return left


def both(left: Any, right: Any) -> list[Any]:
    return [left, right]


# --- which row ------------------------------------------------------------------------------------------


def test_record_meets_the_row_that_its_key_has_then() -> None:
    found = run(
        joined_job(),
        ("s", "a", 1, 1),
        ("t", "a", "x", 2),
        ("t", "b", "y", 3),
        ("s", "a", 2, 4),
        ("t", "a", "z", 5),
        ("s", "a", 3, 6),
        ("s", "c", 4, 7),
    )
    assert found == [({"left": 2, "right": "x"}, 4), ({"left": 3, "right": "z"}, 6)]


def test_left_join_passes_on_records_without_a_row() -> None:
    found = run(joined_job("left", both), ("s", "a", 1, 1), ("s", None, 2, 2))
    assert found == [([1, None], 1), ([2, None], 2)]


def test_tombstone_deletes_the_row_and_null_is_one() -> None:
    with Driver(joined_job(), partitions=1) as driver:
        for value, number in (("x", 1), (None, 2)):
            driver.send("t", value, key="a")
            driver.send("s", number, key="a")
        driver.send_raw("t", b"null", key=b"a")
        driver.send("s", 3, key="a")
        assert driver.read_values("out") == [{"left": 1, "right": "x"}, {"left": 3, "right": None}]
        assert driver.table("t") == {"a": None}


def test_rows_are_put_in_the_order_of_their_offsets() -> None:
    found = run(
        joined_job(), ("t", "a", "newer", 9), ("t", "a", "older", 3), ("s", "a", 1, 4), ("s", "a", 2, 10)
    )
    assert [value["right"] for value, _at in found] == ["older", "older"]


@pytest.mark.parametrize("first", ["s", "t"])
def test_of_records_that_wait_the_table_comes_first_at_the_same_timestamp(first: str) -> None:
    with Driver(joined_job(), partitions=1, auto_barrier=False) as driver:
        order = [("s", 1), ("t", "x")] if first == "s" else [("t", "x"), ("s", 1)]
        for topic, value in order:
            driver.send(topic, value, key="a", timestamp=5)
        driver.crash()  # both come again, and wait at the same time
        driver.barrier()
        assert driver.read_values("out") == [{"left": 1, "right": "x"}]


def test_key_and_headers_are_those_of_the_stream() -> None:
    with Driver(joined_job(), partitions=1) as driver:
        driver.send("t", "x", key="a", headers=[("of", b"table")], timestamp=1)
        driver.send("s", 1, key="a", headers=[("of", b"stream")], timestamp=2)
        (record,) = driver.records("out")
        assert (record.key, record.timestamp, record.headers) == ("a", 2, [("of", b"stream")])


def test_a_null_in_the_stream_is_joined_and_stays_null_if_nothing_is_made_of_it() -> None:
    with Driver(joined_job(with_=value_only), partitions=1) as driver:
        driver.send("t", "x", key="a")
        driver.send("s", None, key="a")
        assert [record.raw_value for record in driver.records("out")] == [None]


def test_what_a_join_does_to_its_row_changes_nothing_in_the_table() -> None:
    def spoil(_value: Any, row: Any) -> Any:
        row["seen"] = row.get("seen", 0) + 1
        return row

    with Driver(joined_job(with_=spoil), partitions=1, auto_barrier=False) as driver:
        driver.send("t", {"x": 1}, key="a")
        for number in range(3):
            driver.send("s", number, key="a")
        driver.barrier()
        driver.send("s", 3, key="a")
        driver.barrier()
        assert driver.read_values("out") == [{"x": 1, "seen": 1}] * 4
        assert driver.table("t") == {"a": {"x": 1}}


def test_several_tables_and_several_streams() -> None:
    job = Job("j")
    prices, names = job.table(job.topic("prices")), job.table(job.topic("names"))
    out = job.topic("out")
    (
        job.stream(job.topic("s"))
        .join(prices, lambda value, price: {"n": value, "price": price})
        .join(names, lambda value, name: {**value, "name": name}, how="left")
        .to(out)
    )
    job.stream(job.topic("other")).join(prices).to(out)
    (stage,) = job.build(Settings()).stages
    assert (stage.name, stage.topics) == ("s", ("s", "prices", "names", "other"))
    found = run(
        job,
        ("prices", "a", 5, 1),
        ("s", "a", 1, 2),
        ("names", "a", "pen", 3),
        ("s", "a", 2, 4),
        ("other", "a", 3, 5),
    )
    assert [value for value, _at in found] == [
        {"n": 1, "price": 5, "name": None},
        {"n": 2, "price": 5, "name": "pen"},
        {"left": 3, "right": 5},
    ]


def test_topic_that_is_also_a_stream_is_in_the_table_first() -> None:
    job = Job("j")
    topic = job.topic("t")
    job.stream(topic).join(job.table(topic)).to(job.topic("out"))
    assert run(job, ("t", "a", 1, 1), ("t", "a", 2, 2)) == [
        ({"left": 1, "right": 1}, 1),
        ({"left": 2, "right": 2}, 2),
    ]


def test_stream_with_another_key_is_joined_behind_a_key_by() -> None:
    job = Job("j")
    job.stream(job.topic("s")).key_by("of").join(job.table(job.topic("t"))).to(job.topic("out"))
    stages = job.build(Settings()).stages
    assert [stage.name for stage in stages] == ["s", "with-t"]
    with Driver(job, partitions={"s": 3, "t": 2}) as driver:
        for key in "abcdef":
            driver.send("t", key.upper(), key=key)
        for number, key in enumerate("abcdef"):
            driver.send("s", {"of": key}, key=str(number))
        found = {value["left"]["of"]: value["right"] for value in driver.read_values("out")}
        assert found == {key: key.upper() for key in "abcdef"}


@pytest.mark.parametrize("value", ["bytes", "text", "int", "msgpack", Codec("own", encode_json, decode_json)])
def test_rows_are_decoded_as_their_topic_says(value: Any) -> None:
    job = Job("j")
    table = job.table(job.topic("t", key="int", value=value))
    stream = job.stream(job.topic("s", key="int"))
    stream.join(table, lambda _value, row: str(row)).to(job.topic("out", key="int"))
    row: Any = {"bytes": b"raw", "text": "", "int": 2**70}.get(value if isinstance(value, str) else "", [1])
    with Driver(job, partitions=1) as driver:
        driver.send("t", row, key=7)
        driver.crash()
        driver.send("s", 0, key=7)
        assert driver.read_values("out") == [str(row)]
        assert driver.table(table) == {7: row}


# --- time -----------------------------------------------------------------------------------------------


def test_event_time_waits_for_the_stream_but_not_for_the_table() -> None:
    job = Job("j")
    table = job.table(job.topic("t"))
    (
        job.stream(job.topic("s", watermark=Watermark()))
        .join(table)
        .window(Tumbling(timedelta(milliseconds=10)), name="w")
        .aggregate(n=count())
        .to(job.topic("out"))
    )
    with Driver(job, partitions=1) as driver:
        driver.send("t", "x", key="a", timestamp=500)
        assert driver.event_times("s") == {0: None}
        driver.send("s", 1, key="a", timestamp=3)
        driver.send("s", 1, key="a", timestamp=12)
        assert [value["n"] for value in driver.read_values("out")] == [1]
        driver.crash()
        assert driver.event_times("s") == {0: 12}


def test_event_time_waits_for_a_table_that_is_also_a_stream() -> None:
    job = Job("j")
    both = job.topic("both", watermark=Watermark())
    out = job.topic("out")
    job.stream(job.topic("s")).join(job.table(both)).to(out)
    job.stream(both).to(out)
    with Driver(job, partitions=1) as driver:
        driver.send("s", 1, key="a", timestamp=30)
        assert driver.event_times("s") == {0: None}
        driver.send("both", 1, key="a", timestamp=20)
        assert driver.event_times("s") == {0: 20}


# --- failures -------------------------------------------------------------------------------------------


def failing(value: Any, row: Any) -> Any:
    if value == "bad":
        raise ValueError("no good")
    return [value, row]


def test_record_that_fails_in_the_join_stops_the_job_before_it() -> None:
    with Driver(joined_job(with_=failing), partitions=1) as driver:
        driver.send("t", "x", key="a")
        driver.send("s", "good", key="a")
        with pytest.raises(
            JobStopped, match=r"s/0 at offset 1 failed in join with 't' by 'failing' .*no good"
        ):
            driver.send("s", "bad", key="a")
        assert driver.read_values("out") == [["good", "x"]]


def test_record_that_fails_in_the_join_is_skipped_or_becomes_a_dead_letter() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    table = job.table(job.topic("t"))
    job.stream(job.topic("s")).join(table, failing, on_error=dead).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", "x", key="a")
        for value in ("good", "bad", "better"):
            driver.send("s", value, key="a")
        driver.send("s", "keyless")
        assert driver.read_values("out") == [["good", "x"], ["better", "x"]]
        assert ["no key" in letter.error for letter in driver.dead_letters()] == [False, True]
        assert driver.skipped == 2


def test_table_record_without_a_key_follows_the_rule_of_the_table() -> None:
    with Driver(joined_job(table_on_error="skip"), partitions=1) as driver:
        driver.send("t", "x")
        driver.send_raw("t", b"{", key=b"a")  # nor can this be decoded
        driver.send("t", "y", key="a")
        assert driver.table("t") == {"a": "y"}
        assert driver.skipped == 2
    with (
        Driver(joined_job(), partitions=1) as driver,
        pytest.raises(JobStopped, match=r"in the table 't': .*no key"),
    ):
        driver.send("t", "x")


# --- whatever happens in between --------------------------------------------------------------------------


def planned(chance: random.Random, per_ms: int) -> list[Sent]:
    """Records of both topics in the order of their timestamps, some of them tombstones.

    Args:
        per_ms: how many have the same timestamp.
    """
    sent: list[Sent] = []
    for number in range(chance.randrange(60, 120)):
        key = chance.choice("abcde")
        if chance.random() < 0.4:
            sent.append(("t", key, chance.choice([None, number]), number // per_ms))
        else:
            sent.append(("s", key, number, number // per_ms))
    return sent


def expected_of(sent: list[Sent], meet: Callable[[Any, Any], Any]) -> dict[str, list[Any]]:
    """A slow and obvious join: by key, in the order of timestamps, and of the table first."""
    rows: dict[str, Any] = {}
    found: dict[str, list[Any]] = {}
    for topic, key, value, _at in sorted(sent, key=lambda one: (one[3], one[0] != "t")):
        assert key is not None
        if topic == "t":
            rows.pop(key, None)
            if value is not None:
                rows[key] = value
        else:
            found.setdefault(key, []).append(meet(value, rows.get(key)))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_results_do_not_depend_on_barriers_crashes_and_partitions(seed: int) -> None:
    chance = random.Random(seed)
    job, auto = joined_job("left", both), seed % 4 == 0
    sent = planned(chance, 1 if auto else 2)
    with Driver(job, partitions=chance.randrange(1, 4), auto_barrier=auto) as driver:
        # All records of a timestamp are there before the first of them is committed.
        for place, (topic, key, value, at_ms) in enumerate(sent):
            driver.send(topic, value, key=key, timestamp=at_ms)
            if chance.random() < 0.15:
                driver.crash()
            is_last = place + 1 == len(sent) or sent[place + 1][3] > at_ms
            if is_last and chance.random() < 0.4:
                driver.crash()
                driver.barrier()
        driver.crash()
        driver.settle()
        found: dict[str, list[Any]] = {}
        for record in driver.records("out"):
            found.setdefault(record.key, []).append(record.value)
    assert found == expected_of(sent, both)
