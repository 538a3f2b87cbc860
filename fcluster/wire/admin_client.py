"""Asks a coordinator for its status, or to drain and stop.

Responsible for: one connection to one coordinator, with one request at a time. Rule: an answer belongs to its
request. After a timeout the connection is dropped, so that a late answer can't be mistaken for that of the
next request. Must not be shared between threads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from fcluster.common.errors import FclusterError
from fcluster.wire import messages
from fcluster.wire.addresses import REMEDY, trouble_reaching
from fcluster.wire.transport import HANDSHAKE_FAILURES, SocketSecurity, handshake_trouble


class CoordinatorSilent(FclusterError):  # noqa: N818
    """The coordinator didn't answer in time."""


class KeyRefused(CoordinatorSilent):
    """The process that listens there doesn't accept this key, or doesn't have the expected one."""


class RequestRefused(FclusterError):  # noqa: N818
    """The coordinator answered that it can't carry out the request."""


class AdminClient:
    """A connection to the coordinator at `address` (``tcp://host:port``).

    The first request opens it. It reconnects by itself when the coordinator is restarted.

    Args:
        address: the address on which the coordinator listens.
        security: sets the socket's security options before it connects (see `security.client_security`).
    """

    def __init__(self, address: str, security: SocketSecurity | None = None) -> None:
        self.address = address
        self._security = security
        self._monitor: Any = None
        self._poller = zmq.Poller()
        self._failures = 0
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self, timeout_ms: int = 3_000) -> dict[str, Any]:
        """The coordinator's status document.

        Raises:
            CoordinatorSilent: there was no answer within `timeout_ms`.
            KeyRefused: the connection was refused.
            RequestRefused: the coordinator won't answer, for the reason in the message.
        """
        reply = self._ask(messages.StatusRequest(), timeout_ms)
        if not isinstance(reply, messages.StatusReply):
            raise self._unexpected(reply)
        return decode_document(bytes(reply.status))

    def stop(self, timeout_ms: int = 3_000) -> None:
        """Ask the coordinator to drain all workers and stop. Returns once the coordinator is draining.

        Raises:
            CoordinatorSilent: there was no answer within `timeout_ms`.
            KeyRefused: the connection was refused.
            RequestRefused: the coordinator won't stop, for the reason in the message.
        """
        reply = self._ask(messages.StopRequest(), timeout_ms)
        if not isinstance(reply, messages.StopReply):
            raise self._unexpected(reply)

    def drain(self, worker: str, timeout_ms: int = 3_000) -> messages.DrainReply:
        """Let one worker leave, named by its slot, its id or HOST:PID. Returns once the coordinator agrees.

        Raises:
            CoordinatorSilent: there was no answer within `timeout_ms`.
            KeyRefused: the connection was refused.
            RequestRefused: the coordinator won't do it, for the reason in the message, for example because
                there is no such worker.
        """
        reply = self._ask(messages.DrainRequest(worker), timeout_ms)
        if not isinstance(reply, messages.DrainReply):
            raise self._unexpected(reply)
        return reply

    def scale(
        self, total: int = -1, places: Mapping[str, int] | None = None, timeout_ms: int = 3_000
    ) -> messages.ScaleReply:
        """Run `total` workers, spread over all agents, or the given number at each of `places`. Returns once
        the agents have been told.

        Raises:
            CoordinatorSilent: there was no answer within `timeout_ms`.
            KeyRefused: the connection was refused.
            RequestRefused: the coordinator won't do it, for the reason in the message, for example because
                there is no such agent.
        """
        reply = self._ask(messages.ScaleRequest(total, dict(places or {})), timeout_ms)
        if not isinstance(reply, messages.ScaleReply):
            raise self._unexpected(reply)
        return reply

    def close(self) -> None:
        """Drop the connection; the next request opens a new one."""
        if self._socket is not None:
            self._socket.disable_monitor()
        if self._context is not None:
            self._context.destroy(0)
        self._context = self._socket = self._monitor = None

    def _ask(self, request: messages.Message, timeout_ms: int) -> messages.FromCoordinator:
        socket = self._open()
        deadline_s = time.monotonic() + timeout_ms / 1000
        trouble = ""
        try:
            socket.send(messages.encode(request), zmq.NOBLOCK)
            while not trouble and (left_s := deadline_s - time.monotonic()) > 0:
                if socket in dict(self._poller.poll(int(left_s * 1000) + 1)):
                    return messages.decode_from_coordinator(socket.recv_multipart()[0])
                trouble = self._trouble()
        except (zmq.ZMQError, messages.MalformedMessageError) as error:
            self.close()
            raise CoordinatorSilent(
                f"can't ask the coordinator at {self.address}: {error}",
                remedy="Check that the coordinator and this command have the same version of fcluster.",
            ) from error
        self.close()
        if trouble:
            raise KeyRefused(
                f"no connection to the coordinator at {self.address}: {trouble}",
                remedy="Set security.keys.dir to a directory with the coordinator's coordinator.pub and an "
                "admin.key that it accepts; or unset it if the coordinator uses no keys.",
            )
        silence = f"the coordinator at {self.address} didn't answer within {timeout_ms / 1000:g} s"
        unreached = trouble_reaching(self.address)
        if unreached:
            raise CoordinatorSilent(f"{silence}: {unreached}", remedy=REMEDY)
        raise CoordinatorSilent(
            silence,
            remedy="If it was just started or restarted, try again in a few seconds; otherwise look at its "
            "log.",
        )

    def _trouble(self) -> str:
        """Why there is no connection, if the other side has told."""
        while True:
            try:
                happening = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return ""
            self._failures += 1
            trouble = handshake_trouble(int(happening["event"]), int(happening["value"]), self._failures)
            if trouble:
                return trouble

    def _open(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            self._context = zmq.Context(1)
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.MAXMSGSIZE, messages.MESSAGE_BYTES_MAX)
            self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            if self._security is not None:
                self._security.apply(self._socket)
            self._monitor = self._socket.get_monitor_socket(HANDSHAKE_FAILURES)
            self._failures = 0
            self._poller = zmq.Poller()
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._monitor, zmq.POLLIN)
            self._socket.connect(self.address)
        return self._socket

    def _unexpected(self, reply: messages.FromCoordinator) -> FclusterError:
        if isinstance(reply, messages.Refused):
            return RequestRefused(f"the coordinator at {self.address} refused: {reply.reason}")
        return RequestRefused(f"the coordinator at {self.address} answered with {type(reply).__name__}")


def decode_document(encoded: bytes) -> dict[str, Any]:
    """The status document in a `StatusReply`, which is encoded as MessagePack within the message."""
    document = msgspec.msgpack.decode(encoded)
    if not isinstance(document, dict):
        raise RequestRefused(f"the status is a {type(document).__name__}, not a document")
    return cast("dict[str, Any]", document)
