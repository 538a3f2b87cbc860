"""The exit codes of all processes and commands.

Responsible for: these numbers. A supervisor decides by them what it does about a process that has ended; so
do systemd units and users' scripts. A number never gets another meaning. `docs/exit-codes.md` lists them, and
a test compares both. Must not import anything from fcluster.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Each member's comment is its row in the documentation."""

    DONE = 0
    """The work is done, or the process was asked to exit and did so in good order."""
    MISTAKE = 1
    """A person has to fix something: a setting, the job file, a disk, a key. A restart doesn't help."""
    USAGE = 2
    """The command line is wrong."""
    JOB_FAILED = 3
    """The job itself can't continue, wherever it runs. Don't restart the process."""
    DRAINED = 4
    """A worker that an operator drained (`fcluster drain`). Don't restart it."""
    JOB_ENDED = 5
    """A worker whose job has come to its end tells its supervisor so. Without a supervisor it exits with
    0."""
    RECORD_OVERDUE = 6
    """A worker whose handler took too long for a record. Restart it: that is tried once more, and then the
    step's `on_error` decides."""
    CRASHED = 70
    """A bug in fcluster, or a process that has ended itself because it hung. Restart it: what wasn't
    committed is replayed."""
    TEMPORARY = 75
    """Trouble that may be temporary: brokers that are down, or another coordinator that leads. Restart it."""
    ORPHANED = 125
    """A child process whose parent was gone before it began."""
    NOT_STARTED = 127
    """A child process whose command doesn't exist or can't be run."""
    INTERRUPTED = 130
    """Ended at once by a second Ctrl-C or SIGTERM. What wasn't committed is replayed."""


IN_GOOD_ORDER = frozenset({ExitCode.DONE, ExitCode.DRAINED, ExitCode.JOB_ENDED})
"""A worker that exits with one of these has committed what it had processed."""
