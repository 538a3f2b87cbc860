"""Changes: begins a chain with what a record has changed in a table.

There is such a chain for each kept table of which the table is computed. All these have been changed when the
first chain begins (see `builder`), so a record that changes several of them is told once, with all of it: by
the chain of the first one that it has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from fcluster.engine.operators.base import Surroundings
from fcluster.engine.records import RowRecord, SourceRecord
from fcluster.engine.rows import VALUE_AT, FollowedTable, RowChange
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
        all_kept, source = kept_in(node.table), node.source
        others_by = {
            kept.name: cast("FollowedTable", surroundings.tables[kept.store.name]).changes_by
            for kept in all_kept
        }
        changes_by = others_by.pop(source)
        names = [kept.name for kept in all_kept]
        earlier = frozenset(names[: names.index(source)])
        delta = compile_delta(node.table, surroundings.tables, passing, tells_all=node.tells_all)
        gives_values, keeps_bytes = node.gives == "values", node.keeps_bytes

        def step(record: SourceRecord, _key: bytes | None, _value: Any) -> None:
            others = {name: _by_key(found) for name, by in others_by.items() if (found := by(record))}
            for change in changes_by(record):
                changes = {name: rows[change.key] for name, rows in others.items() if change.key in rows}
                if not earlier.isdisjoint(changes):
                    continue  # told by the chain of that table
                for name in changes:
                    del others[name][change.key]  # once
                changes[source] = change
                try:
                    told = delta(change.key, changes)
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


def _by_key(changes: Sequence[RowChange]) -> dict[bytes, RowChange]:
    """What a record has made of each row, however often it has changed it."""
    found: dict[bytes, RowChange] = {}
    for change in changes:
        first = found.get(change.key)
        found[change.key] = change if first is None else change._replace(old=first.old)
    return found
