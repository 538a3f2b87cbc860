"""The model of Kafka behaves like Kafka: what is visible when, who is fenced, how an unknown commit can
end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.kafka_model import Busy, Fenced, KafkaModel

P, Q, SOURCE = ("out", 0), ("out", 1), ("in", 0)


def visible(kafka: KafkaModel) -> list[object]:
    return [value for _, value in kafka.read_committed(P, 0, 100)[0]]


def test_records_are_visible_once_their_transaction_is_committed() -> None:
    kafka = KafkaModel()
    producer = kafka.init_producer("a")
    kafka.append(producer, [(P, 1), (P, 2)], 0)
    assert visible(kafka) == []
    kafka.commit(producer)
    assert visible(kafka) == [1, 2]
    assert kafka.end_offset(P) == 3  # the marker takes an offset


def test_open_transaction_holds_back_what_comes_after_it() -> None:
    kafka = KafkaModel()
    first, second = kafka.init_producer("a"), kafka.init_producer("b")
    kafka.append(first, [(P, 1)], 0)
    kafka.append(second, [(P, 2)], 0)
    kafka.commit(second)
    assert visible(kafka) == []
    kafka.abort(first)
    assert visible(kafka) == [2]


def test_new_life_of_an_id_aborts_and_fences_the_old_one() -> None:
    kafka = KafkaModel()
    old = kafka.init_producer("a")
    kafka.append(old, [(P, 1)], 0)
    kafka.send_offsets(old, {SOURCE: (5, "m")}, 0)
    kafka.init_producer("a")
    for call in (lambda: kafka.commit(old), lambda: kafka.append(old, [(P, 2)], 0)):
        with pytest.raises(Fenced):
            call()
    assert visible(kafka) == []
    assert kafka.committed(SOURCE) is None
    assert not kafka.offset_pending(SOURCE)


def test_offsets_are_pending_until_the_marker_reaches_the_group() -> None:
    later: list[Callable[[], None]] = []
    kafka = KafkaModel(marker_delay_ms=lambda: 5, defer=lambda _, action: later.append(action))
    producer = kafka.init_producer("a")
    kafka.append(producer, [(P, 1), (Q, 1)], 0)
    kafka.send_offsets(producer, {SOURCE: (5, "m")}, 0)
    kafka.commit(producer)
    assert kafka.offset_pending(SOURCE)
    assert visible(kafka) == []
    with pytest.raises(Busy):
        kafka.append(producer, [(P, 2)], 0)
    with pytest.raises(Busy):
        kafka.init_producer("a")
    while later:
        later.pop()()
    assert kafka.committed(SOURCE) == (5, "m")
    assert visible(kafka) == [1]
    assert kafka.unfinished() == []
    assert kafka.init_producer("a").producer_epoch == 1


def test_of_two_offsets_the_one_sent_later_stays_whatever_marker_comes_first() -> None:
    later: list[Callable[[], None]] = []
    kafka = KafkaModel(marker_delay_ms=lambda: 5, defer=lambda _, action: later.append(action))
    for name, offset in (("a", 5), ("b", 9)):
        producer = kafka.init_producer(name)
        kafka.send_offsets(producer, {SOURCE: (offset, "m")}, 0)
        kafka.commit(producer)
    for action in reversed(later):
        action()
    assert kafka.committed(SOURCE) == (9, "m")


def test_transaction_beyond_its_timeout_is_aborted_and_its_producer_fenced() -> None:
    later: list[Callable[[], None]] = []
    kafka = KafkaModel(expire_later=lambda _, action: later.append(action))
    producer = kafka.init_producer("a")
    kafka.append(producer, [(P, 1)], 0)
    later.pop()()
    with pytest.raises(Fenced):
        kafka.commit(producer)
    assert kafka.last_stable_offset(P) == 2


def test_commit_repeated_after_its_answer_was_lost_changes_nothing() -> None:
    kafka = KafkaModel()
    producer = kafka.init_producer("a")
    kafka.append(producer, [(P, 1)], 0)
    kafka.commit(producer)
    kafka.commit(producer)
    assert kafka.end_offset(P) == 2


def test_journal_accepts_writes_of_its_last_writer_only() -> None:
    journal = KafkaModel().journal
    old = journal.begin()
    journal.write(old, {"a": 1, "b": 2})
    new = journal.begin()
    with pytest.raises(Fenced):
        journal.write(old, {"a": 3})
    journal.write(new, {"b": None})
    assert journal.entries == {"a": 1}
