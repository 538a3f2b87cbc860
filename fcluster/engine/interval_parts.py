"""The parts of windows of all records in one shard, if results are passed on at intervals.

Responsible for: `OpenPartsAtIntervals`. At an interval, a part is passed on with what it has gained since the
one before, and begins anew. Another step puts the parts together (`interval_gathered`). See `interval_notes`
for when. Pure.

    windows   end (8 bytes)    ->  what each aggregate has gained, and when it is passed on
    due       time (8 bytes)   ->  the windows whose parts are passed on then: the end of each, or [end, what
                                   each aggregate had gained] if records have come since it is due

A part that has gained nothing isn't there.

Invariants:
- A part has what its shard has read when event time comes to its time, from the very first record on: while
  event time isn't known, it is before all intervals. So the result of an interval lacks no shard's records.
"""

from __future__ import annotations

from typing import Any

from fcluster.engine.interval_windows import NOTED, OpenWindowsAtIntervals
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.windows import StepInShard


class OpenPartsAtIntervals(OpenWindowsAtIntervals):
    """See the module's docstring."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        self._inits = [aggregate.init for _name, aggregate in step.window.fields]

    def changing(self, key: bytes, end_ms: int, kept: list[Any]) -> None:
        """See `OpenWindowsAtIntervals`. A part that is due is kept apart, and begins anew."""
        parts = self._notes.get(key, kept[NOTED])
        parts[parts.index(end_ms)] = [end_ms, kept[:NOTED]]
        kept[:] = [*(init() for init in self._inits), 0]

    def changed(self, key: bytes, end_ms: int, kept: list[Any], timestamp_ms: int) -> None:  # noqa: ARG002
        """See `OpenWindowsAtIntervals`. While event time isn't known, the window's start counts."""
        super().changed(key, end_ms, kept, self._start_of(end_ms))

    def take_noted(self, key: bytes, at_ms: int) -> list[tuple[int, list[Any]]]:
        """See `OpenWindowsAtIntervals`. The parts begin anew."""
        found: list[tuple[int, list[Any]]] = []
        noted: Any
        for noted in self._notes.get(key, at_ms):
            if type(noted) is not int:
                found.append((noted[0], noted[1]))
                continue
            entry = encode_time(noted) + key
            found.append((noted, self.table.get(entry)))
            self.table.delete(entry)
        self._notes.delete(key, at_ms)
        return sorted(found, key=lambda one: one[0])
