"""What the commands do: find brokers and clusters, check a job before it runs, start a cluster and stop it.

Responsible for: everything between the parsed options (`cli`) and the parts that do the work. Keeps the rules
that mistakes are found in the foreground, before any process is started, and that whatever was started here
is stopped here. Must not parse options, nor draw.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from fcluster.common.errors import ClusterConflict, FclusterError, MissingTopic, cause_and_remedy
from fcluster.common.settings import Settings, hand_over, resolve
from fcluster.data_directory import (
    ClusterNote,
    DirectoryLock,
    SharedLog,
    create_directory,
    log_path,
    read_note,
    remove_note,
    rotate_log,
    write_note,
)

if TYPE_CHECKING:
    from fcluster.agent import Staff
    from fcluster.common.admin_client import AdminClient
    from fcluster.common.discovery import Leader
    from fcluster.common.embedded_kafka import EmbeddedKafka
    from fcluster.common.job import Job
    from fcluster.common.logs import RememberingHandler
    from fcluster.common.topology import Isolation, Topology
    from fcluster.live_view import View
    from fcluster.supervisor import Outcome, ProcessSpec

_T = TypeVar("_T")

STATUS_TIMEOUT_MS = 3_000
BROKER_CHECK_INTERVAL_S = 0.5
IDLE_AFTER_S = 3.0
IDLE_STATUS_INTERVAL_S = 1.0
_log = logging.getLogger("fcluster.launch")
_log_handler: RememberingHandler | None = None
PORTS_BELOW_EPHEMERAL = range(12_000, 20_000)
"""Where the coordinator's port is taken from: the system gives none of these to outgoing connections and the
embedded broker takes none of them, so it is still free after a restart."""


class NoBrokers(FclusterError):  # noqa: N818
    """A command needs Kafka and knows of none."""


class NoFreePort(FclusterError):  # noqa: N818
    """The coordinator has nowhere to listen."""


class NoCluster(FclusterError):  # noqa: N818
    """No cluster runs where one was looked for."""


class ClusterFailed(FclusterError):  # noqa: N818
    """The cluster ended before its work was done."""


# --- the parts by hand -----------------------------------------------------------------------------


def start_logging(level: str) -> None:
    """Set up this process's log."""
    from fcluster.common.logs import configure_logging

    global _log_handler
    _log_handler = configure_logging(level)


def job_failure() -> tuple[str, str]:
    """Why the job failed, as the coordinator logged it last, and what to do about it."""
    logged = _log_handler.last_error if _log_handler is not None else ""
    reason, remedy = cause_and_remedy(logged.removeprefix("coordinator ends: "))
    if reason.startswith("record "):
        remedy = "Nothing beyond it is committed. Correct the job or set its on_error, then start it again."
    return (
        reason or "the job failed",
        remedy or "Nothing is lost. When that is repaired, start the job again.",
    )


def worker_failure() -> tuple[str, str]:
    """Why this worker can't go on, as it logged it last, and what to do about it."""
    logged = _log_handler.last_error if _log_handler is not None else ""
    reason, remedy = cause_and_remedy(logged.removeprefix("leaving: "))
    return reason or "the worker can't go on", remedy


def load(
    target: str, flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]
) -> tuple[Job, Settings]:
    """The job, and the settings that hold for it.

    Raises:
        FclusterError: the job can't be loaded, a setting is wrong, or there are no brokers.
    """
    from fcluster.common.loader import load_job

    job = load_job(target)
    settings = resolve(job.settings, config, env, flags)
    if not settings.bootstrap_servers:
        servers = detached_kafka(Path(settings.state_dir))
        if servers is None:
            raise no_brokers(Path(settings.state_dir))
        settings = replace(settings, bootstrap_servers=servers)
    return job, settings


def data_directory(flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]) -> Path:
    """The data directory that options, environment and settings file name."""
    return Path(resolve({}, config, env, flags).state_dir)


# --- finding a cluster -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connection:
    """What the console commands know: settings with brokers if any are known, and the cluster that runs in
    the data directory, if one does."""

    settings: Settings
    data_dir: Path
    note: ClusterNote | None

    @classmethod
    def find(cls, flags: Mapping[str, str], config: Path | None, env: Mapping[str, str]) -> Connection:
        """Look at the options first, then at what runs in the data directory."""
        settings = resolve({}, config, env, flags)
        directory = Path(settings.state_dir)
        note = read_note(directory)
        if not settings.bootstrap_servers:
            servers = note.brokers if note is not None else detached_kafka(directory)
            settings = replace(settings, bootstrap_servers=servers or "")
        if note is not None and not settings.security_keys_dir:
            insecure = settings.insecure or note.insecure
            settings = replace(settings, security_keys_dir=note.keys, insecure=insecure)
        return cls(settings, directory, note)

    def status(self, job: str | None) -> dict[str, Any]:
        """The status document of the cluster in the data directory, or of `job` on the brokers.

        Raises:
            NoCluster: none runs there.
            FclusterError: it gives no answer.
        """
        with AdminLine(self, job) as line:
            return line.status()

    def coordinator(self, job: str | None) -> tuple[str, str]:
        """The coordinator's address, and its public key by the journal, empty if that wasn't asked.

        Raises:
            NoCluster: none is known.
        """
        if self.note is not None and job in (None, self.note.job):
            return self.note.coordinator, ""
        if job is None:
            raise NoCluster(
                f"no cluster runs in {self.data_dir}",
                remedy="Start one with `fcluster up`, or name it: --brokers HOST:PORT --job NAME.",
            )
        self._check_brokers()
        from fcluster.common.discovery import find_leader

        leader = find_leader(self.settings, job)
        if leader is None:
            raise NoCluster(
                f"no coordinator of a job {job!r} is known on {self.settings.bootstrap_servers}",
                remedy="Check the job's name and the brokers, or start it with `fcluster up`.",
            )
        return leader.address, leader.public_key

    def consume(
        self,
        topic: str,
        output: BinaryIO,
        *,
        isolation: Isolation,
        from_beginning: bool,
        count_max: int | None,
    ) -> int:
        """Print records; see `console_clients.run_consume`."""
        from fcluster.common.kafka_clients import make_consumer
        from fcluster.console_clients import kafka_errors, run_consume

        self._check_brokers()
        # Records may be deleted while they are read; then it goes on with the oldest that is left.
        consumer = make_consumer(self.settings, isolation, **{"auto.offset.reset": "earliest"})
        with kafka_errors():
            return run_consume(consumer, topic, output, from_beginning=from_beginning, count_max=count_max)

    def produce(
        self, topic: str, lines: BinaryIO, *, key_field: str | None, partitions: int | None
    ) -> tuple[int, int]:
        """Send lines (see `console_clients.run_produce`); how many, and the topic's partition count."""
        from fcluster.common.kafka_clients import make_admin, make_producer
        from fcluster.console_clients import create_topic, existing_partitions, kafka_errors, run_produce

        self._check_brokers()
        admin = make_admin(self.settings)
        with kafka_errors():
            if partitions is not None:
                create_topic(admin, topic, partitions)
            count = len(existing_partitions(admin, topic, creatable=True))
            sent = run_produce(partial(make_producer, self.settings), topic, lines, key_field=key_field)
        return sent, count

    def _check_brokers(self) -> None:
        if not self.settings.bootstrap_servers:
            raise no_brokers(self.data_dir)
        check_brokers(self.settings)


class AdminLine:
    """Requests to whoever leads a job, one at a time; it follows the leadership.

    Args:
        connection: says where to look.
        job: its name; None: the one in the data directory.
    """

    def __init__(self, connection: Connection, job: str | None) -> None:
        self._connection = connection
        self._job = job
        self._client: AdminClient | None = None

    def __enter__(self) -> AdminLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def status(self) -> dict[str, Any]:
        """The status document; raises like `ask`."""
        return self.ask(lambda client: client.status(STATUS_TIMEOUT_MS))

    def ask(self, request: Callable[[AdminClient], _T]) -> _T:
        """What `request` gets from the coordinator, or from its successor.

        Raises:
            NoCluster: none is known.
            CoordinatorSilent: it gives no answer, and nobody else leads.
            RequestRefused: it won't, for the reason in the message.
        """
        from fcluster.common.admin_client import CoordinatorSilent

        settings = self._connection.settings
        if self._client is None:
            address, key = self._connection.coordinator(self._job)
            self._client = open_admin_client(settings, address, key)
        try:
            return request(self._client)
        except CoordinatorSilent:
            note = self._connection.note
            job = self._job or (note.job if note is not None else "")
            leader = leader_elsewhere(settings, job, self._client.address)
            if leader is None:
                raise
        self._client.close()
        self._client = open_admin_client(settings, leader.address, leader.public_key)
        return request(self._client)


def open_admin_client(settings: Settings, address: str, announced_key: str = "") -> AdminClient:
    """A client for the coordinator at `address`, with the admin's key if the settings name keys.

    Raises:
        FclusterError: keys are needed and there are none, or they can't be used.
    """
    from fcluster.common.admin_client import AdminClient
    from fcluster.common.keys import Role
    from fcluster.common.security import client_security

    return AdminClient(address, client_security(settings, Role.ADMIN, address, announced_key))


def leader_elsewhere(settings: Settings, job: str, address: str) -> Leader | None:
    """Who leads by the journal, if that is somebody at another address: a standby may have taken over."""
    from fcluster.common.discovery import find_leader

    try:
        leader = find_leader(settings, job, timeout_s=STATUS_TIMEOUT_MS / 1000)
    except FclusterError:
        return None
    return leader if leader is not None and leader.address != address else None


def no_brokers(data_dir: Path) -> NoBrokers:
    """The error of a command that needs brokers and found none."""
    return NoBrokers(
        f"no brokers are given, and no cluster or embedded Kafka runs in {data_dir}",
        remedy="Give --brokers HOST:PORT, or start a broker with `fcluster kafka start`.",
    )


def check_brokers(settings: Settings) -> None:
    """Raises KafkaUnavailable if the brokers can't be reached."""
    from fcluster.common.kafka_clients import connect_or_raise, make_admin

    connect_or_raise(make_admin(settings), settings)


# --- embedded Kafka --------------------------------------------------------------------------------


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


# --- agents ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentOptions:
    """The options of `fcluster worker JOB --workers N`; `flags` are settings by name."""

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    workers: int
    coordinator: str


def run_agent(options: AgentOptions) -> int:
    """Run workers on this host until the job ends or fails, or a signal lets them leave; the exit code.

    Raises:
        FclusterError: they can't be started, or fail again and again, or the job failed.
    """
    from fcluster.agent import AgentLink, Staff
    from fcluster.common.processes import spawn
    from fcluster.live_view import PlainView
    from fcluster.supervisor import EXIT_KILLED, SUPERVISOR, Crew

    job, settings = load(options.target, options.flags, options.config, os.environ)
    job.build(settings)
    address = options.coordinator or settings.coordinator_address
    resolved = {"bootstrap.servers": settings.bootstrap_servers}
    family = Family(
        options.target, options.flags, options.config, options.log_level, resolved, settings.http_bind
    )
    view = PlainView(sys.stderr)
    pids: dict[str, int] = {}

    def on_change(now: dict[str, int]) -> None:
        nonlocal pids
        pids = now
        link.tell()

    crew = Crew(
        options.workers,
        lambda number, slot: family.worker(number, slot, address),
        spawn=lambda spec, on_line: SpawnedChild(
            spawn(spec.name, spec.argv, on_line=on_line, env=family.environment)
        ),
        view=view,
        on_change=on_change,
        leave_timeout_s=leave_timeout_s(settings),
    )
    link = AgentLink(
        settings,
        job.name,
        address=address,
        staff=lambda: Staff(crew.target, list(pids.values())),
        resize=crew.resize,
        learn_slots=crew.learn_slots,
        on_end=lambda failed, reason: crew.end(failed=failed, reason=reason),
        say=lambda text: view.line(SUPERVISOR, text),
    )
    view.line(SUPERVISOR, f"agent of job {job.name!r}, {options.workers} workers")
    link.start()
    try:
        outcome = crew.run()
    finally:
        link.close()
        view.close()
    if outcome.exit_code not in (0, EXIT_KILLED):
        error = ClusterFailed(outcome.reason, remedy=outcome.remedy)
        error.exit_code = outcome.exit_code
        raise error
    return outcome.exit_code


# --- up --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UpOptions:
    """The options of `fcluster up`; `flags` are settings by name."""

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    until_caught_up: bool
    live: bool
    on_data_dir: Callable[[Path], None] = lambda _path: None


def run_up(options: UpOptions) -> int:
    """Run a cluster on this machine until it is done, fails or is ended; the exit code.

    Raises:
        FclusterError: it can't be started, or ended before its work was done.
    """
    from fcluster.common.loader import load_job
    from fcluster.supervisor import EXIT_KILLED

    job = load_job(options.target)
    settings = resolve(job.settings, options.config, os.environ, options.flags)
    topology = job.build(settings)
    directory = Path(settings.state_dir)
    create_directory(directory)
    options.on_data_dir(directory)
    lock = DirectoryLock(directory)
    lock.acquire()
    try:
        with _brokers(settings, directory) as (broker, servers):
            settings = replace(settings, bootstrap_servers=servers)
            settings = with_own_keys(settings, directory)
            check_before_start(settings, topology, embedded=broker is not None)
            outcome = _Up(options, job.name, settings, directory, broker).run()
            if outcome.exit_code == EXIT_KILLED and broker is not None:
                broker.kill()
    finally:
        remove_note(directory)
        lock.release()
    if outcome.exit_code != 0:
        error = ClusterFailed(outcome.reason, remedy=outcome.remedy)
        error.exit_code = outcome.exit_code
        raise error
    return 0


@contextlib.contextmanager
def _brokers(settings: Settings, directory: Path) -> Generator[tuple[EmbeddedKafka | None, str]]:
    """The broker that runs for this cluster alone (None if others do), and the servers to use."""
    if settings.bootstrap_servers:
        yield None, settings.bootstrap_servers
        return
    from fcluster.common.embedded_kafka import EmbeddedKafka

    broker = EmbeddedKafka(kafka_directory(directory))
    servers = broker.start(progress=_print)
    if broker.attached:
        _print(f"using the Kafka that runs in {directory}: {servers}")
        yield None, servers
        return
    try:
        yield broker, servers
    finally:
        _print("stopping Kafka")
        broker.stop()


def check_before_start(settings: Settings, topology: Topology, *, embedded: bool = False) -> None:
    """Find what can be found before anything runs.

    Raises:
        KafkaUnavailable: the brokers can't be reached.
        MissingTopic: a source doesn't exist.
        ClusterConflict: the job runs already.
    """
    from fcluster.common.kafka_clients import connect_or_raise, make_admin
    from fcluster.console_clients import METADATA_TIMEOUT_S, kafka_errors, missing_topic

    admin = make_admin(settings)
    connect_or_raise(admin, settings)
    with kafka_errors():
        topics: Mapping[str, object] = admin.list_topics(timeout=METADATA_TIMEOUT_S).topics
    for stage in topology.stages:
        if not stage.internal and stage.source.name not in topics:
            error = missing_topic(stage.source.name, topics)
            where = (
                f" --data-dir {settings.state_dir}"
                if embedded
                else f" --brokers {settings.bootstrap_servers}"
            )
            raise MissingTopic(
                f"source {error.message}",
                remedy=f"{error.remedy} To create it: fcluster produce {stage.source.name} --partitions 4"
                f"{where} < lines.jsonl" + (" (after `fcluster kafka start`)" if embedded else ""),
            )
    check_not_running(settings, topology.job)


def check_not_running(settings: Settings, job: str) -> None:
    """Raises ClusterConflict if a coordinator of `job` answers."""
    from fcluster.common.discovery import find_leader

    leader = find_leader(settings, job)
    if leader is None or not leader.address:
        return
    try:
        with open_admin_client(settings, leader.address, leader.public_key) as client:
            found = client.status(timeout_ms=1_000).get("job")
    except FclusterError:
        return  # the coordinator itself will look more closely
    if found == job:
        raise ClusterConflict(
            f"a cluster of job {job!r} runs already on these brokers: its coordinator is at {leader.address}",
            remedy="Stop that one, join it with `fcluster worker`, or give this job another name.",
        )


def with_own_keys(settings: Settings, directory: Path) -> Settings:
    """The settings with keys of the data directory's own, if other hosts shall connect and none are given."""
    from fcluster.common.keys import create_keys
    from fcluster.common.security import is_loopback

    if settings.security_keys_dir or settings.insecure or is_loopback(settings.coordinator_bind):
        return settings
    keys = directory / "keys"
    if not keys.exists():
        create_keys(keys)
        _print(f"made keys in {keys}: other hosts' workers need worker.key and coordinator.pub of them")
    return replace(settings, security_keys_dir=str(keys))


def listening_addresses(bind: str) -> tuple[str, str]:
    """Where the coordinator shall listen for the setting `bind`, and where this host's processes find it."""
    scheme, _, rest = bind.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host:
        return bind, bind
    # Chosen here, for the address has to stay the same when the coordinator is restarted.
    port = str(free_port()) if port in ("0", "*", "") else port
    near = "127.0.0.1" if host in ("0.0.0.0", "*") else host
    return f"tcp://{host}:{port}", f"tcp://{near}:{port}"


class _Up:
    """One run of the processes of a cluster."""

    def __init__(
        self,
        options: UpOptions,
        job: str,
        settings: Settings,
        directory: Path,
        broker: EmbeddedKafka | None,
    ) -> None:
        self._broker = broker
        self._coordinator_started = False
        self._options = options
        self._settings = settings
        self._directory = directory
        self._pids: dict[str, int] = {}
        self._bind, self._address = listening_addresses(settings.coordinator_bind)
        self._note = ClusterNote(
            job=job,
            target=options.target,
            brokers=settings.bootstrap_servers,
            coordinator=self._address,
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            keys=settings.security_keys_dir,
            insecure=settings.insecure,
        )
        self._family = Family(
            options.target,
            options.flags,
            options.config,
            options.log_level,
            {
                "bootstrap.servers": settings.bootstrap_servers,
                "state.dir": settings.state_dir,
                "coordinator.bind": self._bind,
                "security.keys.dir": settings.security_keys_dir,
            },
            settings.http_bind,
        )

    def run(self) -> Outcome:
        """Until the end; nothing is left running."""
        from fcluster.agent import AgentLink
        from fcluster.live_view import make_view
        from fcluster.supervisor import SUPERVISOR, Supervisor

        workers = [self._worker_spec(number, -1) for number in range(self._settings.workers)]
        specs = [self._coordinator_spec(), *workers]
        for name in (SUPERVISOR, *(spec.name for spec in specs)):
            rotate_log(self._directory, name)
        log = SharedLog(self._directory, SUPERVISOR)
        view = _LoggedView(make_view(self._options.live, sys.stdout), log)
        view.line(
            SUPERVISOR,
            f"job {self._note.job!r}, {self._settings.workers} workers, brokers {self._note.brokers}",
        )

        def on_change(pids: dict[str, int]) -> None:
            self._note_processes(view, pids)
            link.tell()

        supervisor = Supervisor(
            specs,
            spawn=self._spawn,
            view=view,
            ask_drain=self._ask_drain,
            make_worker=self._worker_spec,
            on_change=on_change,
            drain_timeout_s=self._settings.checkpoint_timeout_ms / 1000 + 15,
            leave_timeout_s=leave_timeout_s(self._settings),
        )
        link = AgentLink(
            self._settings,
            self._note.job,
            address=self._address,
            staff=lambda: self._staff(supervisor.target),
            resize=supervisor.resize,
            learn_slots=supervisor.learn_slots,
            on_end=lambda _failed, _reason: None,  # our coordinator's exit code says it
            say=lambda text: _log.debug("%s", text),
        )
        handler = _ViewHandler(view)
        logging.getLogger().addHandler(handler)
        guard = BrokerGuard(self._broker, view)
        poller = StatusPoller(
            self._open_client,
            interval_s=0.25 if self._options.live else 1.0,
            on_document=lambda document: view.document(document, supervisor.restarts + guard.restarts),
        )
        guard.start()
        poller.start()
        link.start()
        try:
            outcome = supervisor.run()
            view.line(SUPERVISOR, "done" if outcome.exit_code == 0 else outcome.reason)
            return outcome
        finally:
            link.close()
            poller.stop()
            guard.stop()
            logging.getLogger().removeHandler(handler)
            view.close()
            log.close()

    def _staff(self, target: int) -> Staff:
        from fcluster.agent import Staff
        from fcluster.supervisor import COORDINATOR

        return Staff(target, [pid for name, pid in self._pids.items() if name != COORDINATOR])

    def _note_processes(self, view: _LoggedView, pids: dict[str, int]) -> None:
        from fcluster.supervisor import SUPERVISOR

        self._pids = pids
        try:
            write_note(self._directory, replace(self._note, pids=pids))
        except FclusterError as error:  # `fcluster status` has to do without; the job need not
            view.line(SUPERVISOR, f"WARNING {error.message}")

    def _coordinator_spec(self) -> ProcessSpec:
        from fcluster.supervisor import COORDINATOR

        caught_up = ["--until-caught-up"] if self._options.until_caught_up else []
        return self._family.process(COORDINATOR, COORDINATOR, *caught_up)

    def _worker_spec(self, number: int, slot: int) -> ProcessSpec:
        return self._family.worker(number, number if slot < 0 else slot, self._address)

    def _spawn(self, spec: ProcessSpec, on_line: Callable[[str], None]) -> Any:
        from fcluster.common.processes import spawn
        from fcluster.supervisor import COORDINATOR

        argv = spec.argv
        if spec.name == COORDINATOR and not self._coordinator_started:
            # Whoever leads at the start is another cluster; later it is one that took over from ours.
            self._coordinator_started = True
            place = argv.index("--")
            argv = (*argv[:place], "--no-standby", *argv[place:])
        return SpawnedChild(
            spawn(
                spec.name,
                argv,
                log_file=log_path(self._directory, spec.name),
                on_line=on_line,
                env=self._family.environment,
            )
        )

    def _ask_drain(self) -> None:
        from fcluster.common.admin_client import CoordinatorSilent

        try:
            with self._open_client() as client:
                client.stop(timeout_ms=1_000)
        except CoordinatorSilent:
            leader = leader_elsewhere(self._settings, self._note.job, self._address)
            if leader is None:
                raise
            with open_admin_client(self._settings, leader.address, leader.public_key) as client:
                client.stop(timeout_ms=1_000)

    def _open_client(self) -> AdminClient:
        return open_admin_client(self._settings, self._address)


@dataclass(frozen=True)
class Family:
    """The commands of processes that run the same job with the same settings.

    Args:
        target: the job, as the command line names it.
        flags: settings by name, as given.
        config: the settings file.
        log_level: of all of them.
        resolved: settings that they shall not find out for themselves.
        http_bind: of a coordinator among them. One port is for one process, so workers take free ones.
    """

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    resolved: Mapping[str, str]
    http_bind: str

    @property
    def environment(self) -> dict[str, str]:
        """For all of them. Secrets among the flags are here: no argument of a process shows them."""
        return {**os.environ, **hand_over(self.flags)[1], "PYTHONUNBUFFERED": "1"}

    def process(self, name: str, command: str, *more: str, **own: str) -> ProcessSpec:
        """`fcluster COMMAND`; environment and settings file it reads itself.

        `own` are settings of this process alone.
        """
        from fcluster.supervisor import ProcessSpec

        arguments = ["--log-level", self.log_level]
        if self.config is not None:
            arguments += ["--config", str(self.config)]
        for setting, value in (hand_over(self.flags)[0] | dict(self.resolved) | own).items():
            arguments += ["--set", f"{setting}={value}"]
        argv = (sys.executable, "-m", "fcluster", command, *more, *arguments, "--", self.target)
        return ProcessSpec(name, argv)

    def worker(self, number: int, slot: int, coordinator: str) -> ProcessSpec:
        """A worker; any slot if that is negative; the journal names the coordinator if that is empty."""
        from fcluster.supervisor import worker_name

        more = ["--slot", str(slot)] if slot >= 0 else []
        more += ["--coordinator", coordinator] if coordinator else []
        own = {"http.bind": f"{self.http_bind.rpartition(':')[0]}:0"} if self.http_bind else {}
        return self.process(worker_name(number), "worker", *more, **own)


def leave_timeout_s(settings: Settings) -> float:
    """After so long a worker that was asked to leave hangs: its own bounds are over."""
    return (settings.worker_leave_timeout_ms + settings.checkpoint_timeout_ms) / 1000 + 5


class SpawnedChild:
    """A child whose end is told only after its last lines were."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def wait(self) -> int:
        """Block until it ended and its output is read; the exit code."""
        code: int = self._process.wait()
        self._process.join_output()
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """Make it end."""
        self._process.kill()


class _LoggedView:
    """A view that keeps the supervisor's lines in a file too; the processes' have files of their own."""

    def __init__(self, view: View, log: SharedLog) -> None:
        self._view = view
        self._log = log

    def line(self, name: str, text: str) -> None:
        from fcluster.supervisor import SUPERVISOR

        if name == SUPERVISOR:
            self._log.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}")
        self._view.line(name, text)

    def document(self, document: Mapping[str, Any], restarts: int) -> None:
        self._view.document(document, restarts)

    def close(self) -> None:
        self._view.close()


class _ViewHandler(logging.Handler):
    """Shows what libraries log in the supervisor's own process."""

    def __init__(self, view: _LoggedView) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        from fcluster.supervisor import SUPERVISOR

        self._view.line(SUPERVISOR, f"{record.levelname} {record.name}: {record.getMessage()}")


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


class StatusPoller:
    """Asks the coordinator for its status again and again, in a thread; silence is no error."""

    def __init__(
        self,
        open_client: Callable[[], AdminClient],
        *,
        interval_s: float,
        on_document: Callable[[dict[str, Any]], None],
    ) -> None:
        self._open_client = open_client
        self._interval_s = interval_s
        self._on_document = on_document
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """End; waits for the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        from fcluster.live_view import progress_of

        shown, changed_s = None, time.monotonic()
        with self._open_client() as client:
            while not self._stopped.wait(self._pause_s(time.monotonic() - changed_s)):
                try:
                    document = client.status(timeout_ms=500)
                except FclusterError:
                    continue
                progress = progress_of(document, 0)
                if progress != shown:
                    shown, changed_s = progress, time.monotonic()
                self._on_document(document)

    def _pause_s(self, idle_s: float) -> float:
        """An idle cluster is asked less often: it shall cost next to nothing."""
        return self._interval_s if idle_s < IDLE_AFTER_S else max(self._interval_s, IDLE_STATUS_INTERVAL_S)


def free_port() -> int:
    """A free port of the loopback interface, likely to stay free.

    Raises:
        NoFreePort: none of many tried is free.
    """
    for port in random.sample(PORTS_BELOW_EPHEMERAL, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise NoFreePort("no free port on the loopback interface", remedy="Close programs that listen there.")


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
