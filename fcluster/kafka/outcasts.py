"""Ends this process's connections to brokers that the other brokers no longer list.

A broker that is cut off from the other brokers, or that hangs, keeps its connections to clients open. The
others replace it, but librdkafka may go on asking it (decision 0087):

- A transactional producer looks for its coordinator only when it loses the connection to it. It then asks
  once, and any broker, so the answer may come from the broker that was cut off, or too early. That broker
  answers every further request with "concurrent transactions", because the first one still waits for
  replicas. That is no error for librdkafka: it repeats the request every 20 ms, and never looks again.
- A client asks the broker that it has used last for metadata. Each such request makes that broker the one
  that it has used last.

When such a connection ends, librdkafka does look again. Nothing in its interface ends one, so it is ended in
the kernel. That is safe at any time: to the client it is a lost connection like any other.

Responsible for: finding such brokers by asking each bootstrap server separately, and ending the connections.
Rule: a broker is an outcast only if more of the other brokers leave it out than list it. Must not know what
waits for Kafka.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from confluent_kafka import KafkaException

from fcluster.common.endpoints import split_address
from fcluster.common.settings import Settings
from fcluster.kafka.clients import ErrorLog, make_consumer

# Not "fcluster.kafka": that one is the clients', whose informative lines are filtered.
_log = logging.getLogger("fcluster.kafka.outcasts")

ASK_TIMEOUT_S: Final = 2.0
ASKED_MAX: Final = 5
"""How many bootstrap servers are asked at most."""
RELIEF_AFTER_S: Final = 5.0
"""How long something has to wait for Kafka before outcasts are looked for. The other brokers leave a broker
out when its session with the controller is over, after 6 to 9 s.
"""
RELIEF_INTERVAL_S: Final = 2.0
_NO_TOPIC: Final = "fcluster-no-topic"
_DESCRIPTORS: Final = "/proc/self/fd"

Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True)
class View:
    """What a broker says of its cluster.

    Attributes:
        node: the id of the broker that answered. -1: unknown.
        brokers: the addresses of the brokers that it lists, by their ids.
    """

    node: int
    brokers: Mapping[int, Address]


def outcasts_in(views: Collection[View], known: Mapping[int, Address]) -> dict[int, Address]:
    """The brokers that more of the others leave out than list, with their addresses.

    Args:
        views: what brokers say now.
        known: all brokers whose address is known, also from earlier views.
    """
    found: dict[int, Address] = {}
    for node, address in known.items():
        others = [view for view in views if view.node != node]
        leaving_out = sum(node not in view.brokers for view in others)
        if 2 * leaving_out > len(others):
            found[node] = address
    return found


def view_of(settings: Settings, server: str, timeout_s: float = ASK_TIMEOUT_S) -> View | None:
    """What the broker at this address says. None if it says nothing."""
    alone = replace(settings, bootstrap_servers=server)
    consumer = make_consumer(alone, "read-uncommitted", error_cb=ErrorLog("", quiet=True))
    try:
        metadata: Any = consumer.list_topics(_NO_TOPIC, timeout=timeout_s)
    except KafkaException:
        return None
    finally:
        consumer.close()
    brokers = {broker.id: (str(broker.host), int(broker.port)) for broker in metadata.brokers.values()}
    node = int(metadata.orig_broker_id)
    if node < 0:  # it was asked before it had said its id
        host, port = split_address(server)
        node = next((each for each, at in brokers.items() if at == (host, int(port or 0))), -1)
    return View(node, brokers) if brokers else None


def end_connections(addresses: Collection[Address]) -> int:
    """End this process's connections to these addresses. Returns how many there were.

    Has no effect where the system doesn't list a process's open files in `/proc`.
    """
    peers: set[Address] = set()
    for host, port in addresses:
        with contextlib.suppress(OSError):
            for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                peers.add((str(found[4][0]), port))
    ended = 0
    for descriptor in _open_files():
        connection = _copy_of(descriptor)
        if connection is None:
            continue
        with connection, contextlib.suppress(OSError):
            if _peer_of(connection) in peers:
                connection.shutdown(socket.SHUT_RDWR)
                ended += 1
    return ended


def _copy_of(descriptor: int) -> socket.socket | None:
    """A connection's descriptor, copied, so that it can't become another one while it is looked at."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:  # not a socket
        os.close(copy)
        return None


def _peer_of(connection: socket.socket) -> Address | None:
    peer: Any = connection.getpeername()
    if connection.family == socket.AF_INET:
        return str(peer[0]), int(peer[1])
    if connection.family == socket.AF_INET6:
        return str(peer[0]).removeprefix("::ffff:"), int(peer[1])
    return None


def _open_files() -> Sequence[int]:
    try:
        return [int(name) for name in os.listdir(_DESCRIPTORS)]
    except OSError:
        return []


class Outcasts:
    """Looks for outcasts, and ends the connections to them.

    Args:
        settings: the cluster's settings.
        ask: see `view_of`.
    """

    def __init__(self, settings: Settings, ask: Callable[[Settings, str], View | None] = view_of) -> None:
        self._settings = settings
        self._ask = ask
        self._known: dict[int, Address] = {}

    def leave(self) -> None:
        """Ask the brokers, and end connections. Takes a few seconds at most. One thread at a time."""
        servers = [server.strip() for server in self._settings.bootstrap_servers.split(",")][:ASKED_MAX]
        with ThreadPoolExecutor(len(servers), thread_name_prefix="views") as pool:
            answers = list(pool.map(partial(self._ask, self._settings), servers))
        views = [view for view in answers if view is not None]
        for view in views:
            self._known |= view.brokers
        outcasts = outcasts_in(views, self._known)
        if outcasts and (ended := end_connections(outcasts.values())):
            nodes = ", ".join(map(str, sorted(outcasts)))
            _log.info("ended %d connections to broker %s, which other brokers no longer list", ended, nodes)


class Relief:
    """Does something, again and again, while something waits for Kafka for long.

    Args:
        act: what to do, such as `Outcasts.leave`. It runs in its own thread.
        clock: the time, in seconds.
    """

    def __init__(self, act: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._act = act
        self._clock = clock
        self._due_s = 0.0
        self._running = threading.Lock()

    def waited(self, waited_s: float) -> None:
        """Something has waited for this long so far. Call it often; it returns at once."""
        now_s = self._clock()
        if waited_s < RELIEF_AFTER_S or now_s < self._due_s or not self._running.acquire(blocking=False):
            return
        self._due_s = now_s + RELIEF_INTERVAL_S
        threading.Thread(target=self._run, name="relief", daemon=True).start()

    def _run(self) -> None:
        try:
            self._act()
        except Exception:  # noqa: BLE001  without relief, the wait lasts longer
            _log.exception("looking for brokers that the others no longer list")
        finally:
            self._running.release()
