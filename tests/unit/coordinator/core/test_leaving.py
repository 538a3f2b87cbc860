"""Workers that leave, as transcripts: their shards move to warm copies, and nothing keeps them from
leaving."""

from __future__ import annotations

import pytest

from fcluster.coordinator.core.worker_names import NAMED_MAX, find_worker
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, shard
from tests.unit.coordinator.core.test_copies import cluster, said

ADMIN = b"admin"


def leaving(harness: Harness, worker: FakeWorker) -> None:
    harness.say(worker.peer, messages.Leaving(worker.session))


def drain(harness: Harness, name: str) -> messages.FromCoordinator:
    harness.say(ADMIN, messages.DrainRequest(name))
    return harness.messages_to(ADMIN, messages.Message)[-1]


def move_away(worker: FakeWorker, others: list[FakeWorker]) -> None:
    """All shards of a worker get warm copies elsewhere, are revoked, released, and run there."""
    going = worker.assigned
    for other in others:
        other.warm(*other.standbys)
    assert worker.assigned == []
    worker.released(*going)
    for other in others:
        other.running()


def test_leaving_worker_continues_until_its_shards_are_warm_elsewhere() -> None:
    harness, (w0, w1) = cluster()
    going = w0.assigned
    leaving(harness, w0)
    assert said(harness) == ["w1 <- Standby in/0 in/2"]
    assert w0.assigned == going
    move_away(w0, [w1])
    assert len(w1.assigned) == 4
    w0.goodbye()
    assert "fence slot 0" not in said(harness)
    assert harness.core.counters.leaves == 1
    assert harness.core.counters.cold_moves == 0


def test_leaving_worker_gets_neither_shards_nor_copies() -> None:
    harness, (w0, w1, w2) = cluster(workers=3, replicas=1)
    leaving(harness, w2)
    assert w2.standbys == []
    lost = w0.assigned
    w0.disconnect()
    harness.pass_ms(200)
    assert set(lost) <= set(w1.assigned)
    assert w2.standbys == []


def test_leaving_workers_are_dismissed_when_no_worker_can_take_the_shards() -> None:
    harness, (w0, w1) = cluster()
    leaving(harness, w0)
    said(harness)
    leaving(harness, w1)
    assert said(harness) == ["w0 <- Dismiss", "w1 <- Dismiss"]
    leaving(harness, w1)
    assert said(harness) == []


def test_death_of_the_last_other_worker_dismisses() -> None:
    harness, (w0, w1) = cluster()
    leaving(harness, w0)
    w1.disconnect()
    harness.pass_ms(200)
    assert "w0 <- Dismiss" in said(harness)


def test_leaving_survives_a_lost_connection() -> None:
    _, (w0, w1) = cluster()
    w0.disconnect()
    w0.hello(session=w0.session, owned=w0.assigned, leaving=True)
    assert sorted(w1.standbys) == [shard(0), shard(2)]


def test_leaving_survives_a_new_leader() -> None:
    harness, (w0, w1) = cluster()
    leaving(harness, w0)
    owned = w0.assigned, w1.assigned
    harness.lead()
    w0.hello(session=w0.session, owned=owned[0], leaving=True)
    w1.hello(session=w1.session, owned=owned[1])
    assert sorted(w1.standbys) == [shard(0), shard(2)]


def test_worker_that_comes_back_after_leaving_gets_shards_again() -> None:
    harness, (w0, w1) = cluster()
    leaving(harness, w0)
    move_away(w0, [w1])
    w0.goodbye()
    w0.disconnect()
    successor = FakeWorker(harness, "w0b", slot=0)
    successor.hello()
    assert len(successor.standbys) == 2


def test_shard_that_was_journalled_for_a_worker_that_leaves_meanwhile_goes_elsewhere() -> None:
    harness, (w0, w1, w2) = cluster(workers=3)
    harness.auto_journal = False
    lost = w0.assigned
    w0.disconnect()
    harness.pass_ms(200)
    while not any(key.startswith("assignment/") for write in harness.unwritten for key in write.entries):
        harness.write_journal()
    leaving(harness, w1)
    harness.auto_journal = True
    harness.write_journal()
    assert set(lost) <= set(w2.assigned)
    assert not set(lost) & set(w1.assigned)


def test_joining_worker_can_take_the_shards_of_leaving_ones() -> None:
    harness, (w0, w1) = cluster()
    harness.auto_journal = False
    w2 = FakeWorker(harness, "w2")
    w2.hello()
    leaving(harness, w0)
    leaving(harness, w1)
    assert not any("Dismiss" in line for line in said(harness))


@pytest.mark.parametrize("name", ["0", "w0", "host-1:1"])
def test_drained_worker_is_found_by_slot_id_or_address_and_told(name: str) -> None:
    harness, members = cluster(workers=1)
    reply = drain(harness, name)
    assert reply == messages.DrainReply(1, 0, "w0", "host-1", 1, others=0)
    assert said(harness) == ["w0 <- Leave", "w0 <- Dismiss", "admin <- DrainReply"]
    assert members[0].assigned != []


def test_drain_of_an_unknown_worker_lists_the_workers() -> None:
    harness, _ = cluster()
    reply = drain(harness, "7")
    assert isinstance(reply, messages.Refused)
    assert reply.reason == "there is no worker '7'. Running, by slot: 0 (host-1:1), 1 (host-1:1)"
    assert not reply.retry


def test_drain_of_an_ambiguous_name_is_refused() -> None:
    harness, _ = cluster()
    reply = drain(harness, "host-1:1")
    assert isinstance(reply, messages.Refused)
    assert reply.reason.startswith("there are several workers 'host-1:1'")


def test_list_of_workers_in_a_refusal_is_bounded() -> None:
    harness, _ = cluster(workers=NAMED_MAX + 5)
    answer = find_worker("nobody", harness.core.sessions.values())
    assert isinstance(answer, str)
    assert answer.endswith("and 5 more")
    assert find_worker("0", []) == "there is no worker '0': no worker is running"


def test_drain_while_the_job_stops_is_refused() -> None:
    harness, _ = cluster()
    harness.say(ADMIN, messages.StopRequest())
    assert isinstance(drain(harness, "0"), messages.Refused)


def test_drained_worker_is_told_again_if_the_order_may_be_lost() -> None:
    harness, (w0, _w1) = cluster()
    w0.disconnect()
    drain(harness, "w0")
    assert "w0 <- Leave" not in said(harness)
    w0.hello(session=w0.session, owned=w0.assigned)
    assert "w0 <- Leave" in said(harness)


def test_drained_worker_that_joins_again_is_still_drained() -> None:
    harness, (w0, w1) = cluster()
    drain(harness, "w0")
    harness.pass_ms(1000)
    w0.hello()  # it never received the order, because its session was reset at that moment
    assert "w0 <- Leave" in said(harness)
    assert w0.assigned == []
    assert len(w1.assigned) == 4


def test_status_shows_which_workers_are_leaving() -> None:
    harness, (w0, _w1) = cluster()
    drain(harness, "0")
    workers = {worker["slot"]: worker for worker in harness.core.status()["workers"]}
    assert (workers[0]["phase"], workers[0]["leaving_said"]) == ("leaving", False)
    assert workers[1]["phase"] == "running"
    leaving(harness, w0)
    assert harness.core.status()["workers"][0]["leaving_said"]
