"""Clusters of real processes for tests and benchmarks.

Responsible for: starting a coordinator and workers as the command line starts them, causing faults (`kill
-9`, SIGSTOP, SIGCONT), proving that a fault hit an open epoch, waiting for conditions with a deadline, and
leaving nothing behind: children die with this process, and `close` kills what still runs.

A fault that didn't hit an open epoch proves nothing. `stop_mid_epoch` therefore stops a worker first and then
looks at Kafka: only an open transaction of the stopped worker can hold back the last stable offset of a
partition while all others commit. If none does, the worker is resumed, and another moment is tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fcluster.common.processes import ChildProcess, describe_exit, spawn
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, end_offsets
from tests.native import widening

REPOSITORY = Path(__file__).resolve().parents[1]
COORDINATOR = "coordinator"
LOG_LINES_SHOWN = 40

_V = TypeVar("_V")


def wait_until(condition: Callable[[], _V], what: str, timeout_s: float = 30, interval_s: float = 0.05) -> _V:
    """Call `condition` until it returns something true, and return that.

    Raises:
        TimeoutError: it didn't in time. The message says `what` was waited for, and the last answer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s, the last answer was {answer!r}")
        time.sleep(interval_s)


def wait_until_equal(
    ask: Callable[[], _V], wanted: _V, what: str, timeout_s: float = 30, interval_s: float = 0.05
) -> None:
    """Call it until it returns `wanted`.

    Raises:
        TimeoutError: it didn't in time. The message has the last answer.
    """
    deadline = time.monotonic() + timeout_s
    while (answer := ask()) != wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{what}: not within {timeout_s} s, the last answer was {answer!r} instead of {wanted!r}"
            )
        time.sleep(interval_s)


def slowness() -> float:
    """How many times slower processes run at the moment than alone on two cores, at least 1. It is the time
    that some work takes, divided by the processor time that it needs.
    """
    work_s = 0.05
    began_s, used_s = time.perf_counter(), time.thread_time()
    while time.thread_time() - used_s < work_s:
        sum(range(1_000))
    share = max(1.0, (time.perf_counter() - began_s) / work_s)
    # On a single core, a test's processes wait for each other.
    return share * (2 if len(os.sched_getaffinity(0)) == 1 else 1)


def within(seconds: float, bound_s: float) -> bool:
    """Whether something that took this long was quick enough for a machine as slow as this one is now."""
    return seconds < bound_s or seconds < bound_s * slowness()


class Slowness:
    """How many times slower than alone processes run, on average during the `with` block; see `slowness`."""

    MOST = 4.0
    """The factor by which a bound is lengthened at most."""
    _PAUSE_S = 1.0

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slowness", daemon=True)

    def __enter__(self) -> Slowness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def mean(self) -> float:
        """The mean of all samples so far. 1 if there are none yet."""
        samples = list(self._samples)
        return sum(samples) / len(samples) if samples else 1.0

    @property
    def leeway(self) -> float:
        """The factor by which a bound for a quiet machine is lengthened."""
        return min(self.mean, self.MOST)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._samples.append(slowness())
            self._ended.wait(self._PAUSE_S)


class Cluster:
    """A coordinator and workers of one job, each in its own process. Use it in a `with` block.

    Args:
        job_file: the JOB argument of the commands.
        brokers: bootstrap servers.
        data_dir: the directory of state, snapshots and logs. It is kept after `close`.
        workers: how many workers `start` starts.
        env: variables that are added to the environment of all processes.
        settings: settings that all processes get with `--set`.
        until_caught_up: whether the coordinator ends when the sources are processed.
        tree: the checkout whose fcluster runs.
    """

    def __init__(
        self,
        job_file: Path | str,
        brokers: str,
        data_dir: Path,
        *,
        workers: int = 2,
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, object] | None = None,
        until_caught_up: bool = False,
        tree: Path = REPOSITORY,
    ) -> None:
        self.brokers = brokers
        self.data_dir = data_dir
        self.workers = workers
        self._job_file = str(job_file)
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **widening.asked_for(), **(env or {})}
        self._settings = dict(settings or {})
        self._until_caught_up = until_caught_up
        self._tree = tree
        self._running: dict[str, ChildProcess] = {}
        self._all: list[ChildProcess] = []

    # --- starting and ending -------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: object, _error: object, _traceback: object) -> None:
        if kind is not None:
            print(self.logs())
        self.close()

    def start(self) -> Cluster:
        """Start the coordinator and all workers."""
        self.start_coordinator()
        for slot in range(self.workers):
            self.start_worker(slot)
        return self

    def start_coordinator(self) -> ChildProcess:
        """Start the coordinator. It must not be running."""
        more = ["--workers", str(self.workers)]
        if self._until_caught_up:
            more.append("--until-caught-up")
        return self._spawn(COORDINATOR, ["coordinator", self._job_file, *more])

    def start_worker(self, slot: int) -> ChildProcess:
        """Start the worker of `slot`. It must not be running."""
        return self._spawn(worker_name(slot), ["worker", self._job_file, "--slot", str(slot)])

    def close(self) -> None:
        """Kill what still runs, and wait for its end. May be called twice."""
        for child in self._all:
            if child.poll() is None:
                child.kill()
        for child in self._all:
            if child.wait(10) is None:
                raise RuntimeError(f"{child.name} (pid {child.pid}) survives SIGKILL")
            child.join_output()
        self._running.clear()

    def terminate(self, timeout_s: float = 30) -> dict[str, int | None]:
        """Send SIGTERM to all, the coordinator first. Returns the exit codes, None for a process that didn't
        end in time.
        """
        for child in self._running.values():
            child.terminate()
        deadline = time.monotonic() + timeout_s
        codes = {
            name: child.wait(max(0.0, deadline - time.monotonic())) for name, child in self._running.items()
        }
        self._running.clear()
        return codes

    # --- looking ---------------------------------------------------------------------------------------

    def child(self, name: str) -> ChildProcess:
        """The running process with that name."""
        return self._running[name]

    def pids(self) -> dict[str, int]:
        """The process ids of all processes that were started and not killed, by name."""
        return {name: child.pid for name, child in self._running.items()}

    def assert_alive(self) -> None:
        """Raises AssertionError if a process has ended by itself."""
        for name, child in self._running.items():
            code = child.poll()
            assert code is None, f"{name} ended: {describe_exit(code)}\n{self.log(name)}"

    def log(self, name: str, lines: int = LOG_LINES_SHOWN) -> str:
        """The last lines of a process's log."""
        path = self._log_path(name)
        if not path.exists():
            return f"--- {name}: no log"
        text = path.read_text(errors="replace").splitlines()
        return "\n".join([f"--- {name} ({len(text)} lines, {path})", *text[-lines:]])

    def logs(self) -> str:
        """The last lines of all logs."""
        return "\n".join(self.log(path.stem) for path in sorted((self.data_dir / "test-logs").glob("*.log")))

    # --- hurting -----------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """`kill -9`, and wait for the end."""
        child = self._running.pop(name)
        child.kill()
        if child.wait(10) is None:
            raise RuntimeError(f"{name} survives SIGKILL")

    def kill_all(self) -> None:
        """`kill -9` all of them before waiting for any: none of them notices another's death."""
        children = list(self._running.values())
        for child in children:
            child.kill()
        for child in children:
            child.wait(10)
        self._running.clear()

    def pause(self, name: str) -> None:
        """Send SIGSTOP. Returns when the kernel has stopped all threads."""
        pid = self._running[name].pid
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: process_state(pid) in "Tt", f"{name} stops", 5, 0.002)

    def resume(self, name: str) -> None:
        """Send SIGCONT."""
        os.kill(self._running[name].pid, signal.SIGCONT)

    def stop_mid_epoch(
        self, slots: Iterable[int], topics: Sequence[str], *, timeout_s: float = 30, quiet_s: float = 0.8
    ) -> tuple[str, dict[tuple[str, int], int]]:
        """Stop one of the workers while it has an open transaction with records in it.

        Args:
            slots: the workers to try, in turn.
            topics: the topics that the workers write to.
            timeout_s: the time limit for all tries.
            quiet_s: how long a partition must be held back to count. This must be longer than the other
                workers' epochs and shorter than the session timeout, so set `commit.interval.max.ms` to less.

        Returns:
            The name of the stopped worker, and the partitions that it holds back, each with the number of
            records after its last stable offset.

        Raises:
            TimeoutError: no stop hit an open epoch.
        """
        deadline = time.monotonic() + timeout_s
        names = [worker_name(slot) for slot in slots]
        attempt = 0
        while time.monotonic() < deadline:
            name = names[attempt % len(names)]
            attempt += 1
            self.pause(name)
            before = held_back(self.brokers, topics)
            if before:
                time.sleep(quiet_s)
                after = held_back(self.brokers, topics)
                # If the last stable offset is the same twice, the transaction that begins there is still
                # open.
                held = {
                    at: count for at, (stable, count) in after.items() if before.get(at, (-1,))[0] == stable
                }
                if held:
                    return name, held
            self.resume(name)
            time.sleep(0.03 * (attempt % 7 + 1))
        raise TimeoutError(f"none of {attempt} stops in {timeout_s} s hit an open epoch")

    def kill_mid_epoch(self, slots: Iterable[int], topics: Sequence[str]) -> tuple[str, int]:
        """`kill -9` one of the workers in an open epoch. Returns its name and the number of records in
        flight.
        """
        name, held = self.stop_mid_epoch(slots, topics)
        self.kill(name)
        return name, sum(held.values())

    # --- for subclasses ------------------------------------------------------------------------------

    def environment_of(self, name: str) -> Mapping[str, str]:
        """What to add to the environment of one process."""
        return {}

    def prefix_of(self, name: str) -> Sequence[str]:
        """A command that starts the process with that name, without forking."""
        return ()

    # --- inside --------------------------------------------------------------------------------------

    def _spawn(self, name: str, arguments: Sequence[str]) -> ChildProcess:
        if name in self._running and self._running[name].poll() is None:
            raise RuntimeError(f"{name} is running")
        command = [sys.executable, "-m", "fcluster", *arguments, "--brokers", self.brokers]
        command += ["--data-dir", str(self.data_dir)]
        for setting, value in self._settings.items():
            command += ["--set", f"{setting}={value}"]
        command = [*self.prefix_of(name), *command]
        env = {**self._env, **self.environment_of(name)}
        child = spawn(name, command, log_file=self._log_path(name), env=env, cwd=self._tree)
        self._running[name] = child
        self._all.append(child)
        return child

    def _log_path(self, name: str) -> Path:
        return self.data_dir / "test-logs" / f"{name}.log"


def worker_name(slot: int) -> str:
    """The name of the process of a slot."""
    return f"worker-{slot}"


def held_back(brokers: str, topics: Sequence[str]) -> dict[tuple[str, int], tuple[int, int]]:
    """Partitions with an open transaction: the last stable offset, and the number of offsets after it."""
    stable = end_offsets(brokers, topics, READ_COMMITTED)
    high = end_offsets(brokers, topics, READ_UNCOMMITTED)
    return {at: (stable[at], high[at] - stable[at]) for at in high if stable[at] < high[at]}


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything that it printed."""
        return self.stdout + self.stderr


class Up:
    """`fcluster up TARGET` as a process, which ends with the `with` block."""

    def __init__(
        self,
        target: Path | str,
        brokers: str,
        data_dir: Path,
        *more: str,
        workers: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "fcluster", "up", str(target), *more]
        self._command += ["--workers", str(workers), "--brokers", brokers, "--data-dir", str(data_dir)]
        self._data_dir = data_dir
        self._env = {**os.environ, "COLUMNS": "200", **(env or {})}

    def __enter__(self) -> Up:
        self._files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        out, err = self._files
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=REPOSITORY, env=self._env
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            for file in self._files:
                file.close()

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.poll()

    def wait_until(self, condition: Callable[[], _V], what: str, timeout_s: float = 60) -> _V:
        """Like the function of that name, but it also stops waiting if the command has ended."""

        def running() -> _V:
            assert self.poll() is None, self._said()
            return condition()

        return wait_until(running, what, timeout_s)

    def interrupt(self) -> None:
        """Send Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> Ended:
        """Wait for its end."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            said = "".join(self._said())
            raise TimeoutError(f"`fcluster up` still runs after {timeout_s} s:\n{said}") from None
        out, err = self._said()
        return Ended(code, out, err)

    def wait_until_it_answers(self) -> None:
        """Wait until `fcluster status` gets an answer from its coordinator."""
        self.wait_until(self._answers, "fcluster up answers", 30)

    def pid(self, name: str) -> int:
        """The process id of one of its processes, according to its note."""
        return json.loads((self._data_dir / "cluster.json").read_text())["pids"][name]

    def _answers(self) -> bool:
        command = [sys.executable, "-m", "fcluster", "status", "--json", "--data-dir", str(self._data_dir)]
        return subprocess.run(command, capture_output=True, timeout=20, cwd=REPOSITORY).returncode == 0

    def _said(self) -> tuple[str, ...]:
        for file in self._files:
            file.seek(0)
        return tuple(file.read() for file in self._files)


# --- /proc -----------------------------------------------------------------------------------------------


def process_state(pid: int) -> str:
    """The kernel's letter for a process's state: R, S, D, T (stopped), Z. X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads, since it started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int | str, field: str = "VmRSS") -> int:
    """Resident memory of a process (`self`: of this one): `VmRSS` now, `VmHWM` at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} for process {pid}")


def processes_with(text: str) -> list[int]:
    """Ids of processes whose command line or environment contains `text`, except our own."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in command and process_state(int(entry.name)) not in "ZX":
                found.append(int(entry.name))
    return found
