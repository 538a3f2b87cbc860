"""The event time of a shard: how far it has advanced, according to the timestamps of its records.

Each input has a *watermark*: no more records are expected at or before it. The watermark of a user's topic is
the highest timestamp read so far, minus the delay that the job allows. The watermark of a repartition topic
is the lowest event time that the shards upstream report. The shard's event time is the lowest watermark of
its inputs. An input that is idle is left out. If all are idle, the highest watermark counts: no input holds
the others back. Inputs that only fill tables are always left out.

In a bounded run, event time comes to its end: when a shard has read all its inputs to their ends. From then
on everything that waits for event time is due. `now_ms` follows what fires, in the order of its time.

Invariants:
- Event time never goes back (invariant 5): neither through a late record, an input that becomes active again,
  or a report from upstream, nor through a restore.
- It follows from what the shard read, in the order in which it read it (invariant 4). The one exception is
  that an input is declared idle: the shell decides this by the wall clock, and only where the job asks for
  it. So it is committed with the epoch, like everything else here.
- The end of event time comes after all records, whatever the inputs and their order are. It is final.

Must not: read a clock, or know epochs. Pure. All times are milliseconds since 1970.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from fcluster.common.errors import FclusterError

ENCODED_CHARACTERS_MAX: Final = 3_600
"""For one input: Kafka keeps 4,096 bytes with an offset. The epoch's part takes up to 180 of them, and counts
of dead letters up to 250.
"""
SHARDS_MAX: Final = 100_000
"""For one stage. A watermark record that claims more isn't valid."""
END_MS: Final = 2**64
"""The watermark of an input that has been read to its end, and what a shard reports when nothing is to come
of it any more. Later than any time of a timer or window, also if a record has the greatest timestamp that
Kafka takes: 2**63 - 1. Producers that write nanoseconds come near to that.
"""
FORMER_END_MS: Final = 2**60
"""What `END_MS` was in versions that had its number in watermark records, too."""
_WATERMARK_FORMAT: Final = 1
_SOURCE, _UPSTREAM, _UPSTREAM_SHORT = "s", "u", "m"
_UPSTREAM_ENDING, _UPSTREAM_ENDING_SHORT = "e", "f"
"""Formats that are written only while some shards upstream have ended. Older versions don't know them."""
_ENDS_PER_NUMBER: Final = 7
"""So that each number takes one byte."""


class UnreadableClockError(FclusterError):
    """The committed clock isn't in the format that this version writes."""


class Said(NamedTuple):
    """What a shard upstream reports about itself.

    Attributes:
        shard: the shard's number.
        time_ms: its event time. None: it hasn't begun.
        idle: it expects no records soon. Don't wait for it.
    """

    shard: int
    time_ms: int | None
    idle: bool = False


@dataclass(frozen=True, slots=True)
class InputTime:
    """The state of one input.

    Attributes:
        watermark_ms: None: nothing was read yet, or a shard upstream hasn't reported. `END_MS`: it has ended.
        idle: whether it is left out.
        slowest: for a repartition topic, the number of the shard upstream that holds it back. None for other
            topics, or if no shard does.
        idle_upstream: how many shards upstream are idle.
    """

    watermark_ms: int | None
    idle: bool
    slowest: int | None = None
    idle_upstream: int = 0


class _Source:
    """A topic of the user.

    Attributes:
        passed_ms: a record with this timestamp or a lower one changes nothing.
    """

    __slots__ = ("delay_ms", "ended", "highest_ms", "idle", "passed_ms")

    def __init__(self, delay_ms: int) -> None:
        self.delay_ms = delay_ms
        self.highest_ms: int | None = None
        self.passed_ms = -1  # also a record without a timestamp
        self.idle = False
        self.ended = False

    def watermark(self) -> int | None:
        if self.ended:
            return END_MS
        return None if self.highest_ms is None else self.highest_ms - self.delay_ms

    def observe(self, timestamp_ms: int) -> None:
        if self.highest_ms is None or timestamp_ms > self.highest_ms:
            self.highest_ms = timestamp_ms
        self.passed_ms = self.highest_ms
        self.idle = False

    def set_idle(self, idle: bool) -> None:
        self.idle = idle
        # The next record, however old, ends the idleness.
        self.passed_ms = -1 if idle or self.highest_ms is None else self.highest_ms

    def end(self) -> None:
        self.ended = True
        self.set_idle(False)

    def look(self) -> InputTime:
        return InputTime(self.watermark(), self.idle)

    def encode(self) -> tuple[str, list[int]]:
        return _SOURCE, [*_optional(self.highest_ms), int(self.ended) << 1 | int(self.idle)]

    def decode(self, kind: str, numbers: Iterator[int]) -> None:
        if kind == _SOURCE:
            highest_ms = _read_optional(numbers)
            if highest_ms is not None:
                self.observe(highest_ms)
            flags = next(numbers)
            self.set_idle(bool(flags & 1))
            self.ended = bool(flags & 2)


def _farthest(times_ms: Sequence[int | None]) -> int | None:
    """The time of inputs of which none holds the others back, because all are idle or have ended. One that is
    idle may still get records, so only all of them end event time.
    """
    going_on = [at for at in times_ms if at != END_MS]
    if not going_on:
        return END_MS
    return max((at for at in going_on if at is not None), default=None)


class _Upstream:
    """A repartition topic: the last report of each shard that writes to it."""

    __slots__ = ("_idle", "_times_ms")

    def __init__(self) -> None:
        self._times_ms: list[int | None] = []
        self._idle: list[bool] = []

    @property
    def idle(self) -> bool:
        return bool(self._idle) and all(self._idle)

    def watermark(self) -> int | None:
        if not self._idle:
            return None
        waited_for = [at for at, idle in zip(self._times_ms, self._idle, strict=True) if not idle]
        if all(at == END_MS for at in waited_for):
            return _farthest(self._times_ms)
        lowest_ms: int | None = waited_for[0]
        for at in waited_for:
            if at is None or lowest_ms is None:
                return None
            lowest_ms = min(lowest_ms, at)
        return lowest_ms

    def hear(self, shards: int, said: Iterable[Said]) -> None:
        more = shards - len(self._idle)
        if more > 0:
            self._times_ms += [None] * more
            self._idle += [False] * more
        for one in said:
            if 0 <= one.shard < len(self._idle):
                known = self._times_ms[one.shard]
                time_ms = END_MS if one.time_ms == FORMER_END_MS else one.time_ms
                if time_ms is not None and (known is None or time_ms > known):
                    self._times_ms[one.shard] = time_ms
                self._idle[one.shard] = one.idle

    def look(self) -> InputTime:
        waited_for = [number for number, idle in enumerate(self._idle) if not idle]
        slowest = min(waited_for, key=lambda number: self._times_ms[number] or -1, default=None)
        return InputTime(self.watermark(), self.idle, slowest, sum(self._idle))

    def encode(self) -> tuple[str, list[int]]:
        known = [at for at in self._times_ms if at is not None and at != END_MS]
        base_ms = min(known, default=0)
        numbers = [len(self._idle), _zigzag(base_ms)]
        ending = END_MS in self._times_ms
        for at, idle in zip(self._times_ms, self._idle, strict=True):
            # Relative to the lowest one, so most of them take two or three bytes.
            since = 0 if at is None else 1 if at == END_MS else at - base_ms + 1 + ending
            numbers.append(since << 1 | idle)
        return _UPSTREAM_ENDING if ending else _UPSTREAM, numbers

    def encode_short(self) -> tuple[str, list[int]]:
        """All shards with the time of the slowest. This is too low for the others until they report again.
        Those that have ended don't report again, so it says which ones they are.
        """
        numbers = [len(self._idle), *_optional(self.watermark()), int(self.idle)]
        if END_MS not in self._times_ms:
            return _UPSTREAM_SHORT, numbers
        for start in range(0, len(self._times_ms), _ENDS_PER_NUMBER):
            some = self._times_ms[start : start + _ENDS_PER_NUMBER]
            numbers.append(sum((at == END_MS) << number for number, at in enumerate(some)))
        return _UPSTREAM_ENDING_SHORT, numbers

    def decode(self, kind: str, numbers: Iterator[int]) -> None:
        if kind in (_UPSTREAM, _UPSTREAM_ENDING):
            ending = kind == _UPSTREAM_ENDING
            count, base_ms = next(numbers), _unzigzag(next(numbers))
            for number in range(count):
                packed = next(numbers)
                since = packed >> 1
                at = None if not since else base_ms + since - 1 - ending
                if ending and since == 1:
                    at = END_MS
                self.hear(count, [Said(number, at, bool(packed & 1))])
        elif kind in (_UPSTREAM_SHORT, _UPSTREAM_ENDING_SHORT):
            count, at = next(numbers), _read_optional(numbers)
            idle = bool(next(numbers))
            self.hear(count, [Said(number, at, idle) for number in range(count)])
            if kind == _UPSTREAM_ENDING_SHORT:
                for start in range(0, count, _ENDS_PER_NUMBER):
                    ends = next(numbers)
                    some = range(start, min(start + _ENDS_PER_NUMBER, count))
                    self.hear(count, [Said(one, END_MS) for one in some if ends >> (one - start) & 1])


class EventClock:
    """The event time of one shard.

    Args:
        delays_ms: for each input, how far its records may be out of order. None: it is a repartition topic,
            and only watermark records advance its time.
        timeless: the numbers of the inputs that event time doesn't depend on. Not all of them.

    Attributes:
        now_ms: the shard's event time. None before the first record. Never decreases.
        due_ms: what is set for this time or an earlier one is due: `now_ms`, or `END_MS` once event time has
            ended.
    """

    __slots__ = ("_counted", "_inputs", "_told_of", "due_ms", "now_ms")

    def __init__(self, delays_ms: Sequence[int | None], timeless: Collection[int] = ()) -> None:
        self._told_of: Callable[[int | None], int | None] | None = None
        self._inputs = [_Upstream() if delay is None else _Source(delay) for delay in delays_ms]
        self._counted = [one for number, one in enumerate(self._inputs) if number not in timeless]
        self.now_ms: int | None = None
        self.due_ms: int | None = None

    def tell_with(self, told_of: Callable[[int | None], int | None]) -> None:
        """Let `told_of(due_ms)` say what the stages behind are told of this shard: less than that while
        outputs with earlier timestamps are still to come."""
        self._told_of = told_of

    @property
    def told_ms(self) -> int | None:
        """What the stages behind are told. Don't read it within a record that may still be undone."""
        if self.due_ms is None or self._told_of is None:
            return self.due_ms
        return self._told_of(self.due_ms)

    def source(self, number: int) -> _Source:
        """An input that is a user's topic. Checking its `passed_ms` first saves most calls of `observe`."""
        source = self._inputs[number]
        assert isinstance(source, _Source)
        return source

    def observe(self, number: int, timestamp_ms: int) -> bool:
        """A record of this input was taken. The input is not a repartition topic.

        Returns:
            Whether `now_ms` moved.
        """
        source = self.source(number)
        if timestamp_ms <= source.passed_ms:
            return False
        source.observe(timestamp_ms)
        return self._move()

    def heard(self, number: int, shards: int, said: Iterable[Said]) -> bool:
        """A watermark record of this repartition topic was read.

        Args:
            number: the input's number.
            shards: the number of shards upstream.
            said: the reports of some of them.

        Returns:
            Whether `now_ms` moved.
        """
        upstream = self._inputs[number]
        if isinstance(upstream, _Upstream):
            upstream.hear(shards, said)
        return self._move()

    def set_idle(self, number: int, idle: bool) -> bool:
        """Leave this input out until its next record, or stop doing so. It is a user's topic.

        Returns:
            Whether `now_ms` moved.
        """
        self.source(number).set_idle(idle)
        return self._move()

    @property
    def ended(self) -> bool:
        """Whether event time has ended: all inputs have been read to their ends."""
        return self.due_ms == END_MS

    @property
    def may_end(self) -> bool:
        """Whether everything upstream has ended, so that only the user's topics have to be read to their
        ends.
        """
        return all(one.watermark() == END_MS for one in self._inputs if isinstance(one, _Upstream))

    def end(self) -> bool:
        """All inputs that are users' topics have been read to their ends, and `may_end` is true.

        Returns:
            Whether event time has ended with this call.
        """
        for one in self._inputs:
            if isinstance(one, _Source):
                one.end()
        return self._move()

    def follow(self, fired_ms: int) -> None:
        """Event time has ended, and what was set for this time fires."""
        if self.now_ms is None or fired_ms > self.now_ms:
            self.now_ms = fired_ms

    @property
    def is_idle(self) -> bool:
        """Whether all inputs are idle. Then others need not wait for this shard."""
        return all(one.idle for one in self._counted)

    def look(self) -> list[InputTime]:
        """The state of each input, for status."""
        return [one.look() for one in self._inputs]

    def _move(self) -> bool:
        lowest_ms: int | None = None
        for one in self._counted:
            if not one.idle:
                mark = one.watermark()
                if mark is None:
                    return False
                if lowest_ms is None or mark < lowest_ms:
                    lowest_ms = mark
        if lowest_ms is None or lowest_ms == END_MS:  # none of them holds the others back
            lowest_ms = _farthest([one.watermark() for one in self._counted])
        if lowest_ms is None or (self.due_ms is not None and lowest_ms <= self.due_ms):
            return False
        if lowest_ms == END_MS and not self._all_ended():
            return False  # what only fills a table comes first
        self.due_ms = lowest_ms
        if lowest_ms != END_MS:
            self.now_ms = lowest_ms
        return True

    # --- what is committed ------------------------------------------------------------------------------

    def encode(self, number: int) -> str:
        """What has to be committed with the offset of this input: at most `ENCODED_CHARACTERS_MAX` characters
        without a colon. It contains the shard's time as well.
        """
        one = self._inputs[number]
        text = _encode(self.now_ms, *one.encode())
        if len(text) > ENCODED_CHARACTERS_MAX and isinstance(one, _Upstream):
            text = _encode(self.now_ms, *one.encode_short())
        return text

    def restore(self, number: int, text: str) -> None:
        """Continue from what `encode` returned. Event time doesn't go back.

        If the input was of another sort when this was committed, because the job has changed, only the
        shard's time is used.

        Raises:
            UnreadableClockError: `encode` returned nothing like this.
        """
        if not text:
            return
        try:
            numbers = _varints(base64.b85decode(text[1:]))
            now_ms = _read_optional(numbers)
            self._inputs[number].decode(text[0], numbers)
        except (ValueError, StopIteration) as error:
            raise UnreadableClockError(f"event time was committed as {text[:100]!r}") from error
        if now_ms is not None and (self.now_ms is None or now_ms > self.now_ms):
            self.now_ms = now_ms
        self.due_ms = END_MS if self._all_ended() else self.now_ms

    def _all_ended(self) -> bool:
        return all(one.watermark() == END_MS for one in self._inputs)


# --- numbers as bytes -------------------------------------------------------------------------------------


def encode_numbers(numbers: Iterable[int]) -> bytes:
    """Encode numbers of zero or more. Small ones take few bytes."""
    encoded = bytearray()
    for number in numbers:
        while number > 0x7F:
            encoded.append(number & 0x7F | 0x80)
            number >>= 7
        encoded.append(number)
    return bytes(encoded)


def _varints(encoded: bytes) -> Iterator[int]:
    """Decode the numbers. Raises ValueError if they are cut off."""
    number = shift = 0
    for byte in encoded:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
    if shift:
        raise ValueError("a number is cut off")


def _encode(now_ms: int | None, kind: str, numbers: Sequence[int]) -> str:
    return kind + base64.b85encode(encode_numbers([*_optional(now_ms), *numbers])).decode()


def _zigzag(number: int) -> int:
    return number << 1 if number >= 0 else ~number << 1 | 1


def _unzigzag(number: int) -> int:
    return ~(number >> 1) if number & 1 else number >> 1


def _optional(number: int | None) -> list[int]:
    return [0] if number is None else [1, _zigzag(number)]


def _read_optional(numbers: Iterator[int]) -> int | None:
    return _unzigzag(next(numbers)) if next(numbers) else None


# --- watermark records --------------------------------------------------------------------------------------


def encode_watermark(shards: int, said: Iterable[Said]) -> bytes:
    """The value of a watermark record.

    Args:
        shards: the number of shards in the stage that writes it.
        said: the reports of those whose time has moved.
    """
    numbers = [_WATERMARK_FORMAT, shards]
    for one in said:
        numbers += [one.shard, int(one.idle), *_optional(one.time_ms)]
    return encode_numbers(numbers)


def decode_watermark(value: bytes) -> tuple[int, list[Said]]:
    """The arguments that `encode_watermark` was called with.

    Raises:
        UnreadableClockError: the value isn't in its format.
    """
    try:
        numbers = _varints(value)
        form, shards = next(numbers), next(numbers)
        if form != _WATERMARK_FORMAT or shards > SHARDS_MAX:
            raise ValueError(f"format {form}, {shards} shards")
        said: list[Said] = []
        for shard in numbers:
            idle = bool(next(numbers))
            said.append(Said(shard, _read_optional(numbers), idle))
    except (ValueError, StopIteration) as error:
        raise UnreadableClockError(f"a watermark record has the value {value[:100]!r}") from error
    return shards, said
