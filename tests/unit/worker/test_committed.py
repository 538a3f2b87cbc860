"""Old committed offsets from a coordinator that is cut off aren't trusted; offsets that were set back are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from fcluster.common.positions import CommittedPosition
from fcluster.worker.committed import CommittedOffsets

AT, OTHER = TopicPartition("in", 0), TopicPartition("in", 1)


class Reader:
    """A client that always asks the same broker."""

    def __init__(self, offsets: dict[TopicPartition, int]) -> None:
        self.offsets = offsets
        self.asked = 0
        self.closed = False

    def committed(self, wanted: Sequence[TopicPartition], timeout: float) -> list[TopicPartition]:
        assert not self.closed
        self.asked += 1
        answers: list[TopicPartition] = []
        for at in wanted:
            offset = self.offsets.get(TopicPartition(at.topic, at.partition))
            metadata = CommittedPosition(offset, 3, 3, "print").encode_metadata() if offset else ""
            answers.append(TopicPartition(at.topic, at.partition, offset or -1001, metadata))
        return answers

    def close(self) -> None:
        self.closed = True


class Brokers:
    """Makes clients one after another, each with the next of these answers. Later ones give the last
    answer."""

    def __init__(self, *answers: dict[TopicPartition, int]) -> None:
        self.readers: list[Reader] = []
        self._answers = list(answers)

    def make(self) -> Any:
        answer = self._answers[min(len(self.readers), len(self._answers) - 1)]
        self.readers.append(Reader(answer))
        return self.readers[-1]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcluster.worker.committed.PAUSE_S", 0.001)


def offsets_of(brokers: Brokers, old_answers_s: float = 30.0) -> CommittedOffsets:
    return CommittedOffsets("job", brokers.make, threading.Event(), old_answers_s)


def read(offsets: CommittedOffsets, *wanted: TopicPartition) -> list[int | None]:
    found = offsets.read(wanted)
    return [None if (position := found[at]) is None else position.offset for at in wanted]


def test_answer_that_includes_what_was_reported_is_accepted_at_once() -> None:
    brokers = Brokers({AT: 7})
    offsets = offsets_of(brokers)
    offsets.reported("in", 0, 7)
    assert read(offsets, AT, OTHER) == [7, None]
    assert [reader.asked for reader in brokers.readers] == [1]


@pytest.mark.parametrize("old", [{AT: 5, OTHER: 9}, {OTHER: 9}])
def test_other_brokers_are_asked_if_an_answer_is_older_than_what_was_reported(
    old: dict[TopicPartition, int],
) -> None:
    brokers = Brokers(old, old, {AT: 8, OTHER: 9})
    offsets = offsets_of(brokers)
    offsets.reported("in", 0, 7)
    assert read(offsets, AT, OTHER) == [8, 9]
    assert [reader.closed for reader in brokers.readers] == [True, True, False]
    assert read(offsets, OTHER) == [9], "the reader with the right answer is kept"
    assert len(brokers.readers) == 3


def test_reports_about_other_partitions_do_not_matter() -> None:
    brokers = Brokers({OTHER: 9})
    offsets = offsets_of(brokers)
    offsets.reported("in", 0, 7)
    assert read(offsets, OTHER) == [9]
    assert len(brokers.readers) == 1


def test_offsets_that_were_set_back_according_to_all_brokers_are_accepted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    offsets = offsets_of(Brokers({AT: 2}), old_answers_s=0.05)
    offsets.reported("in", 0, 7)
    assert read(offsets, AT) == [2]
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "set back from outside: the answer for in/0 is offset 2, but 7 is committed" in said.message
    assert read(offsets, AT) == [2], "and accepted from then on"
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_worker_that_stops_waits_for_no_other_broker() -> None:
    stopping = threading.Event()
    offsets = CommittedOffsets("job", Brokers({AT: 2}).make, stopping)
    offsets.reported("in", 0, 7)
    stopping.set()
    assert read(offsets, AT) == [2]
