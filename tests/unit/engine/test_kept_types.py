"""Decimals and times in windows, groups, running aggregates and handlers' state: exact, whatever crashes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import (
    Aggregate,
    Counted,
    Cumulative,
    Hopping,
    Job,
    MapState,
    Session,
    Sliding,
    Topic,
    Tumbling,
    ValueState,
    collect,
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
from fcluster.testing import Driver, JobStopped

BEGIN_MS = 1_767_225_600_000
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
NO_ID = UUID(int=0)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Shop(Enum):
    TEA = "tea"
    BOOKS = "books"


@dataclass
class Payment:
    branch: str
    amount: Decimal
    at: datetime
    took: timedelta = timedelta(seconds=1)
    id: UUID = NO_ID
    day: date = date(2026, 1, 1)
    opens: time = time(9)
    raw: bytes = b""
    level: Level = Level.LOW
    shop: Shop = Shop.TEA


def payment(amount: str, second: int = 0, **fields: Any) -> Payment:
    return Payment("north", Decimal(amount), BEGIN + timedelta(seconds=second), **fields)


def without(kept: list[Any], one: Payment) -> list[Any]:
    kept.remove({"$decimal": one.amount})
    return kept


AGGREGATES: dict[str, Aggregate[Any]] = {
    "total": sum_(lambda one: one.amount),
    "mean": mean(lambda one: one.amount),
    "spread": variance(lambda one: one.amount),
    "least": min_(lambda one: one.amount),
    "latest": max_(lambda one: one.at),
    "took": sum_(lambda one: one.took),
    "all": collect(lambda one: (one.amount, one.day)),
    "best": top_n(2, by=lambda one: (one.amount, one.at, one.id), of=lambda one: one.id),
    "reduced": reduce(
        lambda one, other: max(one, other), of=lambda one: one.amount, subtract=lambda one, _: one
    ),
    "own": Aggregate(
        "own",
        list,
        lambda kept, one: [*kept, {"$decimal": one.amount}],
        merge=lambda kept, later: kept + later,
        subtract=without,
    ),
}
TIMED: dict[str, Aggregate[Any]] = {
    "first": first(lambda one: one.opens),
    "last": last(lambda one: one.at),
}
WINDOWS = {
    "tumbling": Tumbling(seconds(4)),
    "hopping": Hopping(seconds(4), seconds(2)),
    "cumulative": Cumulative(seconds(4), seconds(2)),
    "session": Session(seconds(2)),
    "sliding": Sliding(seconds(2)),
    "counted": Counted(3, every=1),
}


def expected(found: Sequence[Payment]) -> dict[str, Any]:
    amounts = [one.amount for one in found]
    exact = list(map(Fraction, amounts))
    average = sum(exact) / len(exact)
    squares = sum((one - average) ** 2 for one in exact) / len(exact)
    ranked = sorted(found, key=lambda one: (one.amount, one.at, one.id), reverse=True)
    return {
        "total": sum(exact),
        "mean": average,
        "spread": squares,
        "least": min(amounts),
        "latest": max(one.at for one in found),
        "took": sum((one.took for one in found), timedelta()),
        "all": sorted([one.amount, one.day] for one in found),
        "best": [one.id for one in ranked[:2]],
    }


def computed(result: dict[str, Any]) -> dict[str, Any]:
    for name in ("total", "mean", "spread", "least"):
        assert type(result[name]) is Decimal
    assert type(result["latest"]) is datetime
    assert sorted(one["$decimal"] for one in result["own"]) == sorted(one[0] for one in result["all"])
    return {
        **{name: result[name] for name in ("least", "latest", "took", "best")},
        "all": sorted(result["all"]),
        "total": Fraction(result["total"]),
        # Rounded to 28 digits, which is enough for what these tests add up.
        "mean": Fraction(result["mean"]).limit_denominator(10**6),
        "spread": Fraction(result["spread"]).limit_denominator(10**6),
    }


def went(seen: list[Any]) -> Any:
    """A step that notes what reaches it, as it is."""

    def note(result: Any) -> None:
        seen.append(result)

    return note


plans = st.lists(
    st.tuples(st.integers(0, 3), st.decimals(-99, 99, places=2), st.integers(0, 3)), min_size=1, max_size=8
)


def play(
    job: Job, paid: Topic[Any, Payment], plan: Any, seed: int, key: str | None, partitions: int
) -> list[Payment]:
    """Send the payments of a plan, with barriers and crashes anywhere, and return them."""
    chance, at_s, sent = random.Random(seed), 0, list[Payment]()
    with Driver(job, partitions=partitions, auto_barrier=False) as driver:
        for number, (further, amount, took) in enumerate(plan):
            at_s += further
            one = payment(str(amount), at_s, took=timedelta(seconds=took), id=UUID(int=number))
            sent.append(one)
            partition, timestamp_ms = chance.randrange(partitions), BEGIN_MS + at_s * 1_000
            driver.send(paid, one, key=key, timestamp=timestamp_ms, partition=partition)
            if chance.random() < 0.4:
                driver.barrier()
            elif chance.random() < 0.3:
                driver.crash()
        driver.settle()
        driver.finish()
    return sent


@pytest.mark.parametrize("emit", ["close", "update", "interval"])
@pytest.mark.parametrize("name", sorted(WINDOWS))
@settings(max_examples=12)
@given(plan=plans, seed=st.integers(0, 9))
def test_windows_compute_with_what_json_lacks(name: str, emit: Any, plan: Any, seed: int) -> None:
    """Barriers and crashes are anywhere, so state is read again at any time."""
    job = Job("j")
    paid = job.topic("paid", value=Payment)
    seen: list[Any] = []
    window = job.stream(paid).window(WINDOWS[name], name="w", emit=seconds(2) if emit == "interval" else emit)
    window.aggregate(**AGGREGATES, **TIMED).map(went(seen)).to("out")
    sent = play(job, paid, plan, seed, key="k", partitions=1)
    for result in seen:
        if result.get("withdrawn") or not isinstance(WINDOWS[name], Tumbling | Sliding | Session):
            continue
        inside = [one for one in sent if result["start"] <= one.at.timestamp() * 1_000 < result["end"]]
        if emit == "close":
            assert computed(result) == expected(inside)
        else:
            computed(result)
    assert seen or name == "counted"


@pytest.mark.parametrize("emit", ["close", "update", "interval"])
@settings(max_examples=15)
@given(plan=plans, seed=st.integers(0, 9))
def test_parts_of_all_records_are_put_together_exactly(emit: Any, plan: Any, seed: int) -> None:
    job = Job("j")
    paid = job.topic("paid", value=Payment)
    seen: list[Any] = []
    window = job.stream(paid).window_all(
        Tumbling(seconds(100)), name="w", emit=seconds(2) if emit == "interval" else emit
    )
    window.aggregate(**AGGREGATES, **TIMED).map(went(seen)).to("out")
    sent = play(job, paid, plan, seed, key=None, partitions=2)
    most = max(seen, key=lambda result: len(result["all"]))
    assert computed(most) == expected(sent)
    assert most["first"] == time(9)
    assert most["last"] == max(one.at for one in sent)


@settings(max_examples=25)
@given(plan=plans, seed=st.integers(0, 9))
def test_rows_that_change_and_leave_are_taken_away_exactly(plan: Any, seed: int) -> None:
    job = Job("j")
    rows = job.table(job.topic("rows", value=Payment))
    groups = rows.group_by(lambda one: one.branch, name="g").aggregate(**AGGREGATES)
    groups.to_stream().to("out")
    chance, left = random.Random(seed), dict[str, Payment]()
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for number, (key, amount, took) in enumerate(plan):
            one = payment(str(amount), number, took=timedelta(seconds=took), id=UUID(int=number))
            gone = chance.random() < 0.3
            driver.send("rows", None if gone else one, key=str(key))
            if gone:
                left.pop(str(key), None)
            else:
                left[str(key)] = one
            if chance.random() < 0.4:
                driver.barrier()
            elif chance.random() < 0.3:
                driver.crash()
        driver.settle()
        found = driver.table(groups)
    assert bool(found.get("north", {}).get("all")) == bool(left)
    if left:
        del found["north"]["reduced"]
        assert computed(found["north"]) == expected(list(left.values()))


@settings(max_examples=25)
@given(plan=plans, seed=st.integers(0, 9))
def test_running_aggregates_go_on_after_a_crash(plan: Any, seed: int) -> None:
    job = Job("j")
    paid = job.topic("paid", value=Payment)
    table = job.stream(paid).aggregate(**AGGREGATES, **TIMED, name="t")
    table.to_stream().to("out")
    chance, sent = random.Random(seed), []
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for number, (_further, amount, took) in enumerate(plan):
            one = payment(str(amount), number, took=timedelta(seconds=took), id=UUID(int=number))
            sent.append(one)
            driver.send(paid, one, key="k", timestamp=number)
            if chance.random() < 0.4:
                driver.barrier()
            elif chance.random() < 0.3:
                driver.crash()
        driver.settle()
        row = driver.table(table)["k"]
        assert [value["total"] for value in driver.read_values("out")][-1] == str(row["total"])
    assert computed(row) == expected(sent)


# --- what becomes of results ------------------------------------------------------------------------------


def test_results_in_json_are_the_text_that_a_model_writes() -> None:
    job = Job("j")
    paid = job.topic("paid", value=Payment)
    window = job.stream(paid).window(Counted(1), name="w")
    window.aggregate(**AGGREGATES).map(lambda result: {**result, "own": None}).to("out")
    with Driver(job, partitions=1) as driver:
        driver.send(paid, payment("12.30", 5), key="k", timestamp=0)
        (result,) = driver.read_values("out")
    assert (result["total"], result["mean"], result["took"]) == ("12.30", "12.30", "PT1S")
    assert result["latest"] == "2026-01-01T00:00:05+00:00"
    assert result["all"] == [["12.30", "2026-01-01"]]


@dataclass
class Total:
    key: str
    total: Decimal
    latest: datetime
    took: timedelta


def test_results_of_a_model_go_through_a_key_by_and_to_a_topic() -> None:
    job = Job("j")
    paid, totals = job.topic("paid", value=Payment), job.topic("totals", value=Total)
    window = job.stream(paid).window(Counted(1), name="w")
    window.aggregate(**{name: AGGREGATES[name] for name in ("total", "latest", "took")}).map(
        lambda one: Total(one["key"], one["total"], one["latest"], one["took"])
    ).key_by("key", value=Total, name="again").filter(lambda total: total.total > 5).to(totals)
    with Driver(job, partitions=1) as driver:
        for amount in ("12.30", "5.00"):
            driver.send(paid, payment(amount), key="k", timestamp=0)
        assert driver.read_values(totals) == [Total("k", Decimal("12.30"), BEGIN, timedelta(seconds=1))]


def test_decimals_of_dicts_do_not_become_text_behind_a_key_by() -> None:
    job = Job("j")
    window = job.stream(job.topic("paid", value=Payment)).window(Counted(1), name="w")
    window.aggregate(total=AGGREGATES["total"]).key_by("key", name="again").filter(bool).to("out")
    with (
        pytest.raises(JobStopped, match=r"the value\['total'\] .* Decimal, which would be text behind it"),
        Driver(job, partitions=1) as driver,
    ):
        driver.send("paid", payment("1"), key="k", timestamp=0)


def test_field_with_decimals_and_floats_is_named() -> None:
    job = Job("j")
    window = job.stream(job.topic("in")).window(Tumbling(seconds(1)), name="w")
    window.aggregate(n=count_distinct(), total=sum_(lambda one: Decimal(one) if one == "1" else one)).to(
        "out"
    )
    with Driver(job, partitions=1) as driver:
        driver.send("in", "1", key="k", timestamp=0)
        with pytest.raises(
            JobStopped, match=r"in the field 'total' of the window 'w': .*Decimals and float values"
        ):
            driver.send("in", 0.5, key="k", timestamp=0)


class Visit(pydantic.BaseModel):
    price: Decimal
    at: datetime
    shop: Shop


def test_enums_are_their_values_and_time_zones_the_offsets_of_a_moment() -> None:
    job = Job("j")
    visits = job.topic("visits", value=Visit)
    berlin = ZoneInfo("Europe/Berlin")
    seen: list[Any] = []
    job.stream(visits).window(Counted(2), name="w").aggregate(
        shop=first(lambda one: one.shop),
        most=max_(lambda one: one.shop),
        at=max_(lambda one: one.at),
        local=max_(lambda one: one.at.astimezone(berlin)),
        level=sum_(lambda one: Level.HIGH),
        pairs=collect(lambda one: (one.shop, one.at.astimezone(berlin))),
    ).map(went(seen)).to("out")
    with Driver(job, partitions=1) as driver:
        for shop, hour in ((Shop.TEA, 0), (Shop.BOOKS, 1)):
            driver.send(
                visits, Visit(price=Decimal(1), at=BEGIN.replace(hour=hour), shop=shop), key="k", timestamp=0
            )
    (result,) = seen
    assert (result["shop"], result["most"], result["level"]) == ("tea", "tea", 4)
    assert (result["at"].isoformat(), result["local"].isoformat()) == (
        "2026-01-01T01:00:00+00:00",
        "2026-01-01T02:00:00+01:00",
    )
    assert result["pairs"] == [["tea", BEGIN], ["books", BEGIN.replace(hour=1)]]


# --- handlers' state --------------------------------------------------------------------------------------

BALANCE: ValueState[Any] = ValueState("balance")
BY_DAY: MapState[str, Any] = MapState("by-day")


def account_job(on_error: Any = "stop") -> Job:
    job = Job("j")
    paid = job.topic("paid", value=Payment)

    def book(ctx: Any, one: Payment) -> Any:
        ctx.state["total"] = ctx.state.get("total", Decimal(0)) + one.amount
        ctx.state.setdefault("seen", []).append(one.at)
        balance, days = ctx.value(BALANCE), ctx.map(BY_DAY)
        balance.set(balance.get(Decimal(0)) + one.amount)
        days[str(one.day)] = {"took": days.get(str(one.day), {"took": timedelta()})["took"] + one.took}
        if one.amount < 0:
            raise ValueError("negative")
        return {"total": ctx.state["total"], "balance": balance.get(), "took": days[str(one.day)]["took"]}

    job.stream(paid).process(book, name="book", states=[BALANCE, BY_DAY], to="out", on_error=on_error)
    return job


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_state_of_handlers_holds_what_json_lacks(on_error: Any) -> None:
    with Driver(account_job(on_error), partitions=1, auto_barrier=False) as driver:
        for amount in ("1.10", "2.20", "3.30"):
            driver.send("paid", payment(amount), key="k")
            driver.barrier()
            if on_error == "skip":
                driver.send("paid", payment("-1"), key="k")
                driver.barrier()
            driver.crash()
        driver.settle()
        assert driver.read_values("out")[-1] == {"total": "6.60", "balance": "6.60", "took": "PT3S"}
        assert driver.state("book", "k") == {"total": Decimal("6.60"), "seen": [BEGIN] * 3}


def test_state_from_before_goes_on() -> None:
    """Without such values, state has the bytes that it always had; a Decimal may come at any time."""
    job = Job("j")

    @job.process(job.topic("in"), to="out", name="h")
    def handle(ctx: Any, value: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        ctx.state["seen"] = [
            *ctx.state.get("seen", []),
            Decimal(value) if value == "1.5" else {"$decimal": value},
        ]
        return len(ctx.state["seen"])

    with Driver(job, partitions=1) as driver:
        for value in ("1", "1.5", "2"):
            driver.send("in", value, key="k")
            driver.crash()
        seen = driver.state("h", "k")["seen"]
    assert seen == [{"$decimal": "1"}, Decimal("1.5"), {"$decimal": "2"}]
