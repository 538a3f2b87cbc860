"""The exit codes of all processes and commands.

Responsible for: these numbers. A supervisor uses them to decide what to do about a process that has ended; so
do systemd units and users' scripts. The meaning of a number never changes. `docs/exit-codes.md` lists them,
and a test compares both. Must not import anything from fcluster.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Each member's comment is its row in the documentation."""

    DONE = 0
    """The work is done, or the process was asked to exit and did so cleanly."""
    MISTAKE = 1
    """A person has to fix something: a setting, the job file, a disk, a key. A restart doesn't help."""
    USAGE = 2
    """The command line is wrong."""
    JOB_FAILED = 3
    """The job itself can't continue, wherever it runs. Don't restart the process."""
    DRAINED = 4
    """A worker that an operator drained (`fcluster drain`). Don't restart it."""
    JOB_ENDED = 5
    """A worker whose job has finished reports it to its supervisor with this code. Without a supervisor it
    exits with 0.
    """
    RECORD_OVERDUE = 6
    """A worker whose handler took too long for a record. Restart it: the record is tried once more, and then
    the step's `on_error` decides.
    """
    CRASHED = 70
    """A bug in fcluster, or a process that has ended itself because it hung. Restart it: records that weren't
    committed are replayed.
    """
    TEMPORARY = 75
    """A problem that may be temporary: the brokers are down, or another coordinator leads. Restart it."""
    ORPHANED = 125
    """A child process whose parent was gone before it began."""
    NOT_STARTED = 127
    """A child process whose command doesn't exist or can't be run."""
    INTERRUPTED = 130
    """Ended at once by a second Ctrl-C or SIGTERM. Records that weren't committed are replayed."""


IN_GOOD_ORDER = frozenset({ExitCode.DONE, ExitCode.DRAINED, ExitCode.JOB_ENDED})
"""A worker that exits with one of these codes has committed what it had processed."""
