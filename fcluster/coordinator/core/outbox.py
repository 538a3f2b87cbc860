"""The outputs of the coordinator's core: the effects of the current event, and what waits for the journal.

Responsible for: the order of the effects, the one journal write of an event, and continuations that wait for
a journal write. Invariants:

- All entries of an event go into one write, which is the last of its effects. Writes are numbered without
  gaps.
- What waits for a write continues once, in order, when the journal holds that write or a later one (invariant
  15).

Must not: decide anything. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fcluster.common.ids import ShardId
from fcluster.coordinator.core import events
from fcluster.coordinator.core.events import Effect
from fcluster.coordinator.core.model import Slot
from fcluster.wire.messages import FromCoordinator

ENDING_KEY = "ending"
"""Journal key of the decision to end the job, while the job is ending."""
CHECK_KEY = "check"
"""Journal key that is written to find out whether the journal still accepts our writes."""

LOSS_PREFIXES = ("deaths/", "overdue/")
"""Journal keys of what is counted about records that end or hang workers begin with one of these."""

HeldKind = Literal["welcome", "fence", "epochs", "start", "drain", "end"]


def slot_key(slot: int) -> str:
    """Journal key of a slot and its session."""
    return f"slot/{slot}"


def assignment_key(shard: ShardId) -> str:
    """Journal key of a shard's slot."""
    return f"assignment/{shard.stage}/{shard.partition}"


def deaths_key(shard: ShardId) -> str:
    """Journal key of the sessions of a shard that were lost in a row."""
    return f"deaths/{shard.stage}/{shard.partition}"


def overdue_key(shard: ShardId) -> str:
    """Journal key of the record of a shard at which a handler has hung."""
    return f"overdue/{shard.stage}/{shard.partition}"


@dataclass(frozen=True, slots=True)
class Held:
    """What to do when the journal holds the write `sequence`.

    `number` is the session to welcome, the slot to fence, the end of the reserved epochs, or the job's start.
    The end of the job, and ends of a bounded run, need no number.
    """

    sequence: int
    kind: HeldKind
    number: int


class Outbox:
    """Collects the effects of an event. `begin` and `finish` enclose each event."""

    def __init__(self) -> None:
        self.written_sequence = 0
        """The last write that the journal is known to hold."""
        self._last_sequence = 0
        self._held: deque[Held] = deque()
        self._effects: list[Effect] = []
        self._entries: dict[str, Any] = {}

    def begin(self) -> None:
        """Start an event, without effects."""
        self._effects = []
        if self._entries:
            self._entries = {}

    def finish(self) -> list[Effect]:
        """The effects of the event, in order. The journal write comes last."""
        if self._entries:
            self._last_sequence += 1
            self._effects.append(events.WriteJournal(self._last_sequence, self._entries))
        return self._effects

    # --- effects --------------------------------------------------------------------------------------

    def add(self, effect: Effect) -> None:
        """Append an effect."""
        self._effects.append(effect)

    def send(self, peer: bytes, message: FromCoordinator) -> None:
        """Send a message over this connection."""
        self._effects.append(events.SendMessage(peer, message))

    def log(self, level: Literal["debug", "info", "warning", "error"], text: str) -> None:
        """Log a line."""
        self._effects.append(events.LogLine(level, text))

    # --- the journal ----------------------------------------------------------------------------------

    def journal(self, key: str, value: Any) -> int:
        """Add an entry to this event's write. Returns the write's sequence."""
        self._entries[key] = value
        return self._last_sequence + 1

    def journal_slot(self, slot: Slot) -> int:
        """Add a slot and its session to this event's write. Returns the write's sequence."""
        session = slot.session
        value = {
            "session": session.number if session else 0,
            "worker": session.worker if session else "",
            "host": session.host if session else "",
            "pid": session.pid if session else 0,
            "fenced": slot.fenced,
        }
        return self.journal(slot_key(slot.number), value)

    @property
    def owes_nothing(self) -> bool:
        """Whether the journal holds all writes of previous events."""
        return self.written_sequence == self._last_sequence

    @property
    def is_all_written(self) -> bool:
        """Whether the journal holds everything, including the writes of this event."""
        return not self._entries and self.written_sequence >= self._last_sequence

    def hold(self, kind: HeldKind, sequence: int, number: int) -> None:
        """Do this when the journal holds that write."""
        self._held.append(Held(sequence, kind, number))

    def written(self, sequence: int) -> Iterator[Held]:
        """The journal holds the write `sequence`. Yields what waited for it, in order."""
        self.written_sequence = max(self.written_sequence, sequence)
        while self._held and self._held[0].sequence <= sequence:
            yield self._held.popleft()
