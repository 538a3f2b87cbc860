"""A step is one operator compiled with all that follow it. Failures say in which step they happened.

Each step catches only what its own function raises, and turns it into a `StepFailure` that carries its
`Place`. So a failure is handled by the rule of the step in which it happened, however deep the steps are
nested. Entering a `try` costs nothing. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fcluster.common.errors import FormatUnavailable, FormatUnusable, failure_of
from fcluster.common.failures import OUR_FILES, Failure, describe_exception, place_of
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.records import SourceRecord, TimerRecord, describe_record, where_of
from fcluster.graph.operators import OnError
from fcluster.graph.record import HOW_TO_WRITE, is_miswritten


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
        where: ``file:line`` of the user's function. Empty if there is none.
    """

    name: str
    doing: str
    on_error: OnError
    where: str = ""


def where_of_function(function: object) -> str:
    """``file:line`` where a function of the user is defined. Empty if it isn't written in Python, or is
    fcluster's own.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith(OUR_FILES):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


@runtime_checkable
class HasHints(Protocol):
    """An object of ours that says what to write instead of an attribute that it doesn't have."""

    def hint_for(self, name: str, /) -> str:
        """The hint."""
        ...


class RecordError(Exception):
    """A record that can't be processed.

    Args:
        failure: the reason, or only its message.
    """

    def __init__(self, failure: Failure | str) -> None:
        super().__init__(str(failure))
        self.failure = Failure.of_record(failure) if isinstance(failure, str) else failure


class StepFailure(Exception):  # noqa: N818  it is a step's failure, and never leaves the engine
    """Something failed in the step at `place`: `error`, which may be any exception.

    Args:
        place: the place.
        error: the exception.
        where: ``file:line``. Default: where the user's code raised it.
    """

    def __init__(self, place: Place, error: BaseException, where: str = "") -> None:
        super().__init__(place.name)
        self.place = place
        self.error = error
        self._where = where

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

    def _hint(self, record: SourceRecord) -> str:
        """What the author of the function has most likely not thought of."""
        error = self.error
        if isinstance(error, AttributeError) and isinstance(error.name, str):
            if type(error.obj) is dict:
                return f"; it is a dict: write value[{error.name!r}], or declare the topic with a model"
            if isinstance(error.obj, HasHints):
                return f"; {error.obj.hint_for(error.name)}"
        if is_miswritten(error):
            return f"; a Record takes its fields by name: {HOW_TO_WRITE}"
        if record.value() is None and not isinstance(record, TimerRecord):
            return "; the record is a tombstone: its value is null, which is None for the step"
        return ""

    def of(self, record: SourceRecord) -> Failure:
        """A failure that names the record, the place and the cause, with a remedy where there is one."""
        cause = self.cause
        message = f"{describe_record(record)} failed {self.place.doing}: {cause.message}"
        if not isinstance(self.error, OutputRefusedError | FormatUnusable):
            where = self._where or place_of(self.error) or self.place.where
            message += f" ({where})" if where else ""
        if not isinstance(self.error, RecordError | OutputRefusedError | FormatUnusable):
            message += self._hint(record)
        return Failure.of_record(message, cause.remedy, where_of(record))


def unavailable_format(error: BaseException) -> FormatUnavailable | None:
    """Why a record fails that will most likely not fail later, if `error` comes from that."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, FormatUnavailable):
        found = found.error if isinstance(found, StepFailure) else found.__cause__
    return found
