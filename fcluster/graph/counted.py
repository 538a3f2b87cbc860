"""`Counted`: windows of a number of records.

Responsible for: the object that a job file creates, and its checks. `fcluster.engine.operators.counted` fills
these windows. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr

RECORDS_MAX = 1_000_000
OVERLAPPING_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Counted:
    """Windows of so many records of a key each, in the order in which they are processed.

    Time plays no part in them: a window closes with its last record, and none is late. A window that never
    gets all its records stays open.

    Args:
        size: how many records are in a window.
        every: after how many records the next window begins, at most `size`. Default: `size`, so that each
            record is in one window. With less, windows overlap.

    Raises:
        JobError: one of them isn't valid.
    """

    size: int
    every: int | None = None

    def __post_init__(self) -> None:
        _check("size", self.size, RECORDS_MAX)
        if self.every is not None:
            _check("every", self.every, self.size)
        if self.size > self.step * OVERLAPPING_MAX:
            raise JobError(
                f"With size={self.size} and every={self.every} of Counted, each record is in "
                f"{-(-self.size // self.step)} windows; {OVERLAPPING_MAX} are possible.",
                remedy="Let windows begin less often, or make them smaller.",
            )

    @property
    def step(self) -> int:
        """After how many records the next window begins."""
        return self.size if self.every is None else self.every

    @property
    def grace_ms(self) -> int:
        """They wait for nothing."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What distinguishes its windows from others."""
        return {"kind": "counted", "size": self.size, "every": self.step}


def _check(name: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise JobError(
            f"{name}={bounded_repr(value)} of Counted is not a possible number of records.",
            remedy=f"Use a whole number from 1 to {most}.",
        )
