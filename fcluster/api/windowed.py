"""Windows of a stream: what `Stream.window` takes, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, cast

from fcluster.api.call_hints import hints_at_calls
from fcluster.api.checks import check_name, given
from fcluster.api.nodes import KeyBy
from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr
from fcluster.graph.aggregates import WITHDRAWN, Aggregate, check_aggregates, gathered, parted
from fcluster.graph.counted import Counted
from fcluster.graph.durations import MILLISECOND, check_duration, shown
from fcluster.graph.generics import K_co, V_co
from fcluster.graph.operators import Window
from fcluster.graph.timers import TIMER_CLOCKS
from fcluster.graph.windows import Gathered, Session, Sized, Windows

if TYPE_CHECKING:
    from fcluster.api.streams import Stream


@hints_at_calls
class WindowedStream(Generic[K_co, V_co]):
    """The records of each key, in windows. `Stream.window` gives it."""

    __slots__ = ("_then", "_window")

    def __init__(self, then: Callable[[Window], Stream[Any, Any]], window: Window) -> None:
        self._then = then
        self._window = window

    def aggregate(self, /, **fields: Aggregate[Any, V_co]) -> Stream[K_co, dict[str, Any]]:
        """Compute these aggregates of each window, and pass on its result.

        A result is a dict with "key", "start" and "end" (in milliseconds since 1970; the end isn't in the
        window any more), and the fields. The record of a window that has closed has the key of the window's
        records, and as its timestamp the last millisecond of the window.

        Args:
            fields: such as `n=count(), total=sum_(lambda order: order["amount"])`.

        Raises:
            JobError: there are none, one isn't an aggregate, or its name is taken.
        """
        window = self._window
        of_sessions = isinstance(window.windows, Session)
        merged = "two sessions may become one" if of_sessions else ""
        taken = (WITHDRAWN,) if of_sessions and window.emit != "close" else ()
        checked = check_aggregates(window.name, fields, merged=merged, taken=taken)
        return self._then(replace(self._window, fields=checked))


@hints_at_calls
class GatheredStream(Generic[V_co]):
    """All records of a stream, in windows. `Stream.window_all` gives it."""

    __slots__ = ("_then", "_window")

    def __init__(self, then: Callable[[Sequence[Window | KeyBy]], Stream[Any, Any]], window: Window) -> None:
        self._then = then
        self._window = window

    def aggregate(self, /, **fields: Aggregate[Any, V_co]) -> Stream[Any, dict[str, Any]]:
        """Compute these aggregates of each window, and pass on its result.

        A result is a dict with "start" and "end" (in milliseconds since 1970; the end isn't in the window any
        more), and the fields. Its record has no key, and as its timestamp the last millisecond of the window.

        Args:
            fields: such as `n=count(), total=sum_(lambda order: order["amount"])`.

        Raises:
            JobError: there are none, one isn't an aggregate or has no `merge`, or its name is taken.
        """
        whole = self._window
        if whole.clock == "processing":
            # Nobody could tell when the parts of all shards have come.
            together = KeyBy(all_together, None, "text", None, whole.on_error, "1")
            return self._then((together, replace(whole, fields=check_aggregates(whole.name, fields))))
        checked = check_aggregates(whole.name, fields, merged="it is computed in parts, one for each shard")
        part = replace(whole, name=f"{whole.name}-parts", fields=parted(checked))
        together = KeyBy(all_together, None, "text", "json", whole.on_error, "1")
        windows = Gathered(cast("Sized", whole.windows))
        gathering = replace(whole, windows=windows, fields=gathered(checked), late=None)
        return self._then((part, together, gathering))


def all_together(_part: Any) -> str:
    """The key of all parts of a window: one shard gathers them."""
    return "all"


def check_all_windows(windows: object, name: object, late: object, emit: object, clock: object) -> None:
    """Check the arguments of `Stream.window_all`.

    Raises:
        JobError: one of them is wrong.
    """
    check_name(name, "The window name", " with name=")  # type: ignore[arg-type]
    if not isinstance(windows, Sized):
        raise JobError(
            f"window_all() got {bounded_repr(windows)}. It takes Tumbling, Hopping and Cumulative windows, "
            "which can be computed in parts.",
            remedy="Put all records into one shard: .key_by(lambda value: 'all').window(...).",
        )
    _check_emit(name, emit)
    _check_clock(windows, name, late, clock)


def check_windows(windows: object, name: object, late: object, emit: object, clock: object) -> None:
    """Check the arguments of `Stream.window`.

    Raises:
        JobError: one of them is wrong, or they don't go together.
    """
    check_name(name, "The window name", " with name=")  # type: ignore[arg-type]
    if not isinstance(windows, Windows) or isinstance(windows, Gathered):
        raise JobError(
            f"window() got {given(windows)}, which says nothing of windows.",
            remedy="Use Tumbling(timedelta(minutes=1)), Hopping(...), Session(...) and so on, from fcluster.",
        )
    _check_emit(name, emit)
    if late is not None and isinstance(windows, Counted):
        raise JobError(
            f"late= of the window {name!r} doesn't go with Counted: no record is late for such windows.",
            remedy="Leave it out.",
        )
    _check_clock(windows, name, late, clock)


def emitting(window: Window, emit: Literal["close", "update"] | timedelta) -> Window:
    """The window, passing its results on when `emit` says."""
    if isinstance(emit, timedelta):
        return replace(window, emit="interval", interval_ms=emit // MILLISECOND)
    return replace(window, emit=emit)


def _check_emit(name: object, emit: object) -> None:
    if isinstance(emit, timedelta):
        check_duration(f"the window {name!r}", "emit", emit, MILLISECOND)
    elif emit not in ("close", "update"):
        raise JobError(
            f"emit={bounded_repr(emit)} of the window {name!r} is unknown.",
            remedy="Use emit='close', emit='update', or an interval such as emit=timedelta(seconds=10).",
        )


def _check_clock(windows: Windows, name: object, late: object, clock: object) -> None:
    """Check by which clock the windows are, and whether the rest goes with it."""
    if clock not in TIMER_CLOCKS:
        raise JobError(
            f"clock={bounded_repr(clock)} of the window {name!r} is unknown.",
            remedy="Use clock='event', the time of the records, or clock='processing', that of the host.",
        )
    if clock == "event":
        return
    what = f"clock='processing' of the window {name!r} doesn't go with"
    if isinstance(windows, Counted):
        raise JobError(
            f"{what} Counted: such windows close with their last record, whatever the time is.",
            remedy="Leave it out.",
        )
    grace = windows.grace_ms * MILLISECOND
    given_late = "late=" if late is not None else f"grace={shown(grace)}" if grace else ""
    if given_late:
        raise JobError(
            f"{what} {given_late}: a record is in the windows of the time at which it is processed, so none "
            "is late.",
            remedy=f"Leave out {given_late.partition('=')[0]}=, or clock=.",
        )
