"""The journal after Kafka has forgotten its transactional id, which is different from another leader; and a
write that waits for Kafka.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, KafkaException

from fcluster.coordinator.journal import DeposedError, Journal, JournalLostError

FORGOTTEN = KafkaError(KafkaError.INVALID_PRODUCER_ID_MAPPING, "not assigned", txn_requires_abort=True)
TIMED_OUT = KafkaError(KafkaError._TIMED_OUT, "call it again", retriable=True)
FENCED = KafkaError(KafkaError._FENCED, "fenced by a newer instance", fatal=True)


class FakeProducer:
    """Raises these errors, one after another, in commits or aborts."""

    def __init__(self, *, commits: list[KafkaError | None], aborts: list[KafkaError | None]) -> None:
        self._commits, self._aborts = commits, aborts
        self.written: list[bytes] = []
        self._open: list[bytes] = []

    def begin_transaction(self) -> None:
        self._open = []

    def produce(self, topic: str, *, key: bytes, value: bytes | None, partition: int) -> None:
        self._open.append(key)

    def commit_transaction(self, timeout_s: float) -> None:
        self._raise(self._commits.pop(0))
        self.written += self._open

    def abort_transaction(self, timeout_s: float) -> None:
        self._raise(self._aborts.pop(0))

    def _raise(self, error: KafkaError | None) -> None:
        if error is not None:
            raise KafkaException(error)


class FakeRelief:
    def __init__(self) -> None:
        self.waited_s: list[float] = []

    def waited(self, waited_s: float) -> None:
        self.waited_s.append(waited_s)


def journal(producer: FakeProducer, *, is_ours: bool = True, relief: FakeRelief | None = None) -> Journal:
    made = Journal(cast(Any, producer), "job-journal", cast(Any, relief))
    made.is_ours = lambda: is_ours
    return made


def test_forgotten_id_is_initialised_again_and_the_entries_are_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    producer = FakeProducer(commits=[FORGOTTEN, None], aborts=[None])
    with caplog.at_level("INFO", "fcluster"):
        journal(producer).write({"a": 1, "b": 2})
    assert producer.written == [b"a", b"b"]
    assert "Kafka had forgotten the transactional id of the journal job-journal" in caplog.text


def test_forgotten_id_that_another_leader_has_taken_is_a_deposition() -> None:
    producer = FakeProducer(commits=[FORGOTTEN], aborts=[FENCED])
    with pytest.raises(DeposedError):
        journal(producer).write({"a": 1})
    assert producer.written == []


def test_forgotten_id_of_a_leader_whose_successor_was_forgotten_too_is_a_deposition() -> None:
    # Both were idle for longer than the brokers remember, so only the term in the journal shows it.
    producer = FakeProducer(commits=[FORGOTTEN, None], aborts=[None])
    with pytest.raises(DeposedError, match="another coordinator has written"):
        journal(producer, is_ours=False).write({"a": 1})
    assert producer.written == []


def test_fenced_write_is_a_deposition_and_is_not_retried() -> None:
    producer = FakeProducer(commits=[FENCED], aborts=[])
    with pytest.raises(DeposedError):
        journal(producer).write({"a": 1})


def test_write_with_an_unknown_outcome_is_neither_deposition_nor_retried() -> None:
    producer = FakeProducer(commits=[KafkaError(KafkaError._STATE, "?")], aborts=[])
    with pytest.raises(JournalLostError) as caught:
        journal(producer).write({"a": 1})
    assert not isinstance(caught.value, DeposedError)


def test_write_that_waits_for_kafka_is_resumed_and_relief_is_told() -> None:
    relief = FakeRelief()
    producer = FakeProducer(commits=[TIMED_OUT, TIMED_OUT, None], aborts=[])
    journal(producer, relief=relief).write({"a": 1})
    assert producer.written == [b"a"]
    assert len(relief.waited_s) == 2
    assert relief.waited_s == sorted(relief.waited_s)


def test_abort_that_waits_for_kafka_is_resumed_and_relief_is_told() -> None:
    relief = FakeRelief()
    producer = FakeProducer(commits=[FORGOTTEN, None], aborts=[TIMED_OUT, None])
    journal(producer, relief=relief).write({"a": 1})
    assert producer.written == [b"a"]
    assert len(relief.waited_s) == 1


def test_write_that_waits_beyond_its_limit_has_an_unknown_outcome() -> None:
    producer = FakeProducer(commits=[TIMED_OUT], aborts=[])
    with pytest.raises(JournalLostError) as caught:
        journal(producer).write({"a": 1}, timeout_s=0.0)
    assert not isinstance(caught.value, DeposedError)
