"""Fences use what was prepared for them, and work without."""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

import pytest

from fcluster.common.errors import KafkaUnavailable
from fcluster.common.settings import Settings
from fcluster.coordinator import fencing
from fcluster.coordinator.events import SlotFenced, SlotFenceFailed
from fcluster.coordinator.fencing import Fencer
from tests.harness import wait_until

Outcome = SlotFenced | SlotFenceFailed


class FakeProducer:
    """Only its life matters."""


class Brokers:
    """Notes what is asked of them; connecting can be held up, or fail."""

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
            raise KafkaUnavailable("brokers are away")
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
def fencer(brokers: Brokers, outcomes: queue.Queue[Outcome]) -> Fencer:
    return Fencer(Settings(), "job", outcomes.put, brokers.fence, brokers.connect)


IDS = ("job-slot-3-0", "job-slot-3-1")


def test_fence_uses_the_producers_that_were_prepared_once(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    fencer.prepare(3)
    fencer.prepare(3)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert sorted(brokers.connected) == list(IDS)
    assert brokers.fenced == dict.fromkeys(IDS, 2)
    # One that lived on might ask once more, and fence the slot's next owner.
    wait_until(brokers.all_gone, "no producer is left", 5)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 0)
    fencer.close()


def test_fence_waits_for_producers_that_are_still_connecting(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    brokers.may_connect.clear()
    fencer.prepare(3)
    fencer.fence(3)
    assert outcomes.empty()
    brokers.may_connect.set()
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 2)
    fencer.close()


def test_fence_tries_by_itself_if_preparing_failed(
    fencer: Fencer, brokers: Brokers, outcomes: queue.Queue[Outcome]
) -> None:
    brokers.away = True
    fencer.prepare(3)
    fencer.fence(3)
    assert outcomes.get(timeout=5) == SlotFenced(3)
    assert brokers.fenced == dict.fromkeys(IDS, 0)
    fencer.close()


def test_what_was_prepared_for_nothing_is_let_go(
    fencer: Fencer, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    fencer.prepare(3)
    wait_until(lambda: len(brokers.connected) == 2, "both ids are connected", 5)
    fencer.forget_unused()
    assert not brokers.all_gone()
    monkeypatch.setattr(fencing, "PREPARED_FOR_S", 0.0)
    wait_until(lambda: fencer.forget_unused() or brokers.all_gone(), "no producer is left", 5)
    fencer.close()


def test_no_more_is_prepared_than_there_is_room_for(fencer: Fencer, brokers: Brokers) -> None:
    for slot in range(100):
        fencer.prepare(slot)
    wait_until(lambda: len(brokers.connected) == fencing.PREPARED_MAX, "as many as there is room for", 5)
    fencer.close()
