"""The coordinator's decisions, as transcripts of events and effects."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest

from fcluster import Job
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.coordinator.core import events
from fcluster.coordinator.core.election import RESIGN_MS, STANDBYS_COME_MS
from fcluster.coordinator.core.model import Phase, ShardPhase
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import (
    FakeWorker,
    Harness,
    merged_stages,
    shard,
    status,
    two_stages,
)


def cluster(workers: int = 2, **options: Any) -> tuple[Harness, list[FakeWorker]]:
    """A cluster whose workers have joined and run their shards."""
    harness = Harness(workers=workers, **options)
    members = [FakeWorker(harness, f"w{number}") for number in range(workers)]
    for member in members:
        member.hello()
    for member in members:
        member.running()
    harness.transcript()
    return harness, members


# --- joining ------------------------------------------------------------------------------------------


def test_worker_that_joins_is_journalled_before_its_welcome() -> None:
    harness = Harness(workers=1, auto_journal=False)
    harness.write_journal()
    worker = FakeWorker(harness, "w0")
    worker.hello()
    assert harness.transcript() == [
        "journal slot/0 assignment/in/0 assignment/in/1 assignment/in/2 assignment/in/3"
    ]
    harness.write_journal()
    assert harness.transcript() == ["w0 <- Welcome slot 0", "w0 <- Assign in/0 in/1 in/2 in/3"]


def test_first_assignment_waits_for_the_expected_workers() -> None:
    harness = Harness(workers=2)
    first, second = FakeWorker(harness, "w0"), FakeWorker(harness, "w1")
    first.hello()
    harness.pass_ms(100)
    assert harness.transcript() == ["journal slot/0", "w0 <- Welcome slot 0"]
    second.hello()
    assert harness.transcript() == [
        "journal slot/1 assignment/in/0 assignment/in/1 assignment/in/2 assignment/in/3",
        "w1 <- Welcome slot 1",
        "w0 <- Assign in/0 in/2",
        "w1 <- Assign in/1 in/3",
    ]


def test_first_assignment_waits_no_longer_than_the_initial_delay() -> None:
    harness = Harness(workers=2, settings=Settings(initial_rebalance_delay_ms=2000))
    worker = FakeWorker(harness, "w0")
    worker.hello()
    harness.pass_ms(1000)
    worker.heartbeat()
    harness.pass_ms(999)
    assert worker.assigned == []
    harness.pass_ms(1)
    assert worker.assigned == [shard(0), shard(1), shard(2), shard(3)]


def test_hello_sent_twice_opens_one_session() -> None:
    harness = Harness(workers=1, auto_journal=False)
    harness.write_journal()
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.hello()
    harness.write_journal()
    assert len(harness.messages_to(b"w0", messages.Welcome)) == 1
    assert harness.unwritten == []


def test_hello_repeated_over_a_new_connection_keeps_the_session_that_is_being_opened() -> None:
    harness = Harness(workers=1, auto_journal=False)
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.disconnect()
    worker.hello()
    harness.pass_ms(200)
    while harness.unwritten:
        harness.write_journal()
    worker.learn()
    assert len(worker.assigned) == 4


def test_wanted_slot_is_given_if_it_is_free() -> None:
    harness = Harness(workers=3)
    for name, wanted in (("w0", 7), ("w1", 7), ("w2", -1)):
        worker = FakeWorker(harness, name, slot=wanted)
        worker.hello()
    welcomes = [message for _, message in harness.sent if isinstance(message, messages.Welcome)]
    assert [welcome.slot for welcome in welcomes] == [7, 0, 1]


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"topology": "other"}, "another topology", "same job file"),
        ({"version": "0.9"}, "fcluster 0.9", "same version"),
        ({"snapshot_store": "other"}, "snapshot store", "'snapshots'"),
        ({"slot": 10_000}, "slot 10000", "smaller"),
    ],
)
def test_worker_that_does_not_fit_is_refused_with_cause_and_remedy(
    changes: dict[str, Any], cause: str, remedy: str
) -> None:
    harness, _ = cluster(workers=1)
    FakeWorker(harness, "stranger").hello(**changes)
    (refusal,) = harness.messages_to(b"stranger", messages.Refused)
    assert cause in refusal.reason
    assert remedy in refusal.reason
    assert not refusal.retry


def test_worker_that_joins_later_takes_its_share_after_it_was_released() -> None:
    harness, (w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    assert harness.transcript() == ["journal slot/2", "w2 <- Welcome slot 2", "w2 <- Standby in/3"]
    w2.warm(shard(3))
    assert harness.transcript() == ["w2 <- HeartbeatAck", "w1 <- Revoke in/3"]
    w1.released(shard(3))
    assert harness.transcript() == ["journal assignment/in/3", "w2 <- Assign in/3", "w2 <- Standby"]
    assert [w0.assigned, w1.assigned, w2.assigned] == [[shard(0), shard(2)], [shard(1)], [shard(3)]]


def test_repeated_released_frees_nothing() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(shard(3))
    w1.released(shard(3))
    w2.running()
    w2.goodbye()
    assert shard(3) in w1.assigned
    w1.running()
    w3 = FakeWorker(harness, "w3")
    w3.hello()
    w3.warm(shard(3))
    assert harness.core.shards[shard(3)].phase is ShardPhase.RELEASING
    harness.say(w1.peer, messages.Released(w1.session, [shard(3)], 1))  # the former message again
    assert harness.core.shards[shard(3)].phase is ShardPhase.RELEASING
    w1.released(shard(3))
    assert shard(3) in w3.assigned


# --- dying --------------------------------------------------------------------------------------------


def test_dead_workers_shards_wait_for_journal_and_fence() -> None:
    harness, (w0, _) = cluster()
    harness.auto_journal = harness.auto_fence = False
    w0.disconnect()
    harness.pass_ms(149)
    assert harness.transcript() == []
    harness.pass_ms(1)
    assert harness.transcript() == ["journal slot/0"]
    harness.write_journal()
    assert harness.transcript() == ["fence slot 0"]
    harness.fence()
    assert harness.transcript() == ["journal slot/0 assignment/in/0 assignment/in/2"]
    harness.write_journal()
    assert harness.transcript() == ["w1 <- Assign in/0 in/2"]


def test_next_owner_is_told_the_reported_committed_offsets() -> None:
    harness = Harness(workers=1)
    first = FakeWorker(harness, "w0")
    first.hello()
    first.running()
    first.committed(1, False, status(shard(0), 9, 7), status(shard(1), 3, 3))
    first.committed(2, False, status(shard(0), 9, 9))
    first.disconnect()
    second = FakeWorker(harness, "w1")
    second.hello()
    harness.pass_ms(10_000)
    (assign,) = harness.messages_to(second.peer, messages.Assign)
    told = {(at.shard, at.input): at.offset for at in assign.committed}
    assert told == {(shard(0), 0): 9, (shard(1), 0): 3}


def test_worker_whose_process_ended_is_not_waited_for() -> None:
    harness, (w0, w1) = cluster()
    w0.disconnect()
    w0.process_ends()
    assert harness.transcript()[:2] == ["journal slot/0", "fence slot 0"]
    assert len(w1.assigned) == 4


def test_last_messages_of_a_process_are_handled_before_its_end() -> None:
    harness, (w0, _) = cluster()
    w0.process_ends()
    assert harness.transcript() == []
    w0.goodbye()
    w0.disconnect()
    assert not any(line.startswith("fence") for line in harness.transcript())


def test_process_that_ended_is_dead_even_if_its_connection_does_not_close() -> None:
    harness, (w0, _) = cluster()
    w0.process_ends()
    harness.pass_ms(100)
    w0.heartbeat()  # it was already sent
    harness.transcript()
    harness.pass_ms(50)
    assert harness.transcript()[:2] == ["journal slot/0", "fence slot 0"]


def common_epoch(harness: Harness, w0: FakeWorker, w1: FakeWorker) -> int:
    """An epoch that both workers have to prepare."""
    w0.dirty()
    w1.dirty()
    w0.prepared(w0.barrier)
    w0.committed(w0.barrier, dirty=True)
    harness.pass_ms(10)
    assert w0.barrier == w1.barrier
    return w0.barrier


def test_others_do_not_wait_for_the_epoch_of_a_worker_whose_connection_closed() -> None:
    harness, (w0, w1) = cluster()
    epoch = common_epoch(harness, w0, w1)
    w1.prepared(epoch)
    harness.transcript()
    w0.disconnect()
    assert harness.transcript() == [f"w1 <- Complete {epoch}"]


def test_worker_that_is_back_with_an_epoch_that_was_not_waited_for_continues_it() -> None:
    harness, (w0, w1) = cluster()
    epoch = common_epoch(harness, w0, w1)
    w1.prepared(epoch)
    w0.disconnect()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned, prepared_epoch=epoch, in_flight_epoch=epoch, epoch=epoch)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted", f"w0 <- Complete {epoch}"]


def test_take_over_reports_the_time_of_each_step() -> None:
    harness, (w0, w1) = cluster()
    harness.auto_journal = harness.auto_fence = False
    w0.disconnect()
    harness.pass_ms(150)
    harness.pass_ms(9)
    harness.write_journal()
    harness.pass_ms(60)
    harness.fence()
    harness.pass_ms(8)
    harness.write_journal()
    harness.pass_ms(100)
    w1.running()
    (takeover,) = harness.core.status()["takeovers"]
    assert takeover["slot"] == 0
    assert takeover["shards"] == 2
    assert takeover["steps_ms"] == {
        "noticed": 150,
        "journalled": 9,
        "fenced": 60,
        "assigned": 8,
        "restored": 100,
    }


def test_connection_that_is_back_in_time_changes_nothing() -> None:
    harness, (w0, _) = cluster()
    w0.disconnect()
    harness.pass_ms(100)
    w0.hello(session=w0.session, owned=w0.assigned)
    harness.pass_ms(500)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted"]


def test_worker_on_a_new_connection_is_not_dead_but_gets_no_barrier_before_its_hello() -> None:
    harness, (w0, _) = cluster()
    w0.disconnect()
    w0.dirty()
    harness.pass_ms(200)
    assert harness.transcript() == []
    w0.hello(session=w0.session, owned=w0.assigned, dirty=True)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted", "w0 <- Barrier 1"]


def test_worker_that_does_not_report_its_shards_after_a_lost_connection_is_evicted() -> None:
    harness, (w0, w1) = cluster()
    w0.disconnect()
    for _ in range(8):
        w0.heartbeat()
        w1.heartbeat()
        harness.pass_ms(500)
    assert "w0 <- Evicted" in harness.transcript()
    assert len(w1.assigned) == 4


def test_silent_worker_is_dead_after_the_session_timeout() -> None:
    harness, (_w0, w1) = cluster()
    for _ in range(4):
        harness.pass_ms(900)
        w1.heartbeat()
    lines = harness.transcript()
    assert [line for line in lines if "w0" in line or "fence" in line] == ["fence slot 0"]
    assert len(w1.assigned) == 4


def test_silent_worker_is_dead_in_time_if_the_others_send_all_the_time() -> None:
    """Then no tick comes, since there is always a message."""
    harness, (_w0, w1) = cluster()
    for _ in range(8):
        harness.now_ms += 450
        w1.heartbeat()
    assert "fence slot 0" in harness.transcript()


def test_coordinator_that_was_suspended_does_not_blame_its_workers() -> None:
    harness, (w0, w1) = cluster()
    harness.now_ms += 60_000  # stopped, and continued
    w0.heartbeat()
    w1.heartbeat()
    harness.pass_ms(500)
    assert harness.transcript() == ["w0 <- HeartbeatAck", "w1 <- HeartbeatAck"]


def test_failed_fence_is_retried_and_the_shards_wait() -> None:
    harness, (w0, w1) = cluster()
    harness.auto_fence = False
    w0.disconnect()
    harness.pass_ms(200)
    assert harness.transcript() == ["journal slot/0", "fence slot 0"]
    harness.fail_fence()
    harness.pass_ms(249)
    assert harness.transcript() == []
    harness.pass_ms(1)
    assert harness.transcript() == ["fence slot 0"]
    harness.fail_fence()
    w1.heartbeat()
    harness.transcript()
    harness.pass_ms(499)
    assert harness.transcript() == []
    harness.pass_ms(1)
    harness.fence()
    assert harness.transcript()[0] == "fence slot 0"
    assert len(w1.assigned) == 4


def test_goodbye_frees_the_shards_without_a_fence() -> None:
    harness, (w0, _w1) = cluster()
    w0.goodbye()
    assert harness.transcript() == [
        "journal slot/0 assignment/in/0 assignment/in/2",
        "w1 <- Assign in/0 in/2",
    ]


def test_restarted_process_gets_its_slot_and_shards_back() -> None:
    harness, (w0, _w1) = cluster()
    w0.disconnect()
    again = FakeWorker(harness, "w0-again", slot=0)
    again.hello()
    assert harness.transcript() == [
        "journal slot/0",
        "fence slot 0",
        "journal slot/0",
        "w0-again <- Welcome slot 0",
        "w0-again <- Assign in/0 in/2",
    ]


def test_live_worker_keeps_its_slot_when_another_wants_it() -> None:
    harness, (w0, _) = cluster()
    rival = FakeWorker(harness, "rival", slot=0)
    rival.hello()
    assert rival.slot == 2
    assert harness.core.sessions[w0.session].slot == 0


def test_last_worker_dies_and_its_shards_wait_for_the_next() -> None:
    harness, (w0,) = cluster(workers=1)
    w0.disconnect()
    harness.pass_ms(5000)
    assert harness.transcript() == ["journal slot/0", "fence slot 0", "journal slot/0"]
    again = FakeWorker(harness, "again")
    again.hello()
    assert len(again.assigned) == 4


# --- beginning anew -----------------------------------------------------------------------------------


def test_worker_that_resets_keeps_slot_and_shards_after_a_fence() -> None:
    harness, (w0, w1) = cluster()
    former = w0.session
    w0.hello()
    assert harness.transcript() == [
        "journal slot/0",
        "fence slot 0",
        "journal slot/0",
        "w0 <- Welcome slot 0",
        "w0 <- Assign in/0 in/2",
    ]
    assert w0.session > former
    assert w1.assigned == [shard(1), shard(3)]


def test_hello_that_crosses_the_welcome_does_not_end_the_session() -> None:
    harness = Harness(workers=1)
    worker = FakeWorker(harness, "w0")
    worker.hello()
    session = worker.session
    harness.pass_ms(100)
    worker.hello()
    assert worker.session == session
    harness.pass_ms(900)
    worker.hello()  # it did join again, before it sent anything in its session
    assert worker.session > session


def test_ended_session_is_evicted_whatever_it_sends() -> None:
    harness, (w0, _) = cluster()
    former = w0.session
    w0.hello()
    harness.transcript()
    w0.session = former
    w0.dirty()
    w0.prepared(1)
    w0.failed("told by a zombie")
    assert harness.transcript() == ["w0 <- Evicted"] * 3
    assert harness.core.phase is Phase.RUNNING


def test_reset_during_an_epoch_leaves_the_epoch_to_the_others() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    harness.pass_ms(0)
    w1.dirty()
    w0.prepared(1)
    w0.committed(1, True)
    harness.pass_ms(10)
    assert (w0.barrier, w1.barrier) == (2, 2)
    w1.prepared(2)
    harness.transcript()
    w0.hello()
    assert harness.transcript()[0] == "w1 <- Complete 2"


# --- epochs -------------------------------------------------------------------------------------------


def test_first_record_after_a_pause_does_not_wait() -> None:
    harness, (w0, _) = cluster()
    harness.pass_ms(2000)
    w0.dirty()
    w0.prepared(1)
    w0.committed(1)
    assert harness.transcript() == ["w0 <- Barrier 1", "w0 <- Complete 1"]


def test_idle_cluster_has_no_epochs() -> None:
    harness, workers = cluster()
    for _ in range(20):
        for worker in workers:
            worker.heartbeat()
        harness.pass_ms(500)
    assert set(harness.transcript()) == {"w0 <- HeartbeatAck", "w1 <- HeartbeatAck"}


def test_epoch_is_complete_when_all_participants_have_prepared() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w1.dirty()
    w0.committed(1, True)
    assert harness.transcript() == ["w0 <- Barrier 1", "w0 <- Complete 1"]
    harness.pass_ms(9)
    assert harness.transcript() == []
    harness.pass_ms(1)
    assert harness.transcript() == ["w1 <- Barrier 2", "w0 <- Barrier 2"]
    w1.prepared(2)
    assert harness.transcript() == []
    w0.prepared(2)
    assert harness.transcript() == ["w1 <- Complete 2", "w0 <- Complete 2"]


def test_worker_with_an_epoch_in_flight_gets_no_other_barrier() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w0.dirty()
    harness.pass_ms(20)
    w1.dirty()
    assert harness.transcript() == ["w0 <- Barrier 1", "w0 <- Complete 1", "w1 <- Barrier 2"]
    w1.prepared(2)
    w0.committed(1, True)
    harness.pass_ms(10)
    assert harness.transcript() == ["w1 <- Complete 2", "w0 <- Barrier 3"]


def test_straggler_is_not_waited_for_and_completes_later() -> None:
    harness, (w0, w1) = cluster(settings=Settings(checkpoint_straggler_ms=100))
    w0.dirty()
    w0.prepared(1)
    w0.committed(1, True)
    w1.dirty()
    harness.pass_ms(10)
    w0.prepared(2)
    harness.transcript()
    harness.pass_ms(99)
    assert harness.transcript() == []
    harness.pass_ms(1)
    assert harness.transcript() == ["w0 <- Complete 2"]
    w0.committed(2, True)
    w0.prepared(3)
    assert harness.transcript() == ["w0 <- Barrier 3", "w0 <- Complete 3"]
    w1.prepared(2)
    assert harness.transcript() == ["w1 <- Complete 2"]


def test_worker_that_dies_in_an_epoch_does_not_delay_it() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w0.committed(1, True)
    w1.dirty()
    harness.pass_ms(10)
    w0.prepared(2)
    harness.transcript()
    w1.goodbye()
    assert harness.transcript()[0] == "w0 <- Complete 2"


@pytest.mark.parametrize("prepares", [False, True])
def test_worker_stuck_in_an_epoch_is_evicted_and_fenced(prepares: bool) -> None:
    harness, (w0, w1) = cluster(settings=Settings(checkpoint_timeout_ms=5000))
    w0.dirty()
    if prepares:
        w0.prepared(1)
    for _ in range(11):
        w0.heartbeat()
        w1.heartbeat()
        harness.pass_ms(500)
    lines = [line for line in harness.transcript() if "Ack" not in line]
    assert lines[-5:] == [
        "w0 <- Evicted",
        "journal slot/0",
        "fence slot 0",
        "journal slot/0 assignment/in/0 assignment/in/2",
        "w1 <- Assign in/0 in/2",
    ]


def test_interval_doubles_with_a_backlog_and_drops_at_once() -> None:
    harness, (w0,) = cluster(
        workers=1, settings=Settings(commit_interval_min_ms=10, commit_interval_max_ms=100)
    )
    began: list[float] = []
    w0.dirty(backlog=True)
    for epoch in range(1, 9):
        while w0.barrier < epoch:
            harness.pass_ms(1)
        began.append(harness.now_ms)
        w0.prepared(epoch, backlog=epoch < 6)
        w0.committed(epoch, True)
    gaps = [after - before for before, after in itertools.pairwise(began)]
    # An eighth too early is fine, so that it can share an epoch with others.
    assert gaps == pytest.approx([17.5, 35, 70, 87.5, 87.5, 10, 10], abs=1)


def test_interval_with_a_backlog_is_no_shorter_than_an_epoch_takes() -> None:
    harness, (w0,) = cluster(workers=1)
    w0.dirty(backlog=True)
    w0.prepared(1, backlog=True)
    harness.pass_ms(300)
    w0.committed(1, True)
    assert harness.core.sessions[w0.session].interval_ms == 300


def test_backlog_of_one_worker_does_not_delay_another() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty(backlog=True)
    for _ in range(8):
        epoch = w0.barrier
        w0.prepared(epoch, backlog=True)
        w0.committed(epoch, True)
        while w0.barrier == epoch:
            harness.pass_ms(10)
            w1.heartbeat()
    w0.prepared(w0.barrier, backlog=True)
    w0.committed(w0.barrier, True)
    harness.transcript()
    for _ in range(5):
        harness.pass_ms(10)
        w1.dirty()
        w1.prepared(w1.barrier)
        w1.committed(w1.barrier)
    barriers = [line for line in harness.transcript() if "Barrier" in line]
    assert len(barriers) == 5
    assert all(line.startswith("w1") for line in barriers)


def test_no_epoch_is_numbered_before_its_reservation_is_journalled() -> None:
    harness, (w0,) = cluster(workers=1)
    harness.auto_journal = False
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1_000_000, dirty=True)
    assert w0.barrier == 0
    assert [write.entries for write in harness.unwritten] == [{"epoch": {"reserved_until": 1_010_001}}]
    harness.write_journal()
    assert w0.barrier == 1_000_001


def test_epoch_numbers_are_reserved_again_before_they_run_out() -> None:
    harness, (w0,) = cluster(workers=1, settings=Settings(commit_interval_min_ms=0))
    for _ in range(5_500):
        w0.dirty()
        w0.prepared(w0.barrier)
        w0.committed(w0.barrier)
        harness.sent = harness.sent[-8:]
    assert harness.journal["epoch"]["reserved_until"] > 15_000


# --- messages lost with a connection ------------------------------------------------------------------


def test_lost_barrier_is_replaced_by_the_next_epoch() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=0, dirty=True)
    harness.pass_ms(10)
    assert harness.transcript() == ["w0 <- Barrier 1", "w0 <- Welcome slot 0 adopted", "w0 <- Barrier 2"]


def test_lost_prepared_is_replaced_by_the_hello() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1, prepared_epoch=1, in_flight_epoch=1)
    assert harness.transcript() == ["w0 <- Barrier 1", "w0 <- Welcome slot 0 adopted", "w0 <- Complete 1"]


def test_lost_complete_is_sent_again() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w0.disconnect()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1, prepared_epoch=1, in_flight_epoch=1)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted", "w0 <- Complete 1"]


def test_lost_committed_frees_the_worker_for_the_next_epoch() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w0.disconnect()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1, dirty=True)
    harness.pass_ms(10)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted", "w0 <- Barrier 2"]


def test_barrier_that_crosses_the_hello_is_completed() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=0, dirty=True)
    harness.pass_ms(10)
    harness.transcript()
    w0.prepared(1)  # it received both barriers, and took part in the first
    assert harness.transcript() == ["w0 <- Complete 1"]
    w0.committed(1, True)
    assert harness.transcript() == []
    harness.pass_ms(10)
    assert harness.transcript() == ["w0 <- Barrier 3"]


def test_lost_assign_is_sent_again() -> None:
    harness, (w0, _w1) = cluster()
    w0.disconnect()
    w0.hello(session=w0.session, owned=[shard(0)])
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted", "w0 <- Assign in/2"]


def test_hello_of_a_former_connection_does_not_undo_later_messages() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(shard(3))
    w2.disconnect()
    w1.released(shard(3))
    w2.hello(session=w2.session)
    assert harness.transcript()[-2:] == ["w2 <- Assign in/3", "w2 <- Standby"]
    w2.hello(session=w2.session)  # it was sent before that arrived
    assert harness.transcript() == ["w2 <- Welcome slot 2 adopted"]


def test_lost_released_is_replaced_by_the_hello() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(shard(3))
    w1.disconnect()
    harness.transcript()
    w1.hello(session=w1.session, owned=[shard(1)])
    assert harness.transcript() == [
        "w1 <- Welcome slot 1 adopted",
        "journal assignment/in/3",
        "w2 <- Assign in/3",
        "w2 <- Standby",
    ]


def test_worker_that_never_receives_its_orders_is_evicted() -> None:
    harness, (w0, w1) = cluster()
    deaf = FakeWorker(harness, "w2")
    deaf.hello()
    deaf.warm(shard(3))
    w1.released(shard(3))
    assert deaf.assigned == [shard(3)]
    for _ in range(harness.core.settings.checkpoint_timeout_ms // 1000 + 1):
        harness.say(deaf.peer, messages.Heartbeat(deaf.session, messages.WorkerStats(), 0))
        w0.heartbeat()
        w1.heartbeat()
        harness.pass_ms(1000)
    assert harness.messages_to(deaf.peer, messages.Evicted)
    assert shard(3) in w0.assigned + w1.assigned


def test_worker_that_waits_for_kafka_is_distinguished_from_one_that_hangs() -> None:
    harness, (w0, w1) = cluster(settings=Settings(checkpoint_timeout_ms=5000))
    waits = messages.WorkerStats(kafka_wait="the group's coordinator", kafka_wait_ms=2000)
    w0.dirty()
    for _ in range(60):
        harness.say(w0.peer, messages.Heartbeat(w0.session, waits, w0.orders_heard))
        w1.heartbeat()
        harness.pass_ms(500)
    assert not harness.messages_to(w0.peer, messages.Evicted), "another worker wouldn't get an answer either"
    for _ in range(11):
        w0.heartbeat()
        w1.heartbeat()
        harness.pass_ms(500)
    assert harness.messages_to(w0.peer, messages.Evicted), "it no longer waits for Kafka"


def test_worker_that_alone_waits_for_kafka_while_others_commit_is_replaced() -> None:
    harness, (w0, w1) = cluster(settings=Settings(checkpoint_timeout_ms=5000))
    waits = messages.WorkerStats(kafka_wait="the group's coordinator", kafka_wait_ms=2000)
    w0.dirty()
    harness.pass_ms(200)
    w1.dirty()
    harness.pass_ms(200)
    w1.prepared(w1.barrier)
    harness.pass_ms(1000)
    w1.committed(w1.barrier)
    assert w1.barrier > w0.barrier > 0
    for _ in range(11):
        harness.say(w0.peer, messages.Heartbeat(w0.session, waits, w0.orders_heard))
        w1.heartbeat()
        harness.pass_ms(500)
    assert harness.messages_to(w0.peer, messages.Evicted), "the brokers answer others"


def test_worker_that_may_have_missed_a_revoke_is_evicted() -> None:
    harness, (_w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(shard(3))
    w1.disconnect()
    harness.transcript()
    w1.hello(session=w1.session, owned=[shard(1), shard(3)])
    lines = [line for line in harness.transcript() if "Standby" not in line]
    assert lines[:3] == ["w1 <- Evicted", "journal slot/1", "fence slot 1"]


def test_shards_are_not_moved_away_from_a_worker_without_connection() -> None:
    harness, (_w0, w1) = cluster()
    w1.disconnect()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    assert "Revoke" not in " ".join(harness.transcript())
    w2.warm(shard(3))
    assert "Revoke" not in " ".join(harness.transcript())
    w1.hello(session=w1.session, owned=w1.assigned)
    assert harness.transcript()[-1] == "w1 <- Revoke in/3"


# --- a new coordinator --------------------------------------------------------------------------------


def test_new_leader_adopts_what_workers_own_and_completes_what_they_prepared() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    harness.lead()
    harness.transcript()
    w0.prepared(1)  # it was queued when the connection was lost
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1, prepared_epoch=1, in_flight_epoch=1, dirty=True)
    w1.hello(session=w1.session, owned=w1.assigned, epoch=1)
    assert harness.transcript() == [
        "w0 <- Welcome slot 0 adopted",
        "w0 <- Complete 1",
        "w1 <- Welcome slot 1 adopted",
    ]
    w0.committed(1, True)
    harness.pass_ms(10)
    assert w0.barrier > 10_000  # above everything that the former leader had reserved
    w0.prepared(w0.barrier)
    assert harness.transcript()[-1] == f"w0 <- Complete {w0.barrier}"


def test_worker_that_was_preparing_when_the_leader_changed_completes_when_it_is_ready() -> None:
    harness, (w0, _w1) = cluster()
    w0.dirty()
    harness.lead()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned, epoch=1, in_flight_epoch=1, dirty=True)
    assert harness.transcript() == ["w0 <- Welcome slot 0 adopted"]
    w0.prepared(1)
    assert harness.transcript() == ["w0 <- Complete 1"]


def test_sessions_that_do_not_come_back_to_a_new_leader_are_fenced_and_their_shards_reassigned() -> None:
    harness, (w0, _w1) = cluster()
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned)
    harness.transcript()
    for _ in range(4):
        w0.heartbeat()
        harness.pass_ms(800)
    lines = [line for line in harness.transcript() if "Ack" not in line]
    assert lines == [
        "journal slot/1",
        "fence slot 1",
        "journal slot/1 assignment/in/1 assignment/in/3",
        "w0 <- Assign in/1 in/3",
    ]


def test_session_unknown_to_the_new_leader_is_evicted() -> None:
    harness, (w0, _w1) = cluster()
    harness.journal.pop("slot/0")
    harness.lead()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned)
    assert harness.transcript() == ["w0 <- Evicted"]


def test_worker_with_shards_that_the_journal_assigns_to_others_is_evicted() -> None:
    harness, (w0, _w1) = cluster()
    harness.lead()
    harness.transcript()
    w0.hello(session=w0.session, owned=[shard(0), shard(1)])
    assert harness.transcript()[:3] == ["w0 <- Evicted", "journal slot/0", "fence slot 0"]


def test_slot_whose_fence_the_former_leader_did_not_complete_is_fenced_first() -> None:
    harness, (w0, w1) = cluster()
    harness.auto_fence = False
    w0.goodbye()
    w1.disconnect()
    harness.pass_ms(200)
    harness.lead()
    assert harness.transcript()[-1] == "fence slot 1"


def test_restart_of_all_processes_reuses_the_slots_without_waiting() -> None:
    harness, _ = cluster()
    harness.lead()
    harness.transcript()
    for slot in (0, 1):
        FakeWorker(harness, f"new{slot}", slot=slot).hello()
    assert harness.transcript() == [
        "journal slot/0",
        "fence slot 0",
        "journal slot/0",
        "new0 <- Welcome slot 0",
        "new0 <- Assign in/0 in/2",
        "journal slot/1",
        "fence slot 1",
        "journal slot/1",
        "new1 <- Welcome slot 1",
        "new1 <- Assign in/1 in/3",
    ]


def test_worker_without_a_wanted_slot_waits_until_free_slots_are_known() -> None:
    harness, (w0, _w1) = cluster()
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned)
    new = FakeWorker(harness, "new")
    new.hello()
    harness.transcript()
    w0.heartbeat()
    harness.pass_ms(2000)
    assert harness.messages_to(b"new", messages.Welcome) == []
    w0.heartbeat()
    harness.pass_ms(1300)
    assert harness.messages_to(b"new", messages.Welcome)[0].slot == 1


def test_session_that_releases_a_shard_without_being_asked_is_evicted() -> None:
    harness, (w0, w1) = cluster()
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    w2.warm(shard(3))
    assert harness.transcript()[-1] == "w1 <- Revoke in/3"
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned)
    w1.hello(session=w1.session, owned=[shard(1), shard(3)])
    harness.transcript()
    w1.released(shard(3))
    assert harness.transcript()[0] == "w1 <- Evicted"
    w1.hello()
    w2.hello(session=w2.session)
    for worker in (w0, w1, w2):
        worker.running()
        worker.warm(*worker.standbys)
    w1.released(*w1.harness.messages_to(w1.peer, messages.Revoke)[-1].shards)
    assert sorted(w0.assigned + w1.assigned + w2.assigned) == [shard(partition) for partition in range(4)]
    assert len(w2.assigned) == 1


def test_deposed_leader_stops_and_sends_nothing_more() -> None:
    harness, (w0, _) = cluster()
    harness.feed(events.Deposed("fenced"))
    assert harness.stopped == events.StopCoordinator(ExitCode.TEMPORARY, "deposed: fenced")
    harness.transcript()
    w0.dirty()
    assert harness.transcript() == []


# --- the end ------------------------------------------------------------------------------------------


def test_stop_request_drains_then_shuts_down_then_stops() -> None:
    harness, (w0, w1) = cluster()
    w0.dirty()
    w0.prepared(1)
    w0.dirty()
    harness.transcript()
    harness.say(b"admin", messages.StopRequest())
    assert harness.transcript() == ["journal ending", "admin <- StopReply", "w0 <- Drain", "w1 <- Drain"]
    w1.drained()
    w0.committed(1, True)
    harness.pass_ms(10)
    w0.prepared(2)
    w0.committed(2)
    assert harness.transcript() == ["w0 <- Barrier 2", "w0 <- Complete 2"]
    w0.drained()
    reason = "asked to stop by an admin client"
    assert harness.transcript() == [
        f"w0 <- Shutdown: {reason}",
        f"w1 <- Shutdown: {reason}",
        "journal slot/0 slot/1",
        f"stop {ExitCode.DONE}: {reason}",
    ]
    assert harness.journal["slot/0"] == {"session": 0, "worker": "", "host": "", "pid": 0, "fenced": True}


def test_drain_does_not_wait_for_the_interval() -> None:
    settings = Settings(commit_interval_min_ms=50_000, commit_interval_max_ms=50_000)
    harness, (w0, w1) = cluster(settings=settings)
    w0.dirty()
    w0.prepared(1)
    w0.committed(1, True)
    w1.dirty()
    harness.transcript()
    harness.say(b"admin", messages.StopRequest())
    assert "w0 <- Barrier 2" in harness.transcript()


def test_draining_job_takes_no_new_workers() -> None:
    harness, (_w0, w1) = cluster()
    harness.feed(events.StopRequested())
    harness.transcript()
    FakeWorker(harness, "new").hello()
    FakeWorker(harness, "w1-again", slot=1).hello()
    w1.hello()
    lines = harness.transcript()
    assert lines[0] == "new <- Shutdown: asked to stop"
    assert lines[1] == "w1-again <- Shutdown: asked to stop"
    assert "w1 <- Shutdown: asked to stop" in lines
    assert "fence slot 1" in lines


def test_worker_that_dies_while_draining_is_fenced_and_not_waited_for() -> None:
    harness, (w0, w1) = cluster()
    harness.feed(events.StopRequested())
    w0.drained()
    w1.disconnect()
    harness.auto_fence = False
    harness.pass_ms(200)
    assert harness.stopped is None
    harness.fence()
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.DONE


def test_drain_ends_even_if_a_worker_never_drains_and_its_fence_fails() -> None:
    harness, (w0, w1) = cluster(settings=Settings(checkpoint_timeout_ms=1000))
    harness.auto_fence = False
    harness.feed(events.StopRequested())
    w0.drained()
    for _ in range(30):
        w1.heartbeat()
        harness.pass_ms(500)
        if harness.unfenced:
            harness.fail_fence()
    assert harness.stopped is not None


def test_failed_worker_stops_the_job_after_the_others_have_drained() -> None:
    harness, (w0, w1) = cluster()
    w0.failed("in/0 at offset 7: not JSON")
    assert harness.transcript() == ["journal ending", "w0 <- Drain", "w1 <- Drain"]
    w1.drained()
    harness.pass_ms(2000)
    assert harness.transcript() == [
        "w0 <- Shutdown failed: in/0 at offset 7: not JSON",
        "w1 <- Shutdown failed: in/0 at offset 7: not JSON",
        "journal slot/0 slot/1",
        "fence slot 0",
        "journal slot/0",
        f"stop {ExitCode.JOB_FAILED}: in/0 at offset 7: not JSON",
    ]


def test_failed_worker_that_drains_is_not_waited_for_any_longer() -> None:
    harness, (w0, w1) = cluster()
    w0.failed("bad record")
    w1.drained()
    w0.drained()
    assert harness.stopped == events.StopCoordinator(
        ExitCode.JOB_FAILED, "bad record", Failure.of_record("bad record")
    )


def test_deposed_leader_neither_drains_nor_shuts_down_workers() -> None:
    for failing in (False, True):
        harness, (w0, w1) = cluster()
        harness.auto_journal = False
        if failing:
            w0.failed("bad record")
        else:
            harness.say(b"admin", messages.StopRequest())
        w0.drained()
        w1.drained()
        FakeWorker(harness, "w1-again", slot=1).hello()
        harness.pass_ms(3 * harness.settings.session_timeout_ms)
        harness.feed(events.Deposed("fenced"))
        said = [type(message).__name__ for _, message in harness.sent]
        assert not {"Drain", "Shutdown", "StopReply"} & set(said), said


def test_failure_during_a_drain_is_journalled_before_workers_are_told() -> None:
    harness, (w0, w1) = cluster()
    harness.feed(events.StopRequested())
    harness.auto_journal = False
    w0.failed("bad record")
    w0.drained()
    w1.drained()
    assert not harness.messages_to(b"w0", messages.Shutdown)
    while harness.unwritten:
        harness.write_journal()
    assert harness.messages_to(b"w0", messages.Shutdown)[0].failure
    assert harness.journal["ending"] == {
        "reason": "bad record",
        "failed": True,
        "failure": {"kind": "record", "message": "bad record", "remedy": "", "where": ""},
    }


def test_successor_continues_an_end_that_an_older_version_journalled() -> None:
    harness, (w0, w1) = cluster()
    w0.failed("bad record")
    harness.journal["ending"] = {"reason": "record in/0 is bad; remedy: mend it", "failed": True}
    harness.lead()
    for worker in (w0, w1):
        worker.hello(session=worker.session, owned=worker.assigned, slot=worker.slot, draining=True)
        worker.drained()
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.JOB_FAILED
    assert harness.stopped.failure == Failure(FailureKind.OTHER, "record in/0 is bad", "mend it")
    assert harness.core.status()["failure"]["remedy"] == "mend it"


def test_successor_continues_the_end_of_the_job() -> None:
    harness, (w0, w1) = cluster()
    w0.failed("bad record")
    harness.lead()
    for worker in (w0, w1):
        worker.hello(session=worker.session, owned=worker.assigned, slot=worker.slot, draining=True)
    assert len(harness.messages_to(b"w0", messages.Drain)) == 2
    w0.drained()
    w1.drained()
    assert harness.stopped == events.StopCoordinator(
        ExitCode.JOB_FAILED, "bad record", Failure.of_record("bad record")
    )


def test_worker_that_stopped_for_a_drain_that_was_forgotten_is_evicted() -> None:
    harness, (w0, w1) = cluster()
    harness.feed(events.StopRequested())
    del harness.journal["ending"]  # as a coordinator does when the job is started again
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned, slot=0, draining=True)
    w1.hello(session=w1.session, owned=w1.assigned, slot=1)
    assert len(harness.messages_to(b"w0", messages.Evicted)) == 1
    assert not harness.messages_to(b"w1", messages.Evicted)
    former = w0.session
    w0.hello()
    assert w0.session != former
    assert w0.assigned, "it works again"


# --- giving up the leadership -------------------------------------------------------------------------------


def stand_by(harness: Harness, name: str, *, leaves: bool = False) -> None:
    harness.say(name.encode(), messages.LeaderCheck(name, leaves))


def invited(harness: Harness, name: str) -> bool:
    answers = harness.messages_to(name.encode(), messages.LeaderAlive)
    return bool(answers) and answers[-1].resigns


def test_leader_that_resigns_invites_the_first_standby_and_leads_until_it_is_deposed() -> None:
    harness, (w0, _w1) = cluster()
    stand_by(harness, "s1")
    stand_by(harness, "s2")
    assert not invited(harness, "s1")
    harness.feed(events.ResignRequested())
    assert invited(harness, "s1")
    assert not invited(harness, "s2")
    w0.dirty()
    w0.prepared(1)
    w0.committed(1)
    assert "w0 <- Complete 1" in harness.transcript()
    stand_by(harness, "s1")
    assert invited(harness, "s1"), "the first invitation may have been lost"
    harness.pass_ms(300)
    assert "journal check" in harness.transcript(), "otherwise it wouldn't notice that it is deposed"
    harness.feed(events.Deposed("fenced"))
    assert harness.stopped == events.StopCoordinator(ExitCode.TEMPORARY, "deposed: fenced")
    assert not harness.messages_to(b"w0", messages.Drain)


def test_leader_that_resigns_alone_drains_at_once() -> None:
    harness, _ = cluster()
    harness.feed(events.ResignRequested())
    assert harness.core.phase is Phase.DRAINING


def test_standby_that_leaves_too_is_not_waited_for() -> None:
    harness, _ = cluster()
    stand_by(harness, "s1")
    stand_by(harness, "s2")
    harness.feed(events.ResignRequested())
    stand_by(harness, "s1", leaves=True)
    assert invited(harness, "s2")
    stand_by(harness, "s2", leaves=True)
    assert harness.core.phase is Phase.DRAINING


def test_leader_whose_standby_does_not_take_over_drains_eventually() -> None:
    harness, members = cluster()
    stand_by(harness, "s1")
    harness.feed(events.ResignRequested())
    for passed_ms in (RESIGN_MS / 2, RESIGN_MS / 2 - 1):
        harness.pass_ms(passed_ms)
        for member in members:
            member.heartbeat()
    assert harness.core.phase is Phase.RUNNING
    harness.pass_ms(2)
    assert harness.core.phase is Phase.DRAINING


def test_leader_that_has_just_taken_over_waits_a_moment_for_standbys() -> None:
    harness, (w0, _w1) = cluster()
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned, slot=0)
    harness.feed(events.ResignRequested())
    harness.pass_ms(STANDBYS_COME_MS / 2)
    assert harness.core.phase is Phase.RUNNING
    stand_by(harness, "s1")
    harness.pass_ms(100)
    assert invited(harness, "s1")


def test_stop_request_ends_the_job_though_the_leader_resigns() -> None:
    harness, _ = cluster()
    stand_by(harness, "s1")
    harness.feed(events.ResignRequested())
    harness.say(b"admin", messages.StopRequest())
    assert harness.core.phase is Phase.DRAINING
    stand_by(harness, "s1")
    assert not invited(harness, "s1")


# --- a worker that has heard of a newer leader --------------------------------------------------------


def test_report_of_a_newer_leader_is_checked_with_the_journal_and_not_trusted() -> None:
    harness, (w0, _) = cluster()
    harness.auto_journal = False
    w0.disconnect()
    harness.transcript()
    w0.hello(session=w0.session, owned=w0.assigned, slot=0, term=7)
    assert harness.transcript()[-1] == "journal check"
    assert harness.messages_to(b"w0", messages.Refused)[-1].retry, "it has to learn the old term"
    assert not harness.messages_to(b"w0", messages.Welcome)[1:], (
        "a leader that it won't obey must not adopt it"
    )
    harness.write_journal()
    assert harness.stopped is None
    w0.hello(session=w0.session, owned=w0.assigned, slot=0, term=8)
    harness.feed(events.Deposed("fenced"))
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.TEMPORARY


def test_reports_of_newer_leaders_cost_at_most_one_write_a_second() -> None:
    harness, _ = cluster()
    harness.transcript()
    for _ in range(100):
        FakeWorker(harness, "liar").hello(term=2**53)
        harness.pass_ms(20)
    assert harness.transcript().count("journal check") == 2
    assert harness.core.terms.term == 1


# --- until caught up ----------------------------------------------------------------------------------


def test_job_drains_once_each_stage_has_caught_up_with_its_target() -> None:
    harness = Harness(
        topology=two_stages(), partitions={"in": 2, "job-b-repartition": 1}, workers=1, until_caught_up=True
    )
    assert harness.transcript() == ["read end of in"]
    worker = FakeWorker(harness, "w0")
    worker.hello()
    harness.feed(events.EndOffsetsRead("in", {0: 100, 1: 0}))
    worker.running()
    worker.heartbeat(status(shard(0), 100, 50, 100, dirty=True), status(shard(1)))
    assert harness.unread == ["in"]
    worker.dirty()
    worker.prepared(1)
    worker.committed(1, False, status(shard(0), 100, 100))
    assert harness.unread == ["in", "b"]
    harness.feed(events.EndOffsetsRead("b", {0: 30}))
    worker.heartbeat(status(shard(0, "b"), 30, 29, 30, dirty=True))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(shard(0, "b"), 30, 29, 30))
    assert harness.core.phase is Phase.DRAINING
    worker.drained()
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.DONE


def test_topic_of_the_user_that_the_job_itself_writes_is_read_to_what_it_has_written() -> None:
    job = Job("job")
    between = job.topic("between")
    job.stream(job.topic("in")).through(between).to(job.topic("out"))
    harness = Harness(
        topology=job.build(Settings()), partitions={"in": 1, "between": 1}, workers=1, until_caught_up=True
    )
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.running()
    assert harness.unread == ["in"]
    harness.feed(events.EndOffsetsRead("in", {0: 10}))
    worker.heartbeat(status(shard(0), 10, 10))
    assert harness.unread == ["in", "between"]
    harness.feed(events.EndOffsetsRead("between", {0: 5}))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(shard(0, "between"), 5, 5))
    assert harness.core.phase is Phase.DRAINING


def test_job_is_caught_up_only_when_each_merged_input_is() -> None:
    harness = Harness(
        topology=merged_stages(),
        partitions={"in": 1, "more": 1, "job-more-b-repartition": 1},
        workers=1,
        until_caught_up=True,
    )
    assert harness.transcript() == ["read end of in", "read end of more"], (
        "not the third, whose feeder isn't done"
    )
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.running()
    harness.feed(events.EndOffsetsRead("in", {0: 10}))
    harness.feed(events.EndOffsetsRead("more", {0: 20}))
    merged = shard(0, "more")
    worker.heartbeat(status(shard(0), 10, 10), status(merged, 20, 20))
    assert harness.transcript()[-1] == "read end of more (input 1)"
    harness.feed(events.EndOffsetsRead("more", {0: 10}, 1))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(merged, 10, 9, dirty=True, number=1))
    assert harness.core.phase is Phase.RUNNING
    worker.heartbeat(status(merged, 10, 10, number=1))
    assert harness.core.phase is Phase.DRAINING


def merged_shard() -> tuple[Harness, FakeWorker, ShardId]:
    """A job with a merge, its only worker, and a shard with two inputs."""
    partitions = {"in": 1, "more": 1, "job-more-b-repartition": 1}
    harness = Harness(topology=merged_stages(), partitions=partitions, workers=1)
    worker = FakeWorker(harness, "w0")
    worker.hello()
    worker.running()
    return harness, worker, shard(0, "more")


def test_status_shows_each_merged_input_and_their_sums() -> None:
    harness, worker, merged = merged_shard()
    worker.heartbeat(status(merged, 20, 15, 30))

    def shown() -> dict[str, Any]:
        return next(one for one in harness.core.status()["shards"] if one["stage"] == "more")

    assert (shown()["position"], shown()["lag"]) == (-1, -1), "one input's lag isn't known"
    worker.heartbeat(status(merged, 4, 3, 5, number=1))
    assert (shown()["position"], shown()["committed"], shown()["lag"]) == (24, 18, 11)
    assert shown()["inputs"] == [
        {"topic": "more", "position": 20, "committed": 15, "end": 30, "lag": 10},
        {"topic": "job-more-b-repartition", "position": 4, "committed": 3, "end": 5, "lag": 1},
    ]
    committed = harness.core.committed_offsets()
    assert [committed[merged, number] for number in range(2)] == [15, 3]


def test_hang_at_a_record_of_one_input_ends_when_that_input_progresses() -> None:
    harness, worker, merged = merged_shard()
    harness.say(worker.peer, messages.RecordOverdue(worker.session, merged, 5, "it hung", "slow", 1))
    worker.committed(1, False, status(merged, 9, 9))
    known = harness.core._cluster.overdue
    assert [one.input for one in known[merged]] == [1]
    worker.committed(2, False, status(merged, 6, 6, number=1))
    assert known == {}


def test_shard_that_moved_after_reaching_its_target_stays_caught_up() -> None:
    harness, (w0, w1) = cluster(until_caught_up=True)
    harness.feed(events.EndOffsetsRead("in", {0: 10, 1: 10, 2: 10, 3: 10}))
    w0.committed(1, True, *(status(identity, 10, 10) for identity in w0.assigned))
    w0.goodbye()
    w1.running([shard(0), shard(2)])
    w1.heartbeat(*(status(identity, 10, 10) for identity in (shard(1), shard(3))))
    assert harness.core.phase is Phase.DRAINING


def test_report_about_a_shard_of_another_worker_does_not_count() -> None:
    harness, (w0, _w1) = cluster(until_caught_up=True)
    harness.feed(events.EndOffsetsRead("in", {0: 10, 1: 10, 2: 10, 3: 10}))
    w0.heartbeat(*(status(shard(partition), 10, 10) for partition in range(4)))
    assert harness.core.phase is Phase.RUNNING


# --- status -------------------------------------------------------------------------------------------


def test_status_shows_workers_shards_and_who_delays_an_epoch() -> None:
    harness, (w0, _w1) = cluster()
    w0.heartbeat(records_in=0)
    harness.pass_ms(500)
    w0.heartbeat(status(shard(0), 70, 50, 100, dirty=True), records_in=1000)
    w0.dirty()
    harness.pass_ms(60)
    harness.say(b"admin", messages.StatusRequest())
    (reply,) = harness.messages_to(b"admin", messages.StatusReply)
    document = json.loads(json.dumps(msgspec.msgpack.decode(reply.status)))
    assert document["job"] == "job"
    assert document["phase"] == "running"
    assert document["oldest_open_epoch"] == {"epoch": 1, "age_ms": 60, "waiting_for": ["slot 0 (preparing)"]}
    assert [worker["slot"] for worker in document["workers"]] == [0, 1]
    assert document["workers"][0]["records_in_per_second"] == 2000
    assert document["workers"][0]["last_heard_ms"] == 60
    first = document["shards"][0]
    assert (first["stage"], first["partition"], first["slot"], first["phase"]) == ("in", 0, 0, "running")
    assert (first["position"], first["committed"], first["end"], first["lag"]) == (70, 50, 100, 30)


def test_status_reply_travels_over_the_wire() -> None:
    harness = Harness()
    harness.say(b"admin", messages.StatusRequest())
    (reply,) = harness.messages_to(b"admin", messages.StatusReply)
    received = messages.decode_from_coordinator(messages.encode(reply))
    assert isinstance(received, messages.StatusReply)
    assert msgspec.msgpack.decode(received.status)["phase"] == "waiting for workers"


def test_shard_whose_owner_is_being_fenced_is_shown_waiting() -> None:
    harness, (w0, _) = cluster()
    harness.auto_fence = False
    w0.disconnect()
    harness.pass_ms(200)
    assert harness.core.shards[shard(0)].phase is ShardPhase.WAITING
    assert harness.core.status()["slots"][0]["fencing"]


# --- transactions that Kafka has torn -----------------------------------------------------------------


def torn(worker: FakeWorker, partition: int, *, stopped: bool = True) -> messages.TornTransaction:
    assert worker.session is not None
    return messages.TornTransaction(
        worker.session, shard(partition), stopped, Failure(FailureKind.STATE, "Kafka has torn it", "Choose.")
    )


def test_stopped_shard_is_in_the_status_with_its_reason_and_counted_once() -> None:
    harness, (w0, _w1) = cluster()
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned)  # its report may repeat an earlier one
    for _ in range(2):
        harness.say(w0.peer, torn(w0, 0))
    document = harness.core.status()
    assert (document["shards"][0]["phase"], document["shards"][0]["stopped_reason"]) == (
        "stopped",
        "Kafka has torn it; remedy: Choose.",
    )
    assert document["shards"][2]["stopped_reason"] == ""
    assert document["counters"]["torn_transactions"] == 1
    assert harness.core.phase is Phase.RUNNING


def test_shard_that_continues_after_a_torn_transaction_is_counted() -> None:
    harness, (w0, _w1) = cluster()
    harness.say(w0.peer, torn(w0, 0, stopped=False))
    assert harness.core.status()["counters"]["torn_transactions"] == 1
    assert harness.core.status()["shards"][0]["phase"] == "running"


def test_stopped_shard_of_a_dead_worker_is_restored_by_another_one() -> None:
    harness, (w0, w1) = cluster()
    harness.say(w0.peer, torn(w0, 0))
    w0.disconnect()
    w0.process_ends()
    harness.pass_ms(1000)
    assert shard(0) in w1.assigned
    assert harness.core.shards[shard(0)].phase is ShardPhase.RESTORING
    w1.running([shard(0)])
    assert harness.core.status()["shards"][0]["stopped_reason"] == ""


def test_stopped_shard_moves_without_a_warm_copy() -> None:
    harness, (w0, w1) = cluster()
    harness.say(w0.peer, torn(w0, 0))
    harness.transcript()
    harness.say(w0.peer, messages.Leaving(w0.session))
    assert "w0 <- Revoke in/0" in harness.transcript()
    w0.released(shard(0))
    assert shard(0) in w1.assigned


def test_report_about_a_stopped_shard_of_another_worker_does_not_count() -> None:
    harness, (w0, _w1) = cluster()
    harness.say(w0.peer, torn(w0, 1))
    assert harness.core.shards[shard(1)].phase is ShardPhase.RUNNING
    assert harness.core.status()["counters"]["torn_transactions"] == 0


def test_job_until_caught_up_fails_once_only_stopped_shards_are_behind() -> None:
    harness, (w0, w1) = cluster(until_caught_up=True)
    harness.say(w0.peer, torn(w0, 0))
    harness.feed(events.EndOffsetsRead("in", {0: 10, 1: 10, 2: 10, 3: 10}))
    w0.committed(1, False, status(shard(2), 10, 10))
    assert harness.core.phase is Phase.RUNNING
    w1.committed(1, False, status(shard(1), 10, 10), status(shard(3), 10, 10))
    assert harness.core.phase is Phase.DRAINING
    assert "in/0: Kafka has torn it" in str(harness.core.failure)
    w0.drained()
    w1.drained()
    assert harness.stopped is not None
    assert harness.stopped.exit_code == ExitCode.JOB_FAILED


# --- records that take long ------------------------------------------------------------------------------


def busy(worker: FakeWorker, running_ms: int, offset: int = 5) -> None:
    record = messages.RunningRecord("in", 0, offset, running_ms)
    stats = messages.WorkerStats(record=record)
    worker.harness.say(worker.peer, messages.Heartbeat(worker.session, stats, worker.orders_heard))


def test_worker_that_is_busy_with_one_record_is_not_evicted_and_others_continue() -> None:
    settings = Settings(checkpoint_timeout_ms=1000, session_timeout_ms=3000)
    harness, (first, second) = cluster(2, settings=settings)
    first.dirty()
    second.dirty()
    second.prepared(1)
    for running_ms in range(500, 10_000, 500):
        harness.pass_ms(500)
        busy(first, running_ms)
        second.heartbeat()
    assert not harness.transcript().count("w0 <- Evicted")
    assert harness.core.sessions[first.session].slot == first.slot
    second.committed(1, dirty=True)
    assert harness.core.rounds.completed_epoch >= 1, "epochs of the others continue without it"
    longest = harness.core.status()["longest_record"]
    assert (longest["topic"], longest["partition"], longest["offset"]) == ("in", 0, 5)
    assert longest["running_ms"] >= 9_000


def test_worker_that_is_no_longer_busy_and_prepares_nothing_is_evicted() -> None:
    harness, (first, _second) = cluster(2, settings=Settings(checkpoint_timeout_ms=1000))
    first.dirty()
    harness.pass_ms(900)
    busy(first, 500)
    for _ in range(4):
        harness.pass_ms(400)
        first.heartbeat()
    assert "w0 <- Evicted" in " ".join(harness.transcript())


def test_shard_whose_handler_hung_is_assigned_with_the_record_and_count_until_it_is_committed() -> None:
    harness, (first, second) = cluster(2)
    held = first.assigned[0]
    overdue = messages.RecordOverdue(first.session, held, 5, "it hung", "slow")
    harness.say(first.peer, overdue)
    harness.say(first.peer, overdue)
    harness.say(second.peer, messages.RecordOverdue(second.session, held, 9, "not its own shard"))
    known = harness.core._cluster.overdue
    assert known == {held: (messages.OverdueRecord(held, 5, 2, "it hung", "slow"),)}
    harness.say(first.peer, messages.RecordOverdue(first.session, held, 6, "another"))
    assert [(one.offset, one.times) for one in known[held]] == [(5, 2), (6, 1)]
    first.committed(0, False, messages.ShardStatus(held, 7, 7, -1, False, 1))
    assert known == {}


# --- waiting for Kafka --------------------------------------------------------------------------------


def test_unavailable_parts_of_kafka_are_in_the_status_until_they_are_back() -> None:
    harness, _ = cluster()
    harness.feed(events.KafkaSeen(("waiting for Kafka: partition in/0 has no leader (3 s)",)))
    assert harness.core.status()["kafka_troubles"] == [
        "waiting for Kafka: partition in/0 has no leader (3 s)"
    ]
    harness.feed(events.KafkaSeen(()))
    assert harness.core.status()["kafka_troubles"] == []


def test_core_reports_how_long_an_epoch_or_a_take_over_has_taken() -> None:
    harness, (w0, w1) = cluster()
    assert harness.core.waits_ms(harness.now_ms) == 0
    w0.dirty()
    epoch = w0.barrier
    harness.pass_ms(700)
    assert harness.core.waits_ms(harness.now_ms) == 700
    w0.prepared(epoch)
    w0.committed(epoch)
    assert harness.core.waits_ms(harness.now_ms) == 0
    w0.disconnect()
    w0.process_ends()
    harness.pass_ms(300)
    assert harness.core.waits_ms(harness.now_ms) >= 300
    w1.running()
    assert harness.core.waits_ms(harness.now_ms) == 0
