"""Where the time goes when the shards of a dead worker wait for their next owner.

Responsible for: following each such shard from the end of its session to the moment when it runs again, for the log
and the status. Nothing depends on it. Pure; times are milliseconds on the coordinator's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

from fcluster.common.ids import ShardId

KEPT = 32
"""The last ones are shown in the status."""


@dataclass(slots=True)
class Takeover:
    """One worker's death, and what became of its shards.

    Attributes:
        since_ms: when its connection closed, or it was heard for the last time.
        noticed_ms: its session was ended.
        journalled_ms: that stood in the journal, and the fence began.
        fenced_ms: what it had open was aborted.
        assigned_ms: the last of its shards was given to another worker.
        running_ms: the last of them ran.
    """

    slot: int
    reason: str
    since_ms: float
    noticed_ms: float
    waiting: set[ShardId]
    shards: int
    journalled_ms: float = 0.0
    fenced_ms: float = 0.0
    assigned_ms: float = 0.0
    running_ms: float = 0.0

    def steps(self) -> dict[str, int]:
        """Milliseconds that each step took."""
        moments = (
            self.since_ms,
            self.noticed_ms,
            self.journalled_ms,
            self.fenced_ms,
            self.assigned_ms,
            self.running_ms,
        )
        names = ("noticed", "journalled", "fenced", "assigned", "restored")
        return {
            name: max(0, round(later - sooner))
            for name, (sooner, later) in zip(names, pairwise(moments), strict=True)
        }

    def describe(self) -> str:
        """A line for the log."""
        took = ", ".join(f"{name} {ms} ms" for name, ms in self.steps().items())
        total_ms = round(self.running_ms - self.since_ms)
        return f"the {self.shards} shards of slot {self.slot} run again after {total_ms} ms: {took}"


@dataclass(slots=True)
class Takeovers:
    """All that are under way, by slot, and the last ones that are over."""

    under_way: dict[int, Takeover] = field(default_factory=dict[int, Takeover])
    over: deque[Takeover] = field(default_factory=lambda: deque[Takeover](maxlen=KEPT))

    def begin(
        self, slot: int, shards: Collection[ShardId], reason: str, since_ms: float, now_ms: float
    ) -> None:
        """The session of the slot, which had these shards, is over."""
        if shards:
            self.under_way[slot] = Takeover(slot, reason, since_ms, now_ms, set(shards), len(shards))

    def journalled(self, slot: int, now_ms: float) -> None:
        """The end of the slot's session stands in the journal."""
        if slot in self.under_way:
            self.under_way[slot].journalled_ms = now_ms

    def fenced(self, slot: int, now_ms: float) -> None:
        """The slot is fenced."""
        if slot in self.under_way:
            self.under_way[slot].fenced_ms = now_ms

    def assigned(self, shard: ShardId, now_ms: float) -> None:
        """The shard was given to a worker."""
        for takeover in self.under_way.values():
            if shard in takeover.waiting:
                takeover.assigned_ms = now_ms

    def runs(self, shard: ShardId, now_ms: float) -> Takeover | None:
        """The shard runs; the take-over that ended with it, if one did."""
        for slot, takeover in self.under_way.items():
            if shard in takeover.waiting:
                takeover.waiting.discard(shard)
                takeover.running_ms = now_ms
                if takeover.waiting:
                    return None
                del self.under_way[slot]
                self.over.append(takeover)
                return takeover
        return None
