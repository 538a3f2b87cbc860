"""What a handler sees of the record it is called for, and what decorating it makes of it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from fcluster.graph.generics import K_co
from fcluster.graph.headers import Header
from fcluster.graph.states import ListAccess, ListState, MapAccess, MapState, ValueAccess, ValueState
from fcluster.graph.timers import TimerClock

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)
_K = TypeVar("_K")
_V = TypeVar("_V")
_R = TypeVar("_R")


class AboutRecord(Protocol[K_co]):
    """What is known about a record, whoever is called for it."""

    @property
    def key(self) -> K_co:
        """The record's key, decoded as declared for its topic."""
        ...

    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Pairs of a name and a value, in order."""
        ...

    @property
    def topic(self) -> str:
        """The topic that the record was read from."""
        ...

    @property
    def partition(self) -> int:
        """The partition that the record was read from."""
        ...

    @property
    def offset(self) -> int:
        """The record's offset in its partition."""
        ...


class RowContext(Protocol[K_co]):
    """What the function of a table may know about a row besides its value. Valid only during the call."""

    @property
    def key(self) -> K_co:
        """The row's key, decoded as declared for its topic."""
        ...


class RecordContext(AboutRecord[K_co], Protocol[K_co]):
    """What the function of a step may know about a record besides its value. Valid only during the call.

    It is the first argument of functions with two parameters: `stream.map(lambda ctx, value: ...)`.
    """

    @overload
    def header(self, header: Header[_V], /) -> _V | None: ...
    @overload
    def header(self, header: Header[_V], default: _V, /) -> _V: ...
    def header(self, header: Header[Any], default: Any = None, /) -> Any:
        """The value of a header that has a kind: that of the last one of its name. `default` if the record
        has none, or if it is null.

        If its bytes aren't of that kind, the record fails in the step.
        """
        ...


class Context(RecordContext[K_co], Protocol[K_co]):
    """What a handler may know about the record that it processes. Valid only during the call."""

    @property
    def state(self) -> MutableMapping[str, Any]:
        """This handler's state of the current key, as JSON values by name. An empty state is deleted."""
        ...

    def value(self, state: ValueState[_V], /) -> ValueAccess[_V]:
        """The current key's value in a state that the handler declares with `states=`.

        Raises:
            LookupError: the handler declares no such state.
        """
        ...

    def map(self, state: MapState[_K, _V], /) -> MapAccess[_K, _V]:
        """Like `value`, for a map."""
        ...

    def list(self, state: ListState[_V], /) -> ListAccess[_V]:
        """Like `value`, for a list."""
        ...

    def timer(self, name: str, *, at: int, clock: TimerClock = "event") -> None:
        """Set the current key's timer of that name. If it is already set, it gets the new time.

        When it is due, the handler's `on_timer` function of that name is called. Timers are saved like state.
        A key has at most one timer of each name.

        Args:
            name: the name of one of this handler's timers.
            at: when it is due, in milliseconds since 1970. If that has passed, it fires after this record.
            clock: "event": it is due when the shard's event time reaches `at`. "processing": it is due by the
                wall clock.

        Raises:
            LookupError: the handler has no `on_timer` function of that name.
            TypeError, ValueError: `at` isn't an int, or one of the values is out of range.
        """
        ...

    def cancel_timer(self, name: str) -> None:
        """Cancel the current key's timer of that name. Does nothing if it isn't set.

        Raises:
            LookupError: the handler has no `on_timer` function of that name.
        """
        ...

    @property
    def processing_time(self) -> int:
        """The wall clock, in milliseconds since 1970; in a unit test, the driver's. For handlers with timers.

        Raises:
            LookupError: the handler has no timers.
        """
        ...


class CallContext(AboutRecord[K_co], Protocol[K_co]):
    """What the function of a `map_async` may know about the record for which it calls a service."""

    @property
    def idempotency_key(self) -> str:
        """Tells the service which record it is. The text is the same for each attempt and each replay.

        It has the topic, the partition and the offset, such as "payments/3/4711". If the steps in front have
        made several values of the record, the number of the value follows.
        """
        ...

    @property
    def attempt(self) -> int:
        """The number of the attempt, from 1."""
        ...


OfRecord = Callable[[_V], _R] | Callable[[RecordContext[_K], _V], _R]
"""A function of a value, or of a record's context and its value. Type checkers try the first one first."""
OfRow = Callable[[_V], _R] | Callable[[RowContext[_K], _V], _R]
"""The same for a table's rows."""
Handler = Callable[[Any, Any], Any]
JoinFunction = Callable[[Any, Any], Any]
"""Makes one value of two that belong together."""


class HandlerFunction(Protocol[_P, _R_co]):
    """A handler as `Job.process` returns it: the function itself, to which timers can be added."""

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co:
        """Call the handler, for example in a unit test."""
        ...

    def on_timer(self, name: str) -> Callable[[AnyFunction], AnyFunction]:
        """Decorate the function that is called for the handler's timers of that name.

        It is called as `function(key, ctx)` when a timer that `ctx.timer(name, at=)` has set is due. It reads
        and writes the state of that key, sets timers, and yields or returns outputs as the handler does.
        `ctx.timestamp` is the time for which the timer was set, and becomes the timestamp of the outputs. The
        handler's `on_error` applies.

        Args:
            name: of the timer. If a timer that may still be set was renamed, the job is refused.
        """
        ...
