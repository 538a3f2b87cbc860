"""What every operator offers the compiler, and what the compiler tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, Protocol, cast

from fcluster.common.failures import bounded_text
from fcluster.engine.context import AnyTable, HandlerContext, KeyTimers
from fcluster.engine.records import SourceRecord, TimerRecord
from fcluster.engine.steps import Place, Step
from fcluster.graph.record import Record
from fcluster.graph.topology import OnError, TopicSpec

WriteRecord = Callable[[SourceRecord, bytes | None, Record], None]
TimerStep = tuple[Place, Callable[[TimerRecord, bytes], None]]
"""Calls the function of a timer, and passes on what comes of it; and the place of its own failures."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an operator is compiled in.

    Attributes:
        source: the topic that the chain reads.
        partition: of the shard.
        tables: of the shard, by the name of the store.
        context_type: of the handlers' contexts.
        passing: exceptions that are nobody's failure in the chain and go through it as they are: the shell's,
            and `StepFailure`, which has its place already.
        record_writer: gives the function that writes a `Record` of the handler at a place.
        timers: of the handlers that set some, by the handler's name.
        fire: takes what is to be called when a timer is due, by the names of handler and timer.
    """

    source: TopicSpec
    partition: int
    tables: Mapping[str, AnyTable]
    context_type: type[HandlerContext]
    passing: tuple[type[BaseException], ...]
    record_writer: Callable[[Place], WriteRecord]
    timers: Mapping[str, KeyTimers] = field(default_factory=dict[str, KeyTimers])
    fire: dict[tuple[str, str], TimerStep] = field(default_factory=dict[tuple[str, str], "TimerStep"])


class CompiledOperator(Protocol):
    """An operator of a chain."""

    @property
    def place(self) -> Place:
        """Where its own failures happen."""
        ...

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the tables it uses."""
        ...

    @property
    def keeps_value(self) -> bool:
        """Whether the value that it passes on is always the one it got."""
        ...

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """A closure that applies it and calls `following` with what comes out."""
        ...


def place_of_function(
    what: str, function: Callable[..., Any], number: int, chain: str, on_error: OnError
) -> Place:
    """The place of an operator that has no name of its own."""
    name = bounded_text(str(getattr(function, "__name__", type(function).__name__)), 100)
    title = f"{what} {name!r} (step {number} of {chain!r})"
    return Place(title, f"in {title}", on_error)


def close_generator(values: object) -> None:
    """End a generator one of whose values failed in a later step, now: what its `finally` does belongs to
    the record, and in a handler it may touch the state, which is put back next."""
    if isinstance(values, GeneratorType):
        with contextlib.suppress(BaseException):  # the record has failed already
            cast("GeneratorType[Any, Any, Any]", values).close()
