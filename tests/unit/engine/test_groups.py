"""Tables of groups: what is taken away and added, when a group has rows, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from statistics import pvariance
from typing import Any

import pytest

from fcluster import (
    Aggregate,
    Job,
    Session,
    Table,
    Watermark,
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
    seconds,
    sum_,
    top_n,
    variance,
)
from fcluster.common.errors import JobError
from fcluster.testing import Driver, JobStopped

Sent = tuple[str, Any, int]
"""Key, value and timestamp."""


def accounts(job: Job) -> Table:
    """A table of accounts, each of which is a pair of its owner and an amount."""
    return job.table(job.topic("t"))


def owner(account: Any) -> str | None:
    return account[0]


def amount(account: Any) -> int:
    return account[1]


def told(grow: Callable[[Job], Table], *sent: Sent, partitions: int = 1) -> list[tuple[str, Any, int]]:
    """The changes of the table of groups that are told for these records of accounts."""
    job = Job("j")
    grow(job).to_stream().to(job.topic("out"))
    with Driver(job, partitions=partitions) as driver:
        for key, value, at_ms in sent:
            driver.send("t", value, key=key, timestamp=at_ms)
        return [(record.key, record.value, record.timestamp) for record in driver.records("out")]


MOVES: list[Sent] = [
    ("a", ["ann", 5], 1),
    ("b", ["ann", 7], 2),
    ("c", ["bob", 1], 3),
    ("a", ["ann", 6], 5),  # stays in its group
    ("b", ["bob", 8], 4),  # leaves one, and comes to the other
    ("a", None, 6),
    ("x", None, 7),
    ("b", ["ann", 9], 8),
]


@pytest.mark.parametrize("partitions", [1, 3])
def test_group_loses_what_a_row_has_contributed_before_it_gains_the_new_value(partitions: int) -> None:
    found = told(
        lambda job: (
            accounts(job)
            .group_by(owner, name="owners")
            .aggregate(n=count(), cents=sum_(amount), of=collect(amount))
        ),
        *MOVES,
        partitions=partitions,
    )
    assert found == [
        ("ann", {"n": 1, "cents": 5, "of": [5]}, 1),
        ("ann", {"n": 2, "cents": 12, "of": [5, 7]}, 2),
        ("bob", {"n": 1, "cents": 1, "of": [1]}, 3),
        ("ann", {"n": 2, "cents": 13, "of": [7, 6]}, 5),
        ("ann", {"n": 1, "cents": 6, "of": [6]}, 5),
        ("bob", {"n": 2, "cents": 9, "of": [1, 8]}, 4),
        ("ann", {"n": 0, "cents": 0, "of": []}, 6),
        ("bob", {"n": 1, "cents": 1, "of": [1]}, 8),
        ("ann", {"n": 1, "cents": 9, "of": [9]}, 8),
    ]


def test_empty_group_stays_with_a_count_of_zero_or_is_dropped() -> None:
    def counted(**options: Any) -> list[tuple[str, Any, int]]:
        sent = [
            ("a", ["ann", 5], 1),
            ("b", ["ann", 5], 2),
            ("a", None, 3),
            ("b", None, 4),
            ("a", ["ann", 1], 5),
        ]
        return told(lambda job: accounts(job).group_by(owner, name="g", **options).count(), *sent)

    assert [value for _key, value, _at in counted()] == [1, 2, 1, 0, 1]
    assert [value for _key, value, _at in counted(drop_empty=True)] == [1, 2, 1, None, 1]


def test_reduce_takes_the_first_value_and_then_adds_and_subtracts() -> None:
    def reduced(job: Job) -> Table:
        grouped = accounts(job).group_by(owner, name="g", value=amount)
        return grouped.reduce(lambda one, other: one + other, lambda one, other: one - other)

    assert [(key, value) for key, value, _at in told(reduced, *MOVES)] == [
        ("ann", 5),
        ("ann", 12),
        ("bob", 1),
        ("ann", 13),
        ("ann", 6),
        ("bob", 9),
        ("ann", 0),
        ("bob", 1),
        ("ann", 9),
    ]


def test_aggregates_of_ones_own_see_the_old_value_first() -> None:
    history = Aggregate(
        "history", str, lambda kept, value: f"{kept}+{value}", subtract=lambda kept, v: f"{kept}-{v}"
    )

    def grow(job: Job) -> Table:
        table = accounts(job).group_by(owner, name="g", value=amount).aggregate(of=history)
        return table.map(lambda row: row["of"])

    assert told(grow, ("a", ["ann", 1], 1), ("a", ["ann", 2], 2), ("a", ["bob", 3], 3)) == [
        ("ann", "+1", 1),
        ("ann", "+1-1+2", 2),
        ("ann", "+1-1+2-2", 3),
        ("bob", "+3", 3),
    ]


def test_row_without_a_group_or_a_contribution_is_in_none() -> None:
    def grow(job: Job) -> Table:
        return (
            accounts(job).group_by(owner, name="g", value=lambda account: account[1]).aggregate(cents=sum_())
        )

    sent = [("a", [None, 5], 1), ("a", ["ann", 5], 2), ("a", ["ann", None], 3), ("a", [None, 5], 4)]
    assert told(grow, *sent) == [("ann", {"cents": 5}, 2), ("ann", {"cents": 0}, 3)]


def test_field_names_the_group_and_keys_may_be_of_another_kind() -> None:
    job = Job("j")
    table = job.table(job.topic("t")).group_by("shelf", name="shelves", key="int").count()
    table.to_stream().to(job.topic("out", key="int"))
    with Driver(job) as driver:
        driver.send("t", {"shelf": 7}, key="a")
        driver.send("t", {"shelf": 7}, key="b")
        driver.send("t", {"shelf": None}, key="b")
        assert [(record.key, record.value) for record in driver.records("out")] == [(7, 1), (7, 2), (7, 1)]


@dataclass
class Book:
    title: str
    shelf: int | None = None


def test_field_that_the_values_lack_is_refused() -> None:
    job = Job("j")
    books, titles = job.table(job.topic("books", value=Book)), job.table(job.topic("titles", value="text"))
    with pytest.raises(JobError, match="'shelve' of the groups 'g' names the field 'shelve'") as refused:
        books.filter(lambda book: book.title).group_by("shelve", name="g", key="int")
    assert "Did you mean 'shelf'?" in refused.value.remedy
    with pytest.raises(JobError, match="names a field, but the values there are text"):
        titles.group_by("shelf", name="g")


def test_row_without_the_field_fails_instead_of_being_in_no_group() -> None:
    job = Job("j")
    rows = job.topic("rows", on_error=job.topic("bad"))
    table = job.table(rows).group_by("shelf", name="g", key="int", on_error=job.topic("bad")).count()
    table.to_stream().to(job.topic("out", key="int"))
    with Driver(job) as driver:
        driver.send("rows", {"shelve": 7}, key="a")
        driver.send("rows", {"shelf": 7}, key="b")
        (letter,) = driver.records("bad")
        reason = dict(letter.headers)["fcluster.error"]
        assert b"takes the field 'shelf', and the value has no such field, only shelve" in (reason or b"")
        assert driver.table(table) == {7: 1}


def test_aggregates_that_can_take_values_away() -> None:
    def grow(job: Job) -> Table:
        grouped = accounts(job).group_by(owner, name="g", value=amount)
        return grouped.aggregate(
            mean=mean(), kinds=count_distinct(), top=reduce(max, subtract=lambda a, b: a)
        )

    assert [value for _key, value, _at in told(grow, *MOVES[:4], ("b", ["ann", 6], 5), ("a", None, 6))][
        -2:
    ] == [
        {"mean": 6.0, "kinds": 1, "top": 7},
        {"mean": 6.0, "kinds": 1, "top": 7},
    ]
    empty = told(
        lambda job: accounts(job).group_by(owner, name="g", value=amount).aggregate(mean=mean()),
        ("a", ["ann", 1], 1),
        ("a", None, 2),
    )
    assert empty[-1] == ("ann", {"mean": None}, 2)


@pytest.mark.parametrize("seed", range(20))
def test_aggregates_of_changing_rows_are_those_of_the_rows_that_are_there(seed: int) -> None:
    """Whatever rows come, change, move to another group and leave, equal values among them."""
    random = Random(seed)
    job = Job("j")
    scored = top_n(3, by=lambda row: row[1], of=lambda row: row[2])
    table = (
        accounts(job)
        .group_by(owner, name="g")
        .aggregate(n=count(), least=min_(amount), most=max_(amount), spread=variance(amount), three=scored)
    )
    table.to_stream().to(job.topic("out"))
    rows: dict[str, list[Any]] = {}
    with Driver(job) as driver:
        for number in range(60):
            key = random.choice("abcdefgh")
            rows.pop(key, None)
            if random.random() < 0.75:
                rows[key] = [random.choice(["ann", "bob"]), random.randrange(5), f"{key}{number}"]
            driver.send("t", rows.get(key), key=key)
        for group, found in driver.rows(table):
            members = [row for row in rows.values() if row[0] == group]
            amounts = [row[1] for row in members]
            assert found["n"] == len(members)
            assert found["least"] == min(amounts, default=None)
            assert found["most"] == max(amounts, default=None)
            assert found["spread"] == (pytest.approx(pvariance(amounts)) if amounts else None)
            by_score = sorted(members, key=lambda row: -row[1])[:3]  # stable: those that came first
            assert found["three"] == [row[2] for row in by_score]


def test_equal_numbers_of_other_kinds_leave_as_they_came() -> None:
    table = told(
        lambda job: accounts(job).group_by(owner, name="g", value=amount).aggregate(most=max_()),
        ("a", ["ann", 1.0], 1),
        ("b", ["ann", 1], 2),
        ("a", None, 3),
    )
    assert [(value["most"], type(value["most"])) for _key, value, _at in table] == [
        (1.0, float),
        (1, int),
        (1, int),
    ]


@pytest.mark.parametrize("aggregate", [first(amount), last(amount), approx_distinct(amount), reduce(max)])
def test_aggregates_from_which_nothing_can_be_taken_away_say_what_to_do(aggregate: Aggregate[Any]) -> None:
    grouped = accounts(Job("j")).group_by(owner, name="g")
    with pytest.raises(JobError, match="can't be taken away") as raised:
        grouped.aggregate(found=aggregate)
    assert "collect()" in (raised.value.remedy or "")


@dataclass
class Payment:
    account: str
    cents: int


def test_reduced_models_of_windows_that_become_one_and_of_changing_groups() -> None:
    job = Job("j")
    payments = job.topic("payments", value=Payment, watermark=Watermark(max_delay=seconds(10)))

    def plus(one: Payment, other: Payment) -> Payment:
        return Payment(one.account, one.cents + other.cents)

    def minus(one: Payment, other: Payment) -> Payment:
        return Payment(one.account, one.cents - other.cents)

    session = job.stream(payments).window(Session(seconds(1)), name="visit")
    session.aggregate(sum=reduce(plus, model=Payment)).to(job.topic("sums"))
    table = job.table(job.topic("rows", value=Payment)).group_by("account", name="all").reduce(plus, minus)
    table.to_stream().to(job.topic("told", value=Payment))
    with Driver(job) as driver:
        for at_ms, cents in [(0, 1), (1_800, 2), (900, 4), (60_000, 0)]:
            driver.send("payments", Payment("ann", cents), key="k", timestamp=at_ms)
        (result, *_) = driver.read_values("sums")
        assert result["sum"] == {"account": "ann", "cents": 7}
        for key, cents in [("a", 1), ("b", 2), ("a", 5)]:
            driver.send("rows", Payment("ann", cents), key=key)
        assert driver.read_values("told")[-1] == Payment("ann", 7)


def test_reduce_takes_only_models_as_model() -> None:
    with pytest.raises(JobError, match="which is no model"):
        reduce(max, model=int)


def test_groups_of_a_join_of_groups_and_streams_that_look_groups_up() -> None:
    job = Job("j")
    limits = job.table(job.topic("limits"))
    sums = accounts(job).group_by(owner, name="sums").aggregate(cents=sum_(amount))
    over = sums.join(limits, lambda row, limit: {"over": row["cents"] > limit, "cents": row["cents"]})
    counts = over.group_by(lambda row: str(row["over"]), name="counts").count()
    counts.to_stream().to(job.topic("out"))
    job.stream(job.topic("asks")).join(sums, lambda _ask, row: row["cents"]).to(job.topic("answers"))
    with Driver(job, partitions=2) as driver:
        for name in ("ann", "bob"):
            driver.send("limits", 10, key=name)
        driver.send("t", ["ann", 8], key="a")
        driver.send("t", ["bob", 8], key="b")
        driver.send("t", ["bob", 3], key="c")
        driver.crash()
        driver.send("asks", "how much", key="bob")
        assert driver.read_values("answers") == [11]
        assert driver.table(sums) == {"ann": {"cents": 8}, "bob": {"cents": 11}}
        assert driver.table(over) == {
            "ann": {"over": False, "cents": 8},
            "bob": {"over": True, "cents": 11},
        }
        assert driver.table("counts") == driver.table(counts) == {"False": 1, "True": 1}
        assert sorted((record.key, record.value) for record in driver.records("out")) == [
            ("False", 1),
            ("False", 1),
            ("False", 2),
            ("True", 1),
        ]


def test_followers_may_change_what_they_get() -> None:
    job = Job("j")
    table = accounts(job).group_by(owner, name="g").aggregate(of=collect(amount))

    def spoil(value: Any) -> Any:
        value["of"].append("spoilt")
        return value

    for name in ("one", "other"):
        table.map(spoil).to_stream().to(job.topic(name))
    with Driver(job, partitions=1) as driver:
        driver.send("t", ["ann", 1], key="a")
        driver.send("t", ["ann", 2], key="b")
        for name in ("one", "other"):
            assert driver.read_values(name)[-1] == {"of": [1, 2, "spoilt"]}
        assert driver.table(table) == {"ann": {"of": [1, 2]}}


# --- what was added is taken away, whatever has changed --------------------------------------------------


def test_functions_that_have_changed_take_away_what_was_added() -> None:
    factor = 1

    def grow(job: Job) -> Table:
        grouped = accounts(job).group_by(owner, name="g", value=lambda account: account[1] * factor)
        return grouped.aggregate(n=count(), cents=sum_())

    job = Job("j")
    table = grow(job)
    table.to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", ["ann", 5], key="a")
        driver.send("t", ["ann", 6], key="b")
        factor = 10
        driver.send("t", ["ann", 7], key="a")
        driver.send("t", None, key="b")
        assert driver.table(table) == {"ann": {"n": 1, "cents": 70}}
        driver.send("t", None, key="a")
        assert driver.table(table) == {"ann": {"n": 0, "cents": 0}}


# --- failures -------------------------------------------------------------------------------------------


def test_row_whose_group_cannot_be_told_stops_the_job_or_keeps_what_was_there() -> None:
    def grow(job: Job, **options: Any) -> Table:
        return accounts(job).group_by(owner, name="g", **options).aggregate(cents=sum_(amount))

    with pytest.raises(JobStopped, match=r"t/0 at offset 0 failed in group_by\(\) for the table 'g'"):
        told(grow, ("a", 5, 1))
    job = Job("j")
    table = grow(job, on_error="skip")
    table.to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        for value in (["ann", 5], 7, ["ann", 6]):
            driver.send("t", value, key="a")
        assert driver.table(table) == {"ann": {"cents": 6}}
        assert driver.skipped == 1


def test_row_whose_value_an_aggregate_does_not_take_counts_with_what_it_was_before() -> None:
    job = Job("j")
    grouped = accounts(job).group_by(owner, name="g", on_error="skip")
    table = grouped.aggregate(n=count(), cents=sum_(amount))
    table.to_stream().to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("t", ["ann", 1], key="b")
        for value in (["ann", "much"], ["ann", 5], ["ann", "more"], None):
            driver.send("t", value, key="a")
        assert driver.read_values("out") == [
            {"n": 1, "cents": 1},
            {"n": 2, "cents": 6},
            {"n": 1, "cents": 1},
        ]
        assert driver.skipped == 2


def test_deleted_row_is_taken_away_although_its_function_failed_before() -> None:
    def unless_bad(account: Any) -> Any:
        if account[1] == "bad":
            raise ValueError("bad")
        return account

    job = Job("j")
    table = accounts(job).map(unless_bad, on_error="skip").group_by(owner, name="owners").count()
    table.to_stream().to(job.topic("out"))
    with Driver(job) as driver:
        for value in (["ann", 5], ["ann", "bad"], None):
            driver.send("t", value, key="a")
        driver.send("t", ["ann", 7], key="b")
        assert driver.table(table) == {"ann": 1}
        assert driver.skipped == 1
