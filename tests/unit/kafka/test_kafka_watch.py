"""What of Kafka a job waits for: what is told of it, and when."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from fcluster.common.settings import Settings
from fcluster.kafka import watch as kafka_watch
from fcluster.kafka.watch import (
    OFFSETS_TOPIC,
    SENTENCE_CHARACTERS_MAX,
    TRANSACTIONS_TOPIC,
    Concern,
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
    assert not troubles


# --- the thread -----------------------------------------------------------------------------------------


class Watched(KafkaWatch):
    """Sees what the test says."""

    def __init__(self) -> None:
        self.sights = [WHOLE]
        self.looks = 0
        self.said: list[list[str]] = []
        self.looked = threading.Condition()
        super().__init__(
            Settings(bootstrap_servers="localhost:1"), lambda: CONCERN, lambda said: self.said.append([*said])
        )

    def look(self, admin: Any, concern: Concern) -> Look:
        with self.looked:
            self.looks += 1
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


def test_look_that_fails_does_not_end_the_watch(watch: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Look:
        with watch.looked:
            watch.looks += 1
            watch.looked.notify_all()
        raise ValueError("unforeseen")

    monkeypatch.setattr(watch, "look", fail)
    watch.note(waiting=True)
    watch.wait_looks(3)
