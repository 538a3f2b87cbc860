"""Transactions that Kafka itself has torn: how a restore detects them, and how a shard continues after
one.

Responsible for: finding out, from a shard's changelog and its committed offset, whether Kafka has committed
one of them and aborted the other; and where the shard continues after the user has chosen. A worker's
transaction contains both, and Kafka promises to make them visible together or not at all. It has been seen to
break that promise when several brokers died at once (docs/guarantee.md). Must not choose by itself which part
is right, because it can't know. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from fcluster.common.errors import TornTransaction
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.common.settings import TornPolicy
from fcluster.engine.changelog import UNKNOWN_SOURCE_OFFSET

UNKNOWN_EPOCH = -1
WHERE_TO_READ_MORE = "See docs/guarantee.md."


class Tear(Enum):
    """Which part of the transaction exists without the other one."""

    DELTA_WITHOUT_OFFSET = "delta without offset"
    OFFSET_WITHOUT_DELTA = "offset without delta"


@dataclass(frozen=True, slots=True)
class TornShard:
    """The facts about a torn transaction that a restore has found.

    Attributes:
        committed: the group's committed offset.
        changelog: the topic of the shard's deltas.
        delta_epoch: the epoch of the last visible delta. 0 if there is none, `UNKNOWN_EPOCH` if only the
            place was checked where it should be.
        delta_source_offset: the source offset that this delta says its transaction committed,
            `UNKNOWN_SOURCE_OFFSET` if it doesn't say, or can no longer be read.
        has_state: whether the state of the committed epoch is available although its delta isn't.
        further_topics: the topics of the shard's inputs after the first.
        delta_further_offsets: the offsets that this delta says were committed for them.
    """

    shard: ShardId
    changelog: str
    tear: Tear
    committed: CommittedPosition
    delta_epoch: int
    delta_source_offset: int
    has_state: bool = False
    further_topics: Sequence[str] = ()
    delta_further_offsets: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def delta_position(self) -> CommittedPosition | None:
        """The shard's position if the delta is right and the offset is wrong. None if that isn't known."""
        offsets = [
            self.delta_source_offset,
            *(self.delta_further_offsets.get(topic, UNKNOWN_SOURCE_OFFSET) for topic in self.further_topics),
        ]
        if UNKNOWN_SOURCE_OFFSET in offsets:
            return None
        epoch = max(self.committed.epoch, self.delta_epoch)
        return replace(self.committed, epoch=epoch, state_epoch=self.delta_epoch).at(
            [
                InputOffset(offset, known.topic_id, known.clock)
                for offset, known in zip(offsets, self.committed.inputs, strict=True)
            ]
        )

    def describe(self) -> str:
        """What Kafka did, in one sentence."""
        where = f"{self.changelog}/{self.shard.partition}"
        committed = self.committed
        if self.tear is Tear.DELTA_WITHOUT_OFFSET:
            return (
                f"Kafka has torn a transaction of {self.shard}: it committed the delta of epoch "
                f"{self.delta_epoch} in the changelog {where}, but not the offset from the same "
                f"transaction: the committed offset is still {_offsets(committed)}, with state of epoch "
                f"{committed.state_epoch}."
            )
        last = {0: "holds none", UNKNOWN_EPOCH: "lacks it"}.get(
            self.delta_epoch, f"ends with epoch {self.delta_epoch}"
        )
        return (
            f"Kafka has torn a transaction of {self.shard}: it committed the offset {_offsets(committed)} "
            f"with state of epoch {committed.state_epoch}, but not the delta of that epoch from the same "
            f"transaction: the changelog {where} {last}."
        )

    def choices(self) -> str:
        """What each choice means, and how the user chooses."""
        known = self.delta_position
        offsets = f"at offset {_offsets(self.committed)}"
        delta = f"at offset {_offsets(known) if known is not None else self.delta_source_offset}"
        if self.tear is Tear.DELTA_WITHOUT_OFFSET:
            offsets += (
                f" with the state of epoch {self.committed.state_epoch}: nothing is lost, but outputs of "
                f"epoch {self.delta_epoch} may come twice"
            )
            delta += (
                f" with the state of epoch {self.delta_epoch}: nothing comes twice, but outputs of that "
                "epoch that Kafka aborted are lost"
            )
        else:
            offsets += (
                " with the state of that epoch, which is still available here"
                if self.has_state
                else f" with the state of epoch {self.delta_epoch}: changes made by later records are lost"
            )
            delta = (
                "with the last delta that exists, at the offset that it names: nothing is lost, but "
                "outputs of later epochs may come twice"
            )
        if known is None and self.delta_epoch != UNKNOWN_EPOCH:
            delta = "not possible, because the changelog doesn't say which offset belongs to that delta"
        return (
            "Look at the outputs of that epoch, then start the workers with --set "
            f"torn.transaction=offsets to continue from the offsets ({offsets}), or with --set "
            f"torn.transaction=delta to continue from the delta ({delta}). Until then this shard stays "
            f"stopped; the others go on. {WHERE_TO_READ_MORE}"
        )

    def error(self) -> TornTransaction:
        """The error for the user, who has to choose."""
        return TornTransaction(self.describe(), remedy=self.choices(), where=str(self.shard))


@dataclass(frozen=True, slots=True)
class GoOn:
    """How a shard continues after a torn transaction.

    Attributes:
        position: the position from which it continues.
        rebase: whether the changelog doesn't lead to this state, so that it has to start again after a
            snapshot of it.
        text: for the log.
    """

    position: CommittedPosition
    rebase: bool
    text: str


def go_on(torn: TornShard, policy: TornPolicy) -> GoOn:
    """How the shard continues, as the user has chosen.

    Raises:
        TornTransaction: the user hasn't chosen, or the choice isn't possible.
    """
    chosen = f"{torn.describe()} Continuing from the {policy}, as torn.transaction says"
    if policy == "offsets":
        return GoOn(
            torn.committed,
            rebase=True,
            text=f"{chosen}: at offset {_offsets(torn.committed)}.",
        )
    position = torn.delta_position
    if policy == "delta" and position is not None:
        text = f"{chosen}: at offset {_offsets(position)}."
        return GoOn(position, rebase=False, text=text)
    raise torn.error()


def _offsets(position: CommittedPosition) -> str:
    """The offset of each input."""
    return "+".join(str(at.offset) for at in position.inputs)
