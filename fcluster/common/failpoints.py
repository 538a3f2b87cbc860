"""Named points in the code at which a test can make a process die, stop, wait or fail.

Responsible for: the table of points (`POINTS`), and what happens at points that are armed. A process is armed
by the environment variable `FCLUSTER__FAILPOINTS`, which names a directory. A file there with a point's name
says what to do when the process next passes the point (`Arm`, as JSON). It may be written at any time. Before
the action, the file is renamed to `<point>.reached`, so a fault happens once and leaves a mark. Without that
variable, `reach` does nothing.

Must not be used for anything but tests: no behaviour of the product may depend on a point.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

ENVIRONMENT_VARIABLE: Final = "FCLUSTER__FAILPOINTS"
REACHED: Final = ".reached"

POINTS: Final[dict[str, str]] = {
    "worker.barrier-received": "no part of the epoch is frozen yet",
    "worker.layers-frozen": "the deltas exist in memory only",
    "worker.offsets-sent": "the offsets are pending in the transaction, the deltas perhaps not yet",
    "worker.delta-flushed": "the whole epoch is in the transaction; no other process knows it yet",
    "worker.prepared": "the coordinator is being told, and may declare the epoch complete",
    "worker.complete-received": "the epoch is declared complete, and its commit hasn't begun",
    "worker.commit": "the request to commit is the next thing to be sent",
    "worker.committed": "committed in Kafka; neither the local state nor the coordinator knows it",
    "worker.mid-restore": "a shard is restored, and perhaps others are not",
    "worker.mid-snapshot": "all files of a snapshot are in the store, but its manifest is not",
    "worker.snapshot-taken": "the snapshot is complete, the changelog not yet truncated",
    "worker.shards-released": "shards were given up in a move; their stores are still open",
    "worker.seeks-leader": "a worker process runs, but hasn't looked for a coordinator yet",
    "agent.seeks-leader": "an agent runs, but hasn't looked for a coordinator yet",
    "coordinator.before-journal": "the core has decided; nothing is journalled yet",
    "coordinator.mid-journal": "entries of the journal are in an open transaction",
    "coordinator.after-journal": "the decision is journalled; no other process knows it yet",
    "coordinator.mid-broadcast": "a worker is about to be told that an epoch is complete",
    "coordinator.mid-reassignment": "a worker is about to get shards",
    "coordinator.before-fence": "the end of a session is journalled, but its slot is not fenced yet",
    "coordinator.after-fence": "a slot is fenced; no other process knows it yet",
    "reset.noted": "the journal notes a reset as begun; nothing is changed",
    "reset.fenced": "nobody can commit any more; nothing is deleted",
    "reset.topics-deleted": "internal topics are gone, snapshots and offsets are not",
    "reset.state-deleted": "nothing is left of the state; the offsets are unchanged",
    "reset.offsets-set": "everything is done except the journal's last entry",
}


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do at a point.

    Attributes:
        action: `kill` and `stop` send this process SIGKILL and SIGSTOP, `hold` waits `after_ms`, `raise`
            raises an OSError with the number `errno`.
        passing: which passing after the file was written triggers the action. Passings with different details
            are counted separately. If the detail is an epoch, 2 means the second passing in the same epoch.
        after_ms: how long the passing thread waits before it acts.
        in_background: the passing thread continues; another thread waits and acts.
        every: act at every later passing too, until the mark is removed.
        errno: for `raise`.
    """

    action: Literal["kill", "stop", "hold", "raise"]
    passing: int = 1
    after_ms: int = 0
    in_background: bool = False
    every: bool = False
    errno: int = 5


_decode_arm = msgspec.json.Decoder(Arm).decode


class Failpoints:
    """The points of one armed process.

    Args:
        directory: where arms are read from and marks are written.
        kill: sends this process a signal.
    """

    def __init__(self, directory: Path, kill: Callable[[int], None]) -> None:
        self._directory = directory
        self._kill = kill
        self._lock = threading.Lock()
        self._passings: dict[str, tuple[object, int]] = {}
        self._lasting: dict[str, Arm] = {}

    def reach(self, point: str, detail: object = None) -> None:
        """The calling thread passes `point`; `detail` goes into the mark."""
        if point not in POINTS:
            raise ValueError(f"there is no failpoint {point!r}")
        arm = self._lasting.get(point)
        if arm is None or not (self._directory / f"{point}{REACHED}").exists():
            arm = self._take(point, detail)
        if arm is None:
            return
        if arm.in_background:
            threading.Thread(target=self._act, args=(point, arm), daemon=True).start()
        else:
            self._act(point, arm)

    def _take(self, point: str, detail: object) -> Arm | None:
        """The arm, if it applies to this passing. Then the mark is written."""
        file = self._directory / point
        with self._lock:
            self._lasting.pop(point, None)
            try:
                arm = _decode_arm(file.read_bytes())
            except FileNotFoundError:
                self._passings.pop(point, None)
                return None
            former, count = self._passings.get(point, (detail, 0))
            count = count + 1 if former == detail else 1
            self._passings[point] = (detail, count)
            if count < arm.passing:
                return None
            del self._passings[point]
            if arm.every:
                self._lasting[point] = arm
            mark = {"pid": os.getpid(), "time_ns": time.time_ns(), "detail": str(detail), "passing": count}
            file.write_bytes(msgspec.json.encode(mark))
            file.rename(file.with_name(f"{point}{REACHED}"))
            return arm

    def _act(self, point: str, arm: Arm) -> None:
        time.sleep(arm.after_ms / 1000)
        match arm.action:
            case "kill":
                self._kill(signal.SIGKILL)
            case "stop":
                self._kill(signal.SIGSTOP)
            case "raise":
                raise OSError(arm.errno, f"{os.strerror(arm.errno)} (failpoint {point})")
            case "hold":
                pass


def _nothing(point: str, detail: object = None) -> None:
    """No failpoints in this process."""


def _send_self(number: int) -> None:
    # To the calling thread, which then gets no further. A signal to the process may reach another thread
    # first; until that has stopped the others, this one would go on, perhaps into the step behind the point.
    signal.pthread_kill(threading.get_ident(), number)


def _chosen() -> Callable[..., None]:
    directory = os.environ.get(ENVIRONMENT_VARIABLE)
    return Failpoints(Path(directory), _send_self).reach if directory else _nothing


reach: Final = _chosen()
"""Pass a point: `reach("worker.committed", epoch)`."""
