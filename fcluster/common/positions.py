"""A source partition's committed offset and its metadata: the epoch, the topic id, and the shard's event
time.

Responsible for: the metadata string of each committed offset. It is the only place where a shard's epoch is
recorded (invariant 1): Kafka makes offset, epoch, outputs and deltas visible together. A shard that reads
several topics has one offset for each. All are committed in the same transaction, so they have the same
epoch. They are joined here. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

RESET_FINGERPRINT = "reset"
"""Used by `fcluster reset` for shards with several inputs: they weren't committed by a transaction of the
job.
"""
_FORMAT_WITHOUT_ID = "1"
_FORMAT = "2"
_FORMAT_WITH_CLOCK = "3"
_FORMAT_WITH_LETTERS = "4"
_ID_CHARACTERS = re.compile(r"[A-Za-z0-9+/_-]{1,64}")
_CLOCK_CHARACTERS = re.compile(r"[!-9;-~]{1,4000}")
_LETTER_CHARACTERS = re.compile(r"[0-9a-f.]{1,1000}")


class UnreadableMetadataError(Exception):
    """A committed offset carries metadata that fcluster did not write."""


class SplitPositionError(Exception):
    """The offsets of a shard's inputs weren't committed in one transaction. The text says what is wrong."""


class InputOffset(NamedTuple):
    """Where a shard stands in one of its inputs; see `CommittedPosition`."""

    offset: int
    topic_id: str = ""
    clock: str = ""


@dataclass(frozen=True, slots=True)
class CommittedPosition:
    """A shard's committed position.

    Attributes:
        offset: the next source record to process.
        epoch: the epoch whose transaction committed the offset.
        state_epoch: the last epoch in which the shard's state changed, 0 if it never did. A restore must end
            exactly there.
        fingerprint: of the topology that committed it.
        topic_id: Kafka's id of the source topic; empty if not known. A topic that was deleted and created
            again has another id, and the offset means nothing in it.
        further: the positions in its other inputs. `offset`, `topic_id` and `clock` belong to the first
            input.
        clock: what `EventClock.encode` returned for the first input. Empty if nothing is known.
        letters: the dead letters of the shard; see `letter_counts`. Committed with the first input. Empty if
            there are none, or if they aren't counted.
    """

    offset: int
    epoch: int
    state_epoch: int
    fingerprint: str
    topic_id: str = ""
    further: tuple[InputOffset, ...] = ()
    clock: str = ""
    letters: str = ""

    def __post_init__(self) -> None:
        for at in self.inputs:
            if at.offset < 0:
                raise ValueError(f"{at.offset} isn't a position: clients return it for an unknown offset")

    @property
    def inputs(self) -> tuple[InputOffset, ...]:
        """Where the shard stands in each of its inputs."""
        return (InputOffset(self.offset, self.topic_id, self.clock), *self.further)

    def at(self, inputs: Sequence[InputOffset]) -> CommittedPosition:
        """A copy with other positions in its inputs."""
        first, *further = inputs
        return replace(
            self, offset=first.offset, topic_id=first.topic_id, clock=first.clock, further=tuple(further)
        )

    def of_input(self, number: int) -> CommittedPosition:
        """The position to commit for one input."""
        if not self.further:
            return self
        one = self.at([self.inputs[number]])
        return replace(one, letters="") if number else one

    def encode_metadata(self) -> str:
        """The metadata string for the offset: ``2:<epoch>:<state_epoch>:<fingerprint>:<topic id>``.

        Without a topic id: ``1:<epoch>:<state_epoch>:<fingerprint>``, as older versions wrote it. With event
        time: ``3:<epoch>:<state_epoch>:<fingerprint>:<topic id>:<clock>``. With dead letters: ``4:`` and
        these fields, and behind them ``:<letters>``. Kafka keeps at most 4,096 bytes with an offset
        (`offset.metadata.max.bytes`); this takes about 70 bytes, and the clock as many as
        `EventClock.encode` says.
        """
        if self.letters:
            begin = f"{_FORMAT_WITH_LETTERS}:{self.epoch}:{self.state_epoch}:{self.fingerprint}"
            return f"{begin}:{self.topic_id}:{self.clock}:{self.letters}"
        if self.clock:
            begin = f"{_FORMAT_WITH_CLOCK}:{self.epoch}:{self.state_epoch}:{self.fingerprint}"
            return f"{begin}:{self.topic_id}:{self.clock}"
        if not self.topic_id:
            return f"{_FORMAT_WITHOUT_ID}:{self.epoch}:{self.state_epoch}:{self.fingerprint}"
        return f"{_FORMAT}:{self.epoch}:{self.state_epoch}:{self.fingerprint}:{self.topic_id}"


def decode_position(offset: int, metadata: str | None) -> CommittedPosition:
    """The position in a committed offset and its metadata.

    Raises:
        UnreadableMetadataError: the metadata is missing or was not written by fcluster.
    """
    form, *parts = (metadata or "").split(":")
    fields = {_FORMAT_WITHOUT_ID: 3, _FORMAT: 4, _FORMAT_WITH_CLOCK: 5, _FORMAT_WITH_LETTERS: 6}.get(form)
    if len(parts) != fields:
        raise UnreadableMetadataError(f"the committed offset {offset} carries the metadata {metadata!r}")
    epochs, (fingerprint, *rest) = parts[:2], parts[2:]
    topic_id, clock, letters = [*rest, "", "", ""][:3]
    has_id = _ID_CHARACTERS.fullmatch(topic_id) or (not topic_id and form != _FORMAT)
    has_clock = _CLOCK_CHARACTERS.fullmatch(clock) or (not clock and form != _FORMAT_WITH_CLOCK)
    has_letters = _LETTER_CHARACTERS.fullmatch(letters) or form != _FORMAT_WITH_LETTERS
    if not has_id or not has_clock or not has_letters:
        raise UnreadableMetadataError(f"the committed offset {offset} carries the metadata {metadata!r}")
    try:
        epoch, state_epoch = map(int, epochs)
    except ValueError as error:
        raise UnreadableMetadataError(
            f"the committed offset {offset} carries the metadata {metadata!r}"
        ) from error
    if not 0 <= state_epoch <= epoch:
        raise UnreadableMetadataError(f"state epoch {state_epoch} is not within 0 and epoch {epoch}")
    return CommittedPosition(offset, epoch, state_epoch, fingerprint, topic_id, clock=clock, letters=letters)


def joined_position(
    committed: Sequence[CommittedPosition | None], begins: Sequence[int], fingerprint: str
) -> CommittedPosition:
    """A shard's position, from what is committed for each of its inputs.

    Args:
        committed: for each input. None: nothing is committed.
        begins: where to begin in inputs without a committed offset.
        fingerprint: of the topology that will run. An earlier one may have had fewer or other inputs.

    Raises:
        SplitPositionError: the offsets were committed by that topology, but not in one transaction.
    """
    first = committed[0]
    lead = first or CommittedPosition(begins[0], 0, 0, fingerprint)
    for number, other in enumerate(committed[1:], 1):
        if first is not None and first.fingerprint == fingerprint:
            if other is None:
                raise SplitPositionError(f"input {number + 1} has no committed offset, but input 1 has one")
            if (other.epoch, other.state_epoch) != (first.epoch, first.state_epoch):
                raise SplitPositionError(
                    f"input {number + 1} was committed in epoch {other.epoch}, with state of epoch "
                    f"{other.state_epoch}, input 1 in epoch {first.epoch}, with state of epoch "
                    f"{first.state_epoch}"
                )
        elif other is None or other.fingerprint != fingerprint:
            continue
        elif first is None or other.epoch > first.epoch:  # otherwise it is from before the input was removed
            raise SplitPositionError(
                f"input {number + 1} was committed in epoch {other.epoch}, but input 1 wasn't"
            )
    inputs = [
        InputOffset(begin) if at is None else InputOffset(at.offset, at.topic_id, at.clock)
        for at, begin in zip(committed, begins, strict=True)
    ]
    return lead.at(inputs)
