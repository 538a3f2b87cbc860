"""Dead letters: a failed record, unchanged, with headers that say what happened.

A dead letter that is too large to be written becomes a stub, without its value and its own headers, except
the id of the key's schema. A stub's headers say where the record came from, why it is a stub, how large the
record was, and its SHA-256. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from fcluster.common.failures import Failure, bounded_text
from fcluster.engine.failure import OutputRefusedError
from fcluster.engine.letter_limit import ShardLetters
from fcluster.engine.records import (
    OUTPUT_TROUBLE,
    AmendedRecord,
    Headers,
    SourceRecord,
    TimerRecord,
    describe_record,
    where_of,
)
from fcluster.engine.steps import RecordError
from fcluster.graph.codecs import KEY_ID_HEADER
from fcluster.graph.operators import TopicSpec

ERROR_CHARACTERS_MAX = 2_000
STUB_KEY_BYTES_MAX = 1_000
"""A longer key isn't kept in a stub."""
STUB_REASON_CHARACTERS_MAX = 500


def write_dead_letter(
    produce: Callable[..., None],
    topic: TopicSpec,
    record: SourceRecord,
    handler: str,
    error: str,
    letters: ShardLetters,
) -> None:
    """Write `record` to `topic`, or a stub if it is refused. The dead letter of a timer has the timer's key,
    its due time as the timestamp, no value, and its name in a header. Its offset is that of the next record.

    Args:
        produce: see `records.Produce`.
        handler: the name of the step that failed.
        error: what happened, one line.
        letters: counts it.

    Raises:
        RecordError: the stub is refused too, or no more dead letters may be written to the topic.
    """
    if letters.is_reached(topic.name):
        raise RecordError(
            Failure.of_record(
                f"{error}; and {letters.most:,} dead letters were already written to {topic.name!r} since "
                "the job has started (dead.letters.max)",
                "correct the cause, or raise dead.letters.max, then start the job again: it goes on with "
                "this record, and counts anew",
            )
        )
    ours: list[tuple[str, bytes | None]] = [
        ("fcluster.error", bounded_text(error, ERROR_CHARACTERS_MAX).encode()),
        ("fcluster.handler", bounded_text(handler, 300).encode()),
        ("fcluster.topic", bounded_text(str(record.topic()), 249).encode()),
        ("fcluster.partition", str(record.partition()).encode()),
        ("fcluster.offset", str(record.offset()).encode()),
    ]
    if isinstance(record, TimerRecord):
        ours.append(("fcluster.timer", bounded_text(record.name, 300).encode()))
    read = record.as_read() if isinstance(record, AmendedRecord) else record
    key, value, timestamp_ms = read.key(), read.value(), record.timestamp()[1]
    letters.count(topic.name, f"{describe_record(record)} failed: {error}")
    try:
        produce(topic.name, value, key, timestamp_ms, [*_headers(read), *ours])
    except OutputRefusedError as refusal:
        kept_key = key if key is None or len(key) <= STUB_KEY_BYTES_MAX else None
        ids = () if kept_key is None else _key_ids(read)
        stub = [*ids, *ours, *_stub_headers(key, value, str(refusal.failure))]
        try:
            produce(topic.name, None, kept_key, timestamp_ms, stub)
        except OutputRefusedError as second:
            raise RecordError(
                Failure.of_record(
                    f"{error}; and not even a stub of it can be written to the dead-letter topic "
                    f"{topic.name!r}: {second.failure.message}",
                    second.failure.remedy,
                )
            ) from second


def _headers(record: SourceRecord) -> Headers:
    try:
        return record.headers() or ()
    except OUTPUT_TROUBLE:
        return ()  # the names of its headers can't be decoded


def _key_ids(record: SourceRecord) -> Headers:
    """The id of the key's schema, if it is in a header: without it, the key could be taken for another."""
    return [
        (name, found)
        for name, found in _headers(record)
        if name == KEY_ID_HEADER and len(found or b"") <= STUB_KEY_BYTES_MAX
    ]


def _stub_headers(key: bytes | None, value: bytes | None, reason: str) -> Headers:
    headers: list[tuple[str, bytes | None]] = [
        ("fcluster.stub", bounded_text(reason, STUB_REASON_CHARACTERS_MAX).encode())
    ]
    if value is not None:
        headers += _fingerprint("value", value)
    if key is not None and len(key) > STUB_KEY_BYTES_MAX:
        headers += _fingerprint("key", key)
    return headers


def _fingerprint(field: str, data: bytes) -> Headers:
    return [
        (f"fcluster.{field}.bytes", str(len(data)).encode()),
        (f"fcluster.{field}.sha256", hashlib.sha256(data).hexdigest().encode()),
    ]


def dead_letter_trouble(record: SourceRecord, error: RecordError) -> Failure:
    """The failure of a record for which no dead letter can be written."""
    message = f"{describe_record(record)} failed: {error.failure.message}"
    return Failure.of_record(message, error.failure.remedy, where_of(record))
