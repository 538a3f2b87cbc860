"""Running aggregates of a stream: a table of all records of each key, without an end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
import pytest

from fcluster import (
    Aggregate,
    Job,
    Table,
    Tumbling,
    collect,
    count,
    first,
    last,
    max_,
    mean,
    minutes,
    sum_,
    top_n,
)
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.compatibility import incompatibility
from fcluster.graph.outline import outline
from fcluster.testing import Driver, JobStopped

Sent = tuple[str, Any, int]
"""Key, value and timestamp."""


@dataclass
class Data:
    account: str
    cents: int


class Struct(msgspec.Struct):
    account: str
    cents: int


class Model(pydantic.BaseModel):
    account: str
    cents: int


def told(grow: Callable[[Job], Table], *sent: Sent) -> list[tuple[str, Any, int]]:
    """The changes of the table that are told for these records."""
    job = Job("j")
    grow(job).to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        for key, value, at_ms in sent:
            driver.send("t", value, key=key, timestamp=at_ms)
        return [(record.key, record.value, record.timestamp) for record in driver.records("out")]


def test_each_record_changes_the_row_of_its_key() -> None:
    found = told(
        lambda job: job.stream(job.topic("t")).aggregate(
            n=count(),
            total=sum_(),
            most=max_(),
            average=mean(),
            top=top_n(2, by=lambda value: value),
            newest=last(),
            oldest=first(),
            name="sums",
        ),
        ("a", 3, 10),
        ("b", 1, 11),
        ("a", 5, 5),
    )
    assert found == [
        ("a", {"n": 1, "total": 3, "most": 3, "average": 3, "top": [3], "newest": 3, "oldest": 3}, 10),
        ("b", {"n": 1, "total": 1, "most": 1, "average": 1, "top": [1], "newest": 1, "oldest": 1}, 11),
        ("a", {"n": 2, "total": 8, "most": 5, "average": 4, "top": [5, 3], "newest": 3, "oldest": 5}, 10),
    ]


@pytest.mark.parametrize("partitions", [1, 3])
def test_records_are_counted_behind_a_key_by_and_a_merge(partitions: int) -> None:
    job = Job("j")
    streams = job.stream(job.topic("t")), job.stream(job.topic("u"))
    counts = job.merge(*streams).key_by(lambda value: value, name="words").count(name="counts")
    counts.filter(lambda n: n > 1).to_stream().to(job.topic("out"))
    with Driver(job, partitions=partitions) as driver:
        for topic, word in [("t", "pen"), ("u", "ink"), ("u", "pen"), ("t", "pen")]:
            driver.send(topic, word, key="k")
        assert driver.read_values("out") == [2, 3]
        assert driver.table(counts) == {"pen": 3, "ink": 1}


def test_topic_with_times_in_its_values_is_aggregated_by_these() -> None:
    job = Job("j")
    stream = job.stream(job.topic("t", timestamp="at"))
    stream.aggregate(oldest=first(lambda value: value["n"]), name="a").to_stream().to(job.topic("out"))
    stream.reduce(lambda _old, new: new, name="r").to_stream().to(job.topic("reduced"))
    with Driver(job) as driver:
        driver.send("t", {"at": 5, "n": 1}, key="a")
        driver.send("t", {"at": 3, "n": 2}, key="a")
        assert [record.value["oldest"] for record in driver.records("out")] == [1, 2]
        assert [record.timestamp for record in driver.records("reduced")] == [5, 5]


def test_topic_that_is_aggregated_is_no_table_for_starts_and_event_time() -> None:
    job = Job("j")
    running = job.stream(job.topic("t")).count(name="c")
    reduced = job.stream(job.topic("u")).reduce(lambda _old, new: new, name="r")
    running.join(reduced).to_stream().to(job.topic("out"))
    topology = job.build(Settings())
    assert topology.table_topics == frozenset()
    assert topology.stages[0].timeless_inputs == frozenset()


def test_stage_behind_a_key_by_has_the_name_of_the_table() -> None:
    job = Job("j")
    job.stream(job.topic("t")).key_by("a").count(name="counts").to_stream().to(job.topic("out"))
    assert [stage.name for stage in job.build(Settings()).stages] == ["t", "counts"]


def test_rows_meet_the_records_of_another_stream() -> None:
    job = Job("j")
    seen = job.stream(job.topic("t")).count(name="seen")
    job.stream(job.topic("u")).join(seen, lambda _value, n: n, how="left").to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("u", 0, key="a")
        driver.send("t", 1, key="a")
        driver.send("t", 1, key="a")
        driver.send("u", 0, key="a")
        assert driver.read_values("out") == [None, 2]


def test_null_counts_and_a_record_that_fails_halfway_leaves_no_trace() -> None:
    job = Job("j")
    table = job.stream(job.topic("t")).aggregate(
        n=count(), total=sum_(lambda value: value or 0), name="sums", on_error="skip"
    )
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        for value in (1, None, "x", 2):
            driver.send("t", value, key="a")
        driver.send("t", 5)  # without a key
        assert driver.read_values("out") == [
            {"n": 1, "total": 1},
            {"n": 2, "total": 1},
            {"n": 3, "total": 3},
        ]
        assert driver.table(table) == {"a": {"n": 3, "total": 3}}


def test_result_that_can_not_be_computed_is_the_fault_of_the_record() -> None:
    odd = Aggregate("odd", int, lambda kept, value: kept + value, lambda kept: 1 // kept)
    job = Job("j")
    table = job.stream(job.topic("t")).aggregate(odd=odd, name="odds", on_error="skip")
    job.stream(job.topic("u")).join(table).to(job.topic("out"))  # nobody follows it
    with Driver(job) as driver:
        for value in (1, -1, 1):
            driver.send("t", value, key="a")
        assert driver.table(table) == {"a": {"odd": 0}}


def test_what_can_not_be_kept_names_the_field() -> None:
    odd = Aggregate("odd", list, lambda kept, value: [*kept, {value}])
    job = Job("j")
    job.stream(job.topic("t")).aggregate(odd=odd, name="odds").to_stream().map(str).to(job.topic("out"))
    with pytest.raises(JobStopped, match="in the field 'odd' of the table 'odds'"), Driver(job) as driver:
        driver.send("t", 1, key="a")


@pytest.mark.parametrize("model", [Data, Struct, Model])
def test_reduce_keeps_and_gives_objects_of_the_model(model: Any) -> None:
    def larger(reduced: Any, value: Any) -> Any:
        assert type(reduced) is model
        reduced.cents += value.cents
        return reduced

    job = Job("j")
    table = (
        job.stream(job.topic("t", value=model))
        .key_by("account", name="accounts")
        .reduce(larger, name="totals")
    )
    table.map(lambda total: total.cents).to_stream().to(job.topic("cents"))
    table.to_stream().to(job.topic("out", value=model))
    with Driver(job) as driver:
        for cents in (1, 2, 3):
            driver.send("t", model(account="a", cents=cents), key="k")
            driver.crash()
        assert driver.read_values("cents") == [1, 3, 6]
        assert driver.read_values("out")[-1] == model(account="a", cents=6)
        assert driver.table(table) == {"a": model(account="a", cents=6)}


def test_reduce_behind_a_map_keeps_objects_of_the_model_that_it_is_told() -> None:
    def larger(reduced: Data, value: Data) -> Data:
        return Data(reduced.account, reduced.cents + value.cents)

    mapped = told(
        lambda job: (
            job.stream(job.topic("t")).map(lambda n: Data("x", n)).reduce(larger, name="r", value=Data)
        ),
        ("a", 1, 1),
        ("a", 2, 2),
    )
    assert [value["cents"] for _key, value, _at in mapped] == [1, 3]


def test_row_that_is_reduced_to_none_is_deleted_and_the_next_value_is_the_first() -> None:
    found = told(
        lambda job: job.stream(job.topic("t")).reduce(lambda a, b: None if a + b > 5 else a + b, name="r"),
        ("a", 2, 9),
        ("a", 2, 4),  # an earlier record doesn't make the row older
        ("a", 2, 10),
        ("a", 1, 3),
    )
    assert found == [("a", 2, 9), ("a", 4, 9), ("a", None, 10), ("a", 1, 3)]


def test_each_value_of_a_flat_map_is_a_change() -> None:
    found = told(
        lambda job: job.stream(job.topic("t")).flat_map(lambda n: range(n)).aggregate(total=sum_(), name="s"),
        ("a", 3, 1),
    )
    assert [value["total"] for _key, value, _at in found] == [0, 1, 3]


def test_steps_that_change_what_they_get_change_no_row() -> None:
    job = Job("j")
    table = job.stream(job.topic("t")).aggregate(all=collect(), name="s")
    table.to_stream().map(lambda row: row["all"].clear()).to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("t", 1, key="a")
        driver.send("t", 2, key="a")
        assert driver.table(table) == {"a": {"all": [1, 2]}}


def test_changes_behind_a_window_are_refused() -> None:
    job = Job("j")
    results = job.stream(job.topic("t")).window(Tumbling(minutes(1)), name="w").aggregate(n=count())
    results.count(name="c").to_stream().to(job.topic("out"))
    with pytest.raises(JobError, match="has results as time passes"):
        job.build(Settings())


def _job(grow: Callable[[Any], Table]) -> Any:
    job = Job("j")
    grow(job.stream(job.topic("t"))).to_stream().to(job.topic("out"))
    return job.build(Settings())


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            lambda stream: stream.aggregate(n=count(), name="s"),
            lambda stream: stream.aggregate(n=sum_(), name="s"),
            "used to have n=count, and now has n=sum",
        ),
        (
            lambda stream: stream.table(name="s"),
            lambda stream: stream.reduce(lambda a, b: b, name="s"),
            "used to have values of a topic or stream, and now has what reduce",
        ),
        (
            lambda stream: stream.count(name="s"),
            lambda stream: stream.count(name="z"),
            "'s'",
        ),
    ],
)
def test_changed_job_says_what_no_longer_fits(before: Any, after: Any, said: str) -> None:
    description = json.loads(json.dumps(_job(before).describe()))
    assert said in str(incompatibility(description, _job(after)))


def test_outline_names_what_a_row_has() -> None:
    text = str(outline(_job(lambda stream: stream.aggregate(n=count(), total=sum_(), name="s"))))
    assert "n=count, total=sum" in text
