"""Tables of a job file: the newest value of each key, what is computed of it, and the stream of changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from fcluster.api.call_hints import hints_at_calls, no_such
from fcluster.api.checks import (
    check_field_of,
    check_function,
    check_function_of,
    check_name,
    checked_version,
    given,
)
from fcluster.api.context import JoinFunction, OfRow, RowContext
from fcluster.api.declarations import Declarations
from fcluster.api.nodes import KeyBy, Node, key_of
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.aggregates import Aggregate, check_group_aggregates, count, reduce
from fcluster.graph.changes import Change
from fcluster.graph.durations import DURATION_MAX, MILLISECOND, check_duration
from fcluster.graph.foreign import ANSWERS, LEFT_ROWS, SUBSCRIPTIONS, KeyOf, Pair
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.groups import GroupOf, halves_codec
from fcluster.graph.joins import How
from fcluster.graph.models import model_of
from fcluster.graph.operators import (
    AnswerAgain,
    AnyTable,
    FilteredTable,
    ForeignTable,
    GroupTable,
    JoinedTable,
    KeepTable,
    KeptTable,
    KeyKind,
    MappedTable,
    OnError,
    Regroup,
    Rekey,
    Subscribe,
    Subscribers,
    TellChanges,
    TopicSpec,
    ValueKind,
    kept_in,
    rows_below,
    rules_of_table,
    title_of_table,
)

if TYPE_CHECKING:
    from fcluster.api.streams import Stream

_K = TypeVar("_K")
_T = TypeVar("_T")
_V = TypeVar("_V")


@hints_at_calls
class Table(Generic[K_co, V_co]):
    """The newest value of each key. `Job.table` gives the table of a topic, `Stream.table` that of a stream.

    `filter`, `map` and `join` give other tables. These have no state of their own: their rows are computed
    when they are needed, from rows that are kept. So their functions are called for former values, too; they
    must give the same result for the same value, and must not change it unless they return it. A function
    that returns None leaves the key without a row. If one fails, `on_error` of its step applies to the record
    that leads there: that of the table, or that of a stream that is joined. But a left join passes on all
    records of a stream: with "skip", they meet no row. Where two tables are joined, a row of the other one
    for which a function fails counts as no row, unless the rule is "stop".

    The functions of `filter`, `map` and `group_by` are called with a row's value. Those with two parameters
    are called with the row's context (`RowContext`) and the value: `map(lambda ctx, value: ctx.key)`.

    For type checkers, it has the types of its keys and values.

    Attributes:
        name: of a table that is kept: its name and that of its state. Of a computed one: in words, what it is
            computed of.
    """

    __slots__ = ("_declared", "_nodes", "_stream_of", "_table", "name")

    def __init__(
        self,
        declared: Declarations,
        table: AnyTable,
        nodes: Mapping[str, Node],
        stream_of: Callable[[Declarations, Node], Stream[Any, Any]],
    ) -> None:
        self._declared = declared
        self._table = table
        self._nodes = nodes
        self._stream_of = stream_of
        self.name: str = table.name if isinstance(table, KeptTable) else f"made of {title_of_table(table)}"

    @overload
    def filter(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> Table[K_co, V_co]: ...
    @overload
    def filter(
        self, function: Callable[[RowContext[K_co], V_co], Any], *, on_error: OnError | None = None
    ) -> Table[K_co, V_co]: ...
    def filter(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Table[K_co, Any]:
        """The rows for which `function(value)` is true. A row for which it is no longer true counts as
        deleted.

        Args:
            function: must not change the value.
            on_error: what to do with a record for whose row the function fails. Default: that of the job.
        """
        check_function_of("row", function, "filter")
        return self._with(
            FilteredTable(self._table, function, self._declared.rule(on_error, "filter"), self._key_kind())
        )

    @overload
    def map(
        self, function: Callable[[V_co], _T | None], *, on_error: OnError | None = None
    ) -> Table[K_co, _T]: ...
    @overload
    def map(
        self, function: Callable[[RowContext[K_co], V_co], _T | None], *, on_error: OnError | None = None
    ) -> Table[K_co, _T]: ...
    def map(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> Table[K_co, Any]:
        """The same keys with other values: `function(value)` of each. None is no row.

        Args:
            function: may change the value that it gets.
            on_error: what to do with a record for whose row the function fails. "skip": the row counts as no
                row. Default: that of the job.
        """
        check_function_of("row", function, "map")
        return self._with(
            MappedTable(self._table, function, self._declared.rule(on_error, "map"), self._key_kind())
        )

    @overload
    def join(
        self,
        other: Table[Any, Any],
        with_: None = None,
        *,
        how: How = "inner",
        on_error: OnError | None = None,
    ) -> Table[K_co, dict[str, Any]]: ...
    @overload
    def join(
        self,
        other: Table[Any, _V],
        with_: Callable[[V_co, _V], _T | None],
        *,
        how: Literal["inner"] = "inner",
        on_error: OnError | None = None,
    ) -> Table[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Table[Any, _V],
        with_: Callable[[V_co, _V | None], _T | None],
        *,
        how: Literal["left"],
        on_error: OnError | None = None,
    ) -> Table[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Table[Any, _V],
        with_: Callable[[V_co | None, _V | None], _T | None],
        *,
        how: Literal["outer"],
        on_error: OnError | None = None,
    ) -> Table[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Table[Any, Any],
        with_: None = None,
        *,
        on: str | OfRow[V_co, Any, K_co],
        name: str,
        how: Literal["inner", "left"] = "inner",
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Table[K_co, dict[str, Any]]: ...
    @overload
    def join(
        self,
        other: Table[_K, _V],
        with_: Callable[[V_co, _V], _T | None],
        *,
        on: str | OfRow[V_co, _K | None, K_co],
        name: str,
        how: Literal["inner"] = "inner",
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Table[K_co, _T]: ...
    @overload
    def join(
        self,
        other: Table[_K, _V],
        with_: Callable[[V_co, _V | None], _T | None],
        *,
        on: str | OfRow[V_co, _K | None, K_co],
        name: str,
        how: Literal["left"],
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Table[K_co, _T]: ...
    def join(
        self,
        other: Table[Any, Any],
        with_: JoinFunction | None = None,
        *,
        on: Rekey | None = None,
        name: str | None = None,
        how: How = "inner",
        version: str | int | None = None,
        on_error: OnError | None = None,
    ) -> Table[Any, Any]:
        """For each key, `with_(left, right)` of its rows in this table and in another one.

        When a row of one of them changes, so does the row of the join. Its time is that of the later of both
        rows. Both tables need the same number of partitions, the same kind of key and the same partitioner.

        **With `on=`**, it is a join by a foreign key: `on` gives the key of the other table's row to which a
        row of this table refers. The tables may have any number of partitions. The join has three repartition
        topics. When a row of the other table changes, all rows change that refer to it.

        Args:
            other: another table of the job, on the right.
            with_: called with the values of both rows, which it may change. Default: a dict with the two as
                "left" and "right".
            on: the field of this table's values that is the other table's key, or a function of the value.
                None as its value or as a result: the row refers to no other one. A row without that field
                fails.
            name: of a join by a foreign key, its state and its stage. A job is refused if it was renamed.
            how: which keys have a row: "inner": those in both tables. "left": those in this one. "outer", not
                with `on=`: those in one of them. `with_` gets None for a row that isn't there.
            version: a version of what `on` means; see `Stream.key_by`.
            on_error: what to do with a record for whose row `with_` or `on` fails. Default: that of the job.

        Raises:
            JobError: `other` isn't a table of this job, the model of this table's values has no field `on`,
                or another argument is wrong.
        """
        if with_ is not None:
            check_function(with_, "join", ("left", "right"))
        if isinstance(other, GlobalTable):
            raise JobError(
                f"join() of the table {self.name!r} got the global table {other.name!r}, which only streams "
                "can be joined with: a row of it that changes would concern rows in all shards.",
                remedy="Declare it with job.table(topic), and say with on= and name= to which of its rows "
                "each row refers.",
            )
        if not isinstance(other, Table):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"join() of the table {self.name!r} got {given(other)}, not a table.",
                remedy="Use table.join(other_table), or stream.join(table) for the records of a stream.",
            )
        if how not in ("inner", "left", "outer"):
            raise JobError(
                f"how={bounded_repr(how)} of the join with {other.name!r} is unknown.",
                remedy="Use how='inner', how='left' or how='outer'.",
            )
        right, _nodes = other._of(self._declared)
        for table in (self, other):
            table._check_kept_for_good()
        if on is not None:
            return self._join_on(other, with_ or pair, on, name, how, version, on_error)
        if name is not None or version is not None:
            raise JobError(
                f"The join with {other.name!r} got name= or version=, which are for joins by a foreign key.",
                remedy="Leave them out, or say with on= what gives the key of the other table.",
            )
        rule = self._declared.rule(on_error, f"the join with {other.name!r}")
        joined = JoinedTable(self._table, right, with_ or pair, how, rule)
        return self._with(joined, {**self._nodes, **other._nodes})

    def _join_on(
        self,
        other: Table[Any, Any],
        with_: JoinFunction,
        on: Rekey,
        name: str | None,
        how: How,
        version: str | int | None,
        on_error: OnError | None,
    ) -> Table[Any, Any]:
        """See `join`. Three stages: the left table's, the right table's, and the result's."""
        if not isinstance(on, str):
            check_function_of("row", on, "join(on=)")
        elif not on:
            raise JobError("join(on=) got an empty field name.", remedy="Name the field that refers to it.")
        if name is None:
            raise JobError(
                f"The join with {other.name!r} got on=, but no name=.",
                remedy="Say what its state is called: join(other, on='customer', name='priced').",
            )
        check_name(name, "The join name", " with name=")
        if isinstance(on, str):
            check_field_of(self._known_kind(), on, f"on={on!r} of the join {name!r}", "join(on=)")
        if how == "outer":
            raise JobError(
                f"how='outer' doesn't go with on= in the join {name!r}: rows to which nobody refers have no "
                "key there.",
                remedy="Use how='inner' or how='left'.",
            )
        declared = self._declared
        rule = declared.rule(on_error, f"the join {name!r}")
        said = checked_version(version, "join(on=)")
        (left, *_), (right, *_) = self._nodes.values(), other._nodes.values()
        kinds = self._kept_kind(), other._kept_kind()
        right_key, left_key = key_of(right), key_of(left)
        subscriptions = TopicSpec("", right_key, SUBSCRIPTIONS)
        to_left = KeyOf(left_key)

        subscribe = self._told_node("changes", tells_all=True).add(
            Subscribe(f"{name}-links", name, on, said, subscriptions, kinds[0], how, rule)
        )
        asking = subscribe.add(KeyBy(on, f"{name}-subscriptions", right_key, SUBSCRIPTIONS, rule, said))
        rows = subscribe.add(KeyBy(to_left, name, left_key, LEFT_ROWS, rule))
        subscribers = Subscribers(f"{name}-subscribers", other._table, kinds[1])
        # Not always: each record of a row that a filter leaves out would be told to all that refer to it.
        may_fail = any(rule_of != "stop" for rule_of in rules_of_table(other._table))
        sides = (
            other._told_node("values", tells_all=may_fail).add(AnswerAgain(subscribers)),
            asking.add(subscribers),
        )
        answers = declared.join_up(sides, declared.joins).add(
            KeyBy(to_left, f"{name}-answers", left_key, ANSWERS, "stop")
        )
        kept = ForeignTable(name, *kinds, how)
        node = declared.join_up((rows, answers), declared.joins).add(kept)

        def combine(values: Pair) -> Any:
            return with_(values.left, values.right)

        combine.__name__ = getattr(with_, "__name__", type(with_).__name__)
        return self._with(MappedTable(kept, combine, rule), {name: node})

    def _check_kept_for_good(self) -> None:
        for kept in kept_in(self._table):
            if isinstance(kept, KeepTable) and kept.ttl_ms is not None:
                raise JobError(
                    f"The table {kept.name!r} has a ttl=, and is joined with another table. When its rows "
                    "are forgotten, those of the join would stay behind.",
                    remedy="Leave out ttl=, or join the streams in front of the table: "
                    "stream.join(other, within=..., name=...).",
                )

    def _key_kind(self) -> KeyKind:
        """The kind of the table's keys."""
        return key_of(next(iter(self._nodes.values())))

    def _ttl(self) -> tuple[int | None, str]:
        """After how long its rows are forgotten, and by the clock of which table."""
        kept = kept_in(self._table)[0]  # a table that is joined has none
        return (kept.ttl_ms, kept.name) if isinstance(kept, KeepTable) else (None, "")

    def _known_kind(self) -> ValueKind | None:
        """The kind of the table's values. None if it isn't known, because they are computed."""
        base = rows_below(self._table)
        return base.value if isinstance(base, KeepTable) else None

    def _kept_kind(self) -> ValueKind:
        """The codec in which the table's values can be kept."""
        return self._known_kind() or "json"

    @overload
    def group_by(
        self,
        by: str | OfRow[V_co, str | None, K_co],
        *,
        name: str,
        value: None = None,
        key: Literal["text"] = "text",
        version: str | int | None = None,
        drop_empty: bool = False,
        on_error: OnError | None = None,
    ) -> GroupedTable[str, V_co]: ...
    @overload
    def group_by(
        self,
        by: str | OfRow[V_co, str | None, K_co],
        *,
        name: str,
        value: Callable[[V_co], _T | None],
        key: Literal["text"] = "text",
        version: str | int | None = None,
        drop_empty: bool = False,
        on_error: OnError | None = None,
    ) -> GroupedTable[str, _T]: ...
    @overload
    def group_by(
        self,
        by: str | OfRow[V_co, str | None, K_co],
        *,
        name: str,
        value: Callable[[RowContext[K_co], V_co], _T | None],
        key: Literal["text"] = "text",
        version: str | int | None = None,
        drop_empty: bool = False,
        on_error: OnError | None = None,
    ) -> GroupedTable[str, _T]: ...
    @overload
    def group_by(
        self,
        by: str | OfRow[V_co, Any, K_co],
        *,
        name: str,
        value: OfRow[V_co, Any, K_co] | None = None,
        key: KeyKind | type[Any],
        version: str | int | None = None,
        drop_empty: bool = False,
        on_error: OnError | None = None,
    ) -> GroupedTable[Any, Any]: ...
    def group_by(
        self,
        by: str | OfRow[V_co, Any, K_co],
        *,
        name: str,
        value: OfRow[V_co, Any, K_co] | None = None,
        key: KeyKind | type[Any] = "text",
        version: str | int | None = None,
        drop_empty: bool = False,
        on_error: OnError | None = None,
    ) -> GroupedTable[Any, Any]:
        """Group the rows by another key. `.aggregate(...)` says what to compute of each group.

        When a row changes, its group loses what the row has contributed before, and gains what it contributes
        now; or one group loses and another one gains. That goes through a repartition topic.

        Args:
            by: the field of a row's value that gives the key of its group, or a function of the value. None:
                the row is in no group. A row without that field fails.
            name: of the table of groups, its state and its stage. A job is refused if it was renamed.
            value: a function that gives what a row contributes; None: nothing. Default: the row's value.
            key: the kind of the groups' keys, as in `Job.topic`.
            version: a version of the groups' meaning; see `Stream.key_by`.
            drop_empty: whether the row of a group is deleted when it has no rows left. Otherwise it stays,
                with a count of 0 and so on.
            on_error: what to do with a record for which a function or an aggregate fails. Default: that of
                the job.

        Raises:
            JobError: the model of this table's values has no field `by`, or another argument is wrong.
        """
        if not isinstance(by, str):
            check_function_of("row", by, "group_by")
        elif not by:
            raise JobError("group_by got an empty field name.", remedy="Name the field that gives the group.")
        if value is not None:
            check_function_of("row", value, "group_by(value=)")
        check_name(name, "The name of the groups", " with name=")
        if isinstance(by, str):
            check_field_of(self._known_kind(), by, f"{by!r} of the groups {name!r}", "group_by")
        rule = self._declared.rule(on_error, f"the groups {name!r}")
        key = self._declared.bound(key, self._declared.repartition_topic(name), "key")
        kind = self._kept_kind() if value is None else "json"
        told = self._told_node("changes", tells_all=True)
        said = checked_version(version, "group_by")
        what = f"the groups {name!r}"
        self._declared.begin(what)

        def table(fields: tuple[tuple[str, Aggregate[Any]], ...], is_single: bool) -> Table[Any, Any]:
            self._declared.complete(what)
            regroup = told.add(
                Regroup(f"{name}-members", name, by, key, value, kind, fields, rule, *self._ttl())
            )
            keyed = regroup.add(KeyBy(GroupOf(by, key), name, key, halves_codec(kind), rule, said))
            groups = GroupTable(name, fields, is_single, drop_empty)
            return self._with(groups, {name: keyed.add(groups)})

        return GroupedTable(name, table, model_of(self._known_kind()) if value is None else None)

    def to_stream(self) -> Stream[K_co, V_co | None]:
        """A stream of the table's changes: the new value of each row that is put or changed, and None (a
        tombstone) for one that is deleted.

        Each record that changes a row leads to one record of the stream, also if the value stays the same.
        Deleting a row that isn't there leads to none. Headers are those of the record.
        """
        return self._told("values")

    def changes(self) -> Stream[K_co, Change[V_co]]:
        """Like `to_stream`, with both values of a row as a `Change`: `change.old` and `change.new`, None
        where there is no row.
        """
        return self._told("changes")

    def _told(self, gives: Literal["values", "changes"]) -> Stream[Any, Any]:
        return self._stream_of(self._declared, self._told_node(gives))

    def _told_node(self, gives: Literal["values", "changes"], *, tells_all: bool = False) -> Node:
        nodes = tuple(self._nodes.values())
        node = Node(TellChanges(self._table, gives, tells_all=tells_all), nodes)
        for kept in nodes:
            kept.children.append(node)
        if len(nodes) > 1:
            self._declared.joins.append(node)
        return node

    def _with(self, table: AnyTable, nodes: Mapping[str, Node] | None = None) -> Table[Any, Any]:
        return Table(self._declared, table, nodes or self._nodes, self._stream_of)

    def _of(self, declared: Declarations) -> tuple[AnyTable, tuple[Node, ...]]:
        """The table and the nodes that keep its rows, for a join of a job."""
        if self._declared is not declared:
            raise _of_another_job(declared, self.name, self._declared)
        return self._table, tuple(self._nodes.values())


@hints_at_calls
class GlobalTable(Generic[K_co, V_co]):
    """A table of which each shard has all rows. `Job.global_table` gives it, `Stream.join` uses it.

    `filter` and `map` give other global tables, which are computed as those of `Table` are.

    For type checkers, it has the types of its keys and values.

    Attributes:
        name: of the table.
    """

    __slots__ = ("_declared", "_key", "_table", "name")

    def __init__(self, declared: Declarations, table: AnyTable, key: KeyKind) -> None:
        self._declared = declared
        self._table = table
        self._key: KeyKind = key
        names = title_of_table(table)
        self.name: str = table.name if isinstance(table, KeptTable) else f"made of {names}"

    @overload
    def filter(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> GlobalTable[K_co, V_co]: ...
    @overload
    def filter(
        self, function: Callable[[RowContext[K_co], V_co], Any], *, on_error: OnError | None = None
    ) -> GlobalTable[K_co, V_co]: ...
    def filter(
        self, function: Callable[..., Any], *, on_error: OnError | None = None
    ) -> GlobalTable[K_co, Any]:
        """The rows for which `function(value)` is true. For the others, the table has no row.

        Args:
            function: must not change the value.
            on_error: what to do with a stream's record for whose row the function fails. Default: that of the
                job.
        """
        check_function_of("row", function, "filter")
        rule = self._declared.rule(on_error, "filter")
        return GlobalTable(self._declared, FilteredTable(self._table, function, rule, self._key), self._key)

    @overload
    def map(
        self, function: Callable[[V_co], _T | None], *, on_error: OnError | None = None
    ) -> GlobalTable[K_co, _T]: ...
    @overload
    def map(
        self, function: Callable[[RowContext[K_co], V_co], _T | None], *, on_error: OnError | None = None
    ) -> GlobalTable[K_co, _T]: ...
    def map(self, function: Callable[..., Any], *, on_error: OnError | None = None) -> GlobalTable[K_co, Any]:
        """The same keys with other values: `function(value)` of each. None is no row.

        Args:
            function: may change the value that it gets.
            on_error: what to do with a stream's record for whose row the function fails. Default: that of the
                job.
        """
        check_function_of("row", function, "map")
        rule = self._declared.rule(on_error, "map")
        return GlobalTable(self._declared, MappedTable(self._table, function, rule, self._key), self._key)

    def __getattr__(self, name: str) -> Any:
        """Only called for what isn't there."""
        if name in _NOT_OF_A_GLOBAL_TABLE:
            raise JobError(
                f"The global table {self.name!r} has no {name}(): each shard has all rows, so what follows "
                "from them would happen in each shard.",
                remedy="Use job.table(topic, name=...) for that. A topic can be read as both.",
            )
        return no_such(self, name)


_NOT_OF_A_GLOBAL_TABLE = ("changes", "group_by", "join", "to_stream")
"""What tables have, and global ones don't."""


@hints_at_calls
class GroupedTable(Generic[K_co, V_co]):
    """The rows of a table in groups. `Table.group_by` gives it; each of its methods gives a table with a row
    for each group. Call one of them, once.
    """

    __slots__ = ("_model", "_name", "_table")

    def __init__(
        self,
        name: str,
        table: Callable[[tuple[tuple[str, Aggregate[Any]], ...], bool], Table[Any, Any]],
        model: type[Any] | None,
    ) -> None:
        self._name = name
        self._table = table
        self._model = model

    def aggregate(self, /, **fields: Aggregate[Any, V_co]) -> Table[K_co, dict[str, Any]]:
        """A row is a dict with these fields.

        Args:
            fields: such as `n=count(), total=sum_(lambda account: account["cents"])`. They must be able to
                take values away again: `count`, `sum_`, `mean`, `collect`, `count_distinct`, `reduce` with
                `subtract=`, or an `Aggregate` of your own with `subtract=`.

        Raises:
            JobError: there are none, or one can't.
        """
        return self._table(check_group_aggregates(self._name, fields), False)

    def count(self) -> Table[K_co, int]:
        """A row is the number of the group's rows."""
        return self._table((("count", count()),), True)

    def reduce(
        self,
        add: Callable[[Any, V_co], Any],
        subtract: Callable[[Any, V_co], Any],
        *,
        model: type[Any] | None = None,
    ) -> Table[K_co, V_co]:
        """A row is what `add(reduced, value)` makes of the first value and each further one, and
        `subtract(reduced, value)` of each value that leaves.

        Args:
            add: see above.
            subtract: see above.
            model: the model of what rows contribute, if it has one. Default: that of the table's values, if
                they contribute themselves.
        """
        check_function(add, "reduce", ("reduced", "value"))
        check_function(subtract, "reduce", ("reduced", "value"))
        reduced = reduce(add, subtract=subtract, model=model or self._model)
        return self._table((("reduce", reduced),), True)


def checked_history(name: str, history: object) -> int | None:
    """The `history=` of a table, in milliseconds.

    Raises:
        JobError: it isn't a timedelta of whole milliseconds, or out of range.
    """
    if history is None:
        return None
    if not isinstance(history, timedelta) or not timedelta() < history <= DURATION_MAX:
        raise JobError(
            f"history={bounded_repr(history)} of the table {name!r} is not a time up to 100 years.",
            remedy="Use history=timedelta(days=7), from Python's datetime.",
        )
    return -(-history // timedelta(milliseconds=1))


def checked_ttl(name: str, ttl: timedelta | None, history: timedelta | None) -> int | None:
    """The `ttl=` of a table, in milliseconds.

    Raises:
        JobError: it isn't a timedelta of whole milliseconds, or out of range, or the table has a history.
    """
    if ttl is None:
        return None
    check_duration(f"the table {name!r}", "ttl", ttl, MILLISECOND)
    if history is not None:
        raise JobError(
            f"The table {name!r} got history= and ttl=: its former rows would be kept longer than its rows.",
            remedy="Leave out one of them.",
        )
    return ttl // MILLISECOND


def pair(left: Any, right: Any) -> dict[str, Any]:
    """What a join passes on if it isn't told otherwise: both values."""
    return {"left": left, "right": right}


def described_table(table: Table[Any, Any] | GlobalTable[Any, Any]) -> AnyTable:
    """How a table is described in the graph."""
    return table._table  # pyright: ignore[reportPrivateUsage]


def key_of_global(table: GlobalTable[Any, Any]) -> KeyKind:
    """The kind of its keys."""
    return table._key  # pyright: ignore[reportPrivateUsage]


def check_of_job(table: GlobalTable[Any, Any], declared: Declarations) -> None:
    """Refuse a global table of another job."""
    own = table._declared  # pyright: ignore[reportPrivateUsage]
    if own is not declared:
        raise _of_another_job(declared, table.name, own)


def _of_another_job(declared: Declarations, name: str, other: Declarations) -> JobError:
    return JobError(
        f"join() of the job {declared.job!r} got the table {name!r} of the job {other.job!r}.",
        remedy="Declare the table on this job.",
    )


def looked_up(table: Table[Any, Any], declared: Declarations) -> tuple[AnyTable, tuple[Node, ...]]:
    """The table and the nodes that keep its rows, for a join of a job."""
    return table._of(declared)  # pyright: ignore[reportPrivateUsage]
