"""The inputs of the coordinator's core (events, past tense) and its outputs (effects, imperative).

Responsible for: these types. The shell in `server` carries out effects in order, and feeds their results back
as events. Must not hold logic. Pure.

The two kinds of which there is one for each message are structs, because creating one takes a fifth of the
time that a frozen dataclass takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from fcluster.common.failures import Failure
from fcluster.kafka.topic_ids import Look
from fcluster.wire.messages import FromCoordinator, ToCoordinator

# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """This coordinator is the leader: its term is in the journal, and its socket is bound. This event comes
    first, and once.
    """


class MessageReceived(msgspec.Struct, frozen=True):
    """A valid message from a worker or an admin client arrived from `peer`."""

    peer: bytes
    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The connection of `peer` closed. That is a suspicion, not a proof."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process of `worker`, which runs on this host, has exited."""

    worker: str


@dataclass(frozen=True, slots=True)
class SlotFenced:
    """`FenceSlot` succeeded: open transactions of the slot's ids are aborted, and its former owner can't
    commit.
    """

    slot: int


@dataclass(frozen=True, slots=True)
class SlotFenceFailed:
    """`FenceSlot` failed, or its result is unknown."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class JournalWritten:
    """The journal holds everything up to and including the write `sequence`."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Deposed:
    """The journal refuses our writes, because another coordinator leads the job."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndOffsetsRead:
    """The answer to `ReadEndOffsets`: for each partition of the input, the offset after the last record."""

    stage: str
    offsets: Mapping[int, int]
    input: int = 0


@dataclass(frozen=True, slots=True)
class TopicsLooked:
    """What brokers say about the job's topics. About topics without an entry, nothing is known."""

    look: Look


@dataclass(frozen=True, slots=True)
class GroupLooked:
    """The job's consumer group: offsets that fcluster didn't commit, and its members, which never belong to
    fcluster. None: not known at present.
    """

    foreign: Mapping[tuple[str, int], int]
    members: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class KafkaSeen:
    """What the job is waiting for in Kafka, one sentence each, for the status. Empty: nothing."""

    troubles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WireCounted:
    """How many incoming frames were dropped since the start, for the status."""

    malformed_frames: int
    unauthorised_frames: int
    failed_handshakes: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The coordinator's own process was asked to end the job cleanly."""


@dataclass(frozen=True, slots=True)
class ResignRequested:
    """The coordinator's own process was asked to exit. The job continues if another coordinator can lead
    it.
    """


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Started
    | MessageReceived
    | PeerDisconnected
    | ProcessEnded
    | SlotFenced
    | SlotFenceFailed
    | JournalWritten
    | Deposed
    | EndOffsetsRead
    | TopicsLooked
    | GroupLooked
    | KafkaSeen
    | WireCounted
    | StopRequested
    | ResignRequested
    | Tick
)

# --- effects ------------------------------------------------------------------------------------------


class SendMessage(msgspec.Struct, frozen=True):
    """Send `message` to `peer`; it may get lost."""

    peer: bytes
    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class PrepareFence:
    """The slot may have to be fenced: prepare that, without side effects on its owner.

    `soon`: its worker is suspected, so it takes precedence over slots without suspicion.
    """

    slot: int
    soon: bool


@dataclass(frozen=True, slots=True)
class ForgetFence:
    """The slot's session ended cleanly: what was prepared for its fence is no longer needed."""

    slot: int


@dataclass(frozen=True, slots=True)
class FenceSlot:
    """Fence both transactional ids of the slot. Answer `SlotFenced` or `SlotFenceFailed`, in bounded time."""

    slot: int


@dataclass(frozen=True, slots=True)
class WriteJournal:
    """Write these entries at once, after all earlier writes. Answer `JournalWritten`, or `Deposed`.

    A value of None deletes its key.
    """

    sequence: int
    entries: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReadEndOffsets:
    """Read the present end offsets of an input of a stage. Answer `EndOffsetsRead`."""

    stage: str
    input: int = 0


@dataclass(frozen=True, slots=True)
class MakeTopic:
    """Create an output topic that was deleted. The next check of the topics shows the result."""

    topic: str
    partitions: int


@dataclass(frozen=True, slots=True)
class StopCoordinator:
    """End the process with `exit_code`. `failure`: the job can't continue."""

    exit_code: int
    reason: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class LogLine:
    """Write a line to the log."""

    level: Literal["debug", "info", "warning", "error"]
    text: str


Effect = (
    SendMessage
    | PrepareFence
    | ForgetFence
    | FenceSlot
    | WriteJournal
    | ReadEndOffsets
    | MakeTopic
    | StopCoordinator
    | LogLine
)
