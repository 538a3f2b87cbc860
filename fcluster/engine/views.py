"""Tables that are computed of kept ones: their rows, and their changes.

Responsible for: compiling a table of the graph into two functions. `Lookup` gives the present row of a key.
`Delta` gives the change of a row that follows from what a record has changed in the kept tables. Neither
keeps anything: both compute the value anew, so each caller gets values of its own. Pure.

Invariants:
- What a record has changed of a key leads to at most one change of that key in a table that is computed of
  it, however many kept tables it has changed, and however many ways there are from the one to the other.
- A change has an old or a new value, or both: where there was no row and is none, nothing is told.
- A function that fails for a new value fails the record, by the rule of its step. For an old value, and for
  the row on the other side of a join, it then failed already: unless the rule is "stop", there is no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from fcluster.common.failures import bounded_text
from fcluster.engine.context import AnyTable as StoredTable
from fcluster.engine.entries import ABSENT
from fcluster.engine.history import history_of
from fcluster.engine.records import NO_TIMESTAMP_MS
from fcluster.engine.rows import (
    AT_MS,
    VALUE_AT,
    FollowedTable,
    RowChange,
    RowTable,
    apart,
    compile_group_value,
    time_of_row,
)
from fcluster.engine.showing import of_rows
from fcluster.engine.steps import Place, StepFailure, where_of_function
from fcluster.graph.codecs import Decode, value_codec
from fcluster.graph.operators import (
    AnyTable,
    FilteredTable,
    ForeignTable,
    GroupTable,
    JoinedTable,
    KeepTable,
    KeptTable,
    MappedTable,
    OnError,
    kept_in,
    rules_of_table,
    title_of_table,
)


class Row(NamedTuple):
    """A row of a table: its value, and the time of the record that has made it."""

    value: Any
    at_ms: int


class Told(NamedTuple):
    """A change of a row: its former and its present value, None if there is no row; and its time."""

    old: Any
    new: Any
    at_ms: int


Lookup = Callable[[bytes, int | None], Row | None]
"""Takes a key, and the time whose row is wanted of tables with a history. None: the present one."""
Changes = Mapping[str, RowChange]
"""What a record has made of the row of a key, by the name of the kept table."""
Delta = Callable[[bytes, Changes], Told | None]
"""Takes a key, and its changes."""
Passing = tuple[type[BaseException], ...]
_Apply = Callable[[bytes, Any], Any]


def compile_lookup(table: AnyTable, tables: Mapping[str, StoredTable], passing: Passing) -> Lookup:
    """The function that gives a row of the table.

    Args:
        tables: the shard's tables, by the name of the store.
        passing: exceptions that aren't a failure of a function.
    """
    if isinstance(table, KeepTable | ForeignTable):
        return _kept_lookup(table, tables)
    if isinstance(table, GroupTable):
        return _group_lookup(table, tables)
    if isinstance(table, JoinedTable):
        return _joined_lookup(table, tables, passing)
    below = compile_lookup(table.table, tables, passing)
    apply = _compile_apply(table, passing)

    def look_up(key: bytes, at_ms: int | None) -> Row | None:
        row = below(key, at_ms)
        if row is None:
            return None
        value = apply(key, row.value)
        return None if value is None else Row(value, row.at_ms)

    return look_up


def compile_lenient_lookup(table: AnyTable, tables: Mapping[str, StoredTable], passing: Passing) -> Lookup:
    """Like `compile_lookup`, for whoever isn't to blame for the row: one for which a function fails counts as
    no row, unless the rule of its step is "stop".
    """
    return excusing(compile_lookup(table, tables, passing), table, lambda rule: rule != "stop", None)


def excusing(
    find: Callable[[bytes, int | None], Any],
    table: AnyTable,
    is_excused: Callable[[OnError], bool],
    no_row: Any,
) -> Callable[[bytes, int | None], Any]:
    """`find`, which gives something of a row of `table`, or `no_row` if a function of the table fails for the
    row and the rule of its step is excused.
    """
    if not any(map(is_excused, rules_of_table(table))):
        return find

    def find_or_excuse(key: bytes, at_ms: int | None) -> Any:
        try:
            return find(key, at_ms)
        except StepFailure as failure:
            if not is_excused(failure.rule):
                raise
            return no_row

    return find_or_excuse


def compile_find(
    table: AnyTable, tables: Mapping[str, StoredTable], passing: Passing
) -> Callable[[bytes, int | None], Any]:
    """The function that gives the value of a row, or `ABSENT`, to a stream that is joined with the table. For
    it, JSON's null in a topic is a row. Otherwise like `Lookup`.
    """
    if isinstance(table, KeepTable):
        row_of_key = _compile_row(table, tables)
        decode = value_codec(table.value)[0]

        def find_kept(key: bytes, at_ms: int | None) -> Any:
            row = row_of_key(key, at_ms)
            return ABSENT if row is None else decode(row[VALUE_AT:])

        return find_kept
    look_up = compile_lookup(table, tables, passing)

    def find(key: bytes, at_ms: int | None) -> Any:
        row = look_up(key, at_ms)
        return ABSENT if row is None else row.value

    return find


def compile_delta(
    table: AnyTable,
    tables: Mapping[str, StoredTable],
    passing: Passing,
    *,
    tells_all: bool = False,
) -> Delta:
    """The function that gives the change of the table. See `compile_lookup` and `TellChanges` for the
    arguments.
    """
    if isinstance(table, KeptTable):
        return _group_delta(table) if isinstance(table, GroupTable) else _kept_delta(table, tells_all)
    if isinstance(table, JoinedTable):
        return _joined_delta(table, tables, passing, tells_all)
    below = compile_delta(table.table, tables, passing, tells_all=tells_all)
    apply = _compile_apply(table, passing)
    apply_to_old = _lenient(apply, table.on_error)

    def delta(key: bytes, changes: Changes) -> Told | None:
        told = below(key, changes)
        if told is None:
            return None
        new = None if told.new is None else apply(key, told.new)
        old = None if told.old is None else apply_to_old(key, told.old)
        return None if new is None and old is None and not tells_all else Told(old, new, told.at_ms)

    return delta


def _kept_lookup(table: KeepTable | ForeignTable, tables: Mapping[str, StoredTable]) -> Lookup:
    row_of_key, decode = _compile_row(table, tables), value_codec(table.value)[0]

    def look_up(key: bytes, at_ms: int | None) -> Row | None:
        row = row_of_key(key, at_ms)
        if row is None:
            return None
        value = decode(row[VALUE_AT:])
        return None if value is None else Row(value, time_of_row(row))

    return look_up


def _compile_row(
    table: KeepTable | ForeignTable, tables: Mapping[str, StoredTable]
) -> Callable[[bytes, int | None], bytes | None]:
    """The function that gives a row: the one of a time, if the table has a history."""
    present = cast("RowTable", tables[table.store.name]).row
    history = history_of(table, tables) if isinstance(table, KeepTable) else None
    if history is None:
        return lambda key, _at_ms: present(key)
    row_at = history.row_at
    return lambda key, at_ms: present(key) if at_ms is None else row_at(key, at_ms)


def _kept_delta(table: KeepTable | ForeignTable, tells_all: bool) -> Delta:
    name = table.name
    decode: Decode = value_codec(table.value)[0]

    def delta(_key: bytes, changes: Changes) -> Told | None:
        change = changes.get(name)
        if change is None:
            return None
        old = None if change.old is None else decode(change.old[VALUE_AT:])
        new = None if change.new is None else decode(change.new[VALUE_AT:])
        return None if new is None and old is None and not tells_all else Told(old, new, change.at_ms)

    return delta


def _group_lookup(table: GroupTable, tables: Mapping[str, StoredTable]) -> Lookup:
    rows, value_of = cast("FollowedTable", tables[table.store.name]), compile_group_value(table)

    def look_up(key: bytes, _at_ms: int | None) -> Row | None:
        row = rows.row(key)
        if row is None:
            return None
        value = value_of(row)
        return None if value is None else Row(value, row[AT_MS])

    return look_up


def _group_delta(table: GroupTable) -> Delta:
    name = table.name

    def delta(_key: bytes, changes: Changes) -> Told | None:
        change = changes.get(name)
        if change is None or (change.old is None and change.new is None):
            return None
        # Several may follow the change, and each may change what it gets.
        return Told(apart(change.old), apart(change.new), change.at_ms)

    return delta


# --- joins ------------------------------------------------------------------------------------------------


def _joined_lookup(table: JoinedTable, tables: Mapping[str, StoredTable], passing: Passing) -> Lookup:
    left_of, right_of = (compile_lookup(side, tables, passing) for side in (table.left, table.right))
    combine = _compile_combine(table, passing)

    def look_up(key: bytes, at_ms: int | None) -> Row | None:
        left, right = left_of(key, at_ms), right_of(key, at_ms)
        value = combine(None if left is None else left.value, None if right is None else right.value)
        return None if value is None else Row(value, max(row.at_ms for row in (left, right) if row))

    return look_up


def _joined_delta(
    table: JoinedTable, tables: Mapping[str, StoredTable], passing: Passing, tells_all: bool
) -> Delta:
    left_of, right_of = (
        _compile_side(side, tables, passing, tells_all) for side in (table.left, table.right)
    )
    combine = _compile_combine(table, passing)
    combine_old = _lenient(combine, table.on_error)

    may_fail = any(rule != "stop" for rule in rules_of_table(table))

    def delta(key: bytes, changes: Changes) -> Told | None:
        is_told_left, left = left_of(key, changes)
        is_told_right, right = right_of(key, changes)
        if not is_told_left and not is_told_right:
            return None
        new, old = combine(left.new, right.new), combine_old(left.old, right.old)
        told = [side for is_told, side in ((is_told_left, left), (is_told_right, right)) if is_told]
        is_silent = all(side.old is None and side.new is None for side in told)
        if is_silent and new is not None and not may_fail:
            return None  # the other side's row is what it was
        if new is None and old is None and not tells_all:
            return None
        return Told(old, new, max(left.at_ms, right.at_ms))

    return delta


def _compile_side(
    table: AnyTable, tables: Mapping[str, StoredTable], passing: Passing, tells_all: bool
) -> Callable[[bytes, Changes], tuple[bool, Told]]:
    """Whether changes reach a side of a join, and the former and the present value there. If they don't
    reach it, both are the present one, as values of their own.
    """
    delta = compile_delta(table, tables, passing, tells_all=tells_all)
    look_up = compile_lenient_lookup(table, tables, passing)
    names = frozenset(kept.name for kept in kept_in(table))

    def side(key: bytes, changes: Changes) -> tuple[bool, Told]:
        told = None if names.isdisjoint(changes) else delta(key, changes)
        if told is not None:
            return True, told
        row = look_up(key, None)
        if row is None:
            return False, _NOTHING
        again = look_up(key, None)
        assert again is not None
        return False, Told(again.value, row.value, row.at_ms)

    return side


_NOTHING = Told(None, None, NO_TIMESTAMP_MS)


def _compile_combine(table: JoinedTable, passing: Passing) -> Callable[[Any, Any], Any]:
    """The value of a row, given those of both sides. None for no row."""
    function, how, place = table.function, table.how, place_of_table(table)

    def combine(left: Any, right: Any) -> Any:
        if (left is None and (how != "outer" or right is None)) or (right is None and how == "inner"):
            return None
        try:
            return function(left, right)
        except passing:
            raise
        except BaseException as error:
            raise StepFailure(place, error) from error

    return combine


# --- functions --------------------------------------------------------------------------------------------


def _compile_apply(table: FilteredTable | MappedTable, passing: Passing) -> _Apply:
    """What a table makes of a value of the table below: another value, or None for no row."""
    (function,), show = of_rows(table.key, table.function)
    place, keeps = place_of_table(table), isinstance(table, FilteredTable)

    def apply(_key: bytes, value: Any) -> Any:
        try:
            result = function(value)
            if keeps:
                return value if result else None
        except passing:
            raise
        except BaseException as error:
            raise StepFailure(place, error) from error
        return result

    if show is None:
        return apply

    def show_and_apply(key: bytes, value: Any) -> Any:
        show(key)
        return apply(key, value)

    return show_and_apply


def _lenient(apply: Callable[..., Any], on_error: OnError) -> Callable[..., Any]:
    """For old values, which are None where the function fails."""
    if on_error == "stop":
        return apply

    def apply_or_none(*arguments: Any) -> Any:
        try:
            return apply(*arguments)
        except StepFailure:
            return None

    return apply_or_none


def place_of_table(table: FilteredTable | MappedTable | JoinedTable) -> Place:
    """Where the function of a computed table fails."""
    what = "filter" if isinstance(table, FilteredTable) else "map"
    of = "table"
    if isinstance(table, JoinedTable):
        what, of = "join by", "tables"
    name = bounded_text(str(getattr(table.function, "__name__", type(table.function).__name__)), 100)
    title = f"{what} {name!r} of the {of} {title_of_table(table)}"
    return Place(title, f"in {title}", table.on_error, where_of_function(table.function))
