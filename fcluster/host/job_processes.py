"""The processes of one job on one host: their commands, their environment, and how their exit is reported.

Responsible for: making all of them run the same job with the same settings. Rule: no secret is in a process's
arguments. Must not keep them running; `supervisor` does that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcluster.common.errors import FclusterError
from fcluster.common.failures import Ended, Failure, FailureKind
from fcluster.common.processes import spawn
from fcluster.common.settings import Settings, hand_over
from fcluster.host.failure_file import FailureFile

if TYPE_CHECKING:
    from fcluster.host.supervisor import ProcessSpec


class ClusterFailed(FclusterError):  # noqa: N818
    """The cluster ended before its work was complete.

    Args:
        ended: how it ended.
    """

    def __init__(self, ended: Ended) -> None:
        failure = ended.failure or Failure(FailureKind.OTHER, ended.reason)
        super().__init__(failure.message, remedy=failure.remedy, where=failure.where)
        self.kind = failure.kind
        self.exit_code = ended.exit_code
        self.ended = ended

    def __reduce__(self) -> tuple[object, ...]:
        return (ClusterFailed, (self.ended,))


@dataclass(frozen=True)
class JobProcesses:
    """The commands of processes that run the same job with the same settings.

    Args:
        target: the job, as the command line names it.
        flags: settings by name, as given.
        config: the settings file.
        log_level: the log level of all of them.
        resolved: settings that the processes must not determine for themselves.
        http_bind: the HTTP address of a coordinator among them. Only one process can use a port, so workers
            use free ones.
    """

    target: str
    flags: Mapping[str, str]
    config: Path | None
    log_level: str
    resolved: Mapping[str, str]
    http_bind: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of all processes. It contains the secret flags, so that they don't show in a
        process's arguments.
        """
        return {**os.environ, **hand_over(self.flags)[1], "PYTHONUNBUFFERED": "1"}

    def process(self, name: str, command: str, *more: str, **own: str) -> ProcessSpec:
        """`fcluster COMMAND`. It reads environment and settings file itself.

        `own` are settings of this process alone.
        """
        from fcluster.host.supervisor import ProcessSpec

        arguments = ["--log-level", self.log_level]
        if self.config is not None:
            arguments += ["--config", str(self.config)]
        for setting, value in (hand_over(self.flags)[0] | dict(self.resolved) | own).items():
            arguments += ["--set", f"{setting}={value}"]
        argv = (sys.executable, "-m", "fcluster", command, *more, *arguments, "--", self.target)
        return ProcessSpec(name, argv)

    def worker(self, number: int, slot: int, coordinator: str) -> ProcessSpec:
        """The command of a worker. It gets any slot if `slot` is negative. If the address is empty, it finds
        the coordinator through the journal.
        """
        from fcluster.host.supervisor import worker_name

        more = ["--kept", "--slot", str(slot)] if slot >= 0 else ["--kept"]
        more += ["--coordinator", coordinator] if coordinator else []
        own = {"http.bind": f"{self.http_bind.rpartition(':')[0]}:0"} if self.http_bind else {}
        return self.process(worker_name(number), "worker", *more, **own)


def leave_timeout_s(settings: Settings) -> float:
    """If a worker that was asked to leave still runs after this time, it hangs, because its own limits are
    over.
    """
    return (settings.worker_leave_timeout_ms + settings.checkpoint_timeout_ms) / 1000 + 5


class SpawnedChild:
    """A child whose exit is reported only after its last lines.

    Args:
        process: from `processes.spawn`.
        failure_file: where it reports why it has failed.
    """

    @classmethod
    def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        log_file: Path | None = None,
    ) -> SpawnedChild:
        """Start a process of the job; see `processes.spawn`."""
        file = FailureFile()
        env = {**environment, **file.environment}
        return cls(spawn(name, argv, log_file=log_file, on_line=on_line, env=env), file)

    def __init__(self, process: Any, failure_file: FailureFile | None = None) -> None:
        self._process = process
        self._failure_file = failure_file
        self.pid: int = process.pid

    def failure(self) -> Failure | None:
        """Why it has exited, if it has reported that. Call it once, after `wait`."""
        return None if self._failure_file is None else self._failure_file.take()

    def wait(self) -> int:
        """Block until it has exited and its output is read. Returns the exit code."""
        code: int = self._process.wait()
        self._process.join_output()
        return code

    def terminate(self) -> None:
        """Ask it to exit."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
