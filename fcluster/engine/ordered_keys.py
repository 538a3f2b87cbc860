"""Encodes keys of entries as bytes. The keys of one group are adjacent, and sorted like the values that they
encode.

Responsible for: the composite keys of stores with several entries for each key of the stream, and the
encodings of ordered keys. Their order is that of bytes, compared from the first byte on, as RocksDB does.
Pure.

    group        length of the stream's key (1 byte; or 255, and 4 bytes big-endian) | the stream's key
    entry        group | ordered key

No group is a prefix of another one, so a range of ordered keys within a group is a range of keys.

    text, bytes  as they are, alone; in a tuple each 0 byte is followed by 255, and 0 0 ends it
    int          sign and number of bytes (128 + n, or 127 - n if negative) | n bytes big-endian (of a
                 negative one the complement of its amount)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fcluster.common.failures import bounded_repr, type_of
from fcluster.graph.codecs import Codec, key_codec
from fcluster.graph.states import KeyParts

TIME_BYTES = 8
_LONG_GROUP = 255
_INT_BYTES_MAX = 127
_ESCAPED_0 = b"\x00\xff"
_END = b"\x00\x00"

EncodeKey = Callable[[Any], bytes]
DecodeKey = Callable[[bytes], Any]


def group_of_key(key: bytes) -> bytes:
    """The prefix of all entries of one key of the stream."""
    length = len(key)
    if length < _LONG_GROUP:
        return bytes((length,)) + key
    return bytes((_LONG_GROUP,)) + length.to_bytes(4, "big") + key


def group_of_entry(entry: bytes) -> bytes:
    """The group that an entry's key begins with."""
    length = entry[0]
    if length < _LONG_GROUP:
        return entry[: 1 + length]
    return entry[: 5 + int.from_bytes(entry[1:5], "big")]


def key_of_group(group: bytes) -> bytes:
    """The stream's key from which a group was made."""
    return group[1:] if group[0] < _LONG_GROUP else group[5:]


def end_of_prefix(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`. Empty if there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes((kept[-1] + 1,)) if kept else b""


def encode_time(time_ms: int) -> bytes:
    """A time as a key. The time is in milliseconds, and not negative."""
    return time_ms.to_bytes(TIME_BYTES, "big")


def decode_time(raw: bytes) -> int:
    """The time that a key begins with."""
    return int.from_bytes(raw[:TIME_BYTES], "big")


def ended(encoded: bytes) -> bytes:
    """Bytes that are followed by something in a composite key. They keep their order, and none is a prefix of
    another one.
    """
    return encoded.replace(b"\x00", _ESCAPED_0) + _END


def take_ended(raw: bytes, at: int) -> tuple[bytes, int]:
    """The bytes that were passed to `ended` and now begin at `at`, and the position after them."""
    end = at
    while True:
        end = raw.index(0, end)
        if raw[end + 1] == 0:
            return raw[at:end].replace(_ESCAPED_0, b"\x00"), end + 2
        end += 2


def ordered_key(parts: KeyParts) -> tuple[EncodeKey, DecodeKey]:
    """The functions that encode and decode keys of that kind. `encode` raises TypeError or ValueError."""
    if isinstance(parts, Codec):
        decode, encode = key_codec(parts)
        return encode, decode
    if isinstance(parts, str):
        return _ALONE[parts]
    return _tuple_codec(parts)


def _encode_text(key: Any) -> bytes:
    if type(key) is not str:
        raise _wrong_type(key, "text", "a str")
    return key.encode()


def _encode_bytes(key: Any) -> bytes:
    if type(key) is not bytes:
        raise _wrong_type(key, "bytes", "bytes")
    return key


def _encode_int(key: Any) -> bytes:
    if type(key) is not int:
        raise _wrong_type(key, "int", "an int")
    amount = abs(key)
    length = (amount.bit_length() + 7) // 8
    if length > _INT_BYTES_MAX:
        raise ValueError(f"the int has {length} bytes; a key may have at most {_INT_BYTES_MAX}")
    if key >= 0:
        return bytes((128 + length,)) + amount.to_bytes(length, "big")
    return bytes((127 - length,)) + (256**length - 1 - amount).to_bytes(length, "big")


def _decode_int(raw: bytes) -> int:
    value, _ = _take_int(raw, 0)
    return value


def _take_int(raw: bytes, at: int) -> tuple[int, int]:
    head = raw[at]
    length = head - 128 if head >= 128 else 127 - head
    end = at + 1 + length
    amount = int.from_bytes(raw[at + 1 : end], "big")
    return (amount if head >= 128 else amount - (256**length - 1)), end


def _take_text(raw: bytes, at: int) -> tuple[str, int]:
    found, end = take_ended(raw, at)
    return found.decode(), end


_ALONE: dict[str, tuple[EncodeKey, DecodeKey]] = {
    "text": (_encode_text, bytes.decode),
    "bytes": (_encode_bytes, bytes),
    "int": (_encode_int, _decode_int),
}
_IN_TUPLE: dict[str, tuple[EncodeKey, Callable[[bytes, int], tuple[Any, int]]]] = {
    "text": (lambda key: ended(_encode_text(key)), _take_text),
    "bytes": (lambda key: ended(_encode_bytes(key)), take_ended),
    "int": (_encode_int, _take_int),
}


def _tuple_codec(parts: tuple[str, ...]) -> tuple[EncodeKey, DecodeKey]:
    encoders = [_IN_TUPLE[part][0] for part in parts]
    takers = [_IN_TUPLE[part][1] for part in parts]

    def encode(key: Any) -> bytes:
        if type(key) is not tuple:
            raise _wrong_type(key, repr(parts), "a tuple")
        if len(cast("tuple[Any, ...]", key)) > len(encoders):
            raise ValueError(f"{bounded_repr(cast('object', key))} has more than {len(encoders)} parts")
        # A tuple with fewer parts is a prefix of those with more: it sorts before them, and is the start of a
        # range.
        return b"".join([encode_part(part) for encode_part, part in zip(encoders, key, strict=False)])  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    def decode(raw: bytes) -> tuple[Any, ...]:
        key: list[Any] = []
        at = 0
        for take in takers:
            if at == len(raw):
                break
            part, at = take(raw, at)
            key.append(part)
        return tuple(key)

    return encode, decode


def _wrong_type(key: object, kind: str, expected: str) -> TypeError:
    return TypeError(
        f"{bounded_repr(key)} is of type {type_of(key)}, but keys are stored as {kind}, which takes "
        f"{expected}"
    )
