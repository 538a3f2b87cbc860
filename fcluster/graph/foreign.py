"""Joins of tables by a foreign key: what travels between their three stages, and what is kept of a row.

Responsible for: the messages in the three repartition topics of such a join, and the row that the last stage
keeps, as bytes. See docs/decisions/0161. Pure.

    subscriptions   keyed by the foreign key, to the right table: a left row refers to this key, or no longer
    rows            keyed by the left key, to the result: the left row itself
    answers         keyed by the left key, to the result: the right row that it refers to

A *version* says which of a row's foreign keys is meant: the number of the left shard, and how many foreign
keys of its rows that shard has seen. So no two foreign keys of a row have the same version, and a later one
has a greater number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import msgspec

from fcluster.graph.codecs import Codec, Kind, codec_name, key_codec, value_codec

Version = tuple[int, int]
ForeignHow = Literal["inner", "left"]
_pack = msgspec.msgpack.Encoder().encode


class LeftRow(NamedTuple):
    """A left row has changed.

    Attributes:
        key: its key, as bytes.
        version: of its foreign key.
        refers: whether it has a foreign key.
        raw: its value, as bytes. None: it was deleted.
    """

    key: bytes
    version: Version
    refers: bool
    raw: bytes | None


class Subscription(NamedTuple):
    """A left row refers to this key of the right table, or no longer.

    Attributes:
        key: the left row's key, as bytes.
        version: of its foreign key. None: it no longer refers to this key.
    """

    key: bytes
    version: Version | None


class Answer(NamedTuple):
    """The right row that a left row refers to.

    Attributes:
        key: the left row's key, as bytes.
        version: of the foreign key for which this is the answer.
        raw: the right row's value, as bytes. None: there is none.
        at_ms: the right row's time, or that of its deletion. -1: there was none.
    """

    key: bytes
    version: Version
    raw: bytes | None
    at_ms: int


class Link(NamedTuple):
    """What the left stage remembers of a row.

    Attributes:
        version: of its foreign key.
        target: the foreign key, as bytes. None: it has none.
    """

    version: Version
    target: bytes | None


class JoinedRow(NamedTuple):
    """What the result keeps of a left row.

    Attributes:
        version: of its foreign key.
        left: its value, as bytes.
        left_ms: its time.
        is_answered: whether the right row of that version is known. Otherwise the table has `before`.
        right: the right row's value, as bytes; None: there is none.
        right_ms: the right row's time; -1: there is none.
        before: the values that the table has until there is an answer: left and right. None: no row.
    """

    version: Version
    left: bytes
    left_ms: int
    is_answered: bool
    right: bytes | None = None
    right_ms: int = -1
    before: tuple[bytes, bytes | None] | None = None

    def shown(self, how: ForeignHow) -> tuple[bytes, bytes | None] | None:
        """The values that the table has: left and right. None: it has no row."""
        if not self.is_answered:
            return self.before
        return None if self.right is None and how == "inner" else (self.left, self.right)


@dataclass(frozen=True, slots=True)
class KeyOf:
    """Gives the left key of what is written to the result's stage.

    Attributes:
        kind: the kind of left keys.
    """

    kind: Kind

    def __call__(self, message: LeftRow | Answer) -> Any:
        """The key."""
        return key_codec(self.kind)[0](message.key)


def _pack_without_key(message: LeftRow | Answer) -> bytes:
    return _pack(message._replace(key=b""))


LEFT_ROWS: Codec[Any] = Codec(
    "foreign-rows", _pack_without_key, cast("Any", msgspec.msgpack.Decoder(LeftRow).decode)
)
"""Without the key, which the record has."""
ANSWERS: Codec[Any] = Codec(
    "foreign-answers", _pack_without_key, cast("Any", msgspec.msgpack.Decoder(Answer).decode)
)
"""Without the key, which the record has."""
SUBSCRIPTIONS: Codec[Any] = Codec(
    "foreign-subscriptions", _pack, cast("Any", msgspec.msgpack.Decoder(Subscription).decode)
)

encode_link: Callable[[Link], bytes] = _pack
decode_link: Callable[[bytes], Link] = msgspec.msgpack.Decoder(Link).decode
encode_version: Callable[[Version], bytes] = _pack
decode_version: Callable[[bytes], Version] = msgspec.msgpack.Decoder(Version).decode
encode_answer: Callable[[Answer], bytes] = _pack
decode_answer: Callable[[bytes], Answer] = msgspec.msgpack.Decoder(Answer).decode
encode_row: Callable[[JoinedRow], bytes] = _pack
decode_row: Callable[[bytes], JoinedRow] = msgspec.msgpack.Decoder(JoinedRow).decode


class Pair(NamedTuple):
    """The values of a row of the result: what the user's function gets. `right` is None if there is none."""

    left: Any
    right: Any


@cache
def pair_codec(left: Kind, right: Kind, how: ForeignHow) -> Codec[Any]:
    """Reads the `Pair` of a `JoinedRow`; None if the table has no row. (Rows are written by `encode_row`.)

    Args:
        left, right: the kinds of the values of both tables.
        how: which rows there are.
    """
    decode_left, decode_right = value_codec(left)[0], value_codec(right)[0]

    def decode(raw: bytes) -> Pair | None:
        shown = decode_row(raw).shown(how)
        if shown is None:
            return None
        of_left, of_right = shown
        return Pair(decode_left(of_left), None if of_right is None else decode_right(of_right))

    name = f"pairs-of-{codec_name(left)}-and-{codec_name(right)}"
    return Codec(name, cast("Any", encode_row), cast("Any", decode))
