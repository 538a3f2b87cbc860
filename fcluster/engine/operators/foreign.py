"""Joins of tables by a foreign key: three stages, with a repartition topic in front of the second one, and
two in front of the third.

    left rows --(subscriptions)--> right rows --(answers)--> result
        \\------------------------(rows)--------------------->/

Invariants:
- An answer counts only if it has the version of the left row's present foreign key. So an answer that comes
  late, from a row that the left row no longer refers to, changes nothing, and no row is left behind.
- A left row is read by the result in the order of its changes, and so are the answers for one version. Rows
  and answers may come in any order.
- Until a left row's new foreign key is answered, the result has the former row.
"""

from __future__ import annotations

from typing import Any, cast

from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.operators.base import Surroundings, present_field_of
from fcluster.engine.ordered_keys import end_of_prefix, group_of_key
from fcluster.engine.records import NO_TIMESTAMP_MS, SourceRecord
from fcluster.engine.rows import VALUE_AT, RowChange, RowTable, row_of, time_of_row
from fcluster.engine.showing import of_rows
from fcluster.engine.steps import Place, Step, StepFailure, where_of_function
from fcluster.engine.views import compile_lenient_lookup
from fcluster.graph.changes import Change
from fcluster.graph.codecs import Encode, Kind, encode_json_without_models, key_codec, value_codec
from fcluster.graph.foreign import (
    Answer,
    JoinedRow,
    LeftRow,
    Link,
    Subscription,
    Version,
    decode_answer,
    decode_link,
    decode_row,
    decode_version,
    encode_answer,
    encode_link,
    encode_row,
    encode_version,
)
from fcluster.graph.operators import AnswerAgain, ForeignTable, Subscribe, Subscribers
from fcluster.graph.record import Record

_ONE = b""
"""The key of the only entry of a store."""


class SubscribeOperator:
    """Remembers the foreign key of each left row. If it changes, the former right row gets to know that the
    left row no longer refers to it, and the new one that it does. Passes on each left row.
    """

    keeps_value = False

    def __init__(self, node: Subscribe) -> None:
        self._node = node
        self.stores = tuple(store.name for store in node.stores)
        where = where_of_function(node.by)
        self.place = Place(node.name, f"in the join {node.table!r}", node.on_error, where)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        links, count = (cast("EntryTable", surroundings.tables[store.name]) for store in node.stores)
        write = surroundings.record_writer(place, None)
        by = present_field_of(node.by, "join(on=)") if isinstance(node.by, str) else node.by
        (target_of,), show = of_rows(surroundings.source.key, by)
        decode_target, encode_target = key_codec(node.topic.key)
        encode, shard, is_inner = _encode_of(node.value), surroundings.partition, node.how == "inner"

        def next_version() -> Version:
            found = count.get(_ONE)
            number = 1 if found is ABSENT else found + 1
            count.put(_ONE, number)
            return shard, number

        def subscribe(record: SourceRecord, key: bytes, target: bytes, version: Version | None) -> None:
            message = Subscription(key, version)
            write(record, key, Record(topic=node.topic, key=decode_target(target), value=message))

        def step(record: SourceRecord, key: bytes | None, change: Change[Any]) -> None:
            assert key is not None, "rows have keys"
            try:
                found = links.get(key)
                before = None if found is ABSENT else decode_link(found)
                now, raw = None, None
                if change.new is not None:
                    if show is not None:
                        show(key)
                    foreign = target_of(change.new)
                    target = None if foreign is None else encode_target(foreign)
                    if target is not None or not is_inner:
                        raw = encode(change.new)
                        is_same = before is not None and before.target == target
                        now = before if is_same else Link(next_version(), target)
                if now is not None and now is not before:
                    links.put(key, encode_link(now))
                elif now is None and before is not None:
                    links.delete(key)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            if before is not None and before.target is not None and now is not before:
                subscribe(record, key, before.target, None)
            if now is not None and now.target is not None and now is not before:
                subscribe(record, key, now.target, now.version)
            known = now or before
            if known is not None:
                following(record, key, LeftRow(key, known.version, known.target is not None, raw))

        return step


class SubscribersOperator:
    """Remembers which left rows refer to a right row, and answers each of them with that row.

    subscribers   group of the right key | left key  ->  version
    """

    keeps_value = False

    def __init__(self, node: Subscribers) -> None:
        self._node = node
        self.stores = tuple(store.name for store in node.stores)
        self.place = Place(node.name, f"in the join {node.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        subscribers = cast("EntryTable", surroundings.tables[node.stores[0].name])
        look_up = compile_lenient_lookup(node.table, surroundings.tables, passing)
        encode = _encode_of(node.value)

        def step(record: SourceRecord, key: bytes | None, message: Subscription) -> None:
            assert key is not None, "subscriptions have keys"
            try:
                entry = group_of_key(key) + message.key
                if message.version is None:
                    subscribers.delete(entry)
                    return
                subscribers.put(entry, encode_version(message.version))
                row = look_up(key, None)
                raw, at_ms = (None, NO_TIMESTAMP_MS) if row is None else (encode(row.value), row.at_ms)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            following(record, key, Answer(message.key, message.version, raw, at_ms))

        return step


class AnswerAgainOperator:
    """Tells all left rows that refer to a right row what that is now."""

    stores: tuple[str, ...] = ()
    """It only reads: there is nothing to undo."""
    keeps_value = False

    def __init__(self, node: AnswerAgain) -> None:
        self._node = node
        title = f"{node.subscribers.name} (changes of the table)"
        self.place = Place(title, f"in the join {node.subscribers.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node.subscribers, self.place, surroundings.passing
        subscribers = cast("EntryTable", surroundings.tables[node.stores[0].name])
        encode = _encode_of(node.value)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            assert key is not None, "rows have keys"
            try:
                raw, at_ms = None if value is None else encode(value), record.timestamp()[1]
                group = group_of_key(key)
                found = [
                    Answer(entry[len(group) :], decode_version(version), raw, at_ms)
                    for entry, version in subscribers.scan(group, end_of_prefix(group))
                ]
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            for answer in found:
                following(record, key, answer)

        return step


class ForeignTableOperator:
    """Keeps each left row with the newest answer for its foreign key.

    table   left key                    ->  time | `JoinedRow`
    early   group of left key | version ->  the newest answer for a left row that is still to come
    seen    number of a left shard      ->  the greatest number of a version that has come from there
    """

    keeps_value = True

    def __init__(self, node: ForeignTable) -> None:
        self._node = node
        self.stores = tuple(store.name for store in node.stores)
        self.place = Place(node.name, f"in the table {node.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:  # noqa: ARG002  the chain ends here
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        table, early, seen = (surroundings.tables[store.name] for store in node.stores)
        rows, answers = cast("RowTable", table), _EarlyAnswers(cast("EntryTable", early))
        versions, how, is_followed = _SeenVersions(cast("EntryTable", seen)), node.how, node.is_followed

        def left_row(before: JoinedRow | None, message: LeftRow, raw: bytes, at_ms: int) -> JoinedRow:
            if before is not None and before.version == message.version:
                return before._replace(left=raw, left_ms=at_ms)
            if not message.refers:
                return JoinedRow(message.version, raw, at_ms, is_answered=True)
            answer = answers.take(message.key, message.version)
            if answer is not None:
                return JoinedRow(message.version, raw, at_ms, True, answer.raw, answer.at_ms)
            shown = None if before is None else before.shown(how)
            return JoinedRow(message.version, raw, at_ms, is_answered=False, before=shown)

        def answered(before: JoinedRow | None, answer: Answer) -> JoinedRow | None:
            if before is not None and before.version == answer.version:
                known = before._replace(is_answered=True, before=None)
                return known._replace(right=answer.raw, right_ms=answer.at_ms)
            if not versions.have(answer.version):
                answers.keep(answer)
            return None

        def step(record: SourceRecord, key: bytes | None, message: LeftRow | Answer) -> None:
            assert key is not None, "messages have keys"
            message = message._replace(key=key)
            try:
                found, at_ms = rows.row(key), record.timestamp()[1]
                before = None if found is None else decode_row(found[VALUE_AT:])
                if isinstance(message, Answer):
                    now = answered(before, message)
                    if now is None:
                        return
                else:
                    versions.add(message.version)
                    now = None if message.raw is None else left_row(before, message, message.raw, at_ms)
                row = None
                if now is not None:
                    if found is None or now.is_answered:
                        at_ms = max(now.left_ms, now.right_ms)
                    else:
                        at_ms = time_of_row(found)  # it still has the former row
                    row = row_of(at_ms, encode_row(now))
                    rows.put(key, row)
                elif before is not None:
                    rows.delete(key)
                if is_followed and (now is None or now.is_answered):
                    rows.note(record, RowChange(key, found, row, at_ms))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step


class _EarlyAnswers:
    """Answers whose left rows are still to come."""

    def __init__(self, table: EntryTable) -> None:
        self._table = table

    def keep(self, answer: Answer) -> None:
        """It is newer than one with the same version."""
        self._table.put(_entry(answer.key, answer.version), encode_answer(answer._replace(key=b"")))

    def take(self, key: bytes, version: Version) -> Answer | None:
        """The answer for that version, which isn't kept any longer."""
        entry = _entry(key, version)
        found = self._table.get(entry)
        if found is ABSENT:
            return None
        self._table.delete(entry)
        return decode_answer(found)


class _SeenVersions:
    """Which left rows have come. Those of a left shard come in the order of their versions."""

    def __init__(self, table: EntryTable) -> None:
        self._table = table

    def have(self, version: Version) -> bool:
        """Whether a left row of that version, or of a later one of its shard, has come."""
        shard, number = version
        found = self._table.get(_of_shard(shard))
        return found is not ABSENT and found >= number

    def add(self, version: Version) -> None:
        """A left row of that version has come."""
        if not self.have(version):
            shard, number = version
            self._table.put(_of_shard(shard), number)


def _entry(key: bytes, version: Version) -> bytes:
    return group_of_key(key) + encode_version(version)


def _of_shard(shard: int) -> bytes:
    return shard.to_bytes(4, "big")


def _encode_of(kind: Kind) -> Encode:
    return encode_json_without_models if kind == "json" else value_codec(kind)[1]
