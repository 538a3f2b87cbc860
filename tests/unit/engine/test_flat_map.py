"""`flat_map`: from one value to any number of values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fcluster import Job
from fcluster.common.errors import JobError
from fcluster.common.settings import Settings
from fcluster.testing import Driver, JobStopped
from fcluster.worker.processing import running_step


def items_of(order: Any) -> Iterator[Any]:
    for item in order["items"]:
        yield {"order": order["id"], "item": item}


def job_with(function: Callable[[Any], Any], **options: Any) -> Job:
    job = Job("j")
    job.topic("dead")
    stream = job.stream(job.topic("in"))
    stream.flat_map(function, **options).to(job.topic("out"))
    return job


def raw_values(driver: Driver, topic: str = "out") -> list[bytes | None]:
    return [record.raw_value for record in driver.read(topic)]


# --- values ---------------------------------------------------------------------------------------------


def test_each_value_is_a_record_with_key_timestamp_and_headers_of_its_source() -> None:
    with Driver(job_with(items_of)) as driver:
        driver.send(
            "in", {"id": 1, "items": ["a", "b"]}, key="k", timestamp=5, headers=[("h", b"1"), ("h", None)]
        )
        driver.send("in", {"id": 2, "items": []}, key="k")
        driver.send("in", {"id": 3, "items": ["c"]}, key="l", timestamp=6)
        records = driver.read("out")
    assert [record.value for record in records] == [
        {"order": 1, "item": "a"},
        {"order": 1, "item": "b"},
        {"order": 3, "item": "c"},
    ]
    headers = [("h", b"1"), ("h", None)]
    assert [(record.key, record.timestamp, record.headers) for record in records] == [
        ("k", 5, headers),
        ("k", 5, headers),
        ("l", 6, []),
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda value: [value, value + 1],
        lambda value: (value, value + 1),
        lambda value: iter([value, value + 1]),
        lambda value: range(value, value + 2),
        lambda value: {value: None, value + 1: None}.keys(),
        lambda value: map(int, (value, value + 1)),
    ],
    ids=["list", "tuple", "iterator", "range", "keys", "map"],
)
def test_any_iterable_of_values_is_accepted(function: Callable[[Any], Any]) -> None:
    with Driver(job_with(function)) as driver:
        driver.send("in", 1, key="k")
        assert driver.read_values("out") == [1, 2]


def test_value_passes_all_steps_before_the_next_is_requested() -> None:
    seen: list[str] = []

    def same_again(value: Any) -> Iterator[Any]:
        for number in range(3):
            seen.append(f"made {number}")
            value["number"] = number
            yield value

    def number_of(_ctx: Any, value: Any) -> Any:
        seen.append(f"used {value['number']}")
        return value

    job = Job("j")
    job.stream(job.topic("in")).flat_map(same_again).process(number_of, to=job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", {}, key="k")
        assert driver.read_values("out") == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert seen == ["made 0", "used 0", "made 1", "used 1", "made 2", "used 2"]


def test_handler_after_it_counts_each_value_once_despite_a_crash() -> None:
    def count(ctx: Any, value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return {**value, "n": ctx.state["n"]}

    job = Job("j")
    stream = job.stream(job.topic("in")).flat_map(items_of)
    stream.key_by("item").process(count, to=job.topic("out"))
    with Driver(job, auto_barrier=False) as driver:
        driver.send("in", {"id": 1, "items": ["a", "b", "a"]}, key="k")
        driver.barrier()
        driver.send("in", {"id": 2, "items": ["a", "c"]}, key="k")
        driver.crash()
        driver.settle()
        assert driver.states("count") == {"a": {"n": 3}, "b": {"n": 1}, "c": {"n": 1}}
        assert len(driver.read("out")) == 5


# --- tombstones -----------------------------------------------------------------------------------------


def test_tombstone_arrives_as_none_and_none_is_written_as_a_tombstone() -> None:
    def halves(value: Any) -> list[Any]:
        return [None] if value is None else [value / 2, value / 2]

    with Driver(job_with(halves)) as driver:
        driver.send("in", 3, key="k")
        driver.send("in", None, key="k")
        assert raw_values(driver) == [b"1.5", b"1.5", None]


def test_tombstone_that_gives_no_value_is_not_passed_on() -> None:
    with Driver(job_with(lambda value: [] if value is None else [value])) as driver:
        driver.send("in", None, key="k")
        assert driver.read("out") == []


def test_none_for_a_value_is_json_null_and_not_a_tombstone() -> None:
    with Driver(job_with(lambda value: [None, value])) as driver:
        driver.send("in", 1, key="k")
        assert raw_values(driver) == [b"null", b"1"]


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, r"its function returned None; return a list of values, \[\] if there are none"),
        (5, r"its function returned one value \(int\); return a list of values, \[value\] if it is one"),
        ("text", r"returned one value \(str\)"),
        (b"bytes", r"returned one value \(bytes\)"),
        ({"a": 1}, r"returned one value \(dict\)"),
        (
            {1, 2},
            r"returned a set, whose order isn't the same in every process; return sorted\(\.\.\.\) of it",
        ),
        (frozenset({1}), "returned a frozenset, whose order"),
    ],
)
def test_anything_but_a_list_of_values_fails_with_what_to_return(values: Any, says: str) -> None:
    with Driver(job_with(lambda _value: values)) as driver, pytest.raises(JobStopped, match=says) as stop:
        driver.send("in", 1, key="k")
    assert "failed in flat_map '<lambda>' (step 1 of 'in-to-out')" in str(stop.value)
    assert driver.records("out") == []


@pytest.mark.parametrize("rule", ["stop", "skip", "dead"])
def test_failure_at_a_later_value_leaves_nothing_of_the_earlier_ones(rule: str) -> None:
    def total(ctx: Any, value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return value

    job = Job("j")
    on_error: Any = job.topic("dead", value="bytes") if rule == "dead" else rule
    stream = job.stream(job.topic("in")).flat_map(items_of, on_error=on_error)
    stream.process(total, to=job.topic("out"))
    with Driver(job) as driver:
        if rule == "stop":
            with pytest.raises(JobStopped, match=r"failed in flat_map 'items_of'.*TypeError") as stop:
                driver.send("in", {"id": 1, "items": 5}, key="k")
            assert stop.value.offset == 0
        else:
            driver.send("in", {"id": 1, "items": 5}, key="k")
            driver.send("in", {"id": 2, "items": ["a"]}, key="k")
            assert driver.state("total", "k") == {"n": 1}
        assert len(driver.records("out")) == (0 if rule == "stop" else 1)
        letters = driver.dead_letters()
    assert [letter.handler for letter in letters] == (
        ["flat_map 'items_of' (step 1 of 'total')"] if rule == "dead" else []
    )


def test_generator_that_fails_after_a_value_leaves_no_trace_of_it() -> None:
    def one_and_a_failure(value: Any) -> Iterator[Any]:
        yield value
        raise ValueError("no more")

    with Driver(job_with(one_and_a_failure, on_error="skip")) as driver:
        driver.send("in", 1, key="k")
        assert (driver.records("out"), driver.skipped) == ([], 1)


def test_failure_of_a_later_step_follows_that_steps_rule_and_the_generator_ends_at_once() -> None:
    seen: list[str] = []

    def two(value: Any) -> Iterator[Any]:
        try:
            yield value
            yield value
        finally:
            seen.append("ended")

    def fail(_value: Any) -> Any:
        seen.append("failed")
        raise ValueError("no good")

    job = Job("j")
    stream = job.stream(job.topic("in")).flat_map(two, on_error="stop").map(fail, on_error="skip")
    stream.to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", 1, key="k")
        seen.append("next")
        driver.send("in", 2, key="k")
        assert driver.skipped == 2
    assert seen == ["failed", "ended", "next", "failed", "ended"]


def test_step_is_named_while_its_generator_runs() -> None:
    seen: list[str] = []

    def looking(value: Any) -> Iterator[Any]:
        seen.append(running_step(sys._getframe()))  # pyright: ignore[reportPrivateUsage]
        yield value

    with Driver(job_with(looking)) as driver:
        driver.send("in", 1, key="k")
    assert seen == ["flat_map 'looking' (step 1 of 'in-to-out')"]


# --- building -------------------------------------------------------------------------------------------


def test_values_after_it_are_json_in_a_repartition_topic_like_after_a_map() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in", value="text")).flat_map(str.split)
    stream.key_by(lambda word: word).process(lambda _ctx, word: word, name="h")
    (_first, second) = job.build(Settings()).stages
    assert second.inputs[0].topic.value == "json"


def test_adding_it_leaves_the_fingerprint_as_it_is() -> None:
    def built(with_flat_map: bool) -> str:
        job = Job("j")
        stream = job.stream(job.topic("in"))
        stream = stream.flat_map(items_of) if with_flat_map else stream
        stream.process(lambda _ctx, value: value, name="h")
        return job.build(Settings()).fingerprint

    assert built(True) == built(False)


def test_stream_that_ends_in_it_is_refused() -> None:
    job = Job("j")
    job.stream(job.topic("in")).flat_map(items_of)
    with pytest.raises(JobError, match="ends in a flat_map with nothing after it"):
        job.build(Settings())


@pytest.mark.parametrize("step", ["map", "filter", "key_by"])
def test_generator_for_another_step_is_refused_with_a_hint_at_flat_map(step: str) -> None:
    job = Job("j")
    stream = job.stream(job.topic("in"))
    with pytest.raises(JobError) as caught:
        getattr(stream, step)(items_of)
    assert ".flat_map(function)" in caught.value.remedy


def test_async_function_is_refused() -> None:
    async def values(_value: Any) -> Any:
        yield 1

    job = Job("j")
    with pytest.raises(JobError, match="async def"):
        job.stream(job.topic("in")).flat_map(values)  # type: ignore[arg-type]
