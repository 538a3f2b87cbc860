"""The intervals and stores of joins of two streams.

Responsible for: what `stream.join(stream, within=)` takes for an interval, its checks, and the names of the
stores of a join. `topology.JoinStreams` declares a join, and `engine.pairs` keeps its records. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.durations import DURATION_MAX, MILLISECOND, NOTHING, check_duration

Side = Literal["left", "right"]
How = Literal["inner", "left", "outer"]


@dataclass(frozen=True, slots=True)
class PairStore:
    """The stores of one join.

    Attributes:
        step: the join's name.
    """

    step: str

    @property
    def left_name(self) -> str:
        """The store of the left side's records. Names of states contain no slash."""
        return f"{self.step}//left"

    @property
    def right_name(self) -> str:
        """The store of the right side's records."""
        return f"{self.step}//right"

    @property
    def due_name(self) -> str:
        """The store that finds what is due."""
        return f"{self.step}//due"

    @property
    def grace_name(self) -> str:
        """The store that remembers the grace; see `engine.grace`."""
        return f"{self.step}//grace"

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of the stores that records change."""
        return self.left_name, self.right_name, self.due_name


def interval_ms(name: str, within: object) -> tuple[int, int]:
    """How much earlier and later than a left record its partner may be, in milliseconds. One of both may be
    negative: then partners are only later, or only earlier.

    Args:
        name: of the join, for messages.
        within: one time for both, or a tuple with one for each.

    Raises:
        JobError: it is something else, or no partner could fit.
    """
    parts = cast("tuple[Any, ...]", within) if isinstance(within, tuple) else (within, within)
    if len(parts) != 2:
        raise JobError(
            f"within={bounded_repr(parts)} of the join {name!r} isn't an interval.",
            remedy="Use within=timedelta(minutes=5), or within=(earlier, later) with two of them.",
        )
    least = -DURATION_MAX if isinstance(within, tuple) else NOTHING
    before, after = (duration_ms(name, "within", part, least) for part in parts)
    if before + after < 0:
        raise JobError(
            f"within={bounded_repr(parts)} of the join {name!r} is empty: it ends before it begins.",
            remedy="It is (how much earlier, how much later). A right record 5 to 10 minutes after the "
            "left one is within=(minutes(-5), minutes(10)); before it, within=(minutes(10), minutes(-5)).",
        )
    return before, after


def duration_ms(name: str, what: str, value: object, least: timedelta = NOTHING) -> int:
    """A time in milliseconds.

    Raises:
        JobError: it isn't a timedelta of whole milliseconds, or out of range.
    """
    check_duration(f"the join {name!r}", what, value, least)
    assert isinstance(value, timedelta)
    return value // MILLISECOND
