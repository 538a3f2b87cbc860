"""The contents of a source partition's committed offset: the offset, and in its metadata the epoch and topic
id.

Responsible for: the metadata string of each committed offset. It is the only place where a shard's epoch is
recorded (invariant 1): Kafka makes offset, epoch, outputs and deltas visible together. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORMAT_WITHOUT_ID = "1"
_FORMAT = "2"
_ID_CHARACTERS = re.compile(r"[A-Za-z0-9+/_-]{1,64}")


class UnreadableMetadataError(Exception):
    """A committed offset carries metadata that fcluster did not write."""


@dataclass(frozen=True, slots=True)
class CommittedPosition:
    """A shard's position according to Kafka.

    Attributes:
        offset: the next source record to process.
        epoch: the epoch whose transaction committed the offset.
        state_epoch: the last epoch in which the shard's state changed, 0 if it never did. A restore must end
            exactly there.
        fingerprint: of the topology that wrote it.
        topic_id: Kafka's id of the source topic; empty: not known. A topic that was deleted and created again
            has another id, and the offset means nothing in it.
    """

    offset: int
    epoch: int
    state_epoch: int
    fingerprint: str
    topic_id: str = ""

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"{self.offset} is no position: clients answer that for an unknown offset")

    def encode_metadata(self) -> str:
        """The metadata string for the offset: ``2:<epoch>:<state_epoch>:<fingerprint>:<topic id>``.

        Without a topic id: ``1:<epoch>:<state_epoch>:<fingerprint>``, as written by versions without topic
        ids. Kafka keeps at most 4,096 bytes with an offset (`offset.metadata.max.bytes`); this takes about
        70.
        """
        if not self.topic_id:
            return f"{_FORMAT_WITHOUT_ID}:{self.epoch}:{self.state_epoch}:{self.fingerprint}"
        return f"{_FORMAT}:{self.epoch}:{self.state_epoch}:{self.fingerprint}:{self.topic_id}"


def decode_position(offset: int, metadata: str | None) -> CommittedPosition:
    """The position in a committed offset and its metadata.

    Raises:
        UnreadableMetadataError: the metadata is missing or was not written by fcluster.
    """
    parts = (metadata or "").split(":")
    topic_id = parts.pop() if len(parts) == 5 and parts[0] == _FORMAT else ""
    wanted = _FORMAT if topic_id else _FORMAT_WITHOUT_ID
    if len(parts) != 4 or parts[0] != wanted or (topic_id and not _ID_CHARACTERS.fullmatch(topic_id)):
        raise UnreadableMetadataError(f"the committed offset {offset} carries the metadata {metadata!r}")
    try:
        epoch, state_epoch = int(parts[1]), int(parts[2])
    except ValueError as error:
        raise UnreadableMetadataError(
            f"the committed offset {offset} carries the metadata {metadata!r}"
        ) from error
    if not 0 <= state_epoch <= epoch:
        raise UnreadableMetadataError(f"state epoch {state_epoch} is not within 0 and epoch {epoch}")
    return CommittedPosition(offset, epoch, state_epoch, parts[3], topic_id)
