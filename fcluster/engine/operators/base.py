"""What every operator offers to the compiler, and what the compiler passes to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Protocol, cast

from fcluster.common.failures import bounded_text, type_of
from fcluster.engine.call_results import CallResults
from fcluster.engine.context import AnyTable, HandlerContext, KeyTimers
from fcluster.engine.pairs import AnyOpen
from fcluster.engine.records import OutputPort, SourceRecord, TimerRecord
from fcluster.engine.steps import Place, RecordError, Step, where_of_function
from fcluster.graph.codecs import Kind, encode_json_without_models, value_codec
from fcluster.graph.models import is_model
from fcluster.graph.operators import OnError, TopicSpec
from fcluster.graph.record import Record

WriteRecord = Callable[[SourceRecord, bytes | None, Record], None]
EventMs = Callable[[], int | None]
TimerStep = tuple[Place, Callable[[TimerRecord, bytes], None]]
"""Calls a timer's function and passes on its outputs; and the place of the timer's own failures."""


def no_event_ms() -> int | None:
    """The event time where nothing depends on it."""
    return None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an operator needs to be compiled.

    Attributes:
        source: the topic that the chain reads.
        partition: the shard's partition.
        tables: the shard's tables, by the name of the store.
        context_type: the type of the handlers' contexts.
        passing: exceptions that aren't a failure in the chain and go through it unchanged: the shell's, and
            `StepFailure`, which already has its place.
        record_writer: returns the function that takes a `Record` of the step at a place: it writes it, or
            passes it to the following step if the record has no topic. None: all have one.
        port_at: returns the port for outputs of the step at a place.
        stage_sizes: see `OutputPort`.
        results: what has come of the calls of records.
        timers: the timers of the handlers that set some, and what is open in windows and joins, by the step's
            name.
        fire: collects what to call when a timer is due, by the names of step and timer.
        event_ms: returns the shard's event time. None: before the first record, or the job doesn't use it.
    """

    source: TopicSpec
    partition: int
    tables: Mapping[str, AnyTable]
    context_type: type[HandlerContext]
    passing: tuple[type[BaseException], ...]
    record_writer: Callable[[Place, Step | None], WriteRecord]
    port_at: Callable[[Place], OutputPort]
    stage_sizes: Mapping[str, int]
    results: CallResults
    timers: Mapping[str, KeyTimers | AnyOpen] = field(default_factory=dict[str, KeyTimers | AnyOpen])
    fire: dict[tuple[str, str], TimerStep] = field(default_factory=dict[tuple[str, str], "TimerStep"])
    event_ms: EventMs = no_event_ms


class CompiledOperator(Protocol):
    """An operator of a chain."""

    @property
    def place(self) -> Place:
        """The place of its own failures."""
        ...

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the tables it uses."""
        ...

    @property
    def keeps_value(self) -> bool:
        """Whether it always passes on the same value that it received."""
        ...

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """A closure that applies it and calls `following` with each result."""
        ...


def place_of_function(
    what: str, function: Callable[..., Any], number: int, chain: str, on_error: OnError
) -> Place:
    """The place of an operator that has no name of its own."""
    name = bounded_text(str(getattr(function, "__name__", type(function).__name__)), 100)
    title = f"{what} {name!r} (step {number} of {chain!r})"
    return Place(title, f"in {title}", on_error, where_of_function(function))


def compile_raw(kind: Kind, *, is_unchanged: bool) -> Callable[[SourceRecord, Any], bytes | None]:
    """What is kept of a value: the bytes that were read, if no step has changed it."""
    if is_unchanged:
        return lambda record, _value: record.value()
    encode = encode_json_without_models if kind == "json" else value_codec(kind)[1]
    return lambda _record, value: None if value is None else encode(value)


def field_of(name: str, step: str) -> Callable[[Any], Any]:
    """The function that gives a field of a value, for a step that takes its name."""

    def field_in(value: Any) -> Any:
        try:
            return value.get(name)
        except AttributeError:
            what = "null (a tombstone)" if value is None else f"a {type_of(value)}, not an object"
            if is_model(cast("Any", type(value))):
                if hasattr(value, name):
                    return getattr(value, name)
                what = f"a {type_of(value)}, which has none of that name"
            raise RecordError(
                f"{step} takes the field {name!r}, but the value is {what}; filter such records out before "
                f"it, or give {step} a function"
            ) from None

    return field_in


def present_field_of(name: str, step: str) -> Callable[[Any], Any]:
    """Like `field_of`, for a step to which None says something: an object without the field is an error.
    Otherwise a misspelt name would say it of all records.
    """
    field = field_of(name, step)

    def field_in(value: Any) -> Any:
        found = field(value)
        lacks = without_field(name, value) if found is None else ""
        if lacks:
            raise RecordError(
                f"{step} takes the field {name!r}, and {lacks}; correct the name, or if it may be missing, "
                f"give {step} a function: lambda row: row.get({name!r})"
            )
        return found

    return field_in


def without_field(name: str, value: Any) -> str:
    """Says that an object has no such field, and which it has. Empty if it has it."""
    if not isinstance(value, dict) or name in value:
        return ""
    names = bounded_text(", ".join(map(str, cast("dict[Any, Any]", value))), 200)
    return f"the value has no such field, only {names}" if names else "the value has no fields"


def close_generator(values: object) -> None:
    """End a generator now, because one of its values failed in a later step. The code in its `finally`
    belongs to the record, and in a handler it may touch the state, which is restored next.
    """
    if isinstance(values, GeneratorType):
        with contextlib.suppress(BaseException):  # the record has already failed
            cast("GeneratorType[Any, Any, Any]", values).close()
