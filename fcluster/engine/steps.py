"""A step: one operator compiled with all that follow it; and how failures say in which step they happened.

Each step catches what its own function raises, and only that, and turns it into a `StepFailure` that carries
its `Place`: so a failure is judged by the rule of the step it happened in, however deep the steps are nested.
Entering a `try` costs nothing. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fcluster.common.failures import bounded_text, describe_exception, place_of
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.records import SourceRecord, describe_record
from fcluster.graph.topology import OnError

REASON_CHARACTERS_MAX = 4_000
"""The longest message about a record: what is put around an exception's text is short."""


class Step(Protocol):
    """A compiled operator and all that follow it."""

    def __call__(self, record: SourceRecord, key: bytes | None, value: Any, /) -> None:
        """Process one value that `record` led to."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a chain something can fail.

    Attributes:
        name: unique in the stage: a handler's is the handler's name.
        doing: the same in a sentence, behind "the record failed ...".
        on_error: what a record leads to that fails there.
    """

    name: str
    doing: str
    on_error: OnError


class RecordError(Exception):
    """A record that can't be processed. `reason` is for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StepFailure(Exception):  # noqa: N818  it is the step's, and never leaves the engine
    """Something failed in the step at `place`: `error`, which may be any exception at all."""

    def __init__(self, place: Place, error: BaseException) -> None:
        super().__init__(place.name)
        self.place = place
        self.error = error

    def describe(self) -> str:
        """What went wrong, without the record and the place: for the header of a dead letter."""
        if isinstance(self.error, RecordError | OutputRefusedError):
            return bounded_text(self.error.reason, REASON_CHARACTERS_MAX // 2)
        return describe_exception(self.error)

    def message(self, record: SourceRecord) -> str:
        """One line that names the record, the place and the cause, with a remedy where there is one."""
        line = f"{describe_record(record)} failed {self.place.doing}: {self.describe()}"
        if not isinstance(self.error, RecordError | OutputRefusedError):
            where = place_of(self.error)
            line += f" ({where})" if where else ""
        return bounded_text(line, REASON_CHARACTERS_MAX)
