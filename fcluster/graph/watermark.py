"""`Watermark`: how a job declares the event time of a topic.

Responsible for: its checks. `fcluster.engine.clock` applies it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr

_DURATION_MS_MAX = 100 * 366 * 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class Watermark:
    """How event time follows from a topic's timestamps.

    Event time is the highest timestamp that a shard has read, minus `max_delay_ms`.

    Args:
        max_delay_ms: how far records may be out of order, in milliseconds. A record that is later is still
            processed, but event time has already passed it.
        idle_ms: if a partition has had no new record for this many milliseconds, event time no longer waits
            for it until it has one. This depends on the wall clock, so another run may decide differently.
            None: event time stands still while any partition has no records.

    Raises:
        JobError: one of them is out of range.
    """

    max_delay_ms: int = 0
    idle_ms: int | None = None

    def __post_init__(self) -> None:
        _check("max_delay_ms", self.max_delay_ms, 0)
        if self.idle_ms is not None:
            _check("idle_ms", self.idle_ms, 1)


def _check(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _DURATION_MS_MAX:
        raise JobError(
            f"{name}={bounded_repr(value)} of a Watermark is not a number of milliseconds.",
            remedy=f"Use a whole number, {least} or more.",
        )
