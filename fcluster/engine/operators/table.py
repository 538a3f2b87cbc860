"""Table: keeps the newest value of each key, for the joins of the same stage.

A row is kept as the bytes that were read. So filling a table encodes nothing, and whatever a join does to the
value that it gets changes no row.
"""

from __future__ import annotations

from typing import Any, cast

from fcluster.engine.entries import EntryTable
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.records import SourceRecord
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
        place, passing = self.place, surroundings.passing
        table = cast("EntryTable", surroundings.tables[self._node.store.name])
        put, delete = table.put, table.delete

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                if key is None:
                    raise RecordError("the record has no key, so it is no row of a table")
                raw = record.value()
                if raw is None:
                    delete(key)
                else:
                    put(key, raw)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            following(record, key, value)

        return step
