"""Calls that don't fit: the TypeError says what to write, wherever the call is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fcluster import Job, Tumbling, count, minutes
from fcluster.api.call_hints import hint_of_call, hints_at_calls

JOB: Any = Job("shop")
STREAM = JOB.stream(JOB.topic("orders"))
TABLE = JOB.table(JOB.topic("rates"))
WINDOWED = STREAM.window(Tumbling(minutes(1)), name="windowed")


@pytest.mark.parametrize(
    ("call", "said", "hint"),
    [
        (
            lambda: STREAM.window(),
            "missing 1 required positional argument",
            "Call Stream.window(windows, name=..., [",
        ),
        (lambda: STREAM.map(func=str), "unexpected keyword argument 'func'", "Did you mean function=?"),
        (lambda: STREAM.map(1, nme=2), "unexpected keyword argument 'nme'", "Call Stream.map(function, ["),
        (lambda: STREAM.map(mapper=str), "unexpected keyword argument 'mapper'", "Did you mean function=?"),
        (
            lambda: STREAM.join(STREAM, windows=1),
            "unexpected keyword argument 'windows'",
            "Did you mean within=?",
        ),
        (lambda: STREAM.window(1, name="w", allowed_lateness=1), "unexpected", "Say that of the windows: Tu"),
        (lambda: STREAM.filter(1, on_eror=2), "unexpected keyword argument", "Did you mean on_error=?"),
        (lambda: TABLE.join(), "missing 1 required positional argument", "Call Table.join("),
        (lambda: JOB.topic(), "missing 1 required positional argument", "Call Job.topic(name, [key=...], ["),
        (lambda: TABLE.group_by("a", name="g").aggregate(1), "takes 1 positional", "Name what it computes"),
        (
            lambda: STREAM.aggregate(n=count()),
            "missing 1 required keyword-only",
            "Name the table and what it",
        ),
        (
            lambda: STREAM.window(Tumbling(minutes(1)), name="w").aggregate(1),
            "takes 1 positional",
            "Name what it computes",
        ),
    ],
)
def test_call_that_does_not_fit_says_what_to_write(call: Callable[[], Any], said: str, hint: str) -> None:
    with pytest.raises(TypeError, match=said) as caught:
        call()
    (note,) = caught.value.__notes__
    assert note.startswith(hint)


def test_error_within_a_method_has_no_hint() -> None:
    @hints_at_calls
    class Caller:
        def call(self, function: Callable[..., Any]) -> Any:
            return function(1)

    def takes_nothing() -> None: ...

    with pytest.raises(TypeError, match="takes 0 positional arguments") as caught:
        Caller().call(takes_nothing)
    assert not hasattr(caught.value, "__notes__")


def test_methods_keep_their_names_signatures_and_texts() -> None:
    method = type(STREAM).map
    assert method.__qualname__ == "Stream.map"
    assert method.__doc__
    assert list(inspect.signature(method).parameters)[:2] == ["self", "function"]


def test_parameter_for_any_number_of_values_is_shown_as_such() -> None:
    def function(one: Any, *more: Any, only: int, **rest: Any) -> None: ...

    assert hint_of_call(function, "f", "") == "Call f(one, more, ..., only=..., ...)."


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: STREAM.left_join, "Here it is .join(other, how='left')"),
        (lambda: STREAM.union, "job.merge(stream, other)"),
        (lambda: STREAM.fliter, "Did you mean .filter?"),
        (lambda: STREAM.flatMap, "Here it is .flat_map(...)"),
        (lambda: STREAM.flatMapValues, "Here it is .flat_map(function)"),
        (lambda: STREAM.keyBy, "Here it is .key_by(...)"),
        (lambda: STREAM.sideOutput, "Here it is .process(handler), whose handler yields Record(topic=...)"),
        (lambda: STREAM.assignTimestampsAndWatermarks, "job.topic(name, timestamp=..., watermark="),
        (lambda: STREAM.toTable, "Here it is .table(name=...)"),
        (lambda: STREAM.distinct, "Here it is .process(handler), with states=[ValueState('seen', ttl=...)]"),
        (lambda: JOB.flatMap, "Begin a stream: job.stream(topic).flat_map(...)"),
        (lambda: JOB.globalTable, "Here it is .global_table(...)"),
        (lambda: JOB.execute, "a job file only declares the job"),
        (lambda: TABLE.key_by, "table.to_stream().key_by"),
        (lambda: TABLE.leftJoin, "Here it is .join(other, how='left')"),
        (lambda: TABLE.map_values, "Here it is .map(function)"),
        (lambda: TABLE.toStream, "Here it is .to_stream(...)"),
        (lambda: JOB.global_table(JOB.topic("g")).mapValues, "Here it is .map(function)"),
        (lambda: WINDOWED.allowed_lateness, "Say that of the windows: Tumbling(..., grace=...)."),
        (lambda: WINDOWED.sideOutputLateData, "Name the topic of late records: window(..., late=topic)."),
        (lambda: WINDOWED.final, "That is the default: a result is passed on when its window closes."),
        (lambda: WINDOWED.map, "Say first what to compute: .aggregate(n=count())."),
    ],
)
def test_method_of_another_library_says_what_it_is_here(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(AttributeError) as raised:
        call()
    assert hint in " ".join(getattr(raised.value, "__notes__", []))


def test_names_that_python_looks_for_have_no_hint() -> None:
    job = Job("j")
    stream = job.stream(job.topic("t"))
    assert not hasattr(stream, "__wrapped__")
    assert getattr(stream, "_repr_html_", None) is None
