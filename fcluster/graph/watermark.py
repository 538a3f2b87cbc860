"""`Watermark`: how a job declares the event time of a topic.

Responsible for: its checks. `fcluster.engine.clock` applies it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.durations import DURATION_MAX, MILLISECOND, NOTHING, check_duration

_DURATION_MS_MAX = DURATION_MAX // MILLISECOND


@dataclass(frozen=True, slots=True, init=False)
class Watermark:
    """How event time follows from a topic's timestamps.

    Event time is the highest timestamp that a shard has read, minus `max_delay`.

    Args:
        max_delay_ms: `max_delay` as a number of milliseconds.
        idle_ms: `idle` as a number of milliseconds.
        max_drift_ms: `max_drift` as a number of milliseconds.
        max_delay: how far records may be out of order, such as `seconds(5)`. A record that is later is still
            processed, but event time has already passed it. Default: zero.
        idle: if a partition has had no new record for this long, event time no longer waits for it until it
            has one. This depends on the wall clock, so another run may decide differently. Default: event
            time stands still while any partition has no records.
        max_drift: how far the event time of a partition may be ahead of the slowest one. A partition that is
            farther ahead isn't read on until the others have come after, so that what waits for them doesn't
            grow without bound. The slowest is looked for in all topics whose event times meet further on in
            the job. Default: partitions don't wait for each other.

    Raises:
        JobError: one of them is out of range, or given twice.
    """

    max_delay_ms: int
    idle_ms: int | None
    max_drift_ms: int | None

    def __init__(
        self,
        max_delay_ms: int | None = None,
        idle_ms: int | None = None,
        max_drift_ms: int | None = None,
        *,
        max_delay: timedelta | None = None,
        idle: timedelta | None = None,
        max_drift: timedelta | None = None,
    ) -> None:
        if max_delay is not None:
            max_delay_ms = _as_ms("max_delay", max_delay, max_delay_ms, NOTHING)
        if idle is not None:
            idle_ms = _as_ms("idle", idle, idle_ms, MILLISECOND)
        if max_drift is not None:
            max_drift_ms = _as_ms("max_drift", max_drift, max_drift_ms, MILLISECOND)
        if max_delay_ms is None:
            max_delay_ms = 0
        _check("max_delay_ms", max_delay_ms, 0)
        if idle_ms is not None:
            _check("idle_ms", idle_ms, 1)
        if max_drift_ms is not None:
            _check("max_drift_ms", max_drift_ms, 1)
        object.__setattr__(self, "max_delay_ms", max_delay_ms)
        object.__setattr__(self, "idle_ms", idle_ms)
        object.__setattr__(self, "max_drift_ms", max_drift_ms)


def _as_ms(name: str, duration: timedelta, given_ms: int | None, least: timedelta) -> int:
    check_duration("a Watermark", name, duration, least)
    if given_ms is not None:
        raise JobError(f"A Watermark got both {name}= and {name}_ms=.", remedy=f"Give it {name}= alone.")
    return duration // MILLISECOND


def _check(name: str, value: object, least: int) -> None:
    duration = name.removesuffix("_ms")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _DURATION_MS_MAX:
        raise JobError(
            f"{name}={bounded_repr(value)} of a Watermark is not a number of milliseconds.",
            remedy=f"Use a whole number, {least} or more, or {duration}=seconds(5), from fcluster.",
        )
