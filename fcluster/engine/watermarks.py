"""Watermark records: how a stage tells the stages after its repartition topics what its event time is.

Responsible for: what such a record looks like, and how it is recognised. It belongs to the transaction of the
epoch whose end it tells of, behind the data of that epoch. Pure.

It has no key, unlike each record of data in a repartition topic, and names itself by a header. It has no
timestamp, so that it doesn't wait for other inputs where several are merged.
"""

from __future__ import annotations

from typing import Final

from fcluster.engine.clock import Said, decode_watermark
from fcluster.engine.records import Headers, SourceRecord

WATERMARK_HEADER: Final = "fcluster.watermark"
WATERMARK_HEADERS: Final[Headers] = [(WATERMARK_HEADER, b"")]


def is_watermark(record: SourceRecord) -> bool:
    """Whether a record of a repartition topic is a watermark record."""
    if record.key() is not None:
        return False
    headers = record.headers()
    return bool(headers) and headers[0][0] == WATERMARK_HEADER


def watermarks_in(record: SourceRecord) -> tuple[int, list[Said]]:
    """How many shards there are upstream, and what some of them say.

    Raises:
        UnreadableClockError: the record is damaged.
    """
    return decode_watermark(record.value() or b"")
