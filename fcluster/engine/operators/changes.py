"""Changes: begins a chain with what a record has changed in a table."""

from __future__ import annotations

from typing import Any, cast

from fcluster.engine.operators.base import Surroundings
from fcluster.engine.records import RowRecord, SourceRecord
from fcluster.engine.rows import VALUE_AT, FollowedTable
from fcluster.engine.steps import Place, Step, StepFailure
from fcluster.engine.views import compile_delta
from fcluster.graph.changes import Change
from fcluster.graph.operators import TellChanges, kept_in, step_kind, title_of_table


class TellChangesOperator:
    """Passes on the changes of a table that follow from what the record has changed in a kept one. The chain
    that keeps it comes first for each record.
    """

    stores: tuple[str, ...] = ()
    """It only reads: there is nothing to undo."""

    def __init__(self, node: TellChanges) -> None:
        self._node = node
        self.keeps_value = node.keeps_bytes
        title = f"{step_kind(node)}() of the table {title_of_table(node.table)}"
        self.place = Place(title, f"in {title}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        (source,) = (kept for kept in kept_in(node.table) if kept.name == node.source)
        changes_by = cast("FollowedTable", surroundings.tables[source.store.name]).changes_by
        delta = compile_delta(node.table, node.source, surroundings.tables, passing, tells_all=node.tells_all)
        assert delta is not None, "a chain follows what its table is computed of"
        gives_values, keeps_bytes = node.gives == "values", node.keeps_bytes

        def step(record: SourceRecord, _key: bytes | None, _value: Any) -> None:
            for change in changes_by(record):
                try:
                    told = delta(change)
                except passing:
                    raise
                except BaseException as error:  # a row that can't be decoded
                    raise StepFailure(place, error) from error
                if told is None:
                    continue
                raw = None if told.new is None else change.new[VALUE_AT:] if keeps_bytes else b""
                told_record = RowRecord(record, raw, told.at_ms)
                value = told.new if gives_values else Change(told.old, told.new)
                following(told_record, change.key, value)

        return step
