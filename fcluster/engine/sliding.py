"""The records of one step's sliding windows in one shard: which windows are due, and what is in them.

Responsible for: `OpenSliding`, which uses the tables that `kinds.make_window_tables` makes. For `firing` it
is the same as `windows.OpenWindows`. The operator (`operators.sliding`) adds records and closes windows.
Pure.

    sliding   key of the stream                   ->  [closed, noted, [record, ...]], as they were processed
    due       end (8 bytes) | key of the stream   ->  nothing
    record    [timestamp, what had closed when it came, value as bytes]
              [..., headers]   while it is in no result: the window that ends with it had closed when it came

A window of length `within` is identified by its end, which isn't in it. A record defines two: one whose last
millisecond is that of the record, and one that begins a millisecond after it. The first of a key's windows
may be cut off by the beginning of 1970.

Invariants:
- A record is in a window, and defines it, only if the window hadn't closed by event time when the record
  came. So contents don't depend on when a window that is due is closed.
- Windows of a key close in the order of their ends. `closed` is the end of the last one, `noted` that of the
  next one, for which there is a note in `due`. Other notes of the key are outdated.
- A record is removed when the last window that it defines closes, which is after the last one that it is in.
- A record is in the result of a window, or it is late, once. The window that ends with a record has it. If
  that had closed, another window may still come to have it, up to when the record is removed: it is late
  then. Event time alone decides that, as it decides which windows there are. Those that are late are told one
  by one, each by a timer that fires behind that of the window, with the same time: one that fails takes no
  other with it.
- Records of versions that didn't keep headers are removed without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from fcluster.engine.entries import ABSENT
from fcluster.engine.ordered_keys import encode_time
from fcluster.engine.records import Headers
from fcluster.engine.timers import Timer
from fcluster.engine.windows import OpenByKey, StepInShard, window_title
from fcluster.graph.sliding import Sliding

TIMESTAMP, CAME, RAW, HEADERS = range(4)
"""What is kept of a record. Headers only as long as it may be late."""
_CLOSED, _NOTED, RECORDS = range(3)
"""What is kept of a key."""
_NEVER: Final = -1
Kept = list[Any]


class OpenSliding(OpenByKey):
    """The records of sliding windows. `table` has them by key."""

    def __init__(self, step: StepInShard) -> None:
        super().__init__(step)
        windows = step.window.windows
        assert isinstance(windows, Sliding)
        self._within_ms = windows.within_ms

    def start_of(self, end_ms: int) -> int:
        """When the window with that end begins."""
        return end_ms - 1 - self._within_ms

    def is_late(self, timestamp_ms: int, closed_ms: int) -> bool:
        """Whether all windows have closed that a record of that time can be in."""
        return timestamp_ms + self._within_ms < closed_ms

    def add(
        self,
        key: bytes,
        timestamp_ms: int,
        closed_ms: int,
        raw: bytes | None,
        headers_of: Callable[[], Headers],
    ) -> list[Kept] | None:
        """Keep a record that isn't late, as far as is known.

        Args:
            closed_ms: windows that end then or before have closed.
            headers_of: returns what is kept of its headers. It is only asked if the record may turn out to be
                late.

        Returns:
            All records of the key that are kept. None: it is late after all, because the grace used to be
            shorter, and the state is of a version that didn't remember that.
        """
        found = self.table.get(key)
        entry: list[Any] = self._new_entry() if found is ABSENT else found
        closed_ms = max(closed_ms, entry[_CLOSED])
        if self.is_late(timestamp_ms, closed_ms):
            return None
        record: Kept = [timestamp_ms, closed_ms, raw]
        end_ms, behind_ms = self._defined_by(record)
        if end_ms <= closed_ms:
            end_ms = behind_ms
            record.append(headers_of())
        entry[RECORDS].append(record)
        if found is ABSENT:
            self.table.put(key, entry)
        if found is ABSENT or end_ms < entry[_NOTED]:
            self._note_next(key, entry, end_ms)
        return entry[RECORDS]

    def take_out(self, key: bytes, end_ms: int) -> list[Kept]:
        """Close the window of the key with that end. Returns its records; none if there is no such window.
        Those that are late now are left to `take_late`.
        """
        entry = self.table.get(key)
        records = self.records_of(entry[RECORDS], end_ms)
        for one in records:
            del one[HEADERS:]
        entry[_CLOSED] = end_ms
        entry[RECORDS] = [one for one in entry[RECORDS] if self._last_of(one) > end_ms or len(one) > HEADERS]
        self._go_on(key, entry, end_ms)
        return records

    def take_late(self, key: bytes, end_ms: int) -> Kept | None:
        """The next record of the key that is late since the window with that end has closed. None: there is
        no such record, or the window hasn't closed.
        """
        entry = self.table.get(key)
        late = self._late_of(entry, end_ms)
        if late is not None:
            entry[RECORDS].remove(late)
            self._go_on(key, entry, end_ms)
        return late

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`."""
        if self.take_late(timer.key, self._end_ms_of(timer)) is None:
            super().skipped(timer)

    def records_of(self, records: list[Kept], end_ms: int) -> list[Kept]:
        """Those that are in the window with that end, in the order in which they were processed. None if
        no record defines it.
        """
        start_ms = self.start_of(end_ms)
        if not any(end_ms in self._defined_by(one) and one[CAME] < end_ms for one in records):
            return []
        return [one for one in records if start_ms <= one[TIMESTAMP] < end_ms and one[CAME] < end_ms]

    def changed_by(self, records: list[Kept]) -> list[int]:
        """The ends of the open windows that the last of these records has changed or defined, in order."""
        *others, last = records
        at_ms, closed_ms = last[TIMESTAMP], last[CAME]
        ends = {end for one in records for end in self._defined_by(one) if end > max(one[CAME], closed_ms)}
        known = {end for one in others for end in self._defined_by(one) if one[CAME] < end}
        return sorted(
            end
            for end in ends
            if self.start_of(end) <= at_ms < end or (end not in known and self.records_of(records, end))
        )

    def _new_entry(self) -> list[Any]:
        return [_NEVER, _NEVER, []]

    def _late_of(self, entry: list[Any], end_ms: int) -> Kept | None:
        if entry[_CLOSED] < end_ms:
            return None
        return next((one for one in entry[RECORDS] if self._last_of(one) <= end_ms), None)

    def _go_on(self, key: bytes, entry: list[Any], end_ms: int) -> None:
        """A window of the key has closed. If records are late since, its timer fires again."""
        if self._late_of(entry, end_ms) is not None:
            return
        self._due.delete(encode_time(end_ms) + key)
        if entry[RECORDS]:
            self._note_next(key, entry, self._next_of(entry[RECORDS], end_ms))
        else:
            self.table.delete(key)

    def _defined_by(self, record: Kept) -> tuple[int, int]:
        """The ends of the windows that a record defines."""
        at_ms, within_ms = record[TIMESTAMP], self._within_ms
        return max(at_ms, within_ms) + 1, at_ms + within_ms + 2

    def _last_of(self, record: Kept) -> int:
        return record[TIMESTAMP] + self._within_ms + 2

    def _next_of(self, records: list[Kept], closed_ms: int) -> int:
        return min(self._pending(records, closed_ms))

    def _pending(self, records: list[Kept], closed_ms: int) -> Iterator[int]:
        for one in records:
            for end_ms in self._defined_by(one):
                if end_ms > closed_ms and end_ms > one[CAME]:
                    yield end_ms

    def _note_next(self, key: bytes, entry: list[Any], end_ms: int) -> None:
        entry[_NOTED] = end_ms
        self.note(key, end_ms)

    # --- for `firing` ---------------------------------------------------------------------------------

    def _is_exact(self, timer: Timer) -> bool:
        """Whether the window with that end is the next one of its key. If not, the note is outdated."""
        entry = self.table.get(timer.key)
        if entry is not ABSENT and entry[_NOTED] == self._end_ms_of(timer):
            return True
        self._due.delete(self._entry_of(timer))
        return False

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        end_ms = self._end_ms_of(timer)
        return window_title(self.step, self.start_of(end_ms), end_ms, timer.key)
