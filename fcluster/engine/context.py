"""What a handler sees of its record, and the interfaces of the tables that hold its state.

Responsible for: the `ctx` object of handlers. The shell provides tables with the methods of `Table`. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, TypeVar

from fcluster.common.errors import FormatUnusable, ProcessingError, failure_of
from fcluster.common.failures import bounded_repr, describe_exception
from fcluster.common.spelling import near_names
from fcluster.engine.failure import UnkeptStateError
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import RecordError
from fcluster.graph.codecs import ModelError
from fcluster.graph.headers import Header
from fcluster.graph.states import (
    ListAccess,
    ListState,
    MapAccess,
    MapState,
    State,
    ValueAccess,
    ValueState,
)
from fcluster.graph.timers import TimerClock

_K = TypeVar("_K")
_V = TypeVar("_V")


_NOT_REPLACED = "ctx.state can't be replaced; change it: ctx.state.clear(), then ctx.state.update(...)"
_NO_KEY = (
    "the first argument, ctx, is what is known about the record, and was used like its key or its value; "
    "write ctx.key, and take the value as the second argument"
)
_OF_RECORDS = ("key", "timestamp", "headers", "header", "topic", "partition", "offset")
_FOR_HANDLERS = (
    "key",
    "state",
    "value",
    "map",
    "list",
    "timer",
    "cancel_timer",
    "processing_time",
    *_OF_RECORDS[1:],
)
_TIMER = "timer(name, at=...)"
_WALL_TIMER = "timer(name, at=..., clock='processing')"
_CALLED_HERE: Final = {
    "collect": "",
    "current_key": "key",
    "current_processing_time": "processing_time",
    "delete_event_time_timer": "cancel_timer(name)",
    "emit": "",
    "forward": "",
    "get": "state",
    "get_current_key": "key",
    "get_state": "state",
    "now": "processing_time",
    "output": "",
    "register_event_time_timer": _TIMER,
    "register_processing_time_timer": _WALL_TIMER,
    "schedule": _TIMER,
    "set": "state",
    "set_timer": _TIMER,
    "timer_service": _TIMER,
}
"""What contexts of other libraries have, and where it is here. Nothing: in what the handler returns."""


class AnyTable(Protocol):
    """A part of a shard's state, whatever its kind.

    Attributes:
        name: the store's name.
        step: the name of the step, which is the handler's.
    """

    name: str
    step: str

    def begin_undo(self) -> None:
        """Begin a record whose changes may have to be undone."""
        ...

    def rollback(self) -> None:
        """Undo what the record changed."""
        ...

    def end_undo(self) -> None:
        """Keep what the record changed."""
        ...

    def check_changed(self) -> None:
        """Raise ProcessingError if something that the record changed can't be encoded."""
        ...

    def encode_touched(self) -> Mapping[bytes, bytes]:
        """The changes of the open epoch. Raises ProcessingError if a value can't be encoded."""
        ...


class KeyTimers(Protocol):
    """The timers of a handler in one shard. Implemented by `engine.timers.HandlerTimers`."""

    def set(self, key: bytes | None, name: str, at_ms: int, clock: TimerClock) -> None:
        """Set the timer of that key and name. If it is already set, it gets the new time."""
        ...

    def cancel(self, key: bytes | None, name: str) -> None:
        """Remove the timer of that key and name, if it is set."""
        ...

    def wall_ms(self) -> int:
        """Processing time: milliseconds since 1970."""
        ...


class Table(AnyTable, Protocol):
    """The state of one handler in one shard: a dict for each key. Implemented by
    `engine.state.StateTable`.
    """

    touched: dict[bytes, dict[str, Any]]

    def get(self, key: bytes) -> dict[str, Any]:
        """The live state of `key`, which counts as touched from then on."""
        ...


class RowContext:
    """What the function of a table sees of a row besides its value. It shows the row of the present call.

    Who takes it for the key itself compares it, looks it up, or writes it into a text. That fails: otherwise
    `filter(lambda id, value: id != "a")` would be true for all records.
    """

    __slots__ = ("_decode_key", "_key")

    _names: ClassVar[tuple[str, ...]] = ("key",)
    """What a function may ask it for."""

    def __init__(self, decode_key: Callable[[bytes], Any]) -> None:
        self._decode_key = decode_key
        self._key: bytes | None = None  # set before each call

    def _is_no_key(self, *_others: object) -> Any:
        raise TypeError(_NO_KEY)

    __eq__ = __hash__ = __format__ = _is_no_key

    @property
    def key(self) -> Any:
        """The record's key, decoded as declared for the topic. None if it has none.

        Raises:
            RecordError: it can't be decoded.
            FormatUnusable: its format can't be used now.
        """
        key = self._key
        try:
            return None if key is None else self._decode_key(key)
        except FormatUnusable:
            raise  # nothing is known about the key
        except BaseException as error:
            raise RecordError(
                f"its key {bounded_repr(key)} can't be decoded: {describe_exception(error)}; declare the "
                "topic with the kind of key that it has: key='bytes' takes any"
            ) from error

    @classmethod
    def hint_for(cls, name: str) -> str:
        """What to say to a function that has asked for an attribute that there isn't.

        Not in `__getattr__`: with that, Python looks up every attribute of a context in its slow way.
        """
        if name in _FOR_HANDLERS and name not in _OF_RECORDS:
            return f"only the ctx of a handler has {name!r}: use .process(handler)"
        near = near_names(name, cls._names)
        hint = f"did you mean ctx.{near[0]}?" if near else f"it has {', '.join(cls._names)}"
        return f"ctx has no {name!r}; {hint}"


class RecordContext(RowContext):
    """What the function of a step sees of a record besides its value. One for each step and shard; it shows
    the record being processed.
    """

    __slots__ = ("_record", "partition", "topic")

    _names = _OF_RECORDS

    def __init__(self, topic: str, partition: int, decode_key: Callable[[bytes], Any]) -> None:
        super().__init__(decode_key)
        self.topic = topic
        self.partition = partition
        self._record: SourceRecord = None  # type: ignore[assignment]  # set before each call

    @property
    def timestamp(self) -> int:
        """The record's timestamp in milliseconds since 1970; -1 if it has none."""
        return self._record.timestamp()[1]

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The record's headers, in order."""
        return self._record.headers() or []

    def header(self, header: Header[Any], default: Any = None) -> Any:
        """The value of a header that has a kind.

        Raises:
            RecordError: its bytes aren't of that kind.
            TypeError: it isn't a `Header`.
        """
        if not isinstance(header, Header):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise TypeError(
                f"ctx.header got {bounded_repr(header)}, not a Header; declare it as "
                "TRACE = Header('trace'), and use ctx.header(TRACE)"
            )
        try:
            value = header.read_from(self.headers)
        except ModelError as error:
            raise RecordError(str(error)) from error
        return default if value is None else value

    @property
    def offset(self) -> int:
        """The record's offset in its partition."""
        return self._record.offset()


class HandlerContext(RecordContext):
    """What a handler sees as `ctx`. One for each handler and shard; it shows the record being processed."""

    __slots__ = ("_access", "_load", "_name", "_timers", "_touched")

    def __init__(self, topic: str, partition: int, decode_key: Callable[[bytes], Any], table: Table) -> None:
        super().__init__(topic, partition, decode_key)
        self._name = table.name
        self._touched = table.touched.get
        self._load = table.get
        self._access: Mapping[str, Any] = {}
        self._timers: KeyTimers | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The current key's state: a plain dict, saved with the epoch as it is at that time.

        Raises:
            RecordError: the record has no key.
        """
        state = self._touched(self._key)  # type: ignore[arg-type]  # no table contains None
        return self._first_state() if state is None else state

    def _first_state(self) -> dict[str, Any]:
        if self._key is None:
            raise RecordError("the record has no key, so it has no state; give it one with key_by() first")
        return self._load(self._key)

    @state.setter
    def state(self, _value: Any) -> None:
        raise AttributeError(_NOT_REPLACED)

    def value(self, state: ValueState[_V]) -> ValueAccess[_V]:
        """The current key's value in a state that the handler declares.

        Raises:
            LookupError: the handler declares no such state.
        """
        return self._declared(state, "value")

    def map(self, state: MapState[_K, _V]) -> MapAccess[_K, _V]:
        """Like `value`, for a map."""
        return self._declared(state, "map")

    def list(self, state: ListState[_V]) -> ListAccess[_V]:
        """Like `value`, for a list."""
        return self._declared(state, "list")

    def _declared(self, state: State, kind: str) -> Any:
        try:
            declared, access = self._access.get(state.name, (None, None))
        except AttributeError:
            raise TypeError(
                f"ctx got {bounded_repr(state)}, not a state; declare it as SEEN = ValueState('seen'), name "
                "it in the handler's states=[SEEN], and use ctx.value(SEEN)"
            ) from None
        if declared is not state and declared != state:
            raise LookupError(
                f"the handler {self._name!r} declares no {state.kind} {state.name!r}; "
                "name it in the handler's states=[...]"
            )
        if state.kind != kind:
            raise TypeError(f"ctx.{kind} got the {state.kind} {state.name!r}; use ctx.{state.kind}")
        return access

    def timer(self, name: str, *, at: int, clock: TimerClock = "event") -> None:
        """Set the current key's timer of that name. If it is already set, it gets the new time.

        Args:
            name: the name of one of this handler's timers, which has an `on_timer` function.
            at: when it is due, in milliseconds since 1970.
            clock: "event": it is due when event time reaches `at`. "processing": it is due by the wall clock.

        Raises:
            LookupError: the handler has no such timer.
            RecordError: the record has no key.
            TypeError, ValueError: `at` or `clock` isn't valid.
        """
        self._key_timers.set(self._key, name, at, clock)

    def cancel_timer(self, name: str) -> None:
        """Cancel the current key's timer of that name. Does nothing if it isn't set.

        Raises:
            LookupError: the handler has no such timer.
            RecordError: the record has no key.
        """
        self._key_timers.cancel(self._key, name)

    @property
    def processing_time(self) -> int:
        """The wall clock, in milliseconds since 1970; in a unit test, the driver's.

        Raises:
            LookupError: the handler has no timers.
        """
        return self._key_timers.wall_ms()

    @property
    def _key_timers(self) -> KeyTimers:
        if self._timers is None:
            raise LookupError(
                f"the handler {self._name!r} has no timers; declare one with @{self._name}.on_timer(name)"
            )
        return self._timers

    @classmethod
    def hint_for(cls, name: str) -> str:
        """See `RowContext.hint_for`."""
        here = _CALLED_HERE.get(name)
        if here:
            return f"ctx has no {name!r}; here it is ctx.{here}"
        near = [] if here == "" else near_names(name, _FOR_HANDLERS)
        hint = f"did you mean ctx.{near[0]}?" if near else f"it has {', '.join(_FOR_HANDLERS)}"
        return f"ctx has no {name!r}; {hint} (What goes on is what the handler returns or yields.)"


class UndoableContext(HandlerContext):
    """The context in a chain where failures are tolerated: the table remembers the state before the
    record.
    """

    __slots__ = ()

    @property
    def state(self) -> dict[str, Any]:
        """As in `HandlerContext`."""
        try:
            return self._first_state()
        except ProcessingError as error:
            # The state that an earlier record left there can't be encoded. That isn't this record's fault.
            raise UnkeptStateError(failure_of(error), self._name) from error

    @state.setter
    def state(self, _value: Any) -> None:
        raise AttributeError(_NOT_REPLACED)
