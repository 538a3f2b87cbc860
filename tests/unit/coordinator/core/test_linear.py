"""The work for an epoch, a heartbeat or a new worker doesn't grow with the number of shards."""

from __future__ import annotations

from typing import Any, NoReturn

from fcluster.common.ids import ShardId
from fcluster.coordinator.core import events
from fcluster.coordinator.core.model import Shard
from fcluster.wire import messages
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, status, take_in


class NeverWalked(dict[ShardId, Shard]):
    """Shards that can be looked up, and not be walked through."""

    def _refuse(self) -> NoReturn:
        raise AssertionError("all shards are walked through")

    def __iter__(self) -> NoReturn:
        self._refuse()

    def keys(self) -> NoReturn:
        self._refuse()

    def values(self) -> NoReturn:
        self._refuse()

    def items(self) -> NoReturn:
        self._refuse()


def test_epochs_and_heartbeats_look_only_at_the_shards_that_they_name() -> None:
    harness = Harness(partitions={"in": 12}, workers=3)
    workers = [FakeWorker(harness, f"w{number}") for number in range(3)]
    for worker in workers:
        worker.hello()
    for worker in workers:
        worker.running()
    harness.pass_ms(1_000)
    core = harness.core
    core._cluster.shards = NeverWalked(core._cluster.shards)
    core.shards = core._cluster.shards
    completed = core.rounds.completed_epoch
    sent: list[tuple[bytes, Any]] = []

    def feed(event: events.Event) -> None:
        harness.now_ms += 1
        effects = core.handle(event, harness.now_ms)
        core.next_deadline_ms()
        sent.extend((one.peer, one.message) for one in effects if isinstance(one, events.SendMessage))

    def said_to(worker: FakeWorker, kind: type[Any]) -> Any:
        """The last message of this kind."""
        return [one for peer, one in sent if peer == worker.peer and isinstance(one, kind)][-1]

    for worker in workers:
        stats = messages.WorkerStats(shards=[status(shard) for shard in worker.assigned])
        heartbeat = messages.Heartbeat(worker.session, stats, worker.orders_heard)
        feed(events.MessageReceived(worker.peer, heartbeat))
        feed(events.MessageReceived(worker.peer, messages.Dirty(worker.session, False)))
    harness.now_ms += 1_000
    feed(events.Tick())
    for worker in workers:
        epoch = said_to(worker, messages.Barrier).epoch
        prepared = messages.Prepared(worker.session, epoch, 10, 1.0, False)
        feed(events.MessageReceived(worker.peer, prepared))
    harness.now_ms += 1_000
    feed(events.Tick())
    for worker in workers:
        epoch = said_to(worker, messages.Complete).epoch
        committed = messages.Committed(worker.session, epoch, 1.0, False, [status(worker.assigned[0])])
        feed(events.MessageReceived(worker.peer, committed))
    assert core.rounds.completed_epoch > completed


def write_all(harness: Harness) -> None:
    """All that is queued is written at once, and reported once."""
    last = harness.unwritten[-1].sequence
    for write in harness.unwritten:
        take_in(harness.journal, write)
        take_in(harness.checker.journal, write)
    harness.unwritten.clear()
    harness.feed(events.JournalWritten(last))


def test_shards_are_balanced_once_for_all_workers_whose_sessions_one_write_holds() -> None:
    harness = Harness(partitions={"in": 12}, workers=1, auto_journal=False)
    first = FakeWorker(harness, "first")
    first.hello()
    while harness.unwritten:
        write_all(harness)
    first.running()
    workers = [FakeWorker(harness, f"w{number}") for number in range(5)]
    for worker in workers:
        worker.hello()
    balanced: list[int] = []
    ownership = harness.core._ownership
    balance = ownership.balance
    ownership.balance = lambda: (balanced.append(1), balance())[1]  # type: ignore[method-assign]
    while not harness.messages_to(workers[0].peer, messages.Welcome):
        balanced.clear()
        write_all(harness)
    assert all(harness.messages_to(worker.peer, messages.Welcome) for worker in workers)
    assert len(balanced) == 1
