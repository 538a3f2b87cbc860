"""Which faults happen in a soak, and when. It is drawn from a seed, and from nothing else (pure).

Responsible for: rounds of faults with their times, so that a seed always gives the same schedule, whatever
the machine does with it. A fault is drawn only where it is possible according to the plan's own book: a
worker that is down according to the plan isn't stopped. Whether it is possible when its time has come is
found out by `fault_player`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos import tally

SLOTS = 5
ROUND_S = 40.0
EPOCH_STEPS = (
    "worker.barrier-received",
    "worker.layers-frozen",
    "worker.delta-flushed",
    "worker.offsets-sent",
    "worker.prepared",
    "worker.complete-received",
    "worker.commit",
    "worker.committed",
)
TURNS = 2 * len(EPOCH_STEPS)
"""After this many turns, each role of a broker was hit at each step, both killed and stopped."""
MOVE_STEPS = ("worker.mid-restore", "worker.shards-released", "worker.mid-snapshot", "worker.snapshot-taken")
COORDINATOR_STEPS = (
    "coordinator.before-journal",
    "coordinator.mid-journal",
    "coordinator.after-journal",
    "coordinator.mid-broadcast",
    "coordinator.mid-reassignment",
    "coordinator.before-fence",
    "coordinator.after-fence",
)
CUTS = ("cut off from the coordinator", "not heard by the coordinator", "deaf to the coordinator", "no Kafka")
DAMAGES = (
    "flip_a_bit",
    "truncate",
    "lose_a_file",
    "take_anothers_manifest",
    "cut_the_manifest",
)
"""Names of `damage.DAMAGES`, except for the damage that can't be recognised by looking at a snapshot."""
FROM_CLIENTS, FROM_BROKERS, LEADERS = "from clients", "from brokers", "leaders"
"""How one of three brokers is disturbed, if it isn't ended or stopped."""
ISLANDER = 0
"""The slot of the worker that has its own network."""

WEIGHTS = {
    tally.WORKER_KILLED: 10,
    tally.ALL_KILLED: 1,
    tally.COORDINATOR_KILLED: 5,
    tally.COORDINATOR_STOPPED: 2,
    tally.WORKER_STOPPED: 6,
    tally.NETWORK_CUT: 4,
    tally.BROKER_AWAY: 1,
    tally.TRANSACTION_EXPIRED: 1,
    tally.IO_ERRORS: 2,
    tally.SNAPSHOT_DAMAGED: 4,
    tally.STATE_LOST: 3,
    tally.WORKER_SLOWED: 2,
    tally.DISK_FULL: 2,
    tally.FRAMES: 2,
    tally.RESCALED: 5,
    tally.KILLED_IN_MOVE: 3,
}
TRIO_WEIGHTS = {kind: weight for kind, weight in WEIGHTS.items() if kind != tally.BROKER_AWAY} | {
    tally.BROKER_KILLED: 6,
    tally.BROKER_STOPPED: 3,
    tally.BROKER_HUNG: 3,
    tally.BROKER_CUT: 3,
    tally.LEADERS_MOVED: 2,
}
"""Faults on three brokers, of which one at a time is disturbed."""


@dataclass(frozen=True)
class Planned:
    """A planned fault.

    Attributes:
        at_s: when it begins, counted from the beginning of its round.
        kind: one of `tally.KINDS`.
        slot: the slot of the worker that it hits. -1 if it hits none, or all.
        how: what exactly: a failpoint, a kind of cut, a kind of damage. May be empty.
        lasts_s: how long until it is healed, or until what was killed is started again.
        number: the number of workers to scale to, or of the partition whose snapshot is damaged.
    """

    at_s: float
    kind: str
    slot: int = -1
    how: str = ""
    lasts_s: float = 0.0
    number: int = 0

    def __str__(self) -> str:
        parts = [self.kind]
        if self.slot >= 0:
            parts.append(f"worker-{self.slot}")
        if self.how:
            parts.append(self.how)
        if self.kind == tally.RESCALED:
            parts.append(f"to {self.number}")
        if self.kind == tally.SNAPSHOT_DAMAGED:
            parts.append(f"of partition {self.number}")
        if self.lasts_s:
            parts.append(f"for {self.lasts_s:.1f} s")
        return ", ".join(parts)


@dataclass(frozen=True)
class Round:
    """Faults that overlap. After them, everything is healed, and progress is demanded."""

    number: int
    lasts_s: float
    standby_coordinator: bool
    faults: tuple[Planned, ...]


def rounds(seed: int, seconds: float, workers: int, weights: Mapping[str, int] = WEIGHTS) -> Iterator[Round]:
    """The rounds of a soak of this many seconds. The first ones are the same however long it is."""
    number, left_s = 0, seconds
    while left_s > 0:
        lasts_s = min(ROUND_S, left_s)
        yield _Book(random.Random(f"{seed}/{number}"), workers, weights).round(number, lasts_s)
        left_s -= lasts_s
        number += 1


def turn(number: int, roles: Sequence[str]) -> list[tuple[str, str, bool]]:
    """What one turn does to brokers: each role once, with the step at which to hit it, and whether it is
    killed.

    Args:
        number: the number of the turn. After `TURNS` it starts again.
        roles: the roles, in their order.
    """
    steps = len(EPOCH_STEPS)
    return [
        (role, EPOCH_STEPS[(number + place) % steps], (number // steps + place) % 2 == 0)
        for place, role in enumerate(roles)
    ]


class _Book:
    """What is already disturbed while a round is drawn."""

    def __init__(self, draw: random.Random, workers: int, weights: Mapping[str, int]) -> None:
        self._draw = draw
        self._weights = weights
        self._size = workers
        self._busy_until_s: dict[str, float] = {}

    def round(self, number: int, lasts_s: float) -> Round:
        faults: list[Planned] = []
        standby = self._draw.random() < 0.5
        at_s = 0.5
        while at_s < lasts_s - 1:
            planned = self._one(at_s, lasts_s)
            if planned is not None:
                faults.append(planned)
            at_s += min(8.0, 0.3 + self._draw.expovariate(1 / 1.7))
        return Round(number, lasts_s, standby, tuple(faults))

    def _one(self, at_s: float, end_s: float) -> Planned | None:
        draw = self._draw
        kind = draw.choices(list(self._weights), list(self._weights.values()))[0]
        slot, how, number = -1, "", 0
        lasts_s = draw.uniform(0.5, 4.0)
        targets = self._targets(kind)
        if targets == ["worker"]:
            slot = draw.randrange(self._size)
            targets = [f"worker-{slot}"]
        match kind:
            case tally.WORKER_KILLED:
                how = draw.choice(("", *EPOCH_STEPS))
            case tally.KILLED_IN_MOVE:
                how = draw.choice(MOVE_STEPS)
                lasts_s = draw.uniform(4.0, 8.0)
            case tally.COORDINATOR_KILLED:
                how = draw.choice(("", "", *COORDINATOR_STEPS))
            case tally.WORKER_STOPPED:
                how = draw.choice(("", *EPOCH_STEPS))
                lasts_s = draw.choice((0.4, 2.0, 3.5))
            case tally.NETWORK_CUT:
                slot, how = ISLANDER, draw.choice(CUTS)
            case tally.BROKER_AWAY:
                how = draw.choice(("clean", "hard", "hard", "stands still"))
            case tally.BROKER_KILLED | tally.BROKER_STOPPED | tally.BROKER_HUNG | tally.BROKER_CUT:
                # Some are back before their session is over; others have lost everything to other workers by
                # then.
                lasts_s = draw.uniform(1.0, 12.0)
                how = {
                    tally.BROKER_KILLED: "hard",
                    tally.BROKER_STOPPED: "clean",
                    tally.BROKER_HUNG: "stands still",
                    tally.BROKER_CUT: draw.choice((FROM_CLIENTS, FROM_BROKERS)),
                }[kind]
            case tally.LEADERS_MOVED:
                how, lasts_s = LEADERS, 0.0
            case tally.TRANSACTION_EXPIRED:
                lasts_s = 8.0
            case tally.SNAPSHOT_DAMAGED:
                how, number, lasts_s = draw.choice(DAMAGES), draw.randrange(8), 0.0
            case tally.IO_ERRORS:
                how = draw.choice(("of its state", "amid its snapshots"))
                lasts_s = draw.uniform(3.0, 6.0)
            case tally.DISK_FULL:
                lasts_s = draw.uniform(3.0, 6.0)
            case tally.FRAMES:
                lasts_s = 0.0
            case tally.RESCALED:
                number, lasts_s = draw.choice([n for n in range(1, SLOTS + 1) if n != self._size]), 0.0
            case _:
                pass
        if any(self._busy_until_s.get(target, 0.0) > at_s for target in targets) or at_s + lasts_s > end_s:
            return None
        if kind == tally.RESCALED:
            self._size = number
        for target in targets:
            # What was killed has to be started, too.
            self._busy_until_s[target] = at_s + lasts_s + 1.5
        return Planned(round(at_s, 2), kind, slot, how, round(lasts_s, 1), number)

    def _targets(self, kind: str) -> list[str]:
        """What must be whole before it is disturbed."""
        workers = [f"worker-{slot}" for slot in range(self._size)]
        match kind:
            case tally.ALL_KILLED:
                return workers
            case tally.COORDINATOR_KILLED | tally.COORDINATOR_STOPPED:
                return ["coordinator"]
            case tally.TRANSACTION_EXPIRED:
                return ["coordinator", *workers]
            case tally.NETWORK_CUT:
                return [f"worker-{ISLANDER}"]
            case (
                tally.BROKER_AWAY
                | tally.BROKER_KILLED
                | tally.BROKER_STOPPED
                | tally.BROKER_HUNG
                | tally.BROKER_CUT
                | tally.LEADERS_MOVED
            ):
                return ["broker"]
            case tally.DISK_FULL:
                return ["snapshots"]
            case tally.SNAPSHOT_DAMAGED | tally.FRAMES:
                return []
            case tally.RESCALED:
                return [f"worker-{slot}" for slot in range(SLOTS)]
            case _:
                return ["worker"]
