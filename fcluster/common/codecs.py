"""Between a record's bytes and what handlers see.

Responsible for: decoding and encoding keys and values of each kind that a topic can be declared with.
Keeps the invariants: the same key always encodes to the same bytes, because they choose the partition and
name the state; what can't be encoded as declared raises TypeError or ValueError with a message for the
job's author. A codec never sees a null key or a null value (a tombstone): the caller passes None by. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from fcluster.common.topology import KeyKind, ValueKind

Decode = Callable[[bytes], Any]
Encode = Callable[[Any], bytes]


def _encode_text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(_wrong_kind(value, "text", "a str"))
    return value.encode()


def _encode_bytes(value: Any) -> bytes:
    # bytes(5) would be five zero bytes, so the type is asked first.
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(_wrong_kind(value, "bytes", "bytes"))
    return bytes(value)  # pyright: ignore[reportUnknownArgumentType]


def _encode_json_key(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _wrong_kind(value: Any, kind: str, expected: str) -> str:
    return (
        f"{value!r:.80} is of type {type(value).__name__}, but is written as {kind!r}, which takes {expected}"
        "; convert it, or declare the topic's or key_by's kind as 'json'"
    )


# Built-in functions where possible: these run once or twice for each record.
_TEXT: tuple[Decode, Encode] = (bytes.decode, _encode_text)
_BYTES: tuple[Decode, Encode] = (bytes, _encode_bytes)
_KEY_CODECS: dict[KeyKind, tuple[Decode, Encode]] = {
    "text": _TEXT,
    "bytes": _BYTES,
    "json": (orjson.loads, _encode_json_key),
}
_VALUE_CODECS: dict[ValueKind, tuple[Decode, Encode]] = {
    "json": (orjson.loads, orjson.dumps),
    "text": _TEXT,
    "bytes": _BYTES,
}


def key_codec(kind: KeyKind) -> tuple[Decode, Encode]:
    """How keys of that kind are decoded and encoded. Equal JSON keys have equal bytes: names are sorted."""
    return _KEY_CODECS[kind]


def value_codec(kind: ValueKind) -> tuple[Decode, Encode]:
    """How values of that kind are decoded and encoded."""
    return _VALUE_CODECS[kind]
