"""Join of two streams: each record meets the records of its key on the other side, within an interval."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.entries import ABSENT
from fcluster.engine.operators.base import Surroundings, TimerStep, compile_raw
from fcluster.engine.operators.window import compile_late
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.pairs import ALONE, OVER, OpenPairs
from fcluster.engine.records import LaterRecord, SourceRecord, TimerRecord
from fcluster.engine.steps import Place, RecordError, Step, StepFailure
from fcluster.graph.codecs import value_codec
from fcluster.graph.joins import Side
from fcluster.graph.operators import JoinStreams

_TIMESTAMP, _RAW, _HAS_PARTNER = range(3)
"""What is kept of a record."""


class JoinStreamsOperator:
    """One side of the join: finds partners on the other side, and keeps each record for those that follow."""

    keeps_value = False

    def __init__(self, node: JoinStreams) -> None:
        self._node = node
        self.stores = (node.name, *node.store.store_names)
        self.place = Place(node.name, f"in the join {node.name!r}", node.on_error)

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        side, other_side = node.side, _OTHER[node.side]
        pairs = cast("OpenPairs", surroundings.timers[node.name])
        combine = _compile_combine(node)
        for one in ("left", "right"):
            surroundings.fire[node.name, ALONE[one]] = self._compile_alone(
                surroundings, one, combine, following
            )
            surroundings.fire[node.name, OVER[one]] = self._compile_over(surroundings, one)
        clock, note, forget = pairs.clock, pairs.note, pairs.forget
        own, others = pairs.sides[side], pairs.sides[other_side]
        late = compile_late(node, place, surroundings, pairs.port)
        kind = node.left if side == "left" else node.right
        raw_of = compile_raw(kind, is_unchanged=node.is_unchanged)
        ahead_ms, behind_ms, grace_ms = node.reach_ms(side), node.reach_ms(other_side), node.grace_ms
        open_ms, others_open_ms = node.open_ms(side), node.open_ms(other_side)
        floor_ms = pairs.floor_ms
        stretch_ms = node.stretch_ms
        notes_own, notes_others = side in node.passes_on, other_side in node.passes_on
        alone, over, others_alone = ALONE[side], OVER[side], ALONE[other_side]

        def partners_of(key: bytes, timestamp_ms: int, closed_ms: int) -> list[list[Any]]:
            """The open records of the other side within the interval, in order."""
            first_ms, last_ms = timestamp_ms - behind_ms, timestamp_ms + ahead_ms
            found: list[list[Any]] = []
            end_ms = max(0, first_ms) // stretch_ms * stretch_ms + stretch_ms
            while end_ms - stretch_ms <= last_ms:
                stretch = others.get(encode_time(end_ms) + key)
                if stretch is not ABSENT:
                    for kept in stretch:
                        at_ms = kept[_TIMESTAMP]
                        if first_ms <= at_ms <= last_ms and at_ms + others_open_ms >= closed_ms:
                            found.append(kept)
                            if not kept[_HAS_PARTNER]:
                                kept[_HAS_PARTNER] = True
                                if notes_others and not _is_alone(stretch, at_ms):
                                    forget(key, at_ms, others_alone)
                end_ms += stretch_ms
            return found

        def keep(key: bytes, timestamp_ms: int, raw: bytes | None, has_partner: bool) -> None:
            end_ms = timestamp_ms // stretch_ms * stretch_ms + stretch_ms
            entry = encode_time(end_ms) + key
            found = own.get(entry)
            stretch: list[list[Any]] = [] if found is ABSENT else found
            if found is ABSENT:
                own.put(entry, stretch)
                note(key, end_ms - 1, over)
            if notes_own and not has_partner and not _is_alone(stretch, timestamp_ms):
                note(key, timestamp_ms, alone)
            at = bisect_right(stretch, timestamp_ms, key=_timestamp_of)
            stretch.insert(at, [timestamp_ms, raw, has_partner])

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            timestamp_ms = record.timestamp()[1]
            try:
                if key is None or timestamp_ms < 0:
                    raise _without_time_or_key(key)
                now_ms = clock.now_ms
                closed_ms = floor_ms if now_ms is None else now_ms - grace_ms
                if closed_ms < floor_ms:
                    closed_ms = floor_ms
                if timestamp_ms + open_ms < closed_ms:
                    late(record, key, value)
                    return
                raw = raw_of(record, value)
                partners = partners_of(key, timestamp_ms, closed_ms)
                keep(key, timestamp_ms, raw, bool(partners))
                for at_ms, other_raw, _has_partner in partners:
                    joined = combine(side, raw, other_raw)
                    later = LaterRecord(record, at_ms) if at_ms > timestamp_ms else record
                    following(later, key, joined)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _compile_alone(
        self, surroundings: Surroundings, side: Side, combine: _Combine, following: Step
    ) -> TimerStep:
        """What happens when records of a time have stayed without a partner for good."""
        node, place, passing = self._node, self.place, surroundings.passing
        pairs = cast("OpenPairs", surroundings.timers[node.name])
        table, stretch_ms, name = pairs.sides[side], node.stretch_ms, ALONE[side]

        def fire(timer_record: TimerRecord, key: bytes) -> None:  # `step_of` looks for `timer_record`
            try:
                timestamp_ms = timer_record.timestamp()[1]
                pairs.forget(key, timestamp_ms, name)
                stretch = table.get(encode_time(timestamp_ms // stretch_ms * stretch_ms + stretch_ms) + key)
                for at_ms, raw, has_partner in list(stretch):
                    if at_ms == timestamp_ms and not has_partner:
                        following(timer_record, key, combine(side, raw, ABSENT))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return place, fire

    def _compile_over(self, surroundings: Surroundings, side: Side) -> TimerStep:
        """What happens when all records of a stretch have closed."""
        pairs = cast("OpenPairs", surroundings.timers[self._node.name])
        table, name = pairs.sides[side], OVER[side]

        def fire(timer_record: TimerRecord, key: bytes) -> None:
            last_ms = timer_record.timestamp()[1]
            pairs.forget(key, last_ms, name)
            table.delete(encode_time(last_ms + 1) + key)

        return self.place, fire


_OTHER: dict[Side, Side] = {"left": "right", "right": "left"}
_Combine = Callable[[Side, Any, Any], Any]


def _compile_combine(node: JoinStreams) -> _Combine:
    """Calls the user's function with what is kept of a record of that side, and of its partner.

    Each pair gets values of its own, decoded anew: what the function does to them changes no other pair.
    """
    function = node.function
    decode_left, decode_right = value_codec(node.left)[0], value_codec(node.right)[0]

    def left(raw: Any) -> Any:
        return None if raw is None or raw is ABSENT else decode_left(raw)

    def right(raw: Any) -> Any:
        return None if raw is None or raw is ABSENT else decode_right(raw)

    def combine(side: Side, raw: Any, other_raw: Any) -> Any:
        if side == "left":
            return function(left(raw), right(other_raw))
        return function(left(other_raw), right(raw))

    return combine


def _is_alone(stretch: list[list[Any]], timestamp_ms: int) -> bool:
    """Whether a record of that time has no partner."""
    return any(kept[_TIMESTAMP] == timestamp_ms and not kept[_HAS_PARTNER] for kept in stretch)


def _timestamp_of(kept: list[Any]) -> int:
    return kept[_TIMESTAMP]


def _without_time_or_key(key: bytes | None) -> RecordError:
    if key is None:
        return RecordError("the record has no key, so it has no partner; give it one with key_by() first")
    return RecordError(
        "the record has no timestamp (behind a key_by, 0 is none): it has no partner; filter it out before"
    )
