"""The partition that a key goes to, as Java's partitioner chooses it. The job's producers and `fcluster
produce` use the same one.

Responsible for: making this choice without a Kafka client. Pure.
"""

from __future__ import annotations

from typing import Final

_SEED: Final = 0x9747B28C
_FACTOR: Final = 0x5BD1E995
_BITS_32: Final = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """The hash of `data` as Kafka's Java clients compute it, as a number from 0 to 2**32 - 1."""
    hashed = _SEED ^ len(data)
    whole = len(data) & ~3
    for index in range(0, whole, 4):
        word = int.from_bytes(data[index : index + 4], "little") * _FACTOR & _BITS_32
        word = (word ^ word >> 24) * _FACTOR & _BITS_32
        hashed = hashed * _FACTOR & _BITS_32 ^ word
    if whole < len(data):
        hashed = (hashed ^ int.from_bytes(data[whole:], "little")) * _FACTOR & _BITS_32
    hashed = (hashed ^ hashed >> 13) * _FACTOR & _BITS_32
    return hashed ^ hashed >> 15


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a record with this key, in a topic with this many partitions."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
