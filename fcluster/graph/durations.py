"""The durations in a job file: short names for them, and their checks. Pure."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr

DURATION_MAX: Final = timedelta(days=100 * 366)
NOTHING: Final = timedelta()
MILLISECOND: Final = timedelta(milliseconds=1)


def milliseconds(number: float) -> timedelta:
    """A duration, as `timedelta(milliseconds=number)`."""
    return _made("milliseconds", number)


def seconds(number: float) -> timedelta:
    """A duration, as `timedelta(seconds=number)`."""
    return _made("seconds", number)


def minutes(number: float) -> timedelta:
    """A duration, as `timedelta(minutes=number)`."""
    return _made("minutes", number)


def hours(number: float) -> timedelta:
    """A duration, as `timedelta(hours=number)`."""
    return _made("hours", number)


def days(number: float) -> timedelta:
    """A duration of 24 hours each, as `timedelta(days=number)`."""
    return _made("days", number)


def _made(unit: str, number: float) -> timedelta:
    try:
        return timedelta(**{unit: number})
    except (TypeError, ValueError, OverflowError):
        raise JobError(
            f"{unit}({bounded_repr(number)}) is not a duration.", remedy=f"Use a number, such as {unit}(5)."
        ) from None


_UNITS: Final = (
    ("d", 86_400_000_000),
    ("h", 3_600_000_000),
    ("min", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1_000),
    ("us", 1),
)
"""In microseconds."""


def shown(duration: timedelta) -> str:
    """A duration as people write it, such as ``1 min 30 s``. It is exact."""
    if not duration:
        return "0 s"
    parts, left_us = list[str](), abs(duration // timedelta(microseconds=1))
    for name, unit_us in _UNITS:
        number, left_us = divmod(left_us, unit_us)
        if number:
            parts.append(f"{number} {name}")
    return f"{'-' if duration < NOTHING else ''}{' '.join(parts)}"


def check_duration(kind: str, name: str, value: object, least: timedelta) -> None:
    """Check the argument `name` of something of that kind: of windows, or of a join.

    Raises:
        JobError: it isn't a timedelta of whole milliseconds, from `least` to 100 years.
    """
    if not isinstance(value, timedelta):
        raise JobError(
            f"{name}={bounded_repr(value)} of {kind} is not a timedelta.",
            remedy=f"Use {name}=minutes(1), from fcluster, or a timedelta.",
        )
    if not least <= value <= DURATION_MAX:
        needed = {NOTHING: "zero or more", -DURATION_MAX: "whole milliseconds"}.get(
            least, "one millisecond or more"
        )
        raise JobError(
            f"{name}={shown(value)} of {kind} is out of range.", remedy=f"Use {needed}, up to 100 years."
        )
    if value % MILLISECOND:
        raise JobError(
            f"{name}={shown(value)} of {kind} is not a whole number of milliseconds.",
            remedy="Timestamps of records are milliseconds: round it.",
        )
