"""Real sockets on loopback: connections, their ends, and how soon an end is noticed."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from fcluster.wire import transport
from fcluster.wire.messages import MESSAGE_BYTES_MAX
from fcluster.wire.transport import (
    DealerTransport,
    Disconnected,
    FrameReceived,
    HandshakeFailed,
    RouterTransport,
    TransportEvent,
)
from tests.harness import memory_bytes, within

DEADLINE_SECONDS = 10.0


class Worker:
    """A DealerTransport. Its callbacks put into a queue."""

    def __init__(self, identity: bytes) -> None:
        self.happened: queue.Queue[bytes | str] = queue.Queue()
        self.transport = DealerTransport(
            identity,
            self.happened.put,
            lambda: self.happened.put("connected"),
            lambda: self.happened.put("disconnected"),
        )

    def next(self) -> bytes | str:
        return self.happened.get(timeout=DEADLINE_SECONDS)


@pytest.fixture
def router() -> Iterator[RouterTransport]:
    transport = RouterTransport()
    yield transport
    transport.close()


@pytest.fixture
def new_worker() -> Iterator[Callable[[bytes], Worker]]:
    workers: list[Worker] = []

    def create(identity: bytes) -> Worker:
        workers.append(Worker(identity))
        return workers[-1]

    yield create
    for worker in workers:
        worker.transport.close()


def poll_until(
    router: RouterTransport, wanted: Callable[[list[TransportEvent]], bool]
) -> list[TransportEvent]:
    """All events until `wanted` holds for them."""
    events: list[TransportEvent] = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not wanted(events):
        assert time.monotonic() < deadline, f"only got {events}"
        events.extend(router.poll(100))
    return events


def count(number: int) -> Callable[[list[TransportEvent]], bool]:
    return lambda events: len(events) >= number


def test_frames_are_sent_in_both_directions(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    worker = new_worker(b"w1")
    worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
    assert worker.transport.send(b"hello")
    assert poll_until(router, count(1)) == [FrameReceived(b"w1", b"hello")]
    assert router.send(b"w1", b"welcome")
    assert [worker.next(), worker.next()] == ["connected", b"welcome"]
    assert worker.transport.connected


def test_many_threads_sending_lose_no_frame_and_keep_their_order(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    worker = new_worker(b"w1")
    worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
    frames_each = 500

    def send_all(name: int) -> None:
        for number in range(frames_each):
            assert worker.transport.send(b"%d %d" % (name, number))

    threads = [threading.Thread(target=send_all, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    received: list[bytes] = []
    echoed: list[bytes | str] = []
    while len(received) < 4 * frames_each:
        for event in poll_until(router, count(1)):
            assert isinstance(event, FrameReceived)
            received.append(event.frame)
            assert router.send(b"w1", event.frame)
    for thread in threads:
        thread.join()
    while len(echoed) < 4 * frames_each + 1:
        echoed.append(worker.next())
    assert echoed[1:] == received, "a frame that came in while another thread was sending got stuck"
    for name in range(4):
        own = [frame for frame in received if frame.startswith(b"%d " % name)]
        assert own == [b"%d %d" % (name, number) for number in range(frames_each)]


def test_worker_that_closes_is_reported_after_its_last_frame(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    worker = new_worker(b"w1")
    worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
    worker.transport.send(b"goodbye")
    worker.next()
    worker.transport.close()
    assert poll_until(router, count(2)) == [FrameReceived(b"w1", b"goodbye"), Disconnected(b"w1")]
    assert router.poll(50) == []
    assert not router.send(b"w1", b"too late")
    assert router.dropped_frames == 1


KILLED_PEER = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.IDENTITY, sys.argv[2].encode())
socket.connect(sys.argv[1])
socket.send(b"hello")
time.sleep(60)
"""


@pytest.mark.parametrize("survivors", [0, 3])
def test_killed_process_is_noticed_within_300_ms(
    router: RouterTransport, new_worker: Callable[[bytes], Worker], survivors: int
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    for number in range(survivors):
        worker = new_worker(b"survivor%d" % number)
        worker.transport.connect(address)
        worker.transport.send(b"hello")
    process = subprocess.Popen([sys.executable, "-c", KILLED_PEER, address, "victim"])
    try:
        poll_until(router, count(survivors + 1))
        os.kill(process.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        assert poll_until(router, count(1)) == [Disconnected(b"victim")]
        assert within(time.monotonic() - killed_at, 0.3)
    finally:
        process.kill()
        process.wait()


def test_reused_descriptor_is_not_mistaken_for_its_former_peer(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    steady = new_worker(b"steady")
    steady.transport.connect(address)
    steady.transport.send(b"0")
    poll_until(router, count(1))
    for number in range(1, 20):
        identity = b"short-lived-%d" % number
        worker = new_worker(identity)
        worker.transport.connect(address)
        worker.transport.send(b"x")
        worker.next()
        worker.transport.close()
        steady.transport.send(b"%d" % number)
        events = poll_until(router, count(3))
        assert [event for event in events if event.peer == identity] == [
            FrameReceived(identity, b"x"),
            Disconnected(identity),
        ]
        assert [event for event in events if event.peer == b"steady"] == [
            FrameReceived(b"steady", b"%d" % number)
        ]


def test_new_connection_with_the_same_identity_replaces_the_old_one(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    first, second = new_worker(b"w1"), new_worker(b"w1")
    first.transport.connect(address)
    first.transport.send(b"first")
    poll_until(router, count(1))
    second.transport.connect(address)
    second.transport.send(b"second")
    events = poll_until(router, lambda events: FrameReceived(b"w1", b"second") in events)
    assert router.send(b"w1", b"for the second")
    assert [second.next(), second.next()] == ["connected", b"for the second"]
    assert all(event.peer == b"w1" for event in events if isinstance(event, FrameReceived))


def test_coordinator_that_restarts_at_its_address_is_found_again(
    new_worker: Callable[[bytes], Worker],
) -> None:
    router = RouterTransport()
    address = router.bind("tcp://127.0.0.1:*")
    worker = new_worker(b"w1")
    worker.transport.connect(address)
    assert worker.next() == "connected"
    router.close()
    assert worker.next() == "disconnected"
    assert not worker.transport.connected
    worker.transport.send(b"waits for the connection")
    router = RouterTransport()
    try:
        router.bind(address)
        assert worker.next() == "connected"
        assert poll_until(router, count(1)) == [FrameReceived(b"w1", b"waits for the connection")]
    finally:
        router.close()


def test_worker_that_follows_a_new_leader_sends_nothing_more_to_the_old_one(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    new_leader = RouterTransport()
    try:
        worker = new_worker(b"w1")
        worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
        worker.transport.send(b"old")
        assert worker.next() == "connected"
        poll_until(router, count(1))
        address = new_leader.bind("tcp://127.0.0.1:*")
        worker.transport.connect(address)
        worker.transport.send(b"new")
        assert worker.transport.address == address
        assert [worker.next(), worker.next()] == ["disconnected", "connected"]
        assert poll_until(new_leader, count(1)) == [FrameReceived(b"w1", b"new")]
        assert poll_until(router, count(1)) == [Disconnected(b"w1")]
    finally:
        new_leader.close()


def test_frames_of_a_wrong_shape_are_counted_and_dropped(router: RouterTransport) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(router.bind("tcp://127.0.0.1:*"))
        socket.send_multipart([b"", b"two", b"parts"])
        socket.send(b"one")
        events = poll_until(router, count(1))
        assert [event.frame for event in events if isinstance(event, FrameReceived)] == [b"one"]
        assert router.malformed_frames == 1
    finally:
        context.destroy(0)


def test_oversized_frame_closes_its_connection_only(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    good, bad = new_worker(b"good"), new_worker(b"bad")
    for worker in (good, bad):
        worker.transport.connect(address)
        worker.transport.send(b"small")
    poll_until(router, count(2))
    bad.transport.send(b"x" * (MESSAGE_BYTES_MAX + 1))
    assert poll_until(router, count(1)) == [Disconnected(b"bad")]
    good.transport.send(b"still here")
    assert FrameReceived(b"good", b"still here") in poll_until(router, count(1))


def test_wake_ends_a_poll_from_another_thread(router: RouterTransport) -> None:
    router.bind("tcp://127.0.0.1:*")
    timer = threading.Timer(0.05, router.wake)
    timer.start()
    started = time.monotonic()
    assert router.poll(DEADLINE_SECONDS * 1000) == []
    assert time.monotonic() - started < DEADLINE_SECONDS / 2
    timer.join()


def test_address_in_use_is_an_os_error(router: RouterTransport) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    other = RouterTransport()
    try:
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
    finally:
        other.close()


def test_invalid_address_is_an_error(new_worker: Callable[[bytes], Worker]) -> None:
    worker = new_worker(b"w1")
    with pytest.raises(ValueError, match="nonsense"):
        worker.transport.connect("nonsense")
    assert not worker.transport.send(b"nowhere to go")


def test_worker_loses_its_connection_by_an_oversized_frame_and_reconnects(
    new_worker: Callable[[bytes], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "GIVEN_UP_RETRY_S", 0.05)
    router = RouterTransport()
    try:
        worker = new_worker(b"w1")
        worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
        worker.transport.send(b"hello")
        poll_until(router, count(1))
        assert worker.next() == "connected"
        assert router.send(b"w1", bytes(MESSAGE_BYTES_MAX + 1))
        assert [worker.next(), worker.next()] == ["disconnected", "connected"]
        worker.transport.send(b"hello again")
        assert poll_until(router, count(2))[-1] == FrameReceived(b"w1", b"hello again")
    finally:
        router.close()


def test_unread_bytes_are_bounded_and_nothing_is_lost(
    router: RouterTransport, new_worker: Callable[[bytes], Worker]
) -> None:
    worker = new_worker(b"w1")
    worker.transport.connect(router.bind("tcp://127.0.0.1:*"))
    frames = [bytes([number]) * MESSAGE_BYTES_MAX for number in range(30)]
    for frame in frames:
        assert worker.transport.send(frame)
    largest = 0
    received: list[TransportEvent] = []
    while len(received) < len(frames):
        events = router.poll(10_000)
        assert events
        received += events
        largest = max(largest, len(events))
    assert [event.frame for event in received if isinstance(event, FrameReceived)] == frames
    assert largest <= transport.BYTES_IN_POLL_MAX // MESSAGE_BYTES_MAX


FLOOD = """
import sys, time, zmq
context, sockets = zmq.Context(), []
for number in range(4):
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 2)
    socket.connect(sys.argv[1])
    sockets.append(socket)
frame, ends_at_s = bytes(int(sys.argv[2])), time.monotonic() + 3
while time.monotonic() < ends_at_s:
    for socket in sockets:
        try:
            socket.send(frame, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            time.sleep(0.001)
context.destroy(0)
"""


def test_memory_is_bounded_for_each_connection_of_a_flood_while_nobody_reads(router: RouterTransport) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    before = memory_bytes(os.getpid())
    subprocess.run([sys.executable, "-c", FLOOD, address, str(MESSAGE_BYTES_MAX)], check=True, timeout=60)
    growth = memory_bytes(os.getpid()) - before
    assert growth < 4 * (transport.UNREAD_FRAMES_MAX + 3) * MESSAGE_BYTES_MAX
    assert transport.UNREAD_FRAMES_MAX * MESSAGE_BYTES_MAX <= 32 * 1024 * 1024


def silent_connections(address: str, number: int) -> list[socket.socket]:
    host, port = address.removeprefix("tcp://").split(":")
    return [socket.create_connection((host, int(port)), 5) for _ in range(number)]


def test_silent_connections_are_bounded_and_do_not_block_others(
    router: RouterTransport, new_worker: Callable[[bytes], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SILENT_CONNECTIONS_MAX", 20)
    worker = new_worker(b"w1")
    address = router.bind("tcp://127.0.0.1:*")
    worker.transport.connect(address)
    worker.transport.send(b"hello")
    poll_until(router, count(1))
    held = silent_connections(address, 200)
    events = poll_until(router, lambda events: len(events) >= 180)
    assert all(isinstance(event, HandshakeFailed) for event in events), events
    assert "have sent nothing" in str(events[0])
    assert router.failed_handshakes >= 180
    # The oldest ones are closed, and the newest may still send something.
    for early in held[:150]:
        early.settimeout(DEADLINE_SECONDS)
        while early.recv(1024):
            pass
    # A connection that sends isn't closed, and neither is a new one.
    other = new_worker(b"w2")
    other.transport.connect(address)
    for sender in (worker, other):
        assert sender.transport.send(b"still here")
    events = poll_until(router, lambda events: sum(isinstance(event, FrameReceived) for event in events) == 2)
    assert not any(isinstance(event, Disconnected) for event in events)
    for connection in held:
        connection.close()


def test_descriptors_are_reserved_for_files_and_kafka_when_connections_use_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "raise_descriptor_limit", lambda: transport.DESCRIPTORS_KEPT + 30)
    router = RouterTransport()
    try:
        held = silent_connections(router.bind("tcp://127.0.0.1:*"), 100)
        poll_until(router, lambda events: len(events) >= 70)
        for connection in held:
            connection.close()
    finally:
        router.close()


def test_process_gets_as_many_descriptors_as_the_system_allows() -> None:
    """In a separate process, because a raised limit can't be lowered again for other tests."""
    program = (
        "import resource as r; from fcluster.wire.transport import raise_descriptor_limit as up\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 4000)); print(up(), *r.getrlimit(r.RLIMIT_NOFILE))\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (4000, 4000)); print(up(), *r.getrlimit(r.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4000"] * 6


def test_descriptor_of_something_else_is_not_touched(router: RouterTransport) -> None:
    router.bind("tcp://127.0.0.1:*")
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    for descriptor in (ours.fileno(), reader, 10**6):
        assert not transport._hang_up(descriptor, router._port)
    theirs.send(b"x")
    assert ours.recv(1) == b"x"
    os.close(reader)
    os.close(writer)
    ours.close()
    theirs.close()
