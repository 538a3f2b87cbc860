"""What the committed offset of a source partition says: the offset, and in its metadata the epoch.

Responsible for: the metadata string that travels with each committed offset. It is the one place where a
shard's epoch is recorded (invariant 1): Kafka makes offset, epoch, outputs and deltas visible together.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORMAT = "1"


class UnreadableMetadataError(Exception):
    """A committed offset carries metadata that fcluster did not write."""


@dataclass(frozen=True, slots=True)
class CommittedPosition:
    """Where a shard stands according to Kafka.

    Attributes:
        offset: the next source record to process.
        epoch: the epoch whose transaction committed the offset.
        state_epoch: the last epoch in which the shard's state changed, 0 if it never did. A restore
            must end exactly there.
        fingerprint: of the topology that wrote it.
    """

    offset: int
    epoch: int
    state_epoch: int
    fingerprint: str

    def encode_metadata(self) -> str:
        """The metadata string for the offset: ``1:<epoch>:<state_epoch>:<fingerprint>``."""
        return f"{_FORMAT}:{self.epoch}:{self.state_epoch}:{self.fingerprint}"


def decode_position(offset: int, metadata: str | None) -> CommittedPosition:
    """The position that a committed offset and its metadata stand for.

    Raises:
        UnreadableMetadataError: the metadata is missing or was written by something else.
    """
    parts = (metadata or "").split(":")
    if len(parts) != 4 or parts[0] != _FORMAT:
        raise UnreadableMetadataError(f"the committed offset {offset} carries the metadata {metadata!r}")
    try:
        epoch, state_epoch = int(parts[1]), int(parts[2])
    except ValueError as error:
        raise UnreadableMetadataError(
            f"the committed offset {offset} carries the metadata {metadata!r}"
        ) from error
    if not 0 <= state_epoch <= epoch:
        raise UnreadableMetadataError(f"state epoch {state_epoch} is not within 0 and epoch {epoch}")
    return CommittedPosition(offset, epoch, state_epoch, parts[3])
