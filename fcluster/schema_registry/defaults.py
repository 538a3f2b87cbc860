"""Defaults of fields in Avro schemas, as values of Python.

A field that the writer's schema doesn't have gets the default of the reader's. fastavro takes it as it stands
in the schema: a number for a time, text for bytes, an incomplete record, and a list or dict that all records
share. Responsible for: putting in its place what a reader would have got if the default had been written, a
copy for each record.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Final, cast

Finish = Callable[[Any], Any]
"""Takes a value that was read, and returns it with the right defaults. It may change it."""
_LOGICAL: Final = ("logicalType", "precision", "scale")
_CHANGEABLE: Final = (list, dict)


def compile_defaults(schema: Any) -> Finish | None:
    """What puts the right defaults into values that were read with a schema.

    Args:
        schema: the schema, parsed by fastavro.

    Returns:
        None: they are right as they are.
    """
    return Defaults(schema).finish_of(schema)


class Defaults:
    """The named types and the defaults of a schema, parsed by fastavro."""

    def __init__(self, schema: Any) -> None:
        self._named: dict[str, Any] = {}
        self._known: dict[str, Finish | None] = {}
        self._collect(schema)

    def _collect(self, schema: Any) -> None:
        for one in parts_of(schema):
            if isinstance(one, dict) and "name" in one:
                self._named[cast("dict[str, Any]", one)["name"]] = one
            self._collect(one)
        if isinstance(schema, dict) and "name" in schema:
            self._named[cast("dict[str, Any]", schema)["name"]] = schema

    def resolved(self, schema: Any) -> Any:
        """The schema that a name stands for. Others as they are."""
        return self._named.get(schema, schema) if isinstance(schema, str) else schema

    # --- defaults -------------------------------------------------------------------------------------

    def native(self, schema: Any, default: Any) -> Any:
        """A default as it would be read."""
        schema = self.resolved(schema)
        if isinstance(schema, list):
            return self.native(schema[0], default)  # a default is one of the first type
        if not isinstance(schema, dict):
            return self._of_type(schema, schema, default)
        parts = cast("dict[str, Any]", schema)
        kind = parts["type"]
        if kind in ("record", "error"):
            return {
                field["name"]: self.native(field["type"], default.get(field["name"], field.get("default")))
                for field in parts["fields"]
            }
        if kind == "array":
            return [self.native(parts["items"], one) for one in default]
        if kind == "map":
            return {name: self.native(parts["values"], one) for name, one in default.items()}
        if isinstance(kind, dict | list):
            return self.native(kind, default)
        return self._of_type(kind, parts, default)

    def _of_type(self, kind: str, schema: Any, default: Any) -> Any:
        if kind in ("bytes", "fixed"):
            default = default.encode("latin-1")  # so it is written in a schema
        elif kind in ("float", "double"):
            default = float(default)
        if not isinstance(schema, dict) or "logicalType" not in schema:
            return default
        import fastavro

        library, parts = cast("Any", fastavro), cast("dict[str, Any]", schema)
        plain = {name: part for name, part in parts.items() if name not in _LOGICAL}
        buffer = io.BytesIO()
        library.schemaless_writer(buffer, plain, default)
        buffer.seek(0)
        return library.schemaless_reader(buffer, parts, None)

    # --- values ---------------------------------------------------------------------------------------

    def finish_of(self, schema: Any) -> Finish | None:
        """See `compile_defaults`."""
        schema = self.resolved(schema)
        if isinstance(schema, list):
            return self._of_union(cast("list[Any]", schema))
        if not isinstance(schema, dict):
            return None
        parts = cast("dict[str, Any]", schema)
        kind = parts["type"]
        if kind in ("record", "error"):
            return self._of_record(parts)
        inner = self.finish_of(parts["items" if kind == "array" else "values"]) if _has_items(kind) else None
        if inner is None:
            return None
        if kind == "array":
            return lambda value: [inner(one) for one in value]
        return lambda value: {name: inner(one) for name, one in value.items()}

    def _of_record(self, schema: Mapping[str, Any]) -> Finish | None:
        name = schema["name"]
        if name in self._known:
            return self._known[name]
        if not self._needs_care(schema, set()):
            self._known[name] = None
            return None
        steps: list[tuple[str, Finish]] = []

        def finish(value: Any) -> Any:
            for field, step in steps:
                value[field] = step(value[field])
            return value

        self._known[name] = finish  # a record may contain itself
        for field in schema["fields"]:
            step = self._of_field(field)
            if step is not None:
                steps.append((field["name"], step))
        return finish

    def _of_field(self, field: Mapping[str, Any]) -> Finish | None:
        inner = self.finish_of(field["type"])
        if not self._is_wrong(field):
            return inner
        given = field["default"]
        native = self.native(field["type"], given)

        def finish(value: Any) -> Any:
            if type(value) is type(given) and value == given:
                return deepcopy(native)
            return value if inner is None else inner(value)

        return finish

    def _of_union(self, branches: list[Any]) -> Finish | None:
        found = [self.resolved(one) for one in branches]
        of_list = next((self.finish_of(one) for one in found if kind_of(one) == "array"), None)
        records = [(_names_of(one), self.finish_of(one)) for one in found if kind_of(one) == "record"]
        by_name = {one["name"]: self.finish_of(one) for one in found if kind_of(one) == "record"}
        of_map = next((self.finish_of(one) for one in found if kind_of(one) == "map"), None)
        if of_list is None and of_map is None and not any(step for _names, step in records):
            return None

        def finish(value: Any) -> Any:
            if isinstance(value, tuple):  # the record with its name
                name, inner = cast("tuple[str, Any]", value)
                of_record = by_name.get(name)
                return (name, inner if of_record is None else of_record(inner))
            if isinstance(value, list):
                return cast("Any", value) if of_list is None else of_list(value)
            if not isinstance(value, dict):
                return value
            names = frozenset(cast("dict[str, Any]", value))
            step = next((step for known, step in records if known == names), of_map)
            return cast("Any", value) if step is None else step(value)

        return finish

    def _is_wrong(self, field: Mapping[str, Any]) -> bool:
        """Whether fastavro's default of a field isn't what is meant, or would be shared."""
        if field.get("default") is None:
            return False
        native = self.native(field["type"], field["default"])
        return isinstance(native, _CHANGEABLE) or type(native) is not type(field["default"])

    def _needs_care(self, schema: Any, seen: set[str]) -> bool:
        schema = self.resolved(schema)
        if kind_of(schema) == "record":
            if schema["name"] in seen:
                return False
            seen.add(schema["name"])
            if any(map(self._is_wrong, schema["fields"])):
                return True
        return any(self._needs_care(one, seen) for one in parts_of(schema))


def _has_items(kind: object) -> bool:
    return kind in ("array", "map")


def kind_of(schema: Any) -> str:
    """The type of a schema. Empty for a union."""
    kind = cast("dict[str, Any]", schema).get("type") if isinstance(schema, dict) else schema
    return "record" if kind == "error" else kind if isinstance(kind, str) else ""


def _names_of(schema: Any) -> frozenset[str]:
    return frozenset(field["name"] for field in schema["fields"])


def parts_of(schema: Any) -> Iterator[Any]:
    """The schemas in a schema."""
    if isinstance(schema, list):
        yield from cast("list[Any]", schema)
    elif isinstance(schema, dict):
        parts = cast("dict[str, Any]", schema)
        yield from (parts[name] for name in ("items", "values") if name in parts)
        yield from (field["type"] for field in parts.get("fields", ()))
        if isinstance(parts.get("type"), dict | list):
            yield parts["type"]
