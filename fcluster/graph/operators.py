"""The steps that records take, as a job file declares them, and the topics that they read and write."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal

from fcluster.common.isolation import Isolation
from fcluster.graph.aggregates import Aggregate
from fcluster.graph.calls import ONCE, Circuit, Retry
from fcluster.graph.codecs import Kind, codec_name
from fcluster.graph.counted import Counted
from fcluster.graph.foreign import ForeignHow, pair_codec
from fcluster.graph.generics import K, V
from fcluster.graph.joins import How, PairStore, Side
from fcluster.graph.sliding import Sliding
from fcluster.graph.states import StateStore
from fcluster.graph.tables import TableStore
from fcluster.graph.timers import TimerClock, TimerFunction, TimerStore
from fcluster.graph.windows import Gathered, Session, StoreKind, Windows, WindowStore

KeyKind = Kind
ValueKind = Kind
Rekey = str | Callable[..., Any]
"""How the new key is found: a field of the value (which is an object then), or a function of the value, which
may take a context first.
"""


@dataclass(frozen=True, slots=True)
class TopicSpec(Generic[K, V]):
    """A Kafka topic and how its records are read and written. For type checkers, it has the types of its keys
    and values.

    Attributes:
        name: the topic's name.
        key: how keys are decoded for `ctx.key` and encoded on the way out.
        value: how values are decoded and encoded.
        isolation: whether records of open and aborted transactions are read. Comparisons ignore it, because a
            topic's default is known only when the job's settings are.
    """

    name: str
    key: KeyKind = "text"
    value: ValueKind = "json"
    isolation: Isolation = field(default="read-committed", compare=False)


OnError = Literal["stop", "skip"] | TopicSpec
"""What to do with a record that can't be processed. A topic here receives it as a dead letter."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Passes on the values for which `function(value)` is true. `on_error` says what to do if it fails.

    The functions of this and the following steps that can't be called with a value alone get the record's
    context in front of it.
    """

    function: Callable[..., Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Map:
    """Replaces each value by `function(value)`; key, timestamp and headers stay. `on_error` says what to do
    if it fails.
    """

    function: Callable[..., Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class MapAsync:
    """Replaces each value by what `await function(call, value)` returns; key, timestamp and headers stay.

    Attributes:
        function: the async function.
        concurrency: how many calls run at the same time in a worker, at most.
        timeout_ms: how long an attempt may take.
        retry: when a call is made again.
        circuit: when nobody is called. None: calls are always made.
        on_error: what to do if a call has failed.
    """

    function: Callable[[Any, Any], Any]
    concurrency: int = 100
    timeout_ms: int = 30_000
    retry: Retry = ONCE
    circuit: Circuit | None = None
    on_error: OnError = "stop"

    @property
    def name(self) -> str:
        """The function's name."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))


@dataclass(frozen=True, slots=True)
class FlatMap:
    """Replaces each value by the values in the iterable that `function(value)` returns; there may be none.
    Key, timestamp and headers stay. `on_error` says what to do if it fails.
    """

    function: Callable[..., Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Peek:
    """Calls `function(value)` for each value and passes the value on. `on_error` says what to do if it
    fails.
    """

    function: Callable[..., Any]
    on_error: OnError = "stop"


@dataclass(frozen=True, slots=True)
class Branch:
    """One of several ways that records may go: passes on the values for which this function, and none before
    it, returns something true.

    Attributes:
        functions: of all branches, in order.
        number: which of them this is. If it is the number of functions: the values for which none is true.
        on_error: what to do if its own function fails.
    """

    functions: tuple[Callable[..., Any], ...]
    number: int
    on_error: OnError = "stop"

    @property
    def is_rest(self) -> bool:
        """Whether it gets what no function wants."""
        return self.number == len(self.functions)

    @property
    def function(self) -> Callable[..., Any]:
        """Its own function. For the rest: the last one."""
        return self.functions[min(self.number, len(self.functions) - 1)]


@dataclass(frozen=True, slots=True)
class Process:
    """A handler with keyed state.

    Attributes:
        name: the name of the operator and of its store; unique in the job.
        function: called as `function(ctx, value)`.
        on_error: "stop", "skip", or the dead-letter topic.
        stores: the states that it declares besides `ctx.state`.
        returns: "many" if the call returns an iterable of outputs (a generator), "one" if it returns one
            output, or None for no output.
        timers: the functions that its timers call.
    """

    name: str
    function: Callable[[Any, Any], Any]
    on_error: OnError = "stop"
    returns: Literal["many", "one"] = "one"
    stores: tuple[StateStore, ...] = ()
    timers: tuple[TimerFunction, ...] = ()

    @property
    def timer_store(self) -> TimerStore | None:
        """The store of its timers, or None if it has none."""
        return TimerStore(self.name) if self.timers else None


@dataclass(frozen=True, slots=True)
class Window:
    """Windows of each key, and what is computed of their records.

    Attributes:
        name: of the operator and of its store; unique in the job.
        windows: which stretches of time they are.
        fields: of a result: the aggregates by name, in order.
        late: gets the records whose windows have closed; None: they are only counted.
        emit: whether a result goes on when its window closes, after each record in it, or at intervals and
            when it closes.
        interval_ms: how long an interval is.
        keyless: whether its windows are those of all records of a shard, whatever their keys are.
        clock: whether records are in windows by their timestamps, or by when they are processed.
        value: the codec in which values are kept, if windows keep values.
        is_unchanged: the values are those that were read, so their bytes can be kept.
        on_error: what a record leads to that fails in it, and a window whose result does.
    """

    name: str
    windows: Windows
    fields: tuple[tuple[str, Aggregate[Any]], ...]
    late: TopicSpec | None = None
    on_error: OnError = "stop"
    emit: Literal["close", "update", "interval"] = "close"
    interval_ms: int = 0
    keyless: bool = False
    clock: TimerClock = "event"
    value: ValueKind = "json"
    is_unchanged: bool = False

    @property
    def store(self) -> WindowStore:
        """Where its open windows are kept."""
        kinds: dict[type, StoreKind] = {Session: "sessions", Sliding: "sliding", Counted: "counted"}
        kind = kinds.get(type(self.windows), "windows")
        return WindowStore(self.name, kind, self.emit == "interval", self.clock == "processing")

    @property
    def closes_after_ms(self) -> int:
        """How long after its end a window closes, in milliseconds.

        A record exactly at a session's end belongs to it. So a session closes when that millisecond is over.
        """
        return self.windows.grace_ms + isinstance(self.windows, Session)

    @property
    def is_part(self) -> bool:
        """Whether its windows are parts, which another step gathers."""
        return self.keyless and self.clock == "event" and not isinstance(self.windows, Gathered)

    @property
    def is_timed(self) -> bool:
        """Whether windows close, or results are passed on, because time has passed."""
        return not isinstance(self.windows, Counted) or self.emit == "interval"

    @property
    def may_be_late(self) -> bool:
        """Whether records may be too late for its windows."""
        return not isinstance(self.windows, Counted) and self.clock == "event"

    def describe(self) -> dict[str, Any]:
        """What the bytes of its store depend on."""
        aggregates = [[name, aggregate.name] for name, aggregate in self.fields]
        described: dict[str, Any] = {"windows": self.windows.describe(), "aggregates": aggregates}
        if self.emit == "interval":
            described["emits"] = "at intervals"
        if self.clock == "processing":
            described["closes"] = "in processing time"
        if isinstance(self.windows, Sliding):
            described["value"] = f"{codec_name(self.value)} values"
        return {**described, "keyless": True} if self.keyless else described


@dataclass(frozen=True, slots=True)
class KeepTable:
    """Keeps the newest value of each key, for joins and for those who follow its changes.

    Attributes:
        name: of the table and of its store; unique in the job.
        value: the codec of the values that it keeps.
        on_error: what to do with a record that has no key, or whose value can't be kept.
        is_unchanged: the values are those that were read, so their bytes can be kept.
        none_deletes: a value that is None deletes the row of its key. Otherwise only a null that was read (a
            tombstone) does.
        is_followed: the changes of each record are noted, for the steps that follow them (`TellChanges`).
        history_ms: for how long former rows are kept. None: they aren't.
        ttl_ms: how long a row is kept in event time. None: for good.
        copy_of: the global table of which each shard of a stage has this copy. Empty: it is no copy.
        reduce: called as `reduce(former, value)`; the row is what it returns, and None deletes it. A key's
            first value is its row. None: the newest value is the row.
    """

    name: str
    value: ValueKind
    on_error: OnError = "stop"
    is_unchanged: bool = True
    none_deletes: bool = False
    is_followed: bool = False
    history_ms: int | None = None
    copy_of: str = ""
    reduce: Callable[[Any, Any], Any] | None = None
    ttl_ms: int | None = None

    @property
    def store(self) -> TableStore:
        """Where its rows are kept."""
        return TableStore(self.name, ttl_ms=self.ttl_ms, clock=self.name)

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """Where its rows and their history are kept, when they expire, and whether a copy is loaded."""
        stores = [self.store]
        if self.ttl_ms is not None:
            stores += [TableStore(self.name, "times"), TableStore(self.name, "clock")]
        if self.history_ms is not None:
            stores += [TableStore(self.name, part) for part in ("versions", "due", "clock")]
        return (*stores, self.loading) if self.copy_of else tuple(stores)

    @property
    def loading(self) -> TableStore:
        """Where a copy of a global table keeps who has said that it has all rows."""
        return TableStore(self.name, "loaded")


@dataclass(frozen=True, slots=True)
class Regroup:
    """Says to which group each row of a table belongs, and remembers what it contributes there.

    Attributes:
        name: of its store; unique in the job.
        table: the name of the `GroupTable` behind it.
        by: the field of a row's value that gives the key of its group, or a function of the value. None: the
            row is in no group.
        key: the codec of the groups' keys.
        function: gives what a row contributes; None: nothing. If it is None: the row's value.
        value: the codec of what rows contribute.
        fields: the aggregates of the groups, which have to take what is contributed.
        ttl_ms: for how long it remembers what a row contributes. None: for good.
        clock: with that, the name of the kept table by whose clock it forgets.
        on_error: what to do with a record for whose row a function or an aggregate fails.
    """

    name: str
    table: str
    by: Rekey
    key: KeyKind
    function: Callable[..., Any] | None
    value: ValueKind
    fields: tuple[tuple[str, Aggregate[Any]], ...] = ()
    on_error: OnError = "stop"
    ttl_ms: int | None = None
    clock: str = ""

    @property
    def store(self) -> TableStore:
        """Where it remembers that."""
        return TableStore(self.name, "members", self.ttl_ms, self.clock)

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """Where it remembers that, and when it forgets it."""
        return (self.store,) if self.ttl_ms is None else (self.store, TableStore(self.name, "times"))


@dataclass(frozen=True, slots=True)
class GroupTable:
    """What is computed of each group of another table's rows, or of each key's records of a stream.

    Attributes:
        name: of the table and of its store; unique in the job.
        fields: of a row: the aggregates by name, in order.
        is_single: a row is the result of the only aggregate, rather than a dict.
        drops_empty: a group without rows has no row.
        is_followed: see `KeepTable`.
        of: what is aggregated. "rows": it gets what changes of them have taken away and added, as `Regroup`
            tells it. "records": it gets their values, and nothing is taken away.
        on_error: what to do with a record that fails. Of groups of rows always "stop": what doesn't fit the
            aggregates was refused by `Regroup`, and a change must not be lost. The group would be wrong from
            then on.
    """

    name: str
    fields: tuple[tuple[str, Aggregate[Any]], ...]
    is_single: bool = False
    drops_empty: bool = False
    is_followed: bool = False
    of: Literal["rows", "records"] = "rows"
    on_error: OnError = "stop"

    @property
    def store(self) -> TableStore:
        """Where its groups are kept."""
        return TableStore(self.name, "groups")

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """The same."""
        return (self.store,)


@dataclass(frozen=True, slots=True)
class Subscribe:
    """The left side of a join by a foreign key: tells the right table which of its rows each left row refers
    to, and passes on the left rows.

    Attributes:
        name: of the step and of its stores; unique in the job.
        table: the name of the `ForeignTable` that comes of it.
        by: the field of a left value that is the foreign key, or a function of the value. None: it refers to
            no row.
        version: compared instead of `by`; see `Stream.key_by`.
        topic: where the subscriptions are written.
        value: the codec in which left values are passed on.
        how: "inner": left rows without a foreign key aren't passed on.
        on_error: what to do with a record for whose row `by` fails.
    """

    name: str
    table: str
    by: Rekey
    version: str | None
    topic: TopicSpec
    value: ValueKind
    how: ForeignHow
    on_error: OnError = "stop"

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """The foreign key of each left row, and how many there have been."""
        return TableStore(self.name, "links"), TableStore(self.name, "count")


@dataclass(frozen=True, slots=True)
class Subscribers:
    """The right side of a join by a foreign key: remembers which left rows refer to which row, and answers
    with that row.

    Attributes:
        name: of the step and of its store; unique in the job.
        table: the right table, which is in the same stage.
        value: the codec in which right values are passed on.
    """

    name: str
    table: AnyTable
    value: ValueKind

    @property
    def on_error(self) -> OnError:
        """Nothing of the user's is called, except for functions of the table; see `AnswerAgain`."""
        return "stop"

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """Who refers to which row."""
        return (TableStore(self.name, "subscribers"),)


@dataclass(frozen=True, slots=True)
class AnswerAgain:
    """Tells each left row that refers to a right row how that has changed. It follows `TellChanges`.

    Attributes:
        subscribers: the step that knows them, in the same stage.
    """

    subscribers: Subscribers

    @property
    def on_error(self) -> OnError:
        """Nothing of the user's is called. The functions that compute the table have their own rules."""
        return "stop"


@dataclass(frozen=True, slots=True)
class ForeignTable:
    """The rows of a left table, each with the row of a right table that it refers to.

    Attributes:
        name: of the table and of its stores; unique in the job.
        left, right: the codecs of the values of both tables.
        how: "inner": the left rows that refer to a row which is there. "left": all.
        is_followed: see `KeepTable`.
    """

    name: str
    left: ValueKind
    right: ValueKind
    how: ForeignHow = "inner"
    is_followed: bool = False

    @property
    def on_error(self) -> OnError:
        """Nothing of the user's is called."""
        return "stop"

    @property
    def value(self) -> ValueKind:
        """The codec of its rows, which gives pairs of values."""
        return pair_codec(self.left, self.right, self.how)

    @property
    def store(self) -> TableStore:
        """Where its rows are kept."""
        return TableStore(self.name)

    @property
    def stores(self) -> tuple[TableStore, ...]:
        """Where its rows are kept, answers that came before their left rows, and which left rows came."""
        return self.store, TableStore(self.name, "early"), TableStore(self.name, "seen")


KeptTable = KeepTable | GroupTable | ForeignTable
"""A table whose rows are state."""


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Writes each row of a global table to all shards of each stage that has a copy of it.

    Attributes:
        table: the name of the global table.
        copies: the name of each of these stages, and the repartition topic from which it fills its copy. Only
            this step writes there, each row to all partitions.
        on_error: what to do with a record that has no key, or that can't be written.
        keeps_history: the copies keep former rows, so each row needs a time.
    """

    table: str
    copies: tuple[tuple[str, TopicSpec], ...]
    on_error: OnError = "stop"
    keeps_history: bool = False

    @property
    def topics(self) -> tuple[TopicSpec, ...]:
        """The topics that it writes."""
        return tuple(topic for _reader, topic in self.copies)


@dataclass(frozen=True, slots=True)
class FilteredTable:
    """The rows of another table for which `function(value)` is true. It isn't kept, but computed.

    Attributes:
        table: the table that it is made of.
        function: called with the value of a row; with the row's context in front of it, if it takes that.
        on_error: what to do with a record for whose row the function fails.
        key: the codec of the table's keys.
    """

    table: AnyTable
    function: Callable[..., Any]
    on_error: OnError = "stop"
    key: KeyKind = "text"


@dataclass(frozen=True, slots=True)
class MappedTable:
    """The rows of another table, with `function(value)` as their values; None is no row. It isn't kept, but
    computed. See `FilteredTable` for the attributes.
    """

    table: AnyTable
    function: Callable[..., Any]
    on_error: OnError = "stop"
    key: KeyKind = "text"


@dataclass(frozen=True, slots=True)
class JoinedTable:
    """For each key, `function(left, right)` of the rows of two tables. It isn't kept, but computed.

    Attributes:
        left, right: the tables. They are in the same stage.
        function: called with the values of both rows. If it returns None, there is no row.
        how: the keys that have a row: "inner": those in both tables. "left": those in the left one. "outer":
            those in one of them. The function gets None for a row that isn't there.
        on_error: what to do with a record for whose row the function fails.
    """

    left: AnyTable
    right: AnyTable
    function: Callable[[Any, Any], Any]
    how: How = "inner"
    on_error: OnError = "stop"


AnyTable = KeptTable | FilteredTable | MappedTable | JoinedTable
"""A table: one that is kept, or one that is computed of such tables."""


def is_running(table: KeptTable) -> bool:
    """Whether it is computed of all records of a stream, rather than filled with rows."""
    if isinstance(table, GroupTable):
        return table.of == "records"
    return isinstance(table, KeepTable) and table.reduce is not None


def rows_below(table: AnyTable) -> AnyTable:
    """The table whose values a table has: the one below its filters."""
    return rows_below(table.table) if isinstance(table, FilteredTable) else table


def tables_below(table: AnyTable) -> tuple[AnyTable, ...]:
    """The tables that a table is computed of directly. None for a kept one."""
    if isinstance(table, KeptTable):
        return ()
    return (table.left, table.right) if isinstance(table, JoinedTable) else (table.table,)


def kept_in(table: AnyTable) -> tuple[KeptTable, ...]:
    """The kept tables that a table is computed of, in the order in which they are named."""
    if isinstance(table, KeptTable):
        return (table,)
    return tuple({kept.name: kept for below in tables_below(table) for kept in kept_in(below)}.values())


def title_of_table(table: AnyTable) -> str:
    """Names the table in messages: by the kept tables that it is computed of."""
    return " and ".join(map(repr, names_of_table(table)))


def names_of_table(table: AnyTable) -> tuple[str, ...]:
    """The names, in the job file, of the kept tables that a table is computed of."""
    return tuple(map(declared_name, kept_in(table)))


def declared_name(kept: KeptTable) -> str:
    """The name of a kept table in the job file."""
    return (isinstance(kept, KeepTable) and kept.copy_of) or kept.name


def replaced_table(table: AnyTable, kept: KeptTable) -> AnyTable:
    """The same computations of another kept table. For tables that are computed of one."""
    if isinstance(table, KeptTable):
        return kept
    assert not isinstance(table, JoinedTable)
    return replace(table, table=replaced_table(table.table, kept))


def rules_of_table(table: AnyTable) -> tuple[OnError, ...]:
    """The error rules of the functions that compute a table."""
    if isinstance(table, KeptTable):
        return ()
    return (*(rule for below in tables_below(table) for rule in rules_of_table(below)), table.on_error)


@dataclass(frozen=True, slots=True)
class TellChanges:
    """Begins a chain: passes on how a record has changed a table.

    Attributes:
        table: the table whose changes are told.
        source: the kept table that the chain's records change, and with it `table`.
        gives: "values": the new value of the row, None if it was deleted. "changes": a `Change`.
        tells_all: also a change from no row to no row. Those behind it remember what they were told, and that
            may have been a row: one for which a function fails now, or that a new filter leaves out.
    """

    table: AnyTable
    gives: Literal["values", "changes"]
    source: str = ""
    tells_all: bool = False

    @property
    def keeps_bytes(self) -> bool:
        """Whether what it passes on are values that were read, so that their bytes can be passed on."""
        table = rows_below(self.table)
        return self.gives == "values" and isinstance(table, KeepTable) and table.is_unchanged

    @property
    def on_error(self) -> OnError:
        """Nothing fails in the step itself. The functions that compute the table have their own rules."""
        return "stop"


@dataclass(frozen=True, slots=True)
class JoinTable:
    """Replaces each value by `function(value, row)`, with the present row of its key in a table.

    Attributes:
        table: the table, which is in the same stage.
        function: called with the value, and the row's value.
        how: "inner" drops values whose key has no row; "left" calls the function with None for the row.
        on_error: what to do if a function fails.
        by: of a join with a global table: the field of the value that is the row's key, or a function of the
            value. None as its result: no row belongs to the value. If it is None: the record's key.
        key: the codec of the table's keys, for `by`.
    """

    table: AnyTable
    function: Callable[[Any, Any], Any]
    how: Literal["inner", "left"] = "inner"
    on_error: OnError = "stop"
    by: Rekey | None = None
    key: KeyKind = "text"


@dataclass(frozen=True, slots=True)
class JoinStreams:
    """One side of a join of two streams: pairs of records of a key that are not too far apart.

    A right record is the partner of a left one if it is at most `before_ms` earlier and at most `after_ms`
    later. One of both may be negative: at most -5 minutes earlier is at least 5 minutes later.

    Attributes:
        name: of the join and of its stores; unique in the job. Both sides have it.
        side: which side the records of this chain are on.
        function: called with the values of a pair, left first.
        before_ms, after_ms: see above.
        left, right: the codecs in which the values of both sides are kept.
        is_unchanged: the values of this side are those that were read, so their bytes can be kept.
        how: "inner" passes on pairs. "left" and "outer" also pass on left records, or records of both sides,
            that have found no partner until the grace is over; the function gets None for the other one.
        grace_ms: how late a record may be and still find its partners.
        late: gets the records that are later; None: they are only counted.
        on_error: what to do with a record that fails in it.
    """

    name: str
    side: Side
    function: Callable[[Any, Any], Any]
    before_ms: int
    after_ms: int
    left: ValueKind
    right: ValueKind
    is_unchanged: bool
    how: How = "inner"
    grace_ms: int = 0
    late: TopicSpec | None = None
    on_error: OnError = "stop"

    @property
    def store(self) -> PairStore:
        """Where the records that may find a partner are kept."""
        return PairStore(self.name)

    @property
    def stretch_ms(self) -> int:
        """How long the stretches of time are in which records are kept."""
        return self.before_ms + self.after_ms + 1

    @property
    def passes_on(self) -> tuple[Side, ...]:
        """The sides whose records are passed on without a partner."""
        sides: dict[How, tuple[Side, ...]] = {"inner": (), "left": ("left",), "outer": ("left", "right")}
        return sides[self.how]

    @property
    def late_ms(self) -> int:
        """How much earlier than event time its results may be."""
        return max(self.before_ms, self.after_ms) + self.grace_ms + 1

    def reach_ms(self, side: Side) -> int:
        """How much later than a record of that side its partners may be. Negative: they are all earlier."""
        return self.after_ms if side == "left" else self.before_ms

    def open_ms(self, side: Side) -> int:
        """How long a record of that side waits for partners: at least until its own time has passed."""
        return max(0, self.reach_ms(side))

    def describe(self) -> dict[str, Any]:
        """What the bytes of its stores, and what is due, depend on."""
        return {
            "before_ms": self.before_ms,
            "after_ms": self.after_ms,
            "how": self.how,
            "left": codec_name(self.left),
            "right": codec_name(self.right),
        }


Operator = (
    Filter
    | Map
    | MapAsync
    | FlatMap
    | Peek
    | Branch
    | Process
    | Window
    | KeepTable
    | TellChanges
    | Regroup
    | GroupTable
    | Subscribe
    | Subscribers
    | AnswerAgain
    | ForeignTable
    | Broadcast
    | JoinTable
    | JoinStreams
)
StatefulOperator = (
    Process | Window | KeepTable | JoinStreams | Regroup | GroupTable | Subscribe | Subscribers | ForeignTable
)
TimedOperator = Process | Window | JoinStreams
"""Those in which something may happen because time has passed."""


def step_kind(step: Operator) -> str:
    """The name of the step in a job file, such as "flat_map"."""
    if isinstance(step, KeptTable):
        return "table"
    if isinstance(step, Broadcast):
        return "global_table"
    if isinstance(step, Regroup):
        return "group_by"
    if isinstance(step, JoinTable | JoinStreams | Subscribe | Subscribers | AnswerAgain):
        return "join"
    if isinstance(step, TellChanges):
        return "to_stream" if step.gives == "values" else "changes"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(step).__name__).lower()


def rules_of(step: Operator) -> tuple[OnError, ...]:
    """The error rules that may apply in a step."""
    if isinstance(step, TellChanges):
        return rules_of_table(step.table)
    if isinstance(step, JoinTable):
        return (*rules_of_table(step.table), step.on_error)
    return (step.on_error,)


def tables_read_by(step: Operator) -> tuple[KeptTable, ...]:
    """The kept tables whose rows or changes a step reads."""
    return kept_in(step.table) if isinstance(step, JoinTable | TellChanges | Subscribers) else ()
