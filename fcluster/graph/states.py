"""The states that a handler declares: values, maps and lists, each with its codec and TTL.

Responsible for: the objects that a job file creates (`ValueState`, `MapState`, `ListState`), their checks,
the names of the stores that they need, and their description, which is compared with existing state when a
job has changed. `fcluster.engine` implements them. Pure.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, ClassVar, Final, Generic, TypeVar, cast, overload

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.codecs import Codec, Kind, ModelCodec, codec_name
from fcluster.graph.models import declared_kind
from fcluster.graph.shapes import Shape, shape_of
from fcluster.graph.signatures import declared_otherwise, name_of

_K = TypeVar("_K")
_V = TypeVar("_V")

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]{1,200}")
TTL_MS_MAX = 2**53
ORDERED_KEYS = ("text", "bytes", "int")
"""The kinds of keys whose bytes sort like the keys."""

VERSION_MAX: Final = 2**16 - 1
DOCUMENT_NAME: Final = "ctx.state"
"""The name of a handler's document among its states."""

KeyParts = str | Codec[Any] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Migration:
    """How an entry of one version of a state becomes one of the next.

    Attributes:
        value: how the entries of that version are encoded.
        function: gets the value of such an entry, and returns what it is in the next version.
    """

    value: Kind
    function: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class State:
    """The common part of all kinds. A handler declares one of the classes below.

    Attributes:
        version: of what the values are. A number from 1 to 65,535.
        migrate: by former version, the function that turns a value of that version into one of the next, or
            a pair of the former kind of values and the function. Without a kind, values were "json" if they
            are JSON or a model now, and of the present kind otherwise.
    """

    name: str
    value: Kind | type[Any] = "json"
    ttl: timedelta | None = None
    version: int = field(default=1, kw_only=True)
    migrate: Mapping[int, Any] | None = field(default=None, kw_only=True, hash=False)

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _LEGAL_NAME.fullmatch(self.name):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"The state name {bounded_repr(self.name)} isn't valid.",
                remedy="Use letters a-z and A-Z, digits, '.', '_' and '-'.",
            )
        object.__setattr__(self, "value", declared_kind(self.value, "value", f" of the state {self.name!r}"))
        object.__setattr__(self, "migrate", _migrations(self))
        ttl = self.ttl
        if ttl is None:
            return
        if not isinstance(ttl, timedelta):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"ttl={bounded_repr(ttl)} of the state {self.name!r} is not a timedelta.",
                remedy="Use ttl=timedelta(hours=1), from Python's datetime.",
            )
        if not 1 <= ttl / timedelta(milliseconds=1) <= TTL_MS_MAX:
            raise JobError(
                f"ttl={ttl!r} of the state {self.name!r} is out of range.",
                remedy="Use one millisecond or more. Leave it out for state that never expires.",
            )

    @property
    def value_kind(self) -> Kind:
        """How a value is encoded: `value`, where a model has become its codec."""
        return cast("Kind", self.value)

    @property
    def ttl_ms(self) -> int | None:
        """How long an entry is kept after it was written, in event time. None: forever."""
        return None if self.ttl is None else self.ttl // timedelta(milliseconds=1)

    def describe(self) -> dict[str, Any]:
        """What the encoding of its entries depends on. It includes whether there is a TTL, but not how long
        it is.
        """
        described: dict[str, Any] = {"kind": self.kind, "value": codec_name(self.value_kind)}
        if self.ttl is not None:
            described["ttl"] = True
        if self.version > 1:
            described["version"] = self.version
            if self.migrations:
                former = self.migrations.items()
                described["former"] = {str(version): codec_name(one.value) for version, one in former}
        return described

    @property
    def migrations(self) -> Mapping[int, Migration]:
        """`migrate`, by former version."""
        return cast("Mapping[int, Migration]", self.migrate)

    @property
    def shape(self) -> Shape | None:
        """The fields of its model. None: it has no model."""
        kind = self.value_kind
        return shape_of(kind.model) if isinstance(kind, ModelCodec) else None


def _migrations(state: State) -> Mapping[int, Migration]:
    """`migrate` of a state, after checks. Also checks its version."""
    version, what = state.version, f"the state {state.name!r}"
    migrate: Mapping[int, Any] = {} if state.migrate is None else state.migrate
    if type(version) is not int or not 1 <= version <= VERSION_MAX:
        raise JobError(
            f"version={bounded_repr(version)} of {what} is not a number from 1 to {VERSION_MAX:,}.",
            remedy="Begin with 1, and add 1 with each change.",
        )
    example = f"migrate={{{max(version - 1, 1)}: function}}"
    if not isinstance(migrate, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
        raise JobError(f"migrate={bounded_repr(migrate)} of {what} is not a dict.", remedy=f"Use {example}.")
    formers = sorted(migrate, key=str) if not all(type(one) is int for one in migrate) else sorted(migrate)
    if formers and formers != list(range(version - len(formers), version)):
        raise JobError(
            f"migrate= of {what} has functions for {', '.join(map(bounded_repr, formers))}, but the state "
            f"has version={version}.",
            remedy=f"Give one for each former version that may have entries, up to {version - 1}: {example}."
            if version > 1
            else "Set version=2, and give the function for version 1: version=2, migrate={1: function}.",
        )
    if formers and formers[0] < 1:
        raise JobError(f"migrate= of {what} begins with version {formers[0]}.", remedy="The first one is 1.")
    return MappingProxyType({former: _migration(state, former, migrate[former]) for former in formers})


def _migration(state: State, former: int, given: Any) -> Migration:
    if isinstance(given, Migration):
        return given
    what = f"migrate[{former}] of the state {state.name!r}"
    present = state.value_kind
    kind: Any = "json" if codec_name(present) == "json" else present
    function: Any = given
    if isinstance(given, tuple) and len(cast("tuple[Any, ...]", given)) == 2:
        kind, function = cast("tuple[Any, Any]", given)
    if not callable(function):
        raise JobError(
            f"{what} is {bounded_repr(function)}, not a function.",
            remedy="Give a function that takes a value as it was and returns it as it is in the next "
            "version; or a pair of the former kind of values and that function, such as ('int', function).",
        )
    declared = declared_otherwise(function, ("value",))
    if declared is not None:
        raise JobError(
            f"{what} is declared as {declared}, but is called with 1 argument.",
            remedy=f"Declare it as {name_of(function)}(value). It returns the value of the next version.",
        )
    return Migration(declared_kind(kind, what), function)


@dataclass(frozen=True, slots=True)
class ValueState(State, Generic[_V]):
    """One value for each key: `ctx.value(STATE)`.

    Attributes:
        name: of the state; unique in its handler. A job whose state was renamed is refused.
        value: how the value is encoded: "json" (the default), "text", "bytes", "int", "msgpack", a `Codec`,
            or a model (a dataclass, a Struct or a pydantic model).
        ttl: a value expires this long after it was set, in event time. None: never.
    """

    kind: ClassVar[str] = "value"


@dataclass(frozen=True, slots=True)
class ListState(State, Generic[_V]):
    """A list for each key, which grows at its end and shrinks at both ends: `ctx.list(STATE)`.

    Attributes:
        name: of the state; unique in its handler. A job whose state was renamed is refused.
        value: how an element is encoded; as in `ValueState`.
        ttl: an element expires this long after it was appended, in event time. None: never.
    """

    kind: ClassVar[str] = "list"


@dataclass(frozen=True, slots=True)
class MapState(State, Generic[_K, _V]):
    """A map with sorted keys for each key of the stream: `ctx.map(STATE)`.

    Example::

        SEEN: MapState[str, int] = MapState("seen", key="text", value="int", ttl=timedelta(hours=1))

        @job.process(orders, to=counted, states=[SEEN])
        def customer(ctx, order):
            seen = ctx.map(SEEN)
            if order["number"] in seen:
                return None
            seen[order["number"]] = ctx.timestamp
            return order

    Attributes:
        name: of the state; unique in its handler. A job whose state was renamed is refused.
        value: how a value is encoded; as in `ValueState`.
        ttl: an entry expires this long after it was set, in event time. None: never.
        key: how keys are encoded, which determines their order: "text" (by code points), "int" (of any size),
            "bytes", or several of them for keys that are tuples, such as ("int", "text"). Keys of a user's
            own `Codec` are sorted by their bytes.
    """

    key: KeyParts = "text"

    kind: ClassVar[str] = "map"

    def __post_init__(self) -> None:
        State.__post_init__(self)
        key = self.key
        parts = key if isinstance(key, tuple) else (key,)
        if not isinstance(key, Codec) and not (parts and all(part in ORDERED_KEYS for part in parts)):
            raise JobError(
                f"key={bounded_repr(self.key)} of the state {self.name!r} is unknown, or has no order.",
                remedy=f"Use one of {', '.join(map(repr, ORDERED_KEYS))}, a tuple of them, or a Codec.",
            )

    def describe(self) -> dict[str, Any]:
        """As in `State`."""
        key = self.key
        named = list(key) if isinstance(key, tuple) else key.name if isinstance(key, Codec) else key
        return {**State.describe(self), "key": named}


@dataclass(frozen=True, slots=True)
class DocumentState(State):
    """The version of `ctx.state`, which is there without being declared. Without versions, it isn't needed.

    Example::

        def with_cents(state):
            return {"cents": round(100 * state["euros"])}

        @job.process(orders, states=[DocumentState(version=2, migrate={1: with_cents})])
        def customer(ctx, order):
            ctx.state["cents"] += order["cents"]

    Attributes:
        version: of what `ctx.state` holds. It was 1 before.
        migrate: by former version, the function that gets the dict as it was, and returns it as it is in the
            next version.
    """

    name: str = DOCUMENT_NAME

    kind: ClassVar[str] = "document"

    def __post_init__(self) -> None:
        State.__post_init__(self)
        if (self.name, self.value, self.ttl) != (DOCUMENT_NAME, "json", None):
            raise JobError(
                f"DocumentState is declared with {bounded_repr(self.name)}, but ctx.state has no name, codec "
                "or TTL.",
                remedy="Use DocumentState(version=2, migrate={1: function}).",
            )


class ValueAccess(Generic[_V]):
    """The value of the current key. The value that `get` returns is live: a dict or list may be changed
    in place.
    """

    __slots__ = ()

    @overload
    def get(self) -> _V | None: ...
    @overload
    def get(self, default: _V) -> _V: ...
    @abstractmethod
    def get(self, default: Any = None) -> Any:
        """The value, or `default` if there is none."""

    @abstractmethod
    def set(self, value: _V) -> None:
        """Set the value."""

    @abstractmethod
    def clear(self) -> None:
        """Remove the value."""


class MapAccess(MutableMapping[_K, _V]):
    """The map of the current key, like a dict with sorted keys.

    The values that it returns are live: a dict or list may be changed in place. `len` counts all entries one
    by one. To ask whether there are any, use the map itself: ``if entries: ...``.
    """

    __slots__ = ()

    @abstractmethod
    def scan(
        self, start: _K | None = None, stop: _K | None = None, *, reverse: bool = False
    ) -> Iterator[tuple[_K, _V]]:
        """Pairs of key and value, sorted by key.

        Entries may be set and deleted during the scan; it sees changes ahead of it.

        Args:
            start: the first key. None: the first key of the map.
            stop: the scan ends before this key. None: at the end of the map.
            reverse: start with the last one.

        Raises:
            TypeError, ValueError: `start` or `stop` is not a key of this map.
        """

    @abstractmethod
    def __reversed__(self) -> Iterator[_K]: ...


class ListAccess(Sequence[_V]):
    """The list of the current key, which grows at its end and shrinks at both ends.

    The elements that it returns are live: a dict or list may be changed in place.
    """

    __slots__ = ()

    @abstractmethod
    def append(self, value: _V) -> None:
        """Add an element at the end."""

    @abstractmethod
    def extend(self, values: Iterable[_V]) -> None:
        """Add elements at the end."""

    @abstractmethod
    def pop(self) -> _V:
        """Remove the last element and return it. Raises IndexError if there is none."""

    @abstractmethod
    def popleft(self) -> _V:
        """Remove the first element and return it. Raises IndexError if there is none."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all elements."""

    @abstractmethod
    def __setitem__(self, index: int, value: _V) -> None: ...


@dataclass(frozen=True, slots=True)
class StateStore:
    """A state of one handler, and its stores.

    Attributes:
        handler: the handler's name.
        declared: the state as the handler declared it.
        state: the same, with codecs that know the run's settings.
    """

    handler: str
    declared: State
    state: State

    @property
    def name(self) -> str:
        """The store of its entries. The name is unique, because names of handlers and states contain no
        slash.
        """
        return f"{self.handler}/{self.state.name}"

    @property
    def bounds_name(self) -> str:
        """The store of a list's first and last position."""
        return f"{self.name}/bounds"

    @property
    def times_name(self) -> str:
        """The store that finds expired entries, by time."""
        return f"{self.name}/times"

    @property
    def clock_name(self) -> str:
        """The store of the handler's clock."""
        return f"{self.handler}//clock"

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of all its stores, apart from the handler's document."""
        if self.state.kind == DocumentState.kind:
            return ()
        names = [self.name]
        if self.state.kind == "list":
            names.append(self.bounds_name)
        if self.state.ttl is not None:
            names += [self.times_name, self.clock_name]
        return tuple(names)


def check_states(handler: str, states: object) -> tuple[State, ...]:
    """Check the `states=` of a handler.

    Raises:
        JobError: it isn't a sequence of states, or two have the same name.
    """
    remedy = "Give a list: states=[MapState('seen'), ...]."
    if states is None:
        return ()
    if not isinstance(states, list | tuple):
        raise JobError(f"states= of the handler {handler!r} got {bounded_repr(states)}.", remedy=remedy)
    checked: list[State] = []
    for state in cast("list[Any]", states):
        if not isinstance(state, State) or not state.kind:
            raise JobError(
                f"states= of the handler {handler!r} got {bounded_repr(state)}, which is not a state.",
                remedy=remedy,
            )
        if any(other.name == state.name for other in checked):
            raise JobError(
                f"Two states of the handler {handler!r} are named {state.name!r}.",
                remedy="Give one of them another name.",
            )
        checked.append(state)
    return tuple(checked)
