"""The limit on dead letters of the job: the coordinator adds up what shards have committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from fcluster.common.failures import FailureKind
from fcluster.common.letter_counts import encode_counts
from fcluster.common.settings import Settings
from fcluster.coordinator.core.model import Phase
from fcluster.graph.operators import Process
from fcluster.graph.topology import Topology
from fcluster.wire.messages import Committed, ShardStatus
from tests.unit.coordinator.coordinator_harness import (
    FakeWorker,
    Harness,
    handler,
    join_all,
    one_stage,
    shard,
    topic,
)

DEAD = topic("dead")


def failing(topology: Topology) -> Topology:
    (stage,) = topology.stages
    chain = replace(stage.chains[0], operators=(Process("a", handler, DEAD),))
    return Topology("job", (replace(stage, chains=(chain,)),))


def began(most: int = 5, workers: int = 2) -> tuple[Harness, list[FakeWorker]]:
    settings = Settings(dead_letters_max=most)
    harness = Harness(failing(one_stage()), workers=workers, settings=settings)
    return harness, join_all(harness)


def counted(partition: int, count: int, start: int = 1) -> ShardStatus:
    letters = encode_counts(start, ("dead",), {"dead": count})
    return ShardStatus(shard(partition), 9, 9, -1, False, 1, letters=letters)


def commit(worker: FakeWorker, *counts: ShardStatus, last: str = "") -> None:
    worker.harness.say(worker.peer, Committed(worker.session, 1, 1.0, False, list(counts), last))


def total(harness: Harness) -> Mapping[str, int]:
    return +harness.core.letters.totals


def test_job_stops_when_all_shards_together_have_more_than_the_limit() -> None:
    harness, (w0, w1) = began()
    commit(w0, counted(0, 2), counted(2, 1))
    commit(w1, counted(1, 2))
    assert total(harness) == {"dead": 5}
    assert harness.core.phase is Phase.RUNNING
    commit(w1, counted(3, 1), last="record in/3 at offset 8 failed: ValueError: no")
    assert harness.core.phase is Phase.DRAINING
    failure = harness.core.failure
    assert failure is not None
    assert failure.kind is FailureKind.RECORD
    assert failure.message == (
        "6 dead letters were written to 'dead' since the job has started, more than the 5 that "
        "dead.letters.max allows; the last error: record in/3 at offset 8 failed: ValueError: no"
    )
    assert "raise dead.letters.max" in failure.remedy


def test_reports_may_be_repeated_and_heartbeats_say_the_same() -> None:
    harness, (w0, _w1) = began()
    for _ in range(3):
        commit(w0, counted(0, 3))
        w0.heartbeat(counted(0, 3))
    assert total(harness) == {"dead": 3}


def test_report_of_a_session_that_does_not_own_the_shard_counts_for_nothing() -> None:
    harness, (w0, _w1) = began()
    commit(w0, counted(1, 6))
    assert total(harness) == {}


def test_next_owner_says_what_is_committed() -> None:
    """The last commit of the owner before isn't known. It may have happened."""
    harness, (_w0, w1) = began()
    commit(w1, counted(1, 2))
    w1.process_ends()
    again = FakeWorker(harness, "again", slot=1)
    again.hello()
    harness.say(again.peer, Committed(again.session, 1, 1.0, False, [counted(1, 4)]))
    assert total(harness) == {"dead": 4}


def test_new_leader_hears_it_again() -> None:
    harness, (w0, w1) = began()
    commit(w0, counted(0, 4))
    harness.lead()
    assert total(harness) == {}
    for worker, count in ((w0, counted(0, 4)), (w1, counted(1, 2))):
        worker.hello(session=worker.session, owned=worker.assigned)
        worker.heartbeat(count)
    assert harness.core.phase is Phase.DRAINING


def test_dead_letters_of_a_former_start_do_not_count() -> None:
    harness, (w0,) = began(workers=1)
    w0.goodbye()
    harness.lead()
    again = FakeWorker(harness, "again", slot=0)
    again.hello()
    again.heartbeat(counted(0, 9, start=1))
    assert total(harness) == {}
    again.heartbeat(counted(0, 2, start=2))
    assert total(harness) == {"dead": 2}


def test_without_a_limit_nothing_is_counted_and_no_start_is_needed() -> None:
    harness, (w0, _w1) = began(most=0)
    assert "start" not in harness.journal
    commit(w0, counted(0, 9))
    assert total(harness) == {}


@pytest.mark.parametrize("text", ["x", "1.2", "...", "1.zz.5", "99999999999.0000.1", "1" * 1000])
def test_report_that_means_nothing_counts_for_nothing(text: str) -> None:
    harness, (w0, _w1) = began()
    commit(w0, ShardStatus(shard(0), 9, 9, -1, False, 1, letters=text))
    assert total(harness) == {}


def test_counts_come_with_the_first_input_only() -> None:
    harness, (w0, _w1) = began()
    letters = encode_counts(1, ("dead",), {"dead": 9})
    commit(w0, ShardStatus(shard(0), 9, 9, -1, False, 1, 1, letters=letters))
    assert total(harness) == {}
