"""The rows of a kept table, and how the present record has changed them.

A row is the time of its record and its value, as bytes of the table's codec. So filling a table with values
that were read encodes nothing, and whatever a function does to a decoded value changes no row. In the layers
below, an entry looks like one with a TTL (see `entries`); rows of older versions have no time. Pure.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from fcluster.engine.entries import ABSENT, DELETED, PLAIN, TIMED, EntryTable
from fcluster.engine.ordered_keys import TIME_BYTES
from fcluster.engine.records import NO_TIMESTAMP_MS, SourceRecord

_TIME = Struct(">q")
_WITHOUT_TIME = _TIME.pack(NO_TIMESTAMP_MS)
VALUE_AT = TIME_BYTES
"""Where the value begins in a row."""


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


class RowTable(EntryTable):
    """The rows of a table, by key.

    A record changes a row in one chain, and others follow the change in chains of their own, which come later
    for the same record. `changes_by` gives them what that record has changed.
    """

    __slots__ = ("_changed_by", "_changes")

    mark = TIMED

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._changed_by: SourceRecord | None = None
        self._changes: list[RowChange] = []

    def note(self, record: SourceRecord, change: RowChange) -> None:
        """`record` has made this change."""
        if self._changed_by is not record:
            self._changed_by, self._changes = record, []
        self._changes.append(change)

    def changes_by(self, record: SourceRecord) -> list[RowChange]:
        """What `record` has changed, in order."""
        return self._changes if self._changed_by is record else []

    def row(self, key: bytes) -> bytes | None:
        """The row of `key`, None if there is none."""
        found = self.get(key)
        return None if found is ABSENT else found

    def rollback(self) -> None:
        """See `EntryTable`. Nobody follows what is undone."""
        super().rollback()
        self._changed_by = None

    def forget_touched(self) -> None:
        """See `EntryTable`."""
        super().forget_touched()
        self._changed_by = None

    def _take(self, key: bytes, raw: bytes | None) -> Any:
        if not raw:
            self._below[key] = DELETED
            return ABSENT
        self._below[key] = raw
        return _WITHOUT_TIME + raw[1:] if raw[:1] == PLAIN else raw[1:]
