"""Which phase may follow which: a table next to each enum of phases (invariant 17).

Responsible for: the form of these tables, and the check of one change. The running system doesn't use it:
tests and the simulation check each change of a phase. Must not know any enum. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Generic, TypeVar

_E = TypeVar("_E", bound=Enum)


class Transitions(Generic[_E]):
    """Which phases may follow each phase. A phase may always stay the same.

    Args:
        first: the possible first phases.
        following: for each phase, those that may follow it.

    Raises:
        ValueError: a phase has no row, or can't be reached.
    """

    def __init__(self, first: Iterable[_E], following: Mapping[_E, Iterable[_E]]) -> None:
        self.first = frozenset(first)
        self.following = {phase: frozenset(allowed) for phase, allowed in following.items()}
        kind = type(next(iter(self.first)))
        reached = self.first.union(*self.following.values())
        if any(phase not in self.following or phase not in reached for phase in kind):
            raise ValueError(f"the table of {kind.__qualname__} isn't complete")

    def check(self, before: _E | None, after: _E) -> None:
        """Check a change. `before` is None for the first phase.

        Raises:
            AssertionError: the table doesn't allow it.
        """
        if before is None:
            assert after in self.first, f"begins as {after}"
        else:
            assert after is before or after in self.following[before], f"{after} follows {before}"
