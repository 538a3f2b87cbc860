"""The grace of a step with windows, or of a join of streams, which may change between two runs of a job.

Responsible for: what had closed when a job with a longer grace was started. Its state is gone, and its
results are out. So it stays closed, although by the new grace it would be open for a while. Pure.

    grace   nothing   ->  [the grace, what had closed by event time when the grace changed; both in ms]

Invariants:
- What has closed in a shard stays closed, whatever the grace is then. Event time that a reset has let begin
  anew opens everything again, as it does with the same grace.
- The entry is written when a shard gets its owner, before its first record. So it is in the first epoch in
  which event time may move by the new grace, and a replay finds the same floor.
"""

from __future__ import annotations

from typing import Final

from fcluster.engine.entries import ABSENT, EntryTable

NEVER_MS: Final = -1
"""The floor if the grace has never changed. All ends are later."""
_ENTRY: Final = b""


def closed_floor(table: EntryTable, grace_ms: int, now_ms: int | None) -> int:
    """What has closed for good, however long the grace is now. Call it before the shard's first record: it
    writes the entry.

    Args:
        table: the shard's table of this step, as above.
        grace_ms: the present grace.
        now_ms: the shard's event time. None: it hasn't begun.

    Returns:
        In milliseconds since 1970: what had closed by then doesn't open again. `NEVER_MS`: nothing.
    """
    found = table.get(_ENTRY)
    former_ms, floor_ms = (grace_ms, NEVER_MS) if found is ABSENT else found
    if now_ms is None:
        floor_ms = NEVER_MS
    elif former_ms != grace_ms:
        floor_ms = max(floor_ms, now_ms - former_ms)
    if found != [grace_ms, floor_ms]:
        table.put(_ENTRY, [grace_ms, floor_ms])
    return floor_ms
