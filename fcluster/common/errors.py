"""The errors that users see.

Responsible for: one class for each kind of trouble that a user can act on. Rule: every such error has a
message that names the cause, and a remedy that says what to do. Must not import anything from fcluster but
`failures`.
"""

# ruff: noqa: N818 (each class is named after what is wrong; that it is an error its base says)
from __future__ import annotations

from fcluster.common.failures import bounded_text, describe_exception


class FclusterError(Exception):
    """An error that the user can act on.

    Attributes:
        message: what happened and why, with the names involved.
        remedy: what to do about it. Empty only where the message already says so.
        exit_code: of the command that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own would call the class without the keyword argument and lose the remedy.
        return (_rebuild, (type(self), self.message, self.remedy))


REMEDY_MARK = "; remedy: "
LINE_CHARACTERS_MAX = 6_000


def one_line(error: Exception) -> str:
    """Cause and remedy in one printable line, for logs and messages between processes.

    It has at most `LINE_CHARACTERS_MAX` characters, whatever text from a user it contains.
    """
    if not isinstance(error, FclusterError) or not error.remedy:
        return bounded_text(" ".join(_text_of(error).split()), LINE_CHARACTERS_MAX)
    remedy = bounded_text(" ".join(f"{REMEDY_MARK}{error.remedy}".split()), LINE_CHARACTERS_MAX // 2)
    cause = " ".join(error.message.rstrip(".").split())
    return bounded_text(cause, LINE_CHARACTERS_MAX - len(remedy)) + remedy


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001  a user's exception may be anything
        return describe_exception(error)


def cause_and_remedy(line: str) -> tuple[str, str]:
    """The two parts of a line made by `one_line`. The remedy is empty if the line has none."""
    cause, _, remedy = line.partition(REMEDY_MARK)
    return cause, remedy


def _rebuild(kind: type[FclusterError], message: str, remedy: str) -> FclusterError:
    return kind(message, remedy=remedy)


class SettingsError(FclusterError):
    """A setting is unknown, malformed, out of range, or contradicts another."""


class JobError(FclusterError):
    """The job can't be loaded, or its topology isn't valid."""


class KafkaUnavailable(FclusterError):
    """The brokers can't be reached, or reject this client."""


class MissingTopic(FclusterError):
    """A source topic doesn't exist, or lacks required partitions."""


class SourceGap(FclusterError):
    """Source records were deleted by retention before they were processed."""


class IncompatibleState(FclusterError):
    """State or committed offsets were written by a topology that doesn't fit this one."""


class StateDamaged(FclusterError):
    """State can't be restored to exactly the committed epoch."""


class TornTransaction(StateDamaged):
    """Kafka has made one part of a shard's transaction visible and another part not."""


class ClusterConflict(FclusterError):
    """Another cluster runs under the same job name."""


class DirectoryInUse(FclusterError):
    """A data directory belongs to another running process."""


class ProcessingError(FclusterError):
    """A record can't be decoded, a handler raised, or state can't be encoded."""
