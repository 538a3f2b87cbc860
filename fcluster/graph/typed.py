"""Values of types that JSON lacks, in what is kept: as JSON that says which type they are of.

Responsible for: Decimals, dates and times, UUIDs and bytes in state, and in the parts of windows that go
through a topic. They come back as they were, with all digits. Pure.

    {"$decimal": "12.30"}
    {"$datetime": "2026-01-02T03:04:05+00:00"}
    {"$": {"$decimal": 1}}                         a dict that could be taken for one of those
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from fcluster.common.failures import bounded_repr, bounded_text, type_of

_UNCHANGED: Final = frozenset({str, int, bool, type(None)})
_NESTING: Final = frozenset({list, dict})
_FOLDED: Final = "/1"
"""Behind the text of a local time that comes for the second time, when clocks have been set back."""
_ESCAPE: Final = "$"
_IN_PARTS: Final = "$kept"


class _Kind(NamedTuple):
    name: str
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]


def _text_of_time(value: datetime | time) -> str:
    return value.isoformat() + _FOLDED if value.fold else value.isoformat()


def _datetime_of(text: str) -> datetime:
    value = datetime.fromisoformat(text.removesuffix(_FOLDED))
    return value.replace(fold=1) if text.endswith(_FOLDED) else value


def _time_of(text: str) -> time:
    value = time.fromisoformat(text.removesuffix(_FOLDED))
    return value.replace(fold=1) if text.endswith(_FOLDED) else value


def _parts_of(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _timedelta_of(parts: list[int]) -> timedelta:
    return timedelta(*parts)


def _text_of_bytes(value: bytes) -> str:
    return b64encode(value).decode()


_KINDS: Final[Mapping[type, _Kind]] = {
    Decimal: _Kind("$decimal", str, Decimal),
    datetime: _Kind("$datetime", _text_of_time, _datetime_of),
    date: _Kind("$date", date.isoformat, date.fromisoformat),
    time: _Kind("$time", _text_of_time, _time_of),
    timedelta: _Kind("$timedelta", _parts_of, _timedelta_of),
    UUID: _Kind("$uuid", str, UUID),
    bytes: _Kind("$bytes", _text_of_bytes, b64decode),
}
_READERS: Final = {kind.name: kind.from_json for kind in _KINDS.values()}

TYPED: Final = frozenset(_KINDS)
"""The types, besides those of JSON, whose values can be kept. None can be changed in place."""
TYPES_TEXT: Final = "Decimal (finite), datetime, date, time, timedelta, UUID and bytes"


def why_unkept(value: Any) -> str | None:
    """Why a value of one of the types in `TYPED` would not come back as it is. None: it would."""
    kind = cast("type[object]", type(value))
    if kind is Decimal and not value.is_finite():
        return f"is {value!r}, which can't be encoded"
    if kind is datetime or kind is time:
        zone = value.tzinfo
        if zone is not None and zone.utcoffset(None) is None:
            return (
                f"is a {type_of(value)} in the time zone {bounded_text(str(zone), 60)}, which would not come "
                "back from the store as it is: convert it with .astimezone(timezone.utc)"
            )
    return None


def with_fixed_offset(value: Any) -> Any:
    """`value`; a datetime in a time zone that changes its offset as one with the offset of that moment."""
    if type(value) is datetime and value.tzinfo is not None and value.tzinfo.utcoffset(None) is None:
        offset = value.utcoffset()
        return value if offset is None else value.replace(tzinfo=timezone(offset), fold=0)
    return value


def tagged(value: Any) -> Any:
    """`value` as JSON from which `untagged` makes an equal one of the same types.

    Raises:
        TypeError: it holds something that would be different.
        ValueError: it holds a number that isn't finite.
        RecursionError: it contains itself.
    """
    kind = cast("type[object]", type(value))
    if kind in _UNCHANGED:
        return value
    if kind is float:
        if value - value != 0.0:
            raise ValueError(f"{value} can't be encoded")
        return value
    if kind is list:
        return [item if type(item) in _UNCHANGED else tagged(item) for item in value]
    if kind is dict:
        return _tagged_dict(value)
    typed = _KINDS.get(kind)
    if typed is None:
        raise TypeError(f"{bounded_repr(value)} is a {type_of(value)}")
    why = why_unkept(value)
    if why is not None:
        raise ValueError(f"a value {why}")
    return {typed.name: typed.to_json(value)}


def _tagged_dict(value: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if type(name) is not str:
            raise TypeError(f"the key {bounded_repr(name)} is a {type_of(name)}")
        found[name] = item if type(item) in _UNCHANGED else tagged(item)
    return {_ESCAPE: found} if len(found) == 1 and next(iter(found)).startswith("$") else found


def untagged(document: Any) -> Any:
    """What `tagged` has made JSON of. It may change and return `document` itself."""
    if type(document) is list:
        items = cast("list[Any]", document)
        return [untagged(item) if type(item) is dict or type(item) is list else item for item in items]
    if type(document) is not dict:
        return document
    fields = cast("dict[str, Any]", document)
    if len(fields) == 1:
        ((name, item),) = fields.items()
        read = _READERS.get(name)
        if read is not None:
            return read(item)
        if name == _ESCAPE:
            return {name: untagged(item) for name, item in item.items()}
    return {name: untagged(item) for name, item in fields.items()}


def holds_typed(value: Any) -> bool:
    """Whether there is a value of one of the types in `TYPED` in it."""
    kind = cast("type[object]", type(value))
    if kind is not list and kind is not dict:
        return kind in TYPED
    items: Collection[Any] = value if kind is list else value.values()
    types = set(map(type, items))
    if types & TYPED:
        return True
    return bool(types & _NESTING) and any(map(holds_typed, items))


def in_part(kept: Any) -> Any:
    """What an aggregate keeps, as it goes through a topic to those who put parts together. What JSON holds
    goes as it is.
    """
    if holds_typed(kept) or _is_in_part(kept):
        return {_IN_PARTS: tagged(kept)}
    return kept


def of_part(part: Any) -> Any:
    """What `in_part` was given."""
    return untagged(part[_IN_PARTS]) if _is_in_part(part) else part


def _is_in_part(part: Any) -> bool:
    return type(part) is dict and len(cast("dict[Any, Any]", part)) == 1 and _IN_PARTS in part
