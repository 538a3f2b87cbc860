"""The records that the benchmarks write: how many, of which keys, how large. No Kafka."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import orjson

STEP = 7919
"""A prime: walking in such steps passes all keys once, unless their number is a multiple of it."""
_ZIPF_CHUNK = 10_000


@dataclass(frozen=True)
class Input:
    """What a source topic holds.

    Attributes:
        records: how many.
        keys: how many distinct ones at most. They are walked in a fixed scattered order, so that the first
            `keys` records are all new keys.
        size_bytes: of a value, at least; a shorter one is filled up.
        zipf: drawn at random instead, the key of rank r with a weight of r ** -zipf. 0: walked.
    """

    records: int
    keys: int
    size_bytes: int = 0
    zipf: float = 0.0


def key_numbers(made: Input) -> Iterator[int]:
    """The number of each record's key, the same in every run."""
    if not made.zipf:
        for number in range(made.records):
            yield number * STEP % made.keys
        return
    chance = random.Random(1)
    weights = list(accumulate(rank**-made.zipf for rank in range(1, made.keys + 1)))
    for begin in range(0, made.records, _ZIPF_CHUNK):
        count = min(_ZIPF_CHUNK, made.records - begin)
        # Ranks are scattered over the keys: neighbours in RocksDB aren't equally busy.
        yield from (
            rank * STEP % made.keys for rank in chance.choices(range(made.keys), cum_weights=weights, k=count)
        )


def encode(number: int, key: str, at_ns: int, size_bytes: int = 0) -> bytes:
    """The value of a record; `at_ns` comes back in its output."""
    record: dict[str, object] = {"id": number, "key": key, "value": number % 1000, "at": at_ns}
    value = orjson.dumps(record)
    missing = size_bytes - len(value) - len(b',"pad":""')
    if missing <= 0:
        return value
    return orjson.dumps(record | {"pad": "x" * missing})
