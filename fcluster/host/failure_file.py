"""How a process reports why it has failed to its keeper: in a file that an environment variable names.

Responsible for: that file. A process writes its log for people, and no program parses it. Rules: a file that
is missing, torn or of another version counts as no failure; a problem with the file never hides the failure
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
    """The file of this process. Later calls find none, and neither do the processes that this one starts."""
    path = os.environ.pop(VARIABLE, "")
    return Path(path) if path else None


def write_failure(path: Path, failure: Failure) -> None:
    """Report the failure to the keeper. If that doesn't work, the keeper refers to the log."""
    temporary = path.with_name(f"{path.name}.new")
    with contextlib.suppress(OSError):
        temporary.write_bytes(msgspec.json.encode(failure))
        temporary.replace(path)


class FailureFile:
    """The file of one child process. It is in its own directory, which is removed with this object."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fcluster-", ignore_cleanup_errors=True)
        self._path = Path(self._directory.name) / "failure.json"

    @property
    def environment(self) -> dict[str, str]:
        """Variables to add to the child's environment."""
        return {VARIABLE: str(self._path)}

    def take(self) -> Failure | None:
        """The failure that the child has reported. Its text is as the child wrote it, perhaps in several
        lines.
        """
        found: Failure | None = None
        with contextlib.suppress(OSError, msgspec.MsgspecError), self._path.open("rb") as file:
            found = _decoder.decode(file.read(BYTES_MAX))
        self._directory.cleanup()
        return found
