"""Between a record's bytes and what handlers see.

Responsible for: decoding and encoding keys and values of each kind that a topic can be declared with.
Keeps the invariants: the same key always encodes to the same bytes, because they choose the partition and
name the state; a value that is decoded and encoded again is the same value, integers of any length included;
what can't be encoded as declared, such as NaN in JSON, raises TypeError or ValueError with a message for the
job's author. A codec never sees a null key or a null value (a tombstone): the caller passes None by. Pure.

JSON is read by msgspec, since orjson rounds integers beyond 64 bits to floats. It is written by orjson, which
is the faster one at that, and whose bytes the keys of existing state have; what orjson refuses (long
integers) or changes (NaN and infinity become null) is noticed, and dealt with here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, cast

import msgspec
import orjson

from fcluster.common.failures import bounded_repr, type_of
from fcluster.common.topology import KeyKind, ValueKind

Decode = Callable[[bytes], Any]
Encode = Callable[[Any], bytes]

decode_json: Decode = msgspec.json.Decoder().decode
"""The value of a JSON document. Raises ValueError, or RecursionError; `decoding_trouble` says more."""
_pack = msgspec.msgpack.Encoder().encode
_BITS_64_MIN, _BITS_64_MAX = -(2**63), 2**64 - 1
_TOO_LONG = "Integer exceeds 64-bit range"
"""orjson's words for what it refuses, and JSON doesn't."""


def _encode_text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(_wrong_kind(value, "text", "a str"))
    return value.encode()


def _encode_bytes(value: Any) -> bytes:
    # bytes(5) would be five zero bytes, so the type is asked first.
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(_wrong_kind(value, "bytes", "bytes"))
    return bytes(value)  # pyright: ignore[reportUnknownArgumentType]


def encode_json(value: Any) -> bytes:
    """`value` as JSON.

    Raises:
        TypeError: something in it isn't JSON.
        ValueError: it holds NaN or infinity.
    """
    try:
        encoded = orjson.dumps(value)
    except TypeError as error:
        if _TOO_LONG not in str(error):
            raise
        encoded = orjson.dumps(_with_long_integers(value))
    if b"null" in encoded:
        check_finite(value)
    return encoded


def encode_json_key(value: Any) -> bytes:
    """As `encode_json`, and equal keys have equal bytes: names are sorted."""
    try:
        encoded = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        if _TOO_LONG not in str(error):
            raise
        encoded = orjson.dumps(_with_long_integers(value), option=orjson.OPT_SORT_KEYS)
    if b"null" in encoded:
        check_finite(value)
    return encoded


def check_finite(value: Any) -> None:
    """Assure that no float in `value` is NaN or infinite: orjson writes null for those.

    Called only for what has a null in its JSON, so its cost doesn't matter much.

    Raises:
        ValueError: one is; the message says where.
    """
    try:
        packed = _pack(value)
    except Exception:  # noqa: BLE001  what msgpack can't hold isn't wrong for that; it is looked through
        packed = b""
    # A float is 0xcb and eight bytes, with all bits of the exponent set in NaN and infinity.
    if not packed or b"\xcb\x7f" in packed or b"\xcb\xff" in packed:
        _find_not_finite(value, "the value")


def _find_not_finite(value: Any, path: str) -> None:
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{path} is {value!r}, which JSON can't hold")
    elif isinstance(value, dict):
        for key, item in cast("dict[Any, Any]", value).items():
            _find_not_finite(item, f"{path}[{bounded_repr(key, 40)}]")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(cast("Iterable[Any]", value)):
            _find_not_finite(item, f"{path}[{number}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _find_not_finite(getattr(value, field.name, None), f"{path}.{field.name}")


def _with_long_integers(value: Any) -> Any:
    """`value` with integers beyond 64 bits in a form that orjson writes digit for digit."""
    if type(value) is int and not _BITS_64_MIN <= value <= _BITS_64_MAX:
        return orjson.Fragment(str(value).encode())
    if isinstance(value, dict):
        return {key: _with_long_integers(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_with_long_integers(item) for item in cast("Iterable[Any]", value)]
    return value


def decoding_trouble(kind: KeyKind | ValueKind, raw: bytes, error: BaseException) -> BaseException:
    """The error to show for `raw`, which couldn't be decoded: JSON's with line and column."""
    if kind == "json" and isinstance(error, ValueError):
        try:
            orjson.loads(raw)
        except orjson.JSONDecodeError as better:
            return better
    return error


def _wrong_kind(value: Any, kind: str, expected: str) -> str:
    return (
        f"{bounded_repr(value)} is of type {type_of(value)}, but is written as {kind!r}, which takes "
        f"{expected}; convert it, or declare the kind of the topic or key_by as 'json'"
    )


# Built-in functions where possible: these run once or twice for each record.
_TEXT: tuple[Decode, Encode] = (bytes.decode, _encode_text)
_BYTES: tuple[Decode, Encode] = (bytes, _encode_bytes)
_KEY_CODECS: dict[KeyKind, tuple[Decode, Encode]] = {
    "text": _TEXT,
    "bytes": _BYTES,
    "json": (decode_json, encode_json_key),
}
_VALUE_CODECS: dict[ValueKind, tuple[Decode, Encode]] = {
    "json": (decode_json, encode_json),
    "text": _TEXT,
    "bytes": _BYTES,
}


def key_codec(kind: KeyKind) -> tuple[Decode, Encode]:
    """How keys of that kind are decoded and encoded. Equal JSON keys have equal bytes: names are sorted."""
    return _KEY_CODECS[kind]


def value_codec(kind: ValueKind) -> tuple[Decode, Encode]:
    """How values of that kind are decoded and encoded."""
    return _VALUE_CODECS[kind]
