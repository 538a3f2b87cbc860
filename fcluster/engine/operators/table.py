"""Table: keeps the newest value of each key, for the joins of the same stage.

See `engine.rows` for what is kept of a row, and for how others follow the changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.entries import Clock, EntryTable
from fcluster.engine.history import history_of
from fcluster.engine.loading import Loading
from fcluster.engine.operators.base import Surroundings, compile_raw
from fcluster.engine.records import SourceRecord
from fcluster.engine.rows import VALUE_AT, RowChange, RowTable, row_of, time_of_row
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.codecs import value_codec
from fcluster.graph.operators import KeepTable
from fcluster.graph.tables import TableStore


class KeepTableOperator:
    """Puts each value into the table, or what it is reduced to with the former row, and deletes the rows of
    tombstones.
    """

    keeps_value = True

    def __init__(self, node: KeepTable) -> None:
        self._node = node
        self.stores = tuple(store.name for store in node.stores)
        self.place = Place(node.name, f"in the table {node.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:  # noqa: ARG002  the chain ends here
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table = cast("RowTable", surroundings.tables[node.store.name])
        keep, note, row_before = _compile_keep(node, surroundings), table.note, table.row
        raw_of = compile_raw(node.value, is_unchanged=node.is_unchanged)
        none_deletes, is_followed = node.none_deletes, node.is_followed
        reduce, decode = node.reduce, value_codec(node.value)[0]
        needs_before = is_followed or reduce is not None
        loading = Loading(surroundings.tables[node.loading.name]) if node.copy_of else None
        advance = _compile_advance(node, surroundings)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                if key is None:
                    if loading is not None and loading.note(record):
                        return
                    raise RecordError("the record has no key, so it is no row of a table")
                if advance is not None:
                    advance()
                at_ms = record.timestamp()[1]
                before = row_before(key) if needs_before else None
                if reduce is not None and before is not None:
                    value = reduce(decode(before[VALUE_AT:]), value)
                    at_ms = max(at_ms, time_of_row(before))
                raw = None if none_deletes and value is None else raw_of(record, value)
                row = None if raw is None else row_of(at_ms, raw)
                if keep(key, row, at_ms) and is_followed:
                    note(record, RowChange(key, before, row, at_ms))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step


def _compile_advance(node: KeepTable, surroundings: Surroundings) -> Callable[[], None] | None:
    """Lets the clock by which rows expire follow event time. It is state, so that what has expired depends on
    nothing but what the table has read. None: rows don't expire.
    """
    if node.ttl_ms is None:
        return None
    clock = Clock(cast("EntryTable", surroundings.tables[TableStore(node.name, "clock").name]))
    event_ms = surroundings.event_ms

    def advance() -> None:
        now_ms = event_ms()
        if now_ms is not None:
            clock.advance(now_ms)

    return advance


def _compile_keep(node: KeepTable, surroundings: Surroundings) -> Callable[[bytes, bytes | None, int], bool]:
    """Keeps a row, or deletes it. Returns whether that changes the present row."""
    history = history_of(node, surroundings.tables)
    if history is not None:
        return history.put
    table = cast("RowTable", surroundings.tables[node.store.name])
    put, delete = table.put, table.delete

    def keep(key: bytes, row: bytes | None, _at_ms: int) -> bool:
        if row is None:
            delete(key)
        else:
            put(key, row)
        return True

    return keep
