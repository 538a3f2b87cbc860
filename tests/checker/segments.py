"""Reads brokers' segment files, to find out which producer's records were committed or aborted in each
partition.

Responsible for: the headers of record batches (magic 2) and the markers that end transactions, and what
follows from them: what each producer wrote between two of its markers. Clients don't show markers, only their
effects. Brokers may run meanwhile: an incomplete batch counts as the end.

It needs no decompression: markers are never compressed, and records' values are read with a client.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

Place = tuple[str, int]
"""Topic and partition."""
COMMIT, ABORT, OPEN = "COMMIT", "ABORT", "no marker"

_HEADER = struct.Struct(">qiibIhiqqqhiI")
"""First offset, bytes that follow, leader epoch, magic, checksum, attributes, last offset's distance, first
and last timestamp, producer id, producer epoch, first sequence, number of records."""
_FRAME_BYTES = 12
"""First offset and length. The length doesn't include these two."""
_TRANSACTIONAL, _CONTROL = 0x10, 0x20
_MARKERS = {0: ABORT, 1: COMMIT}
_DIRECTORY = re.compile(r"(.+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch's header says. `marker` is empty except for a transaction's marker."""

    first_offset: int
    last_offset: int
    producer_id: int
    producer_epoch: int
    transactional: bool
    marker: str


@dataclass(frozen=True, slots=True)
class Written:
    """What a producer wrote to a partition between two of its markers: that is, its part in one
    transaction.

    Attributes:
        place: the partition.
        producer_id: Kafka's id of the producer.
        producer_epoch: the epoch of the records. A marker that aborts them may have the next epoch, because a
            fence increases it.
        first_offset: the offset of the first record.
        last_offset: the offset of the last record.
        outcome: COMMIT, ABORT, or OPEN while there is no marker after it.
        marker_offset: the marker's offset. -1 if there is none.
    """

    place: Place
    producer_id: int
    producer_epoch: int
    first_offset: int
    last_offset: int
    outcome: str = OPEN
    marker_offset: int = -1

    def __str__(self) -> str:
        topic, partition = self.place
        where = f" at {self.marker_offset}" if self.marker_offset >= 0 else ""
        return f"{topic}/{partition} {self.first_offset} to {self.last_offset}: {self.outcome}{where}"


def batches_in(data: bytes) -> Iterator[Batch]:
    """The batches of a segment, up to the first incomplete one."""
    at = 0
    while at + _HEADER.size <= len(data):
        header = _HEADER.unpack_from(data, at)
        first, length, _, magic, _, attributes, distance, _, _, producer_id, epoch, _, _ = header
        end = at + _FRAME_BYTES + length
        if magic != 2 or length < _HEADER.size - _FRAME_BYTES or end > len(data):
            return
        control = bool(attributes & _CONTROL)
        marker = _marker(data, at + _HEADER.size) if control else ""
        transactional = bool(attributes & _TRANSACTIONAL) and not control
        yield Batch(first, first + distance, producer_id, epoch, transactional, marker)
        at = end


def _marker(data: bytes, at: int) -> str:
    """The kind of control record that begins there. Empty if it ends no transaction."""
    _length, at = _varint(data, at)
    at += 1  # attributes
    for _ in ("timestamp's distance", "offset's distance", "length of the key"):
        _, at = _varint(data, at)
    _version, kind = struct.unpack_from(">hh", data, at)
    return _MARKERS.get(kind, "")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A zigzag number of variable length, and the position after it."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at


def written_in(place: Place, batches: Iterable[Batch]) -> list[Written]:
    """What producers wrote to one partition in transactions, in the order in which the transactions began."""
    found: list[Written] = []
    under_way: dict[int, int] = {}
    for batch in batches:
        index = under_way.get(batch.producer_id)
        if batch.marker:
            if index is not None:
                del under_way[batch.producer_id]
                found[index] = replace(found[index], outcome=batch.marker, marker_offset=batch.first_offset)
            # Otherwise nothing was written to this partition, or a coordinator has sent its markers again.
        elif batch.transactional:
            if index is not None and found[index].producer_epoch == batch.producer_epoch:
                found[index] = replace(found[index], last_offset=batch.last_offset)
            else:
                under_way[batch.producer_id] = len(found)
                ids = (batch.producer_id, batch.producer_epoch)
                found.append(Written(place, *ids, batch.first_offset, batch.last_offset))
    return found


def read_partition(directory: Path, place: Place) -> list[Written]:
    """The same, from a partition's directory."""

    def batches() -> Iterator[Batch]:
        for segment in sorted(directory.glob("*.log")):
            yield from batches_in(segment.read_bytes())

    return written_in(place, batches())


def partitions_below(directory: Path) -> Mapping[Place, list[Path]]:
    """The directories of each partition, one for each replica, anywhere below `directory`."""
    found: dict[Place, list[Path]] = {}
    for log in sorted(directory.rglob("*.log")):
        name = _DIRECTORY.fullmatch(log.parent.name)
        if name is not None and log.stem.isdigit():
            replicas = found.setdefault((name[1], int(name[2])), [])
            if log.parent not in replicas:
                replicas.append(log.parent)
    return found
