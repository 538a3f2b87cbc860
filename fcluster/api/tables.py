"""Tables of a job file: the newest value of each key, what is computed of it, and the stream of changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from fcluster.api.checks import check_function
from fcluster.api.context import JoinFunction
from fcluster.api.declarations import Declarations
from fcluster.api.nodes import Node
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.changes import Change
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.joins import How
from fcluster.graph.operators import (
    AnyTable,
    FilteredTable,
    JoinedTable,
    KeepTable,
    MappedTable,
    OnError,
    TellChanges,
    title_of_table,
)

if TYPE_CHECKING:
    from fcluster.api.streams import Stream

_T = TypeVar("_T")
_V = TypeVar("_V")


class Table(Generic[K_co, V_co]):
    """The newest value of each key. `Job.table` gives the table of a topic, `Stream.table` that of a stream.

    `filter`, `map` and `join` give other tables. These have no state of their own: their rows are computed
    when they are needed, from rows that are kept. So their functions are called for former values, too; they
    must give the same result for the same value, and must not change it unless they return it. A function
    that returns None, or fails by a rule that isn't "stop", leaves the key without a row.

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
        self.name: str = table.name if isinstance(table, KeepTable) else f"made of {title_of_table(table)}"

    def filter(
        self, function: Callable[[V_co], Any], *, on_error: OnError | None = None
    ) -> Table[K_co, V_co]:
        """The rows for which `function(value)` is true. A row for which it is no longer true counts as
        deleted.

        Args:
            function: must not change the value.
            on_error: what to do with a record for whose row the function fails. Default: that of the job.
        """
        check_function(function, "filter", ("value",))
        return self._with(FilteredTable(self._table, function, self._declared.rule(on_error, "filter")))

    def map(
        self, function: Callable[[V_co], _T | None], *, on_error: OnError | None = None
    ) -> Table[K_co, _T]:
        """The same keys with other values: `function(value)` of each. None is no row.

        Args:
            function: may change the value that it gets.
            on_error: what to do with a record for whose row the function fails. Default: that of the job.
        """
        check_function(function, "map", ("value",))
        return self._with(MappedTable(self._table, function, self._declared.rule(on_error, "map")))

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
    def join(
        self,
        other: Table[Any, Any],
        with_: JoinFunction | None = None,
        *,
        how: How = "inner",
        on_error: OnError | None = None,
    ) -> Table[Any, Any]:
        """For each key, `with_(left, right)` of its rows in this table and in another one.

        When a row of one of them changes, so does the row of the join. Its time is that of the later of both
        rows. Both tables need the same number of partitions, the same kind of key and the same partitioner.

        Args:
            other: another table of the job, on the right.
            with_: called with the values of both rows, which it may change. Default: a dict with the two as
                "left" and "right".
            how: which keys have a row: "inner": those in both tables. "left": those in this one. "outer":
                those in one of them. `with_` gets None for a row that isn't there.
            on_error: what to do with a record for whose row `with_` fails. Default: that of the job.

        Raises:
            JobError: `other` isn't a table of this job, or an argument is wrong.
        """
        if with_ is not None:
            check_function(with_, "join", ("left", "right"))
        if not isinstance(other, Table):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise JobError(
                f"join() of the table {self.name!r} got {bounded_repr(other)}, not a table.",
                remedy="Use table.join(other_table), or stream.join(table) for the records of a stream.",
            )
        if how not in ("inner", "left", "outer"):
            raise JobError(
                f"how={bounded_repr(how)} of the join with {other.name!r} is unknown.",
                remedy="Use how='inner', how='left' or how='outer'.",
            )
        right, _nodes = other._of(self._declared)
        rule = self._declared.rule(on_error, f"the join with {other.name!r}")
        joined = JoinedTable(self._table, right, with_ or pair, how, rule)
        return self._with(joined, {**self._nodes, **other._nodes})

    def to_stream(self) -> Stream[K_co, V_co]:
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

    def _told(self, gives: Any) -> Stream[Any, Any]:
        nodes = tuple(self._nodes.values())
        node = Node(TellChanges(self._table, gives), nodes)
        for kept in nodes:
            kept.children.append(node)
        if len(nodes) > 1:
            self._declared.joins.append(node)
        return self._stream_of(self._declared, node)

    def _with(self, table: AnyTable, nodes: Mapping[str, Node] | None = None) -> Table[Any, Any]:
        return Table(self._declared, table, nodes or self._nodes, self._stream_of)

    def _of(self, declared: Declarations) -> tuple[AnyTable, tuple[Node, ...]]:
        """The table and the nodes that keep its rows, for a join of a job."""
        if self._declared is not declared:
            raise JobError(
                f"join() of the job {declared.job!r} got the table {self.name!r} of the job "
                f"{self._declared.job!r}.",
                remedy="Declare the table on this job.",
            )
        return self._table, tuple(self._nodes.values())


def pair(left: Any, right: Any) -> dict[str, Any]:
    """What a join passes on if it isn't told otherwise: both values."""
    return {"left": left, "right": right}


def kept_table(table: Table[Any, Any]) -> AnyTable:
    """How a table is described in the graph."""
    return table._table  # pyright: ignore[reportPrivateUsage]


def looked_up(table: Table[Any, Any], declared: Declarations) -> tuple[AnyTable, tuple[Node, ...]]:
    """The table and the nodes that keep its rows, for a join of a job."""
    return table._of(declared)  # pyright: ignore[reportPrivateUsage]
