"""`fcluster up`: a cluster on this machine, from the first check to the exit of its last process.

Responsible for: connecting the supervisor of the processes (`supervisor`), their display (`live_view`), and
everything else that runs with them. Rules: mistakes are found in the foreground, before any process is
started; this module stops what it has started. Must not parse options or draw.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcluster.cli.connection import leader_elsewhere, open_admin_client
from fcluster.cli.local_kafka import BrokerGuard, OwnBrokers, brokers_for, say
from fcluster.cli.preflight import Cleared, clear_for_start
from fcluster.cli.start_offsets import set_start
from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.offset_targets import Target
from fcluster.common.settings import resolve
from fcluster.host.data_directory import (
    ClusterNote,
    DirectoryLock,
    SharedLog,
    create_directory,
    log_path,
    remove_note,
    rotate_log,
    write_note,
)
from fcluster.host.job_processes import ClusterFailed, JobProcesses, SpawnedChild, leave_timeout_s

if TYPE_CHECKING:
    from fcluster.cli.live_view import View
    from fcluster.common.failures import Ended
    from fcluster.host.agent import Staff
    from fcluster.host.supervisor import ProcessSpec
    from fcluster.wire.admin_client import AdminClient

IDLE_AFTER_S = 3.0
IDLE_STATUS_INTERVAL_S = 1.0
_log = logging.getLogger("fcluster.up")


@dataclass(frozen=True)
class UpOptions:
    """The options of `fcluster up`; `flags` are settings by name. `end` has the values of `--end`."""

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    until_caught_up: bool
    live: bool
    start: Target | None = None
    end: Sequence[str] = ()
    on_data_dir: Callable[[Path], None] = lambda _path: None


def run_up(options: UpOptions) -> int:
    """Run a cluster on this machine until it is done, fails or is stopped. Returns the exit code.

    Raises:
        FclusterError: the cluster can't be started, or ended before its work was complete.
    """
    from fcluster.api.loader import load_job

    job = load_job(options.target)
    settings = resolve(job.settings, options.config, os.environ, options.flags)
    topology = job.build(settings)
    directory = Path(settings.state_dir)
    create_directory(directory)
    options.on_data_dir(directory)
    lock = DirectoryLock(directory)
    lock.acquire()
    try:
        with brokers_for(settings, directory) as (broker, servers):
            cleared = clear_for_start(settings, topology, directory, servers, embedded=broker is not None)
            if options.start is not None:
                set_start(cleared.settings, topology, options.start, say)
            outcome = _Up(options, job.name, cleared, directory, broker).run()
            if outcome.exit_code == ExitCode.INTERRUPTED and broker is not None:
                broker.kill()
    finally:
        remove_note(directory)
        lock.release()
    if outcome.exit_code != 0:
        raise ClusterFailed(outcome)
    return 0


class _Up:
    """One run of the processes of a cluster."""

    def __init__(
        self,
        options: UpOptions,
        job: str,
        cleared: Cleared,
        directory: Path,
        broker: OwnBrokers | None,
    ) -> None:
        self._broker = broker
        self._coordinator_started = False
        self._options = options
        self._settings = settings = cleared.settings
        self._address = cleared.address
        self._directory = directory
        self._pids: dict[str, int] = {}
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
        self._job_processes = JobProcesses(
            options.target,
            options.flags,
            options.config,
            options.log_level,
            {
                "bootstrap.servers": settings.bootstrap_servers,
                "state.dir": settings.state_dir,
                "coordinator.bind": settings.coordinator_bind,
                "security.keys.dir": settings.security_keys_dir,
            },
            settings.http_bind,
        )

    def run(self) -> Ended:
        """Run until the end, and leave nothing running."""
        from fcluster.cli.live_view import make_view
        from fcluster.host.agent import AgentLink
        from fcluster.host.supervisor import SUPERVISOR, Supervisor

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
            on_end=lambda _ended: None,  # our coordinator's exit code says so
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
        from fcluster.host.agent import Staff
        from fcluster.host.supervisor import COORDINATOR

        return Staff(target, [pid for name, pid in self._pids.items() if name != COORDINATOR])

    def _note_processes(self, view: _LoggedView, pids: dict[str, int]) -> None:
        from fcluster.host.supervisor import SUPERVISOR

        self._pids = pids
        try:
            write_note(self._directory, replace(self._note, pids=pids))
        except FclusterError as error:  # `fcluster status` can't find the cluster then, but the job can run
            view.line(SUPERVISOR, f"WARNING {error.message}")

    def _coordinator_spec(self) -> ProcessSpec:
        from fcluster.host.supervisor import COORDINATOR

        caught_up = ["--until-caught-up"] if self._options.until_caught_up else []
        ends = [argument for value in self._options.end for argument in ("--end", value)]
        return self._job_processes.process(COORDINATOR, COORDINATOR, *caught_up, *ends)

    def _worker_spec(self, number: int, slot: int) -> ProcessSpec:
        return self._job_processes.worker(number, number if slot < 0 else slot, self._address)

    def _spawn(self, spec: ProcessSpec, on_line: Callable[[str], None]) -> Any:
        from fcluster.host.supervisor import COORDINATOR

        argv = spec.argv
        if spec.name == COORDINATOR and not self._coordinator_started:
            # At the start, another leader means another cluster. Later it is one that took over from ours.
            self._coordinator_started = True
            place = argv.index("--")
            argv = (*argv[:place], "--no-standby", *argv[place:])
        return SpawnedChild.start(
            spec.name,
            argv,
            environment=self._job_processes.environment,
            on_line=on_line,
            log_file=log_path(self._directory, spec.name),
        )

    def _ask_drain(self) -> None:
        from fcluster.wire.admin_client import CoordinatorSilent

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


class _LoggedView:
    """A view that also writes the supervisor's lines to a file. The processes have their own files."""

    def __init__(self, view: View, log: SharedLog) -> None:
        self._view = view
        self._log = log

    def line(self, name: str, text: str) -> None:
        from fcluster.host.supervisor import SUPERVISOR

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
        from fcluster.host.supervisor import SUPERVISOR

        self._view.line(SUPERVISOR, f"{record.levelname} {record.name}: {record.getMessage()}")


class StatusPoller:
    """Polls the coordinator's status in a thread. No answer is no error."""

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
        """Start polling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        from fcluster.cli.live_view import progress_of

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
        """An idle cluster is polled less often, so that it costs next to nothing."""
        return self._interval_s if idle_s < IDLE_AFTER_S else max(self._interval_s, IDLE_STATUS_INTERVAL_S)
