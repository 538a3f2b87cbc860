"""The sockets between coordinator, workers and admin clients: frames in, frames out, who came and who went.

Responsible for: one ROUTER in the coordinator (`RouterTransport`) and one DEALER in each worker
(`DealerTransport`). A message is exactly one frame; what is in it is the business of `messages`.

Invariants kept:
- A dead peer is reported at once: the ROUTER learns from the connection's descriptor whose connection
  closed. A report is suspicion, not proof: a connection may drop and come back by itself.
- Every queue is bounded, no send blocks, and no input can raise: a frame of the wrong shape is counted and
  dropped, an oversized one closes its connection.
- Frames may be lost when a connection drops. Whoever holds a session must say so anew after `connected`.

Must not: decode messages, decide anything about workers, or touch a socket outside its lock or thread.
"""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from fcluster.common.messages import MESSAGE_BYTES_MAX

RECONNECT_INTERVAL_MS = 50
RECONNECT_INTERVAL_MS_MAX = 400
HANDSHAKE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 2_000
QUEUE_FRAMES_MAX = 10_000
"""Frames that one connection may have waiting in each direction; more are dropped, as if lost."""
EVENTS_IN_POLL_MAX = 1_000
"""Frames that one `poll` returns at most, so that its caller gets to its other duties under a flood."""
ACCEPT_BACKLOG = 1_024


class SocketSecurity(Protocol):
    """The one place for security options: applied to each socket before it is bound or connected."""

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Set the socket's security options (CURVE keys and the like)."""
        ...


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """`peer` (its ZeroMQ identity) sent `frame`."""

    peer: bytes
    frame: bytes


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection over which `peer` spoke last is closed. It may come back by itself."""

    peer: bytes


TransportEvent = FrameReceived | Disconnected


class _Wakeup:
    """A descriptor that becomes readable from any thread; waking twice before it is read costs nothing."""

    def __init__(self) -> None:
        self._reader, self._writer = sockets.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        # A full pipe is readable already; a closed one has nobody left to wake.
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while len(self._reader.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class _PeerRegister:
    """Which peer speaks over which descriptor, in the face of descriptors that are used again.

    The monitor reports a descriptor's end before the system can hand the same number out again, and
    before any frame of the next connection. So: drain the monitor after receiving a frame and before
    taking note of the frame's descriptor, and the note can't outlive its connection.
    """

    def __init__(self) -> None:
        self._peer_of: dict[int, bytes] = {}
        self._descriptor_of: dict[bytes, int] = {}
        self._open: set[int] = set()

    def accepted(self, descriptor: int) -> None:
        self._open.add(descriptor)

    def closed(self, descriptor: int) -> bytes | None:
        """The peer whose connection this was, if it hasn't come back over another one meanwhile."""
        self._open.discard(descriptor)
        peer = self._peer_of.pop(descriptor, None)
        if peer is not None:
            del self._descriptor_of[peer]
        return peer

    def spoke(self, peer: bytes, descriptor: int) -> tuple[list[bytes], list[bytes]]:
        """Take note of a frame.

        Returns:
            Peers that turn out to have been disconnected before the frame, and after it.
        """
        if self._peer_of.get(descriptor) == peer:
            return [], []
        lost: list[bytes] = []
        former_descriptor = self._descriptor_of.pop(peer, None)
        if former_descriptor is not None:
            # It is back over another connection before the end of the old one was seen.
            del self._peer_of[former_descriptor]
            lost.append(peer)
        if descriptor not in self._open:
            return lost, [peer]  # its last frame was still in the queue when the connection closed
        former_peer = self._peer_of.pop(descriptor, None)
        if former_peer is not None:
            del self._descriptor_of[former_peer]
            lost.append(former_peer)
        self._peer_of[descriptor] = peer
        self._descriptor_of[peer] = descriptor
        return lost, []


def _set_common_options(socket: zmq.Socket[bytes], security: SocketSecurity | None) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    socket.setsockopt(zmq.SNDHWM, QUEUE_FRAMES_MAX)
    socket.setsockopt(zmq.RCVHWM, QUEUE_FRAMES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    if security is not None:
        security.apply(socket)


class RouterTransport:
    """The coordinator's socket. All methods but `wake` belong to one thread.

    Args:
        security: sets the socket's security options before it is bound.
    """

    def __init__(self, security: SocketSecurity | None = None) -> None:
        self.malformed_frames = 0
        """Messages that weren't one frame; the caller adds those it can't decode."""
        self.dropped_frames = 0
        """Frames not sent: the peer is gone, or its queue is full."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._socket = self._context.socket(zmq.ROUTER)
        _set_common_options(self._socket, security)
        self._socket.setsockopt(zmq.BACKLOG, ACCEPT_BACKLOG)
        # A worker that reconnects keeps its identity; without this the half-dead old connection would win.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Sending to a peer that is gone shall be seen and counted, not swallowed.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._wakeup = _Wakeup()
        self._peers = _PeerRegister()
        self._poller = zmq.Poller()
        for pollable in (self._socket, self._monitor, self._wakeup.fileno()):
            self._poller.register(pollable, zmq.POLLIN)

    def bind(self, address: str) -> str:
        """Listen on `address` (port 0: any free one) and return the address in use.

        Raises:
            OSError: the address can't be bound; it says why.
        """
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, str(error)) from error
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.rstrip(b"\0").decode()

    def poll(self, timeout_ms: float | None) -> list[TransportEvent]:
        """What happened, in order; waits up to `timeout_ms` (None: for ever) if nothing did yet.

        Returns early, and possibly with nothing, after `wake`.
        """
        timeout = None if timeout_ms is None else max(0, int(timeout_ms + 0.999))
        ready = dict(self._poller.poll(timeout))
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        events: list[TransportEvent] = []
        # Frames first: what a peer said before its connection closed comes before its disconnection.
        if self._socket in ready or self._monitor in ready:
            self._receive(events)
        self._drain_monitor(events)
        return events

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue `frame` for `peer`, never blocks; False if the peer is gone or its queue is full."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.ZMQError:
            self.dropped_frames += 1
            return False
        return True

    def wake(self) -> None:
        """Make `poll` return; from any thread."""
        self._wakeup.wake()

    def close(self) -> None:
        """Close the socket; what is still queued gets a moment to leave."""
        self._poller = zmq.Poller()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(500)
        self._context.term()
        self._wakeup.close()

    def _receive(self, events: list[TransportEvent]) -> None:
        while len(events) < EVENTS_IN_POLL_MAX:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = parts[0].bytes
            descriptor = int(parts[-1].get(zmq.SRCFD))
            closed: list[TransportEvent] = []
            self._drain_monitor(closed)
            lost_before, lost_after = self._peers.spoke(peer, descriptor)
            # A connection that closed behind this frame is reported behind it; one that the peer has
            # replaced meanwhile is reported before the frame, which proves the peer alive.
            events.extend(event for event in closed if event.peer not in lost_after)
            events.extend(Disconnected(lost) for lost in lost_before)
            if len(parts) == 2:
                events.append(FrameReceived(peer, parts[1].bytes))
            else:
                self.malformed_frames += 1
            events.extend(Disconnected(lost) for lost in lost_after)

    def _drain_monitor(self, events: list[TransportEvent]) -> None:
        while True:
            try:
                happening = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            descriptor = int(happening["value"])
            if happening["event"] == zmq.EVENT_ACCEPTED:
                self._peers.accepted(descriptor)
            else:
                peer = self._peers.closed(descriptor)
                if peer is not None:
                    events.append(Disconnected(peer))


class DealerTransport:
    """A worker's socket to its coordinator, served by one thread of its own.

    `send` may be called from any thread and hands the frame straight to ZeroMQ. The callbacks run in the
    transport's thread and must be quick; they may call `send`. The connection comes back by itself; frames
    sent while it is down wait for it, up to a bound.

    Args:
        identity: the worker's id, non-empty, not starting with a zero byte, at most 255 bytes.
        on_frame: called with each frame received.
        on_connected: called when a connection stands, also each time it came back.
        on_disconnected: called when it was lost.
        security: sets each socket's security options before it connects.
    """

    def __init__(
        self,
        identity: bytes,
        on_frame: Callable[[bytes], None],
        on_connected: Callable[[], None],
        on_disconnected: Callable[[], None],
        security: SocketSecurity | None = None,
    ) -> None:
        if not 0 < len(identity) < 256 or identity[0] == 0:
            raise ValueError(f"not an identity: {identity!r}")
        self.malformed_frames = 0
        self.dropped_frames = 0
        self._identity = identity
        self._on_frame = on_frame
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._security = security
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        # The lock guards `_socket`: ZeroMQ sockets may change threads, but never be used by two at once.
        # The transport's thread therefore waits on the socket's descriptor, not on the socket.
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] | None = None
        self._wakeup = _Wakeup()
        self._monitor: Any = None
        self._address: str | None = None
        self._closing = False
        self._connected = False
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether a connection stands right now."""
        return self._connected

    @property
    def address(self) -> str | None:
        """The address it connects to, None before the first `connect`."""
        return self._address

    def connect(self, address: str) -> None:
        """Connect to `address`, leaving the former one; frames still queued for that are dropped.

        From any thread. The same address again is a fresh connection. `on_disconnected` is called for the
        connection that was left, then `on_connected` once the new one stands.

        Raises:
            ValueError: ZeroMQ doesn't understand the address.
        """
        with self._lock:
            if self._closing:
                return
            self._close_socket(0)
            self._open_socket(address)
        self._wakeup.wake()

    def send(self, frame: bytes) -> bool:
        """Hand `frame` to the connection, never blocks; False if it was dropped (no address, queue full)."""
        with self._lock:
            if self._socket is None:
                self.dropped_frames += 1
                return False
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.ZMQError:
                self.dropped_frames += 1
                return False
            # Sending may swallow the descriptor's signal for frames that came in meanwhile.
            frames_wait = bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if frames_wait:
            self._wakeup.wake()
        return True

    def close(self) -> None:
        """Stop the thread and close the socket; what was sent gets half a second to leave."""
        self._closing = True
        self._wakeup.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        monitor: Any = None
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while not self._closing:
            poller.poll()
            self._wakeup.clear()
            if monitor is not self._monitor:
                if monitor is not None:
                    monitor.close(0)
                self._set_connected(False)
                monitor, poller = self._watch()
            if monitor is not None:
                self._serve(monitor)
        with self._lock:
            self._close_socket(500)
        if monitor is not None:
            monitor.close(0)
        if self._monitor is not None and self._monitor is not monitor:
            self._monitor.close(0)
        self._context.term()
        self._wakeup.close()

    def _serve(self, monitor: Any) -> None:
        changes = self._drain_monitor(monitor)
        # As it happened: connected, then frames, then disconnected.
        if changes and changes[-1]:
            if len(changes) > 1:
                self._set_connected(False)
            self._set_connected(True)
        self._receive()
        if changes and not changes[-1]:
            self._set_connected(False)

    def _watch(self) -> tuple[Any, zmq.Poller]:
        """The monitor of the present socket, and a poller that wakes for all that concerns it."""
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        with self._lock:
            if self._socket is not None:
                poller.register(self._socket.getsockopt(zmq.FD), zmq.POLLIN)
                poller.register(self._monitor, zmq.POLLIN)
            return self._monitor, poller

    def _open_socket(self, address: str) -> None:
        socket = self._context.socket(zmq.DEALER)
        monitor: Any = None
        try:
            _set_common_options(socket, self._security)
            socket.setsockopt(zmq.IDENTITY, self._identity)
            socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_INTERVAL_MS_MAX)
            socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            socket.connect(address)
        except zmq.ZMQError as error:
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(0)
            socket.close(0)
            raise ValueError(f"can't connect to {address!r}: {error}") from error
        # Not sent to the former coordinator: the old socket is closed before this one takes its place.
        self._socket, self._monitor, self._address = socket, monitor, address

    def _close_socket(self, linger_ms: int) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger_ms)
            self._socket = None

    def _drain_monitor(self, monitor: Any) -> list[bool]:
        changes: list[bool] = []
        while True:
            try:
                happening = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.ZMQError:
                return changes
            if happening["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                changes.append(True)
            elif happening["event"] == zmq.EVENT_DISCONNECTED:
                changes.append(False)

    def _set_connected(self, connected: bool) -> None:
        if connected == self._connected:
            return
        self._connected = connected
        if connected:
            self._on_connected()
        else:
            self._on_disconnected()

    def _receive(self) -> None:
        while True:
            with self._lock:
                if self._socket is None:
                    return
                try:
                    parts = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.ZMQError:
                    return
            if len(parts) == 1:
                self._on_frame(parts[0])
            else:
                self.malformed_frames += 1
