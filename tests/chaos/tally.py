"""Which faults were injected, how often, and how each of them is known to have hit.

Responsible for: the kinds of faults (the lines of the table that the tests fill), one list of all faults that
were injected in this session, and its table. A fault that wasn't shown to have hit an open epoch isn't
counted as a hit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

WORKER_KILLED = "worker killed"
ALL_KILLED = "all workers killed at once or in turn"
COORDINATOR_KILLED = "coordinator killed"
WORKER_STOPPED = "worker stopped"
COORDINATOR_STOPPED = "coordinator stopped"
NETWORK_CUT = "network cut"
BROKER_AWAY = "broker restarted"
BROKER_KILLED = "one of three brokers killed"
BROKER_STOPPED = "one of three brokers stopped"
BROKER_HUNG = "one of three brokers stood still"
BROKER_CUT = "one of three brokers cut off"
BROKERS_AWAY = "two of three brokers away"
LEADERS_MOVED = "leaders moved without a death"
COMMIT_IN_DOUBT = "commit whose sender died"
TRANSACTION_EXPIRED = "transaction out of time"
DISK_FULL = "disk full"
IO_ERRORS = "I/O errors"
SNAPSHOT_DAMAGED = "snapshot damaged"
STATE_LOST = "local state deleted"
WORKER_SLOWED = "worker ten times slower"
FRAMES = "hostile frames"
RESCALED = "rescaled under load"
KILLED_IN_MOVE = "killed amid a move"
RESTARTED = "restarted in good order"

KINDS = (
    WORKER_KILLED,
    ALL_KILLED,
    COORDINATOR_KILLED,
    COORDINATOR_STOPPED,
    WORKER_STOPPED,
    NETWORK_CUT,
    BROKER_AWAY,
    BROKER_KILLED,
    BROKER_STOPPED,
    BROKER_HUNG,
    BROKER_CUT,
    BROKERS_AWAY,
    LEADERS_MOVED,
    COMMIT_IN_DOUBT,
    TRANSACTION_EXPIRED,
    DISK_FULL,
    IO_ERRORS,
    SNAPSHOT_DAMAGED,
    STATE_LOST,
    WORKER_SLOWED,
    FRAMES,
    RESCALED,
    KILLED_IN_MOVE,
    RESTARTED,
)


@dataclass
class Fault:
    """A fault that was injected.

    Attributes:
        kind: one of KINDS.
        what: a description.
        time_ns: the time on the wall clock.
        shown: how it is known that it hit an open epoch. Empty until the run is judged, if the evidence is
            that it aborted outputs.
        aborted: how many outputs were written around it and never committed. -1 if not counted.
    """

    kind: str
    what: str
    time_ns: int
    shown: str = ""
    aborted: int = -1

    def __str__(self) -> str:
        aborted = f"{self.aborted} outputs aborted" if self.aborted >= 0 else ""
        return f"{self.what}: {'; '.join(filter(None, (self.shown, aborted))) or 'not shown to have hit'}"


SESSION: list[Fault] = []
"""The faults of all runs of this process that were judged."""


def table(faults: Iterable[Fault]) -> str:
    """For each kind: how many faults were injected, and how many of them are shown to have hit an open
    epoch.
    """
    injected, landed = Counter[str](), Counter[str]()
    for fault in faults:
        assert fault.kind in KINDS, fault
        injected[fault.kind] += 1
        landed[fault.kind] += bool(fault.shown or fault.aborted > 0)
    lines = [f"{'fault':<40} {'injected':>8} {'in an open epoch':>17}"]
    lines += [f"{kind:<40} {injected[kind]:>8} {landed[kind]:>17}" for kind in KINDS if injected[kind]]
    lines.append(f"{'all':<40} {injected.total():>8} {landed.total():>17}")
    return "\n".join(lines)
