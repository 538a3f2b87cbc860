"""Records whose time is in their value: `timestamp=` of a topic.

Responsible for: finding that time and giving it to the record (`Stamper`), and the time by which a shard
with several inputs orders its records (`orders_of`). Pure.

Invariants:
- From a record's first step on, its own timestamp in Kafka is never used. So windows, timers, joins and
  outputs all see the time in the value.
- A time that isn't exact is an error of the record: nothing is rounded up or guessed.
- A record without a usable time doesn't move event time.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fcluster.common.errors import FormatUnavailable
from fcluster.common.failures import bounded_repr, describe_exception, place_of, type_of
from fcluster.engine.framing import compile_framing
from fcluster.engine.records import NO_TIMESTAMP_MS, AmendedRecord, SourceRecord
from fcluster.engine.steps import RecordError
from fcluster.graph.codecs import Kind, ModelCodec, value_codec
from fcluster.graph.stages import Input, Stage
from fcluster.graph.timestamps import Timestamp, timestamp_text

TIMESTAMP_MS_MAX: Final = 253_402_300_799_999
"""The end of the year 9999. Microseconds of today are beyond it."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)

OrderMs = Callable[[SourceRecord], int]
"""The time by which a record waits for its turn among those of other inputs."""


class TimestampError(RecordError):
    """There is no usable timestamp in the value of a record."""


class StampedRecord(AmendedRecord):
    """A record with the time that is in its value."""

    __slots__ = ("_timestamp",)

    def __init__(self, record: SourceRecord, at_ms: int) -> None:
        self._record = record  # without a call of the base, because it is made for each record
        self._timestamp = (1, at_ms)

    def timestamp(self) -> tuple[int, int]:
        """The time in the value, as a timestamp that its creator has set."""
        return self._timestamp


class Stamper:
    """Gives records of one input the time that is in their values.

    Args:
        timestamp: what the topic declares.
        value: the kind of its values.

    Attributes:
        last_ms: the time of the record that was stamped last.
    """

    __slots__ = ("_time_of", "_timestamp", "last_ms")

    def __init__(self, timestamp: Timestamp, value: Kind) -> None:
        self._timestamp = timestamp
        self._time_of = compile_timestamp(timestamp, value)
        self.last_ms = NO_TIMESTAMP_MS

    def stamp(self, record: SourceRecord, value: Any) -> SourceRecord:
        """The record, with its time.

        Raises:
            TimestampError: the value has no usable time, or the user's function fails.
        """
        try:
            self.last_ms = at_ms = self._time_of(value)
        except TimestampError:
            raise
        except BaseException as error:
            where = place_of(error)
            at = f" ({where})" if where else ""
            raise TimestampError(
                f"its timestamp comes {timestamp_text(self._timestamp)}, which failed: "
                f"{describe_exception(error)}{at}"
            ) from error
        return StampedRecord(record, at_ms)


def compile_timestamp(timestamp: Timestamp, value: Kind) -> Callable[[Any], int]:
    """The function that finds the time in a decoded value of that kind, in milliseconds since 1970. It raises
    `TimestampError`, or what a function of the user raises.
    """
    if not isinstance(timestamp, str):
        function = timestamp
    else:
        function = _attribute_of(timestamp) if isinstance(value, ModelCodec) else _field_of(timestamp)

    def time_of(value: Any) -> int:
        found = function(value)
        if type(found) is int and 0 <= found <= TIMESTAMP_MS_MAX:
            return found
        return _milliseconds(found, timestamp)

    return time_of


def orders_of(stage: Stage) -> tuple[OrderMs, ...]:
    """For each input of the stage, how its records are ordered among those of the others."""
    return tuple(map(_order_of, stage.inputs))


def _order_of(source: Input) -> OrderMs:
    if source.timestamp is None:
        return lambda record: record.timestamp()[1]
    kind, frame = source.topic.value, compile_framing(source)
    decode, time_of = value_codec(kind)[0], compile_timestamp(source.timestamp, kind)

    def order_ms(record: SourceRecord) -> int:
        raw = (record if frame is None else frame(record)).value()
        try:
            return time_of(None if raw is None else decode(raw))
        except FormatUnavailable:
            raise  # its time isn't known yet
        except BaseException:  # noqa: BLE001  a codec may raise anything
            return NO_TIMESTAMP_MS  # it comes at once; the runner finds out what is wrong with it

    return order_ms


def _field_of(name: str) -> Callable[[Any], Any]:
    def field(value: Any) -> Any:
        try:
            return value[name]
        except (TypeError, LookupError):
            pass
        if isinstance(value, dict):
            raise TimestampError(f"it has no field {name!r}, from which its timestamp comes")
        if hasattr(value, name):  # of a codec of the user
            return getattr(value, name)
        raise _no_object(name, value)

    return field


def _attribute_of(name: str) -> Callable[[Any], Any]:
    def attribute(value: Any) -> Any:
        if value is None:
            raise _no_object(name, value)
        return getattr(value, name)

    return attribute


def _no_object(name: str, value: Any) -> TimestampError:
    what = "null (a tombstone)" if value is None else f"a {type_of(value)}, not an object"
    return TimestampError(f"its timestamp comes from the field {name!r}, but the value is {what}")


def _milliseconds(found: Any, timestamp: Timestamp) -> int:
    """What was found, if it isn't the usual int."""
    if isinstance(found, datetime) and found.tzinfo is not None:
        at_ms = (found - _EPOCH) // _MILLISECOND
        if at_ms >= 0:
            return at_ms
    raise TimestampError(
        f"its timestamp comes {timestamp_text(timestamp)}, which is {bounded_repr(found)}: {_trouble(found)}"
    )


def _trouble(found: Any) -> str:
    if found is None:
        return "there is none"
    if isinstance(found, datetime):
        return "that has no time zone" if found.tzinfo is None else "that is before 1970"
    if isinstance(found, bool) or not isinstance(found, int):
        return (
            f"a {type_of(found)}, and neither a whole number of milliseconds since 1970 nor a datetime with "
            "a time zone; give timestamp= a function that returns one of them"
        )
    if found < 0:
        return "that is negative; it takes milliseconds since 1970"
    return "that is after the year 9999; it takes milliseconds since 1970, not microseconds or nanoseconds"
