"""What `fcluster up` keeps in its data directory: a lock, a note about the running cluster, and log files.

Responsible for: `lock` (held while a cluster runs in the directory; the system releases it, however the
cluster ends), `cluster.json` (lets `status`, `consume` and `produce` find the cluster without options) and
`logs/`. Rules: two clusters never share a directory; a note left by a dead cluster is never trusted; logs
don't grow without bound. Must not touch state, Kafka's data or snapshots, which are in the same directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from fcluster.common.errors import DirectoryInUse, FclusterError
from fcluster.common.processes import BoundedLog

LOG_FILES_KEPT = 3
LOCK_PATIENCE_S = 0.3
"""A process that only checks whether the directory is in use holds the lock for a moment."""


class DirectoryUnusable(FclusterError):  # noqa: N818
    """The data directory can't be created or written."""


@dataclass(frozen=True)
class ClusterNote:
    """What the commands need to know about a running cluster.

    `pid` is the process id of `fcluster up`, `keys` is the keys directory (empty: none), and `insecure` is
    the setting of that name.
    """

    job: str
    target: str
    brokers: str
    coordinator: str
    pid: int
    started: str
    pids: dict[str, int] = field(default_factory=dict[str, int])
    keys: str = ""
    insecure: bool = False


def create_directory(path: Path) -> None:
    """Create the data directory and its `logs`, unless they exist.

    Raises:
        DirectoryUnusable: they can't be created.
    """
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


class DirectoryLock:
    """The right to run a cluster in a data directory. The system releases it when the process dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._file: BinaryIO | None = None

    def acquire(self) -> None:
        """Take the lock and note this process's id in it.

        Raises:
            DirectoryInUse: another process holds it.
            DirectoryUnusable: the file can't be written.
        """
        try:
            file = self._path.open("a+b")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                pid = self._noted_pid()
                file.close()
                raise DirectoryInUse(
                    f"the data directory {self._path.parent} is in use by process {pid or '(unknown)'}",
                    remedy="Stop that cluster first, or choose another directory with --data-dir.",
                )
            time.sleep(0.02)
        try:
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        except OSError as error:
            file.close()
            raise _unwritable(self._path, error) from error
        self._file = file

    def release(self) -> None:
        """Release the lock. The file stays, because removing it would race with the next process that locks
        it.
        """
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def holder(self) -> int | None:
        """The process that holds the lock (0: a process of another machine or another user). None if there is
        none.
        """
        try:
            with self._path.open("rb") as file:
                return None if _try_lock(file, fcntl.LOCK_SH) else self._noted_pid()
        except OSError:
            return None

    def _noted_pid(self) -> int:
        try:
            return int(self._path.read_text() or 0)
        except (OSError, ValueError):
            return 0


def _try_lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unwritable(path: Path, error: OSError) -> DirectoryUnusable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DirectoryUnusable(
            f"can't write {path}: the disk is full",
            remedy="Free some space, or choose a directory on another disk with --data-dir.",
        )
    return DirectoryUnusable(
        f"can't write {path}: {error.strerror or error}",
        remedy="Choose another directory with --data-dir.",
    )


def write_note(directory: Path, note: ClusterNote) -> None:
    """Write `cluster.json`. A reader sees either the old one or the new one, never a part of it.

    Raises:
        DirectoryUnusable: it can't be written.
    """
    path = directory / "cluster.json"
    temporary = path.with_suffix(".json.new")
    try:
        temporary.write_text(json.dumps(asdict(note), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def remove_note(directory: Path) -> None:
    """Remove `cluster.json`, if it exists."""
    with contextlib.suppress(OSError):
        (directory / "cluster.json").unlink()


def read_note(directory: Path) -> ClusterNote | None:
    """The note about the cluster that runs in `directory`. None if none runs, even if there is a note."""
    try:
        content = json.loads((directory / "cluster.json").read_text(encoding="utf-8"))
        note = ClusterNote(**content)
    except (OSError, ValueError, TypeError):
        return None
    # Another program may use the process id by now, so the lock must be held too.
    if not _is_alive(note.pid) or DirectoryLock(directory).holder() is None:
        return None
    return note


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def log_path(directory: Path, name: str) -> Path:
    """The path of the log of the process `name`."""
    return directory / "logs" / f"{name}.log"


def rotate_log(directory: Path, name: str) -> None:
    """Move a previous run's log to ``<name>.log.1``, an older one to ``.2``, and delete the oldest."""
    path = log_path(directory, name)
    numbered = [path.with_name(f"{path.name}.{number}") for number in range(LOG_FILES_KEPT, 0, -1)]
    for older, newer in zip(numbered, [*numbered[1:], path], strict=True):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(older)


class SharedLog:
    """A bounded log that several threads write to. If the disk is full, lines are lost here, but nothing else
    happens.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._lock = threading.Lock()
        self._log = BoundedLog(log_path(directory, name))

    def write(self, line: str) -> None:
        """Append `line`."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._log.write(line)

    def close(self) -> None:
        """Close the file; later lines are dropped."""
        with self._lock:
            self._log.close()
