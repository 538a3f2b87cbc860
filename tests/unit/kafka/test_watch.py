"""What of Kafka a job waits for: what is told of it, and when."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fcluster.common.errors import KafkaUnavailable
from fcluster.common.settings import Settings
from fcluster.kafka import watch as kafka_watch
from fcluster.kafka.watch import (
    HIDDEN_AFTER_S,
    OFFSETS_TOPIC,
    SENTENCE_CHARACTERS_MAX,
    TRANSACTIONS_TOPIC,
    Concern,
    Ends,
    KafkaWatch,
    Look,
    PartitionSeen,
    Troubles,
    home_of,
)
from tests.brokers import java_hash

CONCERN = Concern(frozenset({"in", "out"}), "job", ("job-slot-0-0",))
WELL = PartitionSeen(1, (1, 2, 3), (1, 2, 3))
ALL = frozenset({1, 2, 3})
WHOLE = Look("", ALL, {("in", 0): WELL, ("out", 0): WELL, ("others", 0): WELL})


def told(*looks: Look, concern: Concern = CONCERN, every_s: float = 1.0) -> list[str]:
    """The sentences after these looks."""
    troubles = Troubles()
    for number, look in enumerate(looks):
        troubles.learn(look, concern, number * every_s)
    return troubles.sentences((len(looks) - 1) * every_s)


def with_partition(place: tuple[str, int], seen: PartitionSeen, look: Look = WHOLE) -> Look:
    return replace(look, partitions={**look.partitions, place: seen})


def test_whole_cluster_is_nothing_to_tell() -> None:
    assert told(WHOLE) == []


def test_partition_without_a_leader_is_named_with_its_age() -> None:
    look = with_partition(("in", 0), PartitionSeen(-1, (1,), (1,)))
    assert told(look, look, look) == ["waiting for Kafka: partition in/0 has no leader (2 s)"]


def test_leader_that_is_not_among_the_brokers_is_none() -> None:
    look = replace(WHOLE, brokers=frozenset({2, 3}))
    said = told(look)
    assert "partition in/0 has no leader; partition out/0 has no leader (0 s)" in said[0]
    assert said[1] == "waiting for Kafka: broker 1 is down (0 s)"


def test_partitions_of_others_are_nobody_elses_concern() -> None:
    assert told(with_partition(("others", 0), PartitionSeen(-1, (7,), ()))) == []


def test_too_few_replicas_in_sync_are_told_where_the_minimum_is_known() -> None:
    look = with_partition(("out", 0), PartitionSeen(1, (1, 2, 3), (1,)))
    assert told(look) == []
    [said] = told(replace(look, in_sync_min={"out": 2}))
    assert "partition out/0 has 1 of 3 replicas in sync and needs 2 (0 s)" in said
    single = with_partition(("out", 0), PartitionSeen(1, (1,), (1,)))
    assert told(replace(single, in_sync_min={"out": 2})) == [], "Kafka asks for no more than there are"


def test_coordinators_without_a_broker_are_told_by_what_they_keep() -> None:
    offsets, transactions = (
        (OFFSETS_TOPIC, home_of("job", 50)),
        (TRANSACTIONS_TOPIC, home_of("job-slot-0-0", 50)),
    )
    look = WHOLE
    for topic in (OFFSETS_TOPIC, TRANSACTIONS_TOPIC):
        for number in range(50):
            leaderless = (topic, number) in (offsets, transactions)
            seen = PartitionSeen(-1, (1, 2), (1,)) if leaderless else WELL
            look = with_partition((topic, number), seen, look)
    [said] = told(look)
    assert f"{OFFSETS_TOPIC}/{offsets[1]}, with the job's committed offsets, has no leader" in said
    assert f"{TRANSACTIONS_TOPIC}/{transactions[1]}, with the transactions of job-slot-0-0, has no" in said


@pytest.mark.parametrize("name", ["job", "carrier-delays", "grüße-😀", "", "x" * 300])
def test_home_of_a_group_is_where_kafka_keeps_it(name: str) -> None:
    assert home_of(name, 50) == (java_hash(name) & 0x7FFF_FFFF) % 50


def test_silent_brokers_keep_what_was_known_before() -> None:
    leaderless = with_partition(("in", 0), PartitionSeen(-1, (1,), (1,)))
    silent = Look(silent="no broker answers at host:9092")
    said = told(leaderless, silent, silent)
    assert said == [
        "waiting for Kafka: no broker answers at host:9092 (1 s)",
        "waiting for Kafka: partition in/0 has no leader (2 s)",
    ]


def test_many_partitions_are_one_bounded_sentence() -> None:
    look = WHOLE
    for number in range(5_000):
        look = with_partition((f"{'i' * 200}n", number), PartitionSeen(-1, (1,), (1,)), look)
    concern = Concern(frozenset({f"{'i' * 200}n"}), "job")
    [said] = told(look, concern=concern)
    assert len(said) < SENTENCE_CHARACTERS_MAX + 50
    few = with_partition(("in", 0), PartitionSeen(-1, (1,), (1,)))
    for number in range(1, 9):
        few = with_partition(("in", number), PartitionSeen(-1, (1,), (1,)), few)
    assert told(few)[0].endswith("; and 5 more (0 s)")


def test_each_kind_of_trouble_begins_once_and_ends_once() -> None:
    troubles = Troubles()
    one = with_partition(("in", 0), PartitionSeen(-1, (1,), (1,)))
    two = with_partition(("out", 0), PartitionSeen(-1, (1,), (1,)), one)
    begun, over = troubles.learn(one, CONCERN, 0)
    assert (begun, over) == (["partition in/0 has no leader (0 s)"], [])
    assert troubles.learn(two, CONCERN, 5) == ([], [])
    assert troubles
    begun, over = troubles.learn(WHOLE, CONCERN, 9)
    assert begun == []
    assert over == ["partition in/0 has no leader; partition out/0 has no leader (9 s)"]
    assert troubles.sentences(9) == []


# --- ends of transactions that Kafka has lost --------------------------------------------------------------

PLACE = ("out", 0)
LEADERLESS = with_partition(PLACE, PartitionSeen(-1, (1,), (1,)))
HIDES = "partition out/0 hides offsets 27 and later from readers of committed records"
WHY = "a transaction there is still open, or Kafka has lost its end (KAFKA-20734, docs/kafka.md)"


def with_ends(stable: int, last: int) -> Look:
    return replace(WHOLE, ends={PLACE: Ends(stable, last)})


def suspecting() -> Troubles:
    """After a look at second 0 at which the partition had no leader."""
    troubles = Troubles()
    troubles.learn(LEADERLESS, CONCERN, 0)
    return troubles


def test_partition_that_had_no_leader_is_suspected_until_all_in_it_is_settled() -> None:
    troubles = Troubles()
    troubles.learn(WHOLE, CONCERN, 0)
    assert troubles.suspects == frozenset()
    troubles.learn(LEADERLESS, CONCERN, 1)
    assert troubles.suspects == {PLACE}
    assert troubles.learn(WHOLE, CONCERN, 2)[0] == [], "its ends aren't known yet"
    assert troubles.learn(with_ends(27, 52), CONCERN, 3) == ([], [])
    assert troubles.sentences(3) == []
    assert troubles, "it has to be looked at again"
    troubles.learn(with_ends(52, 60), CONCERN, 4)
    assert not troubles, "what came later belongs to other transactions"


def test_offsets_that_stay_hidden_are_named_until_they_are_seen() -> None:
    troubles = suspecting()
    troubles.learn(with_ends(27, 52), CONCERN, 5)
    assert troubles.learn(with_ends(27, 60), CONCERN, 5 + HIDDEN_AFTER_S - 0.1) == ([], [])
    begun, over = troubles.learn(with_ends(27, 70), CONCERN, 5 + HIDDEN_AFTER_S)
    assert (begun, over) == ([f"{HIDES} (10 s): {WHY}"], [])
    assert troubles.learn(with_ends(27, 80), CONCERN, 20) == ([], [])
    assert troubles.sentences(20) == [f"waiting for Kafka: {HIDES} (15 s): {WHY}"]
    assert troubles.learn(with_ends(79, 80), CONCERN, 21) == ([], [f"{HIDES} (16 s)"])
    assert not troubles


def test_each_transaction_that_hides_records_has_its_own_time() -> None:
    troubles = suspecting()
    troubles.learn(with_ends(27, 52), CONCERN, 0)
    troubles.learn(with_ends(27, 52), CONCERN, 30)
    _, over = troubles.learn(with_ends(40, 52), CONCERN, 31)
    assert over == [f"{HIDES} (31 s)"]
    assert troubles.suspects == {PLACE}
    [later], _ = troubles.learn(with_ends(40, 52), CONCERN, 31 + HIDDEN_AFTER_S)
    assert "hides offsets 40 and later" in later


def test_unknown_ends_and_silent_brokers_keep_what_was_known() -> None:
    troubles = suspecting()
    troubles.learn(with_ends(27, 52), CONCERN, 0)
    troubles.learn(WHOLE, CONCERN, 30)
    assert troubles.sentences(30) == []
    troubles.learn(with_ends(27, 52), CONCERN, 31)
    troubles.learn(WHOLE, CONCERN, 32)
    troubles.learn(Look(silent="no broker answers at host:9092"), CONCERN, 33)
    assert troubles.sentences(33) == [
        "waiting for Kafka: no broker answers at host:9092 (0 s)",
        f"waiting for Kafka: {HIDES} (33 s): {WHY}",
    ]


def test_partition_that_loses_its_leader_again_is_measured_anew() -> None:
    troubles = suspecting()
    troubles.learn(with_ends(27, 52), CONCERN, 0)
    troubles.learn(LEADERLESS, CONCERN, 5)
    troubles.learn(with_ends(55, 70), CONCERN, 6)
    assert troubles.suspects == {PLACE}, "another transaction may have ended meanwhile"


def test_partition_that_has_lost_its_last_records_is_settled_at_its_end() -> None:
    troubles = suspecting()
    troubles.learn(with_ends(27, 52), CONCERN, 0)
    troubles.learn(with_ends(30, 30), CONCERN, 1)
    assert not troubles


def test_only_the_jobs_own_topics_are_suspected() -> None:
    look = with_partition(("others", 0), PartitionSeen(-1, (1,), (1,)))
    for number in range(50):
        look = with_partition((OFFSETS_TOPIC, number), PartitionSeen(-1, (1,), (1,)), look)
    troubles = Troubles()
    troubles.learn(look, CONCERN, 0)
    assert troubles
    assert troubles.suspects == frozenset()


def test_ends_are_asked_for_only_where_there_is_a_leader_and_may_stay_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[list[tuple[str, int]], str]] = []
    answers: list[int] = [27, 52]

    def ends(_: object, partitions: Any, isolation: str, timeout_s: float) -> dict[Any, int]:
        asked.append(([(at.topic, at.partition) for at in partitions], isolation))
        if not answers:
            raise KafkaUnavailable("A request to Kafka failed.", remedy="Check the brokers.")
        return dict.fromkeys(partitions, answers.pop(0))

    with_leader, without = (SimpleNamespace(leader=leader, replicas=[1], isrs=[1]) for leader in (1, -1))
    topic = SimpleNamespace(partitions={0: with_leader, 1: without})
    metadata = SimpleNamespace(brokers={1: None}, topics={"out": topic})

    class Brokers:
        def list_topics(self, timeout: float) -> Any:
            return metadata

        def describe_configs(self, *_: object, **__: object) -> dict[Any, Any]:
            return {}

    brokers: Any = Brokers()
    monkeypatch.setattr(kafka_watch, "end_offsets", ends)
    watch = KafkaWatch(Settings(bootstrap_servers="localhost:1"), lambda: CONCERN, lambda _: None)
    suspects = frozenset({("out", 0), ("out", 1), ("in", 7)})
    assert watch.look(brokers, CONCERN, suspects).ends == {("out", 0): Ends(27, 52)}
    assert asked == [([("out", 0)], "read-committed"), ([("out", 0)], "read-uncommitted")]
    assert watch.look(brokers, CONCERN, suspects).ends == {}
    assert watch.look(brokers, CONCERN).ends == {}
    assert len(asked) == 3


# --- the thread -----------------------------------------------------------------------------------------


class Watched(KafkaWatch):
    """Sees what the test says."""

    def __init__(self) -> None:
        self.sights = [WHOLE]
        self.looks = 0
        self.said: list[list[str]] = []
        self.suspects: list[frozenset[tuple[str, int]]] = []
        self.looked = threading.Condition()
        super().__init__(
            Settings(bootstrap_servers="localhost:1"), lambda: CONCERN, lambda said: self.said.append([*said])
        )

    def look(self, admin: Any, concern: Concern, suspects: frozenset[tuple[str, int]] = frozenset()) -> Look:
        with self.looked:
            self.looks += 1
            self.suspects.append(suspects)
            self.looked.notify_all()
            return self.sights[-1]

    def wait_looks(self, more: int) -> None:
        with self.looked:
            wanted = self.looks + more
            assert self.looked.wait_for(lambda: self.looks >= wanted, 20)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kafka_watch, "LOOK_INTERVAL_S", 0.01)
    watch = Watched()
    yield watch
    watch.close()


def test_nobody_is_asked_while_nothing_waits(watch: Watched) -> None:
    watch.note(waiting=False)
    assert watch.looks == 0
    watch.note(waiting=True)
    watch.wait_looks(3)
    watch.note(waiting=False)
    deadline_s = time.monotonic() + 10
    while True:  # one may be under way
        seen = watch.looks
        time.sleep(0.1)
        if watch.looks == seen:
            break
        assert time.monotonic() < deadline_s
    assert watch.said == []


def test_trouble_is_looked_at_until_it_is_over_and_logged_at_its_ends(
    watch: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fcluster.coordinator")
    watch.sights.append(with_partition(("in", 0), PartitionSeen(-1, (1,), (1,))))
    watch.note(waiting=True)
    watch.wait_looks(3)
    watch.note(waiting=False)  # the epoch gave up; the partition is still without a leader
    watch.wait_looks(3)
    assert watch.said[-1] == ["waiting for Kafka: partition in/0 has no leader (0 s)"]
    watch.sights.append(WHOLE)
    watch.wait_looks(1)
    deadline_s = time.monotonic() + 10
    while watch.said[-1]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for Kafka: partition in/0 has no leader (0 s)",
        "Kafka has recovered: no longer partition in/0 has no leader (0 s)",
    ]


def test_suspected_partition_is_looked_at_until_it_is_settled(
    watch: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_watch, "HIDDEN_AFTER_S", 0.02)
    caplog.set_level(logging.INFO, "fcluster.coordinator")
    watch.sights.append(LEADERLESS)
    watch.note(waiting=True)
    watch.wait_looks(2)
    watch.note(waiting=False)
    watch.sights.append(with_ends(27, 52))
    deadline_s = time.monotonic() + 10
    while not (watch.said and "hides" in str(watch.said[-1])):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    watch.wait_looks(3)
    assert watch.suspects[-1] == {PLACE}
    watch.sights.append(with_ends(60, 60))
    while watch.said[-1]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for Kafka: partition out/0 has no leader (0 s)",
        "Kafka has recovered: no longer partition out/0 has no leader (0 s)",
        f"waiting for Kafka: {HIDES} (0 s): {WHY}",
        f"Kafka has recovered: no longer {HIDES} (0 s)",
    ]


def test_look_that_fails_does_not_end_the_watch(watch: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Look:
        with watch.looked:
            watch.looks += 1
            watch.looked.notify_all()
        raise ValueError("unforeseen")

    monkeypatch.setattr(watch, "look", fail)
    watch.note(waiting=True)
    watch.wait_looks(3)
