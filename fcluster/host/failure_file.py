"""How a process tells its keeper why it has failed: in a file whose name it finds in its environment.

Responsible for: that file. What a process writes to its log is for people, and nobody takes it apart. Rules:
a file that is missing, torn or of another version is no failure; trouble with it never hides the failure
itself.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import msgspec

from fcluster.common.failures import Failure

VARIABLE = "FCLUSTER_FAILURE_FILE"
"""The environment variable that names the file."""
BYTES_MAX = 1_000_000
_decoder = msgspec.json.Decoder(Failure)


def take_from_environment() -> Path | None:
    """The file of this process. Later calls, and the processes that this one starts, find none."""
    path = os.environ.pop(VARIABLE, "")
    return Path(path) if path else None


def write_failure(path: Path, failure: Failure) -> None:
    """Tell the keeper. If that fails, the keeper refers to the log."""
    temporary = path.with_name(f"{path.name}.new")
    with contextlib.suppress(OSError):
        temporary.write_bytes(msgspec.json.encode(failure))
        temporary.replace(path)


class FailureFile:
    """The file of one child process, in a directory of its own, which goes with this object."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fcluster-", ignore_cleanup_errors=True)
        self._path = Path(self._directory.name) / "failure.json"

    @property
    def environment(self) -> dict[str, str]:
        """To be added to the child's environment."""
        return {VARIABLE: str(self._path)}

    def take(self) -> Failure | None:
        """What the child has told. Its text is as the child wrote it, in several lines perhaps."""
        found: Failure | None = None
        with contextlib.suppress(OSError, msgspec.MsgspecError), self._path.open("rb") as file:
            found = _decoder.decode(file.read(BYTES_MAX))
        self._directory.cleanup()
        return found
