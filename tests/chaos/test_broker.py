"""The broker is stopped or killed, or carries out a commit after its sender died; transactions time out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import pytest
from confluent_kafka import KafkaError, Message

from fcluster.common.failpoints import Arm
from fcluster.common.settings import Settings
from fcluster.kafka.embedded import EmbeddedKafka
from fcluster.worker.batches import Batches
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.transactions import FrozenEpoch, TransactionalWriter, TransactionLostError
from fcluster.worker.watchdog import Watchdog
from tests.chaos.network import BrokerFor
from tests.chaos.runner import PLAIN, REGROUPED, Chaos, workers_of
from tests.chaos.tally import BROKER_AWAY, COMMIT_IN_DOUBT, TRANSACTION_EXPIRED
from tests.chaos.transactions_log import transactional_ids_of
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import COORDINATOR, process_state, wait_until

pytestmark = pytest.mark.timeout(300)

AWAY_S = 20.0
TRANSACTION_TIMEOUT_S = 3.0


def open_transaction(run: Chaos, worker: str, hold_ms: int) -> str:
    """Hold the worker just before a commit. Returns evidence that its transaction is open."""
    run.cluster.arm(worker, "worker.commit", Arm("hold", after_ms=hold_ms))
    run.cluster.await_mark(worker, "worker.commit")
    return run.open_epoch()


@pytest.mark.parametrize(("hard", "job_file"), [(True, PLAIN), (False, REGROUPED)], ids=["hard", "clean"])
def test_broker_restarted_in_open_epochs_only_delays_the_job(
    chaos_on_stoppable_broker: Callable[..., AbstractContextManager[Chaos]],
    stoppable_broker: EmbeddedKafka,
    hard: bool,
    job_file: str,
) -> None:
    # Default timeouts: an epoch may take longer than the broker is down.
    settings = {"checkpoint.timeout.ms": 30_000}
    title = f"broker {'killed' if hard else 'stopped'} for {AWAY_S} s"
    with chaos_on_stoppable_broker(title, job_file=job_file, settings=settings, rate=300.0) as run:
        pids = run.cluster.pids()
        evidence = open_transaction(run, "worker-0", hold_ms=1000)
        stoppable_broker.kill() if hard else stoppable_broker.stop()
        gone_s = time.monotonic()
        run.note(BROKER_AWAY, title, shown=evidence)
        time.sleep(AWAY_S)  # the fault itself
        stoppable_broker.start()
        print(f"the broker was down for {time.monotonic() - gone_s:.1f} s")
        print(f"output flows again after {run.await_flow():.1f} s")
        assert run.cluster.pids() == pids
        run.cluster.assert_alive()


@contextmanager
def broker_standing_still(broker: EmbeddedKafka) -> Iterator[None]:
    """Suspend the broker's process. Whatever is sent to it waits in its sockets."""
    pid = broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: process_state(pid) in "Tt", "the broker stops", 5, 0.002)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_commit_that_arrives_after_its_sender_died_is_neither_lost_nor_repeated(
    chaos_on_stoppable_broker: Callable[..., AbstractContextManager[Chaos]], stoppable_broker: EmbeddedKafka
) -> None:
    """The worker dies while its request to commit is in the broker's socket, so its outcome is unknown."""
    with chaos_on_stoppable_broker("commit in doubt") as run:
        for round_number in range(4):
            victim = f"worker-{round_number % 3}"
            run.cluster.arm(victim, "worker.commit", Arm("hold", after_ms=300))
            mark = run.cluster.await_mark(victim, "worker.commit")
            with broker_standing_still(stoppable_broker):
                # The fault itself: the hold ends, the worker sends its request, and dies while it waits for
                # the answer.
                time.sleep(0.6)
                run.cluster.kill(victim)
                time.sleep(0.3 * round_number)  # in later rounds, its session is over by then
            what = f"kill -9 {victim} after its commit was sent ({mark.detail})"
            run.note(COMMIT_IN_DOUBT, what, shown="its commit was still in the broker's socket")
            run.start(victim)
            run.await_flow()


def aborted_by_broker(run: Chaos) -> set[str]:
    """The workers' transactional ids whose last transaction was aborted."""
    states = transactional_ids_of(run.brokers, f"{run.job}-slot-")
    return {identity for identity, state in states.items() if state == "CompleteAbort"}


def test_transactions_that_run_out_of_time_are_aborted_and_replayed(
    chaos_on_stoppable_broker: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    """While the coordinator is stopped, nobody may commit and nobody fences: only the broker can abort."""
    settings = {
        "transaction.timeout.ms": int(TRANSACTION_TIMEOUT_S * 1000),
        "checkpoint.timeout.ms": 2700,  # the transaction's timeout allows no more
    }
    with chaos_on_stoppable_broker("transactions out of time", settings=settings) as run:
        pids = run.cluster.pids()
        # One worker has sent its offsets and is about to commit. The transactions of the others are open.
        run.cluster.arm("worker-1", "worker.commit", Arm("hold", after_ms=5000))
        mark = run.cluster.await_mark("worker-1", "worker.commit")
        run.cluster.pause(COORDINATOR)
        said = {worker: len(run.cluster.log(worker, 10**6)) for worker in workers_of(run)}
        # The broker looks for expired transactions once a second.
        wait_until(lambda: len(aborted_by_broker(run)) >= 3, "the broker aborts transactions", 15, 0.2)
        what = f"transactions of all workers ran out of time ({mark.detail})"
        run.note(TRANSACTION_EXPIRED, what, mark.time_ns)
        run.cluster.resume(COORDINATOR)
        run.await_flow()
        for worker, length in said.items():
            assert "replaying from the committed offsets" in run.cluster.log(worker, 10**6)[length:]
        assert run.cluster.pids() == pids


def test_writer_goes_on_with_a_new_producer_epoch_after_records_had_no_answer(
    stoppable_kafka: BrokerFor, topic_prefix: str
) -> None:
    """The client can't know what became of the records. So it needs a new epoch from the broker before it
    goes on: otherwise the broker might take the next ones for repetitions.
    """
    servers, topic = stoppable_kafka.servers, f"{topic_prefix}out"
    create_topic(servers, topic, 1)
    # The records have to time out before their transaction does, and later than they may wait for others.
    settings = Settings(
        bootstrap_servers=servers,
        transaction_timeout_ms=12_000,
        kafka={"producer.message.timeout.ms": "4000"},
    )
    batches, waits = Batches(settings, lambda _topic: None), KafkaWaits(Watchdog())
    writer = TransactionalWriter(settings, topic_prefix, 0, None, batches, waits, lambda _reason: None)
    writer.open()
    pid = stoppable_kafka.broker.pid
    assert pid is not None
    transaction = writer.begin()
    transaction.produce(topic, b"an answer", None, 1)
    transaction.flush_outputs()  # from now on, records are sent without asking first
    os.kill(pid, signal.SIGSTOP)
    try:
        transaction.produce(topic, b"no answer", None, 1)
        with suppress(TransactionLostError):
            transaction.flush_outputs()
        with pytest.raises(TransactionLostError) as lost:
            transaction.check()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert lost.value.abortable, lost.value
    assert lost.value.code == KafkaError._TIMED_OUT
    writer.abort()
    for value in (b"first", b"second"):
        transaction = writer.begin()
        transaction.produce(topic, value, None, 1)
        transaction.flush_outputs()
        transaction.commit(FrozenEpoch(1, 1, []))
    writer.destroy(lambda: None)
    assert read_topic(servers, topic, READ_COMMITTED, Message.value)[0] == [b"first", b"second"]
