"""What producers raise, and that it ends in a replay, never in the worker's end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.worker.kafka_waits import KafkaWaits
from fcluster.worker.transactions import (
    AtLeastOnceWriter,
    FrozenEpoch,
    ShardEpoch,
    TransactionalWriter,
    TransactionLostError,
    flush,
)
from fcluster.worker.watchdog import Watchdog

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


def plainly() -> None:
    raise FENCED


def with_a_callback_on_top() -> None:
    """As the client does if a log line is due in the call in which a fatal error was found."""
    try:
        raise FENCED
    except KafkaException as error:
        raise SystemError("<class 'logging.LogRecord'> returned a result with an exception set") from error


@pytest.mark.parametrize("fail", [plainly, with_a_callback_on_top])
def test_fatal_error_of_a_producer_is_a_lost_transaction_wherever_it_shows(fail: Callable[[], None]) -> None:
    producer = FailingProducer(fail)
    with pytest.raises(TransactionLostError, match=r"flushing: .*_FENCED"):
        flush(producer, KafkaWaits(Watchdog()))  # type: ignore[arg-type]
    writer = TransactionalWriter.__new__(TransactionalWriter)
    writer._producers, writer._turn = [producer], 0  # type: ignore[list-item]
    with pytest.raises(TransactionLostError, match="_FENCED"):
        writer.serve(send=False)


class RefusedProducer(FailingProducer):
    """A transaction that has failed of one batch, and never sends the others."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def flush(self, _timeout_s: float) -> int:
        return 4

    def begin_transaction(self) -> None:
        text = "ProduceRequest for small [0] with 9 message(s) failed: Broker: Message size too large"
        raise KafkaException(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, text))


class SlowProducer(RefusedProducer):
    """A healthy transaction, whose records are acknowledged in the third look."""

    looks = 0

    def flush(self, _timeout_s: float) -> int:
        self.looks += 1
        return 3 - self.looks

    def begin_transaction(self) -> None:
        text = "Operation not valid in state InTransaction"
        raise KafkaException(KafkaError(KafkaError._STATE, text))


def writer_with(producer: object) -> TransactionalWriter:
    writer = TransactionalWriter.__new__(TransactionalWriter)
    writer._producers, writer._turn = [producer], 0  # type: ignore[list-item]
    writer._waits = KafkaWaits(Watchdog())
    return writer


@pytest.mark.parametrize("wait", [TransactionalWriter.flush_outputs, TransactionalWriter.check])
def test_nobody_waits_for_records_of_a_transaction_that_has_failed(
    wait: Callable[[TransactionalWriter], None],
) -> None:
    with pytest.raises(TransactionLostError, match="too large") as raised:
        wait(writer_with(RefusedProducer()))
    failure = raised.value.failure()
    assert failure is not None
    assert failure.topic == "small"


class SilentProducer(SlowProducer):
    """Its records are never acknowledged: their topic is gone."""

    def flush(self, _timeout_s: float) -> int:
        return 1


@pytest.mark.parametrize("kind", [TransactionalWriter, AtLeastOnceWriter])
def test_acknowledgements_that_never_come_are_not_waited_for_once_the_job_is_over(kind: type[Any]) -> None:
    writer = kind.__new__(kind)
    writer._producers, writer._turn, writer._producer = [SilentProducer()], 0, SilentProducer()
    writer._waits = KafkaWaits(Watchdog())
    writer._waits.in_vain = True
    with pytest.raises(TransactionLostError, match="the job is over"):
        writer.flush_outputs()


def test_records_of_a_healthy_transaction_are_waited_for() -> None:
    producer = SlowProducer()
    writer = writer_with(producer)
    writer.flush_outputs()
    writer.check()
    assert producer.looks == 3


def test_system_error_of_another_kind_stays_one() -> None:
    def fail() -> None:
        raise SystemError("something else")

    with pytest.raises(SystemError):
        flush(FailingProducer(fail), KafkaWaits(Watchdog()))  # type: ignore[arg-type]


def test_refusal_that_no_replay_changes_names_topic_and_remedy() -> None:
    text = "committing epoch 3: ProduceRequest for mine [0] with 1 message(s) failed: not authorized"
    error = TransactionLostError(text, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert "remedy: Let the job's Kafka user write to mine (docs" in error.refusal(["other"])
    assert error.failure() is None


def test_refusal_of_a_transaction_that_does_not_say_of_which_topic_names_those_that_it_may_be() -> None:
    text = "flushing: Failed to add partition(s) to transaction: not authorized"
    error = TransactionLostError(text, KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert "write to a or b (docs" in error.refusal(["b", "a"])
    assert "write to a0 or a1 or a2 or a3 or a4 or ... (docs" in error.refusal([f"a{n}" for n in range(9)])


def test_refused_record_is_no_reason_to_stop_before_it_is_found() -> None:
    text = "committing epoch 3: ProduceRequest for small [0] with 1 message(s) failed: Message size too large"
    error = TransactionLostError(text, KafkaError.MSG_SIZE_TOO_LARGE)
    failure = error.failure()
    assert error.refusal([]) == ""
    assert failure is not None
    assert (failure.topic, failure.step) == ("small", "")
    assert "'small'" in failure.reason
    assert "Message size too large" in failure.reason
    assert "remedy: Raise max.message.bytes of small" in failure.reason


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
def test_what_is_not_known_to_pass_is_unexpected(code: int | None, unexpected: bool) -> None:
    assert TransactionLostError("gone", code).is_unexpected() is unexpected


@pytest.mark.parametrize("code", [None, KafkaError._FENCED, KafkaError._TIMED_OUT, KafkaError._TRANSPORT])
def test_trouble_that_passes_is_no_refusal(code: int | None) -> None:
    assert TransactionLostError("committing epoch 3: gone", code).refusal([]) == ""


class DeadProducer:
    """Takes nothing any more, as after a fatal error."""

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


def test_failure_keeps_no_producer_that_the_collector_would_destroy_in_any_thread() -> None:
    delta = ShardEpoch(ShardId("in", 0), ["in"], CommittedPosition(1, 1, 1, "f"), "log", [b"delta"])
    with no_collector():
        producer = DeadProducer()
        gone = weakref.ref(producer)
        writer = TransactionalWriter.__new__(TransactionalWriter)
        writer._producers, writer._turn = [producer], 0  # type: ignore[list-item]
        with pytest.raises(TransactionLostError, match="_FENCED") as raised:
            writer.begin()("out", b"value", b"key", 5)
        del raised
        writer._sealed = producer  # type: ignore[assignment]
        with pytest.raises(TransactionLostError, match="_FENCED") as raised:
            writer.prepare(FrozenEpoch(1, 1, [delta]))
        del raised
        writer._producers, writer._sealed = [], None
        del producer
        assert gone() is None
