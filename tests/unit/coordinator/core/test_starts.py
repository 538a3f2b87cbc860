"""Which start of the job this is: at each, the copies of global tables are read before anything else. The
harness checks that shards are assigned with the number in the journal.
"""

from __future__ import annotations

import pytest

from fcluster.coordinator.core.starts import START_KEY
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import (
    FakeWorker,
    Harness,
    join_all,
    one_stage_with_a_global_table,
    shard,
)


def harness_with_a_global_table(workers: int = 2) -> tuple[Harness, list[FakeWorker]]:
    harness = Harness(one_stage_with_a_global_table(), workers=workers)
    return harness, join_all(harness)


def told(harness: Harness, worker: FakeWorker) -> list[int]:
    """The starts of which the worker was told with its shards."""
    return [assign.job_start for assign in harness.messages_to(worker.peer, messages.Assign)]


def test_all_workers_are_told_the_same_start() -> None:
    harness, workers = harness_with_a_global_table()
    assert harness.journal[START_KEY] == {"number": 1}
    assert [told(harness, worker) for worker in workers] == [[1], [1]]


def test_job_without_global_tables_needs_none() -> None:
    harness = Harness(workers=1)
    worker = FakeWorker(harness, "w0")
    worker.hello()
    assert told(harness, worker) == [0]
    assert START_KEY not in harness.journal


def test_worker_that_is_started_again_is_no_start() -> None:
    harness, (_w0, w1) = harness_with_a_global_table()
    w1.process_ends()
    again = FakeWorker(harness, "again", slot=1)
    again.hello()
    assert again.assigned == [shard(1), shard(3)]
    assert told(harness, again) == [1]


def test_not_even_if_it_is_the_only_one() -> None:
    harness, (w0,) = harness_with_a_global_table(workers=1)
    w0.process_ends()
    again = FakeWorker(harness, "again", slot=0)
    again.hello()
    assert told(harness, again) == [1]


def test_failover_is_no_start() -> None:
    harness, (w0, w1) = harness_with_a_global_table()
    harness.lead()
    w0.hello(session=w0.session, owned=w0.assigned)
    again = FakeWorker(harness, "again", slot=1)
    again.hello()
    assert again.assigned == w1.assigned
    assert told(harness, again) == [1]
    assert harness.journal[START_KEY] == {"number": 1}


def test_job_that_has_ended_is_started() -> None:
    harness, (w0,) = harness_with_a_global_table(workers=1)
    w0.goodbye()
    harness.lead()
    again = FakeWorker(harness, "again", slot=0)
    again.hello()
    assert told(harness, again) == [2]
    assert harness.journal[START_KEY] == {"number": 2}


def test_job_is_started_after_an_outage_when_no_session_can_return_any_more() -> None:
    harness, _workers = harness_with_a_global_table()
    harness.lead()
    new0 = FakeWorker(harness, "new0", slot=0)
    new0.hello()
    assert new0.session
    assert new0.assigned == [], "the other one might return"
    new1 = FakeWorker(harness, "new1", slot=1)
    new1.hello()
    assert [told(harness, worker) for worker in (new0, new1)] == [[2], [2]]
    assert new0.assigned == [shard(0), shard(2)]


def test_shards_wait_no_longer_than_a_session_is_awaited() -> None:
    harness, _workers = harness_with_a_global_table()
    harness.lead()
    new = FakeWorker(harness, "new", slot=0)
    new.hello()
    for _ in range(4):
        new.heartbeat()
        harness.pass_ms(harness.settings.session_timeout_ms / 3)
    assert new.assigned == [shard(number) for number in range(4)]
    assert set(told(harness, new)) == {2}


def test_shards_that_have_waited_are_assigned_when_another_worker_returns_with_shards() -> None:
    harness, (_w0, w1) = harness_with_a_global_table()
    harness.lead()
    new = FakeWorker(harness, "new", slot=0)
    new.hello()
    assert new.assigned == []
    w1.hello(session=w1.session, owned=w1.assigned)
    assert new.assigned == [shard(0), shard(2)]
    assert told(harness, new) == [1]


@pytest.mark.parametrize("returns_with_shards", [False, True])
def test_worker_that_returns_without_shards_does_not_say_that_the_job_goes_on(
    returns_with_shards: bool,
) -> None:
    """A leader has died before a worker was told of its shards: perhaps before there was a start."""
    harness, (w0, w1) = harness_with_a_global_table()
    harness.lead()
    w0.hello(session=w0.session)
    assert told(harness, w0) == [1], "not again, as long as the other one might return"
    if returns_with_shards:
        w1.hello(session=w1.session, owned=w1.assigned)
    else:
        FakeWorker(harness, "new", slot=1).hello()
    assert told(harness, w0) == [1, 1 if returns_with_shards else 2]


def test_start_is_journalled_before_shards_are_assigned() -> None:
    harness = Harness(one_stage_with_a_global_table(), workers=1, auto_journal=False)
    worker = FakeWorker(harness, "w0")
    worker.hello()
    while harness.unwritten:
        assert told(harness, worker) == []
        harness.write_journal()
    assert told(harness, worker) == [1]
    assert harness.journal[START_KEY] == {"number": 1}


def test_worker_that_comes_before_the_start_is_known_gets_its_share() -> None:
    """The others return without shards: a leader has died before they were told of them."""
    harness, (w0, w1) = harness_with_a_global_table()
    harness.lead()
    w0.hello(session=w0.session)
    FakeWorker(harness, "new", slot=2).hello()
    w1.hello(session=w1.session)
    for worker in (w0, w1):
        worker.running()
    moving = [shard for shard in harness.core.shards.values() if shard.target == 2]
    assert len(moving) == 1, "4 shards for 3 workers"
