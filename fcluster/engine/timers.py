"""The timers of one handler in one shard: setting, moving, cancelling and finding them.

Responsible for: `HandlerTimers`, which uses the two tables that `kinds.make_timer_tables` makes. It
implements `ctx.timer`. `firing` decides when timers fire, and calls their functions. Pure.

Invariants:
- A key has at most one timer of each name. A timer is an entry of both tables, or of neither.
- The first timer that is due is found by a range scan over all layers, so it doesn't depend on where barriers
  fell, or on what was written to the store.
- Timers are sorted by time, then by the key's bytes, then by name.
- How many are set is an entry, too, so nobody has to count them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, cast

from fcluster.common.failures import bounded_repr, type_of
from fcluster.engine.entries import ABSENT, EntryTable
from fcluster.engine.failure import TIMER_STEP
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
from fcluster.graph.operators import Process
from fcluster.graph.timers import TIMER_CLOCKS, TIMER_MS_MAX, TimerClock, TimerFunction

NEVER_MS: Final = 2**63
_BYTE_OF: Final[Mapping[TimerClock, bytes]] = {"event": b"e", "processing": b"p"}
READ_AHEAD_TIMERS: Final = 64
_KEY_AT: Final = 1 + TIME_BYTES
_COUNT: Final = b""
"""Where it is kept how many timers are set; all other keys of that table are longer. No entry: none is."""


class Timer(NamedTuple):
    """A timer that is set. Sorted in the order in which they fire."""

    at_ms: int
    key: bytes
    name: str


class ReadAhead:
    """The next timers of one clock, read ahead, so that not every timer takes a scan.

    All timers up to the last one that was read are here, in order. Some may no longer be set. A scan
    continues after that one: from the beginning, it would have to skip all timers that RocksDB holds as
    deleted.

    Args:
        start, stop: of the range of keys that stand for them.
        encode: the key of a timer. Keys are in the order of the timers.
        decode: the timer of a key.

    Attributes:
        timers: in the order in which they fire.
        is_all: whether there are no others.
    """

    def __init__(
        self, start: bytes, stop: bytes, encode: Callable[[Timer], bytes], decode: Callable[[bytes], Timer]
    ) -> None:
        self.timers: list[Timer] = []
        self.is_all = False
        self._end = stop
        self._encode = encode
        self._decode = decode
        self._read_until = start
        self._last: Timer | None = None

    def first(self, due: EntryTable, is_due: Callable[[Timer], bool]) -> Timer | None:
        """The next timer that is still set. Don't call it within a record that may still be undone.

        Args:
            due: the table of the keys that stand for timers.
            is_due: whether a timer is still set. It may have fired, or been moved, cancelled or undone. The
                function may set others.
        """
        while True:
            while self.timers:
                timer = self.timers[0]
                if is_due(timer):
                    return timer
                if self.timers[0] is timer:  # none that was just set comes before it
                    del self.timers[0]
            if self.is_all:
                return None
            self.read(due)

    def add(self, timer: Timer) -> None:
        """Note a timer that was set."""
        if not self.is_all and (self._last is None or timer > self._last):
            return
        at = bisect_left(self.timers, timer)
        if at == len(self.timers) or self.timers[at] != timer:
            self.timers.insert(at, timer)
        if len(self.timers) > 2 * READ_AHEAD_TIMERS:
            del self.timers[READ_AHEAD_TIMERS:]
            self._go_on_behind(self.timers[-1])

    def read(self, due: EntryTable) -> None:
        """Read the next ones. Don't call it within a record that may still be undone."""
        scan = due.scan(self._read_until, self._end)
        found = [self._decode(key) for key, _ in islice(scan, READ_AHEAD_TIMERS)]
        self.timers += found
        self.is_all = len(found) < READ_AHEAD_TIMERS
        if not self.is_all:
            self._go_on_behind(found[-1])

    def _go_on_behind(self, timer: Timer) -> None:
        self.is_all = False
        self._last = timer
        self._read_until = self._encode(timer) + b"\x00"


class HandlerTimers:
    """The timers of a handler.

    Args:
        process: the handler.
        tables: the shard's tables, by the name of the store.
        noted: called with the clock and time of each timer that is set.
        event_ms: returns the event time; None before the first record.
        wall_ms: returns the processing time.
        event_ended: returns whether event time has ended.

    Attributes:
        firing: the clock and time of the timer whose function is being called.
    """

    def __init__(
        self,
        process: Process,
        tables: Mapping[str, Any],
        noted: Callable[[TimerClock, int], None],
        event_ms: Callable[[], int | None],
        wall_ms: Callable[[], int],
        event_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        store = process.timer_store
        assert store is not None
        self.handler = process.name
        self.functions: Mapping[str, TimerFunction] = {timer.name: timer for timer in process.timers}
        self.wall_ms: Callable[[], int] = wall_ms
        self.firing: tuple[TimerClock, int] | None = None
        self._now_of: dict[TimerClock, Callable[[], int | None]] = {"event": event_ms, "processing": wall_ms}
        self._timers = cast("EntryTable", tables[store.name])
        self._due = cast("EntryTable", tables[store.due_name])
        self._noted = noted
        self._event_ended = event_ended
        self._ahead = {clock: _read_ahead(_BYTE_OF[clock]) for clock in TIMER_CLOCKS}

    def set(self, key: bytes | None, name: str, at_ms: int, clock: TimerClock) -> None:
        """Set the timer of that key and name. If it is already set, it gets the new time. See
        `HandlerContext.timer`.
        """
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
        at_ms = int(at_ms)
        if self.firing is not None:
            if clock == "event" and self._event_ended():
                _checked(key)
                return  # there is no time to wait for any more
            at_ms = self._set_by_timer(at_ms, clock, *self.firing)
        self.put(clock, Timer(at_ms, _checked(key), name))

    def _set_by_timer(self, at_ms: int, clock: TimerClock, its_clock: TimerClock, its_ms: int) -> int:
        """When a timer is due that a timer sets. If that is no progress, it waits until its clock moves on:
        otherwise it would fire again and again, and no record would be processed any more.
        """
        now_ms = self._now_of[clock]()
        is_later = at_ms > (its_ms if clock == its_clock else (-1 if now_ms is None else now_ms))
        return at_ms if is_later or now_ms is None else min(now_ms + 1, TIMER_MS_MAX)

    def cancel(self, key: bytes | None, name: str) -> None:
        """Remove the timer of that key and name, if it is set."""
        self._check_name(name)
        self.remove(_checked(key), name)

    def put(self, clock: TimerClock, timer: Timer) -> None:
        """Set it. It replaces a timer with the same key and name."""
        if not self._drop(timer.key, timer.name):
            self._change_count(1)
        when = _BYTE_OF[clock] + encode_time(timer.at_ms)
        self._timers.put(group_of_key(timer.key) + timer.name.encode(), when)
        self._due.put_new(when + ended(timer.key) + timer.name.encode(), b"")
        self._ahead[clock].add(timer)
        self._noted(clock, timer.at_ms)

    def remove(self, key: bytes, name: str) -> None:
        """Remove the timer of that key and name, if it is set."""
        if self._drop(key, name):
            self._change_count(-1)

    def _drop(self, key: bytes, name: str) -> bool:
        """Remove it. Returns whether it was set."""
        entry = group_of_key(key) + name.encode()
        when = self._timers.get(entry)
        if when is ABSENT:
            return False
        self._timers.delete(entry)
        self._due.delete(when + ended(key) + name.encode())
        return True

    @property
    def count(self) -> int:
        """How many are set."""
        raw = self._timers.get(_COUNT)
        return 0 if raw is ABSENT else decode_time(raw)

    def _change_count(self, by: int) -> None:
        count = self.count + by
        if count > 0:
            self._timers.put(_COUNT, encode_time(count))
        else:
            self._timers.delete(_COUNT)

    def take(self, clock: TimerClock, timer: Timer) -> None:
        """Remove a timer that `first` returned."""
        self._due.delete(_due_key(_BYTE_OF[clock], timer))
        self._timers.delete(group_of_key(timer.key) + timer.name.encode())
        self._change_count(-1)

    def skipped(self, timer: Timer) -> None:
        """See `firing.TimedStep`: it is gone already."""

    def title(self, timer: Timer) -> str:
        """See `firing.TimedStep`."""
        return timer_title(self.handler, timer)

    def timestamp_ms(self, timer: Timer) -> int:
        """See `firing.TimedStep`."""
        return timer.at_ms

    def first(self, clock: TimerClock) -> Timer | None:
        """The timer of that clock that fires next. Don't call it within a record that may still be undone."""

        def is_due(timer: Timer) -> bool:
            when = _BYTE_OF[clock] + encode_time(timer.at_ms)
            return self._timers.get(group_of_key(timer.key) + timer.name.encode()) == when

        return self._ahead[clock].first(self._due, is_due)

    def pending(self, key: bytes) -> dict[str, tuple[TimerClock, int]]:
        """The timers of a key that are set: clock and time, by name."""
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
                f"the handler {self.handler!r} has no timer {bounded_repr(name)}, only "
                f"{', '.join(map(repr, self.functions))}; declare it with @{self.handler}.on_timer(name)"
            )


def _read_ahead(prefix: bytes) -> ReadAhead:
    return ReadAhead(prefix, end_of_prefix(prefix), partial(_due_key, prefix), _decode_due)


def _due_key(prefix: bytes, timer: Timer) -> bytes:
    return prefix + encode_time(timer.at_ms) + ended(timer.key) + timer.name.encode()


def _decode_due(due: bytes) -> Timer:
    key, name_at = take_ended(due, _KEY_AT)
    return Timer(decode_time(due[1:_KEY_AT]), key, due[name_at:].decode())


def timer_title(handler: str, timer: Timer) -> str:
    """A description of the timer for messages. It is also the name of its step; no other timer that is set
    has the same.
    """
    return (
        f"{TIMER_STEP}{timer.name!r} of the handler {handler!r} for the key {bounded_repr(timer.key)} at "
        f"{time_text(timer.at_ms)}"
    )


def time_text(time_ms: int) -> str:
    """A time in messages."""
    try:
        whole = datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (ValueError, OverflowError):
        return f"{time_ms} ms"
    return f"{whole}.{time_ms % 1000:03}Z"


def _checked(key: bytes | None) -> bytes:
    if key is None:
        raise RecordError("the record has no key, so it has no timers; give it one with key_by() first")
    return key
