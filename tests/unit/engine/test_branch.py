"""`branch`: each record goes one of several ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Job
from fcluster.common.errors import JobError
from fcluster.common.failures import Failure
from fcluster.common.settings import Settings
from fcluster.engine.failure import Condemnation
from fcluster.testing import Driver, JobStopped
from tests.unit.worker.processing_bench import Bench

WAYS = ("first", "second", "rest")


def job_with(*functions: Callable[[Any], Any], **options: Any) -> Job:
    """A job that writes each way to its own topic."""
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    if options.get("on_error") == "dead":
        options["on_error"] = dead
    ways = job.stream(job.topic("in")).branch(*functions, **options)
    assert len(ways) == len(functions) + 1
    for name, way in zip(WAYS[-len(ways) :], ways, strict=True):
        way.to(job.topic(name))
    return job


def sent(job: Job, *values: Any) -> dict[str, list[Any]]:
    """What each way gets."""
    with Driver(job) as driver:
        for value in values:
            driver.send("in", value, key="k")
        return {topic: driver.read_values(topic) for topic in WAYS}


def is_even(value: int) -> bool:
    return value % 2 == 0


def is_large(value: int) -> bool:
    return value > 10


def test_record_goes_the_first_way_that_takes_it_or_the_last_one() -> None:
    assert sent(job_with(is_even, is_large), 2, 11, 12, 3) == {"first": [2, 12], "second": [11], "rest": [3]}


def test_record_goes_on_with_its_bytes_key_timestamp_and_headers() -> None:
    raw = b'{"n":  1.50}'
    with Driver(job_with(lambda value: False, lambda value: [value])) as driver:
        driver.send_raw("in", raw, key=b"k", timestamp=5, headers=[("h", b"1")])
        driver.send("in", None, key="k")
        (first, second) = driver.read("second")
    assert (first.raw_value, first.key, first.timestamp, first.headers) == (raw, "k", 5, [("h", b"1")])
    assert second.raw_value is None


def fails_on_5(value: int) -> bool:
    if value == 5:
        raise ValueError("five")
    return False


@pytest.mark.parametrize("functions", [(fails_on_5, is_large), (is_large, fails_on_5)])
def test_record_for_which_a_function_fails_is_one_failure_and_goes_no_way(functions: Any) -> None:
    with Driver(job_with(*functions, on_error="dead")) as driver:
        for value in (5, 50, 1):
            driver.send("in", value, key="k")
        large = WAYS[functions.index(is_large)]
        written = {way: driver.read_values(way) for way in WAYS}
        assert written == {"first": [], "second": [], "rest": [1]} | {large: [50]}
        (letter,) = driver.dead_letters()
        assert letter.error == "ValueError: five"
        assert letter.handler.startswith("branch 'fails_on_5' (step 1 of ")
        assert driver.skipped == 1


def test_function_behind_the_one_that_takes_the_record_is_not_called() -> None:
    assert sent(job_with(lambda value: True, fails_on_5), 5)["first"] == [5]


def test_failure_stops_the_job_there() -> None:
    with (
        Driver(job_with(is_large, fails_on_5)) as driver,
        pytest.raises(JobStopped, match="in branch 'fails"),
    ):
        driver.send("in", 5, key="k")


def test_rest_may_stay_unused() -> None:
    job = Job("j")
    even, _ = job.stream(job.topic("in")).branch(is_even)
    even.to(job.topic("out"))
    with Driver(job) as driver:
        for value in (1, 2, 3):
            driver.send("in", value, key="k")
        assert driver.read_values("out") == [2]


def test_other_ways_that_lead_nowhere_are_refused() -> None:
    job = Job("j")
    _, odd = job.stream(job.topic("in")).branch(is_even)
    odd.to(job.topic("out"))
    with pytest.raises(JobError, match="ends in a branch with nothing after it"):
        job.build(Settings())


def test_ways_can_be_merged_again_and_each_have_state() -> None:
    job = Job("j")
    out = job.topic("out")
    even, odd = job.stream(job.topic("in")).branch(is_even)

    def count(ctx: Any, value: Any) -> Any:
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return [value, ctx.state["n"]]

    even.process(count, name="even", to=out)
    job.merge(even.map(lambda value: value * 100), odd).process(count, name="both", to=out)
    with Driver(job) as driver:
        for value in (2, 3):
            driver.send("in", value, key="k")
        assert sorted(driver.read_values("out")) == [[2, 1], [3, 2], [200, 1]]


def test_branch_behind_a_handler_is_refused_with_what_to_do() -> None:
    job = Job("j")
    ways = job.stream(job.topic("in")).process(lambda ctx, value: value, name="h").branch(is_even)
    for number, way in enumerate(ways):
        way.to(job.topic(f"out-{number}"))
    with pytest.raises(JobError, match="The output of 'h' is used in 2 places") as caught:
        job.build(Settings())
    assert ".through(topic)" in caught.value.remedy


@pytest.mark.parametrize("function", [5, lambda: None, lambda value: (yield value)])
def test_function_that_does_not_fit_is_refused(function: Any) -> None:
    with pytest.raises(JobError, match="branch"):
        job_with(is_even, function)


def test_branch_without_functions_is_refused_with_how_to_write_it() -> None:
    with pytest.raises(JobError, match="got no functions") as caught:
        job_with()
    assert "stream.branch(is_paid)" in caught.value.remedy


@given(
    st.lists(st.dictionaries(st.integers(0, 5), st.sampled_from([True, "fails"])), min_size=1, max_size=3),
    st.lists(st.integers(0, 5), max_size=6),
)
def test_every_record_goes_exactly_one_way_or_fails_once(
    tables: list[dict[int, Any]], values: list[int]
) -> None:
    """Each table says for which values its function is true, and for which it fails."""

    def function(table: dict[int, Any]) -> Callable[[int], bool]:
        def choose(value: int) -> bool:
            if table.get(value) == "fails":
                raise ValueError
            return value in table

        return choose

    job = Job("j", on_error="skip")
    for number, way in enumerate(job.stream(job.topic("in")).branch(*map(function, tables))):
        way.to(job.topic(f"out-{number}"))
    expected: list[list[int]] = [[] for _ in range(len(tables) + 1)]
    failed = 0
    for value in values:
        way = next((number for number, table in enumerate(tables) if value in table), len(tables))
        if way < len(tables) and tables[way][value] == "fails":
            failed += 1
        else:
            expected[way].append(value)
    with Driver(job) as driver:
        for value in values:
            driver.send("in", value, key="k")
        assert [driver.read_values(f"out-{number}") for number in range(len(tables) + 1)] == expected
        assert driver.skipped == failed


def fails_below_10(value: int) -> int:
    if value < 10:
        raise ValueError("small")
    return value


@pytest.mark.parametrize("rule", ["dead", "skip"])
def test_record_that_fails_in_front_of_a_branch_is_one_failure(rule: str) -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    ways = job.stream(job.topic("in")).map(fails_below_10, on_error=dead if rule == "dead" else "skip")
    for name, way in zip(WAYS, ways.branch(is_even, is_large), strict=True):
        way.to(job.topic(name))
    with Driver(job) as driver:
        for value in (1, 2, 12, 13):
            driver.send("in", value, key="k")
        assert [driver.read_values(way) for way in WAYS] == [[12], [13], []]
        assert [letter.offset for letter in driver.dead_letters()] == ([0, 1] if rule == "dead" else [])
        assert driver.skipped == 2


def test_record_that_fails_in_a_stream_that_is_used_twice_is_one_failure() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    stream = job.stream(job.topic("in")).map(fails_below_10, on_error=dead)
    stream.to(job.topic("first"))
    stream.filter(is_large).to(job.topic("second"))
    job.stream(job.topic("in")).map(fails_below_10, on_error=dead).to(job.topic("rest"))
    with Driver(job) as driver:
        for value in (1, 12):
            driver.send("in", value, key="k")
        assert [driver.read_values(way) for way in WAYS] == [[12], [12], [12]]
        # The step of the other stream isn't the same step, and has its own failure.
        handlers = [letter.handler for letter in driver.dead_letters()]
        assert [name.endswith(("first')", "rest')")) for name in handlers] == [True, True], handlers


def test_later_failure_of_a_shared_step_counts_if_the_first_chain_has_failed_before_it() -> None:
    job = Job("j")
    dead = job.topic("dead", value="bytes")

    def two_values(value: int) -> Any:
        yield value
        if value == 5:
            raise ValueError("second value")
        yield value + 1

    def fails_on_odd(value: int) -> int:
        if value % 2:
            raise ValueError("odd")
        return value

    stream = job.stream(job.topic("in")).flat_map(two_values, on_error=dead)
    stream.map(fails_on_odd, on_error=dead).to(job.topic("first"))
    stream.to(job.topic("second"))
    with Driver(job) as driver:
        driver.send("in", 5, key="k")
        assert [letter.error for letter in driver.dead_letters()] == [
            "ValueError: odd",
            "ValueError: second value",
        ]


def test_record_that_hangs_in_front_of_a_branch_is_condemned_once_and_not_called_again() -> None:
    job = Job("j")
    called: list[int] = []
    ways = job.stream(job.topic("in")).map(called.append, on_error=job.topic("dead", value="bytes"))
    for name, way in zip(WAYS, ways.branch(is_even, is_large), strict=True):
        way.to(job.topic(name))
    bench = Bench(job)
    step = "map 'append' (step 1 of 'in-to-first')"
    bench.runner.condemn(4, Condemnation(Failure.of_record("it took too long"), step=step))
    bench.run(1, offset=4)
    assert called == []
    assert [output[0] for output in bench.outputs] == ["dead"]
    assert bench.port.skipped == 1
