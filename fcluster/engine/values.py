"""Which values state can hold, and their encoding.

Responsible for: turning the state of keys into bytes and back, and refusing values that would be different
when decoded. The user learns of those at the first barrier, not after a restore. State can hold dict with str
keys, list, str, int, float (finite), bool, None, and the types of `typed`. Pure.

msgspec encodes the states as JSON, all states of an epoch in one call. orjson isn't faster at that. It also
returns buffers of 4 KiB however small the value is (harmless for a record that is sent at once, but 200 MB
for 50,000 values that are kept), and rounds integers beyond 64 bits when it decodes them.

A value with something that JSON lacks, such as a Decimal, begins with a byte that no JSON begins with. So
other values have the bytes that they always had, and reading them takes no look at what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import Any, Final, cast

import msgspec

from fcluster.common.failures import bounded_repr, bounded_text, type_name, type_of
from fcluster.graph.typed import TYPED, TYPES_TEXT, holds_typed, tagged, untagged, why_unkept

State = dict[str, Any]
"""The state of one key in one store."""

KEPT = f"dict (with str keys), list, str, int, finite float, bool, None, {TYPES_TEXT}"
TYPED_MARK = b"\x01"
"""What an encoded value with something that JSON lacks begins with; the rest is what `tagged` returns."""

_KEPT_TYPES = frozenset({dict, list, str, int, float, bool, type(None)})
_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder().decode
_decode_state = msgspec.json.Decoder(State).decode
_values_of = dict[str, Any].values


class UnkeptError(Exception):
    """One of the states holds something that would be different when decoded."""


def decode_state(raw: bytes) -> State:
    """The state that `encode_states` encoded."""
    try:
        return _decode_state(raw)
    except msgspec.DecodeError:
        if not raw.startswith(TYPED_MARK):
            raise
        return decode_value(raw)


def decode_value(raw: bytes) -> Any:
    """The value that `encode_values` encoded."""
    try:
        return _decode(raw)
    except msgspec.DecodeError:
        if not raw.startswith(TYPED_MARK):
            raise
        return untagged(_decode(raw[len(TYPED_MARK) :]))


_TOO_DEEP: Final = "is nested too deeply to be kept: flatten it"


def encode_states(states: Collection[State]) -> list[bytes]:
    """The encoded states, in order.

    Equal states with the same order of keys have equal bytes, and `decode_state` keeps the order. So bytes
    can be compared to see whether a state has changed.

    Raises:
        UnkeptError: at least one can't be encoded; `describe_unkept` finds out which and why.
    """
    try:
        # This comes first, because it ends on a state that contains itself.
        lines = _encode_lines(states)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnkeptError(str(error)) from error
    values = lines.split(b"\n")
    values.pop()  # after the last newline
    try:
        floats = _check_types(states)
    except UnkeptError:
        return _encoded_with_types(states, values)
    if floats and b"null" in lines:
        _check_floats(states, values)
    return values


def encode_values(values: Collection[Any]) -> list[bytes]:
    """Like `encode_states`, for values of any type that can be kept.

    Raises:
        UnkeptError: as in `encode_states`.
    """
    try:
        lines = _encode_lines(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnkeptError(str(error)) from error
    encoded = lines.split(b"\n")
    encoded.pop()
    try:
        floats = _check_types_below(list(values), _types_in([values], ()))
    except UnkeptError:
        return _encoded_with_types(values, encoded)
    if floats and b"null" in lines:
        _check_floats(values, encoded)
    return encoded


def _encoded_with_types(values: Collection[Any], encoded: Sequence[bytes]) -> list[bytes]:
    """Like `encode_values`, for values of which some hold what JSON lacks, one by one.

    Args:
        encoded: the values as JSON, which is right for those that don't.
    """
    found: list[bytes] = []
    for value, raw in zip(values, encoded, strict=True):
        try:
            if holds_typed(value):
                found.append(TYPED_MARK + _encode(tagged(value)))
                continue
        except (TypeError, ValueError, RecursionError) as error:
            raise UnkeptError(str(error)) from error
        floats = _check_types_below([value], _types_in([[value]], ()))
        if floats and b"null" in raw:
            _check_floats([value], [raw])
        found.append(raw)
    return found


def _check_floats(values: Collection[Any], encoded: Sequence[bytes]) -> None:
    pairs = zip(values, encoded, strict=True)
    if not all(_decode(raw) == value for value, raw in pairs if b"null" in raw):
        raise UnkeptError("a float that is not finite")


def describe_unkept(state: object, title: str = "state") -> str | None:
    """Where in `state` the value is that can't be kept, and why. None if all of it can. `title` is what
    `state` is called there.
    """
    try:
        problem = _find_unkept(state, title, frozenset())
        if problem is None:
            _encode_lines([state])
    except RecursionError:
        problem = f"{title} {_TOO_DEEP}"
    except (TypeError, ValueError) as error:
        is_deep = "ecursion limit" in str(error)  # orjson's own
        problem = f"{title} {_TOO_DEEP}" if is_deep else f"{title} can't be encoded: {error}"
    return None if problem is None else bounded_text(problem, 1_000)


def describing_fields(
    owner: str, names: Sequence[str], kept_in: Callable[[Any], Iterable[list[Any]]]
) -> Callable[[Any], str | None]:
    """Like `describe_unkept`, for what aggregates keep: the author knows their fields, and not how the store
    arranges them.

    Args:
        owner: what has the fields, in words.
        names: the fields, in order.
        kept_in: returns the lists of what the fields keep that are in a value of the store. Such a list may
            have more behind that.
    """

    def describe(value: Any) -> str | None:
        for kept in kept_in(value):
            for name, part in zip(names, kept, strict=False):
                problem = describe_unkept(part, "kept")
                if problem is not None:
                    return f"in the field {name!r} of {owner}, {problem}"
        return describe_unkept(value)

    return describe


def _check_types(states: Collection[State]) -> bool:
    """Whether there is a float anywhere in `states`.

    The encoder silently turns tuples into lists, enums and UUIDs into plain values, and NaN into null. So the
    types of all values are checked, one level of nesting of all states at a time, in loops that run in C:
    about 0.1 us for a small flat state.

    Raises:
        UnkeptError: a type can't be kept.
    """
    types = _types_in(map(_values_of, states), states)
    if dict in types or list in types:
        return _check_types_below(list(chain.from_iterable(map(_values_of, states))), types)
    return float in types


def _check_types_below(level: list[Any], types: set[type]) -> bool:
    """Like `_check_types`, for one level of values with these types, and all levels below it."""
    floats = float in types
    while dict in types or list in types:
        found: list[State] = [value for value in level if type(value) is dict]
        lists: list[list[Any]] = [value for value in level if type(value) is list]
        level = list(chain.from_iterable(map(_values_of, found)))
        level.extend(chain.from_iterable(lists))
        types = _types_in([level], found)
        floats = floats or float in types
    return floats


def _types_in(values: Iterable[Iterable[Any]], dicts: Iterable[State]) -> set[type]:
    types = set(map(type, chain.from_iterable(values)))
    if types - _KEPT_TYPES or set(map(type, chain.from_iterable(dicts))) - {str}:
        raise UnkeptError("a value would come back as something else")
    return types


def _find_unkept(value: Any, path: str, parents: frozenset[int]) -> str | None:
    kind = cast("type[object]", type(value))
    if kind in TYPED:
        why = why_unkept(value)
        return None if why is None else f"{path} {why}"
    if kind not in _KEPT_TYPES:
        return f"{path} is a {type_name(kind)}, which would not come back from the store as it is"
    if kind is float and (value != value or value in (float("inf"), float("-inf"))):
        return f"{path} is {value}, which can't be encoded"
    if kind is not dict and kind is not list:
        return None
    if id(value) in parents:
        return f"{path} contains itself"
    inside = parents | {id(value)}
    items = cast("Iterable[tuple[object, object]]", value.items() if kind is dict else enumerate(value))
    for key, item in items:
        if kind is dict and type(key) is not str:
            return f"{path} has the key {bounded_repr(key)}, a {type_of(key)}; keys must be str"
        problem = _find_unkept(item, f"{path}[{bounded_repr(key)}]", inside)
        if problem is not None:
            return problem
    return None
