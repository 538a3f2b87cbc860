"""`map_async` in the driver: results in order, failures by the step's rule, circuits, replays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcluster import CallContext, Circuit, Codec, Job, Retry, Stream, Watermark
from fcluster.common.errors import FormatUnavailable, JobError
from fcluster.common.settings import Settings
from fcluster.testing import Driver, JobStopped

SECOND = timedelta(seconds=1)


class Service:
    """A service that answers with the value's double. `down` and `bad` say what fails."""

    def __init__(self) -> None:
        self.down = False
        self.bad: set[Any] = set()
        self.called: list[tuple[str, int, Any]] = []

    async def double(self, call: CallContext[str], value: Any) -> Any:
        self.called.append((call.idempotency_key, call.attempt, value))
        await asyncio.sleep(0.000_1 * (value % 3 if isinstance(value, int) else 0))
        if self.down:
            raise ConnectionError("nobody answers")
        if any(value == one for one in self.bad):
            raise ValueError(f"{value} is bad")
        return value * 2


def job_with(
    service: Service, front: Callable[[Stream[Any, Any]], Stream[Any, Any]] | None = None, **options: Any
) -> Job:
    """A job that doubles values in the service, then adds them up for each key."""
    job = Job("j")
    dead = job.topic("dead", value="bytes")
    if options.get("on_error") == "dead":
        options["on_error"] = dead

    def add_up(ctx: Any, value: Any) -> Any:
        ctx.state["sum"] = ctx.state.get("sum", 0) + value
        return [value, ctx.state["sum"]]

    stream = job.stream(job.topic("in"))
    if front is not None:
        stream = front(stream)
    stream.map_async(service.double, **options).process(add_up, to=job.topic("out"))
    return job


def test_results_go_on_in_the_order_of_the_records() -> None:
    service = Service()
    with Driver(job_with(service), partitions=1) as driver:
        for value in (2, 1, 0):
            driver.send("in", value, key="k")
        assert driver.read_values("out") == [[4, 4], [2, 6], [0, 6]]
    assert service.called == [("in/0/0", 1, 2), ("in/0/1", 1, 1), ("in/0/2", 1, 0)]


def test_values_of_one_record_are_numbered_and_stay_in_order() -> None:
    service = Service()
    job = job_with(service, lambda stream: stream.filter(bool).flat_map(iter))
    with Driver(job, partitions=1) as driver:
        for values in ([2, 1, 3], [], [5]):
            driver.send("in", values, key="k")
        assert [value for value, _sum in driver.read_values("out")] == [4, 2, 6, 10]
    assert [key for key, _attempt, _value in service.called] == [
        "in/0/0/0",
        "in/0/0/1",
        "in/0/0/2",
        "in/0/2",
    ]


def test_object_that_a_generator_yields_again_and_again_is_called_as_it_was() -> None:
    service, job = Service(), Job("j")

    def growing(value: Any) -> Any:
        for number in range(3):
            value.append(number)
            yield value

    job.stream(job.topic("in")).flat_map(growing).map_async(service.double).to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", [], key="k")
        assert driver.read_values("out") == [[0, 0], [0, 1, 0, 1], [0, 1, 2, 0, 1, 2]]


def test_one_call_may_follow_another_with_steps_between_them() -> None:
    service, job = Service(), Job("j")
    stream = job.stream(job.topic("in")).map_async(service.double).flat_map(lambda value: [value, value + 1])
    stream.filter(lambda value: value != 5).map_async(service.double).to(job.topic("out"))
    with Driver(job) as driver:
        for value in (1, 2):
            driver.send("in", value, key="k")
        assert driver.read_values("out") == [4, 6, 8]


def test_tombstone_and_context_reach_the_function() -> None:
    seen: list[Any] = []

    async def look(call: CallContext[str], value: Any) -> Any:
        seen.append((value, call.key, call.topic, call.partition, call.offset, call.timestamp, call.headers))
        return value

    job = Job("j")
    job.stream(job.topic("in")).map_async(look).to(job.topic("out"))
    with Driver(job, partitions=1) as driver:
        driver.send("in", None, key="k", timestamp=5, headers=[("h", b"1")])
        assert seen == [(None, "k", "in", 0, 0, 5, [("h", b"1")])]
        assert [record.raw_value for record in driver.read("out")] == [None]


def test_watermarks_of_a_repartition_topic_do_not_reach_the_service() -> None:
    seen: list[Any] = []

    async def look(_call: Any, value: Any) -> Any:
        seen.append(value)
        return value

    job = Job("j")
    source = job.topic("in", value="bytes", watermark=Watermark())
    stream = job.stream(source).key_by(lambda value: value.decode()).map(lambda value: value)
    stream.map_async(look).to(job.topic("out", value="bytes"))
    with Driver(job, partitions=1) as driver:
        for number, value in enumerate((b"a", b"b")):
            driver.send("in", value, key="k", timestamp=1_000 * number)
        driver.finish()
        assert driver.read_values("out") == seen == [b"a", b"b"]


# --- failures -------------------------------------------------------------------------------------------


def test_call_that_fails_again_stops_the_job_and_says_how_often_it_was_made() -> None:
    service = Service()
    service.bad = {7}
    with Driver(job_with(service, retry=Retry(attempts=3)), partitions=1) as driver:
        driver.send("in", 1, key="k")
        with pytest.raises(JobStopped) as caught:
            driver.send("in", 7, key="k")
        assert caught.value.message.startswith(
            "record in/0 at offset 1 failed in map_async 'double' (step 1 of 'add_up'), "
            "after 3 attempts of the call: ValueError: 7 is bad"
        )
        assert isinstance(caught.value.__cause__, ValueError)
        assert driver.read_values("out") == [[2, 2]]
    assert [attempt for _key, attempt, value in service.called if value == 7] == [1, 2, 3]


@pytest.mark.parametrize("rule", ["skip", "dead"])
def test_rule_of_the_step_applies_and_nothing_else_of_the_record_is_left(rule: str) -> None:
    service = Service()
    service.bad = {7}
    job = job_with(service, lambda stream: stream.flat_map(iter), on_error=rule)
    with Driver(job, partitions=1) as driver:
        for values in ([1], [2, 7], [3]):
            driver.send("in", values, key="k")
        assert driver.read_values("out") == [[2, 2], [6, 8]]
        letters = driver.dead_letters()
        assert [(letter.error, letter.offset) for letter in letters] == (
            [("ValueError: 7 is bad", 1)] if rule == "dead" else []
        )
        assert driver.skipped == 1


def test_step_in_front_has_its_own_rule() -> None:
    def front(stream: Stream[Any, Any]) -> Stream[Any, Any]:
        return stream.map(lambda value: 10 // value, on_error="skip")

    service = Service()
    with Driver(job_with(service, front), partitions=1) as driver:
        for value in (0, 5):
            driver.send("in", value, key="k")
        assert driver.read_values("out") == [[4, 4]]
        assert driver.skipped == 1


def test_record_that_cannot_be_decoded_is_not_called_for() -> None:
    service, job = Service(), Job("j")
    job.stream(job.topic("in", on_error="skip")).map_async(service.double).to(job.topic("out"))
    with Driver(job) as driver:
        driver.send_raw("in", b"{", key=b"k")
        assert (service.called, driver.skipped) == ([], 1)


def test_record_whose_format_was_not_usable_gets_its_call_later() -> None:
    """Also if the format is usable again when the record's turn has come."""
    service, job = Service(), Job("j")
    failures: list[Exception] = [FormatUnavailable("the registry is silent", remedy="start it")]

    def decode(raw: bytes) -> Any:
        if failures:
            raise failures.pop()
        return int(raw)

    dead = job.topic("dead", key="bytes", value="bytes")
    source = job.topic("in", value=Codec("registered", lambda value: b"%d" % value, decode), on_error=dead)
    job.stream(source).map_async(service.double, on_error=dead).to(job.topic("out"))
    with Driver(job) as driver:
        with pytest.raises(JobStopped, match="the registry is silent"):
            driver.send(source, 2)
        assert service.called == []
        driver.crash()
        assert driver.read_values("out") == [4]
        assert driver.dead_letters() == []


def test_call_without_an_answer_has_failed_with_a_timeout() -> None:
    async def hang(_call: Any, _value: Any) -> Any:
        await asyncio.sleep(600)

    job = Job("j")
    dead = job.topic("dead", value="bytes")
    stream = job.stream(job.topic("in")).map_async(hang, timeout=timedelta(milliseconds=20), on_error=dead)
    stream.to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", 1, key="k")
        assert driver.dead_letters()[0].error == "TimeoutError: no answer within 20 ms"


def test_call_that_a_library_cancels_has_failed_after_all_attempts() -> None:
    async def cancel(_call: Any, _value: Any) -> Any:
        raise asyncio.CancelledError

    job = Job("j")
    dead = job.topic("dead", value="bytes")
    retry = Retry(attempts=2, on=(ConnectionError,))
    job.stream(job.topic("in")).map_async(cancel, retry=retry, on_error=dead).to(job.topic("out"))
    with Driver(job) as driver:
        driver.send("in", 1, key="k")
        (letter,) = driver.dead_letters()
        assert letter.error == "AttemptCancelledError: something within the function has cancelled it"


def test_outcome_of_a_test_is_no_failure_of_the_call() -> None:
    async def fail(_call: Any, _value: Any) -> Any:
        pytest.fail("wrong value")

    job = Job("j")
    job.stream(job.topic("in")).map_async(fail, on_error="skip").to(job.topic("out"))
    with Driver(job) as driver, pytest.raises(pytest.fail.Exception, match="wrong value"):
        driver.send("in", 1, key="k")


# --- circuits -------------------------------------------------------------------------------------------


def test_records_wait_while_the_circuit_is_open_and_none_becomes_a_dead_letter() -> None:
    service = Service()
    service.down = True
    options: Any = {"retry": Retry(attempts=2), "circuit": Circuit(failures=3, open_for=SECOND)}
    with Driver(job_with(service, on_error="dead", **options), partitions=1) as driver:
        for value in (1, 2, 3):
            driver.send("in", value, key="k")
        assert [letter.offset for letter in driver.dead_letters()] == [0], "the third failure opened it"
        assert driver.read_values("out") == []
        calls = len(service.called)
        driver.advance(by_ms=999)
        assert len(service.called) == calls
        driver.advance(by_ms=1)
        assert len(service.called) == calls + 1, "one call is tried"
        service.down = False
        driver.crash()  # the next process has made no calls yet
        assert driver.read_values("out") == [[4, 4], [6, 10]]


def test_circuit_closes_when_a_call_is_answered() -> None:
    service = Service()
    service.down = True
    options: Any = {"circuit": Circuit(failures=2, open_for=SECOND)}
    with Driver(job_with(service, on_error="skip", **options), partitions=1) as driver:
        for value in (1, 2, 3):
            driver.send("in", value, key="k")
        service.down = False
        driver.advance(by_ms=1_000)
        assert driver.read_values("out") == [[4, 4], [6, 10]]


def test_other_stages_go_on_while_a_circuit_is_open() -> None:
    service, job = Service(), Job("j")
    service.down = True
    circuit = Circuit(failures=2, open_for=SECOND)
    job.stream(job.topic("in")).map_async(service.double, circuit=circuit, on_error="skip").to(
        job.topic("out")
    )
    job.stream(job.topic("other")).to(job.topic("copy"))
    with Driver(job, partitions=1) as driver:
        for value in (1, 2):
            driver.send("in", value, key="k")
        driver.send("other", 3, key="k")
        assert driver.read_values("copy") == [3]


# --- replays --------------------------------------------------------------------------------------------


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from("kl")), max_size=8),
    st.sets(st.integers(0, 9), max_size=3),
    st.lists(st.sampled_from(["", "barrier", "crash", "settle"]), max_size=8),
    st.sampled_from(["skip", "dead"]),
)
def test_barriers_and_crashes_anywhere_leave_the_same_results(
    sent: list[tuple[list[int], str]], bad: set[int], between: list[str], rule: str
) -> None:
    sums: dict[str, int] = {}
    wanted: list[list[int]] = []
    for values, key in sent:
        if bad.isdisjoint(values):
            for value in values:
                sums[key] = sums.get(key, 0) + 2 * value
                wanted.append([2 * value, sums[key]])
    service = Service()
    service.bad = set(bad)
    job = job_with(service, lambda stream: stream.flat_map(iter), on_error=rule, retry=Retry(attempts=2))
    with Driver(job, partitions=1, auto_barrier=False) as driver:
        for number, (values, key) in enumerate(sent):
            driver.send("in", values, key=key)
            if number < len(between) and between[number]:
                getattr(driver, between[number])()
        driver.settle()
        assert driver.read_values("out") == wanted
        assert driver.skipped == sum(not bad.isdisjoint(values) for values, _key in sent)
        assert {key: state["sum"] for key, state in driver.states("add_up").items()} == sums


# --- what is refused ------------------------------------------------------------------------------------


async def ask(_call: Any, value: Any) -> Any:
    return value


def build(job: Job) -> None:
    job.build(Settings())


def test_function_that_is_not_async_is_refused() -> None:
    job = Job("j")
    source = job.stream(job.topic("in"))

    async def yields(_call: Any, value: Any) -> Any:
        yield value

    with pytest.raises(JobError, match="The map_async function '<lambda>' isn't declared with async def"):
        source.map_async(lambda _call, value: value)  # type: ignore[arg-type,return-value]
    with pytest.raises(JobError, match="'yields' yields") as caught:
        source.map_async(yields)  # type: ignore[arg-type]
    assert ".flat_map(lambda values: values)" in caught.value.remedy
    with pytest.raises(JobError, match="is called with 2 arguments"):
        source.map_async(one_argument)  # type: ignore[arg-type]


async def one_argument(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency=0 of map_async 'ask' is not a whole number from 1 to 10000"),
        ({"timeout": 5}, "timeout=5 of map_async 'ask' is not a timedelta"),
        ({"retry": 3}, "retry=3 of map_async 'ask' is no Retry"),
        ({"circuit": "open"}, "circuit='open' of map_async 'ask' is no Circuit"),
        (
            {"retry": Retry(attempts=5), "circuit": Circuit(failures=5)},
            "one bad record would open it, and wait for ever",
        ),
    ],
)
def test_wrong_arguments_are_refused(options: Any, message: str) -> None:
    job = Job("j")
    with pytest.raises(JobError) as caught:
        job.stream(job.topic("in")).map_async(ask, **options)
    assert message in caught.value.message


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(JobError, match="is not a tuple of exceptions"):
        Retry(on=("ConnectionError",))  # type: ignore[arg-type]
    with pytest.raises(JobError, match="when_open='never' of Circuit is unknown"):
        Circuit(when_open="never")  # type: ignore[arg-type]
    assert Retry(on=ConnectionError).on == (ConnectionError,)  # type: ignore[arg-type]


def test_async_function_in_another_step_is_refused_with_where_it_belongs() -> None:
    job = Job("j")
    source = job.stream(job.topic("in"))
    for step in (source.map, source.filter, source.flat_map, source.process):
        with pytest.raises(JobError, match="is declared with async def") as caught:
            step(ask)  # type: ignore[operator]
        assert "stream.map_async(function)" in caught.value.remedy


def test_calls_behind_state_or_used_twice_are_refused_with_what_to_do() -> None:
    job = Job("j")
    stream = job.stream(job.topic("in")).process(lambda _ctx, value: value, name="h")
    stream.map_async(ask).to(job.topic("out"))
    with pytest.raises(JobError, match="The map_async 'ask' follows process, in the same stage") as caught:
        build(job)
    assert ".through(topic)" in caught.value.remedy

    job = Job("j")
    stream = job.stream(job.topic("in")).map_async(ask)
    stream.to(job.topic("out"))
    stream.to(job.topic("other"))
    with pytest.raises(JobError, match="The output of 'ask' is used in 2 places"):
        build(job)
