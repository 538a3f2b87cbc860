"""The timers of one handler in one shard: setting, moving, cancelling and finding them.

Responsible for: `HandlerTimers`, over the two tables that `kinds.make_timer_tables` makes; what handlers get
as `ctx.timer`. `firing` decides when timers fire, and calls their functions. Pure.

Invariants kept:
- There is at most one timer of a key and name. It is an entry of both tables, or of none.
- The first timer that is due is found by a range scan over all layers, so it doesn't depend on where barriers
  fell, or on what was written to the store.
- Timers come in the order of time, then of the key's bytes, then of the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, cast

from fcluster.common.failures import bounded_repr, type_of
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.ordered_keys import (
    TIME_BYTES,
    decode_time,
    encode_time,
    end_of_prefix,
    ended,
    group_of_key,
    take_ended,
)
from fcluster.engine.steps import RecordError
from fcluster.graph.timers import TIMER_CLOCKS, TIMER_MS_MAX, TimerClock, TimerFunction
from fcluster.graph.topology import Process

NEVER_MS: Final = 2**63
TIMER_STEP: Final = "timer "
"""The name of the step of a timer begins with this; no other does."""
_BYTE_OF: Final[Mapping[TimerClock, bytes]] = {"event": b"e", "processing": b"p"}
_KEY_AT: Final = 1 + TIME_BYTES


class Timer(NamedTuple):
    """A timer that is set. In the order in which they fire."""

    at_ms: int
    key: bytes
    name: str


class HandlerTimers:
    """The timers of a handler.

    Args:
        process: the handler.
        tables: of the shard, by the name of the store.
        noted: called with the clock and time of each timer that is set.
        wall_ms: processing time.
    """

    def __init__(
        self,
        process: Process,
        tables: Mapping[str, Any],
        noted: Callable[[TimerClock, int], None],
        wall_ms: Callable[[], int],
    ) -> None:
        store = process.timer_store
        assert store is not None
        self.handler = process.name
        self.functions: Mapping[str, TimerFunction] = {timer.name: timer for timer in process.timers}
        self.wall_ms: Callable[[], int] = wall_ms
        self._timers = cast("EntryTable", tables[store.name])
        self._due = cast("EntryTable", tables[store.due_name])
        self._noted = noted
        # There is no timer of an earlier time: a search from the beginning would have to pass all those that
        # RocksDB has as deleted.
        self._begin_ms: dict[TimerClock, int] = dict.fromkeys(TIMER_CLOCKS, 0)

    def set(self, key: bytes | None, name: str, at_ms: int, clock: TimerClock) -> None:
        """Set the timer of that key and name, or move it; see `HandlerContext.timer`."""
        self._check_name(name)
        if clock not in _BYTE_OF:
            raise ValueError(f"clock={bounded_repr(clock)} of a timer; it takes 'event' or 'processing'")
        if not isinstance(at_ms, int):  # pyright: ignore[reportUnnecessaryIsInstance]  a user's
            raise TypeError(
                f"at={bounded_repr(at_ms)} of a timer is a {type_of(at_ms)}; "
                "it takes milliseconds since 1970 as an int"
            )
        if not 0 <= at_ms <= TIMER_MS_MAX:
            raise ValueError(f"at={at_ms} of a timer is out of range; it takes milliseconds since 1970")
        self.put(clock, Timer(int(at_ms), _checked(key), name))

    def cancel(self, key: bytes | None, name: str) -> None:
        """Remove the timer of that key and name, if it is set."""
        self._check_name(name)
        self.remove(_checked(key), name)

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """Set it. Another one of that key and name is gone."""
        self.remove(timer.key, timer.name)
        when = _BYTE_OF[clock] + encode_time(timer.at_ms)
        self._timers.put(group_of_key(timer.key) + timer.name.encode(), when)
        self._due.put_new(when + ended(timer.key) + timer.name.encode(), b"")
        self._begin_ms[clock] = min(self._begin_ms[clock], timer.at_ms)
        self._noted(clock, timer.at_ms)

    def remove(self, key: bytes, name: str) -> None:
        """Remove the timer of that key and name, if it is set."""
        entry = group_of_key(key) + name.encode()
        when = self._timers.get(entry)
        if when is not ABSENT:
            self._timers.delete(entry)
            self._due.delete(when + ended(key) + name.encode())

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """Remove a timer that `first` gave."""
        when = _BYTE_OF[clock] + encode_time(timer.at_ms)
        self._due.delete(when + ended(timer.key) + timer.name.encode())
        self._timers.delete(group_of_key(timer.key) + timer.name.encode())

    def first(self, clock: TimerClock) -> Timer | None:
        """The timer of that clock that fires next. Not within a record that may still be taken back."""
        prefix = _BYTE_OF[clock]
        begin = prefix + encode_time(self._begin_ms[clock])
        for due, _ in self._due.scan(begin, end_of_prefix(prefix)):
            key, name_at = take_ended(due, _KEY_AT)
            timer = Timer(decode_time(due[1:_KEY_AT]), key, due[name_at:].decode())
            self._begin_ms[clock] = timer.at_ms
            return timer
        self._begin_ms[clock] = NEVER_MS - 1
        return None

    def pending(self, key: bytes) -> dict[str, tuple[TimerClock, int]]:
        """The timers of a key that are set, by name: their clock and time."""
        found: dict[str, tuple[TimerClock, int]] = {}
        for name in self.functions:
            when = self._timers.get(group_of_key(key) + name.encode())
            if when is not ABSENT:
                clock: TimerClock = "event" if when[:1] == _BYTE_OF["event"] else "processing"
                found[name] = (clock, decode_time(when[1:]))
        return found

    def _check_name(self, name: object) -> None:
        if name not in self.functions:
            raise LookupError(
                f"the handler {self.handler!r} has no timer {bounded_repr(name)}; "
                f"declare it with @{self.handler}.on_timer(name)"
            )


def timer_title(handler: str, timer: Timer) -> str:
    """Which timer, for messages. It is also the name of its step, and no other timer's while it is set."""
    return (
        f"{TIMER_STEP}{timer.name!r} of the handler {handler!r} for the key {bounded_repr(timer.key)} at "
        f"{_time_text(timer.at_ms)}"
    )


def _time_text(time_ms: int) -> str:
    try:
        whole = datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError):
        return f"{time_ms} ms"
    return f"{whole}.{time_ms % 1000:03}Z"


def _checked(key: bytes | None) -> bytes:
    if key is None:
        raise RecordError("the record has no key, so it has no timers; give it one with key_by() first")
    return key
