"""Kills the processes that a worker's handlers have started, once the worker has ended for whatever reason.

    process_guard.py WORKER_PID MARK SESSION        standard input: lines `PID START_TIME` of forked children

Responsible for: waiting for the worker's end, which the kernel reports (a pidfd), and finding the processes
that it has left behind. It runs as a script by its path (`python -I -S`), and must import only the standard
library, so that it is small. Linux only.

These processes belong to the worker: those with MARK in their environment, which executed programs inherit;
those that have registered on standard input, as forked children do; if SESSION is 1 (the worker leads its
session), all processes in that session; and the children of all these.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

ENVIRONMENT_VARIABLE = "FCLUSTER__HANDLER_OF"
TRACKER = b"multiprocessing.resource_tracker"
"""It removes semaphores and shared memory once all their users have ended, and then exits by itself."""
TRACKER_GRACE_S = 3.0
PATIENCE_S = 10.0
POLL_S = 0.02
FORGET_AT = 1_000
"""When there are this many registrations, those of processes that have ended are dropped."""

Process = tuple[int, str]
"""Id and start time, which together identify a process forever."""


def start_of(pid: int) -> tuple[int, int, str] | None:
    """A process's parent, its session and its start time; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return int(fields[1]), int(fields[3]), fields[19].decode()


def read(pid: int, name: str) -> bytes:
    """A file of the process. Empty if it can't be read."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def belonging(worker: int, mark: str, leads_session: bool, registered: set[Process]) -> set[int]:
    """The processes that belong to the worker and still run, except for this one and the worker."""
    entry = f"{ENVIRONMENT_VARIABLE}={mark}".encode()
    found: set[int] = set()
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        facts = start_of(pid)
        if facts is None or pid in (os.getpid(), worker):
            continue
        parent, session, started = facts
        parents[pid] = parent
        if (
            (pid, started) in registered
            or (leads_session and session == worker)
            or entry in read(pid, "environ").split(b"\0")
        ):
            found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def sweep(worker: int, mark: str, leads_session: bool, registered: set[Process]) -> None:
    """Kill everything that belongs to the worker, until no such process is left."""
    began_s = time.monotonic()
    while left := belonging(worker, mark, leads_session, registered):
        age_s = time.monotonic() - began_s
        if age_s > PATIENCE_S:
            return  # a process that can't be killed now hangs in the kernel
        for pid in left:
            if TRACKER not in read(pid, "cmdline") or age_s > TRACKER_GRACE_S:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
        time.sleep(POLL_S)


class Registrations:
    """Processes that have registered on standard input as forked children of the worker."""

    def __init__(self) -> None:
        self.processes: set[Process] = set()
        self._rest = b""
        self.ended = False

    def take(self) -> None:
        """Read what has arrived."""
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            return
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            pid, _, started = line.decode().partition(" ")
            self.processes.add((int(pid), started))
        if len(self.processes) > FORGET_AT:
            self.processes = {
                (pid, started)
                for pid, started in self.processes
                if (facts := start_of(pid)) is not None and facts[2] == started
            }


def await_end(worker: int, registrations: Registrations) -> None:
    """Wait until the worker has ended."""
    try:
        descriptor = os.pidfd_open(worker)
    except OSError:
        return
    if os.getppid() != worker:
        return  # it had already ended, and its id may belong to another process
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if 0 in ready:
            registrations.take()
            if registrations.ended:
                poll.unregister(0)
        if descriptor in ready:
            return


def main(worker: int, mark: str, leads_session: bool) -> None:
    """Wait, then sweep."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.set_blocking(0, False)
    registrations = Registrations()
    await_end(worker, registrations)
    registrations.take()
    sweep(worker, mark, leads_session, registrations.processes)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1")
