"""An epoch from its first record to its commit, through the worker's threads, without Kafka."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import orjson
import pytest
from confluent_kafka import KafkaError

from fcluster.common.errors import SourceGap, StateDamaged
from fcluster.common.ids import ShardId
from fcluster.common.settings import Settings
from fcluster.worker import epoch_pipeline
from fcluster.worker.batches import BATCH_BYTES, Batches
from fcluster.worker.commit_thread import CommitThread
from fcluster.worker.core import events
from fcluster.worker.epoch_pipeline import EpochPipeline
from fcluster.worker.epoch_trace import PHASES
from fcluster.worker.processing import OutputPort
from fcluster.worker.source_checks import SourceChecks
from fcluster.worker.watchdog import Watchdog
from tests.unit.worker.worker_parts import (
    PATIENCE_S,
    SESSION,
    FakeWriter,
    Message,
    counting_topology,
    lost,
    new_core_state,
    new_runner,
    shard_of,
)

TOPOLOGY = counting_topology()
SHARD = shard_of(TOPOLOGY)
FENCED = KafkaError._FENCED


class Bench:
    """A pipeline with one shard, in a session."""

    def __init__(self) -> None:
        self.core_state = new_core_state()
        self.port = OutputPort()
        self.posted: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self.deltas: list[tuple[ShardId, int, int]] = []
        self.batches = Batches(Settings(), lambda _topic: None)
        self.checks = SourceChecks("j", lambda _topics: pytest.fail("asked"), lambda _expected: {})
        self.pipeline = EpochPipeline(
            TOPOLOGY,
            self.core_state,
            self.port,
            self.batches,
            self.checks,
            Watchdog(),
            60.0,
            self.posted.put,
            lambda *delta: self.deltas.append(delta),
        )
        self.runner = new_runner(TOPOLOGY, self.port)
        self.writer = FakeWriter()

    def opened(self) -> Bench:
        self.pipeline.open(SESSION, self.writer.make)
        assert self.next_event() == events.ProducersOpened(SESSION)
        return self

    def next_event(self) -> events.Event:
        return self.posted.get(timeout=PATIENCE_S)

    def process(self, *offsets: int, value: bytes = b'"x"') -> None:
        """Process a record like the record pump does."""
        if not self.pipeline.has_begun:
            self.pipeline.begin()
        one = self.runner.inputs[0]
        for offset in offsets:
            message = Message(offset, value)
            one.handle(message)
            one.last = message
        self.pipeline.count(len(offsets))

    def prepare(self, epoch: int) -> None:
        self.pipeline.prepare(events.PrepareEpoch(SESSION, epoch, frozenset({SHARD})), {SHARD: self.runner})

    def flushed(self, epoch: int, records: int) -> None:
        event = self.next_event()
        assert isinstance(event, events.EpochFlushed)
        assert (event.session, event.epoch, event.records) == (SESSION, epoch, records)

    def commit(self, epoch: int) -> events.EpochCommitted:
        self.pipeline.commit(events.CommitEpoch(SESSION, epoch))
        event = self.next_event()
        assert isinstance(event, events.EpochCommitted)
        self.pipeline.rest()()
        return event

    def outputs(self, number: int) -> list[int]:
        """The counts in the epoch of this number."""
        return [orjson.loads(output[1])["n"] for output in self.writer.transactions[number].outputs]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.writer.opens.set()
    bench.pipeline.destroy()
    bench.pipeline.close()


def test_records_after_the_barrier_go_into_the_next_transaction_while_the_one_before_commits(
    bench: Bench,
) -> None:
    bench.opened().process(0, 1)
    bench.prepare(4)
    assert not bench.pipeline.has_begun, "the next epoch is still empty"
    bench.process(2)
    bench.flushed(4, records=2)
    committed = bench.commit(4)
    position = committed.positions[SHARD]
    assert (position.offset, position.epoch, position.state_epoch) == (2, 4, 4)
    assert [bench.outputs(0), bench.outputs(1)] == [[1, 2], [3]]
    main = [call for call in bench.writer.log if call.startswith(("begin", "flush"))]
    assert main == ["begin 0", "flush 0", "begin 1"]
    assert [call for call in bench.writer.log if call not in main] == ["open", "prepare 0", "commit 0"]
    assert bench.runner.state.committed_epoch == 4
    (delta,) = bench.deltas
    assert delta[:2] == (SHARD, 400)
    assert delta[2] > 0
    assert bench.pipeline.committed == 1
    assert len(bench.pipeline.commit_latencies_ms()) == 1
    bench.prepare(5)
    bench.flushed(5, records=1)
    assert bench.commit(5).positions[SHARD].offset == 3
    written_by_the_writer = {"deltas", "offsets", "outputs", "flush"}
    assert [phase.name for phase in bench.pipeline.traces.figures()] == [
        phase for phase in PHASES if phase not in written_by_the_writer
    ]


def test_epoch_without_records_begins_a_transaction_for_its_offsets(bench: Bench) -> None:
    bench.opened().prepare(4)
    bench.flushed(4, records=0)
    position = bench.commit(4).positions[SHARD]
    assert (position.offset, position.epoch, position.state_epoch) == (0, 4, 0)
    assert bench.deltas == []


def test_epoch_whose_outputs_cannot_be_written_is_not_prepared_and_that_is_reported_once(
    bench: Bench,
) -> None:
    bench.opened().process(0)
    bench.writer.fail["flush"] = lost(FENCED)
    bench.prepare(4)
    failed = bench.next_event()
    assert isinstance(failed, events.TransactionFailed)
    assert failed.session == SESSION
    bench.pipeline.rest()()
    assert "prepare 0" not in bench.writer.log
    assert bench.posted.empty()


def test_next_epoch_waits_for_acknowledgements_while_the_commit_thread_prepares(bench: Bench) -> None:
    bench.opened().process(0)
    (transaction,) = bench.writer.transactions
    transaction.acknowledges.clear()
    waits = threading.Thread(target=bench.prepare, args=(4,))
    waits.start()
    assert transaction.preparing.wait(PATIENCE_S), "the main thread waits, and the commit thread doesn't"
    assert waits.is_alive()
    assert bench.posted.empty(), "an epoch is prepared only if its outputs are written"
    transaction.acknowledges.set()
    bench.flushed(4, records=1)
    waits.join(PATIENCE_S)
    assert not waits.is_alive()


def test_main_thread_waits_for_no_outputs_of_an_epoch_that_has_failed_in_the_commit_thread(
    bench: Bench,
) -> None:
    bench.opened().process(0)
    (transaction,) = bench.writer.transactions
    transaction.acknowledges.clear()
    bench.writer.fail["prepare"] = lost(FENCED)
    bench.writer.fail["flush"] = lost(FENCED)
    bench.prepare(4)
    assert isinstance(bench.next_event(), events.TransactionFailed)
    bench.pipeline.rest()()
    assert bench.posted.empty(), "both threads have failed, for the same reason"


def test_interrupted_wait_for_outputs_leaves_no_commit_thread_waiting(bench: Bench) -> None:
    bench.opened().process(0)
    bench.writer.fail["flush"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.prepare(4)
    bench.pipeline.rest()()
    assert "prepare 0" not in bench.writer.log


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_lost_transaction_leaves_state_uncommitted_and_is_reported(bench: Bench, step: str) -> None:
    bench.opened().process(0)
    bench.writer.fail[step] = lost(FENCED)
    bench.prepare(4)
    if step == "commit":
        bench.flushed(4, records=1)
        bench.pipeline.commit(events.CommitEpoch(SESSION, 4))
    assert isinstance(bench.next_event(), events.TransactionFailed)
    assert bench.runner.state.committed_epoch == 0
    assert bench.deltas == []


@pytest.mark.parametrize(("step", "abortable"), [("flush", True), ("prepare", True), ("commit", False)])
def test_failure_says_whether_an_abort_is_enough(bench: Bench, step: str, abortable: bool) -> None:
    """A commit that failed may have happened, whatever the client says of it."""
    bench.opened().process(0)
    bench.writer.fail[step] = lost(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, abortable=True)
    bench.prepare(4)
    if step == "commit":
        bench.flushed(4, records=1)
        bench.pipeline.commit(events.CommitEpoch(SESSION, 4))
    failed = bench.next_event()
    assert isinstance(failed, events.TransactionFailed)
    assert failed.abortable is abortable


def test_abort_comes_after_the_commit_and_leaves_what_is_committed_in_the_store(bench: Bench) -> None:
    bench.opened().process(0, 1)
    bench.prepare(4)
    bench.flushed(4, records=2)
    bench.process(2)
    bench.pipeline.commit(events.CommitEpoch(SESSION, 4))
    bench.pipeline.abort(SESSION, [bench.runner.state])
    assert not bench.pipeline.has_begun
    assert isinstance(bench.next_event(), events.EpochCommitted)
    assert bench.next_event() == events.EpochsAborted(SESSION)
    assert bench.writer.log[-2:] == ["commit 0", "abort"]
    again = bench.runner.state.of_the_store()
    assert again.committed_epoch == 4
    assert [again.documents[name].peek(b"k") for name in again.documents] == [{"n": 2}]


def test_abort_that_fails_is_reported_as_a_lost_transaction(bench: Bench) -> None:
    bench.opened().process(0)
    bench.writer.fail["abort"] = lost(FENCED)
    bench.pipeline.abort(SESSION, [bench.runner.state])
    failed = bench.next_event()
    assert isinstance(failed, events.TransactionFailed)
    assert not failed.abortable


def test_output_that_kafka_refuses_fails_the_epoch_and_shrinks_the_batches(bench: Bench) -> None:
    bench.opened().process(0)
    bench.writer.fail["prepare"] = lost(KafkaError.MSG_SIZE_TOO_LARGE)
    bench.prepare(4)
    failed = bench.next_event()
    assert isinstance(failed, events.EpochFailed)
    assert failed.condemnation.topic == "out"
    assert bench.batches.producer_config()["batch.size"] < BATCH_BYTES


def test_state_that_cannot_be_stored_fails_the_epoch_at_its_barrier(bench: Bench) -> None:
    bench.opened().process(0, value=b'"odd"')
    bench.prepare(4)
    failed = bench.next_event()
    assert isinstance(failed, events.EpochFailed)
    assert failed.condemnation.step == "count"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StateDamaged("a damaged file"), events.WorkerBroken),
        (SourceGap("records are missing"), events.JobBroken),
        (ValueError("unforeseen"), events.TransactionFailed),
    ],
)
def test_whatever_fails_in_the_commit_thread_becomes_an_event(
    bench: Bench, error: Exception, kind: type[events.Event]
) -> None:
    bench.opened().process(0)
    bench.writer.fail["prepare"] = error
    bench.prepare(4)
    assert isinstance(bench.next_event(), kind)
    bench.writer.fail.clear()


def test_ended_session_keeps_no_producer_but_its_thread_for_later_sessions_to_wait_for(
    bench: Bench,
) -> None:
    bench.opened().process(0)
    bench.pipeline.destroy()
    assert not bench.pipeline.is_open
    assert not bench.pipeline.has_begun
    with pytest.raises(AssertionError, match="outside an epoch"):
        bench.port.produce()
    assert bench.writer.last_use is not None
    bench.writer.last_use()
    (retired,) = bench.pipeline.retired
    assert bench.pipeline.take_retired() == [retired]
    assert bench.pipeline.retired == []


def test_next_session_waits_for_the_threads_of_earlier_ones_whose_ids_it_has(bench: Bench) -> None:
    class Earlier(CommitThread):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait, cancel_futures=cancel_futures)
            bench.writer.log.append(f"waits: {wait}")

    bench.pipeline.retired.append(Earlier())
    bench.opened()
    assert bench.writer.log == ["waits: True", "open"]


def test_hanging_thread_is_abandoned_and_its_session_ends(bench: Bench) -> None:
    bench.writer.opens.clear()
    bench.pipeline.open(SESSION, bench.writer.make)
    bench.writer.give_up("the coordinator has moved")
    assert bench.next_event() == events.TransactionFailed(SESSION, "the coordinator has moved")
    bench.pipeline.destroy()
    bench.pipeline.close()  # doesn't wait for that thread
    bench.writer.opens.set()


def test_outputs_are_not_waited_for_once_the_session_has_been_given_up(bench: Bench) -> None:
    bench.opened().process(0)
    (transaction,) = bench.writer.transactions
    transaction.acknowledges.clear()
    waits = threading.Thread(target=bench.prepare, args=(4,))
    waits.start()
    assert transaction.preparing.wait(PATIENCE_S)
    bench.writer.give_up("the coordinator has moved")
    waits.join(PATIENCE_S)
    assert not waits.is_alive()
    assert bench.next_event() == events.TransactionFailed(SESSION, "the coordinator has moved")
    assert bench.posted.empty()


def test_outputs_wait_if_kafka_accepts_too_few_and_a_failed_transaction_ends_the_wait(bench: Bench) -> None:
    bench.opened()
    assert bench.pipeline.hold_back(backlog=False) is None, "no transaction is open"
    bench.process(0)
    (transaction,) = bench.writer.transactions
    transaction.waiting = [epoch_pipeline.OUTPUTS_UNACKNOWLEDGED_MAX + 1, 5]
    assert bench.pipeline.hold_back(backlog=True) is None
    assert transaction.sent == 1
    bench.writer.fail["check"] = lost(FENCED)
    transaction.waiting = [epoch_pipeline.OUTPUTS_UNACKNOWLEDGED_MAX + 1]
    assert isinstance(bench.pipeline.hold_back(backlog=True), events.TransactionFailed)


def test_outputs_of_a_long_epoch_are_sent_from_time_to_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 50.0
    monkeypatch.setattr(epoch_pipeline, "time", SimpleNamespace(monotonic=lambda: now_s))
    bench.opened().process(0)
    (transaction,) = bench.writer.transactions
    for step_s, backlog, sent in [(0.01, False, 0), (0.02, False, 1), (0.05, True, 1), (0.06, True, 2)]:
        now_s += step_s
        bench.pipeline.hold_back(backlog)
        assert transaction.sent == sent
