"""What aggregates return, and that merged ones return the same as one over all records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import (
    Aggregate,
    Counted,
    Cumulative,
    Hopping,
    Job,
    Session,
    Sliding,
    Tumbling,
    approx_distinct,
    collect,
    count,
    count_distinct,
    first,
    last,
    max_,
    mean,
    min_,
    reduce,
    sum_,
    top_n,
    variance,
)
from fcluster.common.errors import JobError
from fcluster.engine.values import decode_value, encode_values
from fcluster.testing import Driver

Row = tuple[Any, int]
"""Value and timestamp."""
AGGREGATES: dict[str, Aggregate[Any]] = {
    "count": count(),
    "sum": sum_(),
    "min": min_(),
    "max": max_(),
    "mean": mean(),
    "first": first(),
    "last": last(),
    "collect": collect(),
    "reduce": reduce(lambda one, other: one * 3 + other),
    "variance": variance(),
    "sample": variance(sample=True),
    "top": top_n(3, by=lambda value: value % 7),
    "distinct": count_distinct(lambda value: {"last digit": value % 10}),
    "about": approx_distinct(lambda value: {"last digit": value % 10}),
}


def kept_of(aggregate: Aggregate[Any], rows: Sequence[Row]) -> Any:
    """What is kept for these rows. It is encoded and decoded as state after each row."""
    kept = aggregate.init()
    for value, timestamp in rows:
        kept = aggregate.add(kept, value, timestamp) if aggregate.takes_time else aggregate.add(kept, value)
        kept = decode_value(encode_values([kept])[0])
    return kept


def expected(name: str, rows: Sequence[Row]) -> Any:
    values = [value for value, _ in rows]
    match name:
        case "count":
            return len(rows)
        case "sum":
            return sum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "mean":
            return sum(values) / len(values)
        case "first":
            return min(rows, key=lambda row: row[1])[0]
        case "last":
            return max(reversed(rows), key=lambda row: row[1])[0]
        case "collect":
            return values
        case "variance":
            return pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-6)
        case "sample":
            return pytest.approx(statistics.variance(values), rel=1e-6, abs=1e-6) if len(values) > 1 else None
        case "top":
            return sorted(values, key=lambda value: -(value % 7))[:3]
        case "distinct" | "about":
            return len({value % 10 for value in values})
        case _:
            total = values[0]
            for value in values[1:]:
                total = total * 3 + value
            return total


rows = st.lists(st.tuples(st.integers(-1_000, 1_000), st.integers(0, 20)), min_size=1, max_size=12)


@given(st.sampled_from(sorted(AGGREGATES)), rows)
def test_aggregate_returns_what_it_promises(name: str, given_rows: list[Row]) -> None:
    aggregate = AGGREGATES[name]
    assert aggregate.result(kept_of(aggregate, given_rows)) == expected(name, given_rows)


@given(st.sampled_from(sorted(set(AGGREGATES) - {"reduce"})), rows, rows)
def test_merged_aggregates_equal_one_over_all_records(name: str, early: list[Row], later: list[Row]) -> None:
    aggregate = AGGREGATES[name]
    assert aggregate.merge is not None
    merged = aggregate.merge(kept_of(aggregate, early), kept_of(aggregate, later))
    assert aggregate.result(merged) == expected(name, [*early, *later])


def test_aggregate_can_use_a_part_of_the_value() -> None:
    def of_amount(value: Any) -> Any:
        return value["amount"]

    given_rows = [({"amount": 5, "by": "ann"}, 1), ({"amount": 7, "by": "bob"}, 2)]
    cases: list[tuple[Aggregate[Any], Any]] = [
        (sum_(of_amount), 12),
        (mean(of_amount), 6.0),
        (min_(of_amount), 5),
        (first(of_amount), 5),
        (collect(of_amount), [5, 7]),
        (top_n(1, by=of_amount, of=lambda value: value["by"]), ["bob"]),
        (reduce(lambda one, other: one - other, of=of_amount), -2),
        (variance(of_amount), 1.0),
    ]
    for aggregate, result in cases:
        assert aggregate.result(kept_of(aggregate, given_rows)) == result


@dataclass
class PaidDataclass:
    cents: int
    at: datetime


class PaidStruct(msgspec.Struct):
    cents: int
    at: datetime


class PaidModel(pydantic.BaseModel):
    cents: int
    at: datetime


@pytest.mark.parametrize("model", [PaidDataclass, PaidStruct, PaidModel])
@pytest.mark.parametrize("windows", [Tumbling(timedelta(days=1)), Session(timedelta(days=1)), Counted(2)])
def test_objects_of_a_model_are_kept_as_what_their_json_holds(model: Any, windows: Any) -> None:
    job = Job("j")
    paid = job.topic("paid", value=model)
    job.stream(paid).window(windows, name="w").aggregate(
        earliest=first(),
        latest=last(),
        all=collect(),
        most=top_n(1, by=lambda one: one.cents),
        n=count_distinct(),
        about=approx_distinct(),
    ).to("out")
    with Driver(job, partitions=1) as driver:
        for cents in (7, 5):
            driver.send(paid, model(cents=cents, at=datetime(2026, 1, 1, tzinfo=UTC)), key="k", timestamp=9)
        driver.finish()
        (result,) = driver.read_values("out")
    found = [value["cents"] for value in (result["earliest"], result["latest"], *result["most"])]
    assert (found, [value["cents"] for value in result["all"]]) == ([7, 5, 7], [7, 5])
    assert datetime.fromisoformat(result["earliest"]["at"]) == datetime(2026, 1, 1, tzinfo=UTC)
    assert (result["n"], result["about"]) == (2, 2)


@pytest.mark.parametrize("model", [PaidDataclass, PaidStruct, PaidModel])
def test_objects_of_a_model_keep_all_digits(model: Any) -> None:
    job = Job("j")
    paid = job.topic("paid", value=model)
    window = job.stream(paid).window(Counted(1), name="w")
    window.aggregate(all=collect(), most=top_n(1, by=lambda one: one.cents)).to("out")
    with Driver(job, partitions=1) as driver:
        driver.send(paid, model(cents=10**30, at=datetime(2026, 1, 1, tzinfo=UTC)), key="k", timestamp=9)
        (result,) = driver.read_values("out")
    assert [one["cents"] for one in (*result["all"], *result["most"])] == [10**30, 10**30]


def test_collect_of_a_group_loses_objects_of_a_model_again() -> None:
    job = Job("j")
    table = job.table(job.topic("paid", value=PaidStruct))
    table.group_by(lambda one: one.at.isoformat(), name="g").aggregate(all=collect()).to_stream().to("out")
    with Driver(job, partitions=1) as driver:
        for cents in (7, 5):
            driver.send("paid", PaidStruct(cents, datetime(2026, 1, 1, tzinfo=UTC)), key="k")
        assert [[one["cents"] for one in row["all"]] for row in driver.read_values("out")] == [[7], [5]]


def test_collect_of_a_group_tells_equal_values_of_different_types_apart() -> None:
    aggregate = collect()
    assert aggregate.subtract is not None
    values: list[Any] = [1, True, 1.0, {"of": [1]}, {"of": [True]}]
    kept = kept_of(aggregate, [(value, 0) for value in values])
    for gone, left in [(True, ["1", "1.0"]), (1.0, ["1"])]:
        kept = aggregate.subtract(kept, gone)
        assert [repr(value) for value in kept] == [*left, "{'of': [1]}", "{'of': [True]}"]
    assert repr(aggregate.subtract(kept, {"of": [True]})) == "[1, {'of': [1]}]"


def summed(kept: Any, value: Any) -> Any:
    """Changes its first argument."""
    kept["n"] += value["n"]
    return kept


def changed(result: dict[str, Any]) -> dict[str, Any]:
    """Changes what it gets."""
    for one in (*result["all"], result["earliest"], *result["most"], result["own"][0]):
        one["n"] += 1_000
    return result


@pytest.mark.parametrize("is_one_epoch", [True, False])
@pytest.mark.parametrize(
    "windows",
    [
        Tumbling(timedelta(milliseconds=4)),
        Hopping(timedelta(milliseconds=4), timedelta(milliseconds=2)),
        Cumulative(timedelta(milliseconds=4), timedelta(milliseconds=2)),
        Session(timedelta(milliseconds=4)),
        Sliding(timedelta(milliseconds=3)),
        Counted(3, every=1),
    ],
)
def test_what_functions_change_in_place_changes_no_other_window_and_no_other_aggregate(
    windows: Any, is_one_epoch: bool
) -> None:
    """Whether the windows have been written in between or not."""
    job = Job("j")
    given_values = job.stream(job.topic("in")).window(windows, name="w")
    given_values.aggregate(
        sum=reduce(summed),
        own_sum=Aggregate(
            "own-sum", dict, lambda kept, value: summed(kept, value) if kept else value, merge=summed
        ),
        own=Aggregate(
            "own", list, lambda kept, value: [*kept, value], merge=lambda kept, later: kept + later
        ),
        all=collect(),
        earliest=first(),
        most=top_n(1, by=lambda value: value["n"]),
    ).map(changed).to("out")
    with Driver(job, partitions=1, auto_barrier=not is_one_epoch) as driver:
        for at in range(8):
            driver.send("in", {"n": 1 << at}, key="k", timestamp=8 + at)
        driver.settle()
        driver.finish()
        results = driver.read_values("out")
    assert len(results) > 1 or isinstance(windows, Session)
    for result in results:
        numbers = [1 << at for at in range(8) if result["start"] <= 8 + at < result["end"]]
        assert [one["n"] - 1_000 for one in result["all"]] == numbers
        assert result["sum"] == result["own_sum"] == {"n": sum(numbers)}


def test_table_of_records_keeps_values_of_its_own() -> None:
    job = Job("j")
    table = job.stream(job.topic("in")).aggregate(sum=reduce(summed), all=collect(), name="t")
    table.to_stream().to("out")
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for number in (1, 2, 4):
            driver.send("in", {"n": number}, key="k")
        driver.settle()
        assert driver.table(table) == {"k": {"sum": {"n": 7}, "all": [{"n": 1}, {"n": 2}, {"n": 4}]}}


@pytest.mark.parametrize("windows", [Tumbling(timedelta(days=1)), Session(timedelta(days=1)), Counted(4)])
def test_tuples_are_compared_in_windows_as_by_python_and_kept_as_lists(windows: Any) -> None:
    job = Job("j")
    window = job.stream(job.topic("rows")).window(windows, name="w")
    window.aggregate(
        least=min_(tuple),
        most=max_(lambda row: (row[0], (row[1],))),
        best=top_n(2, by=tuple, of=lambda row: row[1]),
        ends=last(tuple),
        all=collect(lambda row: (row[1], {"of": row[0]})),
    ).to("out")
    with Driver(job, partitions=1) as driver:
        for row in ([2, "b"], [10, "a"], [2, "a"], [10, "b"]):
            driver.send("rows", row, key="k", timestamp=9)
        driver.finish()
        (result,) = driver.read_values("out")
    assert (result["least"], result["most"], result["ends"]) == ([2, "a"], [10, ["b"]], [10, "b"])
    assert result["best"] == ["b", "a"]
    assert result["all"][0] == ["b", {"of": 2}]


def test_groups_take_tuples_away_again() -> None:
    job = Job("j")
    groups = job.table(job.topic("rows")).group_by(lambda row: "all", name="g")
    table = groups.aggregate(
        least=min_(tuple),
        most=max_(tuple),
        best=top_n(1, by=tuple),
        all=collect(lambda row: (row[1], row[0])),
    )
    table.to_stream().to("out")
    with Driver(job, partitions=1) as driver:
        for key, row in (("x", [1, "a"]), ("y", [1, "b"]), ("z", [0, "c"])):
            driver.send("rows", row, key=key)
        driver.send("rows", None, key="y")
        driver.send("rows", [3, "a"], key="z")
        rows = driver.table(table)["all"]
    assert (rows["least"], rows["most"], rows["best"]) == ([1, "a"], [3, "a"], [[3, "a"]])
    assert rows["all"] == [["a", 1], ["a", 3]]


def test_what_is_neither_json_nor_a_model_cannot_be_told_apart() -> None:
    with pytest.raises(TypeError, match="is of type complex, which JSON can't hold"):
        count_distinct().add({}, 1j)


def test_variance_is_precise_far_from_zero() -> None:
    values = [1e9 + value for value in (4, 7, 13, 16)]
    assert variance(sample=True).result(kept_of(variance(), [(value, 0) for value in values])) == 30.0


@pytest.mark.parametrize(
    ("fields", "message", "remedy"),
    [
        ({}, "got nothing to compute", "count"),
        ({"n": count}, "field 'n' of the window 'w' is the function 'count'", "n=count()"),
        ({"n": 3}, "field 'n' of the window 'w' is 3, not an aggregate", "count()"),
        ({"n": str.upper}, "not an aggregate", "Aggregate"),
        ({"start": count()}, "a field 'start'", "another name"),
    ],
)
def test_fields_that_are_not_aggregates_are_refused(
    fields: dict[str, Any], message: str, remedy: str
) -> None:
    job = Job("j")
    with pytest.raises(JobError, match=message.replace("(", r"\(")) as refused:
        job.stream(job.topic("in")).window(Tumbling(timedelta(minutes=1)), name="w").aggregate(**fields)
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sum_("amount"), "sum_\\(\\) got 'amount', not a function"),  # type: ignore[arg-type]
        (lambda: top_n(0, by=len), "n=0 of top_n"),
        (lambda: top_n(2, by="amount"), "top_n\\(by=\\) got 'amount'"),  # type: ignore[arg-type]
        (lambda: Aggregate("two words", int, max), "name 'two words'"),
        (lambda: Aggregate("mine", 0, max), "init= of the aggregate 'mine' got 0"),  # type: ignore[arg-type]
    ],
)
def test_impossible_aggregates_are_refused(make: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        make()
