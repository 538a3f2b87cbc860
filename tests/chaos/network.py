"""A worker on a network of its own, which a test can cut; needs root.

Responsible for: a network namespace with two veth pairs, one on the way to Kafka, one on the way to the
coordinator, made and removed by the test. Kafka and coordinator listen on addresses of the loopback device,
which stay when a pair is cut.

A cut in both directions takes the pair's far end down, so that what is sent vanishes without a word. A cut in
one direction is a blackhole route for the one side's addresses: the other side's packets still arrive.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

KAFKA, COORDINATOR = "kafka", "coordinator"


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command of iproute2."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


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
    """The namespace of one worker; `prefix` starts a command in it."""

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
        """Whatever of it is there."""
        for way in self.ways.values():
            run("ip", "link", "del", way.outside, check=False)
            run("ip", "route", "del", "blackhole", f"{way.net}.6", check=False)
            run("ip", "address", "del", f"{way.service}/32", "dev", "lo", check=False)
        run("ip", "netns", "del", self.name, check=False)

    @contextmanager
    def cut(self, what: str) -> Iterator[None]:
        """Both directions."""
        way = self.ways[what]
        run("ip", "link", "set", way.outside, "down")
        try:
            yield
        finally:
            run("ip", "link", "set", way.outside, "up")

    @contextmanager
    def mute(self, what: str) -> Iterator[None]:
        """What the worker sends doesn't arrive; it still hears."""
        way = self.ways[what]
        run("ip", "-n", self.name, "route", "replace", "blackhole", way.service)
        try:
            yield
        finally:
            run("ip", "-n", self.name, "route", "del", "blackhole", way.service)
            run("ip", "-n", self.name, "route", "replace", way.service, "via", f"{way.net}.5")

    @contextmanager
    def deafen(self, what: str) -> Iterator[None]:
        """What is sent to the worker doesn't arrive; it is still heard."""
        way = self.ways[what]
        run("ip", "route", "add", "blackhole", f"{way.net}.6")
        try:
            yield
        finally:
            run("ip", "route", "del", "blackhole", f"{way.net}.6")


@contextmanager
def island() -> Iterator[Island]:
    """An island; skips the test, saying why, where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Island(os.getpid() % 4096)
    try:
        made.make()
    except (RuntimeError, FileNotFoundError) as error:
        made.remove()
        pytest.skip(f"network namespaces can't be made here: {error}")
    try:
        yield made
    finally:
        made.remove()
