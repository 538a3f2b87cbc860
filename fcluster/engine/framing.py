"""Records that have the id of their schema in a header.

Responsible for: putting the id in front of the key or value before any step sees the record. So whatever
keeps bytes (tables, topics between stages, state) keeps both together, and codecs need no headers. Pure.

Invariant: a record that is passed on hasn't the header any more, since its next value may have another
schema. Only a dead letter is as it was read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcluster.engine.records import AmendedRecord, Headers, SourceRecord
from fcluster.graph.codecs import id_header
from fcluster.graph.stages import Input


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
    if source.internal:
        return None  # written by the job, with ids in front
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
            framed(record.key(), key_header, headers),
            framed(record.value(), value_header, headers),
            [header for header in headers if header[0] not in names],
        )

    return frame


def framed(raw: bytes | None, name: str | None, headers: Headers) -> bytes | None:
    """A key or value with the id that the first header of that name has, if there is one."""
    if raw is None:
        return None
    return next((found + raw for title, found in headers if title == name and found), raw)
