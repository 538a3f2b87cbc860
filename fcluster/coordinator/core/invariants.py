"""What must hold in the coordinator's core after every event. Tests and the simulation check it.

Responsible for: assertions across the core's parts. The running system doesn't use them. Must not change
anything. Pure.
"""

from __future__ import annotations

from fcluster.coordinator.core.cluster import Cluster
from fcluster.coordinator.core.copies import Copies
from fcluster.coordinator.core.membership import Membership
from fcluster.coordinator.core.model import (
    HELD_PHASES,
    EpochPhase,
    Phase,
    SessionPhase,
    Shard,
    ShardPhase,
    Slot,
)
from fcluster.coordinator.core.ownership import Ownership
from fcluster.coordinator.core.rounds import Rounds


def check(
    cluster: Cluster, rounds: Rounds, copies: Copies, ownership: Ownership, membership: Membership
) -> None:
    """Assert all invariants.

    Raises:
        AssertionError: one doesn't hold.
    """
    for slot in cluster.slots.values():
        _check_slot(cluster, membership, slot)
    for session in cluster.sessions.values():
        assert cluster.slots[session.slot].session is session, session
        assert cluster.session_of_worker.get(session.worker) is session, session
        assert session.epoch <= rounds.numbers.highest, session
        if cluster.phase is Phase.RUNNING and cluster.assigning and session.leaving:
            kept = [shard for shard in cluster.shards.values() if session.slot in shard.standbys]
            assert not kept, f"{session} is leaving, and is to keep copies"
        if cluster.phase is Phase.RUNNING:
            told = session.standbys_told or ()
            assert not any(cluster.shards[shard].session == session.number for shard in told), session
    slot_of = {shard.identity: number for number in cluster.slots for shard in cluster.shards_of(number)}
    for shard in cluster.shards.values():
        assert slot_of.get(shard.identity) == shard.slot, shard
        _check_shard(cluster, copies, ownership, shard)
    _check_round(cluster, rounds)
    assert rounds.numbers.highest < rounds.numbers.reserved_until or rounds.current is None
    assert set(rounds.wanting) <= set(cluster.sessions)
    assert set(membership.suspects) <= set(cluster.sessions)
    for joiner in cluster.joiners.values():
        assert joiner.slot is None or cluster.slots[joiner.slot].joiner is joiner


def _check_slot(cluster: Cluster, membership: Membership, slot: Slot) -> None:
    retrying = slot.fence_retry_ms is not None
    assert (slot.number in membership.retrying) == retrying, slot
    assert not (slot.fencing and retrying), slot
    if slot.session is not None:
        assert not any((slot.fenced, slot.fencing, retrying)), slot
        assert cluster.sessions.get(slot.session.number) is slot.session, slot
        assert slot.joiner is None, slot
    elif not slot.fenced and cluster.started:
        assert slot.fencing or retrying, f"nobody fences {slot}"
    if slot.joiner is not None:
        assert cluster.joiners.get(slot.joiner.peer) is slot.joiner, slot


def _check_shard(cluster: Cluster, copies: Copies, ownership: Ownership, shard: Shard) -> None:
    assert (shard.slot is None) == (shard.phase is ShardPhase.FREE), shard
    assert len(set(shard.standbys)) == len(shard.standbys) <= copies.replicas, shard
    if shard.phase is ShardPhase.WARMING:
        assert shard.target not in (None, shard.slot), shard
        assert shard in ownership.warming, shard
    elif shard.target is not None:
        assert shard.phase in (ShardPhase.RELEASING, ShardPhase.FREE), shard
    if shard.phase not in HELD_PHASES:
        assert shard.session == 0, shard
        return
    assert cluster.job_start is not None, shard
    session = cluster.sessions[shard.session]
    assert session.slot == shard.slot, shard
    assert session.phase in (SessionPhase.LIVE, SessionPhase.DRAINED), shard


def _check_round(cluster: Cluster, rounds: Rounds) -> None:
    current = rounds.current
    if current is None:
        return
    assert current.waiting, "a round that nobody holds up is not declared"
    for number, session in (current.waiting | current.prepared).items():
        assert cluster.sessions[number] is session
        assert session.epoch == current.epoch
    assert all(s.epoch_phase is EpochPhase.PREPARING for s in current.waiting.values())
    assert all(s.epoch_phase is EpochPhase.PREPARED for s in current.prepared.values())
