"""The sockets between coordinator, workers and admin clients: frames, and peers that connect and disconnect.

Responsible for: one ROUTER in the coordinator (`RouterTransport`) and one DEALER in each worker
(`DealerTransport`). A message is exactly one frame; `messages` knows its contents.

Invariants:
- A dead peer is reported at once: the connection's descriptor shows whose connection was closed. A report is
  a suspicion, not a proof, because a connection may drop and come back by itself.
- Every queue is bounded, no send blocks, and no input can raise. A frame of the wrong shape is counted and
  dropped; an oversized one closes its connection.
- A frame of a secured connection carries the role of its sender's key. Without an allowed key, no frame gets
  through. Unread frames are bounded for each connection, in number and in bytes.
- Frames may be lost when a connection drops. A peer with a session has to report its state again after
  `connected`.

Must not: decode messages, decide anything about workers, or use a socket outside its lock or thread.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket as sockets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from fcluster.wire.messages import MESSAGE_BYTES_MAX

RECONNECT_INTERVAL_MS = 50
RECONNECT_INTERVAL_MS_MAX = 400
HANDSHAKE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 2_000
UNACKNOWLEDGED_MS_MAX = 5_000
"""A connection is closed if the other host's kernel acknowledges nothing for this long. The system itself
would retransmit at growing intervals, and notice too late that an interrupted network works again.
"""
QUEUE_FRAMES_MAX = 10_000
"""How many frames may wait to be sent over one connection. More are dropped, as if lost."""
UNREAD_FRAMES_MAX = 8
"""How many received frames of one connection may wait to be read. A sender could make each as large as the
limit, and have many connections, so the number is small. When it is reached, the connection waits; nothing is
lost.
"""
EVENTS_IN_POLL_MAX = 1_000
"""How many frames one `poll` returns at most, so that its caller gets to its other work during a flood."""
BYTES_IN_POLL_MAX = 4 * MESSAGE_BYTES_MAX
HANDSHAKES_IN_POLL_MAX = 100
GIVEN_UP_RETRY_S = 1.0
"""ZeroMQ gives up a connection for good when its key is rejected (but keys change), or when it receives
something invalid or too large. It is tried again after this time."""
CUT_HANDSHAKES_MAX = 3
"""If this many connections in a row end during their handshake, that is no accident."""
ACCEPT_BACKLOG = 1_024
SILENT_CONNECTIONS_MAX = 1_000
"""How many connections may be open before they have sent anything: an honest peer sends as soon as it is
accepted. The oldest are closed first. So an attacker who opens many to use up descriptors blocks no honest
peer.
"""
DESCRIPTORS_KEPT = 512
"""How many of the process's descriptors are never used for connections, because files and Kafka need some."""
DESCRIPTORS_WANTED = 65_536


class SocketSecurity(Protocol):
    """The only place that sets security options. Applied to each socket before it is bound or connected."""

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Set the socket's security options (CURVE keys and the like)."""
        ...


class ServerSecurity(SocketSecurity, Protocol):
    """The same for a socket that others connect to. It also decides which of them to accept."""

    def authenticate(self, public_key: bytes) -> str | None:
        """The role of the peer that has proved to hold this key (Z85 text). None if the key is unknown.
        Must be fast.
        """
        ...


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """`peer` (its ZeroMQ identity) sent `frame`. `role` is that of its key, empty without security."""

    peer: bytes
    frame: bytes
    role: str = ""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection that `peer` last used is closed. It may come back by itself."""

    peer: bytes


@dataclass(frozen=True, slots=True)
class HandshakeFailed:
    """A peer that tried to connect was rejected, for this reason."""

    reason: str


TransportEvent = FrameReceived | Disconnected | HandshakeFailed


class _Wakeup:
    """A descriptor that becomes readable from any thread. Waking it twice before it is read costs nothing."""

    def __init__(self) -> None:
        self._reader, self._writer = sockets.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        # A full pipe is already readable. If the pipe is closed, there is nobody left to wake.
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
    """Which peer uses which descriptor, even though descriptors are reused.

    The monitor reports a descriptor's end before the system can hand out the same number again, and before
    any frame of the next connection. So drain the monitor after receiving a frame and before recording the
    frame's descriptor. Then the record can't outlive its connection.
    """

    def __init__(self) -> None:
        self._peer_of: dict[int, bytes] = {}
        self._descriptor_of: dict[bytes, int] = {}
        self._open: set[int] = set()
        self._silent: dict[int, None] = {}
        """Open connections that haven't sent anything yet, in the order of their arrival."""

    def accepted(self, descriptor: int) -> None:
        self._open.add(descriptor)
        self._silent.pop(descriptor, None)
        self._silent[descriptor] = None

    def surplus(self, silent_max: int, open_max: int) -> list[int]:
        """Descriptors that their owner should close. They no longer count as silent."""
        count = max(len(self._silent) - silent_max, min(len(self._silent), len(self._open) - open_max), 0)
        chosen = list(itertools.islice(self._silent, count))
        for descriptor in chosen:
            del self._silent[descriptor]
        return chosen

    def closed(self, descriptor: int) -> bytes | None:
        """The peer whose connection this was, unless it has already come back over another one."""
        self._open.discard(descriptor)
        self._silent.pop(descriptor, None)
        peer = self._peer_of.pop(descriptor, None)
        if peer is not None:
            del self._descriptor_of[peer]
        return peer

    def spoke(self, peer: bytes, descriptor: int) -> tuple[list[bytes], list[bytes]]:
        """Record a frame.

        Returns:
            Peers that turn out to have disconnected before the frame, and those that disconnected after it.
        """
        if self._peer_of.get(descriptor) == peer:
            return [], []
        self._silent.pop(descriptor, None)
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
    socket.setsockopt(zmq.RCVHWM, UNREAD_FRAMES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS_MAX)
    if security is not None:
        security.apply(socket)


class _Doorkeeper:
    """Answers ZeroMQ's requests whether a key is allowed (ZAP, RFC 27), in the thread of the socket's
    owner.

    Args:
        context: the socket's context. All requests of a context arrive in one place, so there is only one
            such socket.
        security: decides which keys are allowed.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], security: ServerSecurity) -> None:
        self._security = security
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> list[HandshakeFailed]:
        """Answer waiting questions, up to a limit. Returns who was rejected."""
        refused: list[HandshakeFailed] = []
        for _ in range(HANDSHAKES_IN_POLL_MAX):
            try:
                asker, _, version, request, _, address, _, mechanism, *credentials = (
                    self.socket.recv_multipart(zmq.NOBLOCK)
                )
            except zmq.Again:
                break
            role = None
            if mechanism == b"CURVE" and len(credentials) == 1:
                key = z85.encode(credentials[0])
                role = self._security.authenticate(key)
                if role is None:
                    refused.append(HandshakeFailed(f"unknown key {key.decode()} from {address.decode()}"))
            status = b"200" if role else b"400"
            self.socket.send_multipart(
                (asker, b"", version, request, status, b"", (role or "").encode(), b"")
            )
        return refused


class RouterTransport:
    """The coordinator's socket. All methods but `wake` belong to one thread.

    Args:
        security: sets the socket's security options before it is bound, and decides which peers to accept.
            None accepts all.
    """

    def __init__(self, security: ServerSecurity | None = None) -> None:
        self.malformed_frames = 0
        """Messages that weren't one frame. The caller adds those that it can't decode."""
        self.dropped_frames = 0
        """Frames not sent: the peer is gone, or its queue is full."""
        self.failed_handshakes = 0
        """Connections that were rejected, or didn't use ZeroMQ with our security."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._doorkeeper = None if security is None else _Doorkeeper(self._context, security)
        _set_common_options(self._socket, security)
        self._socket.setsockopt(zmq.BACKLOG, ACCEPT_BACKLOG)
        # A worker that reconnects keeps its identity; without this the half-dead old connection would win.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Sending to a peer that is gone must be noticed and counted, not ignored.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor: Any = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._wakeup = _Wakeup()
        self._peers = _PeerRegister()
        self._connections_max = max(1, raise_descriptor_limit() - DESCRIPTORS_KEPT)
        self._port = 0
        self._poller = zmq.Poller()
        for pollable in (self._socket, self._monitor, self._wakeup.fileno()):
            self._poller.register(pollable, zmq.POLLIN)
        if self._doorkeeper is not None:
            self._poller.register(self._doorkeeper.socket, zmq.POLLIN)

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
        bound = endpoint.rstrip(b"\0").decode()
        port = bound.rpartition(":")[2]
        self._port = int(port) if bound.startswith("tcp://") and port.isdigit() else 0
        return bound

    def poll(self, timeout_ms: float | None) -> list[TransportEvent]:
        """What happened, in order. Waits up to `timeout_ms` (None: forever) if nothing has happened yet.

        Returns early, and possibly with nothing, after `wake`.
        """
        timeout = None if timeout_ms is None else max(0, int(timeout_ms + 0.999))
        ready = dict(self._poller.poll(timeout))
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        events: list[TransportEvent] = []
        # Frames first: what a peer sent before its connection closed must come before its disconnection.
        if self._socket in ready or self._monitor in ready:
            self._receive(events)
        self._drain_monitor(events)
        if self._doorkeeper is not None and self._doorkeeper.socket in ready:
            refused = self._doorkeeper.answer()
            self.failed_handshakes += len(refused)
            events += refused
        self._hang_up_on_surplus(events)
        return events

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Queue `frame` for `peer`, never blocks. False if the peer is gone or its queue is full."""
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
        """Close the socket. Queued frames get a moment to be sent."""
        self._poller = zmq.Poller()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(500)
        if self._doorkeeper is not None:
            self._doorkeeper.socket.close(0)
        self._context.term()
        self._wakeup.close()

    def _receive(self, events: list[TransportEvent]) -> None:
        bytes_left = BYTES_IN_POLL_MAX
        while len(events) < EVENTS_IN_POLL_MAX and bytes_left > 0:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer = parts[0].bytes
            descriptor = int(parts[-1].get(zmq.SRCFD))
            closed: list[TransportEvent] = []
            self._drain_monitor(closed)
            lost_before, lost_after = self._peers.spoke(peer, descriptor)
            # A connection that closed after this frame is reported after it. One that the peer has already
            # replaced is reported before the frame, which proves that the peer is alive.
            events.extend(
                event
                for event in closed
                if not isinstance(event, Disconnected) or event.peer not in lost_after
            )
            events.extend(Disconnected(lost) for lost in lost_before)
            bytes_left -= sum(map(len, parts))
            if len(parts) == 2:
                # With security, every frame has a role.
                role = "" if self._doorkeeper is None else str(parts[1].get("User-Id"))
                events.append(FrameReceived(peer, parts[1].bytes, role))
            else:
                self.malformed_frames += 1
            events.extend(Disconnected(lost) for lost in lost_after)

    def _hang_up_on_surplus(self, events: list[TransportEvent]) -> None:
        for descriptor in self._peers.surplus(SILENT_CONNECTIONS_MAX, self._connections_max):
            if _hang_up(descriptor, self._port):
                self.failed_handshakes += 1
                events.append(HandshakeFailed("there are too many connections that have sent nothing"))

    def _drain_monitor(self, events: list[TransportEvent]) -> None:
        while True:
            try:
                happening = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            value = int(happening["value"])
            if happening["event"] == zmq.EVENT_ACCEPTED:
                self._peers.accepted(value)
            elif happening["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.failed_handshakes += 1
                events.append(HandshakeFailed(_protocol_trouble(value)))
            elif happening["event"] == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self.failed_handshakes += 1
            else:
                peer = self._peers.closed(value)
                if peer is not None:
                    events.append(Disconnected(peer))


def _hang_up(descriptor: int, port: int) -> bool:
    """End a ZeroMQ connection that came in at `port`: ZeroMQ sees the end and closes it. Returns False if the
    descriptor isn't such a connection.

    By now, the descriptor may be closed and even belong to another connection. In the worst case that is one
    at the same port, and its peer reconnects.
    """
    try:
        connection = sockets.socket(fileno=descriptor)
    except OSError:
        return False
    try:
        if (
            connection.family not in (sockets.AF_INET, sockets.AF_INET6)
            or connection.getsockname()[1] != port
        ):
            return False
        connection.shutdown(sockets.SHUT_RDWR)
        return True
    except OSError:
        return False
    finally:
        connection.detach()


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files and connections as far as allowed. Returns the new limit.

    Many systems allow 1,024 unless asked. That is few for a coordinator, since each connection takes a
    descriptor, even before it has been authenticated.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [DESCRIPTORS_WANTED if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    wanted = max(limits[0], min(limits[1], DESCRIPTORS_WANTED))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return limits[0]
    return wanted


HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def handshake_trouble(event: int, value: int, failures: int) -> str:
    """Why a connection fails, for the process that wants it. Empty if it may still succeed.

    Args:
        event: an event of the socket's monitor, one of HANDSHAKE_FAILURES. `value` is the monitor's value for
            it.
        failures: how many failures in a row.
    """
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "the coordinator doesn't know this key, or no longer accepts it"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return _protocol_trouble(value)
    if failures < CUT_HANDSHAKES_MAX:
        return ""  # it may just be shutting down
    return (
        "the other side closes the connection: its public key isn't the expected one, or only one side "
        "uses keys"
    )


def _protocol_trouble(code: int) -> str:
    if code == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "one side uses keys, the other doesn't"
    if code == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "the other side expects another public key of the coordinator"
    return f"the other side doesn't speak the protocol (ZeroMQ's code {code:#x})"


class DealerTransport:
    """A worker's socket to its coordinator, served by its own thread.

    `send` may be called from any thread and passes the frame straight to ZeroMQ. The callbacks run in the
    transport's thread and must be fast; they may call `send`. The connection is restored automatically;
    frames sent while it is down wait for it, up to a limit.

    Args:
        identity: the worker's id, non-empty, not starting with a zero byte, at most 255 bytes.
        on_frame: called with each frame received.
        on_connected: called when a connection is open, each time.
        on_disconnected: called when it was lost.
        on_refused: called with a reason when the other side rejects the connection. It is tried again.
    """

    def __init__(
        self,
        identity: bytes,
        on_frame: Callable[[bytes], None],
        on_connected: Callable[[], None],
        on_disconnected: Callable[[], None],
        on_refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        if not 0 < len(identity) < 256 or identity[0] == 0:
            raise ValueError(f"not an identity: {identity!r}")
        self.malformed_frames = 0
        self.dropped_frames = 0
        self._identity = identity
        self._on_frame = on_frame
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_refused = on_refused
        self._security: SocketSecurity | None = None
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
        self._cut_handshakes = 0
        self._retry_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether a connection is open now."""
        return self._connected

    @property
    def address(self) -> str | None:
        """The address that it connects to. None before the first `connect`."""
        return self._address

    def connect(self, address: str, security: SocketSecurity | None = None) -> None:
        """Connect to `address` and leave the old one. Frames still queued for that are dropped.

        From any thread. Connecting to the same address again makes a new connection. `on_disconnected` is
        called for the old connection, then `on_connected` once the new one is open. `security` sets the
        socket's security options.

        Raises:
            ValueError: ZeroMQ doesn't understand the address.
        """
        with self._lock:
            if self._closing:
                return
            self._security = security
            self._retry_at_s = None
            self._close_socket(0)
            self._open_socket(address)
        self._wakeup.wake()

    def send(self, frame: bytes) -> bool:
        """Pass `frame` to the connection, never blocks. False if it was dropped (no address, queue full)."""
        with self._lock:
            if self._socket is None:
                self.dropped_frames += 1
                return False
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.ZMQError:
                self.dropped_frames += 1
                return False
            # Sending may clear the descriptor's signal for frames that arrived in the meantime.
            frames_wait = bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if frames_wait:
            self._wakeup.wake()
        return True

    def close(self) -> None:
        """Stop the thread and close the socket. Sent frames get half a second to leave."""
        self._closing = True
        self._wakeup.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        monitor: Any = None
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while not self._closing:
            poller.poll(self._retry_in_ms())
            self._wakeup.clear()
            self._retry_given_up()
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

    def _retry_in_ms(self) -> int | None:
        retry_at_s = self._retry_at_s
        return None if retry_at_s is None else max(0, int((retry_at_s - time.monotonic()) * 1000) + 1)

    def _retry_given_up(self) -> None:
        with self._lock:
            if self._retry_at_s is None or time.monotonic() < self._retry_at_s or self._closing:
                return
            self._retry_at_s = None
            if self._address is not None:
                self._close_socket(0)
                self._open_socket(self._address)

    def _serve(self, monitor: Any) -> None:
        changes = self._drain_monitor(monitor)
        # In the order in which it happened: connected, then frames, then disconnected.
        if changes and changes[-1]:
            if len(changes) > 1:
                self._set_connected(False)
            self._set_connected(True)
        self._receive()
        if changes and not changes[-1]:
            self._set_connected(False)

    def _watch(self) -> tuple[Any, zmq.Poller]:
        """The monitor of the present socket, and a poller that wakes for everything that concerns it."""
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
            monitor = socket.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED
                | zmq.EVENT_DISCONNECTED
                | zmq.EVENT_CONNECT_DELAYED
                | zmq.EVENT_CONNECT_RETRIED
                | HANDSHAKE_FAILURES
            )
            socket.connect(address)
        except zmq.ZMQError as error:
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(0)
            socket.close(0)
            raise ValueError(f"can't connect to {address!r}: {error}") from error
        # Frames for it can't go to the former coordinator: the old socket is closed before this one replaces
        # it.
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
                self._cut_handshakes, self._retry_at_s = 0, None
                changes.append(True)
            elif happening["event"] == zmq.EVENT_DISCONNECTED:
                changes.append(False)
                self._retry_at_s = time.monotonic() + GIVEN_UP_RETRY_S
            elif happening["event"] in (zmq.EVENT_CONNECT_DELAYED, zmq.EVENT_CONNECT_RETRIED):
                self._retry_at_s = None  # it reconnects by itself
            else:
                self._note_failure(int(happening["event"]), int(happening["value"]))

    def _note_failure(self, event: int, value: int) -> None:
        self._cut_handshakes += 1
        reason = handshake_trouble(event, value, self._cut_handshakes)
        if reason:
            self._on_refused(reason)

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
