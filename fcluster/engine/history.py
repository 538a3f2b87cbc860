"""The former rows of a table, for streams that are joined with the row of their own time. Pure.

Responsible for: which row a key had at which time, and forgetting what nobody can ask for any more. The
present row is in the table itself (`engine.rows`); what was there before is here, as versions:

    //versions   group of the key | time (8 bytes)     -> 1 | value; or 0, if the row was deleted then
    //due        time (8 bytes) | key                  -> nothing: a version of the key has ended then
    //clock      nothing                               -> the greatest timestamp of the table's records

Invariants:
- A row is valid from the time of its record until that of the next version of its key. Which one is present
  is decided by time, not by the order in which records are read.
- Times before `clock - history` are forgotten: nobody finds a row there, and a record of such a time changes
  nothing. So what is found doesn't depend on when versions are removed.
- A version is removed once its end is forgotten (invariant 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

from fcluster.engine.entries import Clock, EntryTable
from fcluster.engine.ordered_keys import TIME_BYTES, decode_time, encode_time, group_of_key
from fcluster.engine.rows import VALUE_AT, RowTable, row_of, time_of_row
from fcluster.engine.steps import RecordError
from fcluster.graph.operators import KeepTable

NEVER_MS = 2**63
_DELETED = b"\x00"
_VALUE = b"\x01"
NO_PLACE = "the record has no timestamp, so its row has no place in the table's history"
CLEANED_PER_RECORD_MAX = 2
"""How many versions may be removed for each record. A record ends one version at most, so this keeps up."""


def history_of(table: KeepTable, tables: Mapping[str, Any]) -> History | None:
    """The history of a table that has one.

    Args:
        tables: the shard's tables, by the name of the store.
    """
    if table.history_ms is None:
        return None
    rows, versions, due, clock = (tables[store.name] for store in table.stores[:4])
    return History(cast("RowTable", rows), versions, due, Clock(clock), table.history_ms)


class History:
    """The rows of a table with their past.

    Args:
        rows: the present rows.
        versions: the former ones; each key is a group.
        due: when versions have ended, all in one group.
        clock: the greatest timestamp of the table's records.
        history_ms: for how long the past is kept.
    """

    def __init__(
        self, rows: RowTable, versions: EntryTable, due: EntryTable, clock: Clock, history_ms: int
    ) -> None:
        self._rows = rows
        self._versions = versions
        self._due = due
        self._clock = clock
        self._history_ms = history_ms
        # Nothing is due before this time, as long as nothing was undone since.
        self._next_ms = 0
        self._undone = rows.undone

    def put(self, key: bytes, row: bytes | None, at_ms: int) -> bool:
        """Make `row` the row of `key` from `at_ms` on, until its next version. None: there is none.

        Returns whether this changes the present row.

        Raises:
            RecordError: the record has no timestamp.
        """
        if at_ms < 0:
            raise RecordError(NO_PLACE)
        self._clock.advance(at_ms)
        if at_ms < self._forgotten_ms():
            return False
        present = self._rows.row(key)
        newest_ms = self._newest_ms(key, present)
        is_newest = newest_ms is None or at_ms >= newest_ms
        if is_newest:
            if present is not None and time_of_row(present) < at_ms:
                self._keep(key, max(0, time_of_row(present)), _VALUE + present[VALUE_AT:], at_ms)
            if row is not None:
                self._versions.delete(_entry(key, at_ms))
                self._rows.put(key, row)
            else:
                self._rows.delete(key)
                self._keep(key, at_ms, _DELETED, at_ms)
        else:
            assert newest_ms is not None
            self._keep(key, at_ms, _DELETED if row is None else _VALUE + row[VALUE_AT:], newest_ms)
        self._forget()
        return is_newest

    def row_at(self, key: bytes, at_ms: int) -> bytes | None:
        """The row that `key` had at that time, None if it had none."""
        present = self._rows.row(key)
        if present is not None and time_of_row(present) <= at_ms:
            return present
        if at_ms < self._forgotten_ms():
            return None
        group = group_of_key(key)
        for entry, kept in self._versions.scan(group, _entry(key, at_ms) + b"\x00", reverse=True):
            return None if kept == _DELETED else row_of(decode_time(entry[len(group) :]), kept[1:])
        return None

    def _forgotten_ms(self) -> int:
        """Times before this one are forgotten."""
        return max(0, self._clock.now_ms() - self._history_ms)

    def _newest_ms(self, key: bytes, present: bytes | None) -> int | None:
        """The time of the newest version of a key."""
        if present is not None:
            return time_of_row(present)
        group = group_of_key(key)
        for entry, _kept in self._versions.scan(group, group + b"\xff" * (TIME_BYTES + 1), reverse=True):
            return decode_time(entry[len(group) :])
        return None

    def _keep(self, key: bytes, at_ms: int, kept: bytes, ends_ms: int) -> None:
        """Keep a version that has ended by `ends_ms`."""
        self._versions.put(_entry(key, at_ms), kept)
        self._due.put(encode_time(ends_ms) + key, b"")
        self._next_ms = min(self._next_ms, ends_ms)

    def _forget(self) -> None:
        """Remove some of the versions whose end is forgotten."""
        if self._undone != self._rows.undone:
            self._undone, self._next_ms = self._rows.undone, 0
        forgotten_ms = self._forgotten_ms()
        if self._next_ms > forgotten_ms:
            return
        due = self._due.scan(encode_time(self._next_ms), b"\xff" * TIME_BYTES)
        notes = [note for note, _nothing in islice(due, CLEANED_PER_RECORD_MAX)]
        for note in notes:
            self._next_ms = decode_time(note)
            if self._next_ms > forgotten_ms:
                return
            self._due.delete(note)
            self._remove(note[TIME_BYTES:], forgotten_ms)
        if len(notes) < CLEANED_PER_RECORD_MAX:
            self._next_ms = NEVER_MS

    def _remove(self, key: bytes, forgotten_ms: int) -> None:
        """Remove the versions of a key that nobody can ask for."""
        group = group_of_key(key)
        old = list(self._versions.scan(group, _entry(key, forgotten_ms) + b"\x00"))
        if not old:
            return
        present = self._rows.row(key)
        last_is_over = old[-1][1] == _DELETED or (
            present is not None and time_of_row(present) <= forgotten_ms
        )
        for entry, _kept in old if last_is_over else old[:-1]:
            self._versions.delete(entry)


def _entry(key: bytes, at_ms: int) -> bytes:
    return group_of_key(key) + encode_time(at_ms)
