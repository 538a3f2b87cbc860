"""What the coordinator's core is told (events, past tense) and what it wants done (effects, imperative).

Responsible for: these types. The shell in `server` carries effects out in their order and feeds what came
of them back as events. Must not hold logic. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fcluster.common.messages import FromCoordinator, ToCoordinator
from fcluster.common.topic_ids import Look

# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """This coordinator is the leader: its term is in the journal, its socket is bound. Comes first, once."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A validated message of a worker or an admin client came from `peer`."""

    peer: bytes
    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The connection of `peer` closed: suspicion, not proof."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process of `worker` has ended: its host, which is this one, says so."""

    worker: str


@dataclass(frozen=True, slots=True)
class SlotFenced:
    """`FenceSlot` succeeded: whatever the slot's ids had open is aborted, and its zombie can't commit."""

    slot: int


@dataclass(frozen=True, slots=True)
class SlotFenceFailed:
    """`FenceSlot` failed, or its outcome is unknown."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class JournalWritten:
    """The journal holds everything up to and including the write `sequence`."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Deposed:
    """The journal refuses our writes: another coordinator leads the job."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndOffsetsRead:
    """What `ReadEndOffsets` asked for: by partition of the source, the offset after the last record."""

    stage: str
    offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class TopicsLooked:
    """What brokers say of the job's topics; of those that have no entry nothing is known."""

    look: Look


@dataclass(frozen=True, slots=True)
class GroupLooked:
    """The job's consumer group: offsets that fcluster didn't commit, and members, which fcluster never is;
    None: not known at present."""

    foreign: Mapping[tuple[str, int], int]
    members: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class KafkaSeen:
    """What of Kafka the job waits for, a sentence each, for the status; empty: nothing any more."""

    troubles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WireCounted:
    """How much came in since the start that was dropped, for the status."""

    malformed_frames: int
    unauthorised_frames: int
    failed_handshakes: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The coordinator's own process was asked to end the job in good order."""


@dataclass(frozen=True, slots=True)
class ResignRequested:
    """The coordinator's own process was asked to leave; the job goes on if somebody else can lead it."""


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


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Send `message` to `peer`; it may get lost."""

    peer: bytes
    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class PrepareFence:
    """The slot may have to be fenced: have everything ready for it. Must disturb nobody.

    `soon`: its worker is suspected, so it goes before those of which nothing is suspected.
    """

    slot: int
    soon: bool


@dataclass(frozen=True, slots=True)
class ForgetFence:
    """The slot's session ended in good order: what was prepared for its fence isn't needed any more."""

    slot: int


@dataclass(frozen=True, slots=True)
class FenceSlot:
    """Fence both transactional ids of the slot; answer `SlotFenced` or `SlotFenceFailed`, in bounded time."""

    slot: int


@dataclass(frozen=True, slots=True)
class WriteJournal:
    """Write these entries at once, after all earlier writes; answer `JournalWritten`, or `Deposed`.

    A value of None deletes its key.
    """

    sequence: int
    entries: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReadEndOffsets:
    """Read how far the source of a stage reaches now; answer `EndOffsetsRead`."""

    stage: str


@dataclass(frozen=True, slots=True)
class MakeTopic:
    """Make an output topic that is gone; what becomes of it the next look tells."""

    topic: str
    partitions: int


@dataclass(frozen=True, slots=True)
class StopCoordinator:
    """End the process with `exit_code`."""

    exit_code: int
    reason: str


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
