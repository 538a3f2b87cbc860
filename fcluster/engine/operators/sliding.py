"""Sliding: windows that slide along the records of a key."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from fcluster.engine.framing import without_stale_ids
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
from fcluster.engine.records import Headers, KeptRecord, SourceRecord, TimerRecord
from fcluster.engine.sliding import RAW, TIMESTAMP, Kept, OpenSliding
from fcluster.engine.steps import Step, StepFailure
from fcluster.engine.windows import CLOSE
from fcluster.graph.codecs import value_codec
from fcluster.graph.sliding import Sliding

_ResultOf = Callable[[bytes, list[Kept], int], dict[str, Any]]
"""Returns the result of a window, given its key, its records and its end."""


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
        late = compile_late(node, place, surroundings, windows.port)
        closing = self._compile_closing(surroundings, windows, following, result_of, late)
        surroundings.fire[node.name, CLOSE] = (place, closing)
        noting = windows if isinstance(windows, OpenSlidingAtIntervals) else None
        if noting is not None:

            def noted(key: bytes, at_ms: int) -> list[dict[str, Any]]:
                return [result_of(key, own, end_ms) for end_ms, own in noting.take_noted(key, at_ms)]

            surroundings.fire[node.name, RESULT] = (place, self.passing_on(surroundings, following, noted))
        clock, add, is_late = windows.clock, windows.add, windows.is_late
        raw_of = compile_raw(node.value, is_unchanged=node.is_unchanged)
        grace_ms, floor_ms = node.windows.grace_ms, windows.floor_ms
        headers_of = _no_headers if node.late is None else _headers_of
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
                records = add(key, timestamp_ms, closed_ms, raw, partial(headers_of, record, key, raw))
                if records is None:
                    late(record, key, value)
                elif noting is not None:
                    noting.changed(key, timestamp_ms)
                elif node.emit == "update":
                    for end_ms in windows.changed_by(records):
                        own = windows.records_of(records, end_ms)
                        following(record, key, result_of(key, own, end_ms))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _compile_closing(
        self,
        surroundings: Surroundings,
        windows: OpenSliding,
        following: Step,
        result_of: _ResultOf,
        late: Step,
    ) -> Callable[[TimerRecord, bytes], None]:
        """The function that closes a window, and then tells one record after the other that is late since."""
        place, passing = self.place, surroundings.passing
        updates = self._node.emit == "update"
        decode = value_codec(self._node.value)[0]

        def closing(key: bytes, timestamp_ms: int) -> list[dict[str, Any]]:
            end_ms = timestamp_ms + 1
            records = windows.take_out(key, end_ms)
            return [] if updates or not records else [result_of(key, records, end_ms)]

        close = self.passing_on(surroundings, following, closing)

        def close_or_tell(
            timer_record: TimerRecord, key: bytes
        ) -> None:  # `step_of` looks for `timer_record`
            try:
                found = windows.take_late(key, timer_record.timestamp()[1] + 1)
                if found is not None:
                    at_ms, _came, raw, headers = found
                    kept = KeptRecord(timer_record, raw, at_ms, headers)
                    late(kept, key, None if raw is None else decode(raw))
                    return
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error
            close(timer_record, key)

        return close_or_tell

    def _compile_result(self, surroundings: Surroundings, windows: OpenSliding) -> _ResultOf:
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


def _headers_of(record: SourceRecord, key: bytes, raw: bytes | None) -> Headers:
    """What is kept of a record's headers, if `raw` is kept of its value."""
    return without_stale_ids(record.headers() or (), record, key, raw)


def _no_headers(_record: SourceRecord, _key: bytes, _raw: bytes | None) -> Headers:
    """Nothing is written of records that are late."""
    return ()
