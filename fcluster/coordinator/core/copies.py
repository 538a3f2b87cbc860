"""Warm copies of shards: where they should be, which workers know of them, and which ones are warm.

Responsible for: placing standby copies, telling workers which ones to keep, and noting their reports. Rules:
a worker is never told to keep a copy of a shard that it owns; a slot that is about to get a shard keeps its
copy until it gets the shard. Correctness never depends on a copy: a new owner always restores the shard to
its committed epoch, and a warm copy only makes that faster. Pure. Must not decide which worker owns which
shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fcluster.common.ids import ShardId
from fcluster.coordinator.core.assignment import place_standbys
from fcluster.coordinator.core.model import Session, SessionPhase, Shard, ShardPhase, Slot
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from fcluster.wire.messages import FromCoordinator

WARM_LAG_OFFSETS_MAX = 200
"""A copy is warm if it isn't further than this behind the end of its changelog, because the rest is read in
no time. A busy shard writes two offsets for each epoch, a delta and its commit marker.
"""


class Copies:
    """The warm copies of a job's shards.

    Args:
        topology: the job's topology. Shards of stages without state have no copies.
        replicas: the number of copies wanted for each shard.
        term: this coordinator's term.
        send: sends a message to a worker.
    """

    def __init__(
        self, topology: Topology, replicas: int, term: int, send: Callable[[bytes, FromCoordinator], None]
    ) -> None:
        self.replicas = replicas
        self._term = term
        self._send = send
        self._stateful = {stage.name for stage in topology.stages if stage.changelog is not None}

    def keeps_state(self, shard: ShardId) -> bool:
        """Whether the shard has state that can be copied."""
        return shard.stage in self._stateful

    def place(self, shards: Mapping[ShardId, Shard], slots: Iterable[Slot]) -> None:
        """Decide which slots keep copies of which shards."""
        if not self.replicas:
            return
        hosts: dict[int, str] = {}
        reported: dict[ShardId, list[int]] = {}
        for slot in slots:
            if slot.session is not None and slot.session.leaving:
                continue  # its copies are dropped with it
            if slot.session is not None:
                hosts[slot.number] = slot.session.host
                for identity in slot.session.standbys:
                    reported.setdefault(identity, []).append(slot.number)
            elif slot.joiner is not None:
                hosts[slot.number] = slot.joiner.hello.host
        owners: dict[ShardId, int | None] = {}
        current: dict[ShardId, tuple[int, ...]] = {}
        for identity, shard in shards.items():
            if not self.keeps_state(identity):
                continue
            moving = shard.target is not None
            owners[identity] = shard.target if moving else shard.slot
            # A new leader knows about copies only from the workers' reports.
            current[identity] = shard.standbys or tuple(reported.get(identity, ()))
            if moving and shard.slot is not None:
                current[identity] += (
                    shard.slot,
                )  # once it has released the shard, its files are as good as a copy
        for identity, standbys in place_standbys(owners, hosts, self.replicas, current).items():
            shards[identity].standbys = standbys

    def tell(self, shards: Mapping[ShardId, Shard], slots: Mapping[int, Slot]) -> None:
        """Tell each worker which copies to keep, if it doesn't know that yet."""
        wanted: dict[int, list[ShardId]] = {}
        for identity, shard in shards.items():
            for number in self._keepers(shard, slots):
                wanted.setdefault(number, []).append(identity)
        for slot in slots.values():
            session = slot.session
            if session is None or session.phase is not SessionPhase.LIVE or session.unlinked_ms is not None:
                continue
            told = tuple(sorted(wanted.get(slot.number, ())))
            # If a worker may not have received the last order, its reports show that.
            known = session.standbys_told or tuple(session.standbys)
            if told != session.standbys_told and (told or known):
                session.standbys_told = told
                self._send(session.peer, messages.Standby(self._term, session.number, list(told)))

    def _keepers(self, shard: Shard, slots: Mapping[int, Slot]) -> set[int]:
        """The slots that keep a copy now, including the one that is about to get the shard."""
        if not self.keeps_state(shard.identity):
            return set()
        keepers = set(shard.standbys)
        if shard.target is not None:
            keepers.add(shard.target)
        if shard.slot is None:
            return keepers
        session = slots[shard.slot].session
        told = session is not None and shard.identity in (session.standbys_told or ())
        if told and shard.phase in (ShardPhase.ASSIGNING, ShardPhase.WAITING):
            return keepers | {shard.slot}
        return keepers - {shard.slot}

    def is_warm(self, shard: ShardId, slot: Slot) -> bool:
        """Whether the copy on `slot` could take over immediately."""
        session = slot.session
        if session is None or session.phase is not SessionPhase.LIVE or session.unlinked_ms is not None:
            return False
        status = session.standbys.get(shard)
        return (
            status is not None
            and shard in (session.standbys_told or ())
            and 0 <= status.lag <= WARM_LAG_OFFSETS_MAX
        )

    def warmest(self, slots: Iterable[Slot]) -> dict[ShardId, int]:
        """By shard, the slot with its most advanced warm copy. Shards without a warm copy are missing."""
        best: dict[ShardId, tuple[int, int]] = {}
        for slot in slots:
            if slot.session is None or slot.session.leaving:
                continue
            for identity, status in slot.session.standbys.items():
                if self.is_warm(identity, slot):
                    rank = status.state_epoch, -slot.number
                    best[identity] = max(rank, best.get(identity, rank))
        return {identity: -number for identity, (_, number) in best.items()}


def learn(session: Session, statuses: Iterable[messages.StandbyStatus]) -> None:
    """Note a worker's report about its copies."""
    session.standbys = {status.shard: status for status in statuses}
