"""Odd jobs and inputs as plain data: what Hypothesis draws, and the functions that both sides share.

A step's behaviour is a name, and depends only on the value. So the real handlers and the interpreter share
the functions below. They don't share what is done with what these functions return or raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fcluster import Record

LARGE = "x" * 5_000
"""Creates a value that is larger than all limits. All other values are smaller than `SMALL_BYTES_MAX`."""
SMALL_BYTES_MAX = 2_000
RULES = ("stop", "skip", "dead", "dead2")
SINKS = ("out", "out-text", "out-bytes")


@dataclass(frozen=True)
class StepPlan:
    """One operator: its kind, what its function does, and its rule (None: not given)."""

    kind: str
    behaviour: str
    rule: str | None


@dataclass(frozen=True)
class ChainPlan:
    """Steps, then how the chain ends: "to", "key_by", or "" for nowhere."""

    steps: tuple[StepPlan, ...]
    end: str
    key_behaviour: str
    key_rule: str | None
    sink: str
    sink_rule: str | None


@dataclass(frozen=True)
class JobPlan:
    """A job with one source."""

    value: str
    chains: tuple[ChainPlan, ...]
    default_rule: str | None
    topic_rule: str | None


@dataclass(frozen=True)
class Input:
    """A record of the source."""

    value: bytes | None
    key: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    timestamp: int


class OddError(BaseException):
    """It isn't an Exception, and it can't be shown."""

    def __str__(self) -> str:
        raise ValueError("\ud83d")


def code(value: Any) -> int:
    """A number that depends only on the value."""
    return zlib.crc32(repr(value).encode("utf-8", "backslashreplace"))


def chooses(value: Any, one_in: int) -> bool:
    """Whether the value is one of those that a behaviour treats specially."""
    return code(value) % one_in == 0


def fail(value: Any) -> None:
    """Raise something odd."""
    kinds = (
        ValueError("bad \ud83d"),
        OddError(),
        SystemExit(1),
        GeneratorExit(),
        KeyError("k"),
        ValueError(LARGE),
    )
    raise kinds[code(value) // 7 % len(kinds)]


SEEING = "by what it sees"
"""The behaviour of functions that get a context, too."""
FILTERS = ("all", "some", "fails on some", SEEING)
MAPS = (
    "same",
    "wrap",
    "none on some",
    "nan on some",
    "fails on some",
    "changes it",
    "large on some",
    "text",
    SEEING,
)
FLAT_MAPS = (
    "same",
    "nothing on some",
    "several",
    "changes it in between",
    "fails after a value",
    "no list on some",
    "large among them",
    "texts",
    SEEING,
)
PEEKS = ("nothing", "returns something", "fails on some", SEEING)
HANDLERS = (
    "count",
    "several",
    "fails after an output",
    "fails after a change",
    "tombstone",
    "elsewhere",
    "nothing",
    "unkept on some",
    "returns",
    "long integer",
    "headers",
)
KEYS = ("code", "field", "fails on some", "none on some", "number on some", SEEING)


def seen(ctx: Any) -> dict[str, Any]:
    """What a function sees of a record besides its value. The driver knows no timestamp of 0."""
    return {"key": ctx.key, "is dated": ctx.timestamp > 0, "headers": [name for name, _value in ctx.headers]}


def apply_filter(behaviour: str, value: Any, ctx: Any = None) -> Any:
    """What the function of a filter returns."""
    if behaviour == SEEING:
        return seen(ctx)["key"] == "k" or chooses(value, 2)
    if behaviour == "fails on some" and chooses(value, 3):
        fail(value)
    return behaviour != "some" or chooses(value, 2)


def apply_peek(behaviour: str, value: Any, ctx: Any = None) -> Any:
    """What the function of a peek returns."""
    if behaviour == SEEING and len(seen(ctx)["headers"]) > 1:
        fail(value)
    if behaviour == "fails on some" and chooses(value, 3):
        fail(value)
    return {"ignored": True} if behaviour == "returns something" else None


def apply_map(behaviour: str, value: Any, ctx: Any = None) -> Any:
    """What the function of a map returns."""
    match behaviour:
        case "by what it sees":
            return {"v": value, **seen(ctx)}
        case "wrap":
            return {"v": value, "n": 10**25}
        case "none on some" if chooses(value, 2):
            return None
        case "nan on some" if chooses(value, 2):
            return {"a": [None, float("nan")]}
        case "fails on some" if chooses(value, 3):
            fail(value)
        case "changes it" if isinstance(value, dict):
            value["changed"] = True
        case "large on some" if chooses(value, 3):
            return LARGE
        case "text":
            return f"text {code(value)}"
    return value


def apply_flat_map(behaviour: str, value: Any, ctx: Any = None) -> Any:
    """What the function of a flat_map returns."""
    match behaviour:
        case "by what it sees":
            return (seen(ctx)["key"] if number else value for number in range(2))
        case "nothing on some" if chooses(value, 2):
            return ()
        case "several":
            return iter([value, None, {"last": value}])
        case "changes it in between":
            return _changed_in_between(value)
        case "fails after a value":
            return _failing_after_a_value(value)
        case "no list on some" if chooses(value, 2):
            kinds = (None, 5, "text", b"bytes", {"a": 1}, {1}, frozenset[int]())
            return kinds[code(value) // 7 % len(kinds)]
        case "large among them" if chooses(value, 3):
            return [1, LARGE, 2]
        case "texts":
            return [f"text {code(value)}", f"more {code(value)}"]
    return [value]


def _changed_in_between(value: Any) -> Iterator[Any]:
    document: dict[str, Any] = {"value": value}
    for number in range(3):
        document["number"] = number
        yield document


def _failing_after_a_value(value: Any) -> Iterator[Any]:
    yield "first"
    if chooses(value, 3):
        fail(value)
    yield value


def apply_key(behaviour: str, value: Any, ctx: Any = None) -> Any:
    """What the function of a key_by returns."""
    if behaviour == SEEING:
        return f"{seen(ctx)['key']}/{code(value) % 3}"
    if behaviour == "fails on some" and chooses(value, 3):
        fail(value)
    if behaviour == "none on some" and chooses(value, 3):
        return None
    if behaviour == "number on some" and chooses(value, 3):
        return 5
    return f"key{code(value) % 3}"


def apply_handler(behaviour: str, ctx: Any, value: Any, elsewhere: Any) -> Any:
    """The outputs of a handler, one after another. `elsewhere` is another topic."""
    if behaviour in ("count", "fails after a change", "unkept on some"):
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        if behaviour == "fails after a change" and chooses(value, 3):
            fail(value)
        if behaviour == "unkept on some" and chooses(value, 3):
            ctx.state["odd"] = {1} if code(value) % 2 else object()
        yield {"n": ctx.state["n"]}
    elif behaviour == "several":
        yield from (value, None, Record(value="r", topic=elsewhere), {"last": True})
    elif behaviour == "fails after an output":
        yield "first"
        if chooses(value, 3):
            fail(value)
    elif behaviour == "tombstone":
        yield Record(value=None, topic=elsewhere)
    elif behaviour == "elsewhere":
        yield Record(topic=elsewhere)
        yield Record(key=None, value=LARGE if chooses(value, 4) else 1, timestamp=5, topic=elsewhere)
    elif behaviour == "long integer":
        ctx.state["sum"] = ctx.state.get("sum", 10**30) * 3
        yield {"sum": ctx.state["sum"], "none": None}
    elif behaviour == "headers":
        yield Record(value=len(ctx.headers), headers=[("set", b"1")], topic=elsewhere)
        yield Record(value=1, headers=[("bad", 1)] if chooses(value, 3) else None, topic=elsewhere)  # type: ignore[list-item]


def returned_by_handler(behaviour: str, ctx: Any, value: Any) -> Any:
    """The output of the handler that returns one."""
    assert behaviour == "returns"
    ctx.state["last"] = code(value)
    if chooses(value, 4):
        fail(value)
    return None if chooses(value, 3) else value


# --- strategies -----------------------------------------------------------------------------------------

rules = st.none() | st.sampled_from(RULES)
steps = (
    st.builds(StepPlan, st.just("filter"), st.sampled_from(FILTERS), rules)
    | st.builds(StepPlan, st.just("map"), st.sampled_from(MAPS), rules)
    | st.builds(StepPlan, st.just("map_async"), st.sampled_from(MAPS), rules)
    | st.builds(StepPlan, st.just("flat_map"), st.sampled_from(FLAT_MAPS), rules)
    | st.builds(StepPlan, st.just("peek"), st.sampled_from(PEEKS), rules)
    | st.builds(StepPlan, st.just("process"), st.sampled_from(HANDLERS), rules)
)


def calls_first(steps: list[StepPlan]) -> tuple[StepPlan, ...]:
    """The steps, without calls behind a handler: that is refused."""
    if any(step.kind == "map_async" for step in steps):
        return tuple(sorted(steps, key=lambda step: step.kind == "process"))
    return tuple(steps)


calls_of_many = st.tuples(
    st.builds(StepPlan, st.just("flat_map"), st.sampled_from(FLAT_MAPS), rules),
    st.builds(StepPlan, st.just("map_async"), st.sampled_from(MAPS), rules),
)
chains = st.builds(
    ChainPlan,
    st.lists(steps, max_size=3).map(calls_first) | calls_of_many,
    st.sampled_from(["to", "to", "key_by"]),
    st.sampled_from(KEYS),
    rules,
    st.sampled_from(SINKS),
    rules,
)
jobs = st.builds(
    JobPlan,
    st.sampled_from(["json", "json", "json", "text", "bytes"]),
    st.lists(chains, min_size=1, max_size=3).map(tuple),
    rules,
    rules,
)
values = st.sampled_from(
    [
        None,
        b"null",
        b"{",
        b"\xff",
        b"NaN",
        b"",
        b"1",
        b"12345678901234567890123",
        b'{"a": 1, "b": [null, 1.50]}',
        b'{"field": "f"}',
        b'"' + LARGE.encode() + b'"',
        b'"\\ud83d"',
        b"[]",
    ]
) | st.integers(0, 40).map(lambda number: b'{"id": %d}' % number)
inputs = st.lists(
    st.builds(
        Input,
        values,
        st.sampled_from([b"k", b"k", b"l", None, b"\xff"]),
        st.sampled_from([(), (("h", b"1"), ("h", None))]),
        st.sampled_from([0, -1, 1234]),
    ),
    min_size=1,
    max_size=8,
)
