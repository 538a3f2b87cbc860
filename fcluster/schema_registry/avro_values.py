"""Values that fastavro would write as others, and defaults of fields that a value doesn't have.

fastavro takes a time without a zone for one of the machine's, drops zones and hours where a schema has none,
writes infinity for a number that is too large, text that is no UUID, and a default of bytes as the text that
stands in the schema. Responsible for: refusing the former with the place in the value, and putting the
defaults in. Invariant: whether the value fits otherwise is left to fastavro.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final, cast
from uuid import UUID

from fcluster.schema_registry.defaults import Defaults, kind_of, parts_of

Check = Callable[[Any, str], Any]
"""Takes a value and the place where it is, and returns what is to be written.

Raises:
    ValueError: it would be another value for those who read it.
"""
_FLOAT_MAX: Final = 3.4028234663852886e38


def compile_checks(schema: Any) -> Check | None:
    """What looks at values of a schema before they are written.

    Args:
        schema: the schema, parsed by fastavro.

    Returns:
        None: all values that fit are written as they are.
    """
    return _Checks(schema).of(schema)


class _Checks:
    def __init__(self, schema: Any) -> None:
        self._types = Defaults(schema)
        self._records: dict[str, Check] = {}

    def of(self, schema: Any) -> Check | None:
        schema = self._types.resolved(schema)
        if not self._needs_care(schema, frozenset()):
            return None
        if isinstance(schema, list):
            return self._of_union(cast("list[Any]", schema))
        kind = kind_of(schema)
        if kind == "record":
            return self._of_record(schema)
        if kind in ("array", "map"):
            return self._of_items(schema)
        leaf = _leaf(schema)
        return self.of(schema["type"]) if leaf is None else leaf[1]

    def _needs_care(self, schema: Any, seen: frozenset[str]) -> bool:
        schema = self._types.resolved(schema)
        if kind_of(schema) == "record":
            if schema["name"] in seen:
                return False
            seen |= {schema["name"]}
            if any(self._default_differs(field) for field in schema["fields"]):
                return True
        leaf = _leaf(schema)
        if leaf is not None:
            return leaf[1] is not None
        return any(self._needs_care(one, seen) for one in parts_of(schema))

    def _default_differs(self, field: Mapping[str, Any]) -> bool:
        """Whether a default isn't what stands in the schema."""
        default = field.get("default")
        return default is not None and self._types.native(field["type"], default) != default

    def _of_record(self, schema: Mapping[str, Any]) -> Check:
        name = schema["name"]
        if name in self._records:
            return self._records[name]
        steps: list[tuple[str, Check]] = []
        defaults: dict[str, Any] = {}

        def check(value: Any, path: str) -> Any:
            if isinstance(value, tuple) and len(cast("Any", value)) == 2:
                title, inner = cast("tuple[Any, Any]", value)
                return title, check(inner, path)
            if not isinstance(value, dict):
                return cast("Any", value)
            found = cast("dict[str, Any]", value)
            lacking = defaults.keys() - found.keys()
            changed: dict[str, Any] = {title: deepcopy(defaults[title]) for title in lacking}
            for title, step in steps:
                if title in found:
                    changed[title] = step(found[title], f"{path}[{title!r}]")
            return {**found, **changed} if changed else found

        self._records[name] = check  # a record may contain itself
        for field in schema["fields"]:
            step = self.of(field["type"])
            if step is not None:
                steps.append((field["name"], step))
            if self._default_differs(field):
                defaults[field["name"]] = self._types.native(field["type"], field["default"])
        return check

    def _of_items(self, schema: Mapping[str, Any]) -> Check | None:
        is_map = kind_of(schema) == "map"
        inner = self.of(schema["values" if is_map else "items"])
        if inner is None:
            return None

        def check(value: Any, path: str) -> Any:
            if is_map and isinstance(value, dict):
                found = cast("dict[Any, Any]", value)
                return {name: inner(one, f"{path}[{name!r}]") for name, one in found.items()}
            if not is_map and isinstance(value, list | tuple):
                return [
                    inner(one, f"{path}[{number}]") for number, one in enumerate(cast("list[Any]", value))
                ]
            return value

        return check

    def _of_union(self, branches: list[Any]) -> Check:
        found = [self._types.resolved(one) for one in branches]
        leaves = [leaf for leaf in map(_leaf, found) if leaf is not None]
        records = {one["name"]: self.of(one) for one in found if kind_of(one) == "record"}
        maps = [self.of(one) for one in found if kind_of(one) == "map"]
        lists = [self.of(one) for one in found if kind_of(one) == "array"]
        # Of several records, only their names say which one a dict is.
        of_dict = [*records.values(), *maps] if len(records) + len(maps) == 1 else []

        def check(value: Any, path: str) -> Any:
            step: Check | None
            if isinstance(value, tuple) and len(cast("Any", value)) == 2 and value[0] in records:
                step = records[cast("Any", value[0])]
            elif isinstance(value, dict):
                step = next(iter(of_dict), None)
            elif isinstance(value, list | tuple):
                step = next(iter(lists), None)
            else:
                # fastavro takes the first type that the value has.
                step = next((one for types, one in leaves if isinstance(value, types)), None)
            return cast("Any", value) if step is None else step(value, path)

        return check


# --- single values ----------------------------------------------------------------------------------------


def _with_zone(value: Any, path: str) -> Any:
    if isinstance(value, datetime) and value.tzinfo is None:
        raise ValueError(f"{path} is {value!r}, which has no time zone: give it one, such as UTC")
    return value


def _without_zone(value: Any, path: str) -> Any:
    if isinstance(value, datetime | time) and value.tzinfo is not None:
        raise ValueError(
            f"{path} is {value!r}, whose time zone would be lost: convert it, and leave the zone out with "
            ".replace(tzinfo=None)"
        )
    return value


def _without_hours(value: Any, path: str) -> Any:
    if isinstance(value, datetime):
        raise ValueError(f"{path} is {value!r}, and the schema has only a date: give .date() of it")
    return value


def _is_finite(value: Any, path: str) -> Any:
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"{path} is {value!r}, which a decimal of Avro can't be")
    return value


def _in_float(value: Any, path: str) -> Any:
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) > _FLOAT_MAX:
        raise ValueError(f"{path} is {value!r}, which is too large for a float: make it a double")
    return value


def _in_double(value: Any, path: str) -> Any:
    if isinstance(value, int) and abs(value) > 2**53 and int(float(value)) != value:
        raise ValueError(f"{path} is {value!r}, of which a double doesn't have all digits: make it a long")
    return value


def _as_uuid(value: Any, path: str) -> Any:
    """Text in the form that a UUID is written in, so that equal keys have equal bytes."""
    if not isinstance(value, str):
        return value
    try:
        return str(UUID(value))
    except ValueError as error:
        raise ValueError(f"{path} is {value!r}: {error}") from error


_PLAIN: Final[Mapping[str, Any]] = {"string": str, "bytes": bytes, "fixed": bytes, "int": int, "long": int}
_NUMBERS: Final[Mapping[str, Check]] = {"float": _in_float, "double": _in_double}
_LOGICAL: Final[Mapping[tuple[str, str], tuple[Any, Check | None]]] = {
    ("long", "timestamp-millis"): ((datetime, int), _with_zone),
    ("long", "timestamp-micros"): ((datetime, int), _with_zone),
    ("long", "local-timestamp-millis"): ((datetime, int), _without_zone),
    ("long", "local-timestamp-micros"): ((datetime, int), _without_zone),
    ("int", "time-millis"): ((time, int), _without_zone),
    ("long", "time-micros"): ((time, int), _without_zone),
    ("int", "date"): ((date, int), _without_hours),
    ("bytes", "decimal"): ((Decimal, bytes), _is_finite),
    ("fixed", "decimal"): ((Decimal, bytes), _is_finite),
    ("string", "uuid"): ((UUID, str), _as_uuid),
}


def _leaf(schema: Any) -> tuple[Any, Check | None] | None:
    """What values of a simple type are in Python, and how they are checked. None: it isn't one."""
    kind = kind_of(schema)
    if isinstance(schema, dict):
        logical = _LOGICAL.get((kind, cast("dict[str, Any]", schema).get("logicalType", "")))
        if logical is not None:
            return logical
    if kind in _NUMBERS:
        return (int, float), _NUMBERS[kind]
    return (_PLAIN[kind], None) if kind in _PLAIN else None
