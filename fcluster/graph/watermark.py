"""What a job says of the event time of a topic that it reads: `Watermark`.

Responsible for: its checks. `fcluster.engine.clock` is what it leads to. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr

_DURATION_MS_MAX = 100 * 366 * 24 * 3_600_000


@dataclass(frozen=True, slots=True)
class Watermark:
    """How event time follows from a topic's timestamps.

    Event time is the highest timestamp that a shard has read, less `max_delay_ms`.

    Args:
        max_delay_ms: by how much records may be out of order, in milliseconds. A record that is later than
            that is still processed, but event time has passed it.
        idle_ms: once a partition has had no new record for so long, in milliseconds, nobody waits for it
            any more until it has one. This depends on the wall clock, so another run may decide otherwise.
            None: event time stands as long as one partition has no records.

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
