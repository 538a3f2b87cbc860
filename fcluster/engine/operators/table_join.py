"""Join with a table: each value meets the row that the table has for its key at this moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fcluster.engine.entries import ABSENT
from fcluster.engine.operators.base import Surroundings, place_of_function, present_field_of
from fcluster.engine.records import SourceRecord
from fcluster.engine.showing import of_values
from fcluster.engine.steps import Place, RecordError, Step, StepFailure, where_of_function
from fcluster.engine.views import compile_find, excusing
from fcluster.graph.codecs import key_codec
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
        if keeps_all:  # a row that is skipped is no row, since all records are passed on
            find = excusing(find, node.table, lambda rule: rule == "skip", ABSENT)
        if node.by is not None:
            by = present_field_of(node.by, "join(on=)") if isinstance(node.by, str) else node.by
            (row_key_of,), showing = of_values(surroundings.source, surroundings.partition, by)
            return showing(_compile_join_on(node, place, passing, row_key_of, find, following))

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


def _compile_join_on(
    node: JoinTable,
    place: Place,
    passing: tuple[type[BaseException], ...],
    row_key_of: Callable[[Any], Any],
    find: Callable[[bytes, int | None], Any],
    following: Step,
) -> Step:
    """With a global table, where the value says which row belongs to it."""
    function, keeps_all = node.function, node.how == "left"
    encode_key, key_place = key_codec(node.key)[1], replace(place, where=where_of_function(node.by))

    def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
        try:
            row_key = row_key_of(value)
            encoded = None if row_key is None else encode_key(row_key)
        except BaseException as error:
            raise StepFailure(key_place, error) from error
        try:
            row = ABSENT if encoded is None else find(encoded, record.timestamp()[1])
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
