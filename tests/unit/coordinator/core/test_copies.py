"""Standbys and moves to warm copies, as transcripts of the coordinator's messages."""

from __future__ import annotations

from typing import Any

from fcluster.common.settings import Settings
from fcluster.coordinator.core.copies import WARM_LAG_OFFSETS_MAX
from fcluster.coordinator.core.ownership import WARMING_MS_MAX
from fcluster.graph.topology import Topology
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, one_stage, shard


def cluster(workers: int = 2, replicas: int = 0, **options: Any) -> tuple[Harness, list[FakeWorker]]:
    """A cluster whose workers run their shards and have warm copies."""
    harness = Harness(workers=workers, settings=Settings(num_standby_replicas=replicas), **options)
    members = [FakeWorker(harness, f"w{number}") for number in range(workers)]
    for member in members:
        member.hello()
    for member in members:
        member.running()
        member.warm(*member.standbys)
    harness.transcript()
    return harness, members


def said(harness: Harness) -> list[str]:
    return [line for line in harness.transcript() if "Ack" not in line]


def test_each_shard_has_a_copy_on_another_worker() -> None:
    _, (w0, w1, w2) = cluster(workers=3, replicas=1)
    copies = [*w0.standbys, *w1.standbys, *w2.standbys]
    assert sorted(copies) == [shard(partition) for partition in range(4)]
    for worker in (w0, w1, w2):
        assert not set(worker.standbys) & set(worker.assigned)


def test_dead_workers_shards_go_to_their_copies() -> None:
    harness, (w0, w1, w2) = cluster(workers=3, replicas=1)
    holders = {name: worker for worker in (w1, w2) for name in worker.standbys if name in w0.assigned}
    lost = w0.assigned
    w0.disconnect()
    harness.pass_ms(200)
    for name in lost:
        assert name in holders[name].assigned
    assert harness.core.counters.warm_takeovers == len(lost)


def test_copy_stays_until_its_shard_is_assigned() -> None:
    harness, (w0, w1) = cluster(replicas=1)
    w0.disconnect()
    harness.pass_ms(200)
    assert said(harness) == [
        "journal slot/0",
        "fence slot 0",
        "journal slot/0 assignment/in/0 assignment/in/2",
        "w1 <- Assign in/0 in/2",
        "w1 <- Standby",
    ]
    assert len(w1.assigned) == 4


def test_copy_that_is_far_behind_is_not_preferred() -> None:
    harness, (w0, w1, w2) = cluster(workers=3, replicas=1)
    for worker in (w1, w2):
        worker.warm(*worker.standbys, lag=WARM_LAG_OFFSETS_MAX + 1)
    w0.disconnect()
    harness.pass_ms(200)
    assert harness.core.counters.warm_takeovers == 0
    assert sorted(w1.assigned + w2.assigned) == [shard(partition) for partition in range(4)]


def test_move_waits_for_a_warm_copy_while_the_owner_continues() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    assert said(harness) == ["journal slot/2", "w2 <- Welcome slot 2", "w2 <- Standby in/3"]
    w2.warm(shard(3), lag=-1)
    w2.warm(shard(3), lag=WARM_LAG_OFFSETS_MAX + 1)
    assert said(harness) == []
    assert phase_of(harness, 3) == "warming"
    w2.warm(shard(3), lag=WARM_LAG_OFFSETS_MAX)
    assert said(harness) == ["w1 <- Revoke in/3"]
    w1.released(shard(3))
    assert said(harness) == ["journal assignment/in/3", "w2 <- Assign in/3", "w2 <- Standby"]
    assert harness.core.counters.cold_moves == 0


def test_move_to_a_copy_that_never_gets_warm_happens_eventually() -> None:
    harness, (w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    harness.transcript()
    pass_with_heartbeats(harness, [w0, w1, w2], WARMING_MS_MAX - 1000)
    assert said(harness) == []
    pass_with_heartbeats(harness, [w0, w1, w2], 1000)
    assert said(harness) == ["w1 <- Revoke in/3"]
    assert harness.core.counters.cold_moves == 1


def test_shard_without_state_moves_at_once() -> None:
    harness, (_w0, _w1) = cluster(topology=without_state())
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    assert said(harness) == ["journal slot/2", "w2 <- Welcome slot 2", "w1 <- Revoke in/3"]


def test_shard_stays_where_it_is_when_its_target_dies() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    harness.transcript()
    w2.disconnect()
    harness.pass_ms(200)
    assert said(harness) == ["journal slot/2", "fence slot 2", "journal slot/2"]
    assert phase_of(harness, 3) == "running"
    assert w1.assigned == [shard(1), shard(3)]


def test_shard_whose_owner_dies_during_the_warm_up_goes_to_the_warm_copy() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w1.disconnect()
    w2.warm(shard(3))
    harness.transcript()
    harness.pass_ms(200)
    assert shard(3) in w2.assigned


def test_former_owner_becomes_the_standby_when_the_standby_takes_over() -> None:
    harness, (w0, w1) = cluster(replicas=1)
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(*w2.standbys)
    owner, leaving = next(
        (worker, revokes[0].shards)
        for worker in (w0, w1)
        if (revokes := harness.messages_to(worker.peer, messages.Revoke))
    )
    owner.released(*leaving)
    assert set(leaving) <= set(w2.assigned)
    keepers = [worker for worker in (w0, w1, w2) if set(leaving) & set(worker.standbys)]
    assert len(keepers) == 1
    assert keepers[0] is not w2


def test_worker_is_told_its_copies_again_after_a_lost_connection() -> None:
    harness, (w0, _w1) = cluster(replicas=1)
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned)
    assert said(harness) == ["w0 <- Welcome slot 0 adopted", "w0 <- Standby in/1 in/3"]


def test_new_leader_leaves_copies_where_they_are() -> None:
    harness, members = cluster(workers=3, replicas=1)
    before = [worker.standbys for worker in members]
    harness.lead()
    for worker in members:
        worker.hello(session=worker.session, owned=worker.assigned)
        worker.warm(*worker.standbys)
    assert [worker.standbys for worker in members] == before


def test_copy_that_is_no_longer_needed_is_dropped_by_a_new_leader() -> None:
    harness, (w0, w1) = cluster(replicas=1)
    harness.settings = Settings(num_standby_replicas=0)
    harness.lead()
    for worker in (w0, w1):
        worker.hello(session=worker.session, owned=worker.assigned)
    harness.transcript()
    w0.warm(*w0.standbys)
    assert said(harness) == ["w0 <- Standby"]


def pass_with_heartbeats(harness: Harness, workers: list[FakeWorker], duration_ms: int) -> None:
    for _ in range(duration_ms // 500):
        harness.pass_ms(500)
        for worker in workers:
            worker.heartbeat()


def phase_of(harness: Harness, partition: int) -> str:
    return harness.core.shards[shard(partition)].phase.value


def without_state() -> Topology:
    stateful = one_stage()
    (stage,) = stateful.stages
    return Topology("job", (type(stage)(stage.name, stage.inputs, stage.chains, (), None),))
