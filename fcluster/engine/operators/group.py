"""Groups: the first half tells a row's group what it loses and gains, the second one computes the group. A
third one computes the same kind of rows of a stream's records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.operators.base import Surroundings, present_field_of
from fcluster.engine.operators.window import compile_fields, of_own_values
from fcluster.engine.records import SourceRecord
from fcluster.engine.rows import AGGREGATES, AT_MS, MEMBERS, FollowedTable, RowChange, compile_group_value
from fcluster.engine.showing import of_rows
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.engine.values import describing_fields
from fcluster.graph.changes import Change
from fcluster.graph.codecs import encode_json_without_models, key_codec, value_codec
from fcluster.graph.groups import Halves, contribution, parts_of_contribution
from fcluster.graph.operators import GroupTable, Regroup


class RegroupOperator:
    """Remembers what each row of a table contributes to which group, and passes on what groups lose and gain.

    A group loses exactly what it has gained before, whatever has become of the functions since then. What is
    lost comes first.
    """

    keeps_value = False

    def __init__(self, node: Regroup) -> None:
        self._node = node
        self.stores = tuple(store.name for store in node.stores)
        self.place = Place(node.name, f"in group_by() for the table {node.table!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table = cast("EntryTable", surroundings.tables[node.store.name])
        get, put, put_at, delete = table.get, table.put, table.put_at, table.delete
        expires = node.ttl_ms is not None
        by = present_field_of(node.by, "group_by") if isinstance(node.by, str) else node.by
        functions = (by,) if node.function is None else (by, node.function)
        (group_of, *others), show = of_rows(surroundings.source.key, *functions)
        contributed_by, encode_group = next(iter(others), None), key_codec(node.key)[1]
        encode = encode_json_without_models if node.value == "json" else value_codec(node.value)[1]

        def contribution_of(value: Any) -> tuple[bytes, bytes] | None:
            group = None if value is None else group_of(value)
            if group is None:
                return None
            contributed = value if contributed_by is None else contributed_by(value)
            if contributed is None:
                return None
            parts = encode_group(group), encode(contributed)
            if node.on_error != "stop":
                # Behind the repartition, it couldn't be skipped: what it replaces would never be taken away.
                for _name, aggregate in node.fields:
                    aggregate.add(aggregate.init(), contributed)
            return parts

        def step(record: SourceRecord, key: bytes | None, change: Change[Any]) -> None:
            assert key is not None, "rows have keys"
            try:
                kept = get(key)
                before = None if kept is ABSENT else parts_of_contribution(kept)
                if show is not None:
                    show(key)
                now = contribution_of(change.new)
                if now is not None:
                    if expires:
                        put_at(key, contribution(*now), record.timestamp()[1])
                    else:
                        put(key, contribution(*now))
                elif before is not None:
                    delete(key)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            if before is not None and now is not None and before[0] == now[0]:
                following(record, key, Halves(now[0], before[1], now[1]))
                return
            if before is not None:
                following(record, key, Halves(before[0], before[1], None))
            if now is not None:
                following(record, key, Halves(now[0], None, now[1]))

        return step


class _OfAggregates:
    """What both tables of aggregates have in common."""

    keeps_value = True

    def __init__(self, node: GroupTable) -> None:
        self._node = node
        self.stores = (node.store.name,)
        self.place = Place(node.name, f"in the table {node.name!r}", node.on_error)

    def _table(self, surroundings: Surroundings, owner: str) -> FollowedTable:
        """The table. Messages about what can't be stored name the field, of this owner."""
        node = self._node
        table = cast("FollowedTable", surroundings.tables[node.store.name])
        names = [name for name, _aggregate in node.fields]
        table.describe_unkept = describing_fields(
            f"{owner} {node.name!r}", names, lambda kept: [kept[AGGREGATES]]
        )
        return table


class GroupTableOperator(_OfAggregates):
    """Computes the aggregates of each group: takes away what it loses, then adds what it gains."""

    def compile(self, surroundings: Surroundings, following: Step) -> Step:  # noqa: ARG002  the chain ends here
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table = self._table(surroundings, "the groups")
        get, put, delete, note = table.get, table.put, table.delete, table.note
        value_of, is_followed, drops_empty = compile_group_value(node), node.is_followed, node.drops_empty
        inits = tuple(aggregate.init for _name, aggregate in node.fields)
        add_all = _compile_each(node, "add")
        subtract_all = _compile_each(node, "subtract")

        def step(record: SourceRecord, key: bytes | None, change: Change[Any]) -> None:
            try:
                if key is None:
                    raise RecordError("the record has no key, so it is of no group")
                found = get(key)
                kept: list[Any] = found
                old = None
                if found is ABSENT:
                    kept = [record.timestamp()[1], 0, [init() for init in inits]]
                    put(key, kept)
                else:
                    old = value_of(kept) if is_followed else None
                    kept[AT_MS] = max(kept[AT_MS], record.timestamp()[1])
                if change.old is not None:
                    subtract_all(kept[AGGREGATES], change.old)
                    kept[MEMBERS] -= 1
                if change.new is not None:
                    add_all(kept[AGGREGATES], change.new)
                    kept[MEMBERS] += 1
                is_over = drops_empty and kept[MEMBERS] == 0
                if is_over:
                    delete(key)
                if is_followed:
                    new = None if is_over else value_of(kept)
                    note(record, RowChange(key, old, new, kept[AT_MS]))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step


class RunningTableOperator(_OfAggregates):
    """Adds each value to the aggregates of its record's key."""

    def compile(self, surroundings: Surroundings, following: Step) -> Step:  # noqa: ARG002  the chain ends here
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table = self._table(surroundings, "the table")
        get, put, note = table.get, table.put, table.note
        value_of, is_followed = compile_group_value(node), node.is_followed
        inits, add_all = compile_fields(node)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            try:
                if key is None:
                    raise RecordError(
                        "the record has no key, so it belongs to no row; give it one with key_by() first"
                    )
                at_ms = record.timestamp()[1]
                found = get(key)
                kept: list[Any] = found
                old = None
                if found is ABSENT:
                    kept = [at_ms, 0, [init() for init in inits]]
                    put(key, kept)
                else:
                    old = value_of(kept) if is_followed else None
                    kept[AT_MS] = max(kept[AT_MS], at_ms)
                add_all(kept[AGGREGATES], value, at_ms)
                kept[MEMBERS] += 1
                new = value_of(kept)  # also if nobody follows: a result that can't be computed is found here
                if is_followed:
                    note(record, RowChange(key, old, new, kept[AT_MS]))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step


def _compile_each(node: GroupTable, what: str) -> Callable[[list[Any], Any], None]:
    """Applies a function of each aggregate to what is kept of it, and a value."""
    functions = tuple(of_own_values(aggregate, getattr(aggregate, what)) for _name, aggregate in node.fields)

    def each(kept: list[Any], value: Any) -> None:
        for at, function in enumerate(functions):
            kept[at] = function(kept[at], value)

    return each
