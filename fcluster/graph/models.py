"""Models: a user's dataclasses, msgspec Structs and pydantic models as values, keys and state.

Responsible for: the codec of a model, the checks when it is declared, and messages that name the field that
doesn't fit. Invariants: a model is JSON on the outside, and a key has the same bytes as a "json" key with
these fields; what a model writes, it can read; reading a record that fits costs only the call of the
library's own decoder. Pydantic is optional: its models are recognised by what they have, and it is never
imported. Pure.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final, TypeVar, cast

import msgspec
import orjson

from fcluster.common.errors import JobError
from fcluster.common.failures import bounded_repr, bounded_text, describe_exception, type_of
from fcluster.graph.codecs import (
    CODEC_NAMES,
    Decode,
    Encode,
    Kind,
    ModelCodec,
    ModelError,
    check_finite,
    codec_is_known,
    data_looks_like,
    decode_json,
    encode_json_key,
)

_T = TypeVar("_T")

_NOTHING: Final = object()
_FOUND_CHARACTERS_MAX: Final = 40
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_OF_KEY: Final = "key` in `"
_JSON_NAMES: Final = {"NoneType": "null", "dict": "object", "list": "array"}
_KINDS_OF_TYPES: Final[dict[Any, str]] = {
    str: "text",
    bytes: "bytes",
    int: "int",
    dict: "json",
    list: "json",
    float: "json",
    object: "json",
}
_KEY_TYPES = (
    msgspec.inspect.StrType,
    msgspec.inspect.IntType,
    msgspec.inspect.BoolType,
    msgspec.inspect.NoneType,
    msgspec.inspect.BytesType,
    msgspec.inspect.DateType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.EnumType,
    msgspec.inspect.LiteralType,
)
"""What has one text for each value. Equal floats, decimals and times may have several."""

_WITH_FIELDS = (
    msgspec.inspect.DataclassType,
    msgspec.inspect.StructType,
    msgspec.inspect.TypedDictType,
    msgspec.inspect.NamedTupleType,
)


def is_model(kind: object) -> bool:
    """Whether `kind` is a dataclass, a Struct or a pydantic model (the class, not an instance)."""
    if not isinstance(kind, type):
        return False
    model = cast("type[Any]", kind)
    return dataclasses.is_dataclass(model) or issubclass(model, msgspec.Struct) or _is_pydantic(model)


def _is_pydantic(kind: type) -> bool:
    return hasattr(kind, "__pydantic_validator__") and hasattr(kind, "__pydantic_serializer__")


def model_of(kind: Kind | None) -> type[Any] | None:
    """The model whose objects a kind has. None: it has none."""
    return kind.model if isinstance(kind, ModelCodec) else None


def field_names(model: type) -> tuple[str, ...]:
    """The names of a model's attributes, as functions of a job use them."""
    if issubclass(model, msgspec.Struct):
        return model.__struct_fields__
    if dataclasses.is_dataclass(cast("Any", model)):
        return tuple(field.name for field in dataclasses.fields(cast("Any", model)))
    return tuple(cast("Any", model).__pydantic_fields__)


def declared_kind(kind: object, what: str, of: str = "") -> Kind:
    """The kind that a job declares: a codec's name, a `Codec`, or a model.

    Args:
        what: the parameter's name, for the message.
        of: what the parameter belongs to, for the message.

    Raises:
        JobError: it is none of these, or the model can't be used.
    """
    if is_model(kind):
        return model_codec(cast("type[Any]", kind))
    if codec_is_known(kind):
        return cast("Kind", kind)
    known = _KINDS_OF_TYPES.get(kind) if isinstance(kind, type) else None
    hint = f" For {cast('type', kind).__name__} that is {known!r}." if known else ""
    raise JobError(
        f"{what}={bounded_repr(kind)}{of} is unknown.",
        remedy=f"Use one of {', '.join(map(repr, CODEC_NAMES))}, a Codec, or a model: a dataclass, a "
        f"msgspec.Struct or a pydantic model (the class).{hint}",
    )


@cache
def model_codec(model: type[_T]) -> ModelCodec[_T]:
    """The codec of a model. The same object each time, because topics are compared.

    Raises:
        JobError: a field has a type that JSON has no form for, or the model isn't complete.
    """
    if _is_pydantic(model):
        return _pydantic_codec(model)
    title = model.__name__
    try:
        decode = cast("Decode", msgspec.json.Decoder(model).decode)
        info = msgspec.inspect.type_info(model)
    except Exception as error:  # what a user's annotations raise
        raise _unusable(title, f"{describe_exception(error)}") from error
    for path, kind in _types_in(info, title):
        if isinstance(kind, msgspec.inspect.CustomType):
            raise _unusable(title, f"{path} is of type {kind.cls.__name__}, which JSON has no form for")
    encode_sorted = msgspec.json.Encoder(order="sorted").encode
    return _codec(model, decode, msgspec.json.Encoder().encode, encode_sorted, _explain_msgspec)


def _pydantic_codec(model: type[_T]) -> ModelCodec[_T]:
    title, any_model = model.__name__, cast("Any", model)
    if getattr(model, "__pydantic_complete__", True) is False:
        try:
            any_model.model_rebuild()
        except Exception as error:  # what a user's annotations raise
            raise _unusable(title, describe_exception(error)) from error
    decode = cast("Decode", any_model.__pydantic_validator__.validate_json)
    to_json = any_model.__pydantic_serializer__.to_json

    def encode(value: Any) -> bytes:
        return to_json(value, by_alias=True, warnings="error")

    return _codec(model, decode, encode, encode, _explain_pydantic)


def _codec(
    model: type[_T],
    decode: Decode,
    encode: Encode,
    encode_sorted: Encode,
    explain: Callable[[type, Decode, bytes, BaseException], BaseException],
) -> ModelCodec[_T]:
    title = model.__name__

    def explained(raw: bytes, error: BaseException) -> BaseException:
        try:
            return explain(model, decode, raw, error)
        except Exception:  # noqa: BLE001  what is only an explanation never fails itself
            return error

    def read_again(value: Any, raw: bytes) -> Any:
        if b"null" in raw:
            check_finite(value)
        try:
            return decode(raw)
        except Exception as error:
            text = _text_of(explained(raw, error))
            raise ModelError(f"what would be written could not be read again: {text}") from error

    def check_type(value: Any) -> None:
        if type(value) is not model:
            raise TypeError(
                f"{bounded_repr(value)} is of type {type_of(value)}, but {title} is declared there"
            )

    def encode_value(value: Any) -> bytes:
        check_type(value)
        raw = encode(value)
        read_again(value, raw)
        return raw

    def encode_key(value: Any) -> bytes:
        check_type(value)
        # By way of what is read: 1 and 1.0 are equal, but not the same text.
        return encode_json_key(decode_json(encode_sorted(read_again(value, encode(value)))))

    def encode_state(value: Any) -> bytes:
        check_type(value)
        raw = encode(value)
        again = read_again(value, raw)
        if again != value and model.__eq__ is not object.__eq__:
            raise ModelError(f"{bounded_repr(value)} would come back as {bounded_repr(again)}")
        return raw

    return ModelCodec(
        "json",
        encode_value,
        cast("Callable[[bytes], _T]", decode),
        model=model,
        explain=explained,
        encode_key=encode_key,
        encode_state=encode_state,
    )


def check_key_model(codec: ModelCodec[Any], what: str) -> None:
    """Check that equal keys of a model always have equal bytes.

    Args:
        what: has the key, for the message.

    Raises:
        JobError: it can't be a key.
    """
    model = codec.model
    remedy = "Use a dataclass or a Struct whose fields are text, integers, dates, UUIDs or enums."
    if _is_pydantic(model):
        raise JobError(f"The pydantic model {model.__name__} can't be the key of {what}.", remedy=remedy)
    for path, kind in _types_in(msgspec.inspect.type_info(model), model.__name__):
        if not isinstance(kind, _KEY_TYPES):
            named = type(kind).__name__.removesuffix("Type").lower()
            raise JobError(
                f"{model.__name__} can't be the key of {what}: {path} is of the kind {named}, of which equal "
                "values may have different bytes.",
                remedy=remedy,
            )


def check_field(model: type, name: str, what: str) -> None:
    """Check that a model has a field. Raises JobError if it doesn't."""
    names = field_names(model)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise JobError(
            f"{what} names the field {name!r}, but {model.__name__} has none of that name.",
            remedy=f"Did you mean {near[0]!r}?" if near else f"Its fields are {', '.join(names)}.",
        )


def _unusable(title: str, why: str) -> JobError:
    return JobError(
        f"{title} can't be read from JSON: {bounded_text(why, 1_000)}.",
        remedy="Correct the type of that field, or declare the topic as 'json' and convert it in a map.",
    )


def _types_in(info: Any, path: str, seen: frozenset[Any] = frozenset()) -> Iterator[tuple[str, Any]]:
    """The types without types in them, each with the path that leads to it."""
    inspect = msgspec.inspect
    if isinstance(info, _WITH_FIELDS):
        if info.cls not in seen:
            for field in info.fields:
                yield from _types_in(field.type, f"{path}.{field.name}", seen | {info.cls})
    elif isinstance(info, inspect.UnionType):
        for one in info.types:
            yield from _types_in(one, path, seen)
    elif isinstance(info, inspect.ListType | inspect.VarTupleType):
        yield from _types_in(info.item_type, f"{path}[]", seen)
    elif isinstance(info, inspect.TupleType):
        for number, one in enumerate(info.item_types):
            yield from _types_in(one, f"{path}[{number}]", seen)
    elif isinstance(info, inspect.Metadata):
        yield from _types_in(info.type, path, seen)
    elif isinstance(info, inspect.SetType | inspect.FrozenSetType | inspect.DictType):
        yield path, info
        parts = (info.key_type, info.value_type) if isinstance(info, inspect.DictType) else (info.item_type,)
        for one in parts:
            yield from _types_in(one, f"{path}[]", seen)
    else:
        yield path, info


# --- explaining -------------------------------------------------------------------------------------------


def _text_of(error: BaseException) -> str:
    return str(error) if isinstance(error, ModelError) else describe_exception(error)


def _explain_msgspec(model: type, decode: Decode, raw: bytes, error: BaseException) -> BaseException:
    if not isinstance(error, msgspec.ValidationError):
        return _not_json(raw, error)
    what, _, place = str(error).partition(" - at `")
    of_key = "a key: " if place.startswith(_OF_KEY) else ""
    path = place.removeprefix(_OF_KEY).rstrip("`")
    shown, found = _located(decode, raw, error, path or "$")
    for pattern, reason in ((_MISSING, "is missing"), (_UNKNOWN, "is not a field")):
        matched = pattern.fullmatch(what)
        if matched is not None:
            return _does_not_fit(model, matched[1], reason, shown)
    reason = what[:1].lower() + what[1:].replace("`", "")
    if found is not _NOTHING and not isinstance(found, dict | list) and not of_key:
        reason = f"{reason} ({bounded_repr(cast('object', found), _FOUND_CHARACTERS_MAX)})"
    return _does_not_fit(model, _field_in(path), f"{of_key}{reason}", shown)


def _explain_pydantic(model: type, _decode: Decode, raw: bytes, error: BaseException) -> BaseException:
    if not hasattr(error, "errors"):
        return error
    first, *others = cast("Any", error).errors(include_url=False, include_context=False)
    if first["type"] == "json_invalid":
        return _not_json(raw, error)
    place: tuple[Any, ...] = first["loc"]
    if first["type"] in ("missing", "extra_forbidden"):
        reason, place = ("is missing" if first["type"] == "missing" else "is not a field"), place[:-1]
        field = str(first["loc"][-1])
    else:
        field = next((one for one in reversed(place) if isinstance(one, str)), "")
        found = first["input"]
        got = _JSON_NAMES.get(type_of(found), type_of(found))
        message = str(first["msg"]).replace("Input should be ", "expected ", 1)
        shown = "" if got in ("object", "array") else f" ({bounded_repr(found, _FOUND_CHARACTERS_MAX)})"
        reason = f"{message[:1].lower()}{message[1:]}, got {got}{shown}"
    path = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in place)
    more = f", and {len(others)} more" if others else ""
    return _does_not_fit(model, field, reason, f"${path}{more}")


def _does_not_fit(model: type, field: str, reason: str, where: str) -> ModelError:
    what = f"{field}: {reason}" if field else reason
    return ModelError(f"{what}, at {where} (declared as {model.__name__})")


def _not_json(raw: bytes, error: BaseException) -> BaseException:
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError as better:
        hint = data_looks_like("json", raw)
        return ModelError(f"it isn't JSON: {better}{f'; {hint}' if hint else ''}")
    return error


def _field_in(path: str) -> str:
    names = [name for name, _place in _STEP.findall(path) if name]
    return names[-1] if names else ""


def _located(decode: Decode, raw: bytes, error: BaseException, path: str) -> tuple[str, Any]:
    """The path with the names that msgspec leaves out (``[...]`` for an entry of an object), and the value
    that is there.
    """
    document: Any = decode_json(raw)
    node, shown = document, "$"
    for name, place in _STEP.findall(path):
        if place == "...":
            entry = _failing_entry(decode, document, node, str(error))
            if entry is None:
                return path, _NOTHING
            node, shown = node[entry], f"{shown}[{bounded_repr(entry, _FOUND_CHARACTERS_MAX)}]"
        else:
            node = node[int(place) if place else name]
            shown = f"{shown}[{place}]" if place else f"{shown}.{name}"
    return shown, node


def _failing_entry(decode: Decode, document: Any, node: dict[str, Any], message: str) -> str | None:
    """The first entry of `node`, a part of `document`, with which decoding fails like that. Only that entry
    is left in `node`.
    """
    entries = list(node.items())
    low, high = 0, len(entries)
    while low < high:
        middle = (low + high) // 2
        node.clear()
        node.update(entries[: middle + 1])
        try:
            decode(msgspec.json.encode(document))
        except Exception as error:  # noqa: BLE001
            fails = str(error) == message
        else:
            fails = False
        if fails:
            high = middle
        else:
            low = middle + 1
    if low == len(entries):
        return None
    name, value = entries[low]
    node.clear()
    node[name] = value
    return name
