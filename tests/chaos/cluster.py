"""A cluster whose processes have failpoints.

Responsible for: arming points of running processes, finding out whether they were reached, slowing processes
down, and inspecting them (status, open files). A point is armed by a file, at any time. The mark is a file
that the process leaves when it gets there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fcluster.common.errors import FclusterError
from fcluster.common.exit_codes import ExitCode
from fcluster.common.failpoints import ENVIRONMENT_VARIABLE, POINTS, REACHED, Arm
from fcluster.common.processes import describe_exit
from fcluster.common.settings import resolve
from fcluster.wire.admin_client import AdminClient
from fcluster.wire.discovery import Leader, find_leader
from tests.harness import Cluster, wait_until


@dataclass(frozen=True)
class Mark:
    """A process passed a point and did what it was armed for; `time_ns` is the wall clock at that moment."""

    process: str
    point: str
    pid: int
    time_ns: int
    detail: str


class ChaosCluster(Cluster):
    """See the module's docstring."""

    def environment_of(self, name: str) -> Mapping[str, str]:
        directory = self._arms(name)
        directory.mkdir(parents=True, exist_ok=True)
        return {ENVIRONMENT_VARIABLE: str(directory)}

    may_end: str = ""
    """A process that its own watchdog may end at present."""

    def assert_alive(self) -> None:
        for name, child in self._running.items():
            code = child.poll()
            if code is not None and not (name == self.may_end and code == ExitCode.CRASHED):
                raise AssertionError(f"{name} ended: {describe_exit(code)}\n{self.log(name)}")

    # --- failpoints --------------------------------------------------------------------------------------

    def arm(self, process: str, point: str, arm: Arm) -> None:
        """Make `process` do this at `point`. What it did there before is forgotten."""
        assert point in POINTS, point
        directory = self._arms(process)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{point}{REACHED}").unlink(missing_ok=True)
        new = directory / "new"
        new.write_bytes(msgspec.json.encode(arm))
        new.rename(directory / point)

    def disarm(self, process: str, point: str, *, keep_mark: bool = False) -> None:
        """Forget the arm, and the mark too, unless it has to be kept."""
        for name in (point,) if keep_mark else (point, f"{point}{REACHED}"):
            (self._arms(process) / name).unlink(missing_ok=True)

    def mark(self, process: str, point: str) -> Mark | None:
        """What the process left at the point. None if it hasn't been there."""
        try:
            content = msgspec.json.decode((self._arms(process) / f"{point}{REACHED}").read_bytes())
        except FileNotFoundError:
            return None
        return Mark(process, point, content["pid"], content["time_ns"], content["detail"])

    def await_mark(self, process: str, point: str, timeout_s: float = 30) -> Mark:
        """Wait until `process` has reached `point`."""
        return wait_until(lambda: self.mark(process, point), f"{process} reaches {point}", timeout_s, 0.01)

    def await_death(self, process: str, number: int = signal.SIGKILL, timeout_s: float = 30) -> None:
        """Wait until `process` has died of the signal. It may be started again then."""
        child = self.child(process)
        code = child.wait(timeout_s)
        assert code == -number, f"{process} ended with {code}, not by signal {number}\n{self.log(process)}"
        self._running.pop(process)

    def forget(self, process: str) -> None:
        """`process` has ended, as it should. It may be started again."""
        assert self._running.pop(process).poll() is not None

    # --- others ------------------------------------------------------------------------------------------

    def stop(self, process: str, timeout_s: float = 30) -> None:
        """Send SIGTERM, and wait until it has ended cleanly."""
        child = self._running.pop(process)
        child.terminate()
        code = child.wait(timeout_s)
        assert code == 0, f"{process}, asked to leave, ended with {code}\n{self.log(process)}"

    @contextlib.contextmanager
    def slowed(self, process: str, times: float, period_s: float = 0.05) -> Iterator[None]:
        """Let `process` run for only 1/`times` of the time, in small turns."""
        child = self.child(process)  # a process that has ended gets no signals
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                child.send_signal(signal.SIGSTOP)
                ended.wait(period_s * (1 - 1 / times))
                child.send_signal(signal.SIGCONT)
                time.sleep(period_s / times)

        thread = threading.Thread(target=run, name=f"slow {process}")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def status(self) -> dict[str, Any] | None:
        """The coordinator's status document. None if no coordinator answers."""
        leader = self.leader()
        if leader is None:
            return None
        try:
            with AdminClient(leader.address) as client:
                return client.status(1000)
        except FclusterError:
            return None

    def leader(self) -> Leader | None:
        """The coordinator that led last, which may be dead. None if there was none, or if Kafka doesn't
        tell.
        """
        settings = resolve({}, None, {}, {"brokers": self.brokers})
        with contextlib.suppress(FclusterError):
            return find_leader(settings, self._env["FCLUSTER_TEST_JOB"])
        return None

    def session(self, name: str) -> dict[str, Any] | None:
        """The status of a worker's process. None if it has no session, or if no coordinator answers."""
        status, pid = self.status(), self.child(name).pid
        return next(
            (worker for worker in (status or {"workers": []})["workers"] if worker["pid"] == pid), None
        )

    def shards_running(self, workers: int) -> bool:
        """Whether this many workers run, and run all shards."""
        status = self.status()
        return (
            status is not None
            and len(status["workers"]) == workers
            and all(shard["phase"] == "running" for shard in status["shards"])
        )

    def setting(self, name: str) -> object:
        """The value of a setting that all processes were given."""
        return self._settings[name]

    def open_files(self) -> dict[str, list[str]]:
        """By process: what its descriptors refer to: paths of files, and kinds of others."""
        found: dict[str, list[str]] = {}
        for name, pid in self.pids().items():
            targets: list[str] = []
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    targets.append(os.readlink(entry))
            found[name] = targets
        return found

    def _arms(self, name: str) -> Path:
        return self.data_dir / "failpoints" / name
