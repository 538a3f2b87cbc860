"""Distinguishes a transaction that Kafka itself has torn from an error of ours, by the markers.

Responsible for: finding out which parts of one transaction, in which partitions, were committed and which
were aborted.

Neither time nor the producer's id and epoch show which parts belong together: a producer uses the same ones
for many transactions. What was written shows it. The job's epoch is in each delta and with each committed
offset. A producer is used for an epoch of the job at most once: a replay has a new number. So (producer id,
producer epoch, epoch of the job) is one transaction. An output carries neither, but it carries the position
of its input; and a record between two stages has the input's id. It belongs to the first transaction of its
producer that commits an offset after that input. There are two exceptions, because a session may abort its
transactions and replay them with the same producers:

- A marker ends a transaction in its partition. So what a producer writes there afterwards belongs to a later
  transaction than what it wrote before.
- A transaction may have been aborted before its offsets were written. Then outputs of the same inputs follow
  in the same partition.

This doesn't work for outputs that don't carry their input's position, and for records of transactions of
which no committed offset is left. They are counted, but not judged.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Message

from fcluster.engine.changelog import parse_record
from tests.checker.reading import READ_UNCOMMITTED, partitions_of, read_input, read_topic
from tests.checker.records import InputRecord, decode_input, decode_output
from tests.checker.segments import (
    ABORT,
    COMMIT,
    OPEN,
    Place,
    Written,
    partitions_below,
    read_partition,
)

OFFSETS = "__consumer_offsets"
_OFFSET_KEY_VERSIONS = (0, 1)


@dataclass(frozen=True, slots=True)
class Told:
    """What a record says about its transaction: the job's epoch, or the position of the input that it comes
    from.
    """

    epoch: int = -1
    source: Place | None = None
    position: int = -1
    """For an offset: the next record of the source. For an output: the input's offset."""


@dataclass(frozen=True)
class Torn:
    """A transaction of which one part was committed and another part aborted."""

    producer_id: int
    producer_epoch: int
    epoch: int
    parts: tuple[Written, ...]

    def __str__(self) -> str:
        parts = "; ".join(map(str, self.parts))
        return f"epoch {self.epoch} by producer {self.producer_id}, epoch {self.producer_epoch}: {parts}"


@dataclass
class Markers:
    """The result of reading the markers. `untold` is the number of parts that can't be assigned to a
    transaction.
    """

    torn: list[Torn] = field(default_factory=list[Torn])
    whole: int = 0
    untold: int = 0

    def __str__(self) -> str:
        head = (
            f"markers: {self.whole} transactions are whole, Kafka has torn {len(self.torn)}, and of "
            f"{self.untold} parts it can't be told"
        )
        return "\n".join([head, *(f"  torn by Kafka: {one}" for one in self.torn)])


def judge(written: Iterable[Written], told: Mapping[Place, Mapping[int, Told]]) -> Markers:
    """Which transactions are torn.

    Args:
        written: what was written to all partitions that the job writes to.
        told: by partition and offset: what the record there says.
    """
    in_order = sorted(written, key=lambda one: (one.place, one.first_offset))
    parts = [(one, _first_told(one, told.get(one.place, {}))) for one in in_order]
    offsets: dict[tuple[int, int, Place], list[tuple[int, int, str]]] = defaultdict(list)
    for one, _ in parts:
        for offset, said in told.get(one.place, {}).items():
            if one.first_offset <= offset <= one.last_offset and said.epoch >= 0 and said.source is not None:
                mine = offsets[one.producer_id, one.producer_epoch, said.source]
                mine.append((said.epoch, said.position, one.outcome))
    together: dict[tuple[int, int, int], list[Written]] = defaultdict(list)
    newest: dict[tuple[int, int, Place], int] = defaultdict(lambda: -1)
    last_written = {place: _last_written(rows) for place, rows in told.items()}
    found = Markers()
    for one, said in parts:
        at = one.producer_id, one.producer_epoch, one.place
        epoch = -1 if said is None else said.epoch
        if said is not None and epoch < 0 and said.source is not None:
            mine = offsets[one.producer_id, one.producer_epoch, said.source]
            after = [
                (number, outcome)
                for number, position, outcome in mine
                if position > said.position and number > newest[at]
            ]
            epoch, outcome = min(after, default=(-1, OPEN))
            is_replayed = last_written[one.place][said] > one.last_offset
            if one.outcome == ABORT and outcome != ABORT and is_replayed:
                continue  # its offsets were never written
        if epoch < 0:
            found.untold += 1
        else:
            newest[at] = epoch
            together[one.producer_id, one.producer_epoch, epoch].append(one)
    for (producer_id, producer_epoch, epoch), ones in sorted(together.items()):
        if {COMMIT, ABORT} <= {one.outcome for one in ones}:
            found.torn.append(Torn(producer_id, producer_epoch, epoch, tuple(ones)))
        else:
            found.whole += 1
    return found


def _last_written(rows: Mapping[int, Told]) -> dict[Told, int]:
    """The last offset at which the same was said."""
    return {rows[offset]: offset for offset in sorted(rows)}


def _first_told(one: Written, told: Mapping[int, Told]) -> Told | None:
    return next(
        (told[offset] for offset in range(one.first_offset, one.last_offset + 1) if offset in told), None
    )


def find_torn(
    kafka: Path,
    brokers: str,
    job: str,
    source: str,
    *,
    changelogs: Iterable[str],
    outputs: Iterable[str] = (),
    between: Iterable[str] = (),
) -> Markers:
    """Read the markers of a job's transactions.

    Args:
        kafka: a directory that contains the brokers' files.
        brokers: bootstrap servers; they must run.
        job: its name, which is also the name of its group.
        source: the topic that it reads.
        changelogs: topics of deltas.
        outputs: topics of outputs.
        between: topics of source records that pass from one stage to the next.
    """
    told = _read_told(brokers, OFFSETS, lambda message: _of_offset(message, job))
    for topic in changelogs:
        told |= _read_told(brokers, topic, _of_delta)
    for topic in outputs:
        told |= _read_told(brokers, topic, lambda message: _of_output(message, source))
    for topic in between:
        places = {record.id: record for record in read_input(brokers, source)}
        told |= _read_told(brokers, topic, lambda message, places=places: _of_input(message, source, places))
    replicas = partitions_below(kafka)
    written: list[Written] = []
    for place, records in told.items():
        copies = [read_partition(directory, place) for directory in replicas.get(place, [])]
        # The most complete copy. Others may be behind, or may have been left behind.
        best = max(copies, key=lambda copy: max((one.last_offset for one in copy), default=-1), default=[])
        if place[0] == OFFSETS:  # other groups' offsets are there too
            best = [one for one in best if _first_told(one, records) is not None]
        written += best
    return judge(written, told)


def _read_told(
    brokers: str, topic: str, tell: Callable[[Message], Told | None]
) -> dict[Place, dict[int, Told]]:
    if not partitions_of(brokers, topic):
        return {}
    parts = read_topic(
        brokers, topic, READ_UNCOMMITTED, lambda message: (message.offset() or 0, tell(message))
    )
    return {
        (topic, partition): {offset: said for offset, said in rows if said is not None}
        for partition, rows in parts.items()
    }


def _of_delta(message: Message) -> Told:
    return Told(epoch=parse_record(message.value()).epoch)


def _of_output(message: Message, source: str) -> Told | None:
    record = decode_output(message.value(), message.partition() or 0, message.offset() or 0)
    return None if record.partition < 0 else Told(source=(source, record.partition), position=record.offset)


def _of_input(message: Message, source: str, places: Mapping[int, InputRecord]) -> Told | None:
    record = decode_input(message.value(), message.partition() or 0, message.offset() or 0)
    origin = places.get(record.id)
    return None if origin is None else Told(source=(source, origin.partition), position=origin.offset)


def _of_offset(message: Message, group: str) -> Told | None:
    key, value = message.key() or b"", message.value()
    (version,) = struct.unpack_from(">h", key)
    if version not in _OFFSET_KEY_VERSIONS or value is None:
        return None
    owner, at = _text(key, 2)
    topic, at = _text(key, at)
    (partition,) = struct.unpack_from(">i", key, at)
    if owner != group:
        return None
    version, position = struct.unpack_from(">hq", value)
    metadata = _metadata(version, value)
    _format, epoch, *_ = metadata.split(":")
    return Told(int(epoch), (topic, partition), position)


def _metadata(version: int, value: bytes) -> str:
    """The metadata in the value of a committed offset: after version, offset and (from version 3 on) leader
    epoch.
    """
    at = 10 if version < 3 else 14
    if version < 4:
        return _text(value, at)[0]
    length = shift = 0
    while True:  # from version 4 on its length is encoded with variable length, and is one more
        byte = value[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value[at : at + length - 1].decode()


def _text(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from(">h", data, at)
    return data[at + 2 : at + 2 + length].decode(), at + 2 + length
