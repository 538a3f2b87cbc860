"""What status says about stages that wait for global tables, given what workers report."""

from __future__ import annotations

from typing import Any

from fcluster import Job
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.wire import messages
from fcluster.wire.messages import ShardStatus, WorkerStats
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, status

COPY = "j-rates-in-calls-repartition"


def began() -> tuple[Harness, list[FakeWorker]]:
    job = Job("j")
    rates = job.global_table(job.topic("rates"))
    job.stream(job.topic("calls")).join(rates, on="in").to(job.topic("out"))
    partitions = {"rates": 2, "calls": 4, COPY: 4}
    harness = Harness(job.build(Settings()), partitions=partitions, workers=2)
    workers = [FakeWorker(harness, f"w{number}", slot=number) for number in range(2)]
    for worker in workers:
        worker.hello()
    return harness, workers


def beat(worker: FakeWorker, waiting: list[ShardId], *statuses: ShardStatus) -> None:
    worker.harness.pass_ms(100)  # what comes at the same time isn't looked at
    stats = WorkerStats(shards=list(statuses), table_waits=waiting)
    worker.harness.say(worker.peer, messages.Heartbeat(worker.session, stats, worker.orders_heard))


def waits(harness: Harness) -> list[dict[str, Any]]:
    return harness.core.status()["table_waits"]


def test_stage_that_waits_says_for_which_table_and_how_far_it_is() -> None:
    harness, workers = began()
    owner = {shard: worker for worker in workers for shard in worker.assigned}
    first, second = (ShardId("rates", number) for number in range(2))
    waiting = [ShardId("calls", number) for number in range(3)]
    for worker in workers:
        own = [shard for shard in waiting if owner[shard] is worker]
        copies = [status(shard, 1, 1, 3, number=1) for shard in own]
        beat(worker, own, *copies)
    beat(owner[first], [shard for shard in waiting if owner[shard] is owner[first]], status(first, 5, 5, 9))
    (entry,) = waits(harness)
    (table,) = entry.pop("tables")
    assert entry == {"stage": "calls", "shards": 4, "shards_waiting": 3}
    assert table == {
        "table": "rates",
        "topic": "rates",
        "shards": 2,
        "shards_running": 1,
        "records_left": -1,
        "copies_left": 6,
    }
    beat(owner[second], waiting, status(second, 0, 0, 7))
    (entry,) = waits(harness)
    assert entry["shards_waiting"] == 3, "those of other workers don't count twice"
    assert (entry["tables"][0]["shards_running"], entry["tables"][0]["records_left"]) == (2, 4 + 7)


def test_nobody_waits_once_workers_say_so() -> None:
    harness, (w0, w1) = began()
    assert waits(harness) == []
    beat(w0, w0.assigned)
    assert waits(harness)
    beat(w0, [])
    beat(w1, [ShardId("nobody", 7)])
    assert waits(harness) == []


def test_shards_of_a_session_that_is_over_do_not_wait() -> None:
    harness, (w0, w1) = began()
    beat(w0, [shard for shard in w0.assigned if shard.stage == "calls"])
    assert waits(harness)
    w0.process_ends()
    again = FakeWorker(harness, "again", slot=0)
    again.hello()
    assert again.assigned
    beat(w1, [])
    assert waits(harness) == []
