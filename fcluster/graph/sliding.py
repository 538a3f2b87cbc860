"""`Sliding`: windows of records that are close to each other.

Responsible for: the object that a job file creates, and its checks. `fcluster.engine.sliding` keeps the
records of these windows. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fcluster.graph.durations import MILLISECOND, NOTHING, check_duration


@dataclass(frozen=True, slots=True)
class Sliding:
    """Windows that slide along the records of a key, and contain those no further apart than `within`.

    There is a window that ends with each record, and one that begins a millisecond after each record, if
    there are records in it: so each combination of records that are close enough is in one window, once.
    Windows begin in 1970 or later.

    Args:
        within: the greatest time between two records of a window.
        grace: how long a window takes late records after its end. Its result waits for this long.

    Raises:
        JobError: one of them isn't valid.
    """

    within: timedelta
    grace: timedelta = NOTHING

    def __post_init__(self) -> None:
        check_duration("Sliding", "within", self.within, NOTHING)
        check_duration("Sliding", "grace", self.grace, NOTHING)

    @property
    def within_ms(self) -> int:
        """The time in milliseconds."""
        return self.within // MILLISECOND

    @property
    def grace_ms(self) -> int:
        """The grace in milliseconds."""
        return self.grace // MILLISECOND

    def describe(self) -> dict[str, Any]:
        """What distinguishes its windows from others."""
        return {"kind": "sliding", "within_ms": self.within_ms}
