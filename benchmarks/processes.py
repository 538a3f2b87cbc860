"""The processes that one process has started: who they are, what they have used. Linux only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.harness import memory_bytes, wait_until

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """What the kernel says of a process.

    Attributes:
        session: the process id of its session's leader.
        cpu_s: its processor time, and that of its descendants that have ended and were waited for.
        ended: nobody has waited for it.
    """

    pid: int
    session: int
    cpu_s: float
    ended: bool = False

    @classmethod
    def parse(cls, stat: str) -> Process:
        """From the text of `/proc/PID/stat`."""
        pid = int(stat.partition(" ")[0])
        # The command's name, in brackets, may hold anything.
        fields = stat.rpartition(")")[2].split()
        return cls(pid, int(fields[3]), sum(map(int, fields[11:15])) / _TICKS_PER_SECOND, fields[0] in "ZX")


def of_session(leader: int) -> list[Process]:
    """The leader and all that it has started and that haven't left its session."""
    return [process for process in _processes() if process.session == leader]


def kill_session(leader: int) -> None:
    """Kill them all, and wait until they have ended. (Whoever started the leader still has to wait for it.)

    Raises:
        TimeoutError: one doesn't end.
    """

    def have_ended() -> bool:
        running = [process for process in of_session(leader) if not process.ended]
        for process in running:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not running

    wait_until(have_ended, f"the end of the session {leader}")


def peak_bytes(processes: list[Process]) -> int:
    """Their peaks of resident memory, added up."""
    total = 0
    for process in processes:
        try:
            total += memory_bytes(process.pid, "VmHWM")
        except (FileNotFoundError, ProcessLookupError, ValueError):
            continue  # it has ended
    return total


def _processes() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield Process.parse(path.read_text(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
