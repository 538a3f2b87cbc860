"""The embedded Kafka broker: a real Apache Kafka in KRaft mode on loopback, for machines without brokers.

Responsible for: setting up a data directory, starting the broker, waiting until it answers, and stopping it;
a broker bound to this process (`EmbeddedKafka`) or one that survives it (`start_detached`). Invariants:
- There is one broker for a data directory. The broker process itself holds the lock on `broker.lock` (it
  inherits it), so the lock is free exactly when no broker runs, however it ended. No process id has to be
  trusted for that.
- A bound broker ends with its parent, even if that is killed by `kill -9`.
- Data and ports stay the same from one run to the next (the ports unless another program took them). While
  the broker is down, they stay reserved for it (`ports`).
- Logs are bounded in size.

Must not be used except for development, tests and demos: it is one machine without security.

A broker may be one of several that form a cluster; its `Member` then says which one. `embedded_cluster` has
what belongs to all of them.

In the data directory: `broker.json` (what was last started), `broker.pid`, `broker.lock`, `data/` (Kafka's
own), `logs/server.log`, `logs/console.log`, and configuration files, which are written again at each start.
"""

from __future__ import annotations

import base64
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal

import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from fcluster.common import processes
from fcluster.common.errors import DirectoryInUse
from fcluster.kafka import ports
from fcluster.kafka.jars import (
    EmbeddedKafkaError,
    Progress,
    find_java,
    kafka_version,
    other_ways,
    resolve_jars,
)

__all__ = [
    "BrokerStatus",
    "EmbeddedKafka",
    "EmbeddedKafkaError",
    "Member",
    "NodePorts",
    "is_running",
    "kill_detached",
    "new_cluster_id",
    "server_properties",
    "start_detached",
    "status",
    "stop_detached",
]

JVM_OPTIONS_VARIABLE: Final = "KAFKA_JVM_PERFORMANCE_OPTS"
"""The environment variable of Kafka's own scripts. Its options take the place of `COMPILED_QUICKLY`."""
COMPILED_QUICKLY: Final = "-XX:TieredStopAtLevel=1"
"""Java's second compiler uses a processor for itself in the first minutes of a broker's life, which the job
on the same machine needs (docs/decisions/0182-busy-processors.md).
"""
START_TIMEOUT_S = 90.0
"""A start takes about 7 s on an idle machine (10 s the first time). If it takes much longer, something is
wrong.
"""
STOP_TIMEOUT_S = 20.0
STATUS_TIMEOUT_S = 5.0
_LOCK_PATIENCE_S = 1.0
_PORT_ATTEMPTS_MAX = 3
MEMBER_START_TIMEOUT_S = 180.0
"""Brokers of a cluster start in parallel, and answer once a majority does."""
_ALONE: Final = 1
"""The node id of a broker that is alone."""

Adapt = Callable[[dict[str, str]], dict[str, str]]
"""Takes our settings of the broker and returns those to use."""


LOOPBACK: Final = "127.0.0.1"


class NodePorts(msgspec.Struct, frozen=True):
    """Where one broker of a cluster listens: for clients, and for the other controllers."""

    port: int
    controller_port: int
    host: str = LOOPBACK
    """The address that clients use. Only tests with their own network use another one than loopback."""


class Member(msgspec.Struct, frozen=True):
    """Which of a cluster's brokers this is.

    Attributes:
        node_id: 1 to the number of nodes.
        nodes: the ports of all brokers of the cluster, by node id.
        cluster_id: the same for all brokers. It never changes.
        settings: Kafka's, in addition to ours.
    """

    node_id: int
    nodes: Mapping[int, NodePorts]
    cluster_id: str
    settings: Mapping[str, str] = {}


class _Launch(msgspec.Struct, frozen=True):
    """`broker.json`: the broker that was last started here. `member` is None for a broker that is alone."""

    port: int
    controller_port: int
    detached: bool
    owner_pid: int
    kafka_version: str
    member: Member | None = None

    @property
    def host(self) -> str:
        return LOOPBACK if self.member is None else self.member.nodes[self.member.node_id].host

    @property
    def bootstrap_servers(self) -> str:
        return f"{self.host}:{self.port}"


# Created here: several brokers are checked in parallel, and msgspec crashes if two threads are the first to
# decode a type (decision 0086).
_decode_launch = msgspec.json.Decoder(_Launch).decode


class BrokerStatus(msgspec.Struct, frozen=True):
    """What `status` found.

    `running`: a broker answers; `starting`: one was started, or hangs, but doesn't answer; `stopped`: there
    is none. `detached`: it was started to survive the command (`fcluster kafka start`). For a stopped broker,
    `bootstrap_servers` is empty and `pid` is 0.
    """

    state: Literal["stopped", "starting", "running"]
    bootstrap_servers: str
    pid: int
    detached: bool
    owner_pid: int
    data_dir: str
    log_file: str


class _PortTakenError(Exception):
    """Another program took a port between our check and the broker's bind."""


def _silent(_line: str) -> None:
    pass


# --- what users of this module call ------------------------------------------------------------------


class EmbeddedKafka:
    """A broker that lives as long as this object, or at most as this process. A context manager.

    If a detached broker runs on the same directory, `start` uses that one and `stop` leaves it running.

    Args:
        data_dir: created if it doesn't exist. Nothing else may use it.
        heap_mb: the broker's maximum heap.
        adapt: takes the broker's settings and returns those to use, for tests that need other listeners. It
            has to keep a listener for us without TLS and login, on loopback and on the same port.
        member: which broker of a cluster it is. None: the only one.
        prefix: a command that starts the broker, without forking.
    """

    def __init__(
        self,
        data_dir: Path | str,
        heap_mb: int = 512,
        *,
        adapt: Adapt = dict,
        member: Member | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.attached = False
        self._heap_mb = heap_mb
        self._adapt = adapt
        self._member = member
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._bootstrap_servers = ""

    def start(self, progress: Progress | None = None) -> str:
        """Starts the broker unless it already runs, waits until it answers, and returns its bootstrap
        servers.

        Raises:
            EmbeddedKafkaError: it can't be started; the remedy names alternatives.
            DirectoryInUse: a broker that belongs to another process runs on the directory.
        """
        if self._process is not None and self._process.poll() is None:
            return self._bootstrap_servers
        self.stop()
        lock = _lock_directory(self.data_dir)
        if lock is None:
            self._bootstrap_servers = _attach(self.data_dir)
            self.attached = True
            return self._bootstrap_servers
        with ExitStack() as undo:
            undo.callback(lock.close)
            launcher = _Launcher(
                self.data_dir, self._heap_mb, lock, progress or _silent, self._adapt, self._member
            )
            launch, self._process = launcher.launch_bound(self._prefix)
            undo.pop_all()
        self._lock = lock
        self.attached = False
        self._bootstrap_servers = launch.bootstrap_servers
        return self._bootstrap_servers

    def stop(self) -> None:
        """Stops the broker if it is ours, and waits until it has exited. Has no effect when none runs."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()
        self.attached = False

    def kill(self) -> None:
        """Kills the broker (`kill -9`), like a crash. The next `start` recovers."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    @property
    def pid(self) -> int | None:
        """The broker's process id. None if the broker isn't ours or doesn't run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> EmbeddedKafka:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_detached(
    data_dir: Path | str,
    heap_mb: int = 512,
    progress: Progress | None = None,
    member: Member | None = None,
) -> str:
    """Starts a broker that survives this process, or finds a running one. Returns its bootstrap servers.

    Raises: as `EmbeddedKafka.start`.
    """
    directory = Path(data_dir).absolute()
    lock = _lock_directory(directory)
    if lock is None:
        return _attach(directory)
    try:
        with lock:
            launch = _Launcher(directory, heap_mb, lock, progress or _silent, dict, member).launch_detached()
    except EmbeddedKafkaError:
        # An exiting process holds its files a little longer than it is visible.
        _wait_until_unlocked(directory, STATUS_TIMEOUT_S)
        raise
    return launch.bootstrap_servers


def stop_detached(data_dir: Path | str) -> bool:
    """Stops the detached broker of `data_dir` and waits until it has exited. False if none ran.

    Raises:
        DirectoryInUse: the broker there belongs to a process that is still running.
    """
    return _end_if_detached(data_dir, ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 5.0)))


def kill_detached(data_dir: Path | str) -> bool:
    """Kills the detached broker of `data_dir` (`kill -9`), like a crash. False if none ran.

    Raises:
        DirectoryInUse: the broker there belongs to a process that is still running.
    """
    return _end_if_detached(data_dir, ((signal.SIGKILL, 5.0),))


def _end_if_detached(data_dir: Path | str, steps: Sequence[tuple[signal.Signals, float]]) -> bool:
    directory = Path(data_dir).absolute()
    if not _is_locked(directory):
        return False
    launch = _read_launch(directory)
    if launch is not None and not launch.detached:
        raise _in_use(directory, launch)
    return _end_detached(directory, steps)


def _end_detached(directory: Path, steps: Sequence[tuple[signal.Signals, float]]) -> bool:
    for number, timeout_s in steps:
        pid = _read_pid(directory)
        if pid is not None and _is_locked(directory):
            _signal(pid, number)
        if _wait_until_unlocked(directory, timeout_s):
            return True
    raise EmbeddedKafkaError(
        f"can't stop the Kafka broker in {directory} (process {_read_pid(directory)})",
        remedy="Kill that process yourself.",
    )


def status(data_dir: Path | str) -> BrokerStatus:
    """Says whether a broker runs on `data_dir`, whoever started it. It starts and changes nothing."""
    directory = Path(data_dir).absolute()
    log_file = str(_log_file(directory))
    deadline = time.monotonic() + STATUS_TIMEOUT_S
    # Ask at short intervals: a broker that dies in the meantime counts as stopped.
    while (launch := _read_launch(directory)) is not None and _is_locked(directory):
        answers = _answers(launch, timeout_s=0.5)
        if answers or time.monotonic() > deadline or not _listens(launch):
            return BrokerStatus(
                "running" if answers else "starting",
                launch.bootstrap_servers,
                _read_pid(directory) or 0,
                launch.detached,
                launch.owner_pid,
                str(directory),
                log_file,
            )
    return BrokerStatus("stopped", "", 0, False, 0, str(directory), log_file)


def is_running(data_dir: Path | str) -> bool:
    """Whether a broker process runs on `data_dir`, in whatever state. Fast."""
    return _is_locked(Path(data_dir).absolute())


# --- one broker for a directory ----------------------------------------------------------------------


def _lock_directory(directory: Path) -> IO[bytes] | None:
    """The directory's lock, now held by us, or None if a broker holds it. A process that inherits the lock
    keeps it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "broker.lock").open("ab")
    except OSError as error:
        raise EmbeddedKafkaError(
            f"cannot use {directory} as the embedded broker's data directory: {error.strerror}",
            remedy="Choose a directory that you may write to (--data-dir).",
        ) from error
    # `status` and `stop_detached` of other processes hold it for a moment while they check.
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.05)


def _is_locked(directory: Path) -> bool:
    try:
        with (directory / "broker.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def _wait_until_unlocked(directory: Path, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while _is_locked(directory):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _attach(directory: Path) -> str:
    """The bootstrap servers of the detached broker that holds the directory, once it answers."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and _is_locked(directory):
        launch = _read_launch(directory)
        if launch is not None and not launch.detached:
            raise _in_use(directory, launch)
        if launch is not None and _answers(launch, timeout_s=1.0):
            return launch.bootstrap_servers
        time.sleep(0.1)
    raise EmbeddedKafkaError(
        f"the Kafka broker in {directory} (process {_read_pid(directory)}) doesn't answer",
        remedy=f"See {_log_file(directory)}. Stop the broker with `fcluster kafka stop`, and start it again.",
    )


def _in_use(directory: Path, launch: _Launch) -> DirectoryInUse:
    return DirectoryInUse(
        f"{directory} is in use by a Kafka broker (process {_read_pid(directory)}, "
        f"{launch.bootstrap_servers}) that belongs to process {launch.owner_pid}",
        remedy=f"Stop process {launch.owner_pid}, or use its broker (--brokers {launch.bootstrap_servers}), "
        "or choose another directory (--data-dir).",
    )


def _read_launch(directory: Path) -> _Launch | None:
    try:
        return _decode_launch((directory / "broker.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def _read_pid(directory: Path) -> int | None:
    try:
        return int((directory / "broker.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _log_file(directory: Path) -> Path:
    return directory / "logs" / "server.log"


# --- starting ----------------------------------------------------------------------------------------


class _Launcher:
    """Sets up the locked directory and starts a broker there, which inherits the lock."""

    def __init__(
        self,
        directory: Path,
        heap_mb: int,
        lock: IO[bytes],
        progress: Progress,
        adapt: Adapt = dict,
        member: Member | None = None,
    ) -> None:
        if "," in str(directory):
            raise EmbeddedKafkaError(
                f"the embedded broker can't keep its data in {directory}: Kafka takes a comma for a "
                "separator",
                remedy="Choose a directory without a comma in its path (--data-dir).",
            )
        self._directory = directory
        self._heap_mb = heap_mb
        self._lock = lock
        self._progress = progress
        self._adapt = adapt
        self._member = member
        self._java = find_java()
        self._jars = resolve_jars(progress)
        self._console = directory / "logs" / "console.log"
        self._log_start_bytes = 0

    def launch_bound(self, prefix: Sequence[str] = ()) -> tuple[_Launch, subprocess.Popen[bytes]]:
        for attempt in range(1, _PORT_ATTEMPTS_MAX + 1):
            launch = self._prepare(detached=False)
            with self._console.open("wb") as console:
                process = processes.popen_bound(
                    [*prefix, *self._command("kafka.Kafka", str(self._directory / "server.properties"))],
                    pid_file=self._directory / "broker.pid",
                    stdout=console,
                    pass_fds=[self._lock.fileno()],
                )
            try:
                self._wait_until_ready(launch, partial(_runs, process))
                return launch, process
            except _PortTakenError:
                if attempt == _PORT_ATTEMPTS_MAX or self._member is not None:
                    raise self._ports_are_taken(launch) from None
            except BaseException:
                _end(process)
                raise
        raise AssertionError("unreachable")

    def launch_detached(self) -> _Launch:
        for _ in range(_PORT_ATTEMPTS_MAX):
            launch = self._prepare(detached=True)
            self._console.write_bytes(b"")
            processes.start_detached(
                self._command("kafka.Kafka", str(self._directory / "server.properties")),
                pid_file=self._directory / "broker.pid",
                log_file=self._console,
                pass_fds=[self._lock.fileno()],
            )
            try:
                self._wait_until_ready(launch, self._detached_is_alive)
                return launch
            except _PortTakenError:
                if self._member is not None:
                    raise self._ports_are_taken(launch) from None
                continue
            except BaseException:
                pid = _read_pid(self._directory)
                if pid is not None and self._detached_is_alive():
                    _signal(pid, signal.SIGKILL)
                raise
        raise self._failure("other programs took the ports that it chose, again and again")

    def _ports_are_taken(self, launch: _Launch) -> EmbeddedKafkaError:
        if self._member is None:
            return self._failure("other programs took the ports that it chose, again and again")
        # The other brokers know it by these ports.
        return self._failure(
            f"its ports {launch.port} and {launch.controller_port} are taken by another program"
        )

    def _detached_is_alive(self) -> bool:
        # It isn't our child. A zombie that init hasn't reaped would still accept signals, so check the
        # command line.
        pid = _read_pid(self._directory)
        if pid is None:
            return True
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"

    def _prepare(self, *, detached: bool) -> _Launch:
        directory = self._directory
        (directory / "logs").mkdir(exist_ok=True)
        member = self._member
        if member is None:
            port, controller_port = _choose_ports(directory)
        else:
            mine = member.nodes[member.node_id]
            port, controller_port = mine.port, mine.controller_port
        launch = _Launch(port, controller_port, detached, os.getpid(), kafka_version(), member)
        (directory / "log4j2.properties").write_text(_log4j2_properties(directory / "logs"), encoding="ascii")
        if not (directory / "data").exists():
            self._format(launch)
        _write_properties(directory / "server.properties", self._properties(launch, directory / "data"))
        (directory / "broker.pid").unlink(missing_ok=True)
        unfinished = directory / "broker.json.partial"
        unfinished.write_bytes(msgspec.json.encode(launch))
        unfinished.replace(directory / "broker.json")
        self._log_start_bytes = _size_bytes(_log_file(directory))
        self._progress(f"starting Apache Kafka {launch.kafka_version} on {launch.bootstrap_servers}")
        return launch

    def _properties(self, launch: _Launch, log_dir: Path) -> dict[str, str]:
        return self._adapt(server_properties(launch, log_dir))

    def _format(self, launch: _Launch) -> None:
        # It is written under another name until it is complete, so that a killed format leaves nothing
        # incomplete.
        unfinished = self._directory / "data.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        _write_properties(self._directory / "format.properties", self._properties(launch, unfinished))
        self._progress(f"formatting {self._directory}")
        identity = launch.member.cluster_id if launch.member is not None else new_cluster_id()
        options = ["format", "-t", identity, "-c", str(self._directory / "format.properties")]
        with self._console.open("wb") as console:
            process = processes.popen_bound(
                self._command("kafka.tools.StorageTool", *options), stdout=console
            )
        try:
            code = process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._failure(f"formatting took more than {START_TIMEOUT_S:.0f} s") from None
        finally:
            _end(process)
        if code != 0:
            raise self._failure(f"formatting its directory failed ({processes.describe_exit(code)})")
        unfinished.replace(self._directory / "data")

    def _command(self, java_class: str, *arguments: str) -> list[str]:
        return [
            str(self._java),
            f"-Xmx{self._heap_mb}m",
            *os.environ.get(JVM_OPTIONS_VARIABLE, COMPILED_QUICKLY).split(),
            "-XX:+ExitOnOutOfMemoryError",
            f"-XX:ErrorFile={self._directory / 'logs' / 'jvm-crash.log'}",
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile={self._directory / 'log4j2.properties'}",
            "-cp",
            f"{self._jars}{os.sep}*",
            java_class,
            *arguments,
        ]

    def _wait_until_ready(self, launch: _Launch, is_alive: Callable[[], bool]) -> None:
        timeout_s = START_TIMEOUT_S if launch.member is None else MEMBER_START_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not is_alive():
                if self._port_was_taken():
                    raise _PortTakenError
                raise self._failure("it stopped while starting")
            if _answers(launch, timeout_s=2.0):
                self._progress(f"Apache Kafka {launch.kafka_version} is ready on {launch.bootstrap_servers}")
                return
            time.sleep(0.1)
        raise self._failure(f"it didn't answer within {timeout_s:.0f} s")

    def _port_was_taken(self) -> bool:
        return any("Address already in use" in line for line in self._new_log_lines())

    def _failure(self, what: str) -> EmbeddedKafkaError:
        console = self._console.read_text(errors="replace") if self._console.exists() else ""
        said = last_error(self._new_log_lines()) or last_error(console.splitlines())
        detail = f": {said[:500]}" if said else ""
        return EmbeddedKafkaError(
            f"can't start the embedded Kafka broker in {self._directory}: {what}{detail}",
            remedy=f"See {_log_file(self._directory)} and {self._console}; or {other_ways()}.",
        )

    def _new_log_lines(self) -> list[str]:
        log_file = _log_file(self._directory)
        start = self._log_start_bytes if _size_bytes(log_file) >= self._log_start_bytes else 0
        try:
            with log_file.open("rb") as file:
                file.seek(start)
                return file.read(4 * 1024 * 1024).decode(errors="replace").splitlines()
        except OSError:
            return []


def _runs(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- configuration (pure but for the files) -----------------------------------------------------------


def server_properties(launch: _Launch, log_dir: Path) -> dict[str, str]:
    """The broker's settings."""
    member = launch.member or Member(_ALONE, {_ALONE: NodePorts(launch.port, launch.controller_port)}, "")
    voters = [f"{node}@127.0.0.1:{at.controller_port}" for node, at in member.nodes.items()]
    return {
        "process.roles": "broker,controller",
        "node.id": str(member.node_id),
        "controller.quorum.voters": ",".join(voters),
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{launch.bootstrap_servers},CONTROLLER://127.0.0.1:{launch.controller_port}",
        "advertised.listeners": f"PLAINTEXT://{launch.bootstrap_servers}",
        "log.dirs": str(log_dir),
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": "0",
        **_replication(len(member.nodes)),
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.num.partitions": "1",
        # A broker that was killed gets its old registration back only after this time (9 s by default). Where
        # other brokers take over from it, one that is merely slow must not count as dead too soon.
        "broker.session.timeout.ms": "3000" if len(member.nodes) == 1 else "6000",
        "broker.heartbeat.interval.ms": "500" if len(member.nodes) == 1 else "1000",
        "transaction.max.timeout.ms": "900000",
        # A transaction that has timed out is aborted within a second, not within ten.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
        # Records carry the times of their events, which may be years ago, so nothing may be deleted by age.
        "log.retention.ms": "-1",
        # Truncated repartition and changelog topics free space in whole segments.
        "log.segment.bytes": str(64 * 1024 * 1024),
        "log.retention.check.interval.ms": "30000",
        # By default this takes 128 MB of the heap.
        "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
        # By default an idle broker's controller wakes up twice a second for this.
        "metadata.max.idle.interval.ms": "5000",
        **member.settings,
    }


def _replication(nodes: int) -> dict[str, str]:
    """Settings with which the death of one broker, of three or more, neither loses nor blocks anything."""
    replicas, in_sync = str(min(3, nodes)), "2" if nodes >= 3 else "1"
    return {
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        "unclean.leader.election.enable": "false",
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": in_sync,
    }


def last_error(lines: Sequence[str]) -> str:
    """The cause in a log: the last error and the first line of its exception. Without one, the last line that
    isn't empty.
    """
    for index in range(len(lines) - 1, -1, -1):
        _, level, text = lines[index].partition(" ERROR ")
        if level:
            exception = "".join(lines[index + 1 : index + 2]).strip()
            is_its_own = re.match(r"[\w.$]+(Exception|Error)\b", exception)
            return f"{text.strip()}: {exception}" if is_its_own else text.strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _write_properties(path: Path, properties: dict[str, str]) -> None:
    lines = [f"{name}={escape_property(value)}\n" for name, value in properties.items()]
    path.write_text("".join(lines), encoding="ascii")


def escape_property(value: str) -> str:
    """A value in the form that java.util.Properties reads back: backslashes and anything but printable
    ASCII escaped.
    """
    encoded = "".join(
        character if " " <= character <= "~" else "".join(f"\\u{unit:04x}" for unit in _utf16(character))
        for character in value.replace("\\", "\\\\")
    )
    return f"\\{encoded}" if encoded.startswith(" ") else encoded


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be", errors="surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]


def _log4j2_properties(logs: Path) -> str:
    """Three files of at most 5 MB."""
    return f"""\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {escape_property(str(logs / "server.log"))}
appender.file.filePattern = {escape_property(str(logs / "server.log"))}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %-5p %c{{1}} %m%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 5MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
logger.statechange.name = state.change.logger
logger.statechange.level = warn
"""


def new_cluster_id() -> str:
    """An id with which Kafka's data is formatted."""
    # In the form of Kafka's own Uuid: 16 bytes in URL-safe base64. An id that starts with a dash would look
    # like an option.
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


# --- ports and answers -------------------------------------------------------------------------------


def _choose_ports(directory: Path) -> tuple[int, int]:
    """The ports of the last run if they are free, otherwise others, starting at a number that depends on
    this directory.
    """
    last = _read_launch(directory)
    wanted = () if last is None else (last.port, last.controller_port)
    first, second = ports.reserve_for_directory(directory, 2, wanted)
    return first, second


def _listens(launch: _Launch) -> bool:
    try:
        with socket.create_connection((launch.host, launch.port), timeout=1.0):
            return True
    except OSError:
        return False


def _answers(launch: _Launch, timeout_s: float) -> bool:
    """Whether clients can work with the broker. Fast when nothing listens at all."""
    if not _listens(launch):
        return False
    settings: dict[str, Any] = {
        "bootstrap.servers": launch.bootstrap_servers,
        "reconnect.backoff.ms": 20,
        "reconnect.backoff.max.ms": 100,
        "log_level": 0,
        "logger": _quiet,
        "error_cb": _ignore,
    }
    admin = AdminClient(settings)
    try:
        brokers = admin.list_topics(timeout=timeout_s).brokers
        return bool(brokers) if launch.member is None else launch.member.node_id in brokers
    except KafkaException:
        return False


def _ignore(_error: object) -> None:
    """Until the broker is up, errors are expected here, so they aren't logged."""


_quiet = logging.getLogger(f"{__name__}.probe")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False
