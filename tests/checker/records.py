"""What the test jobs read and write.

Responsible for: the test record, the output of the two test jobs, and their JSON. Pure.

A record's `sequence` counts from 1 within its key, so the output alone shows whether a key's records are
complete and in order. `produced_at_ns` is the producer's clock. Outputs carry it too, so that a reader on the
same host can compute the latency.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson


class InputRecord(NamedTuple):
    """One record of the source topic, with its position."""

    id: int
    key: str
    sequence: int
    value: int
    partition: int = -1
    offset: int = -1
    produced_at_ns: int = 0


class OutputRecord(NamedTuple):
    """One record of a result topic.

    `group` is what the job counted by: the input's key, or the new key after a repartition. `partition` and
    `offset` are those of the record that the handler saw, -1 if the job doesn't say. `at_partition` and
    `at_offset` are the output's own position.
    """

    id: int
    key: str
    sequence: int
    group: str
    count: int
    sum: int
    partition: int
    offset: int
    at_partition: int
    at_offset: int
    produced_at_ns: int = 0


class MalformedRecord(Exception):  # noqa: N818
    """A record that neither the generator nor a test job writes."""


def group_of(key: str, group_count: int) -> str:
    """The key that the repartitioning test job counts by: many keys belong to one group."""
    return f"g{int(key[1:]) % group_count}"


def generate_records(
    count: int,
    *,
    keys: int,
    seed: int = 1,
    first_id: int = 0,
    sequences: dict[str, int] | None = None,
    hot_keys: int = 0,
) -> Iterator[InputRecord]:
    """`count` records over `keys` keys. The same seed gives the same records.

    Args:
        count: how many records.
        keys: the size of the key space. Keys are drawn evenly.
        seed: the seed of the draw.
        first_id: the first record's id. Ids increase by one.
        sequences: each key's last sequence, carried from one call to the next and changed in place.
        hot_keys: this many of the keys get every second record.
    """
    draw = random.Random(seed)
    last = {} if sequences is None else sequences
    for number in range(first_id, first_id + count):
        key = f"k{draw.randrange(hot_keys if hot_keys and number % 2 else keys)}"
        sequence = last.get(key, 0) + 1
        last[key] = sequence
        yield InputRecord(number, key, sequence, draw.randrange(-1000, 1000))


def encode_input(record: InputRecord, produced_at_ns: int) -> bytes:
    """The JSON value of a source record."""
    return orjson.dumps(
        {
            "id": record.id,
            "key": record.key,
            "seq": record.sequence,
            "value": record.value,
            "at": produced_at_ns,
        }
    )


def decode_input(value: bytes | None, partition: int, offset: int) -> InputRecord:
    """The source record in `value`.

    Raises:
        MalformedRecord: it isn't one.
    """
    fields = _loads(value, partition, offset)
    try:
        return InputRecord(
            fields["id"],
            fields["key"],
            fields["seq"],
            fields["value"],
            partition,
            offset,
            fields.get("at", 0),
        )
    except KeyError as error:
        raise MalformedRecord(f"[{partition}]@{offset}: no field {error}: {value!r}") from None


def decode_output(value: bytes | None, partition: int, offset: int) -> OutputRecord:
    """The output record in `value`.

    Raises:
        MalformedRecord: it isn't one.
    """
    fields = _loads(value, partition, offset)
    try:
        return OutputRecord(
            fields["id"],
            fields["key"],
            fields["seq"],
            fields.get("group", fields["key"]),
            fields["count"],
            fields["sum"],
            fields.get("partition", -1),
            fields.get("offset", -1),
            partition,
            offset,
            fields.get("at", 0),
        )
    except KeyError as error:
        raise MalformedRecord(f"[{partition}]@{offset}: no field {error}: {value!r}") from None


def _loads(value: bytes | None, partition: int, offset: int) -> dict[str, Any]:
    try:
        fields = orjson.loads(value or b"")
    except orjson.JSONDecodeError as error:
        raise MalformedRecord(f"[{partition}]@{offset}: {error}: {value!r}") from None
    if not isinstance(fields, dict):
        raise MalformedRecord(f"[{partition}]@{offset}: not an object: {value!r}")
    return fields
