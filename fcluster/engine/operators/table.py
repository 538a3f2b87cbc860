"""Table: keeps the newest value of each key, for the joins of the same stage.

See `engine.rows` for what is kept of a row, and for how others follow the changes.
"""

from __future__ import annotations

from typing import Any, cast

from fcluster.engine.operators.base import Surroundings, compile_raw
from fcluster.engine.records import SourceRecord
from fcluster.engine.rows import RowChange, RowTable, row_of
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.operators import KeepTable


class KeepTableOperator:
    """Puts each value into the table, and deletes the rows of tombstones."""

    keeps_value = True

    def __init__(self, node: KeepTable) -> None:
        self._node = node
        self.stores = (node.store.name,)
        self.place = Place(node.name, f"in the table {node.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table = cast("RowTable", surroundings.tables[node.store.name])
        put, delete, note, row_before = table.put, table.delete, table.note, table.row
        raw_of = compile_raw(node.value, is_unchanged=node.is_unchanged)
        none_deletes, is_followed = node.none_deletes, node.is_followed

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                if key is None:
                    raise RecordError("the record has no key, so it is no row of a table")
                raw = None if none_deletes and value is None else raw_of(record, value)
                at_ms = record.timestamp()[1]
                row = None if raw is None else row_of(at_ms, raw)
                if is_followed:
                    note(record, RowChange(key, row_before(key), row, at_ms))
                if row is None:
                    delete(key)
                else:
                    put(key, row)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            following(record, key, value)

        return step
