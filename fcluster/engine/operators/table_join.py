"""Join with a table: each value meets the row that the table has for its key at this moment."""

from __future__ import annotations

from typing import Any

from fcluster.engine.entries import ABSENT
from fcluster.engine.operators.base import Surroundings, place_of_function
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import RecordError, Step, StepFailure
from fcluster.engine.views import compile_find
from fcluster.graph.operators import JoinTable, title_of_table


class JoinTableOperator:
    """Calls the function with each value and the row of its key, and passes on what it returns."""

    stores: tuple[str, ...] = ()
    """It only reads: there is nothing to undo."""
    keeps_value = False

    def __init__(self, node: JoinTable, number: int, chain: str) -> None:
        self._node = node
        what = f"join with {title_of_table(node.table)} by"
        self.place = place_of_function(what, node.function, number, chain, node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        find = compile_find(node.table, surroundings.tables, passing)
        function, keeps_all = node.function, node.how == "left"

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                if key is not None:
                    row = find(key, record.timestamp()[1])
                elif keeps_all:
                    row = ABSENT
                else:
                    raise RecordError(
                        "the record has no key, so no row belongs to it; give it one with key_by() first"
                    )
                if row is not ABSENT:
                    joined = function(value, row)
                elif keeps_all:
                    joined = function(value, None)
                else:
                    return
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            following(record, key, joined)

        return step
