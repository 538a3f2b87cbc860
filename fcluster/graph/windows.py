"""The windows that a job declares: the intervals of event time to which a record belongs.

Responsible for: the objects that a job file creates (`Tumbling`, `Hopping`, `Cumulative`, `Session`), their
checks, which windows a timestamp is in, and their description, which is compared with existing state when a
job has changed. `fcluster.engine` fills and closes them. Pure.

A window is the time from its start up to, but not including, its end, in milliseconds since 1970. It is
identified by its end, because the start follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal, cast
from zoneinfo import ZoneInfo, available_timezones

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.counted import Counted
from fcluster.graph.durations import MILLISECOND, NOTHING, check_duration, shown
from fcluster.graph.sliding import Sliding

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
    grace: timedelta = NOTHING
    offset: timedelta = NOTHING
    timezone: str | None = None

    def __post_init__(self) -> None:
        check_duration("Tumbling", "size", self.size, MILLISECOND)
        check_duration("Tumbling", "grace", self.grace, NOTHING)
        _check_offset("Tumbling", self.offset, "size", self.size)
        _check_timezone("Tumbling", self.timezone, self.size)

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // MILLISECOND

    def ends_of(self) -> EndsOf:
        """Returns the function that says which windows a timestamp is in."""
        if self.timezone is not None:
            days = _Days(self.timezone, self.size, self.offset)
            return lambda timestamp_ms: (days.around(timestamp_ms)[1],)
        size_ms, offset_ms = self.size // MILLISECOND, self.offset // MILLISECOND
        return lambda timestamp_ms: (timestamp_ms - (timestamp_ms - offset_ms) % size_ms + size_ms,)

    def start_of(self) -> Callable[[int], int]:
        """Returns the function that says when the window with that end begins."""
        if self.timezone is not None:
            days = _Days(self.timezone, self.size, self.offset)
            return lambda end_ms: days.around(end_ms - 1)[0]
        size_ms = self.size // MILLISECOND
        return lambda end_ms: end_ms - size_ms

    def describe(self) -> dict[str, Any]:
        """What distinguishes its windows from others. How long they take late records may change."""
        described: dict[str, Any] = {"kind": "tumbling", "size_ms": self.size // MILLISECOND}
        if self.offset:
            described["offset_ms"] = self.offset // MILLISECOND
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
    grace: timedelta = NOTHING
    offset: timedelta = NOTHING

    def __post_init__(self) -> None:
        check_duration("Hopping", "size", self.size, MILLISECOND)
        check_duration("Hopping", "every", self.every, MILLISECOND)
        check_duration("Hopping", "grace", self.grace, NOTHING)
        _check_offset("Hopping", self.offset, "every", self.every)
        if self.every > self.size:
            raise JobError(
                f"Hopping has every={shown(self.every)}, which is more than size={shown(self.size)}: records "
                "between two windows would be in none.",
                remedy="Make the windows longer, or let them begin more often.",
            )

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // MILLISECOND

    def ends_of(self) -> EndsOf:
        """As in `Tumbling`."""
        size_ms, every_ms = self.size // MILLISECOND, self.every // MILLISECOND
        offset_ms = self.offset // MILLISECOND

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
        size_ms = self.size // MILLISECOND
        return lambda end_ms: end_ms - size_ms

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        described: dict[str, Any] = {
            "kind": "hopping",
            "size_ms": self.size // MILLISECOND,
            "every_ms": self.every // MILLISECOND,
        }
        if self.offset:
            described["offset_ms"] = self.offset // MILLISECOND
        return described


@dataclass(frozen=True, slots=True)
class Cumulative:
    """Windows that begin together and grow: each is one step longer than the one before, up to `size`.

    Each result is that of the time since the start, such as the sales of the day up to each full hour. A
    record is in the window of its step, and in all longer ones.

    Args:
        size: the length of the longest window. The next ones begin at its end.
        every: by how much each window is longer than the one before. `size` is a multiple of it.
        grace, offset, timezone: as in `Tumbling`. On days when clocks change, there is a window more or less
            for each hour.

    Raises:
        JobError: one of them isn't valid.
    """

    size: timedelta
    every: timedelta
    grace: timedelta = NOTHING
    offset: timedelta = NOTHING
    timezone: str | None = None

    def __post_init__(self) -> None:
        check_duration("Cumulative", "size", self.size, MILLISECOND)
        check_duration("Cumulative", "every", self.every, MILLISECOND)
        check_duration("Cumulative", "grace", self.grace, NOTHING)
        _check_offset("Cumulative", self.offset, "size", self.size)
        _check_timezone("Cumulative", self.timezone, self.size)
        if self.size % self.every:
            raise JobError(
                f"Cumulative has size={shown(self.size)}, which isn't a multiple of "
                f"every={shown(self.every)}.",
                remedy="Choose a step that fits: the last window ends where the next ones begin.",
            )

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // MILLISECOND

    def ends_of(self) -> EndsOf:
        """As in `Tumbling`."""
        around, every_ms = self._around(), self.every // MILLISECOND

        def ends(timestamp_ms: int) -> Sequence[int]:
            start_ms, end_ms = around(timestamp_ms)
            first_ms = timestamp_ms - (timestamp_ms - start_ms) % every_ms + every_ms
            if (end_ms - first_ms) % every_ms:  # the clocks were changed by less than a step
                return (*range(first_ms, end_ms, every_ms), end_ms)
            return range(first_ms, end_ms + 1, every_ms)

        return ends

    def start_of(self) -> Callable[[int], int]:
        """As in `Tumbling`."""
        around = self._around()
        return lambda end_ms: around(end_ms - 1)[0]

    def _around(self) -> Callable[[int], tuple[int, int]]:
        """The function that returns start and end of the longest window that a timestamp is in."""
        if self.timezone is not None:
            return _Days(self.timezone, self.size, self.offset).around
        size_ms, offset_ms = self.size // MILLISECOND, self.offset // MILLISECOND

        def around(timestamp_ms: int) -> tuple[int, int]:
            start_ms = timestamp_ms - (timestamp_ms - offset_ms) % size_ms
            return start_ms, start_ms + size_ms

        return around

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        described: dict[str, Any] = {
            "kind": "cumulative",
            "size_ms": self.size // MILLISECOND,
            "every_ms": self.every // MILLISECOND,
        }
        if self.offset:
            described["offset_ms"] = self.offset // MILLISECOND
        if self.timezone is not None:
            described["timezone"] = self.timezone
        return described


@dataclass(frozen=True, slots=True)
class Gathered:
    """The windows in which the results of another step are gathered. Not for job files.

    A result of that step is in the window that it is of. If results are passed on when windows close, it has
    the last millisecond of its window as its timestamp; otherwise it has another one.

    Args:
        windows: those of the other step.
    """

    windows: Tumbling | Hopping | Cumulative

    @property
    def grace_ms(self) -> int:
        """None: results that come from behind a repartition are never late."""
        return 0

    def ends_of(self) -> EndsOf:
        """As in `Tumbling`."""
        return lambda timestamp_ms: (timestamp_ms + 1,)

    def start_of(self) -> Callable[[int], int]:
        """As in `Tumbling`."""
        return self.windows.start_of()

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        return self.windows.describe()


@dataclass(frozen=True, slots=True)
class Session:
    """Windows of records that follow each other closely.

    A session begins with its first record, and ends `gap` after its last one. A record exactly then belongs
    to it. A record that is `gap` or less away from two sessions joins them into one. So the aggregates must
    be mergeable.

    Args:
        gap: how long after its last record a session ends.
        grace: as in `Tumbling`.

    Raises:
        JobError: one of them isn't valid.
    """

    gap: timedelta
    grace: timedelta = NOTHING

    def __post_init__(self) -> None:
        check_duration("Session", "gap", self.gap, MILLISECOND)
        check_duration("Session", "grace", self.grace, NOTHING)

    @property
    def gap_ms(self) -> int:
        """The gap in milliseconds."""
        return self.gap // MILLISECOND

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // MILLISECOND

    def describe(self) -> dict[str, Any]:
        """As in `Tumbling`."""
        return {"kind": "session", "gap_ms": self.gap_ms}


Sized = Tumbling | Hopping | Cumulative
"""Those of a job file whose place in time is known beforehand."""
InTime = Sized | Gathered
Windows = InTime | Session | Sliding | Counted
StoreKind = Literal["windows", "sessions", "sliding", "counted"]


@dataclass(frozen=True, slots=True)
class WindowStore:
    """The stores of the open windows of one step.

    Attributes:
        step: the step's name.
        kind: what is in them.
        at_intervals: whether results are passed on at intervals.
        in_processing_time: whether windows close in processing time.
    """

    step: str
    kind: StoreKind = "windows"
    at_intervals: bool = False
    in_processing_time: bool = False

    @property
    def name(self) -> str:
        """The store of the windows. Names of states contain no slash."""
        return f"{self.step}//{self.kind}"

    @property
    def has_notes(self) -> bool:
        """Whether there is another store, which finds what is due."""
        return self.kind in ("sessions", "sliding") or (self.at_intervals and self.kind == "windows")

    @property
    def due_name(self) -> str:
        """The store that finds what is due."""
        return f"{self.step}//due"

    @property
    def notes_name(self) -> str:
        """The store that finds the results that are passed on at an interval."""
        return self.due_name if self.kind == "windows" else f"{self.step}//results"

    @property
    def grace_name(self) -> str:
        """The store that remembers the grace; see `engine.grace`."""
        return f"{self.step}//grace"

    @property
    def clock_name(self) -> str:
        """The store that keeps up to when windows have closed in processing time."""
        return f"{self.step}//clock"

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of the stores that records change."""
        names = (self.name, self.due_name) if self.has_notes else (self.name,)
        if self.at_intervals and self.kind != "windows":
            names = (*names, self.notes_name)
        return (*names, self.clock_name) if self.in_processing_time else names


class _Days:
    """Windows of whole days in a time zone."""

    def __init__(self, timezone: str, size: timedelta, offset: timedelta) -> None:
        self._zone = _zone("", timezone)
        self._days = size // _DAY
        self._offset = offset
        self._start_ms = self._end_ms = 0
        """The last window that was asked for. The next record is usually in the same one."""

    def around(self, timestamp_ms: int) -> tuple[int, int]:
        """Start and end of the window that the timestamp is in.

        Raises:
            ValueError: it is beyond the calendar.
        """
        if not self._start_ms <= timestamp_ms < self._end_ms:
            try:
                self._look_up(timestamp_ms)
            except (OverflowError, ValueError):  # it depends on how far it is
                raise ValueError(
                    f"the timestamp {timestamp_ms} is after the year 9999, so it is on no day of a calendar; "
                    "timestamps are milliseconds since 1970, not microseconds or nanoseconds"
                ) from None
        return self._start_ms, self._end_ms

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
        return (begin - _EPOCH) // MILLISECOND


def _check_offset(kind: str, offset: object, name: str, below: timedelta) -> None:
    check_duration(kind, "offset", offset, NOTHING)
    assert isinstance(offset, timedelta)
    if offset >= below:
        raise JobError(
            f"offset={shown(offset)} of {kind} is not less than {name}={shown(below)}.",
            remedy=f"Use an offset of {shown(offset % below)}: the windows are the same.",
        )


def _check_timezone(kind: str, timezone: str | None, size: timedelta) -> None:
    if timezone is None:
        return
    _zone(kind, timezone)
    if size % _DAY:
        raise JobError(
            f"{kind} has timezone={timezone!r}, but size={shown(size)} isn't a number of days.",
            remedy="Use timedelta(days=1), or leave out the time zone.",
        )


def _zone(kind: str, name: object) -> ZoneInfo:
    try:
        return ZoneInfo(cast("str", name))
    except (OSError, TypeError, ValueError, LookupError):  # it depends on what is wrong with the name
        meant = name.key if isinstance(name, ZoneInfo) else _zone_named_like(name)
        raise JobError(
            f"timezone={bounded_repr(name)} of {kind} is unknown.",
            remedy=f"Did you mean {meant!r}?"
            if meant
            else "Use a name of the IANA database, such as 'Europe/Berlin'. If the system doesn't have that "
            "database, install the package tzdata.",
        ) from None


def _zone_named_like(name: object) -> str | None:
    """A time zone with this name in another case, or of the city with this name."""
    wanted = str(name).lower()
    known = sorted(available_timezones())
    return next((one for one in known if wanted in (one.lower(), one.lower().rpartition("/")[2])), None)
