"""Random odd jobs: outputs, counts, state, and where the job stopped are those of the interpreter.

A fixed set of examples runs with the other tests. `make fuzz EXAMPLES=...` draws others, and more of them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fcluster.engine import calling, runner, showing
from fcluster.engine.operators import write
from fcluster.engine.operators.flat_map import FlatMapOperator
from tests.fuzz.interpreter import interpret
from tests.fuzz.plans import ChainPlan, Input, JobPlan, StepPlan, inputs, jobs
from tests.fuzz.real import InDriver, Shell

EXAMPLES = int(os.environ.get("FCLUSTER_FUZZ_EXAMPLES", "0"))


def comparable(output: tuple[Any, ...]) -> tuple[Any, ...]:
    """An output of the real engine, in the interpreter's terms."""
    topic, value, key, timestamp, headers = output
    pairs = list(headers or [])
    ours = {name: (text or b"").decode() for name, text in pairs if name.startswith("fcluster.")}
    if ours:
        assert len(ours["fcluster.error"]) <= 2_000
        handler = ours["fcluster.handler"]
        name = handler if handler.startswith("h") else handler.split()[0]
        mark = (name, ours["fcluster.offset"])
        own = tuple(pair for pair in pairs if not pair[0].startswith("fcluster."))
        return (topic, value, key, timestamp, ("stub", mark) if "fcluster.stub" in ours else (*own, mark))
    return (topic, value, key, timestamp, tuple(pairs))


def assert_same_output(real: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    topic, value, key, timestamp, headers = comparable(real)
    wanted_headers = wanted[4]
    if isinstance(wanted_headers[-1:], tuple) and wanted_headers and wanted_headers[-1][0] == "":
        # Not decoded, because the step is named after what reads the topic.
        wanted_headers = (*wanted_headers[:-1], (headers[-1][0], wanted_headers[-1][1]))
    assert (topic, key, timestamp, headers) == (wanted[0], wanted[2], wanted[3], wanted_headers)
    if value != wanted[1]:
        assert value is not None
        assert wanted[1] is not None
        one, other = json.loads(value), json.loads(wanted[1])
        assert (one, repr(one)) == (other, repr(other))


def check(plan: JobPlan, records: list[Input], epoch_records: int) -> None:
    """Run the plan in both ways and compare."""
    wanted, stopped_at, failed, states = interpret(plan, records)
    shell = Shell(plan, records, epoch_records)
    shell.run()
    assert shell.stopped_at == stopped_at
    assert len(shell.committed) == len(wanted), (shell.committed, wanted)
    for real, one in zip(shell.committed, wanted, strict=True):
        assert_same_output(real, one)
    assert (shell.counted, shell.skipped) == (len(wanted), failed)
    for name, table in states.items():
        number, place = name.split("|")
        for key, state in table.items():
            assert shell.state(f"h{number}x{place}", key) == state


def check_in_driver(plan: JobPlan, records: list[Input], between: list[str]) -> None:
    """The same with `fcluster.testing`, where actions between the records must not matter."""
    wanted, stopped_at, failed, states = interpret(plan, records)
    run = InDriver(plan, records, between)
    assert run.stopped_at == stopped_at
    assert run.skipped == failed
    outputs = run.outputs()
    for topic, real in outputs.items():
        # A producer can't write a timestamp of 0 (docs/decisions/0101).
        ones = [(*one[:3], one[3] or -1, one[4]) for one in wanted if one[0] == topic]
        assert len(real) == len(ones), (real, ones)
        for output, one in zip(real, ones, strict=True):
            assert_same_output(output, one)
    assert sum(map(len, outputs.values())) == len(wanted)
    for name, table in states.items():
        number, place = name.split("|")
        for key, state in table.items():
            assert run.state(f"h{number}x{place}", key) == state


@settings(
    max_examples=EXAMPLES or 400,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(jobs, inputs, st.integers(1, 4))
def test_odd_jobs_do_what_the_interpreter_does(
    plan: JobPlan, records: list[Input], epoch_records: int
) -> None:
    check(plan, records, epoch_records)


@settings(
    max_examples=EXAMPLES or 250,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(jobs, inputs, st.just([]) | st.lists(st.sampled_from(["", "barrier", "crash", "settle"]), max_size=8))
def test_odd_jobs_do_the_same_in_the_driver(plan: JobPlan, records: list[Input], between: list[str]) -> None:
    check_in_driver(plan, records, between)


# --- it must be able to fail ----------------------------------------------------------------------------


def rule_of_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former bug: the rule of the chain's first step applies to all of it."""
    original = runner._tolerant  # pyright: ignore[reportPrivateUsage]

    def planted(chain: Any, *rest: Any) -> Any:
        first = next(iter(chain.places.values()))
        former = runner.step_failure_of

        def of_first(error: BaseException, name: str) -> Any:
            failure = former(error, name)
            failure.place = first
            return failure

        monkeypatch.setattr(runner, "step_failure_of", of_first)
        return original(chain, *rest)

    monkeypatch.setattr(runner, "_tolerant", planted)


def tombstones_become_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former bug: a null value is written as the four bytes."""

    def planted(record: Any, _value: Any) -> bytes:
        return b"null" if record.value() is None else record.value()

    monkeypatch.setattr(write, "unchanged", planted)


def state_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a failing chain isn't rolled back."""
    from fcluster.engine.state import StateTable

    monkeypatch.setattr(StateTable, "rollback", lambda _self: None)


def headers_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A former bug: only a Record keeps headers."""
    from tests.unit.worker.processing_bench import FakeMessage

    monkeypatch.setattr(FakeMessage, "headers", lambda _self: None)


def skipped_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that were held back are forgotten."""
    monkeypatch.setattr(runner._CarefulRun, "_dead_letter", lambda *_: None)  # pyright: ignore[reportPrivateUsage]


def results_of_calls_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a generator yields in front of a call is called for as it is at the end."""
    monkeypatch.setattr(calling, "deepcopy", lambda value: value)


def values_are_collected_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator of a flat_map runs to its end before the first value is processed."""
    original = FlatMapOperator.compile

    def planted(self: FlatMapOperator, *rest: Any) -> Any:
        function = self._function  # pyright: ignore[reportPrivateUsage]

        @functools.wraps(function)
        def collecting(*arguments: Any) -> Any:
            values = function(*arguments)
            return list(values) if isinstance(values, Iterator) else values

        monkeypatch.setattr(self, "_function", collecting)
        return original(self, *rest)

    monkeypatch.setattr(FlatMapOperator, "compile", planted)


def functions_see_the_first_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that gets a context sees what was shown to it first."""
    original = showing.RecordContext.__setattr__

    def planted(self: Any, name: str, value: Any) -> None:
        if name != "_key" or getattr(self, "_key", None) is None:
            original(self, name, value)

    monkeypatch.setattr(showing.RecordContext, "__setattr__", planted)


@pytest.mark.parametrize(
    "plant",
    [
        rule_of_the_first_step,
        tombstones_become_json,
        state_is_not_put_back,
        headers_are_lost,
        skipped_are_not_counted,
        values_are_collected_first,
        results_of_calls_are_not_copied,
        functions_see_the_first_record,
    ],
)
def test_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    @settings(
        max_examples=1_500,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(jobs, inputs, st.integers(1, 4))
    def search(plan: JobPlan, records: list[Input], epoch_records: int) -> None:
        check(plan, records, epoch_records)

    with pytest.raises(AssertionError):
        search()


def test_plan_with_a_rule_for_each_step_is_run() -> None:
    """The comparison compares something: one fixed plan, with its result."""
    chain = ChainPlan(
        (StepPlan("map", "same", "stop"), StepPlan("process", "count", "skip")),
        "to",
        "code",
        None,
        "out",
        "dead",
    )
    plan = JobPlan("json", (chain,), None, "skip")
    records = [Input(value, b"k", (), 1) for value in (b"1", b"{", b"2")]
    wanted, stopped_at, failed, _states = interpret(plan, records)
    assert [json.loads(output[1]) for output in wanted] == [{"n": 1}, {"n": 2}]
    assert (stopped_at, failed) == (None, 1)
    check(plan, records, 2)
