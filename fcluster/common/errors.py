"""The errors that users see.

Responsible for: one class for each kind of problem that a user can act on. Rule: every such error has a
message that names the cause, and a remedy that says what to do. Must not import anything from fcluster but
`failures` and `exit_codes`.
"""

# ruff: noqa: N818 (each class is named after what is wrong; its base class says that it is an error)
from __future__ import annotations

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind, describe_exception


class FclusterError(Exception):
    """An error that the user can act on.

    Attributes:
        message: what happened and why, with the names involved.
        remedy: what to do about it. Empty only where the message already says so.
        where: see `Failure.where`.
        kind: see `Failure.kind`.
        exit_code: of the command that ends with this error.
    """

    exit_code: int = ExitCode.MISTAKE
    kind = FailureKind.OTHER

    def __init__(self, message: str, *, remedy: str = "", where: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.where = where

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own would call the class without the keyword argument and lose the remedy.
        return (_rebuild, (type(self), self.message, self.remedy, self.where))


def failure_of(error: Exception, kind: FailureKind = FailureKind.OTHER) -> Failure:
    """The `Failure` that this error stands for.

    Args:
        error: any exception, including those of a user's code.
        kind: the kind to use for errors that aren't fcluster's own.
    """
    if isinstance(error, FclusterError):
        return Failure(error.kind, error.message, error.remedy, error.where).fitted()
    return Failure(kind, _text_of(error)).fitted()


def one_line(error: Exception) -> str:
    """Cause and remedy in one printable line, for logs. Its length is bounded, even if it contains a user's
    text.
    """
    return str(failure_of(error))


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001  a user's exception may be anything
        return describe_exception(error)


def _rebuild(kind: type[FclusterError], message: str, remedy: str, where: str) -> FclusterError:
    error = kind(message, remedy=remedy)
    error.where = where
    return error


class SettingsError(FclusterError):
    """A setting is unknown, malformed, out of range, or contradicts another."""

    kind = FailureKind.JOB


class JobError(FclusterError):
    """The job can't be loaded, or its topology isn't valid."""

    kind = FailureKind.JOB


class FormatUnusable(FclusterError):
    """Records can't be read or written in a format at present, whatever they hold: its schema registry can't
    be reached, isn't set, or refuses the schema. No record is to blame, so no `on_error` applies: the job
    stops.
    """


class FormatUnavailable(FormatUnusable):
    """The same, and it most likely passes: the schema registry doesn't answer, or says that it is in trouble.
    Workers wait for it.
    """


class KafkaUnavailable(FclusterError):
    """The brokers can't be reached, or reject this client."""

    kind = FailureKind.KAFKA


class MissingTopic(FclusterError):
    """A source topic doesn't exist, or lacks required partitions."""

    kind = FailureKind.SOURCE


class SourceGap(FclusterError):
    """Source records were deleted by retention before they were processed."""

    kind = FailureKind.SOURCE


class IncompatibleState(FclusterError):
    """State or committed offsets were written by a topology that isn't compatible with this one."""

    kind = FailureKind.STATE


class StateDamaged(FclusterError):
    """State can't be restored to exactly the committed epoch."""

    kind = FailureKind.STATE


class TornTransaction(StateDamaged):
    """Kafka made one part of a shard's transaction visible, but not another part."""


class ClusterConflict(FclusterError):
    """Another cluster runs under the same job name."""

    kind = FailureKind.CLUSTER


class DirectoryInUse(FclusterError):
    """A data directory belongs to another running process."""

    kind = FailureKind.HOST


class ProcessingError(FclusterError):
    """A record can't be decoded, a handler raised, or state can't be encoded."""

    kind = FailureKind.RECORD
