"""What producers raise, and that it leads to a replay and never ends the worker."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.common.settings import Settings
from fcluster.worker import sending, transactions
from fcluster.worker.batches import Batches
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.transactions import (
    AtLeastOnceWriter,
    AwaitedOutputs,
    FrozenEpoch,
    OutputsFailedError,
    ProducerTransactions,
    ShardEpoch,
    TransactionalWriter,
    TransactionLostError,
    flush,
)
from fcluster.worker.watchdog import Watchdog
from tests.harness import wait_until

FENCED = KafkaException(KafkaError(KafkaError._FENCED, "old epoch", fatal=True))


class FailingProducer:
    """Raises in each call that serves callbacks."""

    def __init__(self, fail: Callable[[], None]) -> None:
        self._fail = fail

    def __len__(self) -> int:
        return 1

    def poll(self, _timeout_s: float) -> int:
        self._fail()
        return 0

    def flush(self, _timeout_s: float) -> int:
        self._fail()
        return 0

    def produce(self, *_arguments: object) -> None:
        self._fail()


def transaction_of(producer: object) -> ProducerTransactions:
    waits = KafkaWaits(Watchdog())
    return ProducerTransactions(producer, Settings(), "job", None, waits, lambda _reason: None)  # type: ignore[arg-type]


def plainly() -> None:
    raise FENCED


def with_a_callback_on_top() -> None:
    """Raises as the client does if a log line is due in the call that finds a fatal error."""
    try:
        raise FENCED
    except KafkaException as error:
        raise SystemError("<class 'logging.LogRecord'> returned a result with an exception set") from error


@pytest.mark.parametrize("fail", [plainly, with_a_callback_on_top])
def test_fatal_error_of_a_producer_is_a_lost_transaction_wherever_it_shows(fail: Callable[[], None]) -> None:
    producer = FailingProducer(fail)
    with pytest.raises(TransactionLostError, match=r"flushing: .*_FENCED"):
        flush(producer, KafkaWaits(Watchdog()))  # type: ignore[arg-type]
    with pytest.raises(TransactionLostError, match="_FENCED"):
        transaction_of(producer).serve(send=False)


class RefusedProducer(FailingProducer):
    """A transaction that failed because of one batch, and never sends the others."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def flush(self, _timeout_s: float) -> int:
        return 4

    def begin_transaction(self) -> None:
        text = "ProduceRequest for small [0] with 9 message(s) failed: Broker: Message size too large"
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, text))


class SlowProducer(RefusedProducer):
    """A healthy transaction. Its records are acknowledged at the third call."""

    looks = 0

    def __len__(self) -> int:
        return max(0, 3 - self.looks)

    def flush(self, _timeout_s: float) -> int:
        self.looks += 1
        return 3 - self.looks

    def begin_transaction(self) -> None:
        text = "Operation not valid in state InTransaction"
        raise KafkaException(KafkaError(KafkaError._STATE, text))


@pytest.mark.parametrize("wait", [ProducerTransactions.flush_outputs, ProducerTransactions.check])
def test_records_of_a_failed_transaction_are_not_waited_for(
    wait: Callable[[ProducerTransactions], None],
) -> None:
    with pytest.raises(TransactionLostError, match="too large") as raised:
        wait(transaction_of(RefusedProducer()))
    failure = raised.value.condemnation()
    assert failure is not None
    assert failure.topic == "small"


class SilentProducer(SlowProducer):
    """Its records are never acknowledged, because their topic is deleted."""

    def __len__(self) -> int:
        return 1

    def flush(self, _timeout_s: float) -> int:
        return 1


def test_acknowledgements_that_never_come_are_not_waited_for_once_the_job_is_over() -> None:
    waits = KafkaWaits(Watchdog())
    waits.in_vain = True
    settings, consumer, batches = Settings(), object(), Batches(Settings(), lambda _topic: None)
    at_least_once = AtLeastOnceWriter(settings, consumer, batches, waits)  # type: ignore[arg-type]
    at_least_once._owned = SilentProducer()  # type: ignore[assignment]
    transaction = ProducerTransactions(SilentProducer(), settings, "job", None, waits, lambda _reason: None)  # type: ignore[arg-type]
    for epoch in (at_least_once.begin(), transaction):
        with pytest.raises(TransactionLostError, match="the job is over"):
            epoch.flush_outputs()


def test_records_of_a_healthy_transaction_are_waited_for() -> None:
    producer = SlowProducer()
    transaction = transaction_of(producer)
    transaction.flush_outputs()
    transaction.check()
    assert producer.looks == 3


class BusyProducer(SlowProducer):
    """Acknowledges its three outputs one flush after another. Meanwhile deltas come, which it never
    acknowledges before the outputs.

    Attributes:
        outputs: how many aren't acknowledged.
        reports: what is called when the deltas are acknowledged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs = 3
        self.reports: list[Callable[[Any, Any], None]] = []

    def __len__(self) -> int:
        return self.outputs + len(self.reports)

    def produce(self, *_arguments: object, on_delivery: Callable[[Any, Any], None], **_named: object) -> None:
        self.reports.append(on_delivery)

    def flush(self, timeout_s: float) -> int:
        self.looks += 1
        if self.outputs:
            self.outputs -= 1
        else:
            reports, self.reports = self.reports, []
            for report in reports:
                report(None, Acknowledged(17))
        return len(self)

    def send_offsets_to_transaction(self, *_arguments: object) -> None:
        assert self.outputs, "the offsets are sent while outputs are on their way"


class Acknowledged:
    """The report of a record."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def offset(self) -> int:
        return self._offset


def test_deltas_and_offsets_are_on_their_way_while_outputs_are_waited_for_and_only_for_those() -> None:
    part = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", records=[b"a", b"b"])
    producer, outputs, frozen = BusyProducer(), AwaitedOutputs(), FrozenEpoch(1, 1, [part])
    transaction = transaction_of(producer)
    commit_thread = threading.Thread(target=transaction.prepare, args=(frozen, outputs))
    commit_thread.start()
    wait_until(lambda: "offsets" in frozen.trace.took_ms, "the offsets")
    transaction.flush_outputs(outputs.failed)
    assert (producer.outputs, len(producer.reports)) == (0, 2), "the main thread waits for no delta"
    assert commit_thread.is_alive()
    outputs.acknowledge()
    commit_thread.join(20)
    assert not commit_thread.is_alive()
    assert frozen.changelog_next == {part.shard: 18}


def test_transaction_is_not_checked_while_the_commit_thread_is_in_a_call_about_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client would refuse one of both calls, and the transaction would count as lost."""
    monkeypatch.setattr(sending, "HEALTHY_S", 0.0)
    in_call, ends, polled = threading.Event(), threading.Event(), threading.Event()
    checked: list[bool] = []

    class Producer(BusyProducer):
        def begin_transaction(self) -> None:
            checked.append(in_call.is_set() and not ends.is_set())
            super().begin_transaction()

        def send_offsets_to_transaction(self, *_arguments: object) -> None:
            in_call.set()
            assert ends.wait(20)

        def poll(self, _timeout_s: float) -> int:
            polled.set()
            return 0

        def flush(self, timeout_s: float) -> int:
            if self.outputs == 1 and not ends.is_set():
                return len(self)
            return super().flush(timeout_s)

    part = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", records=[b"a"])
    producer, outputs, frozen = Producer(), AwaitedOutputs(), FrozenEpoch(1, 1, [part])
    transaction = transaction_of(producer)
    commit_thread = threading.Thread(target=transaction.prepare, args=(frozen, outputs))
    commit_thread.start()
    assert in_call.wait(20)
    main_thread = threading.Thread(target=transaction.flush_outputs, args=(outputs.failed,))
    main_thread.start()
    assert polled.wait(20), "it takes long"
    assert checked == []
    ends.set()
    main_thread.join(20)
    assert not main_thread.is_alive()
    assert True not in checked
    outputs.acknowledge()
    commit_thread.join(20)
    assert not commit_thread.is_alive()


class RefusedMeanwhile(RefusedProducer):
    """An output is refused while the commit thread prepares the epoch. So the deltas aren't acknowledged."""

    def __init__(self, *, in_call: bool) -> None:
        super().__init__()
        self._in_call = in_call
        self._reports: list[Callable[[Any, Any], None]] = []

    def __len__(self) -> int:
        return len(self._reports)

    def produce(self, *_arguments: object, on_delivery: Callable[[Any, Any], None], **_named: object) -> None:
        self._reports.append(on_delivery)

    def send_offsets_to_transaction(self, *_arguments: object) -> None:
        if self._in_call:
            text = "Failed to commit offsets to transaction on broker (none): Local: Erroneous state"
            raise KafkaException(KafkaError(KafkaError._STATE, text))

    def flush(self, _timeout_s: float) -> int:
        reports, self._reports = self._reports, []
        for report in reports:
            report(KafkaError(KafkaError._PURGE_QUEUE), Acknowledged(-1001))
        return 0


@pytest.mark.parametrize("in_call", [True, False])
def test_output_that_is_refused_while_the_epoch_is_prepared_is_named_as_the_cause(in_call: bool) -> None:
    """Otherwise it would be replayed for ever, as if it were temporary."""
    part = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", records=[b"a"])
    transaction = transaction_of(RefusedMeanwhile(in_call=in_call))
    with pytest.raises(TransactionLostError, match="too large") as raised:
        transaction.prepare(FrozenEpoch(1, 1, [part]), AwaitedOutputs.none())
    failure = raised.value.condemnation()
    assert failure is not None
    assert failure.topic == "small"


def test_without_a_transaction_no_delta_is_written_before_its_outputs_are() -> None:
    part = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", records=[b"a"])
    settings, waits, producer = Settings(), KafkaWaits(Watchdog()), BusyProducer()
    batches = Batches(settings, lambda _topic: None)
    writer = AtLeastOnceWriter(settings, object(), batches, waits)  # type: ignore[arg-type]
    writer._owned = producer  # type: ignore[assignment]
    outputs = AwaitedOutputs()
    outputs.fail()
    with pytest.raises(OutputsFailedError):
        writer.prepare(FrozenEpoch(1, 1, [part]), outputs)
    assert producer.reports == []


def test_system_error_of_another_kind_stays_one() -> None:
    def fail() -> None:
        raise SystemError("something else")

    with pytest.raises(SystemError):
        flush(FailingProducer(fail), KafkaWaits(Watchdog()))  # type: ignore[arg-type]


def test_refusal_that_no_replay_changes_names_topic_and_remedy() -> None:
    text = "committing epoch 3: ProduceRequest for mine [0] with 1 message(s) failed: not authorized"
    error = TransactionLostError(text, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert "remedy: Let the job's Kafka user write to mine (docs" in str(error.refusal(["other"]))
    assert error.condemnation() is None


def test_refusal_of_a_transaction_that_does_not_say_of_which_topic_names_those_that_it_may_be() -> None:
    text = "flushing: Failed to add partition(s) to transaction: not authorized"
    error = TransactionLostError(text, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert "write to a or b (docs" in str(error.refusal(["b", "a"]))
    assert "write to a0 or a1 or a2 or a3 or a4 or ... (docs" in str(
        error.refusal([f"a{n}" for n in range(9)])
    )


def test_refused_record_does_not_stop_the_job_before_it_is_found() -> None:
    text = "committing epoch 3: ProduceRequest for small [0] with 1 message(s) failed: Message size too large"
    error = TransactionLostError(text, KafkaError.MSG_SIZE_TOO_LARGE)
    failure = error.condemnation()
    assert error.refusal([]) is None
    assert failure is not None
    assert (failure.topic, failure.step) == ("small", "")
    assert "'small'" in str(failure.failure)
    assert "Message size too large" in str(failure.failure)
    assert "remedy: Raise max.message.bytes of small" in str(failure.failure)


@pytest.mark.parametrize(
    ("code", "unexpected"),
    [
        (None, False),
        (KafkaError._STATE, False),
        (KafkaError._TRANSPORT, False),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, False),
        (KafkaError.UNKNOWN, True),
    ],
)
def test_failures_not_known_to_pass_are_unexpected(code: int | None, unexpected: bool) -> None:
    assert TransactionLostError("gone", code).is_unexpected() is unexpected


@pytest.mark.parametrize("code", [None, KafkaError._FENCED, KafkaError._TIMED_OUT, KafkaError._TRANSPORT])
def test_temporary_failure_is_not_a_refusal(code: int | None) -> None:
    assert TransactionLostError("committing epoch 3: gone", code).refusal([]) is None


class DeadProducer:
    """Accepts nothing any more, as after a fatal error."""

    def __len__(self) -> int:
        return 0

    def begin_transaction(self) -> None:
        return None

    def produce(self, *_arguments: object, **_named: object) -> None:
        raise KafkaException(KafkaError(KafkaError._FENCED, "old epoch", fatal=True))


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_failure_keeps_no_producer_for_the_collector_to_destroy_in_any_thread() -> None:
    part = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", records=[b"delta"])
    with no_collector():
        producer = DeadProducer()
        gone = weakref.ref(producer)
        transaction = transaction_of(producer)
        transaction.begin()
        with pytest.raises(TransactionLostError, match="_FENCED") as raised:
            transaction.produce("out", b"value", b"key", 5)
        del raised
        with pytest.raises(TransactionLostError, match="_FENCED") as raised:
            transaction.prepare(FrozenEpoch(1, 1, [part]), AwaitedOutputs.none())
        del raised
        transaction.release()
        del producer
        assert gone() is None, "a transaction that is still referenced refers to no producer"


def test_epochs_alternate_between_two_producers_and_a_destroyed_writer_releases_both() -> None:
    settings, waits = Settings(), KafkaWaits(Watchdog())
    batches = Batches(settings, lambda _topic: None)
    writer = TransactionalWriter(settings, "job", 0, None, batches, waits, lambda _reason: None)
    writer._transactions = [transaction_of(DeadProducer()), transaction_of(DeadProducer())]
    first, second, third = writer.begin(), writer.begin(), writer.begin()
    assert first is third
    assert first is not second
    used, ended = threading.Event(), threading.Event()

    def last_use() -> None:
        used.wait()

    writer._producers = Dropped(ended)  # type: ignore[assignment]
    writer.destroy(last_use)
    assert not ended.is_set()
    first.check()  # the commit thread may still be in a call
    used.set()
    assert ended.wait(20)
    for transaction in (first, second):
        with pytest.raises(AssertionError, match="its session is over"):
            transaction.check()
        with pytest.raises(AssertionError, match="after its session had ended"):
            transaction.produce("out", b"value", b"key", 5)


class IdempotentProducer:
    """Acknowledges everything at once."""

    def __len__(self) -> int:
        return 0

    def poll(self, _timeout_s: float) -> int:
        return 0

    def flush(self, _timeout_s: float) -> int:
        return 0

    def purge(self) -> None:
        return None

    def produce(self, *_arguments: object, **_named: object) -> None:
        return None


def at_least_once_writer(monkeypatch: pytest.MonkeyPatch) -> tuple[AtLeastOnceWriter, threading.Event]:
    """A writer that isn't open yet, and an event that is set when its producer is destroyed."""
    settings, waits, destroyed = Settings(), KafkaWaits(Watchdog()), threading.Event()

    def make(*_arguments: object, **_named: object) -> IdempotentProducer:
        producer = IdempotentProducer()
        weakref.finalize(producer, destroyed.set)
        return producer

    monkeypatch.setattr(transactions, "make_producer", make)
    batches = Batches(settings, lambda _topic: None)
    return AtLeastOnceWriter(settings, object(), batches, waits), destroyed  # type: ignore[arg-type]


def test_producer_at_least_once_is_destroyed_after_the_commit_threads_last_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer, destroyed = at_least_once_writer(monkeypatch)
    writer.open()
    done = threading.Event()
    writer.destroy(done.wait)
    writer.prepare(FrozenEpoch(1, 1, []), AwaitedOutputs.none())  # the commit thread still uses it
    assert not destroyed.is_set()
    done.set()
    assert destroyed.wait(20)
    with pytest.raises(AssertionError, match="its session is over"):
        writer.serve(send=False)
    with pytest.raises(AssertionError, match="after its session had ended"):
        writer.produce("out", b"value", b"key", 5)


def test_session_that_is_over_before_its_writer_is_open_leaves_no_producer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer, destroyed = at_least_once_writer(monkeypatch)
    opened = threading.Event()
    writer.destroy(opened.wait)
    writer.open()
    opened.set()
    assert destroyed.wait(20)
    with pytest.raises(AssertionError, match="after its session had ended"):
        writer.produce("out", b"value", b"key", 5)


class Dropped(list[object]):
    """Sets an event when it is cleared."""

    def __init__(self, emptied: threading.Event) -> None:
        super().__init__()
        self._emptied = emptied

    def clear(self) -> None:
        super().clear()
        self._emptied.set()
