"""The embedded Kafka of a data directory: started, stopped, described, and watched over in a cluster.

Responsible for: whose broker it is and how long it runs; how one runs is `common.embedded_kafka`'s matter.
Keeps the rule that what was started here is stopped here, and nothing else.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from fcluster.common.errors import FclusterError
from fcluster.common.settings import Settings

if TYPE_CHECKING:
    from fcluster.common.embedded_kafka import EmbeddedKafka
    from fcluster.live_view import View

BROKER_CHECK_INTERVAL_S = 0.5


class NoBrokers(FclusterError):  # noqa: N818
    """A command needs Kafka and knows of none."""


def no_brokers(data_dir: Path) -> NoBrokers:
    """The error of a command that needs brokers and found none."""
    return NoBrokers(
        f"no brokers are given, and no cluster or embedded Kafka runs in {data_dir}",
        remedy="Give --brokers HOST:PORT, or start a broker with `fcluster kafka start`.",
    )


def kafka_directory(data_dir: Path) -> Path:
    """Where the embedded broker of a data directory keeps what is its own."""
    return data_dir / "kafka"


def detached_kafka(data_dir: Path) -> str | None:
    """The bootstrap servers of the broker that runs in the data directory, whoever started it."""
    if not kafka_directory(data_dir).is_dir():
        return None  # spares the commands that need no broker the loading of the Kafka client
    from fcluster.common import embedded_kafka

    return embedded_kafka.status(kafka_directory(data_dir)).bootstrap_servers or None


def start_kafka(
    data_dir: Path, foreground: bool, progress: Callable[[str], None]
) -> tuple[str, Callable[[], None]]:
    """Start the broker of `data_dir`; gives its servers, and what to call to stay as long as it shall run."""
    from fcluster.common import embedded_kafka

    if not foreground:
        return embedded_kafka.start_detached(kafka_directory(data_dir), progress=progress), lambda: None
    broker = embedded_kafka.EmbeddedKafka(kafka_directory(data_dir))
    servers = broker.start(progress=progress)

    def wait() -> None:
        try:
            _wait_for_signal()
        finally:
            progress("stopping Kafka")
            broker.stop()

    return servers, wait


def _wait_for_signal() -> None:
    import signal

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: ended.set())
    ended.wait()


def stop_kafka(data_dir: Path) -> bool:
    """Stop the broker that was left running; whether there was one."""
    from fcluster.common import embedded_kafka

    return embedded_kafka.stop_detached(kafka_directory(data_dir))


def describe_kafka(data_dir: Path) -> tuple[bool, str]:
    """Whether a broker of `data_dir` answers, and a line that says so."""
    from fcluster.common import embedded_kafka

    found = embedded_kafka.status(kafka_directory(data_dir))
    if found.state == "stopped":
        return False, f"not running in {data_dir}"
    owner = "on its own" if found.detached else f"as a part of process {found.owner_pid}"
    what = "running" if found.state == "running" else "starting, or hanging"
    return (
        found.state == "running",
        f"{what}: {found.bootstrap_servers}, process {found.pid}, {owner}, log {found.log_file}",
    )


@contextlib.contextmanager
def brokers_for(settings: Settings, directory: Path) -> Generator[tuple[EmbeddedKafka | None, str]]:
    """The broker that runs for this cluster alone (None if others do), and the servers to use."""
    if settings.bootstrap_servers:
        yield None, settings.bootstrap_servers
        return
    from fcluster.common.embedded_kafka import EmbeddedKafka

    broker = EmbeddedKafka(kafka_directory(directory))
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
    """Starts the embedded broker again when it dies, in a thread; does nothing without one."""

    def __init__(self, broker: EmbeddedKafka | None, view: View) -> None:
        self._broker = broker
        self._view = view
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker-guard", daemon=True)
        self.restarts = 0

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End; waits for the thread, and so for a start that is under way."""
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
            self._view.line("kafka", f"Kafka died; it is started again in {delay_ms / 1000:.1f} s")
            if self._stopped.wait(delay_ms / 1000):
                return
            self.restarts += 1
            try:
                self._broker.start(progress=lambda text: self._view.line("kafka", text))
            except FclusterError as error:
                self._view.line("kafka", f"ERROR {error.message}")
            started_s = time.monotonic()


def say(text: str) -> None:
    """A line for who waits at the terminal."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
