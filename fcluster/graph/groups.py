"""Groups of a table's rows: what a row contributes to its group, and how that gets there.

Responsible for: the bytes of a row's contribution, and of the two halves of a change on its way to a group:
what the group loses, and what it gains. Pure.

    contribution    length of the group's key (4 bytes) | the group's key | value
    halves          msgpack: [value that the group loses, value that it gains], each as bytes or nil
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from struct import Struct
from typing import Any, NamedTuple, cast

import msgspec

from fcluster.graph.changes import Change
from fcluster.graph.codecs import Codec, Kind, codec_name, key_codec, value_codec

_LENGTH = Struct(">I")
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[bytes | None]).decode


class Halves(NamedTuple):
    """What a group loses and what it gains by the change of one row.

    Attributes:
        group: the key of the group, as bytes.
        old: the value that the row contributed before, as bytes. None: nothing.
        new: the value that it contributes now, as bytes. None: nothing.
    """

    group: bytes
    old: bytes | None
    new: bytes | None


@dataclass(frozen=True, slots=True)
class GroupOf:
    """Gives the key of the group from what is written to it, in place of the user's `by`.

    Attributes:
        by: the field or function of a row's value that gives the group.
        key: the kind of the groups' keys.
    """

    by: str | Callable[..., Any]
    key: Kind

    def __call__(self, halves: Halves) -> Any:
        """The key."""
        return key_codec(self.key)[0](halves.group)


def contribution(group: bytes, value: bytes) -> bytes:
    """What is kept of a row: its group, and the value that it contributes."""
    return _LENGTH.pack(len(group)) + group + value


def parts_of_contribution(kept: bytes) -> tuple[bytes, bytes]:
    """The group's key and the value."""
    end = _LENGTH.size + _LENGTH.unpack_from(kept)[0]
    return kept[_LENGTH.size : end], kept[end:]


@cache
def halves_codec(kind: Kind) -> Codec[Any]:
    """Writes `Halves` of values of that kind. Reads them as a `Change`."""
    decode_value = value_codec(kind)[0]

    def encode(halves: Halves) -> bytes:
        return _pack((halves.old, halves.new))

    def decode(raw: bytes) -> Change[Any]:
        old, new = _unpack(raw)
        return Change(None if old is None else decode_value(old), None if new is None else decode_value(new))

    codec: Codec[Any] = Codec(f"halves-of-{codec_name(kind)}", encode, cast("Any", decode))
    return codec
