from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from fcluster.kafka.topic_ids import Look, TopicReplaced, TopicSeen
from fcluster.worker.source_checks import ANSWER_TIMEOUT_S, PAUSE_S, SourceChecks


@dataclass
class Brokers:
    now_s: float = 100.0
    answer: Look | Exception = field(default_factory=dict)
    settled: Look = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    def checks(self) -> SourceChecks:
        return SourceChecks("job", self.look, lambda _expected: self.settled, lambda: self.now_s)

    def look(self, topics: Iterable[str]) -> Future[Look]:
        self.asked.append(sorted(topics))
        future: Future[Look] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return future


def test_steady_records_need_no_check() -> None:
    brokers = Brokers(answer={"in": TopicSeen("former", 2)})
    checks = brokers.checks()
    for _ in range(20):
        checks.read("in", 0, "former")
        checks.begin()()
        brokers.now_s += PAUSE_S / 2
    assert brokers.asked == [["in"]], "the first one only"


def test_answer_is_waited_for_from_the_barrier_on_not_from_the_end_of_the_epochs_own_requests() -> None:
    """When a broker goes away, the check may wait for that broker."""
    brokers = Brokers()
    unanswered = Future[Look]()
    checks = SourceChecks("job", lambda _topics: unanswered, lambda _settled: {}, lambda: brokers.now_s)
    checks.read("in", 0, "former")
    confirm = checks.begin()
    brokers.now_s += ANSWER_TIMEOUT_S
    begun_s = time.monotonic()
    confirm()
    assert time.monotonic() - begun_s < ANSWER_TIMEOUT_S / 2


def test_quiet_partition_beside_a_busy_one_is_checked() -> None:
    brokers = Brokers(answer={"in": TopicSeen("former", 2)})
    checks = brokers.checks()
    for partition in (0, 1):
        checks.read("in", partition, "former")
    checks.begin()()
    for _ in range(4):
        brokers.now_s += PAUSE_S / 2
        checks.read("in", 0, "former")
    checks.begin()()
    assert len(brokers.asked) == 1
    checks.read("in", 1, "former")
    checks.begin()()
    assert len(brokers.asked) == 2


def test_epoch_with_records_of_another_topic_is_not_prepared() -> None:
    now = {"in": TopicSeen("new", 2)}
    brokers = Brokers(answer=now, settled=now)
    checks = brokers.checks()
    checks.read("in", 0, "former")
    with pytest.raises(TopicReplaced, match="Nothing of the new topic is committed"):
        checks.begin()()


@pytest.mark.parametrize(
    ("answer", "settled"),
    [
        ({}, {}),
        ({"in": None}, {}),
        ({"in": TopicSeen("", 1)}, {}),
        (TimeoutError(), {}),
        ({"in": TopicSeen("lagging", 2)}, {"in": TopicSeen("former", 2)}),
        ({"in": TopicSeen("lagging", 2)}, {}),
    ],
)
def test_unknown_answers_are_no_objection(answer: Look | Exception, settled: Look) -> None:
    brokers = Brokers(answer=answer, settled=settled)
    checks = brokers.checks()
    checks.read("in", 0, "former")
    checks.begin()()


def test_source_without_an_id_is_not_checked_and_a_new_session_starts_again() -> None:
    brokers = Brokers(answer={"in": TopicSeen("former", 2)})
    checks = brokers.checks()
    checks.read("in", 0, "")
    checks.begin()()
    assert brokers.asked == []
    checks.forget()
    checks.read("in", 0, "former")
    checks.begin()()
    assert brokers.asked == [["in"]]
