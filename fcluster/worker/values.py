"""Which values state can keep, and their encoding.

Responsible for: turning the state of keys into bytes and back, and refusing what would come back as
something else: the user learns it at the first barrier, not after a restore. What can be kept: dict with
str keys, list, str, int (64 bit), float (finite), bool, None. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import chain, repeat
from typing import Any, NoReturn, cast

import orjson

State = dict[str, Any]
"""The state of one key in one store."""

KEPT = "dict (with str keys), list, str, int up to 64 bit, finite float, bool and None"

_KEPT_TYPES = frozenset({dict, list, str, int, float, bool, type(None)})
_OPTIONS = (
    orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
)
_dumps = orjson.dumps
_loads = orjson.loads
_values_of = dict[str, Any].values

decode_state: Callable[[bytes], State] = _loads
"""The state that `encode_states` made these bytes of (orjson's own function: it is on the hot path)."""


class UnkeptError(Exception):
    """One of the states holds something that would not come back as it is."""


def encode_states(states: Collection[State]) -> list[bytes]:
    """The encoded states, in order.

    Equal states with the same order of keys give equal bytes, and `decode_state` keeps the order: bytes can
    be compared to see whether a state has changed.

    Raises:
        UnkeptError: of at least one; `describe_unkept` finds out which and why.
    """
    try:
        values = list(map(_dumps, states, repeat(_refuse), repeat(_OPTIONS)))
    except TypeError as error:
        raise UnkeptError(str(error)) from error
    if not _all_come_back(states, values):
        raise UnkeptError("a value would come back as something else")
    return values


def describe_unkept(state: State) -> str | None:
    """Where in `state` stands what can't be kept, and why; None if all of it can."""
    problem = _find_unkept(state, "state", frozenset())
    if problem is None:
        try:
            _dumps(state, _refuse, _OPTIONS)
        except TypeError as error:
            problem = f"state can't be encoded: {error}"
    return problem


def _refuse(value: object) -> NoReturn:
    raise TypeError(type(value).__name__)


def _all_come_back(states: Collection[State], values: Iterable[bytes]) -> bool:
    """Whether `states`, encoded as `values`, come back the same.

    The encoder notices most of what doesn't, but turns tuples into lists, enums and UUIDs into plain values
    and NaN into null without a word. So the types are looked at too: one level of nesting of all states at
    a time, in loops that run in C. That costs about 0.1 us for a small flat state.
    """
    types = set(map(type, chain.from_iterable(map(_values_of, states))))
    if types - _KEPT_TYPES or set(map(type, chain.from_iterable(states))) - {str}:
        return False
    floats = float in types
    level: list[Any] | None = None
    while dict in types or list in types:
        if level is None:
            level = list(chain.from_iterable(map(_values_of, states)))
        dicts: list[State] = [value for value in level if type(value) is dict]
        lists: list[list[Any]] = [value for value in level if type(value) is list]
        level = list(chain.from_iterable(map(_values_of, dicts)))
        level.extend(chain.from_iterable(lists))
        types = set(map(type, level))
        if types - _KEPT_TYPES or set(map(type, chain.from_iterable(dicts))) - {str}:
            return False
        floats = floats or float in types
    if floats and b"null" in b"".join(values):
        return all(
            _loads(value) == state for state, value in zip(states, values, strict=True) if b"null" in value
        )
    return True


def _find_unkept(value: Any, path: str, parents: frozenset[int]) -> str | None:
    kind = cast("type[object]", type(value))
    if kind not in _KEPT_TYPES:
        return f"{path} is a {kind.__name__}, which would not come back from the store as it is"
    if kind is float and (value != value or value in (float("inf"), float("-inf"))):
        return f"{path} is {value}, which can't be encoded"
    if kind is int and not -(2**63) <= value < 2**64:
        return f"{path} is an integer of more than 64 bit"
    if kind is not dict and kind is not list:
        return None
    if id(value) in parents:
        return f"{path} contains itself"
    inside = parents | {id(value)}
    items = cast("Iterable[tuple[object, object]]", value.items() if kind is dict else enumerate(value))
    for key, item in items:
        if kind is dict and type(key) is not str:
            return f"{path} has the key {key!r}, a {type(key).__name__}; keys must be str"
        problem = _find_unkept(item, f"{path}[{key!r}]", inside)
        if problem is not None:
            return problem
    return None
