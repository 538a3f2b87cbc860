"""Counted: windows that close with their last record, whatever the time is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.interval_counted import CountedAtIntervals
from fcluster.engine.interval_notes import RESULT
from fcluster.engine.operators.base import Surroundings
from fcluster.engine.operators.window import (
    OfWindow,
    ResultOf,
    apart,
    compile_fields,
    compile_result,
    in_no_window,
)
from fcluster.engine.records import SourceRecord
from fcluster.engine.steps import Step, StepFailure
from fcluster.graph.counted import Counted


class CountedOperator(OfWindow):
    """Adds each value to the open windows of its key, and passes on the result of one that is full.

        counted   key of the stream  ->  [records since a window began, [window, ...]], oldest window first
        window    [records, earliest timestamp, latest timestamp, what each aggregate keeps], and if results
                  are passed on at intervals, when one is noted

    Nothing is stored for a key whose windows have all closed, unless windows overlap.
    """

    def compile(self, surroundings: Surroundings, following: Step) -> Step:
        """See `CompiledOperator`."""
        node, place, passing = self._node, self.place, surroundings.passing
        assert isinstance(node.windows, Counted)
        table = cast("EntryTable", surroundings.tables[node.store.name])
        self.name_fields(table, lambda entry: [window[3] for window in entry[1]])
        size, every, updates = node.windows.size, node.windows.step, node.emit == "update"
        inits, add_all = compile_fields(node)
        result_of = compile_result(node, surroundings)
        noting: CountedAtIntervals | None = None
        if node.emit == "interval":
            noting = cast("CountedAtIntervals", surroundings.timers[node.name])
            results_at = _results_at(noting, result_of)
            surroundings.fire[node.name, RESULT] = (
                place,
                self.passing_on(surroundings, following, results_at),
            )
        further = () if noting is None else (0,)

        def step(record: SourceRecord, key: bytes | None, value: Any) -> None:
            timestamp_ms = record.timestamp()[1]
            try:
                if key is None or timestamp_ms < 0:
                    raise in_no_window(key)
                found = table.get(key)
                entry: list[Any] = [0, []] if found is ABSENT else found
                windows: list[list[Any]] = entry[1]
                if entry[0] == 0:
                    windows.append([0, timestamp_ms, timestamp_ms, [init() for init in inits], *further])
                entry[0] = (entry[0] + 1) % every
                for window in windows:
                    window[0] += 1
                    if timestamp_ms < window[1]:
                        window[1] = timestamp_ms
                    elif timestamp_ms > window[2]:
                        window[2] = timestamp_ms
                    add_all(window[3], value, timestamp_ms)
                if noting is not None:
                    noting.changed(key, windows, timestamp_ms)
                results = list(windows) if updates else []
                if windows[0][0] == size:
                    full = windows.pop(0)
                    if noting is not None:
                        noting.full(key, full, windows)
                    if not updates:
                        results.append(full)
                if not windows and entry[0] == 0:
                    if found is not ABSENT:
                        table.delete(key)
                elif found is ABSENT:
                    table.put(key, entry)
                for _records, start_ms, last_ms, kept, *_noted in results:
                    result = result_of(key, start_ms, last_ms + 1, kept)
                    following(record, key, apart(result) if updates else result)
            except passing:
                raise
            except BaseException as error:
                raise StepFailure(place, error) from error

        return step


def _results_at(
    windows: CountedAtIntervals, result_of: ResultOf
) -> Callable[[bytes, int], list[dict[str, Any]]]:
    def results_at(key: bytes, at_ms: int) -> list[dict[str, Any]]:
        return [
            apart(result_of(key, start_ms, last_ms + 1, kept))
            for _records, start_ms, last_ms, kept, _noted in windows.take_noted(key, at_ms)
        ]

    return results_at
