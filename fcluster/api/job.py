"""The API of a job file: a job and its topics. Its streams are in `streams`, what handlers see in `context`.

Responsible for: the public API, its validation, and compiling a job into a `Topology`. Invariants: every job
that `build` returns can run; names come from the job file alone and are the same in every run and process,
because they identify state; each error says what to change. Must not do I/O, or call a user's handler.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, overload

from fcluster.api.call_hints import hints_at_calls
from fcluster.api.checks import check_name, chosen_isolation, given
from fcluster.api.context import Context, Handler, HandlerFunction
from fcluster.api.declarations import Declarations
from fcluster.api.handlers import on_timer_of
from fcluster.api.streams import Stream, merged, node_of
from fcluster.api.tables import GlobalTable, Table, checked_history, described_table
from fcluster.api.windowed import WindowedStream
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.common.isolation import Isolation
from fcluster.common.settings import Settings
from fcluster.common.spelling import near_names
from fcluster.graph.codecs import Codec
from fcluster.graph.operators import AnyTable, KeepTable, KeyKind, OnError, TopicSpec, ValueKind
from fcluster.graph.record import UNSET, Record, Unset
from fcluster.graph.states import State
from fcluster.graph.timestamps import Timestamp
from fcluster.graph.topology import Topology
from fcluster.graph.watermark import Watermark

__all__ = [
    "UNSET",
    "Context",
    "GlobalTable",
    "Handler",
    "HandlerFunction",
    "Job",
    "Record",
    "Stream",
    "Table",
    "Unset",
    "WindowedStream",
]

_R = TypeVar("_R")
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
    timestamp: Timestamp | None
    on_error: OnError | None


@hints_at_calls
class Job:
    """A named topology: topics, and the handlers between them.

    Example::

        job = Job("spending")
        orders = job.topic("orders")
        totals = job.topic("totals")

        @job.process(orders, to=totals)
        def total(ctx, order):
            ctx.state["cents"] = ctx.state.get("cents", 0) + order["cents"]
            return {"account": ctx.key, **ctx.state}

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
        check_name(name, "The job name")
        for option in named_settings:
            near = near_names(option, ("on_error", "settings"))
            if near:
                raise JobError(f"Job() has no {bounded_repr(option)}.", remedy=f"Did you mean {near[0]}=?")
        self.name = name
        self.settings: dict[str, Any] = {**(settings or {}), **named_settings}
        self._declared = Declarations(name)
        self._tables: dict[str, Table] = {}
        self._global_tables: dict[str, GlobalTable] = {}
        if isinstance(on_error, TopicSpec):
            on_error = self.topic(on_error.name, key=on_error.key, value=on_error.value)
        if on_error is not None:
            self._declared.default_rule = self._declared.rule(on_error, "the job")

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
        timestamp: Timestamp | None = None,
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
            timestamp: where the values have their time: the name of a field, or a function of the value. It
                gives milliseconds since 1970 as an int, or a datetime with a time zone. Default: the records'
                timestamps in Kafka.
            on_error: what to do with its records that can't be decoded, or have no usable `timestamp`:
                "stop", "skip" or a dead-letter topic. Default: the rule of the job. If the job has none: the
                rule of its handlers if they all have the same, otherwise "stop".
            **options: the same options by their Kafka or Confluent names, such as
                ``kafka.consumer.isolation-level``.

        Raises:
            JobError: the name isn't valid or is reserved, an option is wrong, or the topic was declared
                before in a different way.
        """
        chosen = chosen_isolation(name, isolation, options)
        return self._declared.topic(name, key, value, chosen, watermark, timestamp, on_error)

    def process(
        self,
        topic: TopicSpec[_K, _V],
        *,
        to: TopicSpec | str | None = None,
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
            to: the topic, or its name, where outputs are written. Without it, only records that name their
                topic are written.
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

        if callable(topic):
            raise JobError(
                f"@job.process got {given(topic)} itself, but no topic.",
                remedy="Say what it reads, and where its outputs go: @job.process(orders, to=totals).",
            )
        self._declared.check_declared(topic, "process()")

        def decorate(handler: Callable[[_C, _V], _R]) -> HandlerFunction[[_C, _V], _R]:
            stream = self.stream(topic).process(
                cast("Handler", handler), to=to, name=name, states=states, timers=timers, on_error=on_error
            )
            with contextlib.suppress(AttributeError):  # such as a bound method: use timers= then
                cast("Any", handler).on_timer = functools.partial(on_timer_of, node_of(stream))
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
        return self._stream_of(topic, "stream()", watermark, on_error)

    def _stream_of(
        self, topic: TopicSpec, where: str, watermark: Watermark | None, on_error: OnError | None
    ) -> Stream[Any, Any]:
        return Stream(self._declared, self._declared.source(topic, where, watermark, on_error))

    def table(
        self,
        topic: TopicSpec[_K, _V],
        *,
        name: str | None = None,
        history: timedelta | None = None,
        on_error: OnError | None = None,
    ) -> Table[_K, _V]:
        """The newest value of each key of `topic`, as a table.

        A record puts the row of its key, and a tombstone deletes it. The topic is usually compacted
        (`cleanup.policy=compact`). It is read from its beginning. The rows are state, committed with the
        epochs; so a restart reads none of the topic again. Event time doesn't wait for a topic that is only
        read as a table.

        Args:
            topic: the source.
            name: of the table and its state. Default: that of the topic. A job is refused if a table was
                renamed or removed.
            history: for how long former rows are kept, so that a stream that is joined finds the row of each
                record's own time. Rows are then ordered by their timestamps. Default: only present rows are
                kept.
            on_error: what to do with a record that has no key: "stop", "skip" or a dead-letter topic. It also
                applies to records that can't be decoded, if the topic has no rule of its own.

        Raises:
            JobError: the topic is a table of another name already.
        """
        kept = self._kept(topic, "table()", name, history, on_error)
        known = self._tables.get(topic.name)
        if known is not None:
            _check_declared_alike(topic, kept, described_table(known), name, history, on_error)
            return known
        root = self._declared.source(topic, "table()", None, None)
        table = Table(self._declared, kept, {kept.name: root.add(kept)}, Stream)
        self._tables[topic.name] = table
        return table

    def global_table(
        self,
        topic: TopicSpec[_K, _V],
        *,
        name: str | None = None,
        history: timedelta | None = None,
        on_error: OnError | None = None,
    ) -> GlobalTable[_K, _V]:
        """The newest value of each key of `topic`, all of them in each shard that joins a stream with it.

        So `stream.join(table, with_, on=...)` finds a row by anything that a record says, whatever the
        stream's keys are, and however many partitions it has. The price: each shard of a stage with such a
        join has a copy of the whole table in its state. So it is for tables that are small, or change seldom.

        Args:
            topic: the source. It may have any number of partitions, whoever has chosen them.
            name: of the table, and of its copies: `{name}-in-{stage}`. Default: that of the topic. A job is
                refused if a table was renamed or removed.
            history: for how long former rows are kept; see `table`.
            on_error: what to do with a record that has no key; see `table`.

        Raises:
            JobError: the topic is a global table of another name already.
        """
        kept = self._kept(topic, "global_table()", name, history, on_error)
        kept = replace(kept, copy_of=kept.name)
        known = self._global_tables.get(topic.name)
        if known is not None:
            _check_declared_alike(topic, kept, described_table(known), name, history, on_error)
            return known
        self._declared.source(topic, "global_table()", None, None).add(kept)
        table = GlobalTable(self._declared, kept, topic.key)
        self._global_tables[topic.name] = table
        return table

    def _kept(
        self,
        topic: TopicSpec,
        where: str,
        name: str | None,
        history: timedelta | None,
        on_error: OnError | None,
    ) -> KeepTable:
        self._declared.check_declared(topic, where)
        if name is not None:
            check_name(name, "The table name", " with name=")
        chosen = topic.name if name is None else name
        rule = self._declared.rule(on_error, f"the table {chosen!r}")
        return KeepTable(chosen, topic.value, rule, history_ms=checked_history(chosen, history))

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
        streams = [
            one if isinstance(one, Stream) else self._stream_of(one, "merge()", None, None) for one in inputs
        ]
        if len(streams) < 2:
            raise JobError(
                f"merge() got {len(streams)} stream{'s' if len(streams) != 1 else ''}.",
                remedy="Give it two or more streams or topics.",
            )
        return merged(self._declared, streams)

    def build(self, settings: Settings) -> Topology:
        """Build the validated topology.

        Args:
            settings: the settings of the run. Every process has to build the job with the same settings,
                because topics that declare no isolation level get it from them.

        Raises:
            JobError: the job can't run as it is written.
        """
        return self._declared.build(settings)


def _check_declared_alike(
    topic: TopicSpec,
    kept: KeepTable,
    known: AnyTable,
    name: str | None,
    history: timedelta | None,
    on_error: OnError | None,
) -> None:
    """Refuse a topic that is declared as a table again, if what is given isn't what was given before."""
    before = cast("KeepTable", known)
    if (
        (name is not None and kept.name != before.name)
        or (on_error is not None and kept.on_error != before.on_error)
        or (history is not None and kept.history_ms != before.history_ms)
    ):
        raise JobError(
            f"The topic {topic.name!r} is declared as a table twice, in different ways.",
            remedy="Declare it once, and use the returned table in all joins.",
        )
