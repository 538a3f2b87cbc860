"""The embedded Kafka of a data directory: started, stopped, described, and supervised in a cluster.

Responsible for: deciding who owns a broker and how long it runs; `kafka.embedded` runs it. Rule: this module
stops exactly what it has started.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.settings import Settings

if TYPE_CHECKING:
    from fcluster.cli.live_view import View
    from fcluster.kafka.embedded import BrokerStatus

BROKER_CHECK_INTERVAL_S = 0.5


class OwnBrokers(Protocol):
    """One embedded broker or several, bound to this process."""

    @property
    def pid(self) -> int | None:
        """The process id of one of them. None unless all of them run."""
        ...

    def start(self, progress: Callable[[str], None] | None = None) -> str:
        """Start those that aren't running. Returns the bootstrap servers."""
        ...

    def stop(self) -> None:
        """Stop them cleanly."""
        ...

    def kill(self) -> None:
        """Kill them, like a crash."""
        ...


class NoBrokers(FclusterError):  # noqa: N818
    """A command needs Kafka but knows no brokers."""


def no_brokers(data_dir: Path, *, or_offline: bool = False) -> NoBrokers:
    """The error of a command that needs brokers, but has found none. `or_offline`: it has the option
    --offline.
    """
    remedy = "Give --brokers HOST:PORT, or start a broker with `fcluster kafka start`."
    return NoBrokers(
        f"no brokers are given, and no cluster or embedded Kafka runs in {data_dir}",
        remedy=f"{remedy} Or check only the job, with --offline." if or_offline else remedy,
    )


def kafka_directory(data_dir: Path) -> Path:
    """Where the embedded broker of a data directory keeps its files."""
    return data_dir / "kafka"


def detached_kafka(data_dir: Path) -> str | None:
    """The bootstrap servers of the brokers that run in the data directory, whoever started them."""
    directory = kafka_directory(data_dir)
    if not directory.is_dir():
        return None  # so that commands without a broker don't load the Kafka client
    from fcluster.kafka import embedded as embedded_kafka
    from fcluster.kafka import embedded_cluster

    if embedded_cluster.is_cluster(directory):
        found = embedded_cluster.status(directory).values()
        return ",".join(one.bootstrap_servers for one in found if one.bootstrap_servers) or None
    return embedded_kafka.status(directory).bootstrap_servers or None


@dataclass(frozen=True)
class Brokers:
    """Which embedded brokers a command is for.

    Attributes:
        nodes: the wanted number of brokers. 0: as many as the data directory has, or one if it is new.
        only: only this one of several brokers. 0: all of them.
        settings: Kafka's own, for the brokers of a cluster. Empty: unchanged.
    """

    nodes: int = 0
    only: int = 0
    settings: Mapping[str, str] = field(default_factory=dict[str, str])


def start_kafka(
    data_dir: Path, foreground: bool, progress: Callable[[str], None], which: Brokers | None = None
) -> tuple[str, Callable[[], None]]:
    """Start the brokers of `data_dir`. Returns their addresses, and a function that waits for as long as they
    should run.

    Raises:
        FclusterError: they can't be started, or the data directory has another number of them.
    """
    from fcluster.kafka import embedded as embedded_kafka
    from fcluster.kafka import embedded_cluster

    which = which or Brokers()
    directory = kafka_directory(data_dir)
    if not _is_cluster(directory, which):
        if which.settings:
            raise UsageOfBrokers(
                "--broker-config works only with several brokers",
                remedy="Add --nodes 3, or leave out --broker-config.",
            )
        if not foreground:
            return embedded_kafka.start_detached(directory, progress=progress), lambda: None
        broker = embedded_kafka.EmbeddedKafka(directory)
        servers = broker.start(progress=progress)
    else:
        nodes, settings = which.nodes or 3, which.settings or None
        if not foreground:
            only = [which.only] if which.only else []
            return (
                embedded_cluster.start_detached(
                    directory, nodes, progress=progress, settings=settings, only=only
                ),
                lambda: None,
            )
        if which.only:
            raise UsageOfBrokers(
                "one broker of several can't be started in the foreground",
                remedy="Leave out --foreground or --node.",
            )
        broker = embedded_cluster.EmbeddedCluster(directory, nodes, settings=settings)
        servers = broker.start(progress=progress)

    def wait() -> None:
        try:
            _wait_for_signal()
        finally:
            progress("stopping Kafka")
            broker.stop()

    return servers, wait


def _is_cluster(directory: Path, which: Brokers) -> bool:
    """Whether several brokers are meant. Raises UsageOfBrokers if that doesn't fit the data directory."""
    from fcluster.kafka import embedded_cluster

    has = len(embedded_cluster.nodes_of(directory)) or (1 if (directory / "broker.json").exists() else 0)
    if which.nodes and has and which.nodes != has:
        raise UsageOfBrokers(
            f"the Kafka in {directory} has {_brokers(has)}, not {which.nodes}, and the number can't be "
            "changed",
            remedy="Leave out --nodes, or choose another directory (--data-dir).",
        )
    nodes = has or which.nodes or 1
    if which.only and not (has > 1 and which.only <= has):
        raise UsageOfBrokers(
            f"there is no broker {which.only} in {directory}: it has {_brokers(has)}",
            remedy="Leave out --node."
            if has == 1
            else "Start several with `fcluster kafka start --nodes 3`.",
        )
    return nodes > 1


def _brokers(count: int) -> str:
    return {0: "none", 1: "one broker"}.get(count, f"{count} brokers")


class UsageOfBrokers(FclusterError):  # noqa: N818
    """The options don't fit the existing brokers."""

    exit_code = ExitCode.USAGE


def _wait_for_signal() -> None:
    import signal

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: ended.set())
    ended.wait()


def stop_kafka(data_dir: Path, which: Brokers | None = None, *, hard: bool = False) -> bool:
    """Stop the brokers that were left running (`hard`: `kill -9` them). Returns whether there were any."""
    from fcluster.kafka import embedded as embedded_kafka
    from fcluster.kafka import embedded_cluster

    directory, which = kafka_directory(data_dir), which or Brokers()
    if not _is_cluster(directory, which):
        return (embedded_kafka.kill_detached if hard else embedded_kafka.stop_detached)(directory)
    end = embedded_cluster.kill_detached if hard else embedded_cluster.stop_detached
    return end(directory, [which.only] if which.only else [])


def describe_kafka(data_dir: Path) -> tuple[bool, str]:
    """Whether all brokers of `data_dir` answer, and a line for each of them."""
    from fcluster.kafka import embedded as embedded_kafka
    from fcluster.kafka import embedded_cluster

    directory = kafka_directory(data_dir)
    if not embedded_cluster.is_cluster(directory):
        found = embedded_kafka.status(directory)
        if found.state == "stopped":
            return False, f"not running in {data_dir}"
        return found.state == "running", _described(found)
    every = embedded_cluster.status(directory)
    lines = [
        f"broker {node}: {_described(one) if one.state != 'stopped' else 'stopped'}"
        for node, one in every.items()
    ]
    if all(one.state == "stopped" for one in every.values()):
        lines.insert(0, f"not running in {data_dir}")
    return all(one.state == "running" for one in every.values()), "\n".join(lines)


def _described(found: BrokerStatus) -> str:
    owner = "on its own" if found.detached else f"as a part of process {found.owner_pid}"
    what = "running" if found.state == "running" else "starting, or hanging"
    return f"{what}: {found.bootstrap_servers}, process {found.pid}, {owner}, log {found.log_file}"


@contextlib.contextmanager
def brokers_for(settings: Settings, directory: Path) -> Generator[tuple[OwnBrokers | None, str]]:
    """The brokers that run for this cluster alone (None if it uses others), and the addresses to use."""
    if settings.bootstrap_servers:
        yield None, settings.bootstrap_servers
        return
    from fcluster.kafka.embedded import EmbeddedKafka
    from fcluster.kafka.embedded_cluster import EmbeddedCluster, is_cluster

    place = kafka_directory(directory)
    broker = EmbeddedCluster(place) if is_cluster(place) else EmbeddedKafka(place)
    servers = broker.start(progress=say)
    if broker.attached:
        say(f"using the Kafka that runs in {directory}: {servers}")
        yield None, servers
        return
    try:
        yield broker, servers
    finally:
        say("stopping Kafka")
        broker.stop()


class BrokerGuard:
    """Restarts the embedded broker when it dies, in a thread. Does nothing if there is none."""

    def __init__(self, broker: OwnBrokers | None, view: View) -> None:
        self._broker = broker
        self._view = view
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker-guard", daemon=True)
        self.restarts = 0

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stop. This waits for the thread, and so for a broker that is just being started."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        from fcluster.common.processes import RestartBackoff

        backoff = RestartBackoff()
        started_s = time.monotonic()
        while self._broker is not None and not self._stopped.wait(BROKER_CHECK_INTERVAL_S):
            if self._broker.pid is not None:
                continue
            delay_ms = backoff.delay_ms((time.monotonic() - started_s) * 1000)
            self._view.line("kafka", f"Kafka died; restarting it in {delay_ms / 1000:.1f} s")
            if self._stopped.wait(delay_ms / 1000):
                return
            self.restarts += 1
            try:
                self._broker.start(progress=lambda text: self._view.line("kafka", text))
            except FclusterError as error:
                self._view.line("kafka", f"ERROR {error.message}")
            started_s = time.monotonic()


def say(text: str) -> None:
    """Print a line for the user at the terminal."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
