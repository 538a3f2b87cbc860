"""Streams and tables of a job file: each call adds a step to the job's graph."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar, overload

from fcluster.api.call_hints import hints_at_calls
from fcluster.api.checks import (
    check_async_function,
    check_field_of,
    check_function,
    check_function_of,
    check_name,
    checked_version,
    given,
)
from fcluster.api.context import CallContext, Context, Handler, JoinFunction, OfRecord, RecordContext
from fcluster.api.declarations import Declarations
from fcluster.api.handlers import add_timer, checked_timers, process_operator
from fcluster.api.nodes import KeyBy, Node, Sink, key_of, value_of
from fcluster.api.tables import (
    GlobalTable,
    Table,
    check_of_job,
    checked_history,
    checked_ttl,
    described_table,
    key_of_global,
    looked_up,
    pair,
)
from fcluster.api.windowed import (
    GatheredStream,
    WindowedStream,
    check_all_windows,
    check_windows,
    emitting,
)
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.aggregates import Aggregate, check_running_aggregates, count
from fcluster.graph.calls import CONCURRENCY_MAX, ONCE, Circuit, Retry, check_count, check_together
from fcluster.graph.codecs import Codec, Kind, codec_name, kind_title, may_carry, may_take
from fcluster.graph.durations import MILLISECOND, check_duration
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.joins import How, duration_ms, interval_ms
from fcluster.graph.operators import (
    Branch,
    Filter,
    FlatMap,
    GroupTable,
    JoinStreams,
    JoinTable,
    KeepTable,
    KeyKind,
    Map,
    MapAsync,
    OnError,
    Operator,
    Peek,
    Rekey,
    TopicSpec,
    ValueKind,
    Window,
)
from fcluster.graph.record import Record
from fcluster.graph.states import State
from fcluster.graph.timers import TimerClock
from fcluster.graph.windows import Sized, Windows

_K = TypeVar("_K")
_V = TypeVar("_V")
_T = TypeVar("_T")

_Text = Literal["text"]
_NoText = Literal["bytes", "int", "json", "msgpack"]
_Of = Codec[_T] | type[_T]
"""A codec or a model whose values are of type `_T`."""


@hints_at_calls
class Stream(Generic[K_co, V_co]):
    """The records of a topic on their way through operators. Each call returns a new stream.

    For type checkers, it has the types of its keys and values: those that were declared for the topic, and
    then what the steps' functions return.

    Each step takes an `on_error`, which says what to do with a record that fails in this step: "stop" ends
    the job before the record, "skip" continues without it, and a topic of the job receives it as a dead
    letter. The default is that of the job (`Job(on_error=)`). A step's rule applies only to its own failures,
    not to those of later steps. A record that is skipped or becomes a dead letter leaves no other trace in
    its chain of steps, neither outputs nor state.

    The functions of `filter`, `map`, `flat_map`, `peek`, `branch` and `key_by` are called with a value. Those
    with two parameters are called with the record's context (`RecordContext`) and the value, as handlers are:
    `key_by(lambda ctx, reading: f"{ctx.key}/{reading['room']}")`.

    A null value (a tombstone) is None to the functions of all steps. It stays null through filters, through
    a map that returns None for it, and through a flat_map that returns [None] for it, and is written as null.
    """

    __slots__ = ("_closed", "_declared", "_node")

    def __init__(self, declared: Declarations, node: Node, closed: bool = False) -> None:
        self._declared = declared
        self._node = node
        self._closed = closed

    @overload
    def filter(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> Stream[K_co, V_co]: ...
    @overload
    def filter(
        self, function: Callable[[RecordContext[K_co], V_co], Any], *, on_error: OnError | None = None
    ) -> Stream[K_co, V_co]: ...
    def filter(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Stream[K_co, Any]:
        """Keep the values for which `function(value)` is true. They stay as they are.

        `function` must not change the value: a value that has passed only filters is written with the bytes
        that it was read with.
        """
        check_function_of("record", function, "filter")
        return self._then(Filter(function, self._declared.rule(on_error, "filter")))

    @overload
    def map(self, function: Callable[[V_co], _T], *, on_error: OnError | None = None) -> Stream[K_co, _T]: ...
    @overload
    def map(
        self, function: Callable[[RecordContext[K_co], V_co], _T], *, on_error: OnError | None = None
    ) -> Stream[K_co, _T]: ...
    def map(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Stream[K_co, Any]:
        """Replace each value with `function(value)`. Key, timestamp and headers don't change."""
        check_function_of("record", function, "map")
        return self._then(Map(function, self._declared.rule(on_error, "map")))

    def map_async(
        self,
        function: Callable[[CallContext[K_co], V_co], Awaitable[_T]],
        *,
        concurrency: int = 100,
        timeout: timedelta = timedelta(seconds=30),
        retry: Retry | None = None,
        circuit: Circuit | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]:
        """Replace each value with `await function(call, value)`, for calls to other services. Key, timestamp
        and headers don't change.

        Many calls run at the same time. For each key there is one after the other, and results go on in the
        order of the records. A record waits outside of the epochs until its calls are done: its offset isn't
        committed, and barriers don't wait for it. A record that is replayed after a failure is called again;
        `call.idempotency_key` is then the same.

        Args:
            function: declared with `async def`. It runs in the event loop of the worker, which it mustn't
                block.
            concurrency: how many calls run at the same time in a worker, at most, over all its partitions.
            timeout: how long an attempt may take. Then it is cancelled, and has failed with `TimeoutError`.
            retry: when a call is made again. Default: never.
            circuit: when nobody is called for a while. Default: calls are always made.
            on_error: what to do with a record whose call has failed, after all attempts. Default: that of the
                job.

        Raises:
            JobError: an argument isn't valid.
        """
        check_async_function(function, "map_async", ("call", "value"))
        what = f"map_async {getattr(function, '__name__', '?')!r}"
        check_count("concurrency", concurrency, what, CONCURRENCY_MAX)
        check_duration(what, "timeout", timeout, MILLISECOND)
        options: list[tuple[str, Any, type]] = [("retry", retry, Retry), ("circuit", circuit, Circuit)]
        for name, option, kind in options:
            if not isinstance(option, kind | None):
                raise JobError(
                    f"{name}={bounded_repr(option)} of {what} is no {kind.__name__}.",
                    remedy=f"Use {name}={kind.__name__}(...), from fcluster.",
                )
        retries = ONCE if retry is None else retry
        check_together(what, retries, circuit)
        rule = self._declared.rule(on_error, "map_async")
        timeout_ms = timeout // MILLISECOND
        return self._then(MapAsync(function, concurrency, timeout_ms, retries, circuit, rule))

    @overload
    def flat_map(
        self, function: Callable[[V_co], Iterable[_T]], *, on_error: OnError | None = None
    ) -> Stream[K_co, _T]: ...
    @overload
    def flat_map(
        self,
        function: Callable[[RecordContext[K_co], V_co], Iterable[_T]],
        *,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    def flat_map(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Stream[K_co, Any]:
        """Replace each value with any number of values: those that `function(value)` returns as a list or
        other iterable, or yields. Key, timestamp and headers don't change.

        The values are passed on in order. If the function fails for a later value, the earlier ones leave no
        trace either. The step fails if the function returns None, a dict, text, bytes or a set: write `[]`
        for no values, `[value]` for one, and `sorted(values)` for a set.
        """
        check_function_of("record", function, "flat_map", may_yield=True)
        return self._then(FlatMap(function, self._declared.rule(on_error, "flat_map")))

    @overload
    def peek(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> Stream[K_co, V_co]: ...
    @overload
    def peek(
        self, function: Callable[[RecordContext[K_co], V_co], Any], *, on_error: OnError | None = None
    ) -> Stream[K_co, V_co]: ...
    def peek(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Stream[K_co, Any]:
        """Call `function(value)` for each value, such as for a log or a metric. The records stay as they are.

        `function` must not change the value. What it returns is ignored. It is called again for records that
        are replayed after a failure.
        """
        check_function_of("record", function, "peek")
        return self._then(Peek(function, self._declared.rule(on_error, "peek")))

    def branch(
        self, *functions: OfRecord[V_co, Any, K_co], on_error: OnError | None = None
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
            check_function_of("record", function, "branch")
        rule = self._declared.rule(on_error, "branch")
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
        by: Callable[[RecordContext[K_co], V_co], str],
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
        by: Callable[[RecordContext[K_co], V_co], Any],
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
    @overload
    def key_by(
        self,
        by: Callable[[RecordContext[K_co], V_co], _K],
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
            by: the field of the value that holds the new key, or a function of the value, or of the record's
                context and the value. `ctx.key` is the former key, which is gone behind this step.
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
            check_function_of("record", by, "key_by")
        elif not by:
            raise JobError("key_by got an empty field name.", remedy="Name the field that holds the key.")
        if name is not None:
            check_name(name, "The stage name")
        topic = self._declared.repartition_topic(name)
        key = self._declared.bound(key, topic, "key")
        if value is not None:
            value = self._declared.bound(value, topic, "value")
        said = checked_version(version, "key_by")
        return self._then(KeyBy(by, name, key, value, self._declared.rule(on_error, "key_by"), said))

    @overload
    def process(
        self,
        handler: Callable[[Context[K_co], V_co], Iterator[_T | Record]],
        *,
        to: TopicSpec[Any, _T] | str | None = None,
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
        to: TopicSpec[Any, _T] | str | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    def process(
        self,
        handler: Handler,
        *,
        to: TopicSpec | str | None = None,
        name: str | None = None,
        states: Sequence[State] = (),
        timers: Mapping[str, Handler] | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, Any]:
        """Call `handler(ctx, value)` for each record; see `Job.process`."""
        to = None if to is None else self._declared.target(to, "to=", key_of(self._node), "json")
        operator = process_operator(handler, name)
        rule = self._declared.rule(on_error, f"the handler {operator.name!r}")
        stores = self._declared.stores(operator.name, states)
        stream = self._then(replace(operator, on_error=rule, stores=stores))
        for timer_name, function in checked_timers(operator.name, timers).items():
            add_timer(stream._node, timer_name, function)
        if to is None:
            return stream
        stream.to(to)
        return Stream(self._declared, stream._node, closed=True)

    def window(
        self,
        windows: Windows,
        *,
        name: str,
        late: TopicSpec | str | None = None,
        emit: Literal["close", "update"] | timedelta = "close",
        clock: TimerClock = "event",
        on_error: OnError | None = None,
    ) -> WindowedStream[K_co, V_co]:
        """Gather the records of each key in windows of time. `.aggregate(...)` says what to compute.

        A record is in the windows that its timestamp is in. A window closes when event time reaches its end,
        plus its grace: then its result goes on, once. (A session closes once event time has passed that.) The
        job uses event time; declare a `Watermark` where records come out of order. (A `Counted` window closes
        with its last record, and needs no event time, unless results go on at intervals.)

        With `clock="processing"`, a record is in the windows of the time at which it is processed, by the
        clock of the worker's host. A window closes when that clock reaches its end, also if no record comes.
        Each record counts once, but which windows it is in differs from run to run.

        Args:
            windows: `Tumbling`, `Hopping`, `Cumulative`, `Sliding`, `Session` or `Counted`.
            name: of the step and its state. A job is refused if a window that may be open was renamed.
            late: a topic, or its name, that gets the records that are too late for all their windows, as they
                are. They are counted in any case.
            emit: "close": a result goes on once, when its window closes. "update": it goes on after each
                record in the window, with the record's timestamp and headers. A timedelta: whenever event
                time passes a multiple of it, the results of windows go on that have changed since; and when a
                window closes. In both cases, if a session has grown, or two have become one, what was passed
                on of them is withdrawn.
            clock: "event" or "processing". With "processing" there is neither `late` nor a grace, and
                intervals pass by the clock, too.
            on_error: what to do if an aggregate fails for a record, or a result can't be computed: "stop",
                "skip" or a dead-letter topic. It also applies to late records that can't be written. Default:
                that of the job.
        """
        check_windows(windows, name, late, emit, clock)
        late = self._late(late, f"the window {name!r}", self._node)
        rule = self._declared.rule(on_error, f"the window {name!r}")
        self._check_open()
        kept, same = value_of(self._node)
        window = Window(name, windows, (), late, rule, clock=clock, value=kept, is_unchanged=same)
        what = f"the window {name!r}"
        self._declared.begin(what)

        def then(window: Window) -> Stream[Any, Any]:
            self._declared.complete(what)
            return self._then(window)

        return WindowedStream(then, emitting(window, emit))

    def window_all(
        self,
        windows: Sized,
        *,
        name: str,
        late: TopicSpec | str | None = None,
        emit: Literal["close", "update"] | timedelta = "close",
        clock: TimerClock = "event",
        on_error: OnError | None = None,
    ) -> GatheredStream[V_co]:
        """Gather all records in windows of time, whatever their keys are. `.aggregate(...)` says what to
        compute.

        Each shard computes its part of a window. When event time has passed the window's end and its grace in
        all of them, one shard gathers the parts through a repartition topic, and the result goes on, once. So
        the aggregates must be mergeable, as all of fcluster's are.

        With `clock="processing"`, one shard gets all records, and counts them by when it processes them.

        Args:
            windows: `Tumbling`, `Hopping` or `Cumulative`.
            name: of the step and its state, as in `window`. The parts are in a step `<name>-parts`.
            late: as in `window`.
            emit: "close": a result goes on once, when its window closes. A timedelta: at each multiple of it
                in event time, each shard tells what its part has gained; when event time has passed it in
                all shards, the results of windows that have changed go on; and when a window closes.
                "update": the part of each record is told, and a result goes on after each of them.
            clock: as in `window`.
            on_error: as in `window`. It also applies to parts that can't be written.
        """
        check_all_windows(windows, name, late, emit, clock)
        late = self._late(late, f"the window {name!r}", self._node)
        rule = self._declared.rule(on_error, f"the window {name!r}")
        self._check_open()
        what = f"the window {name!r}"
        self._declared.begin(what)

        def then(steps: Sequence[Window | KeyBy]) -> Stream[Any, Any]:
            self._declared.complete(what)
            stream: Stream[Any, Any] = self
            for step in steps:
                stream = stream._then(step)
            return stream

        window = Window(name, windows, (), late, rule, keyless=True, clock=clock)
        return GatheredStream(then, emitting(window, emit))

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
        other: GlobalTable[Any, Any],
        with_: None = None,
        *,
        on: str | OfRecord[V_co, Any, K_co] | None = None,
        how: Literal["inner", "left"] = "inner",
        on_error: OnError | None = None,
    ) -> Stream[K_co, dict[str, Any]]: ...
    @overload
    def join(
        self,
        other: GlobalTable[_K, _V],
        with_: Callable[[V_co, _V], _T],
        *,
        on: str | OfRecord[V_co, _K | None, K_co] | None = None,
        how: Literal["inner"] = "inner",
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    @overload
    def join(
        self,
        other: GlobalTable[_K, _V],
        with_: Callable[[V_co, _V | None], _T],
        *,
        on: str | OfRecord[V_co, _K | None, K_co] | None = None,
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
        late: TopicSpec | str | None = None,
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
        late: TopicSpec | str | None = None,
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
        late: TopicSpec | str | None = None,
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
        late: TopicSpec | str | None = None,
        on_error: OnError | None = None,
    ) -> Stream[K_co, _T]: ...
    def join(
        self,
        other: Table[Any, Any] | GlobalTable[Any, Any] | Stream[Any, Any],
        with_: JoinFunction | None = None,
        *,
        on: Rekey | None = None,
        within: timedelta | tuple[timedelta, timedelta] | None = None,
        name: str | None = None,
        how: How = "inner",
        grace: timedelta | None = None,
        late: TopicSpec | str | None = None,
        on_error: OnError | None = None,
    ) -> Stream[Any, Any]:
        """Join this stream, on the left, with a table, a global table or another stream.

        **With a table**, look up the row of each record's key in a table, and pass on `with_(value, row)`.

        A record meets the table as it is when the record's turn comes. The stage that reads the stream reads
        the table's topic, too, in the order of their timestamps: so it finds the row of its own time, as far
        as that was written in time. A row that changes later changes no result. Key, timestamp and headers
        don't change.

        **With a global table**, `on` gives the key of the row. Nothing is asked of the stream's keys and
        partitions.

        **With another stream**, pass on `with_(left, right)` for each pair of records of a key that are no
        further apart than `within` says. A pair is passed on when the later record comes, with the greater
        timestamp of the two. Records without a partner are passed on when event time has passed all partners
        that they could have had, and the grace. The job uses event time then.

        Except with a global table, partition n of the one and partition n of the other belong to the same
        shard. So both need the same number of partitions, the same kind of key and the same partitioner. If
        they don't have that, put a `key_by` in front.

        Args:
            other: what `Job.table` or `Job.global_table` returns, or another stream of the job.
            with_: called with the stream's value and that of the row or the other record. Default: a dict
                with the two as "left" and "right".
            on: of a join with a global table: the field of the value that is the row's key, or a function of
                the value. None as its value or as a result: no row belongs to the record. A record without
                that field fails. Default: the record's key.
            within: how much earlier and later than the left record the right one may be: one time for both,
                or a tuple with one for each.
            name: of a join of two streams, and of its state. A job is refused if such a join was renamed.
            how: "inner" passes on only what has a row or a partner. "left" passes on all records of this
                stream; without a row or partner, `with_` gets None for it. "outer", of two streams: also all
                records of the other one.
            grace: how much longer records that come late still find their partners.
            late: gets the records that are later still, as they are. They are counted in any case.
            on_error: what to do with a record that fails in the join: because `with_` or `on` does, or it has
                no key. (A left join with a table passes it on.)

        Raises:
            JobError: it is neither a table nor a stream of this job, the model of the values has no field
                `on`, or another argument is wrong.
        """
        if with_ is not None:
            check_function(with_, "join", ("left", "right"))
        if isinstance(other, Stream):
            _check_no_on(on, "stream")
            return self._join_stream(other, with_ or pair, within, name, how, grace, late, on_error)
        table = other
        if not isinstance(table, Table | GlobalTable):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"join() got {given(table)}, neither a table nor a stream.",
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
        rule = self._declared.rule(on_error, f"the join with {table.name!r}")
        if isinstance(table, GlobalTable):
            return self._join_global(table, with_ or pair, on, how, rule)
        _check_no_on(on, "table")
        joined, kept = looked_up(table, self._declared)
        self._check_open()
        node = self._node.add(JoinTable(joined, with_ or pair, how, rule), *kept)
        self._declared.joins.append(node)
        return Stream(self._declared, node)

    def _join_global(
        self,
        table: GlobalTable[Any, Any],
        with_: JoinFunction,
        on: Rekey | None,
        how: Literal["inner", "left"],
        rule: OnError,
    ) -> Stream[Any, Any]:
        check_of_job(table, self._declared)
        key = key_of_global(table)
        if on is None:
            own = key_of(self._node)
            if codec_name(own) != codec_name(key):
                raise JobError(
                    f"The join with {table.name!r} got no on=, and the stream's keys are {kind_title(own)}, "
                    f"those of the table {kind_title(key)}: they never meet.",
                    remedy="Say with on= which field of the value, or function of it, gives the row's key.",
                )
        elif not isinstance(on, str):
            check_function_of("record", on, "join(on=)")
        elif not on:
            raise JobError("join(on=) got an empty field name.", remedy="Name the field that refers to it.")
        else:
            value, is_known = value_of(self._node)
            what = f"on={on!r} of the join with {table.name!r}"
            check_field_of(value if is_known else None, on, what, "join(on=)")
        self._check_open()
        node = self._node.add(JoinTable(described_table(table), with_, how, rule, on, key))
        self._declared.global_joins.append(node)
        return Stream(self._declared, node)

    def _join_stream(
        self,
        other: Stream[Any, Any],
        with_: JoinFunction,
        within: Any,
        name: Any,
        how: How,
        grace: Any,
        late: TopicSpec | str | None,
        on_error: OnError | None,
    ) -> Stream[Any, Any]:
        if name is None or within is None:
            raise JobError(
                "A join of two streams got no name= or no within=.",
                remedy="Say which pairs it finds, and what its state is called: "
                "join(other, within=timedelta(minutes=5), name='paid').",
            )
        check_name(name, "The join name", " with name=")
        if how not in ("inner", "left", "outer"):
            raise JobError(
                f"how={bounded_repr(how)} of the join {name!r} is unknown.",
                remedy="Use how='inner', how='left' or how='outer'.",
            )
        before_ms, after_ms = interval_ms(name, within)
        grace_ms = 0 if grace is None else duration_ms(name, "grace", grace)
        rule = self._declared.rule(on_error, f"the join {name!r}")
        self._check_open()
        nodes = self._node, other._open_node(self._declared, "join")
        late = self._late(late, f"the join {name!r}", *nodes)
        (left, left_same), (right, right_same) = map(value_of, nodes)
        made = JoinStreams(
            name, "left", with_, before_ms, after_ms, left, right, left_same, how, grace_ms, late, rule
        )
        sides = nodes[0].add(made), nodes[1].add(replace(made, side="right", is_unchanged=right_same))
        return Stream(self._declared, self._declared.join_up(sides, self._declared.joins))

    def table(
        self: Stream[_K, _V | None],
        *,
        name: str,
        value: ValueKind | type[Any] | None = None,
        history: timedelta | None = None,
        ttl: timedelta | None = None,
        on_error: OnError | None = None,
    ) -> Table[_K, _V]:
        """The newest value of each key of this stream, as a table.

        A value puts the row of its key. None deletes it: a tombstone, or what a map or a handler has made of
        a value. The rows are state of the stage.

        Args:
            name: of the table and its state. A job is refused if a table was renamed or removed.
            value: how rows are kept. Default: as in the topic that was read, or "json" after a map or a
                handler.
            history: for how long former rows are kept; see `Job.table`.
            ttl: a row is forgotten this long after the time of its record, in event time: that isn't told,
                groups keep what it has contributed, and the next value of its key begins anew. For rows that
                don't change any more by then, such as results of windows. Default: rows are kept for good.
            on_error: what to do with a record that has no key, or whose value can't be kept. Default: that of
                the job.
        """
        check_name(name, "The table name", " with name=")
        rule = self._declared.rule(on_error, f"the table {name!r}")
        self._check_open()
        kind, is_unchanged = value_of(self._node)
        if value is not None:
            given = self._declared.bound(value, name, "state")
            kind, is_unchanged = given, is_unchanged and given == kind
        history_ms = checked_history(name, history)
        ttl_ms = checked_ttl(name, ttl, history)
        kept = KeepTable(
            name, kind, rule, is_unchanged, none_deletes=True, history_ms=history_ms, ttl_ms=ttl_ms
        )
        return self._kept(kept)

    def aggregate(
        self, /, *, name: str, on_error: OnError | None = None, **fields: Aggregate[Any, V_co]
    ) -> Table[K_co, dict[str, Any]]:
        """Compute these aggregates of all records of each key, as a table. Each record changes the row of its
        key.

        The rows are state of the stage. They are kept for ever, so what an aggregate keeps should be bounded:
        `collect` and `count_distinct` grow with the records. `window` computes aggregates that end.

        Args:
            name: of the table and its state. A job is refused if it was renamed or removed.
            on_error: what to do with a record that has no key, or for which an aggregate fails. Default: that
                of the job.
            fields: of a row, such as `n=count(), total=sum_(lambda order: order["amount"])`. They can't be
                called `name` and `on_error`.

        Raises:
            JobError: there are no fields, one isn't an aggregate, or the name isn't valid.
        """
        if isinstance(name, Aggregate):  # a user's field
            raise JobError(
                "aggregate() of a stream got an aggregate as name=, which is the name of the table and its "
                "state.",
                remedy="Give the field another name, and the table one: aggregate(of=last(), name='newest').",
            )
        check_name(name, "The table name", " with name=")
        return self._aggregated(name, check_running_aggregates(name, fields), False, on_error)

    def count(self, *, name: str, on_error: OnError | None = None) -> Table[K_co, int]:
        """The number of records of each key, as a table; see `aggregate`."""
        check_name(name, "The table name", " with name=")
        return self._aggregated(name, (("count", count()),), True, on_error)

    def reduce(
        self: Stream[_K, _V],
        function: Callable[[_V, _V], _V | None],
        *,
        name: str,
        value: ValueKind | type[Any] | None = None,
        on_error: OnError | None = None,
    ) -> Table[_K, _V]:
        """What `function(reduced, value)` makes of the first value of each key and each further one, as a
        table. Each record changes the row of its key.

        Args:
            function: may change and return its first argument. If it returns None, the row is deleted: then
                the next value is the first one.
            name: of the table and its state. A job is refused if it was renamed or removed.
            value: how rows are kept. Default: as in the topic that was read, so objects of its model remain
                such objects; or "json" after a map or a handler.
            on_error: what to do with a record that has no key, for which the function fails, or whose result
                can't be kept. Default: that of the job.
        """
        check_function(function, "reduce", ("reduced", "value"))
        check_name(name, "The table name", " with name=")
        rule = self._declared.rule(on_error, f"the table {name!r}")
        kind = value_of(self._node)[0] if value is None else self._declared.bound(value, name, "state")
        return self._kept(KeepTable(name, kind, rule, False, none_deletes=True, reduce=function))

    def _aggregated(
        self,
        name: str,
        fields: tuple[tuple[str, Aggregate[Any]], ...],
        is_single: bool,
        on_error: OnError | None,
    ) -> Table[Any, Any]:
        rule = self._declared.rule(on_error, f"the table {name!r}")
        return self._kept(GroupTable(name, fields, is_single, of="records", on_error=rule))

    def _kept(self, table: KeepTable | GroupTable) -> Table[Any, Any]:
        self._check_open()
        return Table(self._declared, table, {table.name: self._node.add(table)}, Stream)

    def to(
        self: Stream[_K, _V | None], topic: TopicSpec[_K, _V] | str, *, on_error: OnError | None = None
    ) -> None:
        """Write the records to `topic`. The stream ends here.

        A tombstone, whose value is None, is written as one. (A None that a map has made is JSON's null. Other
        kinds of values have none, so the record fails.)

        Args:
            topic: the target, or its name: a topic that isn't declared has the kinds of the stream's keys and
                values. Key, timestamp and headers carry over.
            on_error: what to do with records whose key or value can't be written as the topic's kind, or that
                Kafka refuses. Default: the rule of the previous step.
        """
        topic = self._target(topic, "to()")
        rule = None if on_error is None else self._declared.rule(on_error, "to()")
        self._then(Sink(topic, rule))

    @overload
    def through(
        self: Stream[_K, _V], topic: TopicSpec[_K, _V] | str, *, on_error: OnError | None = None
    ) -> Stream[_K, _V]: ...
    @overload
    def through(
        self: Stream[_K, _V | None], topic: TopicSpec[_K, _V] | str, *, on_error: OnError | None = None
    ) -> Stream[_K, _V | None]: ...
    def through(
        self: Stream[Any, Any], topic: TopicSpec | str, *, on_error: OnError | None = None
    ) -> Stream[Any, Any]:
        """Write the records to `topic`, and go on with the stream of that topic.

        It is short for `.to(topic)` and `job.stream(topic)`: the stream has all records of the topic, whoever
        writes them, in a stage of its own. So several streams can begin with the output of one handler.

        Args:
            topic: the topic, or its name, as in `to`. It is created if it doesn't exist, as output topics
                are.
            on_error: as in `to`.
        """
        topic = self._target(topic, "through()")
        self.to(topic, on_error=on_error)
        return Stream(self._declared, self._declared.source(topic, "through()", None, None))

    def _target(self, topic: TopicSpec | str, where: str) -> TopicSpec:
        return self._declared.target(topic, where, key_of(self._node), value_of(self._node)[0])

    def _late(self, late: TopicSpec | str | None, what: str, *nodes: Node) -> TopicSpec | None:
        """The topic of late records. If it isn't declared, it takes the values behind these nodes.

        Raises:
            JobError: it doesn't take the keys, or the values of one of them. That would show only when a
                record is late.
        """
        if late is None:
            return None
        kinds = [value_of(node) for node in nodes]
        kind = kinds[0][0] if len({kind_title(one) for one, _is_known in kinds}) == 1 else "json"
        key = key_of(self._node)
        topic = self._declared.target(late, "late=", key, kind)
        checked: list[tuple[str, Kind, Kind, Callable[[Kind, Kind], bool]]] = []
        checked.append(("key", topic.key, key, may_carry))
        for found, is_known in kinds:
            if is_known:
                checked.append(("value", topic.value, found, may_take))
        for part, taken, found, may in checked:
            if not may(taken, found):
                instead: Kind = found if part == "key" else "msgpack" if found == "bytes" else "json"
                raise JobError(
                    f"late= of {what} is the topic {topic.name!r} of {kind_title(taken)} {part}s, but its "
                    f"records have {kind_title(found)} {part}s: each late one would fail.",
                    remedy=f"Declare the topic with {part}={_named(instead)}, which takes them.",
                )
        return topic

    def _then(self, step: Sink | KeyBy | Operator) -> Stream[Any, Any]:
        self._check_open()
        return Stream(self._declared, self._node.add(step))

    def _open_node(self, declared: Declarations, step: str) -> Node:
        """The node from which a merge or join of a job continues."""
        if self._declared is not declared:
            raise JobError(
                f"{step}() of the job {declared.job!r} got a stream of the job {self._declared.job!r}.",
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


def _named(kind: Kind) -> str:
    """The kind as a job file names it."""
    return repr(kind) if isinstance(kind, str) else kind_title(kind)


def _check_no_on(on: object, what: str) -> None:
    if on is not None:
        raise JobError(
            f"A join with a {what} got on=, which is for joins with a global table.",
            remedy="Put key_by(...) in front of it. Or declare the table with job.global_table(topic), if it "
            "is small enough for each shard to have all of it.",
        )


def node_of(stream: Stream[Any, Any]) -> Node:
    """The node of the step that gave this stream."""
    return stream._node  # pyright: ignore[reportPrivateUsage]


def merged(declared: Declarations, streams: Sequence[Stream[Any, Any]]) -> Stream[Any, Any]:
    """One stream of all `streams`. See `Job.merge`."""
    nodes = [stream._open_node(declared, "merge") for stream in streams]  # pyright: ignore[reportPrivateUsage]
    return Stream(declared, declared.join_up(nodes, declared.merges))
