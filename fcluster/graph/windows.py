"""The windows that a job declares: the intervals of event time to which a record belongs.

Responsible for: the objects that a job file creates (`Tumbling`, `Hopping`, `Session`), their checks, which
windows a timestamp is in, and their description, which is compared with existing state when a job has
changed. `fcluster.engine` fills and closes them. Pure.

A window is the time from its start up to, but not including, its end, in milliseconds since 1970. It is
identified by its end, because the start follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr

DURATION_MAX = timedelta(days=100 * 366)
_NOTHING = timedelta()
_MILLISECOND = timedelta(milliseconds=1)
_DAY = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = date(1970, 1, 1).toordinal()

EndsOf = Callable[[int], Sequence[int]]
"""The ends of the windows that a timestamp is in, earliest first."""


@dataclass(frozen=True, slots=True)
class Tumbling:
    """Consecutive windows: each record is in exactly one.

    Args:
        size: the length of a window.
        grace: how long a window takes late records after its end. Its result waits for this long.
        offset: the first window begins this long after midnight UTC of 1970-01-01, and the others follow
            without gaps.
        timezone: for example "Europe/Berlin". Windows of whole days then begin at midnight there, plus
            `offset`. On days when clocks change, they have 23 or 25 hours.

    Raises:
        JobError: one of them isn't valid.
    """

    size: timedelta
    grace: timedelta = _NOTHING
    offset: timedelta = _NOTHING
    timezone: str | None = None

    def __post_init__(self) -> None:
        _check("Tumbling", "size", self.size, _MILLISECOND)
        _check("Tumbling", "grace", self.grace, _NOTHING)
        _check_offset("Tumbling", self.offset, "size", self.size)
        if self.timezone is None:
            return
        _zone(self.timezone)
        if self.size % _DAY:
            raise JobError(
                f"Tumbling has timezone={self.timezone!r}, but size={self.size!r} isn't a number of days.",
                remedy="Use timedelta(days=1), or leave out the time zone.",
            )

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // _MILLISECOND

    def ends_of(self) -> EndsOf:
        """Returns the function that says which windows a timestamp is in."""
        if self.timezone is not None:
            return _Days(self).ends
        size_ms, offset_ms = self.size // _MILLISECOND, self.offset // _MILLISECOND
        return lambda timestamp_ms: (timestamp_ms - (timestamp_ms - offset_ms) % size_ms + size_ms,)

    def start_of(self) -> Callable[[int], int]:
        """Returns the function that says when the window with that end begins."""
        if self.timezone is not None:
            return _Days(self).start
        size_ms = self.size // _MILLISECOND
        return lambda end_ms: end_ms - size_ms

    def describe(self) -> dict[str, Any]:
        """What distinguishes its windows from others. How long they take late records may change."""
        described: dict[str, Any] = {"kind": "tumbling", "size_ms": self.size // _MILLISECOND}
        if self.offset:
            described["offset_ms"] = self.offset // _MILLISECOND
        if self.timezone is not None:
            described["timezone"] = self.timezone
        return described


@dataclass(frozen=True, slots=True)
class Hopping:
    """Windows of one size that begin at regular intervals and overlap: a record is in several.

    Windows that would begin before 1970 don't exist.

    Args:
        size: the length of a window.
        every: the time between the starts of two windows, at most `size`.
        grace: as in `Tumbling`.
        offset: the first window begins this long after midnight UTC of 1970-01-01, and the others at each
            interval.

    Raises:
        JobError: one of them isn't valid.
    """

    size: timedelta
    every: timedelta
    grace: timedelta = _NOTHING
    offset: timedelta = _NOTHING

    def __post_init__(self) -> None:
        _check("Hopping", "size", self.size, _MILLISECOND)
        _check("Hopping", "every", self.every, _MILLISECOND)
        _check("Hopping", "grace", self.grace, _NOTHING)
        _check_offset("Hopping", self.offset, "every", self.every)
        if self.every > self.size:
            raise JobError(
                f"Hopping has every={self.every!r}, which is more than size={self.size!r}: records between "
                "two windows would be in none.",
                remedy="Make the windows longer, or let them begin more often.",
            )

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // _MILLISECOND

    def ends_of(self) -> EndsOf:
        """As in `Tumbling`."""
        size_ms, every_ms = self.size // _MILLISECOND, self.every // _MILLISECOND
        offset_ms = self.offset // _MILLISECOND

        def ends(timestamp_ms: int) -> Sequence[int]:
            last = timestamp_ms - (timestamp_ms - offset_ms) % every_ms
            # The first window that hasn't ended, among those that begin in 1970 or later.
            first = last - (size_ms - 1 - (timestamp_ms - last)) // every_ms * every_ms
            if first < 0:
                first = max(0, offset_ms)
            return range(first + size_ms, last + size_ms + 1, every_ms)

        return ends

    def start_of(self) -> Callable[[int], int]:
        """As in `Tumbling`."""
        size_ms = self.size // _MILLISECOND
        return lambda end_ms: end_ms - size_ms

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        described: dict[str, Any] = {
            "kind": "hopping",
            "size_ms": self.size // _MILLISECOND,
            "every_ms": self.every // _MILLISECOND,
        }
        if self.offset:
            described["offset_ms"] = self.offset // _MILLISECOND
        return described


@dataclass(frozen=True, slots=True)
class Session:
    """Windows of records that follow each other closely.

    A session begins with its first record, and ends `gap` after its last one. A record that is `gap` or less
    away from two sessions joins them into one. So the aggregates must be mergeable.

    Args:
        gap: how long after its last record a session ends.
        grace: as in `Tumbling`.

    Raises:
        JobError: one of them isn't valid.
    """

    gap: timedelta
    grace: timedelta = _NOTHING

    def __post_init__(self) -> None:
        _check("Session", "gap", self.gap, _MILLISECOND)
        _check("Session", "grace", self.grace, _NOTHING)

    @property
    def gap_ms(self) -> int:
        """The gap in milliseconds."""
        return self.gap // _MILLISECOND

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // _MILLISECOND

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        return {"kind": "session", "gap_ms": self.gap_ms}


Windows = Tumbling | Hopping | Session


@dataclass(frozen=True, slots=True)
class WindowStore:
    """The stores of the open windows of one step.

    Attributes:
        step: the step's name.
        of_sessions: whether the windows are sessions.
    """

    step: str
    of_sessions: bool = False

    @property
    def name(self) -> str:
        """The store of the windows. Names of states contain no slash."""
        return f"{self.step}//{'sessions' if self.of_sessions else 'windows'}"

    @property
    def due_name(self) -> str:
        """The store that finds the sessions that are due."""
        return f"{self.step}//due"

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of all its stores."""
        return (self.name, self.due_name) if self.of_sessions else (self.name,)


class _Days:
    """Windows of whole days in a time zone."""

    def __init__(self, windows: Tumbling) -> None:
        assert windows.timezone is not None
        self._zone = _zone(windows.timezone)
        self._days = windows.size // _DAY
        self._offset = windows.offset
        self._start_ms = self._end_ms = 0
        """The last window that was asked for. The next record is usually in the same one."""

    def ends(self, timestamp_ms: int) -> Sequence[int]:
        """See `EndsOf`."""
        if not self._start_ms <= timestamp_ms < self._end_ms:
            self._look_up(timestamp_ms)
        return (self._end_ms,)

    def start(self, end_ms: int) -> int:
        """When the window with that end begins."""
        self.ends(end_ms - 1)
        return self._start_ms

    def _look_up(self, timestamp_ms: int) -> None:
        local = (_EPOCH + timedelta(milliseconds=timestamp_ms)).astimezone(self._zone)
        day = (local.replace(tzinfo=None) - self._offset).toordinal() - _EPOCH_DAY
        number = day // self._days
        # It is off by one where clocks were changed between that moment and the beginning of the day.
        while self._begin_ms(number) > timestamp_ms:
            number -= 1
        while self._begin_ms(number + 1) <= timestamp_ms:
            number += 1
        self._start_ms, self._end_ms = self._begin_ms(number), self._begin_ms(number + 1)

    def _begin_ms(self, number: int) -> int:
        day = date.fromordinal(_EPOCH_DAY + number * self._days)
        begin = (datetime.combine(day, time()) + self._offset).replace(tzinfo=self._zone)
        return (begin - _EPOCH) // _MILLISECOND


def _check(kind: str, name: str, value: object, least: timedelta) -> None:
    if not isinstance(value, timedelta):
        raise JobError(
            f"{name}={bounded_repr(value)} of {kind} is not a timedelta.",
            remedy=f"Use {name}=timedelta(minutes=1), from Python's datetime.",
        )
    if not least <= value <= DURATION_MAX:
        needed = "zero or more" if not least else "one millisecond or more"
        raise JobError(
            f"{name}={value!r} of {kind} is out of range.", remedy=f"Use {needed}, up to 100 years."
        )
    if value % _MILLISECOND:
        raise JobError(
            f"{name}={value!r} of {kind} is not a whole number of milliseconds.",
            remedy="Timestamps of records are milliseconds: round it.",
        )


def _check_offset(kind: str, offset: object, name: str, below: timedelta) -> None:
    _check(kind, "offset", offset, _NOTHING)
    assert isinstance(offset, timedelta)
    if offset >= below:
        raise JobError(
            f"offset={offset!r} of {kind} is not less than {name}={below!r}.",
            remedy=f"Use offset={offset % below!r}: the windows are the same.",
        )


def _zone(name: object) -> ZoneInfo:
    try:
        return ZoneInfo(cast("str", name))
    except (OSError, TypeError, ValueError, LookupError):  # it depends on what is wrong with the name
        raise JobError(
            f"timezone={bounded_repr(name)} of Tumbling is unknown.",
            remedy="Use a name of the IANA database, such as 'Europe/Berlin'. If the system doesn't have "
            "that database, install the package tzdata.",
        ) from None
