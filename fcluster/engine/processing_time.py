"""The processing time of a step with windows: the clock of the worker's host, which never goes back for it.

Responsible for: `ProcessingTime`, over the table that `kinds.make_window_tables` makes for windows with
`clock="processing"`. For what is open in the step, it takes the place of the shard's event time. Pure.

    clock   (empty)   ->  the time of the window that closed last

Invariants:
- No record gets a time that a closed window of the step contains, also after a restart, on a worker whose
  clock is behind, or if the clock of the host is set back. So a window that has closed never opens again,
  and no record is late.
- That time is committed in the epoch in which the window closes (invariant 6). What an aborted epoch has
  closed is open again, and its records may come into other windows: only what is committed counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fcluster.engine.entries import ABSENT, EntryTable

_CLOSED: Final = b""
"""Where the time of the window that closed last is kept."""


class ProcessingTime:
    """See the module's docstring.

    Args:
        table: has the time of the window that closed last.
        wall_ms: returns the time of the host's clock, in milliseconds since 1970.

    Attributes:
        now_ms: the time that was read last, or at which something closed. -1 before. Never decreases.
    """

    __slots__ = ("_table", "_wall_ms", "now_ms")

    def __init__(self, table: EntryTable, wall_ms: Callable[[], int]) -> None:
        self._table = table
        self._wall_ms = wall_ms
        self.now_ms = self._closed_ms

    def read(self) -> int:
        """The processing time of what happens now."""
        now_ms = self._wall_ms()
        if now_ms > self.now_ms:
            self.now_ms = now_ms
        return self.now_ms

    def closing(self, at_ms: int) -> None:
        """What was due at that time closes. If that is undone, `now_ms` stays."""
        if at_ms > self._closed_ms:
            self._table.put(_CLOSED, at_ms)
        self.now_ms = max(self.now_ms, at_ms)

    @property
    def _closed_ms(self) -> int:
        found: Any = self._table.get(_CLOSED)
        return -1 if found is ABSENT else found
