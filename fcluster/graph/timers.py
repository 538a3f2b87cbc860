"""The timers of a handler: the functions that they call, and the stores that keep them.

Responsible for: what a job file declares (`TimerFunction`), the names of the stores (`TimerStore`), and how a
timer is named in messages and failures. `fcluster.engine.timers` keeps and fires them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TimerClock = Literal["event", "processing"]
"""Event time follows the timestamps of records; processing time is the wall clock."""

TIMER_CLOCKS: tuple[TimerClock, ...] = ("event", "processing")
TIMER_MS_MAX = 2**53
"""The latest time that a timer can have, in milliseconds since 1970."""


@dataclass(frozen=True, slots=True)
class TimerFunction:
    """The function that is called when a timer of this name is due.

    Attributes:
        name: of the timer; unique in its handler.
        function: called as `function(key, ctx)`.
        returns: as in `Process`.
    """

    name: str
    function: Callable[[Any, Any], Any]
    returns: Literal["many", "one"] = "one"


@dataclass(frozen=True, slots=True)
class TimerStore:
    """The stores that keep one handler's timers.

    Attributes:
        handler: the handler's name.
    """

    handler: str

    @property
    def name(self) -> str:
        """The store that finds a timer by key and name. Names of states contain no slash."""
        return f"{self.handler}//timers"

    @property
    def due_name(self) -> str:
        """The store that finds the timers that are due."""
        return f"{self.handler}//due"

    @property
    def store_names(self) -> tuple[str, ...]:
        """The names of all its stores."""
        return (self.name, self.due_name)
