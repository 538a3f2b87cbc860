"""Functions with two parameters: they get the context of their record or row, and then the value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fcluster import Header, Job, Record, Tumbling, count, minutes, seconds
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.graph.outline import outline
from fcluster.testing import Driver, JobStopped

SENSOR: Header[str] = Header("sensor")


def stream_with(grow: Callable[[Any], Any]) -> Job:
    job = Job("j")
    grow(job.stream(job.topic("in"))).to(job.topic("out"))
    return job


def results(job: Job, *records: tuple[str | None, Any], **options: Any) -> list[tuple[Any, Any]]:
    """Key and value of each output, if these keys and values are sent."""
    with Driver(job) as driver:
        for key, value in records:
            driver.send("in", value, key=key, **options)
        return [(record.key, record.value) for record in driver.read("out")]


def test_map_sees_key_time_headers_and_where_the_record_is_from() -> None:
    def described(ctx: Any, value: Any) -> dict[str, Any]:
        return {
            "value": value,
            "key": ctx.key,
            "at": ctx.timestamp,
            "sensor": ctx.header(SENSOR, "none"),
            "headers": [name for name, _value in ctx.headers],
            "from": [ctx.topic, ctx.partition, ctx.offset],
        }

    job = stream_with(lambda stream: stream.map(described))
    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a", timestamp=5, headers=[SENSOR.pair("s1")])
        driver.send("in", 2)
        first, second = driver.read_values("out")
    assert first == {
        "value": 1,
        "key": "a",
        "at": 5,
        "sensor": "s1",
        "headers": ["sensor"],
        "from": ["in", 0, 0],
    }
    assert (second["key"], second["sensor"], second["from"]) == (None, "none", ["in", 0, 1])


def test_each_kind_of_step_may_see_the_key() -> None:
    sent = [("a", 1), ("b", 2)]
    seen: list[Any] = []

    def twice(ctx: Any, value: Any) -> Iterator[Any]:
        yield [ctx.key, value]
        yield [ctx.key, -value]

    assert results(stream_with(lambda s: s.filter(lambda ctx, _: ctx.key == "b")), *sent) == [("b", 2)]
    assert results(stream_with(lambda s: s.flat_map(twice)), ("a", 1)) == [("a", ["a", 1]), ("a", ["a", -1])]
    assert results(stream_with(lambda s: s.peek(lambda ctx, v: seen.append((ctx.key, v)))), *sent) == sent
    assert seen == sent
    job = Job("j")
    branches = job.stream(job.topic("in")).branch(lambda value: value == 3, lambda ctx, _: ctx.key == "b")
    for number, branch in enumerate(branches):
        branch.map(lambda ctx, value, number=number: [number, ctx.key, value]).to(job.topic("out"))
    sent = [*sent, ("b", 3)]
    assert [value for _key, value in results(job, *sent)] == [[2, "a", 1], [1, "b", 2], [0, "b", 3]]


def test_new_key_is_made_of_the_former_one_and_the_value() -> None:
    job = stream_with(lambda s: s.key_by(lambda ctx, value: f"{ctx.key}/{value}"))
    assert results(job, ("a", 1), ("b", 2)) == [("a/1", 1), ("b/2", 2)]


def test_map_in_front_of_a_key_by_keeps_the_former_key() -> None:
    def grow(stream: Any) -> Any:
        named = stream.map(lambda ctx, value: {**value, "sensor": ctx.key})
        return named.key_by("room").process(lambda ctx, value: [ctx.key, value["sensor"]], name="h")

    assert results(stream_with(grow), ("s1", {"room": "attic"})) == [("attic", ["attic", "s1"])]


def test_behind_a_key_by_it_is_the_new_key() -> None:
    def grow(stream: Any) -> Any:
        return stream.key_by("room", name="rooms").map(lambda ctx, _: ctx.key)

    assert results(stream_with(grow), ("s1", {"room": "attic"})) == [("attic", "attic")]


def test_behind_a_window_and_a_handler_it_is_what_they_pass_on() -> None:
    job = Job("j")
    counted = job.stream(job.topic("in")).window(Tumbling(minutes(1)), name="w").aggregate(n=count())
    counted.map(lambda ctx, result: [ctx.key, ctx.timestamp, result["n"]]).to(job.topic("out"))
    later = job.stream(job.topic("in")).process(
        lambda ctx, value: Record(value=value, timestamp=77), name="h"
    )
    later.map(lambda ctx, value: [ctx.key, ctx.timestamp, value]).to(job.topic("later"))
    with Driver(job, partitions=1) as driver:
        driver.send("in", 1, key="a", timestamp=1_000)
        driver.advance(to_ms=60_000, clock="event")
        assert driver.read_values("out") == [["a", 59_999, 1]]
        assert driver.read_values("later") == [["a", 77, 1]]


def test_beside_joins_it_is_the_key_of_the_record() -> None:
    job = Job("j")
    rows = job.table(job.topic("rows")).map(lambda ctx, row: f"{row} of {ctx.key}")
    everywhere = job.global_table(job.topic("all"), name="all").filter(lambda ctx, _: ctx.key != "a/no")
    stream = job.stream(job.topic("in"))
    stream.join(rows).map(lambda ctx, both: [ctx.key, both["right"]]).to(job.topic("out"))
    joined = stream.join(everywhere, on=lambda ctx, value: f"{ctx.key}/{value}")
    joined.map(lambda both: both["right"]).to(job.topic("named"))
    near = stream.join(job.stream(job.topic("other")), within=seconds(1), name="near")
    near.map(lambda ctx, both: [ctx.key, both["left"], both["right"]]).to(job.topic("pairs"))
    with Driver(job) as driver:
        driver.send("rows", "row", key="a", timestamp=1)
        driver.send("all", "found", key="a/x", timestamp=1)
        driver.send("all", "never", key="a/no", timestamp=1)
        driver.send("other", 5, key="a", timestamp=2)
        driver.send("in", "x", key="a", timestamp=2)
        driver.send("in", "no", key="a", timestamp=2)
        assert driver.read_values("out") == [["a", "row of a"]] * 2
        assert driver.read_values("named") == ["found"]
        assert driver.read_values("pairs") == [["a", "x", 5], ["a", "no", 5]]


def test_steps_in_front_of_a_call_see_the_key_once() -> None:
    async def called(_call: Any, value: Any) -> Any:
        return value

    def grow(stream: Any) -> Any:
        return stream.filter(lambda ctx, _: ctx.key == "a").map(lambda ctx, v: [ctx.key, v]).map_async(called)

    assert results(stream_with(grow), ("a", 1), ("b", 2)) == [("a", ["a", 1])]


def test_key_has_the_kind_that_the_topic_declares() -> None:
    job = Job("j")
    numbers = job.topic("in", key="int")
    job.stream(numbers).filter(lambda ctx, _: ctx.key > 5).to(job.topic("out", key="int"))
    evens = job.table(numbers, name="rows").filter(lambda ctx, _: ctx.key % 2 == 0)
    evens.to_stream().to(job.topic("evens", key="int"))
    with Driver(job) as driver:
        driver.send("in", "a", key=4)
        driver.send("in", "b", key=7)
        assert [record.key for record in driver.read("out")] == [7]
        assert driver.table(evens) == {4: "a"}


def test_table_is_grouped_and_joined_by_its_key() -> None:
    job = Job("j")
    accounts = job.table(job.topic("accounts"))
    groups = accounts.group_by(
        lambda ctx, _: ctx.key[0], name="per-letter", value=lambda ctx, cents: [ctx.key, cents]
    ).aggregate(n=count())
    owners = job.table(job.topic("owners"))
    owned = accounts.join(owners, on=lambda ctx, _: ctx.key[0], name="owned")
    groups.to_stream().to(job.topic("out"))
    owned.to_stream().to(job.topic("owned"))
    with Driver(job) as driver:
        driver.send("owners", "Ann", key="a")
        driver.send("accounts", 5, key="a1")
        driver.send("accounts", 7, key="a2")
        driver.send("accounts", None, key="a1")
        assert driver.table(groups) == {"a": {"n": 1}}
        assert driver.table(owned) == {"a2": {"left": 7, "right": "Ann"}}


def scaled(factor: int, value: int) -> int:
    return factor * value


def with_options(value: int, factor: int = 3) -> int:
    return value * factor


class Scale:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, value: int) -> int:
        return value * self.factor

    def seen(self, ctx: Any, value: int) -> list[Any]:
        return [ctx.key, value * self.factor]


def any_number(*values: Any) -> int:
    return len(values)


@pytest.mark.parametrize(
    ("function", "result"),
    [
        (functools.partial(scaled, 3), 6),
        (with_options, 6),
        (Scale(3), 6),
        (Scale(3).seen, ["k", 6]),
        (any_number, 1),
        (str, "2"),
        (lambda value, factor=3: value * factor, 6),
        (functools.partial(lambda factor, ctx, value: [ctx.key, factor * value], 3), ["k", 6]),
        (lambda ctx, value, factor=3: [ctx.key, factor * value], ["k", 6]),
    ],
)
def test_who_can_be_called_with_the_value_alone_is(function: Any, result: Any) -> None:
    assert results(stream_with(lambda stream: stream.map(function)), ("k", 2)) == [("k", result)]


@pytest.mark.parametrize(
    "function",
    [
        lambda sensor, _value: sensor == "s1",
        lambda sensor, _value: sensor in {"s1"},
        lambda sensor, _value: f"{sensor}/1",
        lambda sensor, _value: {"s1": 1}.get(sensor),
    ],
)
def test_context_that_is_taken_for_the_key_or_the_value_fails(function: Any) -> None:
    told = (
        "the first argument, ctx, is what is known about the record, and was used like its key or its value"
    )
    job = stream_with(lambda stream: stream.filter(function))
    with Driver(job) as driver, pytest.raises(JobStopped, match=told):
        driver.send("in", 1, key="s1")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda ctx, _: ctx.keys, "did you mean ctx.key?"),
        (lambda ctx, _: ctx.state, "only the ctx of a handler has 'state': use .process(handler)"),
        (lambda ctx, _: ctx.nothing, "it has key, timestamp, headers, header, topic, partition, offset"),
    ],
)
def test_what_the_context_does_not_have_is_told(function: Any, told: str) -> None:
    job = stream_with(lambda stream: stream.map(function))
    with Driver(job) as driver, pytest.raises(JobStopped) as stopped:
        driver.send("in", 1, key="s1")
    assert told in str(stopped.value)


def test_failure_of_the_function_follows_the_rule_of_its_step() -> None:
    def grow(stream: Any) -> Any:
        return stream.map(lambda ctx, value: ctx.key.upper(), on_error="skip")

    job = stream_with(grow)
    with Driver(job) as driver:
        driver.send("in", 1)
        driver.send("in", 1, key="a")
        driver.send_raw("in", b"1", key=b"\xff")
        assert driver.read_values("out") == ["A"]
        assert driver.skipped == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda key, value: value,
        lambda k, v: v,
        lambda value, ctx: value,
        lambda value, key: value,
        dict.get,
    ],
)
def test_parameters_in_the_order_of_other_libraries_are_refused(function: Any) -> None:
    job = Job("j")
    stream, table = job.stream(job.topic("in")), job.table(job.topic("rows"))
    for step in (stream.filter, stream.map, stream.peek, stream.branch, stream.key_by, stream.flat_map):
        with pytest.raises(JobError, match="is called with the context of the record, and then its value"):
            step(function)
    with pytest.raises(JobError, match="is called with the context of the row, and then its value"):
        table.map(function)


def test_outline_says_who_is_called_with_a_context() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).filter(bool).map(lambda ctx, value: value)
    stream.key_by(lambda ctx, value: ctx.key).to(job.topic("out"))
    (chain,) = outline(job.build(Settings())).stages[0].chains
    details = [step.details.get("called_with") for step in chain.steps]
    assert details == [None, "context, value", "context, value", None]


def test_state_is_refused_if_the_key_is_made_in_another_way() -> None:
    def fingerprint(by: Any) -> str:
        job = Job("j")
        job.stream(job.topic("in")).key_by(by, name="k").process(lambda ctx, value: None, name="h")
        return job.build(Settings()).fingerprint

    assert fingerprint(lambda ctx, value: ctx.key) == fingerprint(lambda context, v: context.key)
    assert fingerprint(lambda ctx, value: ctx.key) != fingerprint(lambda ctx, value: value)
    assert fingerprint(lambda ctx, value: value) != fingerprint(lambda value: value)
