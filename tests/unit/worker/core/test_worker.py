"""The worker's protocol as scenarios: which effects follow from which events."""

from __future__ import annotations

import pytest

from fcluster.common.exit_codes import ExitCode
from fcluster.common.failures import Failure, FailureKind
from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition, InputOffset
from fcluster.engine.failure import Condemnation
from fcluster.wire import messages
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core
from fcluster.worker.core.departure import LEAVING_REPEATED_MS

FULL = Failure(FailureKind.HOST, "the disk is full")
TORN = Failure(FailureKind.STATE, "Kafka has torn it", "choose")
A, B = ShardId("flights", 0), ShardId("flights", 1)


def position(offset: int, epoch: int = 0) -> CommittedPosition:
    return CommittedPosition(offset, epoch, epoch, "f")


class Scenario:
    """Drives a core and records its effects."""

    def __init__(self) -> None:
        identity = model.Identity("w1", "h", 1, -1, "f", "store", "0")
        bounds = model.Bounds(epoch_records_max=1000, coordinator_loss_ms=30_000, offset_refresh_ms=60_000)
        self.now_ms = 0
        self.core = core.WorkerCore(identity, bounds, 0)
        self.effects: list[events.Effect] = []
        self.orders = 0

    def after(self, event: events.Event) -> list[events.Effect]:
        self.effects = self.core.handle(event, self.now_ms)
        self.core.invariants()
        return self.effects

    def receive(self, message: messages.FromCoordinator) -> list[events.Effect]:
        return self.after(events.MessageReceived(message))

    def sent(self) -> list[messages.FromWorker]:
        return [effect.message for effect in self.effects if isinstance(effect, events.Send)]

    def did(self, kind: type[events.Effect]) -> list[events.Effect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    # shorthands for what is usual

    def order(self) -> int:
        """The number of the coordinator's next order."""
        self.orders += 1
        return self.orders

    def joined(self, session: int = 7, term: int = 1) -> Scenario:
        self.after(events.Connected())
        self.receive(messages.Welcome(term=term, session=session, slot=0, epoch=0, adopted=False))
        self.after(events.ProducersOpened(session))
        return self

    def running(self, *shards: ShardId) -> Scenario:
        session = self.core.state.session
        self.receive(messages.Assign(self.core.state.term, session, list(shards), self.order()))
        for shard in shards:
            self.after(events.ShardRestored(session, shard, position(0)))
        return self

    def processed(self, *shards: ShardId, records: int = 10) -> Scenario:
        self.after(events.RecordsProcessed(frozenset(shards), records, False))
        return self

    def barrier(self, epoch: int) -> Scenario:
        self.receive(messages.Barrier(self.core.state.term, self.core.state.session, epoch))
        return self

    def prepared(self, epoch: int) -> Scenario:
        self.barrier(epoch)
        self.after(events.EpochFlushed(self.core.state.session, epoch, 10, 5.0))
        return self

    def complete(self, epoch: int) -> Scenario:
        self.receive(messages.Complete(self.core.state.term, self.core.state.session, epoch))
        return self

    def committed(self, epoch: int, *shards: ShardId) -> Scenario:
        positions = {shard: position(10 * epoch, epoch) for shard in shards}
        self.after(events.EpochCommitted(self.core.state.session, epoch, 2.0, positions))
        return self


def assigned(number: int, shard: ShardId, session: int = 7) -> messages.Assign:
    """The order with this number."""
    return messages.Assign(1, session, [shard], number)


def test_orders_count_as_heard_only_up_to_the_first_that_is_missing() -> None:
    scenario = Scenario().joined()
    scenario.receive(assigned(1, A))
    assert scenario.core.orders_heard == 1
    scenario.receive(assigned(3, B))
    assert scenario.did(events.RestoreShards), "it is carried out all the same"
    assert scenario.core.orders_heard == 1
    scenario.receive(assigned(4, B))
    assert scenario.core.orders_heard == 1


def test_first_order_of_a_session_may_be_missing_too() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Evicted(1, 7))
    scenario.joined(session=8)
    scenario.receive(assigned(2, A, session=8))
    assert scenario.core.orders_heard == 0


def test_orders_that_were_lost_with_a_connection_are_not_missing() -> None:
    scenario = Scenario().joined()
    scenario.receive(assigned(1, A))
    scenario.receive(assigned(3, B))
    scenario.after(events.Connected())
    scenario.receive(assigned(6, A))
    assert scenario.core.orders_heard == 6
    scenario.receive(assigned(8, B))
    assert scenario.core.orders_heard == 6


def test_new_connection_asks_for_a_new_session() -> None:
    scenario = Scenario()
    scenario.after(events.Connected())
    (hello,) = scenario.sent()
    assert isinstance(hello, messages.Hello)
    assert (hello.session, hello.owned, hello.in_flight_epoch) == (0, [], 0)


def test_welcome_initialises_producers_once_however_often_it_comes() -> None:
    scenario = Scenario()
    scenario.after(events.Connected())
    welcome = messages.Welcome(term=1, session=7, slot=2, epoch=40, adopted=False)
    scenario.receive(welcome)
    assert scenario.did(events.OpenProducers) == [events.OpenProducers(7, 2)]
    scenario.receive(welcome)
    assert scenario.effects == []
    assert scenario.core.state.epoch_seen == 40


def test_restore_knows_what_is_committed_at_least() -> None:
    scenario = Scenario().joined()
    committed = [messages.CommittedOffset(A, 7), messages.CommittedOffset(A, 3, 1)]
    other = messages.CommittedOffset(B, 5)
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), [], [], [*committed, other]))
    assert scenario.did(events.RestoreShards) == [events.RestoreShards(7, (A,), tuple(committed))]


def test_restored_shard_waits_for_the_producers() -> None:
    scenario = Scenario()
    scenario.after(events.Connected())
    scenario.receive(messages.Welcome(term=1, session=7, slot=0, epoch=0, adopted=False))
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    assert scenario.did(events.RestoreShards) == [events.RestoreShards(7, (A,))]
    scenario.after(events.ShardRestored(7, A, position(5, 3)))
    assert scenario.effects == []
    scenario.after(events.ProducersOpened(7))
    assert scenario.did(events.StartReading) == [events.StartReading(A, position(5, 3), None)]
    (running,) = scenario.sent()
    assert isinstance(running, messages.ShardsRunning)
    assert running.shards[0].committed == 5


def test_one_epoch_from_first_record_to_commit() -> None:
    scenario = Scenario().joined().running(A, B).processed(A)
    assert scenario.sent() == [messages.Dirty(7, False)]
    scenario.processed(A)
    assert scenario.sent() == []  # it is reported once
    scenario.barrier(1)
    assert scenario.effects == [events.PrepareEpoch(7, 1, frozenset({A}))]
    scenario.after(events.EpochFlushed(7, 1, 20, 5.0))
    assert scenario.sent() == [messages.Prepared(7, 1, 20, 5.0, False)]
    scenario.complete(1)
    assert scenario.effects == [events.CommitEpoch(7, 1)]
    scenario.committed(1, A)
    (committed,) = scenario.sent()
    assert isinstance(committed, messages.Committed)
    assert not committed.dirty
    assert scenario.core.state.in_flight is None


def test_records_after_the_barrier_belong_to_the_next_epoch() -> None:
    scenario = Scenario().joined().running(A, B).processed(A).barrier(1)
    scenario.processed(B)
    assert scenario.sent() == [messages.Dirty(7, False)]
    assert scenario.core.state.in_flight is not None
    assert scenario.core.state.in_flight.shards == {A}
    scenario.after(events.EpochFlushed(7, 1, 10, 5.0))
    scenario.complete(1).committed(1, A)
    (committed,) = scenario.sent()
    assert isinstance(committed, messages.Committed)
    assert committed.dirty


def test_barrier_with_nothing_open_commits_nothing() -> None:
    scenario = Scenario().joined().running(A).barrier(1)
    assert scenario.sent() == [messages.Prepared(7, 1, 0, 0.0, False)]
    scenario.complete(1)
    assert not scenario.did(events.CommitEpoch)
    (committed,) = scenario.sent()
    assert isinstance(committed, messages.Committed)


def test_complete_before_prepared_commits_nothing() -> None:
    scenario = Scenario().joined().running(A).processed(A).barrier(1).complete(1)
    assert scenario.effects == []


@pytest.mark.parametrize("stale", ["session", "term", "epoch"])
def test_stale_complete_commits_nothing(stale: str) -> None:
    scenario = Scenario().joined(term=2).running(A).processed(A).prepared(5)
    message = messages.Complete(
        term=1 if stale == "term" else 2,
        session=6 if stale == "session" else 7,
        epoch=4 if stale == "epoch" else 5,
    )
    scenario.receive(message)
    assert not scenario.did(events.CommitEpoch)


def test_lost_transaction_resets_into_a_new_session() -> None:
    scenario = Scenario().joined().running(A).processed(A).prepared(1).complete(1)
    scenario.after(events.TransactionFailed(7, "timed out"))
    assert scenario.did(events.DropLayers)
    assert scenario.did(events.DestroyProducers)
    (hello,) = scenario.sent()
    assert isinstance(hello, messages.Hello)
    assert (hello.session, hello.owned) == (0, [])
    # Events of the old session no longer count.
    scenario.committed(1, A)
    assert scenario.effects == []
    scenario.receive(messages.Complete(1, 7, 1))
    assert scenario.effects == []


def refused(session: int = 7) -> events.TransactionFailed:
    return events.TransactionFailed(session, "out of order sequence number", abortable=True)


def test_aborted_epoch_is_replayed_in_the_same_session() -> None:
    scenario = Scenario().joined().running(A, B).prepared(1).processed(A)
    scenario.after(refused())
    assert scenario.did(events.StopReading) == [events.StopReading((A, B))]
    assert scenario.did(events.AbortEpochs) == [events.AbortEpochs(7)]
    assert not scenario.did(events.DestroyProducers)
    assert scenario.sent() == []
    scenario.after(events.EpochsAborted(7))
    assert scenario.did(events.RewindShards) == [events.RewindShards((A, B))]
    assert scenario.did(events.StartReading) == [
        events.StartReading(A, position(0), None),
        events.StartReading(B, position(0), None),
    ]
    scenario.processed(A)
    assert scenario.sent() == [messages.Dirty(7, False)]
    scenario.prepared(2).complete(2)
    assert scenario.effects == [events.CommitEpoch(7, 2)]


def test_nobody_waits_for_an_aborted_epoch() -> None:
    """The coordinator waits for `Prepared`: this worker has nothing in the epoch any more."""
    scenario = Scenario().joined().running(A).processed(A).barrier(1)
    scenario.after(refused())
    assert scenario.sent() == [messages.Prepared(7, 1, 0, 0.0, False)]
    scenario.after(events.EpochFlushed(7, 1, 10, 5.0))  # it came too late
    assert scenario.effects == []
    scenario.complete(1)
    (committed,) = scenario.sent()
    assert isinstance(committed, messages.Committed)
    assert not scenario.did(events.CommitEpoch)


def test_barrier_during_an_abort_is_answered_at_once() -> None:
    """The coordinator may know of records that are being aborted."""
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(refused())
    scenario.barrier(1)
    assert scenario.sent() == [messages.Prepared(7, 1, 0, 0.0, False)]


def test_abort_begins_after_a_commit_that_is_under_way() -> None:
    scenario = Scenario().joined().running(A).processed(A).prepared(1).complete(1).processed(A)
    scenario.after(refused())
    scenario.committed(1, A)
    scenario.after(events.EpochsAborted(7))
    assert scenario.did(events.StartReading) == [events.StartReading(A, position(10, 1), None)]


def test_further_failures_during_an_abort_are_part_of_it_unless_they_end_the_session() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(refused())
    scenario.after(refused())
    assert scenario.effects == []
    scenario.after(events.TransactionFailed(7, "fenced"))
    assert scenario.did(events.DestroyProducers)
    scenario.after(events.EpochsAborted(7))
    assert scenario.effects == []


def test_shard_revoked_before_an_abort_is_released_without_its_aborted_records() -> None:
    scenario = Scenario().joined().running(A, B).processed(A)
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.sent() == []
    scenario.after(refused())
    assert [message for message in scenario.sent() if isinstance(message, messages.Released)] == [
        messages.Released(7, [A], 1)
    ]
    scenario.after(events.EpochsAborted(7))
    assert [effect.shard for effect in scenario.did(events.StartReading)] == [B]


def test_shard_restored_during_an_abort_waits_for_its_end() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(refused())
    scenario.running(B)
    assert not scenario.did(events.StartReading)
    scenario.after(events.EpochsAborted(7))
    assert [effect.shard for effect in scenario.did(events.StartReading)] == [A, B]


def test_failure_before_the_producers_are_ready_ends_the_session() -> None:
    scenario = Scenario()
    scenario.after(events.Connected())
    scenario.receive(messages.Welcome(term=1, session=7, slot=0, epoch=0, adopted=False))
    scenario.after(refused())
    assert scenario.did(events.DestroyProducers)


def test_evicted_worker_drops_everything_and_joins_again() -> None:
    scenario = Scenario().joined().running(A).processed(A).prepared(1)
    scenario.receive(messages.Evicted(1, 7))
    assert scenario.did(events.DestroyProducers)
    assert scenario.core.state.shards == {}
    scenario.receive(messages.Welcome(term=1, session=8, slot=0, epoch=1, adopted=False))
    assert scenario.did(events.OpenProducers) == [events.OpenProducers(8, 0)]


def test_reconnection_reports_the_sessions_progress() -> None:
    scenario = Scenario().joined().running(A, B).processed(A).prepared(3).processed(B)
    scenario.after(events.Connected())
    (hello,) = scenario.sent()
    assert isinstance(hello, messages.Hello)
    assert (hello.session, hello.prepared_epoch, hello.in_flight_epoch) == (7, 3, 3)
    assert hello.dirty
    assert set(hello.owned) == {A, B}


def test_new_leader_adopts_the_session_and_dirty_is_sent_again() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.receive(messages.Welcome(term=2, session=7, slot=0, epoch=9, adopted=True))
    assert scenario.sent() == [messages.Dirty(7, False)]
    scenario.receive(messages.Barrier(1, 7, 10))
    assert not scenario.did(events.PrepareEpoch)  # that barrier came from the old leader


def test_revoked_shard_is_released_after_its_commit() -> None:
    scenario = Scenario().joined().running(A, B).processed(A)
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.did(events.StopReading) == [events.StopReading((A,))]
    assert scenario.sent() == []
    scenario.prepared(1)
    assert not scenario.did(events.CloseShards)
    scenario.complete(1).committed(1, A)
    assert scenario.did(events.CloseShards) == [events.CloseShards((A,))]
    assert scenario.sent()[-1] == messages.Released(7, [A], 1)


def test_revoked_clean_shard_is_released_at_once() -> None:
    scenario = Scenario().joined().running(A, B).processed(A)
    scenario.receive(messages.Revoke(1, 7, [B], scenario.order()))
    assert scenario.sent() == [messages.Released(7, [B], 1)]


def test_shard_revoked_during_its_restore_is_released_when_that_has_ended() -> None:
    # Found by the simulation (a run without faults in which a second worker joined): the restore of a shard
    # that
    # was released met the new owner's deltas, took them for damage, and the job failed.
    scenario = Scenario().joined()
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.sent() == []
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.sent() == []
    scenario.after(events.ShardRestored(7, A, position(5, 3)))
    assert scenario.did(events.StartReading) == []
    assert scenario.did(events.CloseShards) == [events.CloseShards((A,))]
    assert scenario.sent() == [messages.Released(7, [A], 1)]


def test_revoke_of_a_shard_that_is_not_owned_is_answered() -> None:
    scenario = Scenario().joined().running(A)
    scenario.receive(messages.Revoke(1, 7, [B], scenario.order()))
    assert scenario.sent() == [messages.Released(7, [B], 1)]


def test_failed_handler_replays_and_stops_before_its_record() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.HandlerFailed(7, A, 42, Failure.of_record("boom")))
    assert scenario.did(events.DestroyProducers)
    scenario.receive(messages.Welcome(term=1, session=8, slot=0, epoch=0, adopted=False))
    scenario.after(events.ProducersOpened(8))
    scenario.receive(messages.Assign(1, 8, [A], scenario.order()))
    scenario.after(events.ShardRestored(8, A, position(0)))
    (start,) = scenario.did(events.StartReading)
    assert isinstance(start, events.StartReading)
    assert start.stop_record == model.StopRecord(42, Failure.of_record("boom"))
    scenario.processed(A)
    scenario.after(events.StopRecordReached(8, A, 42, Failure.of_record("boom")))
    assert scenario.did(events.StopReading) == [events.StopReading((A,))]
    assert scenario.sent() == []  # what was processed before is committed first
    scenario.prepared(1).complete(1).committed(1, A)
    assert scenario.sent()[-1] == messages.WorkerFailed(8, Failure.of_record("boom"))


def test_drain_commits_what_is_open_before_it_is_drained() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.receive(messages.Drain(1, 7))
    assert scenario.did(events.StopReading)
    assert scenario.sent() == []
    scenario.prepared(1).complete(1).committed(1, A)
    assert scenario.sent()[-1] == messages.Drained(7)
    scenario.receive(messages.Shutdown(1, 7, "stopped"))
    assert scenario.did(events.Exit) == [events.Exit(ExitCode.JOB_ENDED, "stopped")]


def test_terminated_worker_continues_until_its_shards_have_moved() -> None:
    scenario = Scenario().joined().running(A, B).processed(A)
    scenario.after(events.TerminationRequested())
    assert scenario.sent() == [messages.Leaving(7)]
    assert not scenario.did(events.StopReading)
    scenario.prepared(1).complete(1).committed(1, A)
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.sent() == [messages.Released(7, [A], 1)]
    scenario.processed(B)
    scenario.receive(messages.Revoke(1, 7, [B], scenario.order()))
    assert scenario.sent() == []
    scenario.prepared(2).complete(2).committed(2, B)
    assert scenario.sent()[1:] == [messages.Released(7, [B], 2), messages.Goodbye(7)]
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_terminated_worker_without_shards_leaves_at_once() -> None:
    scenario = Scenario().joined()
    scenario.after(events.TerminationRequested())
    assert scenario.sent() == [messages.Leaving(7), messages.Goodbye(7)]
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_terminated_worker_without_a_session_leaves_at_once() -> None:
    scenario = Scenario()
    scenario.after(events.TerminationRequested())
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_second_termination_commits_and_leaves_and_a_third_leaves_at_once() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.TerminationRequested())
    scenario.after(events.TerminationRequested())
    assert scenario.did(events.StopReading)
    assert not scenario.did(events.Exit)
    scenario.prepared(1).complete(1).committed(1, A)
    assert scenario.sent()[-1] == messages.Goodbye(7)
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]

    scenario = Scenario().joined().running(A).processed(A)
    for _ in range(3):
        scenario.after(events.TerminationRequested())
    assert scenario.sent() == []
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_dismissed_worker_commits_its_open_epoch_and_leaves() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.TerminationRequested())
    scenario.receive(messages.Dismiss(1, 7))
    assert scenario.did(events.StopReading)
    scenario.prepared(1).complete(1).committed(1, A)
    assert scenario.sent()[-2:] == [messages.Drained(7), messages.Goodbye(7)]
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_leaving_is_bounded_in_time() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.TerminationRequested())
    scenario.now_ms = 20_000
    scenario.receive(messages.HeartbeatAck(1, 7))
    scenario.after(events.Tick())
    assert scenario.did(events.StopReading)
    assert not scenario.did(events.Exit)
    scenario.now_ms = 50_000
    scenario.receive(messages.HeartbeatAck(1, 7))
    scenario.after(events.Tick())
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_leaving_worker_waits_for_the_next_leader_for_a_limited_time() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.now_ms = 60_000
    scenario.after(events.TerminationRequested())
    scenario.now_ms = 62_999
    scenario.after(events.Tick())
    assert not scenario.did(events.Exit)
    scenario.now_ms = 63_000
    scenario.after(events.Tick())
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_leaving_is_repeated_and_in_each_hello() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.TerminationRequested())
    scenario.now_ms = LEAVING_REPEATED_MS - 1
    scenario.after(events.Tick())
    assert scenario.sent() == []
    scenario.now_ms = LEAVING_REPEATED_MS
    scenario.after(events.Tick())
    assert scenario.sent() == [messages.Leaving(7)]
    scenario.after(events.Connected())
    (hello,) = scenario.sent()
    assert isinstance(hello, messages.Hello)
    assert hello.leaving


def test_leaving_worker_that_loses_its_session_does_not_join_again() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.TerminationRequested())
    scenario.receive(messages.Evicted(1, 7))
    assert scenario.sent() == []
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_drained_worker_exits_with_its_own_code() -> None:
    scenario = Scenario().joined().running(A)
    scenario.receive(messages.Leave(1, 7))
    assert scenario.sent() == [messages.Leaving(7)]
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.did(events.Exit) == [events.Exit(ExitCode.DRAINED, "asked to leave")]


def test_worker_that_is_drained_while_it_leaves_is_not_restarted() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.TerminationRequested())
    scenario.receive(messages.Leave(1, 7))
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.did(events.Exit) == [events.Exit(ExitCode.DRAINED, "asked to leave")]


def test_drain_of_the_job_ends_a_leaving_worker() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.after(events.TerminationRequested())
    scenario.receive(messages.Drain(1, 7))
    scenario.prepared(1).complete(1).committed(1, A)
    assert scenario.sent()[-2:] == [messages.Drained(7), messages.Goodbye(7)]
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_termination_of_a_drained_worker_ends_it() -> None:
    scenario = Scenario().joined().running(A)
    scenario.receive(messages.Drain(1, 7))
    scenario.after(events.TerminationRequested())
    assert scenario.did(events.Exit) == [events.Exit(0, "asked to leave")]


def test_failed_job_exits_with_its_own_code() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Shutdown(1, 7, "bad record", Failure.of_record("bad record")))
    assert scenario.did(events.Exit) == [
        events.Exit(ExitCode.JOB_FAILED, "bad record", Failure.of_record("bad record"))
    ]


@pytest.mark.parametrize(
    ("failure", "code"),
    [(None, ExitCode.JOB_ENDED), (Failure.of_record("so it is"), ExitCode.JOB_FAILED)],
)
def test_worker_without_a_leader_ends_when_the_journal_says_that_the_job_has_ended(
    failure: Failure | None, code: int
) -> None:
    scenario = Scenario()
    scenario.after(events.JobEnded("so it is", failure))
    assert scenario.did(events.Exit) == [events.Exit(code, "so it is", failure)]


def test_full_epoch_pauses_until_its_barrier() -> None:
    scenario = Scenario().joined().running(A).processed(A, records=1000)
    assert scenario.did(events.PauseReading)
    scenario.barrier(1)
    assert scenario.did(events.ResumeReading)


def test_dirty_worker_pauses_while_the_coordinator_is_silent() -> None:
    scenario = Scenario().joined().running(A).processed(A)
    scenario.now_ms = 30_000
    scenario.after(events.Tick())
    assert scenario.did(events.PauseReading)
    scenario.receive(messages.HeartbeatAck(1, 7))
    assert scenario.did(events.ResumeReading)


def test_idle_shards_are_committed_again_before_their_offsets_expire() -> None:
    scenario = Scenario().joined().running(A, B).processed(A).prepared(1).complete(1).committed(1, A)
    scenario.now_ms = 60_000
    scenario.after(events.Tick())
    assert scenario.sent() == [messages.Dirty(7, False)]
    scenario.barrier(2)
    assert scenario.effects == [events.PrepareEpoch(7, 2, frozenset({A}))]  # B has no offset to keep


def test_refusal_ends_the_worker_unless_it_may_retry() -> None:
    scenario = Scenario()
    scenario.after(events.Connected())
    scenario.receive(messages.Refused(1, "draining", retry=True))
    assert not scenario.did(events.Exit)
    scenario.now_ms = 2000
    scenario.after(events.Tick())
    assert isinstance(scenario.sent()[0], messages.Hello)
    scenario.receive(messages.Refused(1, "another topology", retry=False))
    assert scenario.did(events.Exit)


def test_repeated_assignment_restores_nothing_twice() -> None:
    scenario = Scenario().joined().running(A)
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    assert scenario.effects == []


def test_empty_epoch_is_answered_even_if_a_restore_had_a_higher_number() -> None:
    scenario = Scenario().joined().running(A).barrier(1)
    scenario.receive(messages.Assign(1, 7, [B], scenario.order()))
    scenario.after(events.ShardRestored(7, B, position(5, 40)))
    scenario.complete(1)
    (committed,) = scenario.sent()
    assert isinstance(committed, messages.Committed)
    assert committed.epoch == 1


def test_worker_with_a_broken_disk_leaves_without_failing_the_job() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.WorkerBroken(FULL))
    assert scenario.sent() == []
    assert scenario.did(events.Exit) == [events.Exit(ExitCode.MISTAKE, "the disk is full", FULL)]


def test_failure_of_a_former_session_does_not_fail_the_job() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.JobBroken(6, Failure(FailureKind.STATE, "closed")))
    assert scenario.sent() == []
    scenario.after(events.JobBroken(7, FULL))
    assert scenario.sent() == [messages.WorkerFailed(7, FULL)]


# --- copies of others' shards ---------------------------------------------------------------------------


def test_copies_are_those_of_the_last_order() -> None:
    scenario = Scenario().joined()
    assert scenario.receive(messages.Standby(1, 7, [B, A])) == [events.KeepStandbys((A, B))]
    assert scenario.receive(messages.Standby(1, 7, [A, B])) == []
    assert scenario.receive(messages.Standby(1, 7, [B])) == [events.KeepStandbys((B,))]


def test_assigned_copy_is_restored_and_no_longer_a_copy() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Standby(1, 7, [A, B]))
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    assert scenario.effects == [events.RestoreShards(7, (A,))]
    assert scenario.receive(messages.Standby(1, 7, [B])) == []


def test_own_shard_is_never_kept_as_a_copy() -> None:
    scenario = Scenario().joined().running(A)
    assert scenario.receive(messages.Standby(1, 7, [A, B])) == [events.KeepStandbys((B,))]


def test_lost_session_drops_its_copies() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Standby(1, 7, [A]))
    scenario.after(events.TransactionFailed(7, "lost"))
    assert events.KeepStandbys(()) in scenario.effects


def test_copies_of_another_session_are_not_kept() -> None:
    scenario = Scenario().joined()
    assert scenario.receive(messages.Standby(1, 6, [A])) == []


def test_repeated_orders_are_not_carried_out_again() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Assign(1, 7, [A], 1))
    scenario.after(events.ShardRestored(7, A, position(0)))
    scenario.receive(messages.Revoke(1, 7, [A], 2))
    assert scenario.sent() == [messages.Released(7, [A], 1)]
    assert scenario.receive(messages.Assign(1, 7, [A], 1)) == []  # another worker owns it by now
    scenario.receive(messages.Assign(1, 7, [A], 3))
    scenario.after(events.ShardRestored(7, A, position(0)))
    assert scenario.receive(messages.Revoke(1, 7, [A], 2)) == []
    assert (
        scenario.receive(messages.Assign(2, 7, [B], 1)) != []
    )  # from the next leader, which counts from 1 again


# --- transactions that Kafka has torn -----------------------------------------------------------------


def torn_restore(scenario: Scenario, *, stopped: bool) -> None:
    """Let the coordinator assign A and B. Kafka has torn a transaction of A."""
    session = scenario.core.state.session
    scenario.receive(messages.Assign(1, session, [A, B], scenario.order()))
    scenario.after(events.ShardRestored(session, B, position(0)))
    scenario.after(events.TransactionTorn(session, A, TORN, stopped))


def test_shard_with_a_torn_transaction_is_kept_stopped_while_the_others_run() -> None:
    scenario = Scenario().joined()
    torn_restore(scenario, stopped=True)
    assert scenario.sent() == [messages.TornTransaction(7, A, True, TORN)]
    assert scenario.did(events.StartReading) == []
    scenario.processed(B).prepared(1).complete(1).committed(1, B)
    assert isinstance(scenario.sent()[0], messages.Committed)
    assert scenario.core.state.shards[A].phase is model.ShardPhase.STOPPED


def test_stopped_shard_is_reported_to_a_new_leader() -> None:
    scenario = Scenario().joined()
    torn_restore(scenario, stopped=True)
    scenario.receive(messages.Welcome(term=2, session=7, slot=0, epoch=0, adopted=True))
    assert messages.TornTransaction(7, A, True, TORN) in scenario.sent()


def test_stopped_shard_is_released_when_it_is_revoked() -> None:
    scenario = Scenario().joined()
    torn_restore(scenario, stopped=True)
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert [type(message) for message in scenario.sent()] == [messages.Released]
    assert scenario.did(events.CloseShards) == [events.CloseShards((A,))]


def test_shard_revoked_before_its_transaction_was_found_torn_is_released() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    scenario.receive(messages.Revoke(1, 7, [A], scenario.order()))
    assert scenario.sent() == []
    scenario.after(events.TransactionTorn(7, A, TORN, True))
    assert [type(message) for message in scenario.sent()] == [messages.Released]


def test_shard_that_continues_after_a_torn_transaction_commits_its_position_at_once() -> None:
    scenario = Scenario().joined()
    torn_restore(scenario, stopped=False)
    assert scenario.sent() == [messages.TornTransaction(7, A, False, TORN)]
    scenario.after(events.ShardRestored(7, A, position(80, 8)))
    assert [type(message) for message in scenario.sent()] == [messages.ShardsRunning, messages.Dirty]
    scenario.barrier(9)
    assert scenario.did(events.PrepareEpoch) == [events.PrepareEpoch(7, 9, frozenset([A]))]


def test_torn_transaction_of_a_former_session_is_ignored() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    assert scenario.after(events.TransactionTorn(6, A, TORN, True)) == []
    assert scenario.core.state.shards[A].phase is model.ShardPhase.RESTORING


# --- records at which handlers hang ------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "condemned"), [(1, False), (2, True), (3, True)])
def test_record_at_which_a_handler_hung_twice_is_condemned(times: int, condemned: bool) -> None:
    scenario = Scenario().joined()
    overdue = [messages.OverdueRecord(A, 5, times, "record flights/0 at offset 5 hung", "slow")]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), overdue))
    scenario.after(events.ShardRestored(7, A, position(0)))
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert [(record.offset, record.condemnation.step) for record in reading.condemned] == (
        [(5, "slow")] if condemned else []
    )


def test_timers_at_one_record_are_condemned_separately() -> None:
    scenario = Scenario().joined()
    steps = ("timer 'a'", "timer 'b'")
    overdue = [messages.OverdueRecord(A, 5, 2, "it hung", step) for step in (*steps, "slow")]
    suspects = [messages.SuspectRecord(A, 5, 3, step) for step in (*steps, "timer 'c'", "slow")]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), overdue, suspects))
    scenario.after(events.ShardRestored(7, A, position(0)))
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert [record.condemnation.step for record in reading.condemned] == [*steps, "slow", "timer 'c'"]


def test_condemned_record_is_forgotten_once_it_is_committed() -> None:
    scenario = Scenario().joined()
    overdue = [messages.OverdueRecord(A, 5, 2, "it hung", "slow")]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), overdue))
    scenario.after(events.ShardRestored(7, A, position(0)))
    scenario.processed(A).prepared(1).complete(1).committed(1, A)
    assert scenario.core.state.condemned == {}


# --- records that end processes ---------------------------------------------------------------------------


def suspected(times: int, step: str = "handler") -> Scenario:
    """A shard at position 3 that is assigned with a suspect record."""
    scenario = Scenario().joined()
    suspects = [messages.SuspectRecord(A, 5 if times else 0, times, step, "record flights/0 at offset 5")]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), [], suspects))
    scenario.after(events.ShardRestored(7, A, position(3)))
    return scenario


@pytest.mark.parametrize(
    ("times", "announced"), [(0, (range(3, 2_003),)), (1, (range(5, 6),)), (2, (range(5, 6),)), (3, ())]
)
def test_suspect_records_are_announced_until_one_is_condemned(
    times: int, announced: tuple[range, ...]
) -> None:
    scenario = suspected(times)
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert reading.announced == announced
    assert [(record.offset, record.condemnation.step) for record in reading.condemned] == (
        [(5, "handler")] if times >= 3 else []
    )


def test_all_records_of_a_suspect_group_are_announced() -> None:
    scenario = Scenario().joined()
    suspects = [messages.SuspectRecord(A, 103, 0, "", "record flights/0 at offset 103", span=50)]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), [], suspects))
    scenario.after(events.ShardRestored(7, A, position(3)))
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert reading.announced == (range(103, 153),)


@pytest.mark.parametrize(
    ("times", "announced"),
    [(0, (range(3, 2_003), range(9, 2_009))), (1, (range(0), range(11, 12))), (3, ())],
)
def test_suspect_record_belongs_to_its_input(times: int, announced: tuple[range, ...]) -> None:
    scenario = Scenario().joined()
    suspects = [messages.SuspectRecord(A, 11, times, "handler", "record", input=1)]
    scenario.receive(messages.Assign(1, 7, [A], scenario.order(), [], suspects))
    scenario.after(events.ShardRestored(7, A, two_inputs(3, 9)))
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert reading.announced == announced
    assert [(record.input, record.offset) for record in reading.condemned] == (
        [(1, 11)] if times >= 3 else []
    )


@pytest.mark.parametrize("step", ["handler", ""])
def test_condemned_record_names_the_count_and_itself_if_the_step_is_unknown(step: str) -> None:
    (reading,) = suspected(3, step).did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    failure = reading.condemned[0].condemnation
    assert (
        "3 worker processes in a row ended or fell silent while they processed it" in failure.failure.message
    )
    assert failure.failure.message.startswith("record flights/0 at offset 5: ") == (not step)


def test_suspicion_ends_with_the_session() -> None:
    scenario = suspected(1)
    scenario.after(events.TransactionFailed(7, "a broker is down"))
    scenario.receive(messages.Welcome(term=1, session=8, slot=0, epoch=0, adopted=False))
    scenario.after(events.ProducersOpened(8))
    scenario.running(A)
    reading = scenario.did(events.StartReading)[-1]
    assert isinstance(reading, events.StartReading)
    assert reading.announced == ()


# --- epochs that fail because of their data -----------------------------------------------------------------

REFUSED = Condemnation(Failure.of_record("Kafka refuses the output to 'out': too large"), topic="out")


def failed_epoch(scenario: Scenario, records: int, newest: int | None = None) -> Scenario:
    """Let an epoch be refused, and join again. The shard runs again in the next session."""
    session = scenario.core.state.session
    record = None if newest is None else model.RecordAt(A, newest)
    scenario.after(events.RecordsProcessed(frozenset({A}), records, True, record))
    scenario.barrier(scenario.core.state.epoch_seen + 1)
    scenario.after(events.EpochFailed(session, REFUSED))
    assert isinstance(scenario.sent()[-1], messages.Hello)
    scenario.receive(messages.Welcome(term=1, session=session + 1, slot=0, epoch=0, adopted=False))
    scenario.after(events.ProducersOpened(session + 1))
    return scenario.running(A)


def test_refused_epoch_is_replayed_in_pieces_until_its_record_is_condemned() -> None:
    scenario = failed_epoch(Scenario().joined().running(A), 64)
    assert scenario.core.state.pieces.records_max == 8
    failed_epoch(scenario, 8, 7)
    assert scenario.core.state.pieces.records_max == 1
    assert scenario.core.state.condemned == {}
    failed_epoch(scenario, 1, 5)
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert reading.condemned == (model.Condemned(5, REFUSED),)


def test_only_record_of_an_unbounded_epoch_is_not_condemned_at_once() -> None:
    scenario = failed_epoch(Scenario().joined().running(A), 1, 5)
    assert scenario.core.state.condemned == {}


def test_in_small_pieces_nothing_is_processed_before_the_epoch_is_committed() -> None:
    scenario = failed_epoch(Scenario().joined().running(A), 64)
    core_state = scenario.core.state
    scenario.after(events.RecordsProcessed(frozenset({A}), 5, True, model.RecordAt(A, 5)))
    assert scenario.sent() == [messages.Dirty(8, False)], "no backlog, so that a barrier comes at once"
    assert not core_state.waits_for_commit()
    scenario.after(events.RecordsProcessed(frozenset({A}), 3, True, model.RecordAt(A, 8)))
    assert core_state.waits_for_commit()
    scenario.prepared(5).complete(5)
    assert core_state.waits_for_commit()
    scenario.committed(5, A)
    assert not core_state.waits_for_commit()


def test_condemned_record_that_is_refused_again_and_again_stops_the_job() -> None:
    scenario = failed_epoch(Scenario().joined().running(A), 8)
    for _ in range(core.CONDEMNATIONS_MAX + 1):
        failed_epoch(scenario, 1, 5)
    (reading,) = scenario.did(events.StartReading)
    assert isinstance(reading, events.StartReading)
    assert reading.stop_record is not None
    assert reading.stop_record.offset == 5
    assert "offset 5" in str(reading.stop_record.failure)
    assert str(REFUSED.failure) in str(reading.stop_record.failure)


def test_record_named_by_the_shell_is_condemned() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.EpochFailed(7, REFUSED, model.RecordAt(A, 3)))
    assert scenario.core.state.condemned == {A: [model.Condemned(3, REFUSED)]}


def test_failure_of_a_former_session_is_ignored() -> None:
    scenario = Scenario().joined().running(A)
    assert scenario.after(events.EpochFailed(6, REFUSED)) == []
    assert scenario.core.state.pieces.records_max is None


def test_failed_output_known_to_the_engine_is_condemned_instead_of_stopping() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(
        events.HandlerFailed(7, A, 4, Failure.of_record("record flights/0 at offset 4 failed"), REFUSED)
    )
    assert scenario.core.state.condemned == {A: [model.Condemned(4, REFUSED)]}


def lost(scenario: Scenario, session: int, *, unexpected: bool) -> None:
    """Let a transaction fail, and join again."""
    scenario.after(events.TransactionFailed(session, f"epoch {session}: UNKNOWN", unexpected))
    scenario.receive(messages.Welcome(term=1, session=session + 1, slot=0, epoch=0, adopted=False))


def test_replays_for_the_same_reason_wait_before_their_producers_open() -> None:
    scenario = Scenario().joined()
    lost(scenario, 7, unexpected=False)
    assert scenario.did(events.OpenProducers), "the first without a delay"
    lost(scenario, 8, unexpected=False)
    assert not scenario.did(events.OpenProducers)
    scenario.now_ms += 99
    scenario.after(events.Tick())
    assert not scenario.did(events.OpenProducers)
    scenario.now_ms += 1
    scenario.after(events.Tick())
    assert scenario.did(events.OpenProducers) == [events.OpenProducers(9, 0)]
    scenario.after(events.Tick())
    assert not scenario.did(events.OpenProducers)


@pytest.mark.parametrize("unexpected", [True, False])
def test_epoch_that_fails_too_often_for_an_unexpected_reason_stops_the_job(unexpected: bool) -> None:
    scenario = Scenario().joined()
    for session in range(7, 16):
        lost(scenario, session, unexpected=unexpected)
    scenario.after(events.TransactionFailed(16, "epoch 16: UNKNOWN", unexpected))
    failed = [message for message in scenario.sent() if isinstance(message, messages.WorkerFailed)]
    assert len(failed) == unexpected
    assert all(
        "failed 10 times in a row (epoch.failures.max): epoch 16" in str(one.failure) for one in failed
    )


# --- several inputs -----------------------------------------------------------------------------------------


def two_inputs(first: int, second: int, epoch: int = 0) -> CommittedPosition:
    return CommittedPosition(first, epoch, epoch, "f", further=(InputOffset(second),))


def test_position_is_reported_for_each_input() -> None:
    scenario = Scenario().joined()
    scenario.receive(messages.Assign(1, 7, [A], scenario.order()))
    scenario.after(events.ShardRestored(7, A, two_inputs(5, 9, 3)))
    (running,) = scenario.sent()
    assert isinstance(running, messages.ShardsRunning)
    assert [(one.input, one.committed, one.epoch) for one in running.shards] == [(0, 5, 3), (1, 9, 3)]
    scenario.processed(A).prepared(4).complete(4)
    scenario.after(events.EpochCommitted(7, 4, 1.0, {A: two_inputs(6, 11, 4)}))
    committed = scenario.sent()[-1]
    assert isinstance(committed, messages.Committed)
    assert [(one.input, one.committed) for one in committed.shards] == [(0, 6), (1, 11)]


def test_condemned_record_of_one_input_is_not_that_of_another_with_its_offset() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(
        events.HandlerFailed(7, A, 4, Failure.of_record("record b/0 at offset 4 failed"), REFUSED, input=1)
    )
    assert scenario.core.state.condemned == {A: [model.Condemned(4, REFUSED, 1)]}
    scenario.receive(messages.Welcome(term=1, session=8, slot=0, epoch=0, adopted=False))
    scenario.after(events.ProducersOpened(8))
    scenario.receive(messages.Assign(1, 8, [A], scenario.order()))
    scenario.after(events.ShardRestored(8, A, two_inputs(0, 0)))
    for first, second, left in ((9, 4, 1), (9, 5, 0)):
        epoch = scenario.core.state.epoch_seen + 1
        scenario.processed(A).prepared(epoch).complete(epoch)
        scenario.after(events.EpochCommitted(8, epoch, 1.0, {A: two_inputs(first, second, epoch)}))
        assert len(scenario.core.state.condemned.get(A, ())) == left


def test_stop_record_is_reported_with_its_input() -> None:
    scenario = Scenario().joined().running(A)
    scenario.after(events.StopRecordReached(7, A, 4, Failure.of_record("boom"), input=1))
    assert scenario.core._owned_shards.stop_records == {A: model.StopRecord(4, Failure.of_record("boom"), 1)}
