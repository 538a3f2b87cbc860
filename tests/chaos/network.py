"""A worker on its own network, which a test can cut. Needs root.

Responsible for: a network namespace with two veth pairs, one on the way to Kafka and one on the way to the
coordinator. The test creates and removes it. Kafka and coordinator listen on addresses of the loopback
device, which remain when a pair is cut.

A cut in both directions takes the pair's far end down, so that sent packets vanish silently. A cut in one
direction is a blackhole route for the addresses of one side: the other side's packets still arrive.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from fcluster.kafka import embedded as embedded_kafka
from fcluster.kafka.embedded import EmbeddedKafka
from tests.checker.reading import forget_admins

KAFKA, COORDINATOR = "kafka", "coordinator"


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run an iproute2 command."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


def retire(address: str) -> None:
    """Take an address away from this machine permanently. Until this process ends, nothing answers there.
    Otherwise clients that outlive the address would ask whatever is behind the machine's default route.
    """
    run("ip", "route", "replace", "unreachable", f"{address}/32", check=False)
    run("ip", "address", "del", f"{address}/32", "dev", "lo", check=False)
    atexit.register(run, "ip", "route", "del", "unreachable", f"{address}/32", check=False)


@dataclass
class Way:
    """One pair. `service` is the address at this end that is cut off from `inside`."""

    number: int
    tag: str
    service: str
    outside: str = field(init=False)
    inside: str = field(init=False)

    def __post_init__(self) -> None:
        self.outside, self.inside = f"fco{self.tag}{self.number}", f"fci{self.tag}{self.number}"

    @property
    def net(self) -> str:
        return f"{self.service.rpartition('.')[0]}"


class Island:
    """The namespace of one worker. `prefix` starts a command in it."""

    def __init__(self, number: int) -> None:
        tag = f"{number:x}"
        self.name = f"fcluster-{tag}"
        third = number % 200
        self.ways = {
            KAFKA: Way(0, tag, f"10.213.{third}.1"),
            COORDINATOR: Way(1, tag, f"10.214.{third}.1"),
        }

    @property
    def prefix(self) -> Sequence[str]:
        return ("ip", "netns", "exec", self.name)

    def make(self) -> None:
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        for way in self.ways.values():
            run("ip", "address", "add", f"{way.service}/32", "dev", "lo")
            run("ip", "link", "add", way.outside, "type", "veth", "peer", "name", way.inside)
            run("ip", "link", "set", way.inside, "netns", self.name)
            run("ip", "address", "add", f"{way.net}.5/30", "dev", way.outside)
            run("ip", "link", "set", way.outside, "up")
            run("ip", "-n", self.name, "address", "add", f"{way.net}.6/30", "dev", way.inside)
            run("ip", "-n", self.name, "link", "set", way.inside, "up")
            run("ip", "-n", self.name, "route", "add", way.service, "via", f"{way.net}.5")

    def remove(self) -> None:
        """Remove whatever exists of it."""
        for way in self.ways.values():
            run("ip", "link", "del", way.outside, check=False)
            run("ip", "route", "del", "blackhole", f"{way.net}.6", check=False)
            retire(way.service)
        run("ip", "netns", "del", self.name, check=False)

    @contextmanager
    def cut(self, what: str) -> Iterator[None]:
        """Cut both directions."""
        way = self.ways[what]
        run("ip", "link", "set", way.outside, "down")
        try:
            yield
        finally:
            run("ip", "link", "set", way.outside, "up")

    @contextmanager
    def drop_outgoing(self, what: str) -> Iterator[None]:
        """What the worker sends doesn't arrive. It still receives."""
        way = self.ways[what]
        run("ip", "-n", self.name, "route", "replace", "blackhole", way.service)
        try:
            yield
        finally:
            run("ip", "-n", self.name, "route", "del", "blackhole", way.service)
            run("ip", "-n", self.name, "route", "replace", way.service, "via", f"{way.net}.5")

    @contextmanager
    def drop_incoming(self, what: str) -> Iterator[None]:
        """What is sent to the worker doesn't arrive. It can still send."""
        way = self.ways[what]
        run("ip", "route", "add", "blackhole", f"{way.net}.6")
        try:
            yield
        finally:
            run("ip", "route", "del", "blackhole", f"{way.net}.6")


class NoIslandError(Exception):
    """Network namespaces aren't possible here. The message says why."""


class Place(Protocol):
    """Something made of network namespaces. It can be created, and also be removed when only a part of it
    exists.
    """

    def make(self) -> None: ...

    def remove(self) -> None: ...


_Place = TypeVar("_Place", bound=Place)


@contextmanager
def standing(made: Callable[[], _Place]) -> Iterator[_Place]:
    """A place while it exists. Raises NoIslandError where there can be none."""
    if os.geteuid() != 0:
        raise NoIslandError("network namespaces need root")
    place = made()
    try:
        place.make()
    except (RuntimeError, FileNotFoundError) as error:
        place.remove()
        raise NoIslandError(f"network namespaces can't be made here: {error}") from error
    try:
        yield place
    finally:
        place.remove()


def island() -> AbstractContextManager[Island]:
    """An island. Raises NoIslandError where there can be none."""
    return standing(lambda: Island(os.getpid() % 4096))


class BrokerFor:
    """A broker that listens where an island can reach it, and its bootstrap servers.

    Args:
        data_dir: the broker's data directory.
        place: None for a broker on the loopback address only.
    """

    alone = True
    """While it is down, no other broker answers."""

    def __init__(self, data_dir: Path, place: Island | None) -> None:
        self.broker = EmbeddedKafka(data_dir)
        self._place = place
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> BrokerFor:
        if self._place is not None:
            self._listen_at(self._place.ways[KAFKA].service)
        self.broker.start(progress=print)
        return self

    def __exit__(self, *_: object) -> None:
        # A client that outlives the island would ask whatever answers at that address then.
        forget_admins()
        try:
            self.broker.stop()
        finally:
            self._patch.undo()

    @property
    def servers(self) -> str:
        """The address at which everybody reaches it. Starts it if it doesn't run."""
        servers = self.broker.start()
        place = self._place
        return servers if place is None else servers.replace("127.0.0.1", place.ways[KAFKA].service)

    def take_away(self, how: str, _draw: random.Random) -> tuple[str, Callable[[], object]]:
        """Disturb it. Returns what was disturbed, and a function that heals it.

        Args:
            how: `clean` and `hard` end it; `stands still` suspends it.
        """
        broker = self.broker
        if how == "stands still":
            pid = broker.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            return "the broker", lambda: os.kill(pid, signal.SIGCONT)
        broker.kill() if how == "hard" else broker.stop()
        return "the broker", broker.start

    def wait_whole(self) -> None:
        """It is whole as soon as it runs."""

    def _listen_at(self, address: str) -> None:
        properties, data_dir = embedded_kafka.server_properties, self.broker.data_dir

        def elsewhere(launch: Any, log_dir: Path) -> dict[str, str]:
            found = properties(launch, log_dir)
            if data_dir not in log_dir.parents:
                return found
            listen = found["advertised.listeners"]
            return {
                **found,
                "listeners": found["listeners"].replace(listen, listen.replace("127.0.0.1", "0.0.0.0")),
                "advertised.listeners": listen.replace("127.0.0.1", address),
            }

        self._patch.setattr(embedded_kafka, "server_properties", elsewhere)
