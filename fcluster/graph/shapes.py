"""The shape of a model: its fields and their types, as data that is compared when a job has changed.

Responsible for: describing a model as the JSON that its objects are, and finding what in a changed model
doesn't fit what was stored before. What fits: a new field with a default, a wider type, more values of an
enum, looser limits. Anything else doesn't. Invariant: a shape depends on the class alone, not on the process,
on the order of definitions, or on the version of a library. Pure.

A shape is a text for a simple type (``"int"``), or a dict with one of these:

    fields     name -> [whether it is required, shape]
    any        shapes, one of which fits
    each       the shape of all items of an array
    parts      the shapes of an array's items, in order
    row        [name, whether it is required, shape] of an array's items, in order
    values     the shape of all values of an object; "keys" has that of their names
    one of     the values that there are
    again      the name of a class that the shape is within
    type       a simple type with limits

and with "limits", name -> value, if not all such values are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from math import inf
from typing import Any, cast

import msgspec

Shape = Any

_inspect = msgspec.inspect
_LIMITS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern", "tz")
"""Attributes of msgspec's types."""
_LIMITS_IN_SCHEMA = {
    "exclusiveMinimum": "gt",
    "minimum": "ge",
    "exclusiveMaximum": "lt",
    "maximum": "le",
    "multipleOf": "multiple_of",
    "pattern": "pattern",
    "uniqueItems": "unique",
    **{f"min{what}": "min_length" for what in ("Length", "Items", "Properties")},
    **{f"max{what}": "max_length" for what in ("Length", "Items", "Properties")},
    **{name: name for name in ("tz", "max_digits", "decimal_places")},
}
_MOST = ("max_length", "max_digits", "decimal_places")
_TYPES_IN_SCHEMA = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "null": "none",
    "string date": "date",
    "string date-time": "datetime",
    "string time": "time",
    "string duration": "timedelta",
    "string uuid": "uuid",
}
"""What is the same JSON as a type of msgspec has its name."""
_WIDER = {"int": ("float", "decimal"), "float": ("decimal",)}
"""Types that take all JSON of another one, and mean the same by it."""


def shape_of(model: type) -> Shape | None:
    """The shape of a dataclass, a Struct or a pydantic model. None if it isn't known."""
    try:
        if hasattr(model, "model_json_schema"):
            make = cast("Any", model).model_json_schema
            generator = signature(make).parameters["schema_generator"].default
            schema = make(by_alias=True, schema_generator=_telling_more(generator))
            return _of_schema(schema, schema.get("$defs", {}), frozenset())
        return _of_type(_inspect.type_info(model), frozenset())
    except Exception:  # noqa: BLE001  a user's class may be anything; then it isn't compared
        return None


# --- models of msgspec ----------------------------------------------------------------------------------


def _of_type(info: Any, within: frozenset[type]) -> Shape:
    limits = {name: found for name in _LIMITS if (found := getattr(info, name, None)) is not None}
    if isinstance(info, _inspect.SetType | _inspect.FrozenSetType):
        limits["unique"] = True
    return _limited(_of_unlimited(info, within), limits)


def _of_unlimited(info: Any, within: frozenset[type]) -> Shape:
    if isinstance(
        info,
        _inspect.DataclassType | _inspect.StructType | _inspect.TypedDictType | _inspect.NamedTupleType,
    ):
        if info.cls in within:
            return {"again": info.cls.__name__}
        inside = within | {info.cls}
        fields = [[one.encode_name, one.required, _of_type(one.type, inside)] for one in info.fields]
        tag_field = getattr(info, "tag_field", None)
        if tag_field is not None:
            fields.insert(0, [tag_field, True, {"one of": [repr(getattr(info, "tag", None))]}])
        if isinstance(info, _inspect.NamedTupleType) or getattr(info, "array_like", False):
            return {"row": fields}
        return {"fields": {name: [required, shape] for name, required, shape in fields}}
    if isinstance(info, _inspect.UnionType):
        return {"any": [_of_type(one, within) for one in info.types]}
    if isinstance(info, _inspect.Metadata):
        return _of_type(info.type, within)
    if isinstance(info, _inspect.DictType):
        return {"values": _of_type(info.value_type, within), "keys": _of_type(info.key_type, within)}
    if isinstance(info, _inspect.TupleType):
        return {"parts": [_of_type(one, within) for one in info.item_types]}
    if isinstance(
        info, _inspect.ListType | _inspect.VarTupleType | _inspect.SetType | _inspect.FrozenSetType
    ):
        return {"each": _of_type(info.item_type, within)}
    if isinstance(info, _inspect.LiteralType):
        return {"one of": sorted(map(repr, info.values))}
    if isinstance(info, _inspect.EnumType):
        return {"one of": sorted(repr(one.value) for one in info.cls)}
    return type(info).__name__.removesuffix("Type").lower()


# --- models of pydantic ---------------------------------------------------------------------------------


@cache
def _telling_more(generator: Any) -> Any:
    """Pydantic's generator of JSON Schema, that also tells what a JSON Schema can't say, or says differently
    in other versions of pydantic.
    """

    class TellingMore(generator):
        def dict_schema(self, schema: Any) -> Any:
            inherited: Any = super()
            made: dict[str, Any] = dict(inherited.dict_schema(schema))
            made |= {"additionalProperties": {}, "propertyNames": {}}
            made.pop("patternProperties", None)
            for part, word in (("values_schema", "additionalProperties"), ("keys_schema", "propertyNames")):
                if part in schema:
                    made[word] = self.generate_inner(schema[part])
            return made

        def decimal_schema(self, schema: Any) -> Any:
            words = {limit: word for word, limit in _LIMITS_IN_SCHEMA.items() if limit in schema}
            return {"type": "decimal", **{word: float(schema[limit]) for limit, word in words.items()}}

        def datetime_schema(self, schema: Any) -> Any:
            inherited: Any = super()
            return _zoned(inherited.datetime_schema(schema), schema)

        def time_schema(self, schema: Any) -> Any:
            inherited: Any = super()
            return _zoned(inherited.time_schema(schema), schema)

    return TellingMore


def _zoned(made: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Also says whether a time must have a time zone (True), or must have none."""
    zone = schema.get("tz_constraint")
    return made if zone is None else {**made, "tz": zone != "naive"}


def _of_schema(schema: Mapping[str, Any], parts: Mapping[str, Any], within: frozenset[str]) -> Shape:
    """The shape in a JSON Schema as pydantic writes it."""
    limits = {limit: schema[word] for word, limit in _LIMITS_IN_SCHEMA.items() if word in schema}
    return _limited(_of_unlimited_schema(schema, parts, within), limits)


def _of_unlimited_schema(
    schema: Mapping[str, Any], parts: Mapping[str, Any], within: frozenset[str]
) -> Shape:
    reference = schema.get("$ref")
    if reference is not None:
        name = str(reference).rpartition("/")[2]
        return {"again": name} if name in within else _of_schema(parts[name], parts, within | {name})
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return {"any": [_of_schema(one, parts, within) for one in schema[keyword]]}
    if "properties" in schema:
        required = schema.get("required", ())
        fields = schema["properties"].items()
        return {"fields": {name: [name in required, _of_schema(one, parts, within)] for name, one in fields}}
    if "enum" in schema or "const" in schema:
        return {"one of": sorted(map(repr, schema.get("enum", [schema.get("const")])))}
    if "prefixItems" in schema:
        items = [(one.get("title"), _of_schema(one, parts, within)) for one in schema["prefixItems"]]
        if any(title is None for title, _shape in items):
            return {"parts": [shape for _title, shape in items]}
        # Only the items of a named tuple have titles. They are made of the fields' names.
        names, least = [title.lower().replace(" ", "_") for title, _shape in items], schema.get("minItems", 0)
        return {"row": [[names[at], at < least, shape] for at, (_title, shape) in enumerate(items)]}
    if isinstance(schema.get("items"), Mapping):
        return {"each": _of_schema(schema["items"], parts, within)}
    if isinstance(schema.get("additionalProperties"), Mapping):
        words = ("additionalProperties", "propertyNames")
        values, keys = (_of_schema(schema.get(word, {}), parts, within) for word in words)
        return {"values": values, "keys": keys}
    found = " ".join(str(schema[word]) for word in ("type", "format") if word in schema) or "any"
    return _TYPES_IN_SCHEMA.get(found, found)


def _limited(shape: Shape, limits: dict[str, Any]) -> Shape:
    if _kind(shape) in ("parts", "row", "any"):
        return shape  # their lengths say it already
    if shape == "int":
        # So that both ways to say it are the same.
        if "gt" in limits:
            limits["ge"] = max(limits.pop("gt") + 1, limits.get("ge", -inf))
        if "lt" in limits:
            limits["le"] = min(limits.pop("lt") - 1, limits.get("le", inf))
    if not limits:
        return shape
    named: dict[str, Any] = cast("dict[str, Any]", shape) if isinstance(shape, dict) else {"type": shape}
    return {**named, "limits": limits}


# --- comparing ------------------------------------------------------------------------------------------


def shape_difference(old: Shape, new: Shape, path: str = "") -> str | None:
    """What in `new` doesn't fit values of the shape `old`. None if all of it does."""
    if old == new or new == "any":
        return None
    befores, nows = _alternatives(old), _alternatives(new)
    if len(befores) == len(nows) == 1:
        return _difference(befores[0], nows[0], path)
    for before in befores:
        found = [(now, _difference(before, now, path)) for now in nows]
        if all(difference is not None for _now, difference in found):
            alike = [difference for now, difference in found if _kind(now) == _kind(before)]
            return alike[0] if len(alike) == 1 else _changed(old, new, path)
    return None


def _difference(old: Shape, new: Shape, path: str) -> str | None:
    """Like `shape_difference`, for shapes that aren't alternatives."""
    kind, now = _kind(old), _kind(new)
    found: str | None = None
    if new == "any" or kind == now == "again":
        return None  # another name of a class, whose shape is compared where it begins
    if kind == now == "fields":
        return _different_fields(old["fields"], new["fields"], path)
    if kind == now == "row":
        return _different_row(old["row"], new["row"], path)
    if kind == now == "parts" and len(old["parts"]) == len(new["parts"]):
        return _first(
            old["parts"], new["parts"], [f"{path}[{number}]" for number in range(len(old["parts"]))]
        )
    if kind == "parts" and now == "each":
        found = _first(old["parts"], [new["each"]] * len(old["parts"]), [f"{path}[]"] * len(old["parts"]))
    elif kind == now == "each":
        found = shape_difference(old["each"], new["each"], f"{path}[]")
    elif kind == now == "values":
        found = shape_difference(old["keys"], new["keys"], f"{path}{{key}}")
        found = found or shape_difference(old["values"], new["values"], f"{path}{{}}")
    elif kind == now == "one of":
        return None if set(old["one of"]) <= set(new["one of"]) else _changed(old, new, path)
    elif kind == "one of":
        return None if {_kind_of_text(one) for one in old["one of"]} == {new} else _changed(old, new, path)
    elif kind == "parts" or (kind != now and now not in _WIDER.get(kind, ())):
        return _changed(old, new, path)
    if found is not None:
        return found
    limit = _new_limit(_limits(old), _limits(new))
    return None if limit is None else f"{_here(path)} has a new limit, {limit}"


def _different_fields(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> str | None:
    for name, (was_required, shape) in old.items():
        title = f"{path}.{name}".removeprefix(".")
        if name not in new:
            return f"the field {title!r} is gone"
        is_required, now = new[name]
        found = shape_difference(shape, now, f"{path}.{name}")
        if found is not None:
            return found
        if is_required and not was_required:
            return f"the field {title!r} has lost its default"
    for name, (is_required, _shape) in new.items():
        if name not in old and is_required:
            return f"the new field {f'{path}.{name}'.removeprefix('.')!r} has no default"
    return None


def _different_row(old: Sequence[Any], new: Sequence[Any], path: str) -> str | None:
    """Fields that are found by their places. New ones have to be at the end."""
    names = [name for name, _required, _shape in new]
    for place, (name, _required, _shape) in enumerate(old):
        title = f"{path}.{name}".removeprefix(".")
        if name not in names:
            return f"the field {title!r} is gone"
        if names.index(name) != place:
            return f"the field {title!r} is at another place, and objects are stored as arrays"
    return _different_fields(_by_name(old), _by_name(new), path)


def _by_name(row: Sequence[Any]) -> dict[str, Any]:
    return {name: [required, shape] for name, required, shape in row}


def _first(olds: Sequence[Shape], news: Sequence[Shape], paths: Sequence[str]) -> str | None:
    found = (shape_difference(old, new, path) for old, new, path in zip(olds, news, paths, strict=True))
    return next((difference for difference in found if difference is not None), None)


def _new_limit(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """A limit that excludes values which were allowed."""
    for name, value in new.items():
        before = old.get(name)
        if name in ("ge", "gt", "le", "lt"):
            is_looser = _admits(name, value, old)
        elif name == "min_length":
            is_looser = value <= (before or 0)
        elif name in _MOST:
            is_looser = before is not None and before <= value
        elif name == "multiple_of":
            is_looser = before is not None and before % value == 0
        else:
            is_looser = before == value
        if not is_looser:
            return f"{name}={value!r}"
    return None


def _admits(name: str, value: Any, old: Mapping[str, Any]) -> bool:
    """Whether a bound lets pass all that the old bounds did."""
    sign = 1 if name[0] == "g" else -1
    olds = [(sign * old[one], one[1] == "t") for one in (f"{name[0]}e", f"{name[0]}t") if one in old]
    return bool(olds) and max(olds) >= (sign * value, name[1] == "t")


def _kind(shape: Shape) -> str:
    """The keyword of a shape, or the name of a simple type."""
    if not isinstance(shape, dict):
        return str(shape)
    named = cast("dict[str, Any]", shape)
    return str(named["type"]) if "type" in named else next(iter(named))


def _kind_of_text(value: str) -> str:
    """The type of a value that is the only one, as it is shown."""
    return "str" if value[:1] in "'\"" else "int" if value.lstrip("-").isdigit() else "other"


def _limits(shape: Shape) -> Mapping[str, Any]:
    return cast("dict[str, Any]", shape).get("limits", {}) if isinstance(shape, dict) else {}


def _alternatives(shape: Shape) -> Sequence[Shape]:
    return cast("Sequence[Shape]", shape["any"]) if _kind(shape) == "any" != shape else [shape]


def _here(path: str) -> str:
    return path.removeprefix(".") or "a value"


def _changed(old: Shape, new: Shape, path: str) -> str:
    return f"{_here(path)} was {_text(old)}, and is {_text(new)}"


def _text(shape: Shape) -> str:
    named: dict[str, Any] = cast("dict[str, Any]", shape) if isinstance(shape, dict) else {"type": shape}
    kind, limits = _kind(named), ", ".join(f"{name}={value!r}" for name, value in _limits(named).items())
    if "type" in named:
        text = kind
    elif kind == "any":
        text = " or ".join(map(_text, named["any"]))
    elif kind == "one of":
        text = f"one of {', '.join(named['one of'])}"
    elif kind == "again":
        text = str(named["again"])
    elif kind in ("parts", "row"):
        text = f"an array of {len(named[kind])}"
    else:
        text = "an array" if kind == "each" else "an object"
    return f"{text} ({limits})" if limits else text
