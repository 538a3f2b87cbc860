"""A step is one operator compiled with all that follow it. Failures say in which step they happened.

Each step catches only what its own function raises, and turns it into a `StepFailure` that carries its
`Place`. So a failure is handled by the rule of the step in which it happened, however deep the steps are
nested. Entering a `try` costs nothing. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fcluster.common.errors import FormatUnusable, failure_of
from fcluster.common.failures import Failure, describe_exception, place_of
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.records import SourceRecord, describe_record, where_of
from fcluster.graph.operators import OnError


class Step(Protocol):
    """A compiled operator and all that follow it."""

    def __call__(self, record: SourceRecord, key: bytes | None, value: Any, /) -> None:
        """Process one value that comes from `record`."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a chain where something can fail.

    Attributes:
        name: unique in the stage. For a handler, the handler's name.
        doing: the same as the end of a sentence that begins "the record failed ...".
        on_error: what to do with a record that fails there.
    """

    name: str
    doing: str
    on_error: OnError


class RecordError(Exception):
    """A record that can't be processed.

    Args:
        failure: the reason, or only its message.
    """

    def __init__(self, failure: Failure | str) -> None:
        super().__init__(str(failure))
        self.failure = Failure.of_record(failure) if isinstance(failure, str) else failure


class StepFailure(Exception):  # noqa: N818  it is a step's failure, and never leaves the engine
    """Something failed in the step at `place`: `error`, which may be any exception."""

    def __init__(self, place: Place, error: BaseException) -> None:
        super().__init__(place.name)
        self.place = place
        self.error = error

    @property
    def rule(self) -> OnError:
        """What to do with the record. No rule for bad records applies if no record is to blame."""
        return "stop" if isinstance(self.error, FormatUnusable) else self.place.on_error

    @property
    def cause(self) -> Failure:
        """What went wrong, without the record and the place."""
        if isinstance(self.error, RecordError | OutputRefusedError):
            return self.error.failure
        if isinstance(self.error, FormatUnusable):
            return failure_of(self.error)
        return Failure.of_record(describe_exception(self.error))

    def describe(self) -> str:
        """The cause in one line, for the header of a dead letter."""
        return str(self.cause)

    def of(self, record: SourceRecord) -> Failure:
        """A failure that names the record, the place and the cause, with a remedy where there is one."""
        cause = self.cause
        message = f"{describe_record(record)} failed {self.place.doing}: {cause.message}"
        if not isinstance(self.error, RecordError | OutputRefusedError | FormatUnusable):
            where = place_of(self.error)
            message += f" ({where})" if where else ""
        return Failure.of_record(message, cause.remedy, where_of(record))
