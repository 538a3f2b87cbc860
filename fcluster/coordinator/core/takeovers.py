"""How long each step takes when shards change owners: those of a dead worker, and those that move.

Responsible for: following each such shard from the end of its session, or from the request to release it,
until it runs again. This is for the log and the status; nothing depends on it. Pure. Times are milliseconds
on the coordinator's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fcluster.common.ids import ShardId

KEPT = 32
"""How many of the newest ones the status shows."""


def _steps(names: Sequence[str], moments: Sequence[float]) -> dict[str, int]:
    return {
        name: max(0, round(later - sooner))
        for name, (sooner, later) in zip(names, pairwise(moments), strict=True)
    }


def _took(steps: dict[str, int]) -> str:
    return ", ".join(f"{name} {ms} ms" for name, ms in steps.items())


@dataclass(slots=True)
class Takeover:
    """One worker's death and the takeover of its shards.

    Attributes:
        since_ms: when its connection closed, or when it last sent a message.
        noticed_ms: when its session was ended.
        journalled_ms: when that was in the journal, and the fence began.
        fenced_ms: when its open transactions were aborted.
        assigned_ms: when the last of its shards was assigned to another worker.
        running_ms: when the last of them ran.
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
        """The duration of each step in milliseconds."""
        moments = (
            self.since_ms,
            self.noticed_ms,
            self.journalled_ms,
            self.fenced_ms,
            self.assigned_ms,
            self.running_ms,
        )
        return _steps(("noticed", "journalled", "fenced", "assigned", "restored"), moments)

    def describe(self) -> str:
        """A line for the log."""
        total_ms = round(self.running_ms - self.since_ms)
        took = _took(self.steps())
        return f"the {self.shards} shards of slot {self.slot} run again after {total_ms} ms: {took}"


@dataclass(slots=True)
class Move:
    """A shard that its owner was asked to release so that another worker can run it.

    Attributes:
        since_ms: when the release was requested. `released_ms`, `assigned_ms`, `running_ms`: see `Takeover`.
    """

    shard: ShardId
    since_ms: float
    released_ms: float = 0.0
    assigned_ms: float = 0.0
    running_ms: float = 0.0

    def steps(self) -> dict[str, int]:
        """The duration of each step in milliseconds."""
        moments = (self.since_ms, self.released_ms, self.assigned_ms, self.running_ms)
        return _steps(("released", "assigned", "restored"), moments)

    def describe(self) -> str:
        """A line for the log."""
        return f"{self.shard} moved in {round(self.running_ms - self.since_ms)} ms: {_took(self.steps())}"


@dataclass(slots=True)
class Takeovers:
    """Takeovers and moves in progress, by slot and by shard, and the last completed ones."""

    under_way: dict[int, Takeover] = field(default_factory=dict[int, Takeover])
    over: deque[Takeover] = field(default_factory=lambda: deque[Takeover](maxlen=KEPT))
    moving: dict[ShardId, Move] = field(default_factory=dict[ShardId, Move])
    moved: deque[Move] = field(default_factory=lambda: deque[Move](maxlen=KEPT))

    def begin(
        self, slot: int, shards: Collection[ShardId], reason: str, since_ms: float, now_ms: float
    ) -> None:
        """The session of the slot, which had these shards, is over."""
        for shard in shards:
            self.moving.pop(shard, None)
        if shards:
            self.under_way[slot] = Takeover(slot, reason, since_ms, now_ms, set(shards), len(shards))

    def journalled(self, slot: int, now_ms: float) -> None:
        """The end of the slot's session is in the journal."""
        if slot in self.under_way:
            self.under_way[slot].journalled_ms = now_ms

    def fenced(self, slot: int, now_ms: float) -> None:
        """The slot is fenced."""
        if slot in self.under_way:
            self.under_way[slot].fenced_ms = now_ms

    def revoked(self, shard: ShardId, now_ms: float) -> None:
        """The owner was asked to release the shard."""
        self.moving[shard] = Move(shard, now_ms)

    def released(self, shard: ShardId, now_ms: float) -> None:
        """The owner has released it."""
        if shard in self.moving:
            self.moving[shard].released_ms = now_ms

    def assigned(self, shard: ShardId, now_ms: float) -> None:
        """The shard was assigned to a worker."""
        if shard in self.moving:
            self.moving[shard].assigned_ms = now_ms
        for takeover in self.under_way.values():
            if shard in takeover.waiting:
                takeover.assigned_ms = now_ms

    def runs(self, shard: ShardId, now_ms: float) -> Takeover | Move | None:
        """The shard runs. Returns the takeover or move that this completes, if any."""
        move = self.moving.pop(shard, None)
        if move is not None:
            move.running_ms = now_ms
            self.moved.append(move)
            return move
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
