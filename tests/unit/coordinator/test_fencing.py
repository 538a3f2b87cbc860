"""Fences use producers that were prepared for them, and also work without."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fcluster.common.errors import KafkaUnavailable
from fcluster.common.settings import Settings
from fcluster.coordinator import fencing
from fcluster.coordinator.core.events import SlotFenced, SlotFenceFailed
from fcluster.coordinator.fencing import Fencer
from tests.harness import wait_until, wait_until_equal

Outcome = SlotFenced | SlotFenceFailed


class FakeProducer:
    """A producer of which only the lifetime matters."""


class Brokers:
    """Records what it is asked. Connecting can be delayed, or fail."""

    def __init__(self) -> None:
        self.connected: list[str] = []
        self.fenced: dict[str, int] = {}
        self.alive: list[weakref.ref[FakeProducer]] = []
        self.may_connect = threading.Event()
        self.may_connect.set()
        self.away = False

    def connect(self, _: Settings, identity: str) -> list[Any]:
        self.may_connect.wait(10)
        if self.away:
            raise KafkaUnavailable("brokers are down")
        self.connected.append(identity)
        producers = [FakeProducer(), FakeProducer()]
        self.alive += map(weakref.ref, producers)
        return producers

    def fence(self, _: Settings, identity: str, ready: list[Any]) -> None:
        self.fenced[identity] = len(ready)
        ready.clear()

    def all_gone(self) -> bool:
        return not any(producer() is not None for producer in self.alive)


@pytest.fixture
def brokers() -> Brokers:
    return Brokers()


@pytest.fixture
def outcomes() -> queue.Queue[Outcome]:
    return queue.Queue()


@pytest.fixture
def fencer(brokers: Brokers, outcomes: queue.Queue[Outcome]) -> Iterator[Fencer]:
    fencer = Fencer(Settings(), "job", outcomes.put, brokers.fence, brokers.connect)
    yield fencer
    fencer.close()


IDS = ("job-slot-3-0", "job-slot-3-1")


def test_fence_uses_the_producers_that_were_prepared_once(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    fencer.prepare(3, soon=True)
    fencer.prepare(3, soon=True)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert sorted(brokers.connected) == list(IDS)
    assert brokers.fenced == dict.fromkeys(IDS, 2)
    # A producer that is kept might retry later, and fence the slot's next owner.
    wait_until(brokers.all_gone, "no producer is left", 5)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 0)


def test_fence_waits_for_producers_that_are_still_connecting(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    brokers.may_connect.clear()
    fencer.prepare(3, soon=True)
    fencer.fence(3)
    assert outcomes.empty()
    brokers.may_connect.set()
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 2)


def test_fence_connects_itself_if_preparing_failed(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    brokers.away = True
    fencer.prepare(3, soon=True)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 0)


def test_suspected_slots_are_prepared_first_if_there_is_no_room_for_all(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    slots = fencing.PREPARED_MAX // 2
    for slot in range(100):
        fencer.prepare(slot, soon=False)
    wait_until_equal(lambda: len(brokers.connected), 2 * slots, "as many as there is room for", 5)
    assert sum(producer() is not None for producer in brokers.alive) == 4 * slots
    fencer.prepare(50, soon=True)
    wait_until(lambda: "job-slot-50-1" in brokers.connected, "the suspected slot's are connected", 5)
    wait_until_equal(
        lambda: sum(producer() is not None for producer in brokers.alive),
        4 * slots,
        "those of the others are gone",
        5,
    )
    fencer.fence(50)
    assert outcomes.get(timeout=5) == SlotFenced(50)
    assert set(brokers.fenced.values()) == {2}
