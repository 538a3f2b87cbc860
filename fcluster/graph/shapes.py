"""The shape of a model: its fields and their types, as data that is compared when a job has changed.

Responsible for: describing a model as the JSON that its objects are, and finding what in a changed model
doesn't fit what was stored before. A new field with a default fits; anything else doesn't. Invariant: a
shape depends on the class alone, not on the process or on the order of definitions. Pure.

A shape is a text for a simple type (``"int"``), or a dict with one of these:

    fields     name -> [whether it is required, shape]
    any        shapes, one of which fits
    each       the shape of all items of an array
    parts      the shapes of an array's items, in order
    values     the shape of all values of an object
    one of     the values that there are
    again      the name of a class that the shape is within
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

Shape = Any

_inspect = msgspec.inspect


def shape_of(model: type) -> Shape | None:
    """The shape of a dataclass, a Struct or a pydantic model. None if it isn't known."""
    try:
        if hasattr(model, "model_json_schema"):
            schema = cast("Any", model).model_json_schema(by_alias=True)
            return _of_schema(schema, schema.get("$defs", {}), frozenset())
        return _of_type(_inspect.type_info(model), frozenset())
    except Exception:  # noqa: BLE001  a user's class may be anything; then it isn't compared
        return None


def _of_type(info: Any, within: frozenset[type]) -> Shape:
    if isinstance(
        info,
        _inspect.DataclassType | _inspect.StructType | _inspect.TypedDictType | _inspect.NamedTupleType,
    ):
        if info.cls in within:
            return {"again": info.cls.__name__}
        inside = within | {info.cls}
        fields = [(one.encode_name, one.required, _of_type(one.type, inside)) for one in info.fields]
        if isinstance(info, _inspect.NamedTupleType) or getattr(info, "array_like", False):
            return {"parts": [shape for _name, _required, shape in fields]}
        return {"fields": {name: [required, shape] for name, required, shape in fields}}
    if isinstance(info, _inspect.UnionType):
        return {"any": [_of_type(one, within) for one in info.types]}
    if isinstance(info, _inspect.Metadata):
        return _of_type(info.type, within)
    if isinstance(info, _inspect.DictType):
        return {"values": _of_type(info.value_type, within)}
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


def _of_schema(schema: Mapping[str, Any], parts: Mapping[str, Any], within: frozenset[str]) -> Shape:
    """The shape in a JSON Schema as pydantic writes it."""
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
        return {"parts": [_of_schema(one, parts, within) for one in schema["prefixItems"]]}
    if isinstance(schema.get("items"), Mapping):
        return {"each": _of_schema(schema["items"], parts, within)}
    if isinstance(schema.get("additionalProperties"), Mapping):
        return {"values": _of_schema(schema["additionalProperties"], parts, within)}
    return " ".join(str(schema[word]) for word in ("type", "format") if word in schema) or "any"


def shape_difference(old: Shape, new: Shape, path: str = "") -> str | None:
    """What in `new` doesn't fit values of the shape `old`. None if all of it does."""
    if old == new:
        return None
    here = path.removeprefix(".") or "a value"
    if _has("fields", old, new):
        return _different_fields(old["fields"], new["fields"], path)
    for keyword, item in (("each", "[]"), ("values", "{}")):
        if _has(keyword, old, new):
            return shape_difference(old[keyword], new[keyword], f"{path}{item}")
    if isinstance(old, dict) and "again" in old and isinstance(new, dict) and "again" in new:
        return None  # another name of a class, whose shape is compared where it begins
    befores, nows = _alternatives(old), _alternatives(new)
    if len(befores) == len(nows) == 1:
        return f"{here} was {_text(old)}, and is {_text(new)}"
    for before in befores:
        found = [shape_difference(before, now, path) for now in nows]
        if None not in found:
            return f"{here} was {_text(old)}, and is {_text(new)}"
    return None


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


def _has(keyword: str, *shapes: Shape) -> bool:
    return all(isinstance(shape, dict) and keyword in shape for shape in shapes)


def _alternatives(shape: Shape) -> Sequence[Shape]:
    return cast("Sequence[Shape]", shape["any"]) if _has("any", shape) else [shape]


def _text(shape: Shape) -> str:
    if not isinstance(shape, dict):
        return str(shape)
    ((keyword, inside),) = cast("dict[str, Any]", shape).items()
    if keyword == "any":
        return " or ".join(map(_text, inside))
    if keyword == "one of":
        return f"one of {', '.join(inside)}"
    if keyword == "again":
        return str(inside)
    return {"fields": "an object", "values": "an object", "each": "an array", "parts": "an array"}[keyword]
