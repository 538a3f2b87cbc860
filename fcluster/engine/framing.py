"""Records that have the ids of their schemas in headers.

Responsible for: putting an id in front of the key or value before any step sees the record, and into the
header again when a record is written to a topic whose format says so. In between, whatever keeps bytes
(tables, state, results that wait) keeps both together, and codecs need no headers. Pure.

Invariant: no record is written with an id in a header that isn't that of its own key or value, since readers
look into headers first. A dead letter is as the record was read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from fcluster.engine.records import AmendedRecord, Headers, SourceRecord, origin_of
from fcluster.graph.codecs import KEY_ID_HEADER, VALUE_ID_HEADER, Codec, Kind, id_header
from fcluster.graph.operators import TopicSpec
from fcluster.graph.stages import Input

ID_HEADERS: Final = frozenset({KEY_ID_HEADER, VALUE_ID_HEADER})
WrittenFields = tuple["bytes | None", "bytes | None", "Headers | None"]
"""Key, value and headers."""
Parting = Callable[["bytes | None", "bytes | None", "Headers | None"], WrittenFields]
"""Takes key, value and headers of a record that is to be written, and returns them as they are written."""


class FramedRecord(AmendedRecord):
    """A record with its ids in front of key and value.

    Args:
        record: the record.
        key: the key with its id.
        value: the value with its id.
        headers: the headers without the ids.
    """

    __slots__ = ("_headers", "_key", "_value")

    def __init__(
        self, record: SourceRecord, key: bytes | None, value: bytes | None, headers: Headers
    ) -> None:
        super().__init__(record)
        self._key = key
        self._value = value
        self._headers = headers

    def key(self) -> Any:
        """The key, with its id."""
        return self._key

    def value(self) -> Any:
        """The value, with its id."""
        return self._value

    def headers(self) -> Any:
        """Those of the record, without the ids."""
        return self._headers


def compile_framing(source: Input) -> Callable[[SourceRecord], SourceRecord] | None:
    """The function that gives a record of the input as it is processed. None: as it is read."""
    key_header, value_header = id_header(source.topic.key, "key"), id_header(source.topic.value, "value")
    names = {name for name in (key_header, value_header) if name is not None}
    if not names:
        return None

    def frame(record: SourceRecord) -> SourceRecord:
        try:
            headers: Headers = record.headers() or ()
        except UnicodeDecodeError:  # the name of a header isn't text, so it isn't known what there is
            return record
        if not any(name in names for name, _id in headers):
            return record
        return FramedRecord(
            record,
            framed(record.key(), source.topic.key, key_header, headers),
            framed(record.value(), source.topic.value, value_header, headers),
            [header for header in headers if header[0] not in names],
        )

    return frame


def framed(raw: bytes | None, kind: Kind, name: str | None, headers: Headers) -> bytes | None:
    """A key or value with the id that the first header of that name has, if there is one. What else is in
    that header is left out.
    """
    if raw is None or not isinstance(kind, Codec):
        return raw
    found = next((found for title, found in headers if title == name and found), b"")
    return found[: kind.id_bytes(found)] + raw


def compile_parting(topic: TopicSpec) -> Parting | None:
    """The reverse, for records that are written to `topic`. None: nothing is to be done.

    Key and value begin with their ids, in front of the data. Those that the topic's formats write to headers
    go there. Other ids that are in headers aren't those of this key and value.
    """
    key_header, value_header = id_header(topic.key, "key"), id_header(topic.value, "value")
    names = {name for name in (key_header, value_header) if name is not None}
    if not names:
        return None

    def part(key: bytes | None, value: bytes | None, headers: Headers | None) -> WrittenFields:
        written = [header for header in headers or () if header[0] not in names]
        key = _parted(topic.key, key, key_header, written)
        value = _parted(topic.value, value, value_header, written)
        return key, value, written or None

    return part


def _parted(
    kind: Kind, raw: bytes | None, name: str | None, headers: list[tuple[str, bytes | None]]
) -> bytes | None:
    if raw is None or name is None or not isinstance(kind, Codec):
        return raw
    size = kind.header_bytes(raw)
    if not size:
        return raw
    headers.append((name, raw[:size]))
    return raw[size:]


def without_stale_ids(
    headers: Headers,
    record: SourceRecord,
    key: bytes | None,
    value: bytes | None,
    names: Collection[str] = ID_HEADERS,
) -> Headers:
    """Headers for what is written because of a record, without the ids that the record had for another key or
    value.

    Args:
        headers: those of the record, or what a handler has made of them.
        record: the record.
        key, value: what is written.
        names: the headers that are looked at.
    """
    if not any(name in names for name, _id in headers):
        return headers
    record = origin_of(record)
    own: Headers = record.headers() or ()
    stale = {
        header
        for header in own
        if header[0] in names
        and (key != record.key() if header[0] == KEY_ID_HEADER else value != record.value())
    }
    return [header for header in headers if header not in stale] if stale else headers
