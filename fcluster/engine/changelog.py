"""The record format of the changelog: the changes of one epoch to one shard's state, as Kafka records.

Responsible for: `encode_delta` (turns a delta into a few large records), and `DeltaReader` (turns records
back into whole deltas, in order). Invariants: a delta is applied as a whole or not at all; a damaged, missing
or misplaced delta is noticed, because every record carries a checksum over all its bytes, its part number,
the number of parts, and the number of the epoch before it. Pure: must not know Kafka, RocksDB, threads or the
clock.

A record (docs/decisions/0011-changelog-format.md), with little-endian integers:

    magic "fcD" | version 1 byte | epoch u64 | previous epoch u64 | part u32 | parts u32
    | source offset i64 | crc32 u32 | body

The source offset is the offset that the same transaction commits for the shard's source; -1 means unknown.
Version 1 has none, and can still be read. A shard with several inputs writes version 3. It adds the topic and
the offset of each further input before the checksum:

    ... source offset i64 | inputs u16 | (length u16 | topic | offset i64) for each | crc32 u32 | body

The joined bodies of all parts are:

    entries u32 | lengths of keys u32 each | lengths of values u32 each | keys joined | values joined

The body is cut by bytes, not by entries, so a single value may be larger than a Kafka message.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from zlib import crc32

from fcluster.common.errors import StateDamaged

FORMAT_VERSION = 2
FORMAT_VERSION_MERGED = 3
UNKNOWN_SOURCE_OFFSET = -1
"""In a delta that was written in format version 1."""
DELTA_RECORD_BYTES_MAX = 900_000
"""A record's default size limit: below the 1,000,000 bytes that clients and brokers allow by default."""

RESET_REMEDY = (
    "Restore the topic from a backup, or let the job process its sources again: `fcluster reset JOB --to "
    "earliest` (with --dry-run it only shows what would be deleted)."
)

_MAGIC = b"fcD" + bytes([FORMAT_VERSION])
_HEADER = struct.Struct("<4sQQIIq")
_MAGIC_1 = b"fcD" + bytes([1])
_HEADER_1 = struct.Struct("<4sQQII")
_MAGIC_MERGED = b"fcD" + bytes([FORMAT_VERSION_MERGED])
_INPUT_COUNT = struct.Struct("<H")
_OFFSET = struct.Struct("<q")
_CHECKSUM = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_PREFIX_BYTES = _HEADER.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Delta:
    """The changes of one epoch to one shard's state.

    Attributes:
        epoch: the epoch that made the changes.
        previous_epoch: the epoch that changed the shard's state before it, 0 if none did.
        changes: store key -> new value, all encoded; an empty value means that the key was deleted.
        source_offset: the next record of the shard's source, as the same transaction commits it.
        further_offsets: the same for its inputs after the first, by topic.
    """

    epoch: int
    previous_epoch: int
    changes: Mapping[bytes, bytes]
    source_offset: int = UNKNOWN_SOURCE_OFFSET
    further_offsets: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """The fields of one changelog record; see the module's docstring."""

    epoch: int
    previous_epoch: int
    part: int
    parts: int
    source_offset: int
    body: bytes
    further_offsets: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_last(self) -> bool:
        """Whether it is the last record of its delta."""
        return self.part == self.parts - 1


def encode_delta(delta: Delta, record_bytes_max: int = DELTA_RECORD_BYTES_MAX) -> list[bytes]:
    """The records for `delta`, in the order in which they must be produced to one partition.

    Args:
        delta: the delta, with `epoch` > `previous_epoch`.
        record_bytes_max: the largest allowed record.

    Raises:
        ValueError: the epochs don't increase, or the limit leaves no room for a body.
    """
    if not 0 <= delta.previous_epoch < delta.epoch:
        raise ValueError(f"epoch {delta.epoch} can't follow epoch {delta.previous_epoch}")
    magic, inputs = _MAGIC, b""
    if delta.further_offsets:
        magic, inputs = _MAGIC_MERGED, _encode_inputs(delta.further_offsets)
    body_bytes_max = record_bytes_max - _PREFIX_BYTES - len(inputs)
    if body_bytes_max <= 0:
        raise ValueError(f"records of at most {record_bytes_max} bytes leave no room for a body")
    body = _encode_body(delta.changes)
    parts = -(-len(body) // body_bytes_max)
    view = memoryview(body)
    records: list[bytes] = []
    for part in range(parts):
        chunk = view[part * body_bytes_max : (part + 1) * body_bytes_max]
        header = _HEADER.pack(magic, delta.epoch, delta.previous_epoch, part, parts, delta.source_offset)
        header += inputs
        records.append(b"".join((header, _CHECKSUM.pack(crc32(chunk, crc32(header))), chunk)))
    return records


def _encode_inputs(offsets: Mapping[str, int]) -> bytes:
    pieces = [_INPUT_COUNT.pack(len(offsets))]
    for topic, offset in offsets.items():
        name = topic.encode()
        pieces += [_INPUT_COUNT.pack(len(name)), name, _OFFSET.pack(offset)]
    return b"".join(pieces)


def _decode_inputs(record: bytes, begin: int) -> tuple[dict[str, int], int]:
    """The offsets by topic at position `begin` of the record, and the position where they end.

    Raises:
        ValueError: there are none.
    """
    offsets: dict[str, int] = {}
    try:
        (count,) = _INPUT_COUNT.unpack_from(record, begin)
        at = begin + _INPUT_COUNT.size
        for _ in range(count):
            (length,) = _INPUT_COUNT.unpack_from(record, at)
            at += _INPUT_COUNT.size
            topic = record[at : at + length].decode()
            (offsets[topic],) = _OFFSET.unpack_from(record, at + length)
            at += length + _OFFSET.size
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError("the record is cut off within the offsets of its inputs") from error
    return offsets, at


def _encode_body(changes: Mapping[bytes, bytes]) -> bytes:
    values = changes.values()
    key_lengths = _lengths(array("I", map(len, changes)))
    value_lengths = _lengths(array("I", map(len, values)))
    return b"".join(
        (_COUNT.pack(len(changes)), key_lengths, value_lengths, b"".join(changes), b"".join(values))
    )


def _lengths(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _decode_body(body: bytes) -> dict[bytes, bytes]:
    """The changes in a joined body; ValueError if its lengths contradict each other."""
    if len(body) < _COUNT.size:
        raise ValueError("it is shorter than its entry count")
    (count,) = _COUNT.unpack_from(body)
    lengths = array("I")
    lengths_end = _COUNT.size + 2 * count * lengths.itemsize
    if len(body) < lengths_end:
        raise ValueError(f"it is too short for {count} entries")
    lengths.frombytes(body[_COUNT.size : lengths_end])
    if sys.byteorder == "big":
        lengths.byteswap()
    if lengths_end + sum(lengths) != len(body):
        raise ValueError(f"the lengths of its {count} entries don't add up to its own")
    pieces = [body[begin:end] for begin, end in pairwise(accumulate(lengths, initial=lengths_end))]
    changes = dict(zip(pieces[:count], pieces[count:], strict=True))
    if len(changes) != count:
        raise ValueError("it has a key twice")
    return changes


def parse_record(record: bytes | None) -> DeltaRecord:
    """The contents of a changelog record.

    Raises:
        ValueError: it is damaged, or isn't part of a delta. The text says why, as the end of a sentence.
    """
    if record is None or len(record) < _HEADER_1.size + _CHECKSUM.size:
        raise ValueError("the record is too short to be a delta")
    magic = record[: len(_MAGIC)]
    if magic == _MAGIC_1:
        header = _HEADER_1
    elif magic in (_MAGIC, _MAGIC_MERGED) and len(record) >= _PREFIX_BYTES:
        header = _HEADER
    else:
        raise ValueError(f"the record begins with {magic.hex()}, but a delta begins with {_MAGIC.hex()}")
    _, epoch, previous_epoch, part, parts, *rest = header.unpack_from(record)
    further: dict[str, int] = {}
    header_end = header.size
    if magic == _MAGIC_MERGED:
        further, header_end = _decode_inputs(record, header.size)
    if len(record) < header_end + _CHECKSUM.size:
        raise ValueError("the record is too short to be a delta")
    (checksum,) = _CHECKSUM.unpack_from(record, header_end)
    body = record[header_end + _CHECKSUM.size :]
    if crc32(body, crc32(record[:header_end])) != checksum:
        raise ValueError("the record's checksum is wrong")
    if not (part < parts and previous_epoch < epoch):
        raise ValueError(f"it claims part {part} of {parts}, epoch {epoch} after {previous_epoch}")
    source_offset = rest[0] if rest else UNKNOWN_SOURCE_OFFSET
    return DeltaRecord(epoch, previous_epoch, part, parts, source_offset, body, further)


@dataclass(slots=True)
class _Assembly:
    """A delta of which some parts have arrived."""

    epoch: int
    previous_epoch: int
    parts: int
    bodies: list[bytes] = field(default_factory=list[bytes])


class DeltaReader:
    """Turns the records of one changelog partition back into whole deltas.

    Args:
        name: the partition's name, for error messages.
        state_epoch: the epoch of the state to which the deltas will be applied.
        exactly_once: each delta must follow the one before it, and none may be incomplete. If false, a delta
            that a crash left incomplete is skipped, and deltas of an epoch that was already seen are returned
            again: the later record wins, as at-least-once allows. A gap is an error in both modes.
    """

    def __init__(self, name: str, state_epoch: int, *, exactly_once: bool = True) -> None:
        self.state_epoch = state_epoch
        self._name = name
        self._exactly_once = exactly_once
        self._assembly: _Assembly | None = None

    def feed(self, offset: int, record: bytes | None) -> Delta | None:
        """Take the partition's next record, which is at `offset`. Returns the delta that it completes, if
        any.

        Raises:
            StateDamaged: the record is damaged, or a record before it is missing.
        """
        try:
            read = parse_record(record)
        except ValueError as error:
            raise self._damaged(offset, str(error)) from error
        assembly = self._assembly
        if read.part == 0:
            if assembly is not None and self._exactly_once:
                raise self._damaged(
                    offset,
                    f"epoch {assembly.epoch} ends after {len(assembly.bodies)} of {assembly.parts} parts",
                )
            self._check_chain(offset, read.epoch, read.previous_epoch)
            assembly = self._assembly = _Assembly(read.epoch, read.previous_epoch, read.parts)
        elif (
            assembly is None
            or (read.epoch, read.previous_epoch, read.parts)
            != (assembly.epoch, assembly.previous_epoch, assembly.parts)
            or read.part != len(assembly.bodies)
        ):
            self._assembly = None
            raise self._damaged(
                offset, f"part {read.part} of epoch {read.epoch} comes without the part before it"
            )
        assembly.bodies.append(read.body)
        if len(assembly.bodies) < read.parts:
            return None
        self._assembly = None
        try:
            changes = _decode_body(b"".join(assembly.bodies))
        except ValueError as error:
            raise self._damaged(offset, f"can't read the delta of epoch {read.epoch}: {error}") from error
        self.state_epoch = read.epoch if self._exactly_once else max(read.epoch, self.state_epoch)
        return Delta(read.epoch, read.previous_epoch, changes, read.source_offset, read.further_offsets)

    def finish(self) -> None:
        """Note that the partition has no more records.

        Raises:
            StateDamaged: it ends within a delta, in exactly-once mode.
        """
        assembly = self._assembly
        if assembly is not None and self._exactly_once:
            raise self._damaged(
                -1,
                f"it ends after {len(assembly.bodies)} of {assembly.parts} parts of epoch {assembly.epoch}",
            )

    def _check_chain(self, offset: int, epoch: int, previous_epoch: int) -> None:
        gap = previous_epoch > self.state_epoch
        if gap or (self._exactly_once and previous_epoch != self.state_epoch):
            raise self._damaged(
                offset,
                f"epoch {epoch} follows epoch {previous_epoch}, but the state is at epoch {self.state_epoch}",
            )

    def _damaged(self, offset: int, what: str) -> StateDamaged:
        place = f"the changelog {self._name}" + (f" at offset {offset}" if offset >= 0 else "")
        return StateDamaged(
            f"{place} is damaged: {what}",
            remedy=RESET_REMEDY,
        )
