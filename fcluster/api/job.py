"""The API of a job file: jobs, topics, handlers, streams, records.

Responsible for: the public API, its validation, and compiling a job into a `Topology`. Invariants: every job
that `build` returns can run; names come from the job file alone and are the same in every run and process,
because they identify state; each error says what to change. Must not do I/O, or call a user's handler.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import MappingProxyType
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.common.ids import (
    TOPIC_NAME_CHARACTERS_MAX,
    changelog_topic,
    colliding_topic,
    is_internal_topic,
    journal_topic,
    repartition_topic,
)
from fcluster.common.isolation import ISOLATIONS, Isolation
from fcluster.common.settings import Settings, isolation_from
from fcluster.graph.aggregates import Aggregate, check_aggregates
from fcluster.graph.codecs import (
    Codec,
    CodecUse,
    Kind,
    ModelCodec,
    bound_codec,
    codec_name,
    kind_title,
)
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.joins import How, duration_ms, interval_ms
from fcluster.graph.models import check_field, check_key_model, declared_kind
from fcluster.graph.record import UNSET, Record, Unset
from fcluster.graph.states import (
    ListAccess,
    ListState,
    MapAccess,
    MapState,
    State,
    StateStore,
    ValueAccess,
    ValueState,
    check_states,
)
from fcluster.graph.timers import TimerClock, TimerFunction
from fcluster.graph.topology import (
    Branch,
    Chain,
    Filter,
    FlatMap,
    Input,
    JoinStreams,
    JoinTable,
    KeepTable,
    KeyKind,
    Map,
    OnError,
    Operator,
    Peek,
    Process,
    Rekey,
    Stage,
    StatefulOperator,
    TopicSpec,
    Topology,
    ValueKind,
    Window,
    rekey_description,
    step_kind,
    with_event_time,
    written_topics,
)
from fcluster.graph.watermark import Watermark
from fcluster.graph.windows import Session, Windows

__all__ = [
    "UNSET",
    "Context",
    "Handler",
    "HandlerFunction",
    "Job",
    "Record",
    "Stream",
    "Table",
    "Unset",
    "WindowedStream",
]

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9._-]+")
_TIMER_CHARACTERS_MAX: Final = 200
_INTERNAL_SUFFIXES: Final = ("-changelog", "-repartition")
_ISOLATION_OPTIONS: Final = frozenset({"isolation.level", "kafka.consumer.isolation.level"})

_Function = TypeVar("_Function", bound=Callable[..., Any])
_P = ParamSpec("_P")
_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)
_C = TypeVar("_C")
_K = TypeVar("_K")
_V = TypeVar("_V")
_V2 = TypeVar("_V2")
_V3 = TypeVar("_V3")
_T = TypeVar("_T")

_Text = Literal["text"]
_Bytes = Literal["bytes"]
_Int = Literal["int"]
_Json = Literal["json", "msgpack"]
_NoText = Literal["bytes", "int", "json", "msgpack"]
_Of = Codec[_T] | type[_T]
"""A codec or a model whose values are of type `_T`."""


class _TopicOptions(TypedDict, total=False):
    """The parameters of `Job.topic` that have nothing to do with types."""

    isolation: Isolation | None
    watermark: Watermark | None
    on_error: OnError | None


class Context(Protocol[K_co]):
    """What a handler may know about the record that it processes. Valid only during the call."""

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

    @property
    def state(self) -> MutableMapping[str, Any]:
        """This handler's state of the current key: JSON values by name. An empty state is deleted."""
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


Handler = Callable[[Any, Any], Any]
JoinFunction = Callable[[Any, Any], Any]
"""Makes one value of two that belong together."""


class HandlerFunction(Protocol[_P, _R_co]):
    """A handler as `Job.process` returns it: the function itself, to which timers can be added."""

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co:
        """Call the handler, for example in a unit test."""
        ...

    def on_timer(self, name: str) -> Callable[[_Function], _Function]:
        """Decorate the function that is called for the handler's timers of that name.

        It is called as `function(key, ctx)` when a timer that `ctx.timer(name, at=)` has set is due. It reads
        and writes the state of that key, sets timers, and yields or returns outputs as the handler does.
        `ctx.timestamp` is the time for which the timer was set, and becomes the timestamp of the outputs. The
        handler's `on_error` applies.

        Args:
            name: of the timer. If a timer that may still be set was renamed, the job is refused.
        """
        ...


@dataclass(frozen=True)
class _KeyBy:
    by: Rekey
    name: str | None
    key: KeyKind
    value: ValueKind | None
    on_error: OnError
    version: str | None = None


@dataclass(frozen=True)
class _Source:
    topic: TopicSpec


@dataclass(frozen=True)
class _Sink:
    topic: TopicSpec
    on_error: OnError | None


@dataclass(frozen=True)
class _Merge:
    """Joins several streams into one."""


@dataclass(eq=False)
class _Node:
    """One step in the graph of streams. Steps without a following step end a chain. A merge has several
    parents. So has a join with a table: its records come from the first parent, and the second one is the
    table.
    """

    step: _Source | _Sink | _KeyBy | _Merge | Operator
    parents: tuple[_Node, ...] = ()
    children: list[_Node] = field(default_factory=list["_Node"])

    def add(self, step: _Sink | _KeyBy | Operator, *further_parents: _Node) -> _Node:
        child = _Node(step, (self, *further_parents))
        self.children.append(child)
        return child


class Stream(Generic[K_co, V_co]):
    """The records of a topic on their way through operators. Each call returns a new stream.

    For type checkers, it has the types of its keys and values: those that were declared for the topic, and
    then what the steps' functions return.

    Each step takes an `on_error`, which says what to do with a record that fails in this step: "stop" ends
    the job before the record, "skip" continues without it, and a topic of the job receives it as a dead
    letter. The default is that of the job (`Job(on_error=)`). A step's rule applies only to its own failures,
    not to those of later steps. A record that is skipped or becomes a dead letter leaves no other trace in
    its chain of steps, neither outputs nor state.

    A null value (a tombstone) is None to the functions of all steps. It stays null through filters, through
    a map that returns None for it, and through a flat_map that returns [None] for it, and is written as null.
    """

    __slots__ = ("_closed", "_job", "_node")

    def __init__(self, job: Job, node: _Node, closed: bool = False) -> None:
        self._job = job
        self._node = node
        self._closed = closed

    def filter(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> Stream[K_co, V_co]:
        """Keep the values for which `function(value)` is true. They stay as they are.

        `function` must not change the value: a value that has passed only filters is written with the bytes
        that it was read with.
        """
        _check_function(function, "filter", ("value",))
        return self._then(Filter(function, self._job._rule(on_error, "filter")))  # pyright: ignore[reportPrivateUsage]

    def map(self, function: Callable[[V_co], _T], *, on_error: OnError | None = None) -> Stream[K_co, _T]:
        """Replace each value with `function(value)`. Key, timestamp and headers don't change."""
        _check_function(function, "map", ("value",))
        return self._then(Map(function, self._job._rule(on_error, "map")))  # pyright: ignore[reportPrivateUsage]

    def flat_map(
        self, function: Callable[[V_co], Iterable[_T]], *, on_error: OnError | None = None
    ) -> Stream[K_co, _T]:
        """Replace each value with any number of values: those that `function(value)` returns as a list or
        other iterable, or yields. Key, timestamp and headers don't change.

        The values are passed on in order. If the function fails for a later value, the earlier ones leave no
        trace either. The step fails if the function returns None, a dict, text, bytes or a set: write `[]`
        for no values, `[value]` for one, and `sorted(values)` for a set.
        """
        _check_function(function, "flat_map", ("value",), may_yield=True)
        return self._then(FlatMap(function, self._job._rule(on_error, "flat_map")))  # pyright: ignore[reportPrivateUsage]

    def peek(self, function: Callable[[V_co], Any], *, on_error: OnError | None = None) -> Stream[K_co, V_co]:
        """Call `function(value)` for each value, such as for a log or a metric. The records stay as they are.

        `function` must not change the value. What it returns is ignored. It is called again for records that
        are replayed after a failure.
        """
        _check_function(function, "peek", ("value",))
        return self._then(Peek(function, self._job._rule(on_error, "peek")))  # pyright: ignore[reportPrivateUsage]

    def branch(
        self, *functions: Callable[[V_co], Any], on_error: OnError | None = None
    ) -> tuple[Stream[K_co, V_co], ...]:
        """Split the stream: each record goes one of several ways, unchanged.

        A record goes the way of the first function for which `function(value)` is true, and the last way if
        it isn't true for any. The functions must not change the value, and must depend on nothing else.

        Args:
            functions: one for each way except the last.
            on_error: what to do with a record for which a function fails. The record goes no way then.

        Returns:
            A stream for each function, and one for the rest, which needs no further step.
        """
        if not functions:
            raise JobError(
                "branch() got no functions.",
                remedy="Give it one for each way: paid, others = stream.branch(is_paid).",
            )
        for function in functions:
            _check_function(function, "branch", ("value",))
        rule = self._job._rule(on_error, "branch")  # pyright: ignore[reportPrivateUsage]
        return tuple(self._then(Branch(functions, number, rule)) for number in range(len(functions) + 1))

    @overload
    def key_by(
        self,
        by: str | Callable[[V_co], str],
        *,
        name: str | None = None,
        key: _Text = "text",
        value: ValueKind | type[Any] | None = None,
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Stream[str, V_co]: ...
    @overload
    def key_by(
        self,
        by: str | Callable[[V_co], Any],
        *,
        name: str | None = None,
        key: _NoText,
        value: ValueKind | type[Any] | None = None,
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Stream[Any, V_co]: ...
    @overload
    def key_by(
        self,
        by: str | Callable[[V_co], _K],
        *,
        name: str | None = None,
        key: _Of[_K],
        value: ValueKind | type[Any] | None = None,
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Stream[_K, V_co]: ...
    def key_by(
        self,
        by: Rekey,
        *,
        name: str | None = None,
        key: KeyKind | type[Any] = "text",
        value: ValueKind | type[Any] | None = None,
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Stream[Any, V_co]:
        """Route records by a new key, through a repartition topic that the cluster creates.

        Timestamp and headers don't change. The following stages store state by the keys that `by` returns. So
        a changed job is refused if `by` is a different field or function. A function is identified by its
        qualified name, a lambda by its syntax.

        Args:
            by: the field of the value that holds the new key, or a function of the value.
            name: the name of the following stage. Default: the name of the first handler that follows.
            key: the kind of the new key, as in `Job.topic`. "json" takes numbers, lists and so on.
            value: how values are written. Default: as in the source topic, or "json" after a map or a
                handler: the steps behind then get dicts, even if a map returned objects of a model.
            version: a version of the key's meaning. While it stays the same, `by` counts as unchanged,
                however it is written. When it changes, `by` counts as changed.
            on_error: what to do with records that have no key or a key of another kind, or that can't be
                written to the repartition topic.
        """
        if not isinstance(by, str):
            _check_function(by, "key_by", ("value",))
        elif not by:
            raise JobError("key_by got an empty field name.", remedy="Name the field that holds the key.")
        if name is not None:
            _check_name(name, "The stage name")
        key = self._job._bound(key, name or "key_by", "key")  # pyright: ignore[reportPrivateUsage]
        if value is not None:
            value = self._job._bound(value, name or "key_by", "value")  # pyright: ignore[reportPrivateUsage]
        if not isinstance(version, str | int | None) or isinstance(version, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"version={version!r} of key_by is neither text nor a number.", remedy="Use version=1."
            )
        rule = self._job._rule(on_error, "key_by")  # pyright: ignore[reportPrivateUsage]
        return self._then(_KeyBy(by, name, key, value, rule, None if version is None else str(version)))

    @overload
    def process(
        self,
        handler: Callable[[Context[K_co], V_co], Iterator[_T | Record]],
        *,
        to: TopicSpec[Any, _T] | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def process(
        self,
        handler: Callable[[Context[K_co], V_co], _T | Record | None],
        *,
        to: TopicSpec[Any, _T] | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    def process(
        self,
        handler: Handler,
        *,
        to: TopicSpec | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, Any]:
        """Call `handler(ctx, value)` for each record; see `Job.process`."""
        if to is not None:
            self._job._check_declared(to, "to=")  # pyright: ignore[reportPrivateUsage]
        operator = _process_operator(handler, name)
        rule = self._job._rule(on_error, f"the handler {operator.name!r}")  # pyright: ignore[reportPrivateUsage]
        stores = self._job._stores(operator.name, states)  # pyright: ignore[reportPrivateUsage]
        stream = self._then(replace(operator, on_error=rule, stores=stores))
        for timer_name, function in _checked_timers(operator.name, timers).items():
            _add_timer(stream._node, timer_name, function)
        if to is None:
            return stream
        stream.to(to)
        return Stream(self._job, stream._node, closed=True)

    def window(
        self,
        windows: Windows,
        *,
        name: str,
        late: TopicSpec | None = None,
        emit: Literal["close", "update"] = "close",
        on_error: OnError | None = None,
    ) -> WindowedStream[K_co, V_co]:
        """Gather the records of each key in windows of event time. `.aggregate(...)` says what to compute.

        A record is in the windows that its timestamp is in. A window closes when event time reaches its end,
        plus its grace: then its result goes on, once. The job uses event time; declare a `Watermark` where
        records come out of order.

        Args:
            windows: `Tumbling`, `Hopping` or `Session`.
            name: of the step and its state. A job is refused if a window that may be open was renamed.
            late: gets the records that are too late for all their windows, as they are. They are counted in
                any case.
            emit: "close": a result goes on once, when its window closes. "update": it goes on after each
                record in the window, with the record's timestamp and headers.
            on_error: what to do if an aggregate fails for a record, or a result can't be computed: "stop",
                "skip" or a dead-letter topic. It also applies to late records that can't be written. Default:
                that of the job.
        """
        _check_name(name, "The window name", " with name=")
        if not isinstance(windows, Windows):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"window() got {bounded_repr(windows)}, which says nothing of windows.",
                remedy="Use Tumbling(timedelta(minutes=1)), Hopping(...) or Session(...), from fcluster.",
            )
        if emit not in ("close", "update"):
            raise JobError(
                f"emit={bounded_repr(emit)} of the window {name!r} is unknown.",
                remedy="Use emit='close' or emit='update'.",
            )
        if emit == "update" and isinstance(windows, Session):
            raise JobError(
                f"emit='update' of the window {name!r} doesn't go with sessions: when two become one, "
                "results of one of them would have to be withdrawn.",
                remedy="Leave it out: sessions emit when they close.",
            )
        if late is not None:
            self._job._check_declared(late, "late=")  # pyright: ignore[reportPrivateUsage]
        rule = self._job._rule(on_error, f"the window {name!r}")  # pyright: ignore[reportPrivateUsage]
        self._check_open()
        return WindowedStream(self, Window(name, windows, (), late, rule, emit))

    @overload
    def join(
        self,
        other: Table[Any, Any],
        with_: None = None,
        *,
        how: Literal["inner", "left"] = "inner",
        on_error: OnError | None = None,
    ) -> Stream[K_co, dict[str, Any]]: ...
    @overload
    def join(
        self,
        other: Table[Any, _V],
        with_: Callable[[V_co, _V], _T],
        *,
        how: Literal["inner"] = "inner",
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Table[Any, _V],
        with_: Callable[[V_co, _V | None], _T],
        *,
        how: Literal["left"],
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Stream[Any, Any],
        with_: None = None,
        *,
        within: timedelta | tuple[timedelta, timedelta],
        name: str,
        how: How = "inner",
        grace: timedelta = ...,
        late: TopicSpec | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, dict[str, Any]]: ...
    @overload
    def join(
        self,
        other: Stream[Any, _V],
        with_: Callable[[V_co, _V], _T],
        *,
        within: timedelta | tuple[timedelta, timedelta],
        name: str,
        how: Literal["inner"] = "inner",
        grace: timedelta = ...,
        late: TopicSpec | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Stream[Any, _V],
        with_: Callable[[V_co, _V | None], _T],
        *,
        within: timedelta | tuple[timedelta, timedelta],
        name: str,
        how: Literal["left"],
        grace: timedelta = ...,
        late: TopicSpec | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Stream[Any, _V],
        with_: Callable[[V_co | None, _V | None], _T],
        *,
        within: timedelta | tuple[timedelta, timedelta],
        name: str,
        how: Literal["outer"],
        grace: timedelta = ...,
        late: TopicSpec | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    def join(
        self,
        other: Table[Any, Any] | Stream[Any, Any],
        with_: JoinFunction | None = None,
        *,
        within: timedelta | tuple[timedelta, timedelta] | None = None,
        name: str | None = None,
        how: How = "inner",
        grace: timedelta | None = None,
        late: TopicSpec | None = None,
        on_error: OnError | None = None,
    ) -> Stream[Any, Any]:
        """Join this stream, on the left, with a table or another stream.

        **With a table**, look up the row of each record's key in a table, and pass on `with_(value, row)`.

        A record meets the table as it is when the record's turn comes. The stage that reads the stream reads
        the table's topic, too, in the order of their timestamps: so it finds the row of its own time, as far
        as that was written in time. A row that changes later changes no result. Key, timestamp and headers
        don't change.

        **With another stream**, pass on `with_(left, right)` for each pair of records of a key that are no
        further apart than `within` says. A pair is passed on when the later record comes, with the greater
        timestamp of the two. Records without a partner are passed on when event time has passed all partners
        that they could have had, and the grace. The job uses event time then.

        Partition n of the one and partition n of the other belong to the same shard. So both need the same
        number of partitions, the same kind of key and the same partitioner. If they don't have that, put a
        `key_by` in front.

        Args:
            other: what `Job.table` returns, or another stream of the job.
            with_: called with the stream's value and that of the row or the other record. Default: a dict
                with the two as "left" and "right".
            within: how much earlier and later than the left record the right one may be: one time for both,
                or a tuple with one for each.
            name: of a join of two streams, and of its state. A job is refused if such a join was renamed.
            how: "inner" passes on only what has a row or a partner. "left" passes on all records of this
                stream; without a row or partner, `with_` gets None for it. "outer", of two streams: also all
                records of the other one.
            grace: how much longer records that come late still find their partners.
            late: gets the records that are later still, as they are. They are counted in any case.
            on_error: what to do with a record that fails in the join: because `with_` does, or because it has
                no key. (A left join with a table passes it on.)

        Raises:
            JobError: it is neither a table nor a stream of this job, or an argument is wrong.
        """
        job = self._job
        if with_ is not None:
            _check_function(with_, "join", ("left", "right"))
        if isinstance(other, Stream):
            return self._join_stream(other, with_ or pair, within, name, how, grace, late, on_error)
        table = other
        if not isinstance(table, Table):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"join() got {bounded_repr(table)}, neither a table nor a stream.",
                remedy="Use stream.join(job.table(topic)), or stream.join(job.stream(topic), within=...).",
            )
        if (within, name, grace, late) != (None, None, None, None):
            raise JobError(
                f"The join with the table {table.name!r} got within=, name=, grace= or late=, which are for "
                "joins of two streams.",
                remedy="Leave them out: a record meets the row that its key has then.",
            )
        if how not in ("inner", "left"):
            raise JobError(
                f"how={bounded_repr(how)} of the join with {table.name!r} is unknown.",
                remedy="Use how='inner' or how='left'.",
            )
        kept = table._node_of(job)  # pyright: ignore[reportPrivateUsage]
        rule = job._rule(on_error, f"the join with {table.name!r}")  # pyright: ignore[reportPrivateUsage]
        self._check_open()
        step = JoinTable(cast("KeepTable", kept.step), with_ or pair, how, rule)
        node = self._node.add(step, kept)
        job._joins.append(node)  # pyright: ignore[reportPrivateUsage]
        return Stream(job, node)

    def _join_stream(
        self,
        other: Stream[Any, Any],
        with_: JoinFunction,
        within: Any,
        name: Any,
        how: How,
        grace: Any,
        late: TopicSpec | None,
        on_error: OnError | None,
    ) -> Stream[Any, Any]:
        job = self._job
        if name is None or within is None:
            raise JobError(
                "A join of two streams got no name= or no within=.",
                remedy="Say which pairs it finds, and what its state is called: "
                "join(other, within=timedelta(minutes=5), name='paid').",
            )
        _check_name(name, "The join name", " with name=")
        if how not in ("inner", "left", "outer"):
            raise JobError(
                f"how={bounded_repr(how)} of the join {name!r} is unknown.",
                remedy="Use how='inner', how='left' or how='outer'.",
            )
        before_ms, after_ms = interval_ms(name, within)
        grace_ms = 0 if grace is None else duration_ms(name, "grace", grace)
        if late is not None:
            job._check_declared(late, "late=")  # pyright: ignore[reportPrivateUsage]
        rule = job._rule(on_error, f"the join {name!r}")  # pyright: ignore[reportPrivateUsage]
        self._check_open()
        nodes = self._node, other._open_node(job, "join")
        (left, left_same), (right, right_same) = map(_value_of, nodes)
        made = JoinStreams(
            name, "left", with_, before_ms, after_ms, left, right, left_same, how, grace_ms, late, rule
        )
        sides = nodes[0].add(made), nodes[1].add(replace(made, side="right", is_unchanged=right_same))
        joined = _Node(_Merge(), sides)
        for side in sides:
            side.children.append(joined)
        job._joins.append(joined)  # pyright: ignore[reportPrivateUsage]
        return Stream(job, joined)

    def to(self: Stream[_K, _V], topic: TopicSpec[_K, _V], *, on_error: OnError | None = None) -> None:
        """Write the records to `topic`. The stream ends here.

        Args:
            topic: the target. Key, timestamp and headers carry over.
            on_error: what to do with records whose key or value can't be written as the topic's kind, or that
                Kafka refuses. Default: the rule of the previous step.
        """
        self._job._check_declared(topic, "to()")  # pyright: ignore[reportPrivateUsage]
        rule = None if on_error is None else self._job._rule(on_error, "to()")  # pyright: ignore[reportPrivateUsage]
        self._then(_Sink(topic, rule))

    def through(
        self: Stream[_K, _V], topic: TopicSpec[_K, _V], *, on_error: OnError | None = None
    ) -> Stream[_K, _V]:
        """Write the records to `topic`, and go on with the stream of that topic.

        It is short for `.to(topic)` and `job.stream(topic)`: the stream has all records of the topic, whoever
        writes them, in a stage of its own. So several streams can begin with the output of one handler.

        Args:
            topic: the topic. It is created if it doesn't exist, as output topics are.
            on_error: as in `to`.
        """
        self.to(topic, on_error=on_error)
        return self._job.stream(topic)

    def _then(self, step: _Sink | _KeyBy | Operator) -> Stream[Any, Any]:
        self._check_open()
        return Stream(self._job, self._node.add(step))

    def _open_node(self, job: Job, step: str = "merge") -> _Node:
        """The node from which a merge or join of `job` continues."""
        if self._job is not job:
            raise JobError(
                f"{step}() of the job {job.name!r} got a stream of the job {self._job.name!r}.",
                remedy="Begin all streams with this job's stream(topic).",
            )
        self._check_open()
        return self._node

    def _check_open(self) -> None:
        if self._closed:
            raise JobError(
                "A stream that is written with to= ends there, but another step was added after it.",
                remedy="Leave out to= and end it with .to(topic), or start a new stream from that topic.",
            )


class WindowedStream(Generic[K_co, V_co]):
    """The records of each key, in windows. `Stream.window` gives it."""

    __slots__ = ("_stream", "_window")

    def __init__(self, stream: Stream[K_co, V_co], window: Window) -> None:
        self._stream = stream
        self._window = window

    def aggregate(self, /, **fields: Aggregate[Any, V_co]) -> Stream[K_co, dict[str, Any]]:
        """Compute these aggregates of each window, and pass on its result.

        A result is a dict with "key", "start" and "end" (in milliseconds since 1970; the end isn't in the
        window any more), and the fields. The record of a window that has closed has the key of the window's
        records, and as its timestamp the last millisecond of the window.

        Args:
            fields: such as `n=count(), total=sum_(lambda order: order["amount"])`.

        Raises:
            JobError: there are none, one isn't an aggregate, or its name is taken.
        """
        are_merged = isinstance(self._window.windows, Session)
        checked = check_aggregates(self._window.name, fields, are_merged=are_merged)
        window = replace(self._window, fields=checked)
        return self._stream._then(window)  # pyright: ignore[reportPrivateUsage]


class Table(Generic[K_co, V_co]):
    """The newest value of each key of a topic. `Job.table` gives it; `Stream.join` looks its rows up.

    Attributes:
        name: of the table and its state.
    """

    __slots__ = ("_job", "_node", "name")

    def __init__(self, job: Job, node: _Node) -> None:
        self._job = job
        self._node = node
        self.name: str = cast("KeepTable", node.step).name

    def _node_of(self, job: Job) -> _Node:
        """Its node, for a join of `job`."""
        if self._job is not job:
            raise JobError(
                f"join() of the job {job.name!r} got the table {self.name!r} of the job {self._job.name!r}.",
                remedy="Declare the table on this job.",
            )
        return self._node


class Job:
    """A named topology: topics, and the handlers between them.

    Args:
        name: names the consumer group, the transactional ids and all internal topics. State belongs to this
            name.
        settings: settings by name, such as ``{"commit.interval.ms": 50}``. They can also be given as keyword
            arguments, with underscores for dots. `fcluster.toml`, environment and flags override them.
        on_error: what to do with a record that fails, in all steps without a rule of their own: "stop" (the
            default), "skip", or a dead-letter topic such as ``Topic("billing-dead", value="bytes")``.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Mapping[str, Any] | None = None,
        on_error: OnError | None = None,
        **named_settings: Any,
    ) -> None:
        _check_name(name, "The job name")
        self.name = name
        self.settings: dict[str, Any] = {**(settings or {}), **named_settings}
        self._topics: dict[str, TopicSpec] = {}
        self._topic_rules: dict[str, OnError | None] = {}
        self._watermarks: dict[str, Watermark] = {}
        self._isolation_unset: set[str] = set()
        self._bound_codecs: dict[tuple[str, str, Codec[Any]], Kind] = {}
        self._codec_settings: dict[str, Any] = {}
        self._roots: list[_Node] = []
        self._merges: list[_Node] = []
        self._joins: list[_Node] = []
        self._tables: dict[str, Table] = {}
        if isinstance(on_error, TopicSpec):
            on_error = self.topic(on_error.name, key=on_error.key, value=on_error.value)
        self._on_error: OnError | None = None
        self._on_error = None if on_error is None else self._rule(on_error, "the job")

    @overload
    def topic(
        self, name: str, *, key: _Text = ..., value: _Json = ..., **options: Unpack[_TopicOptions]
    ) -> TopicSpec[str, Any]: ...
    @overload
    def topic(
        self, name: str, *, key: _Text = ..., value: _Text, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[str, str]: ...
    @overload
    def topic(
        self, name: str, *, key: _Text = ..., value: _Bytes, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[str, bytes]: ...
    @overload
    def topic(
        self, name: str, *, key: _Text = ..., value: _Int, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[str, int]: ...
    @overload
    def topic(
        self, name: str, *, key: _Text = ..., value: _Of[_V], **options: Unpack[_TopicOptions]
    ) -> TopicSpec[str, _V]: ...
    @overload
    def topic(
        self, name: str, *, key: _NoText, value: _Json = ..., **options: Unpack[_TopicOptions]
    ) -> TopicSpec[Any, Any]: ...
    @overload
    def topic(
        self, name: str, *, key: _NoText, value: _Text, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[Any, str]: ...
    @overload
    def topic(
        self, name: str, *, key: _NoText, value: _Bytes, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[Any, bytes]: ...
    @overload
    def topic(
        self, name: str, *, key: _NoText, value: _Int, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[Any, int]: ...
    @overload
    def topic(
        self, name: str, *, key: _NoText, value: _Of[_V], **options: Unpack[_TopicOptions]
    ) -> TopicSpec[Any, _V]: ...
    @overload
    def topic(
        self, name: str, *, key: _Of[_K], value: _Json = ..., **options: Unpack[_TopicOptions]
    ) -> TopicSpec[_K, Any]: ...
    @overload
    def topic(
        self, name: str, *, key: _Of[_K], value: _Text, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[_K, str]: ...
    @overload
    def topic(
        self, name: str, *, key: _Of[_K], value: _Bytes, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[_K, bytes]: ...
    @overload
    def topic(
        self, name: str, *, key: _Of[_K], value: _Int, **options: Unpack[_TopicOptions]
    ) -> TopicSpec[_K, int]: ...
    @overload
    def topic(
        self, name: str, *, key: _Of[_K], value: _Of[_V], **options: Unpack[_TopicOptions]
    ) -> TopicSpec[_K, _V]: ...
    def topic(
        self,
        name: str,
        *,
        key: KeyKind | type[Any] = "text",
        value: ValueKind | type[Any] = "json",
        isolation: Isolation | None = None,
        watermark: Watermark | None = None,
        on_error: OnError | None = None,
        **options: Any,
    ) -> TopicSpec[Any, Any]:
        """Declare a topic that the job reads or writes.

        Args:
            name: the topic's name.
            key: "text" (UTF-8), "bytes", "int" (as Kafka's LongSerializer writes it; longer ints take more
                bytes), "json", "msgpack", a `Codec` of your own, or a model: a dataclass or a
                `msgspec.Struct`, which is JSON in the topic.
            value: the kind of its values, likewise. A model may also be a pydantic model.
            isolation: "read-committed", or "read-uncommitted" to read records of open transactions too.
                Default: the setting `isolation.level`.
            watermark: how event time follows from its timestamps. Default: `Watermark()`, if the job uses
                event time.
            on_error: what to do with its records that can't be decoded: "stop", "skip" or a dead-letter
                topic. Default: the rule of the job. If the job has none: the rule of its handlers if they all
                have the same, otherwise "stop".
            **options: the same options by their Kafka or Confluent names, such as
                ``kafka.consumer.isolation-level``.

        Raises:
            JobError: the name isn't valid or is reserved, an option is wrong, or the topic was declared
                before in a different way.
        """
        self._check_topic_name(name)
        key, value = self._bound(key, name, "key"), self._bound(value, name, "value")
        chosen = _chosen_isolation(name, isolation, options)
        topic = TopicSpec(name, key, value, chosen or "read-committed")
        rule = None if on_error is None else self._rule(on_error, f"the topic {name!r}")
        known = self._topics.get(name)
        if known is not None and (known, known.isolation) != (topic, topic.isolation):
            raise JobError(
                f"The topic {name!r} is declared twice, in different ways: {known} and {topic}.",
                remedy="Declare it once and use the returned topic everywhere.",
            )
        self._set_topic_rule(name, rule)
        self._set_watermark(name, watermark)
        if known is None and chosen is None:
            self._isolation_unset.add(name)
        elif chosen is not None:
            self._isolation_unset.discard(name)
        return self._topics.setdefault(name, topic)

    def process(
        self,
        topic: TopicSpec[_K, _V],
        *,
        to: TopicSpec | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Callable[[Callable[[_C, _V], _R]], HandlerFunction[[_C, _V], _R]]:
        """Decorate a handler. It is called as `handler(ctx, value)` for each record of `topic`.

        A generator function yields any number of outputs; a plain function returns one, or None for none. An
        output is a value or a `Record`. A value gets the key, timestamp and headers of the record being
        processed; a `Record` may set them. A record without a value (a tombstone) is passed as None; to write
        one, use `Record(value=None)`.

        Args:
            topic: the source.
            to: where outputs are written. Without it, only records that name their topic are written.
            name: the name of the handler and its state. Default: the function's name. A job is refused if a
                handler with state was renamed.
            states: the states that the handler keeps for each key besides `ctx.state`: a list of
                `ValueState`, `MapState` and `ListState` objects. It reads and writes them with
                `ctx.value(STATE)`, `ctx.map(STATE)` and `ctx.list(STATE)`.
            timers: functions by timer name, for timers that aren't declared with `@handler.on_timer(name)`
                (see `HandlerFunction.on_timer`).
            on_error: what to do if the handler raises for a record, or its state can't be stored: "stop" the
                job, "skip" the record, or write it to a dead-letter topic. It also applies to outputs of the
                handler that can't be written. Default: the rule of the job (`Job(on_error=)`).
        """

        def decorate(handler: Callable[[_C, _V], _R]) -> HandlerFunction[[_C, _V], _R]:
            node = (
                self.stream(topic)
                .process(
                    cast("Handler", handler),
                    to=to,
                    name=name,
                    states=states,
                    timers=timers,
                    on_error=on_error,
                )
                ._node  # pyright: ignore[reportPrivateUsage]
            )
            with contextlib.suppress(AttributeError):  # such as a bound method: use timers= then
                cast("Any", handler).on_timer = functools.partial(_on_timer, node)
            return cast("HandlerFunction[[_C, _V], _R]", handler)

        return decorate

    def stream(
        self,
        topic: TopicSpec[_K, _V],
        *,
        watermark: Watermark | None = None,
        on_error: OnError | None = None,
    ) -> Stream[_K, _V]:
        """Start a stream of the records of `topic`.

        Args:
            topic: the source.
            watermark: as in `topic`. It applies to all streams of the topic.
            on_error: what to do with records that can't be decoded; see `topic`. It applies to all streams of
                the topic.
        """
        self._check_declared(topic, "stream()")
        if on_error is not None:
            self._set_topic_rule(topic.name, self._rule(on_error, "stream()"))
        self._set_watermark(topic.name, watermark)
        root = _Node(_Source(topic))
        self._roots.append(root)
        return Stream(self, root)

    def table(
        self, topic: TopicSpec[_K, _V], *, name: str | None = None, on_error: OnError | None = None
    ) -> Table[_K, _V]:
        """The newest value of each key of `topic`, as a table to join with.

        A record puts the row of its key, and a tombstone deletes it. The topic is usually compacted
        (`cleanup.policy=compact`). It is read from its beginning. The rows are state, committed with the
        epochs; so a restart reads none of the topic again. Event time doesn't wait for a topic that is only
        read as a table.

        Args:
            topic: the source.
            name: of the table and its state. Default: that of the topic. A job is refused if a table was
                renamed or removed.
            on_error: what to do with a record that has no key: "stop", "skip" or a dead-letter topic. It also
                applies to records that can't be decoded, if the topic has no rule of its own.

        Raises:
            JobError: the topic is a table of another name already.
        """
        self._check_declared(topic, "table()")
        if name is not None:
            _check_name(name, "The table name", " with name=")
        chosen = topic.name if name is None else name
        known = self._tables.get(topic.name)
        rule = self._rule(on_error, f"the table {chosen!r}")
        if known is not None:
            step = cast("KeepTable", known._node.step)  # pyright: ignore[reportPrivateUsage]
            if name not in (None, step.name) or (on_error is not None and rule != step.on_error):
                raise JobError(
                    f"The topic {topic.name!r} is declared as a table twice, in different ways.",
                    remedy="Declare it once, and use the returned table in all joins.",
                )
            return known
        root = _Node(_Source(topic))
        self._roots.append(root)
        table = self._tables[topic.name] = Table(self, root.add(KeepTable(chosen, topic.value, rule)))
        return table

    @overload
    def merge(
        self, first: Stream[_K, _V] | TopicSpec[_K, _V], second: Stream[_K, _V2] | TopicSpec[_K, _V2], /
    ) -> Stream[_K, _V | _V2]: ...
    @overload
    def merge(
        self,
        first: Stream[_K, _V] | TopicSpec[_K, _V],
        second: Stream[_K, _V2] | TopicSpec[_K, _V2],
        third: Stream[_K, _V3] | TopicSpec[_K, _V3],
        /,
    ) -> Stream[_K, _V | _V2 | _V3]: ...
    @overload
    def merge(self, *inputs: Stream[_K, Any] | TopicSpec[_K, Any]) -> Stream[_K, Any]: ...
    def merge(self, *inputs: Stream[Any, Any] | TopicSpec[Any, Any]) -> Stream[Any, Any]:
        """Merge several streams into one. A handler after it sees all their records, with one state per key.

        One stage reads all the topics: partition n of each of them belongs to the same shard. So they need
        the same number of partitions and the same kind of key. For other topics, put a `key_by` in front:
        the cluster creates its repartition topic with the right number of partitions.

        A shard processes the record with the smallest timestamp next. If timestamps are equal, the input that
        is named first comes first. `max.task.idle.ms` sets how long a shard waits for an empty topic.
        `ctx.topic` tells where a record comes from.

        The stage has the name of its first input. A job may add inputs to a merge later and keep its state.

        Args:
            inputs: two or more streams or topics of this job.

        Raises:
            JobError: they can't be merged.
        """
        streams = [one if isinstance(one, Stream) else self.stream(one) for one in inputs]
        if len(streams) < 2:
            raise JobError(
                f"merge() got {len(streams)} stream{'s' if len(streams) != 1 else ''}.",
                remedy="Give it two or more streams or topics.",
            )
        nodes = [stream._open_node(self) for stream in streams]  # pyright: ignore[reportPrivateUsage]
        merged = _Node(_Merge(), tuple(nodes))
        for node in nodes:
            node.children.append(merged)
        self._merges.append(merged)
        return Stream(self, merged)

    def build(self, settings: Settings) -> Topology:
        """Build the validated topology.

        Args:
            settings: the settings of the run. Every process has to build the job with the same settings,
                because topics that declare no isolation level get it from them.

        Raises:
            JobError: the job can't run as it is written.
        """
        default = settings.isolation_level
        self._codec_settings.update(settings.as_mapping())
        topics = {
            name: replace(topic, isolation=default) if name in self._isolation_unset else topic
            for name, topic in self._topics.items()
        }
        builder = _Builder(self.name, topics, self._topic_rules, self._on_error)
        builder.lay_out(self._roots, self._merges, self._joins)
        for root in self._roots:
            builder.add_root(root)
        stages = builder.stages()
        if not stages:
            raise JobError(
                f"The job {self.name!r} has no handlers.",
                remedy="Decorate a function with @job.process(topic, to=...), or use job.stream(topic).",
            )
        read = {topic for stage in stages for topic in stage.topics}
        declared = {topic: watermark for topic, watermark in self._watermarks.items() if topic in read}
        stages = with_event_time(stages, declared)
        return Topology(self.name, _upstream_first(stages), topics=tuple(topics.values()))

    def _stores(self, handler: str, states: object) -> tuple[StateStore, ...]:
        """A handler's declared states, with codecs that know the run's settings."""
        stores: list[StateStore] = []
        for declared in check_states(handler, states):
            name = f"{handler}/{declared.name}"
            state = replace(declared, value=self._bound(declared.value, name, "state"))
            if isinstance(state, MapState):
                state = self._with_bound_key(cast("MapState[Any, Any]", state), name)
            stores.append(StateStore(handler, declared, state))
        return tuple(stores)

    def _with_bound_key(self, state: MapState[Any, Any], name: str) -> State:
        if not isinstance(state.key, Codec):
            return state
        return replace(state, key=cast("Codec[Any]", self._bound(state.key, name, "key")))

    def _bound(self, kind: Kind | type[Any], name: str, part: Literal["key", "value", "state"]) -> Kind:
        """A kind as it is declared, with codecs for one use. They are the same objects each time, because
        topics are compared.
        """
        kind = declared_kind(kind, part)
        if isinstance(kind, ModelCodec) and part == "key":
            check_key_model(kind, repr(name))
        if not isinstance(kind, Codec):
            return kind
        known = self._bound_codecs.get((name, part, kind))
        if known is None:
            # The settings are known when `build` runs, and a codec is opened later still.
            known = bound_codec(kind, CodecUse(name, part, MappingProxyType(self._codec_settings)))
            for one in (kind, known):
                self._bound_codecs[name, part, cast("Codec[Any]", one)] = known
        return known

    def _rule(self, on_error: OnError | None, what: str) -> OnError:
        """`on_error` of `what`, after checks. The job's default if it is None."""
        if on_error is None:
            return self._on_error or "stop"
        if isinstance(on_error, TopicSpec):
            self._check_declared(on_error, "on_error=")
        elif on_error not in ("stop", "skip"):
            raise JobError(
                f"on_error={on_error!r} of {what} is unknown.",
                remedy="Use on_error='stop', 'skip', or a topic declared on the job.",
            )
        return on_error

    def _set_topic_rule(self, name: str, rule: OnError | None) -> None:
        known = self._topic_rules.get(name)
        if None not in (known, rule) and known != rule:
            raise JobError(
                f"The topic {name!r} has two on_error rules for records that can't be decoded: {known!r} "
                f"and {rule!r}.",
                remedy="A record is decoded once for all its handlers, so give on_error in one place.",
            )
        self._topic_rules[name] = rule if known is None else known

    def _set_watermark(self, name: str, watermark: Watermark | None) -> None:
        if watermark is None:
            return
        if not isinstance(watermark, Watermark):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"watermark={bounded_repr(watermark)} of the topic {name!r} is not a Watermark.",
                remedy="Use watermark=Watermark(max_delay_ms=5_000), from fcluster.",
            )
        known = self._watermarks.setdefault(name, watermark)
        if known != watermark:
            raise JobError(
                f"The topic {name!r} has two watermarks: {known} and {watermark}.",
                remedy="A shard has one event time, so give it in one place.",
            )

    def _check_declared(self, topic: TopicSpec, where: str) -> None:
        if not isinstance(topic, TopicSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JobError(
                f"{where} got {topic!r}, not a topic.",
                remedy=f"Declare it first: t = job.topic({str(topic)!r}), and use t.",
            )
        if self._topics.get(topic.name) != topic:
            raise JobError(
                f"{where} got the topic {topic.name!r}, which was not declared on the job {self.name!r}.",
                remedy=f"Use the topic that job.topic({topic.name!r}) of this job returns.",
            )

    def _check_topic_name(self, name: str) -> None:
        _check_name(name, "The topic name")
        internal = name.startswith(f"{self.name}-") and name.endswith(_INTERNAL_SUFFIXES)
        if internal or is_internal_topic(name) or name == journal_topic(self.name) or name.startswith("__"):
            raise JobError(
                f"The topic name {name!r} is reserved for internal topics.",
                remedy="Choose a name that doesn't look like <job>-...-changelog or <job>-...-repartition "
                "(with or without a suffix), <job>-journal or __...",
            )
        other = colliding_topic(name, self._topics)
        if other is not None:
            raise JobError(
                f"The topics {other!r} and {name!r} can't both exist: Kafka treats '.' and '_' in topic "
                "names as equal.",
                remedy="Correct the misspelt one, or rename one of them.",
            )


class _Builder:
    """Turns the graph of streams into stages.

    `lay_out` comes first. A user's topic is an input; so is the topic after a `key_by`. A merge or a join
    puts several inputs into one stage. Then each path through the graph becomes a chain.
    """

    def __init__(
        self,
        job: str,
        topics: Mapping[str, TopicSpec],
        topic_rules: Mapping[str, OnError | None],
        default_rule: OnError | None,
    ) -> None:
        self._job = job
        self._topic_rules = topic_rules
        self._default_rule = default_rule
        self._topics = topics
        self._input_names: dict[_Seed, str] = {}
        self._stage_of: dict[str, list[str]] = {}
        """For each input: the inputs of its stage, in one shared list. A stage has the name of its first
        input.
        """
        self._inputs: dict[str, tuple[TopicSpec, bool]] = {}
        self._chains: dict[str, list[Chain]] = {}
        """The input of each name."""
        self._process_names: dict[str, _Node] = {}
        self._joined_tables: set[str] = set()

    # --- laying out -----------------------------------------------------------------------------------

    def lay_out(self, roots: Sequence[_Node], merges: Sequence[_Node], joins: Sequence[_Node]) -> None:
        """Name the inputs and decide which of them belong to one stage."""
        self._joined_tables = {join.step.table.name for join in joins if isinstance(join.step, JoinTable)}
        for root in roots:
            name = cast(_Source, root.step).topic.name
            self._input_names[name] = name
        groups: dict[_Seed, list[_Seed]] = {}
        for merge in merges:
            seeds = list(dict.fromkeys(_seeds(merge)))
            united = list(dict.fromkeys(one for seed in seeds for one in groups.get(seed, [seed])))
            groups |= dict.fromkeys(united, united)
        for join in joins:
            # Inputs that are in one stage already come first: a further join doesn't rename it.
            places = {seed: place for place, seed in enumerate(groups)}
            seeds = sorted(dict.fromkeys(_seeds(join)), key=lambda seed: places.get(seed, len(places)))
            united = list(dict.fromkeys(one for seed in seeds for one in groups.get(seed, [seed])))
            groups |= dict.fromkeys(united, united)
        for root in roots:
            self._name_inputs(root, groups)
        for seed, name in self._input_names.items():
            self._stage_of[name] = [self._input_names[one] for one in groups.get(seed, [seed])]

    def _name_inputs(self, node: _Node, groups: Mapping[_Seed, list[_Seed]]) -> None:
        """Name the input after each `key_by` that follows `node`."""
        for child in node.children:
            for seed in groups.get(child, [child]):
                if isinstance(seed, _Node) and _opens_input(seed) and seed not in self._input_names:
                    self._input_names[seed] = self._input_name(seed, groups)
            self._name_inputs(child, groups)

    def _input_name(self, key_by: _Node, groups: Mapping[_Seed, list[_Seed]]) -> str:
        given = cast(_KeyBy, key_by.step).name
        name = given or _stage_name(key_by)
        taken = self._input_names.values()
        if given is None:
            # Several key_by before one merge can't all be named after the same handler.
            merged = {self._input_names.get(seed) for seed in groups.get(key_by, ())}
            number = 2
            while name in taken and name in merged:
                name, number = f"{_stage_name(key_by)}-{number}", number + 1
        if name in taken:
            raise _stage_name_clash(name)
        return name

    # --- chains ---------------------------------------------------------------------------------------

    def add_root(self, root: _Node) -> None:
        source = self._topics[cast(_Source, root.step).topic.name]
        if not root.children:
            raise JobError(
                f"The stream on topic {source.name!r} has nothing after it.",
                remedy="Add .process(handler) or .to(topic), or remove it.",
            )
        self._open_input(source.name, source, internal=False)
        for child in root.children:
            self._walk(child, source.name, ())

    def stages(self) -> list[Stage]:
        built: dict[str, Stage] = {}
        for opened in self._inputs:
            name, *_ = names = self._stage_of[opened]
            if name not in built:
                built[name] = self._stage(name, names)
        return list(built.values())

    def _stage(self, name: str, names: Sequence[str]) -> Stage:
        # A record of a topic that is both a table and a stream is in the table before others look it up.
        chains = [
            replace(chain, input=number)
            for number, one in enumerate(names)
            for chain in sorted(self._chains[one], key=lambda chain: not chain.tables)
        ]
        inputs = [
            Input(*self._inputs[one], one, self._source_rule(self._inputs[one][0], self._chains[one]))
            for one in names
        ]
        if len({codec_name(source.topic.key) for source in inputs}) > 1:
            joins = (step for chain in chains for step in chain.operators)
            are_joined = any(isinstance(step, JoinTable | JoinStreams) for step in joins)
            raise _different_keys(inputs, are_joined=are_joined)
        stores = tuple(dict.fromkeys(step.name for chain in chains for step in chain.stateful))
        changelog = changelog_topic(self._job, name) if stores else None
        return Stage(name, tuple(inputs), tuple(chains), stores, changelog)

    def _open_input(self, name: str, topic: TopicSpec, *, internal: bool) -> None:
        self._inputs.setdefault(name, (topic, internal))
        self._chains.setdefault(name, [])

    def _walk(self, node: _Node, source: str, before: tuple[Operator, ...]) -> None:
        """Continue from the input `source`, after these operators."""
        step = node.step
        if isinstance(step, _Sink):
            self._end_chain(source, before, None, self._topics[step.topic.name], step.on_error)
        elif isinstance(step, _KeyBy):
            self._walk_key_by(node, step, source, before)
        elif isinstance(step, Operator):
            if isinstance(step, StatefulOperator):
                # Both sides of a join have its name. They meet in one node.
                self._claim_process_name(
                    step.name, node.children[0] if isinstance(step, JoinStreams) else node
                )
            if isinstance(step, Window | JoinStreams):
                _check_in_time(step, before)
            if isinstance(step, KeepTable) and step.name not in self._joined_tables:
                raise JobError(
                    f"The table {step.name!r} is not used.",
                    remedy="Join a stream with it, stream.join(table), or remove it.",
                )
            self._walk_on(node, step, source, (*before, step))
        elif isinstance(step, _Merge):
            self._walk_on(node, step, source, before)

    def _walk_on(
        self, node: _Node, step: _Merge | Operator, source: str, operators: tuple[Operator, ...]
    ) -> None:
        if not node.children:
            if isinstance(step, Branch) and step.is_rest:
                return
            if not isinstance(step, Process | KeepTable):
                raise JobError(
                    f"The stream on topic {self._inputs[source][0].name!r} ends in a {_step_name(step)} with "
                    "nothing after it.",
                    remedy="Add .process(handler) or .to(topic), or remove it.",
                )
            self._end_chain(source, operators, None, None)
        stateful = [operator.name for operator in operators if isinstance(operator, StatefulOperator)]
        if len(node.children) > 1 and stateful:
            raise JobError(
                f"The output of {stateful[-1]!r} is used in {len(node.children)} places, so it "
                "would run several times for each record.",
                remedy="Write it to a topic, and use the stream of that topic in each place: "
                "stream = stream.through(topic).",
            )
        for child in node.children:
            self._walk(child, source, operators)

    def _walk_key_by(self, node: _Node, step: _KeyBy, source: str, before: tuple[Operator, ...]) -> None:
        read = self._inputs[source][0]
        what = f"key_by ({rekey_description(step.by)}) in the stream on topic {read.name!r}"
        if not node.children:
            raise JobError(
                f"The {what} has nothing after it.",
                remedy="Add .process(handler) or .to(topic), or remove it.",
            )
        changed = any(not isinstance(operator, Filter | Peek | Branch) for operator in before)
        value: ValueKind = (step.value or "json") if changed else read.value
        if isinstance(step.by, str) and value in ("text", "bytes", "int"):
            raise JobError(
                f"The {what} names a field, but the values there are {value}, not JSON objects.",
                remedy="Declare the topic with value='json', or give key_by a function.",
            )
        if isinstance(step.by, str) and isinstance(value, ModelCodec):
            check_field(value.model, step.by, f"The {what}")
        if not _opens_input(node):
            sink = cast(_Sink, node.children[0].step)
            self._end_chain(source, before, step, self._topics[sink.topic.name], sink.on_error)
            return
        name = self._input_names[node]
        topic = TopicSpec(repartition_topic(self._job, name), step.key, step.value or value)
        known = self._inputs.get(name)
        if known is not None and kind_title(known[0].value) != kind_title(topic.value):
            raise JobError(
                f"The {what} would write {kind_title(topic.value)} values for some of its inputs, and "
                f"{kind_title(known[0].value)} values for others.",
                remedy="Say which: key_by(..., value=).",
            )
        self._end_chain(source, before, step, topic if known is None else known[0])
        if known is None:  # otherwise another path through a merge has set it
            self._open_input(name, topic, internal=True)
            for child in node.children:
                self._walk(child, name, ())

    def _end_chain(
        self,
        source: str,
        operators: tuple[Operator, ...],
        key_by: _KeyBy | None,
        sink: TopicSpec | None,
        sink_rule: OnError | None = None,
    ) -> None:
        named = [operator.name for operator in operators if isinstance(operator, StatefulOperator)]
        plain = named[0] if named else f"{source}-to-{sink.name if sink else 'nowhere'}"
        taken = {chain.name for chains in self._chains.values() for chain in chains}
        name, number = plain, 2
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        rekey, version = (None, None) if key_by is None else (key_by.by, key_by.version)
        rekey_rule: OnError = "stop" if key_by is None else key_by.on_error
        if sink_rule is None:
            # An error while writing is the previous step's error.
            topic_rule = self._topic_rules.get(self._inputs[source][0].name)
            source_rule = _first_given(topic_rule, self._default_rule)
            in_front = operators[-1].on_error if operators else source_rule
            sink_rule = in_front if key_by is None else rekey_rule
        self._chains[source].append(Chain(name, operators, rekey, sink, version, rekey_rule, sink_rule))

    def _source_rule(self, source: TopicSpec, chains: Sequence[Chain]) -> OnError:
        """What to do with a record of `source` that can't be decoded."""
        said = {_first_given(*(step.on_error for step in chain.stateful)) for chain in chains}
        agreed = said.pop() if len(said) == 1 else "stop"
        return _first_given(self._topic_rules.get(source.name), self._default_rule, agreed)

    def _claim_process_name(self, name: str, node: _Node) -> None:
        if self._process_names.setdefault(name, node) is not node:
            raise JobError(
                f"Two handlers, windows, tables or joins of the job {self._job!r} are named {name!r}, and "
                "the name also identifies their state.",
                remedy="Give one of them another name with name=.",
            )


def pair(left: Any, right: Any) -> dict[str, Any]:
    """What a join passes on if it isn't told otherwise: both values."""
    return {"left": left, "right": right}


def _first_given(*rules: Any) -> OnError:
    for rule in rules:
        if rule is not None:
            return rule
    return "stop"


_Seed = str | _Node
"""The beginning of an input: a user's topic, by name, or a `key_by`."""


def _opens_input(node: _Node) -> bool:
    """Whether the steps after this `key_by` read a repartition topic. They don't if only `.to(topic)`
    follows.
    """
    if not isinstance(node.step, _KeyBy) or not node.children:
        return False
    return not (len(node.children) == 1 and isinstance(node.children[0].step, _Sink))


def _seeds(node: _Node) -> Iterator[_Seed]:
    """The inputs whose records reach `node`, in order. An input may occur several times."""
    if isinstance(node.step, _Source):
        yield node.step.topic.name
    elif isinstance(node.step, _KeyBy):
        yield node
    else:
        for parent in node.parents:
            yield from _seeds(parent)


def _value_of(node: _Node) -> tuple[ValueKind, bool]:
    """The codec in which the values behind this node can be kept, and whether they are those that were
    read.
    """
    step = node.step
    if isinstance(step, _Source):
        return step.topic.value, True
    if isinstance(step, _KeyBy):
        return step.value or _value_of(node.parents[0])[0], True
    if isinstance(step, Filter | Peek | Branch):
        return _value_of(node.parents[0])
    if isinstance(step, _Merge):
        found = [_value_of(parent) for parent in node.parents]
        if len({kind_title(kind) for kind, _same in found}) == 1:
            return found[0][0], all(same for _kind, same in found)
    return "json", False


def _step_name(step: _Merge | Operator) -> str:
    """The step's name in a job file."""
    return "merge" if isinstance(step, _Merge) else step_kind(step)


def _different_keys(inputs: Sequence[Input], *, are_joined: bool) -> JobError:
    kinds = ", ".join(f"{source.topic.name!r} ({kind_title(source.topic.key)})" for source in inputs)
    if are_joined:
        return JobError(
            f"Topics are joined whose keys are of different kinds: {kinds}. Equal keys would be different "
            "bytes, and never meet.",
            remedy="Declare the topics with the same key=, or put key_by(..., key=) in front of the join.",
        )
    return JobError(
        f"Topics are merged whose keys are of different kinds: {kinds}. Equal keys would be different bytes, "
        "and so have different states.",
        remedy="Declare the topics with the same key=, or put key_by(..., key=) in front of some of them.",
    )


def _stage_name(key_by: _Node) -> str:
    """The first handler after `key_by`, depth first. Without one, the first table that is joined, or the
    first topic written to.
    """
    names = list(_names_behind(key_by))
    for kind in (Process, JoinTable, _Sink):
        for found, name in names:
            if found is kind:
                return name
    return "unnamed"


def _names_behind(node: _Node) -> Iterator[tuple[type, str]]:
    for child in node.children:
        if isinstance(child.step, StatefulOperator):
            yield Process, child.step.name
        elif isinstance(child.step, JoinTable):
            yield JoinTable, f"with-{child.step.table.name}"
        elif isinstance(child.step, _Sink):
            yield _Sink, child.step.topic.name
        if not isinstance(child.step, _KeyBy):
            yield from _names_behind(child)


def _check_in_time(step: Window | JoinStreams, before: Sequence[Operator]) -> None:
    """A step that needs records in time must not follow one whose results are late."""
    what = "window" if isinstance(step, Window) else "join"
    for former in before:
        if isinstance(former, Window) or (isinstance(former, JoinStreams) and former.how != "inner"):
            kind = "window" if isinstance(former, Window) else "join"
            raise JobError(
                f"The {what} {step.name!r} follows the {kind} {former.name!r} directly: results of "
                f"{former.name!r} would be too late for it, as event time has passed them.",
                remedy="Put .key_by('key') between them, or a function that gives another key.",
            )


def _stage_name_clash(name: str) -> JobError:
    return JobError(
        f"The stage after key_by would be named {name!r}, but a source topic or another stage of the job "
        "already has that name.",
        remedy="Rename the handler after it with name=, or the stage with key_by(..., name=).",
    )


def _upstream_first(stages: list[Stage]) -> tuple[Stage, ...]:
    by_source = {topic: stage for stage in stages for topic in stage.topics}
    ordered: list[Stage] = []
    path: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage in ordered:
            return
        if stage in path:
            raise _loop([*path[path.index(stage) :], stage])
        path.append(stage)
        for topic in written_topics(stage):
            if topic.name in by_source:
                visit(by_source[topic.name])
        ordered.append(path.pop())

    # Depth-first order, reversed, is downstream last. Iterating backwards otherwise keeps the job file's
    # order.
    for stage in reversed(stages):
        visit(stage)
    return tuple(reversed(ordered))


def _loop(path: list[Stage]) -> JobError:
    names = ["+".join(stage.topics) for stage in path]
    if len(path) == 2 and len(path[0].inputs) == 1:
        message = f"The job reads the topic {names[0]!r} and writes its results back to it: a loop."
    elif len(path) == 2:
        merged = ", ".join(map(repr, path[0].topics))
        message = f"The job merges {merged} and writes its results back to one of them: a loop."
    else:
        message = f"The topics {' -> '.join(names)} feed each other: a loop."
    return JobError(message, remedy="Write to a topic that the job doesn't read upstream.")


def _process_operator(handler: Handler, name: str | None) -> Process:
    _check_function(handler, "handler", ("ctx", "value"), may_yield=True)
    if name is None:
        name = getattr(handler, "__name__", None)
        if name is None or name == "<lambda>":
            raise JobError(
                f"The handler {handler!r} has no name of its own, but the name identifies its state.",
                remedy="Name it with name=.",
            )
    _check_name(name, "The handler name", " with name=")
    return Process(name, handler, returns=_returns(handler))


def _on_timer(node: _Node, name: str) -> Callable[[_Function], _Function]:
    """See `HandlerFunction.on_timer`."""

    def decorate(function: _Function) -> _Function:
        _add_timer(node, name, function)
        return function

    return decorate


def _checked_timers(handler: str, timers: Any) -> Mapping[str, Handler]:
    if timers is None:
        return {}
    if not isinstance(timers, Mapping):
        raise JobError(
            f"timers= of the handler {handler!r} got {timers!r}.",
            remedy="Give a dict: timers={'remind': function}.",
        )
    return cast("Mapping[str, Handler]", timers)


def _add_timer(node: _Node, name: str, function: Any) -> None:
    step = cast(Process, node.step)
    what = f"The timer name {name!r} of the handler {step.name!r}"
    if not isinstance(name, str) or not _LEGAL_NAME.fullmatch(name) or len(name) > _TIMER_CHARACTERS_MAX:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(
            f"{what} isn't valid.",
            remedy=f"Use at most {_TIMER_CHARACTERS_MAX} letters a-z and A-Z, digits, '.', '_' and '-'.",
        )
    if any(timer.name == name for timer in step.timers):
        raise JobError(f"{what} is taken.", remedy="Each name has one on_timer function.")
    _check_function(function, "on_timer", ("key", "ctx"), may_yield=True)
    node.step = replace(step, timers=(*step.timers, TimerFunction(name, function, _returns(function))))


def _returns(handler: Handler) -> Literal["many", "one"]:
    # A decorator around a generator function (functools.wraps) returns the generator too.
    for candidate in (handler, inspect.unwrap(handler), getattr(handler, "__call__", None)):  # noqa: B004
        if inspect.isgeneratorfunction(candidate):
            return "many"
    return "one"


def _check_function(
    function: Any, role: str, parameters: tuple[str, ...], *, may_yield: bool = False
) -> None:
    call = f"{role}({', '.join(parameters)})"
    if not callable(function):
        raise JobError(f"{role} got {function!r}, not a function.", remedy=f"Pass a function for {call}.")
    name = getattr(function, "__name__", repr(function))
    for candidate in (function, inspect.unwrap(function), getattr(function, "__call__", None)):  # noqa: B004
        if inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate):
            raise JobError(
                f"The {role} {name!r} is declared with async def, and async functions aren't supported.",
                remedy="Declare it with plain def.",
            )
        if not may_yield and inspect.isgeneratorfunction(candidate):
            raise JobError(
                f"The {role} function {name!r} yields, but it has to return one result.",
                remedy="Return it, or use .flat_map(function) to emit several values.",
            )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built-ins such as str have no signature
    try:
        signature.bind(*parameters)
    except TypeError:
        raise JobError(
            f"The {role} {name!r} is declared as {name}{signature}, but is called with {len(parameters)} "
            f"argument{'s' if len(parameters) > 1 else ''}.",
            remedy=f"Declare it as {name}({', '.join(parameters)}).",
        ) from None


def _check_name(name: str, what: str, how: str = "") -> None:
    if not isinstance(name, str) or not _LEGAL_NAME.fullmatch(name) or name in (".", ".."):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise JobError(
            f"{what} {name!r} isn't valid, because it becomes part of Kafka topic names.",
            remedy=f"Choose one{how} of letters a-z and A-Z, digits, '.', '_' and '-'.",
        )
    if len(name) > TOPIC_NAME_CHARACTERS_MAX:
        raise JobError(
            f"{what} {name!r} has {len(name)} characters; Kafka allows {TOPIC_NAME_CHARACTERS_MAX}.",
            remedy=f"Choose a shorter one{how}.",
        )


def _chosen_isolation(topic: str, isolation: str | None, options: Mapping[str, Any]) -> Isolation | None:
    given: dict[str, Any] = {} if isolation is None else {"isolation": isolation}
    for option, value in options.items():
        if option.replace("_", ".").replace("-", ".").lower() not in _ISOLATION_OPTIONS:
            raise JobError(
                f"The option {option!r} of the topic {topic!r} is unknown.",
                remedy="Topics take key, value and isolation (also as 'kafka.consumer.isolation-level').",
            )
        given[option] = value
    chosen: set[Isolation] = set()
    for option, value in given.items():
        level = isolation_from(value)
        if level is None:
            raise JobError(
                f"{option}={value!r} of the topic {topic!r} is unknown.",
                remedy=f"Use one of {', '.join(map(repr, ISOLATIONS))}.",
            )
        chosen.add(level)
    if len(chosen) > 1:
        raise JobError(
            f"The topic {topic!r} has two isolation levels.", remedy="Keep only one of the options."
        )
    return chosen.pop() if chosen else None
