"""Sliding: windows that slide along the records of a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.interval_notes import RESULT
from fcluster.engine.interval_sliding import OpenSlidingAtIntervals
from fcluster.engine.operators.base import Surroundings, compile_raw
from fcluster.engine.operators.window import (
    OfWindow,
    compile_fields,
    compile_late,
    compile_result,
    in_no_window,
)
from fcluster.engine.records import SourceRecord
from fcluster.engine.sliding import RAW, TIMESTAMP, Kept, OpenSliding
from fcluster.engine.steps import Step, StepFailure
from fcluster.engine.windows import CLOSE
from fcluster.graph.codecs import value_codec
from fcluster.graph.sliding import Sliding


class SlidingOperator(OfWindow):
    """Keeps each record until the windows around it have closed. `firing` calls the function that closes
    them.
    """

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, Sliding)
        windows = cast("OpenSliding", surroundings.timers[node.name])
        result_of = self._compile_result(surroundings, windows)
        updates = node.emit == "update"

        def closing(key: bytes, timestamp_ms: int) -> list[dict[str, Any]]:
            end_ms = timestamp_ms + 1
            records = windows.take_out(key, end_ms)
            return [] if updates or not records else [result_of(key, records, end_ms)]

        surroundings.fire[node.name, CLOSE] = (place, self.passing_on(surroundings, following, closing))
        noting = windows if isinstance(windows, OpenSlidingAtIntervals) else None
        if noting is not None:

            def noted(key: bytes, at_ms: int) -> list[dict[str, Any]]:
                return [result_of(key, own, end_ms) for end_ms, own in noting.take_noted(key, at_ms)]

            surroundings.fire[node.name, RESULT] = (place, self.passing_on(surroundings, following, noted))
        clock, add, is_late = windows.clock, windows.add, windows.is_late
        late = compile_late(node, place, surroundings, windows.port)
        raw_of = compile_raw(node.value, is_unchanged=node.is_unchanged)
        grace_ms, floor_ms = node.windows.grace_ms, windows.floor_ms
        inits, add_all = compile_fields(node)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            timestamp_ms = record.timestamp()[1]
            try:
                if key is None or timestamp_ms < 0:
                    raise in_no_window(key)
                now_ms = clock.now_ms
                closed_ms = floor_ms if now_ms is None else now_ms - grace_ms
                if closed_ms < floor_ms:
                    closed_ms = floor_ms
                if is_late(timestamp_ms, closed_ms):
                    late(record, key, value)
                    return
                raw = raw_of(record, value)
                # A value that an aggregate can't take fails now, and is in no window.
                add_all([init() for init in inits], value, timestamp_ms)
                if noting is not None:
                    noting.changing(key)
                records = add(key, timestamp_ms, closed_ms, raw)
                if records is None:
                    late(record, key, value)
                elif noting is not None:
                    noting.changed(key, timestamp_ms)
                elif updates:
                    for end_ms in windows.changed_by(records):
                        own = windows.records_of(records, end_ms)
                        following(record, key, result_of(key, own, end_ms))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _compile_result(
        self, surroundings: Surroundings, windows: OpenSliding
    ) -> Callable[[bytes, list[Kept], int], dict[str, Any]]:
        """The function that computes the result of a window from its records."""
        inits, add_all = compile_fields(self._node)
        result_of = compile_result(self._node, surroundings)
        decode = value_codec(self._node.value)[0]

        def result(key: bytes, records: list[Kept], end_ms: int) -> dict[str, Any]:
            kept = [init() for init in inits]
            for one in records:
                raw = one[RAW]
                add_all(kept, None if raw is None else decode(raw), one[TIMESTAMP])
            return result_of(key, windows.start_of(end_ms), end_ms, kept)

        return result
