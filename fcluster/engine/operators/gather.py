"""Gather: puts the parts of windows of all records together, and passes on their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.entries import ABSENT
from fcluster.engine.interval_gathered import OpenGatheredAtIntervals
from fcluster.engine.interval_notes import RESULT
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.operators.window import (
    NO_KEY,
    OfWindow,
    apart,
    compile_fields,
    compile_late,
    compile_result,
)
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import Step, StepFailure
from fcluster.engine.windows import CLOSE, OpenWindows
from fcluster.graph.windows import Gathered


class GatherOperator(OfWindow):
    """Adds each part to its window: a result of `WindowOperator` whose window is a part. `firing` calls the
    function that closes windows.
    """

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, Gathered)
        windows = cast("OpenWindows", surroundings.timers[node.name])
        holding = windows if isinstance(windows, OpenGatheredAtIntervals) else None
        if holding is not None:
            noted = self._noted(surroundings, holding)
            surroundings.fire[node.name, RESULT] = (place, self.passing_on(surroundings, following, noted))
        closing = self._closing(surroundings, windows)
        surroundings.fire[node.name, CLOSE] = (place, self.passing_on(surroundings, following, closing))
        clock, get, put, opened = windows.clock, windows.table.get, windows.table.put, windows.opened
        self.name_fields(windows.table, lambda kept: [kept] if holding is None else [kept[0]])
        late = compile_late(node, place, surroundings, windows.port)
        start_of, updates = node.windows.start_of(), node.emit == "update"
        inits, add_all = compile_fields(node)
        result_of = compile_result(node, surroundings)

        def step(record: SourceRecord, key: bytes | None, part: Any) -> None:
            try:
                end_ms, timestamp_ms = part["end"], record.timestamp()[1]
                now_ms = clock.now_ms
                if now_ms is not None and end_ms <= now_ms:  # its shard was left out as idle
                    late(record, key, part)
                    return
                entry = encode_time(end_ms) + NO_KEY
                kept = get(entry)
                if kept is ABSENT:
                    kept = [init() for init in inits]
                    if holding is not None:
                        kept = [kept, []]
                    put(entry, kept)
                    opened(NO_KEY, end_ms)
                if holding is not None:
                    holding.hold(end_ms, kept, part, timestamp_ms)
                    return
                add_all(kept, part, timestamp_ms)
                if updates:
                    following(record, None, apart(result_of(NO_KEY, start_of(end_ms), end_ms, kept)))
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step

    def _noted(
        self, surroundings: Surroundings, windows: OpenGatheredAtIntervals
    ) -> Callable[[bytes, int], list[dict[str, Any]]]:
        """What is passed on at an interval."""
        node = self._node
        assert isinstance(node.windows, Gathered)
        start_of, result_of = node.windows.start_of(), compile_result(node, surroundings)
        _inits, add_all = compile_fields(node)

        def results_at(key: bytes, at_ms: int) -> list[dict[str, Any]]:
            results: list[dict[str, Any]] = []
            for end_ms, together, parts in windows.take_noted(at_ms):
                for part in parts:
                    add_all(together, part, at_ms)
                results.append(apart(result_of(key, start_of(end_ms), end_ms, together)))
            return results

        return results_at

    def _closing(
        self, surroundings: Surroundings, windows: OpenWindows
    ) -> Callable[[bytes, int], list[dict[str, Any]]]:
        """What is passed on when a window closes."""
        node = self._node
        assert isinstance(node.windows, Gathered)
        table, updates = windows.table, node.emit == "update"
        start_of, result_of = node.windows.start_of(), compile_result(node, surroundings)
        _inits, add_all = compile_fields(node)

        def results_at(key: bytes, timestamp_ms: int) -> list[dict[str, Any]]:
            end_ms = timestamp_ms + 1
            if isinstance(windows, OpenGatheredAtIntervals):
                kept, parts = windows.take_out(end_ms)
                for part in parts:
                    add_all(kept, part, timestamp_ms)
            else:
                entry = encode_time(end_ms) + key
                kept = table.get(entry)
                table.delete(entry)
            return [] if updates else [result_of(key, start_of(end_ms), end_ms, kept)]

        return results_at
