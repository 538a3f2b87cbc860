"""Hosts on their own network, made of network namespaces. Needs root.

Responsible for: namespaces joined by a bridge in a further namespace, so that the machine's own network isn't
touched; host names; commands that run there; links that can be cut and restored; and leaving nothing behind,
even if a test run was killed (the next one cleans up).

A host has its own network, host name and directory. Processes, users and the rest of the file system are the
machine's.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fcluster.common.processes import ChildProcess, spawn
from fcluster.kafka.embedded import Adapt, EmbeddedKafka
from tests.harness import REPOSITORY

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/var/run/netns")
_PREFIX = "fclusterhosts"
_NET = "10.77.0"
"""Any address will do, because there is nobody else on that network."""
_NAMED = 'hostname "$0" && exec "$@"'
COMMAND_TIMEOUT_S = 60.0


def run_ip(*arguments: str, check: bool = True) -> str:
    """Run iproute2's `ip`. Returns what it printed.

    Raises:
        RuntimeError: it failed. The message says why.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """One of the hosts of a `Lan`."""

    def __init__(self, lan: Lan, name: str, address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self.directory = directory
        self._lan = lan
        self._namespace = f"{lan.tag}-{name}"
        self._children: list[ChildProcess] = []
        self.env: dict[str, str] = {}
        """Variables that are added to the environment of its commands."""

    @property
    def prefix(self) -> Sequence[str]:
        """The command prefix that starts a command on this host, without forking."""
        named = ("unshare", "--uts", "sh", "-c", _NAMED, self.name)
        return ("ip", "netns", "exec", self._namespace, *named)

    def fcluster(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command `fcluster` in this host's directory until it ends.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            [*self.prefix, *_fcluster(arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=self.directory,
            env=self._environment(),
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"fcluster {arguments}: {done.stdout}{done.stderr}"
        return done

    def start(self, name: str, *arguments: str) -> ChildProcess:
        """Start `fcluster` with `arguments` as a server. Its log is `NAME.log`. It ends with the network."""
        return self.start_python(name, *_fcluster(arguments)[1:])

    def start_python(self, name: str, *arguments: str) -> ChildProcess:
        """Do the same for any Python program."""
        child = spawn(
            f"{name} on {self.name}",
            [*self.prefix, sys.executable, *arguments],
            log_file=self.log_path(name),
            env=self._environment(),
            cwd=self.directory,
        )
        self._children.append(child)
        return child

    def log_path(self, name: str) -> Path:
        """The log of what was started as `name`."""
        return self.directory / f"{name}.log"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """In this block, the calling thread, and the threads that it starts, are on this host's network."""
        with (
            open("/proc/thread-self/ns/net", "rb") as home,
            (_NAMESPACES / self._namespace).open("rb") as there,
        ):
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """In this block, the host can reach no other host and can't be reached. Neither side is told."""
        self._lan.switch("link", "set", self.name, "down")
        try:
            yield
        finally:
            self._lan.switch("link", "set", self.name, "up")

    def make(self) -> None:
        """Create it. Called by the `Lan`."""
        self.directory.mkdir(parents=True)
        run_ip("netns", "add", self._namespace)
        inside = ("-n", self._namespace)
        run_ip(*inside, "link", "set", "lo", "up")
        # It is created in the host, with its far end in the switch: neither end is ever in the machine's own
        # network.
        run_ip(
            *inside, "link", "add", "eth0", "type", "veth", "peer", "name", self.name, "netns", self._lan.hub
        )
        run_ip(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        run_ip(*inside, "link", "set", "eth0", "up")
        self._lan.switch("link", "set", self.name, "master", "br0", "up")

    def close(self) -> None:
        """Kill what runs here, and remove the host."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait(10)
            child.join_output()
        run_ip("netns", "del", self._namespace, check=False)

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **self.env}


class Lan:
    """Hosts on one network: `with lan(tmp_path, "host-a", "host-b") as (a, b)`."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.tag = f"{_PREFIX}-{os.getpid()}"
        self.hub = f"{self.tag}-switch"
        self.hosts = [
            Host(self, name, f"{_NET}.{number}", directory / name) for number, name in enumerate(names, 1)
        ]

    def switch(self, *arguments: str) -> None:
        """Run `ip` where the bridge is."""
        run_ip("-n", self.hub, *arguments)

    def make(self) -> None:
        """Create all of it."""
        run_ip("netns", "add", self.hub)
        self.switch("link", "add", "br0", "type", "bridge")
        self.switch("link", "set", "br0", "up")
        for host in self.hosts:
            host.make()

    def close(self) -> None:
        """Remove whatever exists of it."""
        with ExitStack() as closing:
            closing.callback(run_ip, "netns", "del", self.hub, check=False)
            for host in self.hosts:
                closing.callback(host.close)


@contextmanager
def lan(directory: Path, *names: str) -> Iterator[list[Host]]:
    """Hosts with these names, on one network. Where that isn't possible, the test is skipped, with the
    reason.
    """
    what = f"hosts of network namespaces ({', '.join(names)})"
    if os.geteuid() != 0:
        pytest.skip(f"{what}: not tested, making them needs root")
    made = Lan(directory, names)
    try:
        _sweep()
        made.make()
    except (RuntimeError, OSError) as error:
        made.close()
        pytest.skip(f"{what}: not tested, they can't be made here: {error}")
    try:
        yield made.hosts
    finally:
        made.close()


def _sweep() -> None:
    """Remove what killed test runs have left."""
    for name in re.findall(rf"^({_PREFIX}-(?:\d+)-\S+)", run_ip("netns", "list"), re.MULTILINE):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            run_ip("netns", "del", name, check=False)


def _set_namespace(descriptor: int) -> None:
    # os.setns exists only since Python 3.12.
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _fcluster(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "fcluster", *arguments]


# --- Kafka on one of them ------------------------------------------------------------------------------


def reachable_at(address: str) -> Adapt:
    """The settings of an embedded broker that other hosts reach at `address`."""

    def adapt(ours: dict[str, str]) -> dict[str, str]:
        advertised = ours["advertised.listeners"]
        return {
            **ours,
            "listeners": ours["listeners"].replace(advertised, advertised.replace("127.0.0.1", "0.0.0.0")),
            "advertised.listeners": advertised.replace("127.0.0.1", address),
        }

    return adapt


def start_kafka(host: Host) -> ChildProcess:
    """Start a broker on `host` that the other hosts can reach; see `bootstrap_servers`."""
    return host.start_python("kafka", "-m", "tests.hosts", str(host.directory / "kafka"), host.address)


def bootstrap_servers(host: Host) -> str:
    """The bootstrap servers of the broker on `host`. Empty until it answers."""
    try:
        return (host.directory / "kafka-servers").read_text()
    except FileNotFoundError:
        return ""


def _run_kafka(directory: Path, address: str) -> None:
    broker = EmbeddedKafka(directory, adapt=reachable_at(address))
    servers = broker.start(progress=print).replace("127.0.0.1", address)
    unfinished = directory.with_name("kafka-servers.partial")
    unfinished.write_text(servers)
    unfinished.rename(directory.with_name("kafka-servers"))
    signal.pause()  # until it is killed, together with the broker


if __name__ == "__main__":
    _run_kafka(Path(sys.argv[1]), sys.argv[2])
