"""When calls are made: concurrency, turns, time-outs, pauses, circuits. Time is what the test says."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster import Circuit, CircuitOpenError, Retry
from fcluster.common.errors import JobError
from fcluster.engine.call_scheduler import NEVER_MS, CallScheduler
from fcluster.engine.calling import Call, CallContext
from fcluster.engine.steps import Place
from fcluster.graph.operators import MapAsync
from tests.unit.worker.processing_bench import FakeMessage

PLACE = Place("step", "in step", "stop")
OWNER, OTHER = object(), object()


async def ask(_call: Any, value: Any) -> Any:
    return value


def step(**fields: Any) -> MapAsync:
    return MapAsync(ask, **{"concurrency": 3, "timeout_ms": 1_000, **fields})


class Bench:
    """A scheduler, and calls that note how they ended."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.scheduler = CallScheduler(self.said.append)
        self.ended: list[Any] = []

    def add(self, node: MapAsync, value: Any, turn: Any = None, owner: object = OWNER) -> Call:
        message: Any = FakeMessage(b"1")
        context = CallContext(message, bytes.decode, None)

        def on_done(call: Call) -> list[Call]:
            self.ended.append((call.value, call.error if call.error is not None else call.result))
            return []

        call = Call(owner, node, PLACE, context, value, turn and (owner, turn), on_done)
        self.scheduler.add([call])
        return call

    def start(self, now_ms: float) -> list[Any]:
        """The values of the calls that begin."""
        return [call.value for call in self.scheduler.start(now_ms)]

    def fail(self, call: Call, now_ms: float, error: BaseException | None = None) -> None:
        self.scheduler.failed(call, call.attempt, error or ConnectionError("down"), now_ms)


def test_no_more_calls_run_than_may_at_once_and_others_follow_as_they_end() -> None:
    bench, node = Bench(), step()
    calls = [bench.add(node, number) for number in range(5)]
    assert bench.start(0) == [0, 1, 2]
    assert bench.start(0) == []
    bench.scheduler.succeeded(calls[1], 1, "one")
    assert bench.start(0) == [3]
    assert bench.ended == [(1, "one")]
    assert bench.scheduler.running == 3


def test_steps_have_their_own_concurrency() -> None:
    bench = Bench()
    for node in (step(concurrency=1), step(concurrency=1)):
        bench.add(node, "a")
        bench.add(node, "b")
    assert bench.start(0) == ["a", "a"]


def test_calls_of_a_turn_are_made_one_after_another_also_over_attempts() -> None:
    bench, node = Bench(), step(retry=Retry(attempts=2))
    first, second = bench.add(node, 1, "k"), bench.add(node, 2, "k")
    bench.add(node, 3, "l")
    assert bench.start(0) == [1, 3]
    bench.fail(first, 10)
    assert bench.start(10) == [], "the turn is kept while the call waits for its next attempt"
    assert bench.scheduler.due_ms() == 110
    assert bench.start(110) == [1]
    bench.scheduler.succeeded(first, 2, "done")
    assert bench.start(110) == [2]
    assert second.attempt == second.context.attempt == 1


def test_pauses_double_up_to_the_longest_and_the_last_failure_counts() -> None:
    retry = Retry(attempts=5, backoff=timedelta(milliseconds=100), max_backoff=timedelta(milliseconds=300))
    assert [retry.wait_ms(failed) for failed in (1, 2, 3, 4, 900)] == [100, 200, 300, 300, 300]
    bench, node, now_ms = Bench(), step(retry=retry), 0.0
    call = bench.add(node, "a")
    for pause_ms in (100, 200, 300, 300):
        assert bench.start(now_ms) == ["a"]
        bench.fail(call, now_ms, ConnectionError(f"at {now_ms:.0f}"))
        assert bench.scheduler.due_ms() == bench.scheduler.pause_ms() == now_ms + pause_ms
        assert bench.start(now_ms + pause_ms - 1) == []
        now_ms += pause_ms
    assert bench.start(now_ms) == ["a"]
    bench.fail(call, now_ms, ConnectionError("the last one"))
    ((_value, error),) = bench.ended
    assert str(error) == "the last one"
    assert call.failed == 5
    assert bench.scheduler.due_ms() == NEVER_MS


def test_exception_that_is_not_retried_ends_the_call_at_once() -> None:
    bench, node = Bench(), step(retry=Retry(attempts=5, on=(ConnectionError,)))
    call = bench.add(node, "a")
    bench.start(0)
    error = KeyError("no such account")
    bench.fail(call, 0, error)
    assert bench.ended == [("a", error)]


def test_attempt_that_takes_too_long_is_given_up_and_what_comes_of_it_is_ignored() -> None:
    bench, node = Bench(), step(retry=Retry(attempts=2))
    call = bench.add(node, "a")
    bench.start(0)
    assert bench.scheduler.due_ms() == 1_000
    assert bench.scheduler.expire(999) == []
    assert bench.scheduler.expire(1_000, lambda _call: ", because") == [call]
    assert bench.start(1_100) == ["a"]
    bench.scheduler.succeeded(call, 1, "of the first attempt")
    assert bench.ended == []
    assert bench.scheduler.expire(2_100, lambda _call: ", because") == [call]
    ((_value, error),) = bench.ended
    assert isinstance(error, TimeoutError)
    assert str(error) == "no answer within 1,000 ms, because"


def circuit_bench(when_open: Any, concurrency: int) -> tuple[Bench, MapAsync]:
    circuit = Circuit(failures=4, open_for=timedelta(seconds=1), when_open=when_open)
    return Bench(), step(concurrency=concurrency, retry=Retry(attempts=2), circuit=circuit)


def test_open_circuit_counts_no_failure_and_tries_one_call_after_another() -> None:
    bench, node = circuit_bench("wait", concurrency=4)
    calls = {value: bench.add(node, value) for value in "abcd"}
    assert bench.start(0) == ["a", "b", "c", "d"]
    for value in "abcd":
        bench.fail(calls[value], 0)
    (said,) = bench.said
    assert said == (
        "map_async 'ask': the circuit opens after 4 failures in a row. Its calls wait; one is tried in 1 s. "
        "The last failure: ConnectionError: down"
    )
    assert bench.scheduler.open_circuits(0) == [
        "map_async 'ask': the circuit is open, the next call in 1 s (ConnectionError: down)"
    ]
    assert bench.start(999) == []
    assert bench.scheduler.due_ms() == 1_000
    tried: list[str] = []
    for now_ms in range(1_000, 11_000, 1_000):
        (value,) = bench.start(now_ms)
        tried.append(value)
        assert bench.start(now_ms) == [], "one call at a time"
        bench.fail(calls[value], now_ms)
    assert set(tried) == set("abcd")
    assert bench.ended == [], "a service that is down fails no record"
    (value,) = bench.start(11_000)
    bench.scheduler.succeeded(calls[value], calls[value].attempt, "up")
    assert bench.said[1:] == ["map_async 'ask': the circuit closes, because a call was answered"]
    assert sorted([*bench.start(11_000), value]) == ["a", "b", "c", "d"]
    assert bench.scheduler.open_circuits(11_000) == []


def test_refusal_of_a_call_is_an_answer_and_closes_the_circuit() -> None:
    bench = Bench()
    retry = Retry(attempts=2, on=(ConnectionError,))
    node = step(retry=retry, circuit=Circuit(failures=3, open_for=timedelta(seconds=1)))
    calls = [bench.add(node, number) for number in range(3)]
    bench.start(0)
    for call in calls:
        bench.fail(call, 0)
    (tried,) = bench.start(1_000)
    bench.fail(calls[tried], 1_000, KeyError("refused"))
    assert "closes" in bench.said[-1]
    assert [value for value, _ in bench.ended] == [tried]


def test_calls_of_an_open_circuit_may_fail_at_once_instead() -> None:
    bench, node = circuit_bench("fail", concurrency=2)
    calls = [bench.add(node, number) for number in range(2)]
    for now_ms in (0, 100):
        assert sorted(bench.start(now_ms)) == [0, 1]
        for call in calls:
            bench.fail(call, now_ms)
    assert [value for value, _ in bench.ended] == [0, 1]
    bench.ended.clear()
    for number in range(3):
        bench.add(node, number, "k")
    assert bench.start(200) == []
    assert [value for value, _ in bench.ended] == [0, 1, 2]
    assert all(isinstance(error, CircuitOpenError) for _, error in bench.ended)
    assert str(bench.ended[0][1]) == "the circuit is open after 4 failures: ConnectionError: down"
    bench.ended.clear()
    for number in range(3):
        bench.add(node, number)
    assert bench.start(1_100) == [0], "one is tried"
    assert [value for value, _ in bench.ended] == [2, 1]


def test_calls_of_a_shard_that_is_gone_are_dropped_and_those_of_others_go_on() -> None:
    bench, node = Bench(), step(concurrency=2, retry=Retry(attempts=2))
    running = bench.add(node, "runs", "k")
    pausing = bench.add(node, "pauses")
    bench.add(node, "has its turn later", "k")
    bench.start(0)
    bench.fail(pausing, 0)
    bench.add(node, "is ready")
    mine = bench.add(node, "mine", "k", OTHER)
    assert bench.scheduler.drop({OWNER}) == [running]
    assert bench.start(1_000) == ["mine"]
    bench.scheduler.succeeded(running, 1, "too late")
    bench.scheduler.succeeded(mine, 1, "done")
    assert bench.ended == [("mine", "done")]
    assert bench.scheduler.due_ms() == NEVER_MS


@given(
    st.lists(st.tuples(st.sampled_from(["k", "l", None]), st.integers(0, 3)), max_size=12), st.integers(1, 3)
)
def test_every_call_ends_once_and_calls_of_a_turn_end_in_order(
    plan: list[tuple[str | None, int]], concurrency: int
) -> None:
    """`plan`: the turn of each call, and how many of its attempts fail."""
    bench, node = Bench(), step(concurrency=concurrency, retry=Retry(attempts=3))
    fails = {}
    for number, (turn, failing) in enumerate(plan):
        bench.add(node, number, turn)
        fails[number] = failing
    now_ms = 0.0
    for _ in range(200):
        started = bench.scheduler.start(now_ms)
        assert bench.scheduler.running <= concurrency
        turns = [call.turn for call in started if call.turn is not None]
        assert len(turns) == len(set(turns))
        for call in started:
            if call.attempt <= fails[call.value]:
                bench.fail(call, now_ms)
            else:
                bench.scheduler.succeeded(call, call.attempt, "ok")
        now_ms = max(now_ms, min(bench.scheduler.due_ms(), now_ms + 10_000))
        if len(bench.ended) == len(plan):
            break
    assert sorted(value for value, _ in bench.ended) == list(range(len(plan)))
    for turn in ("k", "l"):
        mine = [value for value, _ in bench.ended if plan[value][0] == turn]
        assert mine == sorted(mine)
    for value, outcome in bench.ended:
        assert (outcome == "ok") == (fails[value] < 3)


@pytest.mark.parametrize("value", [0, True, 1.5, "many"])
def test_counts_are_checked(value: Any) -> None:
    with pytest.raises(JobError, match="of Retry is not a whole number from 1 to"):
        Retry(attempts=value)
    with pytest.raises(JobError, match="of Circuit is not a whole number from 1 to"):
        Circuit(failures=value)
