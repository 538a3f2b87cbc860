"""The rows of a kept table, and how the present record has changed them. Pure.

The newest value of a key is a row of the time of its record and the value, as bytes of the table's codec. So
filling a table with values that were read encodes nothing, and whatever a function does to a decoded value
changes no row. In the layers below, an entry looks like one with a TTL (see `entries`); rows of older
versions have no time.

A row of a table of groups is a list, stored as JSON: its time, the number of rows in the group, and what each
aggregate keeps. It is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from struct import Struct
from typing import Any, NamedTuple, cast

from fcluster.engine.entries import ABSENT, DELETED, PLAIN, TIMED, EntryTable
from fcluster.engine.ordered_keys import TIME_BYTES
from fcluster.engine.records import NO_TIMESTAMP_MS, SourceRecord, origin_of
from fcluster.graph.operators import GroupTable
from fcluster.graph.typed import TYPED

_TIME = Struct(">q")
_WITHOUT_TIME = _TIME.pack(NO_TIMESTAMP_MS)
VALUE_AT = TIME_BYTES
"""Where the value begins in a row."""


AT_MS, MEMBERS, AGGREGATES = 0, 1, 2
"""The elements of a group's row."""
_UNCHANGING = frozenset({int, float, str, bool, type(None), *TYPED})


def row_of(time_ms: int, raw: bytes) -> bytes:
    """A row."""
    return _TIME.pack(time_ms) + raw


def time_of_row(row: bytes) -> int:
    """The timestamp of the record that has put the row, in milliseconds; -1 if it had none."""
    time_ms: int = _TIME.unpack_from(row)[0]
    return time_ms


class RowChange(NamedTuple):
    """How a record has changed a row.

    Attributes:
        key: of the row.
        old: the former row. None: there was none.
        new: the present row. None: there is none.
        at_ms: the record's timestamp.
    """

    key: bytes
    old: Any
    new: Any
    at_ms: int


class FollowedTable(EntryTable):
    """The rows of a table, by key, and what the present record has changed.

    Attributes:
        undone: how often changes were undone.

    A record changes a row in one chain, and others follow the change in chains of their own, which come later
    for the same record. `changes_by` gives them what that record has changed, with which chains begin.
    """

    __slots__ = ("_changed_by", "_changes", "undone")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._changed_by: SourceRecord | None = None
        self._changes: list[RowChange] = []
        self.undone = 0

    def note(self, record: SourceRecord, change: RowChange) -> None:
        """`record` has made this change, or one that a step has passed on in its place."""
        origin = origin_of(record)
        if self._changed_by is not origin:
            self._changed_by, self._changes = origin, []
        self._changes.append(change)

    def changes_by(self, record: SourceRecord) -> list[RowChange]:
        """What `record` has changed, in order."""
        return self._changes if self._changed_by is record else []

    def row(self, key: bytes) -> Any:
        """The row of `key`, None if there is none."""
        found = self.get(key)
        return None if found is ABSENT else found

    def rollback(self) -> None:
        """See `EntryTable`. Nobody follows what is undone."""
        super().rollback()
        self._changed_by = None
        self.undone += 1

    def forget_touched(self) -> None:
        """See `EntryTable`."""
        super().forget_touched()
        self._changed_by = None
        self.undone += 1


class RowTable(FollowedTable):
    """Rows that are a time and bytes: the newest value of each key."""

    __slots__ = ()

    mark = TIMED

    def _take(self, key: bytes, raw: bytes | None) -> Any:
        if not raw:
            self._below[key] = DELETED
            return ABSENT
        self._below[key] = raw
        return _WITHOUT_TIME + raw[1:] if raw[:1] == PLAIN else raw[1:]


class ExpiringRowTable(RowTable):
    """Rows with a TTL, which begins with the time of their record, or with event time if that is later. Like
    other entries with a TTL, each has a time of its own in front.
    """

    __slots__ = ()

    mark = EntryTable.mark

    def put(self, key: bytes, value: bytes) -> None:
        """Make `value` the row of `key`."""
        super().put(key, value)
        self._times[key] = max(time_of_row(value), self._times[key])

    def _take(self, key: bytes, raw: bytes | None) -> Any:
        return EntryTable._take(self, key, raw)


def compile_group_value(table: GroupTable) -> Callable[[list[Any]], Any]:
    """The function that gives the value of a group's row. It shares nothing with the row."""
    results = tuple((name, at, one.result) for at, (name, one) in enumerate(table.fields))
    if table.is_single:
        (_name, _at, result), *_rest = results
        return lambda kept: apart(result(kept[AGGREGATES][0]))

    def value_of(kept: list[Any]) -> dict[str, Any]:
        aggregates = kept[AGGREGATES]
        return {name: apart(result(aggregates[at])) for name, at, result in results}

    return value_of


def apart(value: Any) -> Any:
    """The value, for steps that may change it in place."""
    if type(value) in _UNCHANGING:
        return value
    if type(value) is dict:
        return {key: apart(item) for key, item in cast("dict[Any, Any]", value).items()}
    if type(value) is list:
        return [apart(item) for item in cast("list[Any]", value)]
    return deepcopy(value)
