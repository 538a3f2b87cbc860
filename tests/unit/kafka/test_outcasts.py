"""Which brokers the others no longer list, and that only connections to those are ended."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from fcluster.common.settings import Settings
from fcluster.kafka import outcasts
from fcluster.kafka.outcasts import Outcasts, Relief, View, end_connections, outcasts_in, view_of
from tests.harness import wait_until

ALL = {1: ("one", 9092), 2: ("two", 9092), 3: ("three", 9092)}
BUT_3 = {1: ALL[1], 2: ALL[2]}


# --- which of them ----------------------------------------------------------------------------------------


def outcasts_of(*views: View) -> set[int]:
    return set(outcasts_in(views, ALL))


def test_broker_that_is_cut_off_lists_itself_and_the_others_leave_it_out() -> None:
    assert outcasts_in([View(1, BUT_3), View(2, BUT_3), View(3, ALL)], ALL) == {3: ALL[3]}


def test_brokers_that_list_each_other_have_no_outcast() -> None:
    assert outcasts_of(View(1, ALL), View(2, ALL), View(3, ALL)) == set()


def test_broker_that_hangs_and_says_nothing_is_one_when_the_others_leave_it_out() -> None:
    assert outcasts_of(View(1, BUT_3), View(2, BUT_3)) == {3}


def test_broker_that_only_one_of_two_leaves_out_is_none() -> None:
    # One of the two has old news, and it isn't known which.
    assert outcasts_of(View(1, BUT_3), View(2, ALL), View(3, ALL)) == set()


def test_brokers_own_word_for_itself_doesnt_count() -> None:
    assert outcasts_of(View(1, BUT_3), View(3, ALL)) == {3}


def test_brokers_that_only_the_one_that_is_cut_off_leaves_out_stay() -> None:
    assert outcasts_of(View(1, BUT_3), View(2, BUT_3), View(3, {3: ALL[3]})) == {3}


def test_listeners_with_other_addresses_are_the_same_brokers() -> None:
    outside = {node: ("outside", 9000 + node) for node in ALL}
    assert outcasts_of(View(1, ALL), View(2, outside), View(3, ALL)) == set()


def test_nobodys_answer_makes_no_outcast() -> None:
    assert outcasts_of() == set()


@pytest.fixture(scope="module")
def brokers() -> Generator[list[str]]:
    """Addresses of librdkafka's own mock of three brokers."""
    producer = Producer({"test.mock.num.brokers": 3})
    metadata: Any = producer.list_topics(timeout=10)
    yield [f"{broker.host}:{broker.port}" for broker in metadata.brokers.values()]
    producer.flush(1)


def test_each_broker_says_whom_it_lists(brokers: list[str]) -> None:
    view = view_of(Settings(), brokers[0], timeout_s=10.0)
    assert view is not None
    assert {f"{host}:{port}" for host, port in view.brokers.values()} == set(brokers)
    assert view.node in view.brokers


def test_broker_that_doesnt_answer_has_no_view() -> None:
    assert view_of(Settings(), "127.0.0.1:1", timeout_s=0.2) is None


# --- connections ------------------------------------------------------------------------------------------


class Pair:
    """A server, and a connection of this process to it."""

    def __init__(self, closing: ExitStack) -> None:
        listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.address = ("localhost", listener.getsockname()[1])
        self.ours = closing.enter_context(socket.create_connection(("127.0.0.1", self.address[1])))
        self.theirs = closing.enter_context(listener.accept()[0])
        self.theirs.settimeout(10)
        self.ours.settimeout(10)

    def stands(self) -> bool:
        """Whether a byte passes."""
        try:
            self.theirs.sendall(b"x")
            return self.ours.recv(1) == b"x"
        except OSError:
            return False


def test_only_connections_to_those_addresses_are_ended() -> None:
    with ExitStack() as closing:
        outcast, other = Pair(closing), Pair(closing)
        assert end_connections([outcast.address]) == 1
        assert outcast.theirs.recv(1) == b""
        assert other.stands()
        # The connection's owner still has it, and closes it itself.
        assert outcast.ours.fileno() >= 0


def test_looking_at_all_open_files_leaves_none_open(tmp_path: Path) -> None:
    with ExitStack() as closing:
        pair = Pair(closing)
        # Files, pipes, and sockets of other kinds and without a peer.
        closing.enter_context((tmp_path / "file").open("w"))
        closing.callback(os.close, os.open(tmp_path, os.O_RDONLY))
        for end in (*os.pipe(), socket.socket().detach()):
            closing.callback(os.close, end)
        for end in socket.socketpair():
            closing.enter_context(end)
        before = len(os.listdir("/proc/self/fd"))
        assert end_connections([pair.address]) == 1
        assert len(os.listdir("/proc/self/fd")) == before


def test_broker_that_isnt_listed_any_more_is_known_from_earlier(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as closing:
        outcast, other = Pair(closing), Pair(closing)
        both = {1: other.address, 3: outcast.address}
        answers = {"one": View(1, both), "three": View(3, both)}
        outcasts = Outcasts(Settings(bootstrap_servers="one, three"), lambda _, server: answers.get(server))
        outcasts.leave()
        assert outcast.stands()
        answers = {"one": View(1, {1: other.address})}  # the other one hangs
        with caplog.at_level("INFO", "fcluster"):
            outcasts.leave()
        assert outcast.theirs.recv(1) == b""
        assert other.stands()
        assert "ended 1 connections to broker 3, which other brokers no longer list" in caplog.text


def test_nothing_is_ended_for_names_that_arent_known_or_without_a_list_of_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ExitStack() as closing:
        pair = Pair(closing)
        assert end_connections([("no-such-host.invalid", pair.address[1])]) == 0
        monkeypatch.setattr(outcasts, "_DESCRIPTORS", "/no/such/directory")
        assert end_connections([pair.address]) == 0
        assert pair.stands()


# --- when -------------------------------------------------------------------------------------------------


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_relief_comes_only_after_a_while_and_only_once_in_a_while() -> None:
    acted = threading.Semaphore(0)
    clock = Clock()
    relief = Relief(acted.release, clock)
    relief.waited(outcasts.RELIEF_AFTER_S - 0.1)
    assert not acted.acquire(blocking=False)
    relief.waited(outcasts.RELIEF_AFTER_S)
    assert acted.acquire(timeout=10)
    relief.waited(outcasts.RELIEF_AFTER_S + 0.1)
    clock.now_s += outcasts.RELIEF_INTERVAL_S - 0.1
    relief.waited(outcasts.RELIEF_AFTER_S + 1.9)
    assert not acted.acquire(timeout=0.05)


def test_relief_that_takes_long_isnt_begun_again_and_one_that_fails_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, end = threading.Semaphore(0), threading.Event()
    clock = Clock()

    def act() -> None:
        begun.release()
        assert end.wait(10)
        raise OSError("no descriptors left")

    relief = Relief(act, clock)
    relief.waited(10.0)
    assert begun.acquire(timeout=10)
    clock.now_s += 60.0
    relief.waited(70.0)
    assert not begun.acquire(timeout=0.05)
    end.set()

    def again() -> bool:
        relief.waited(70.0)
        return begun.acquire(blocking=False)

    wait_until(again, "relief again", 10)
    assert "looking for brokers that the others no longer list" in caplog.text
