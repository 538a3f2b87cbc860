"""Child processes that never outlive their parent, and the policy for restarting them.

Responsible for: starting processes so that they die with this one however it ends (even by `kill -9`),
copying their output to a file and a callback, ending them, and `RestartBackoff`, the pure policy of when to
restart one. Must not decide what is restarted; the supervisor does that.

On Linux the kernel ends the children (PR_SET_PDEATHSIG, set by `bound_exec.py` in the child, kept over exec).
It acts when the *thread* that started the child ends, so all children are started by one thread that lives as
long as the process. Elsewhere a guard process reads a pipe whose other end only this process holds, and kills
the children when the pipe closes. In both cases the child's process id is the command's own.

Each child has its own session. So a Ctrl-C in the terminal reaches only this process, which then ends its
children in the right order.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TypeVar

from fcluster.common.files import boot_id

LINE_BYTES_MAX = 16 * 1024
LOG_BYTES_MAX = 32 * 1024 * 1024

_SHIM = str(Path(__file__).with_name("bound_exec.py"))
_KERNEL_BINDS = sys.platform == "linux"
"""Whether the kernel binds children to us. Tests turn it off to use the guard."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


# --- naming ------------------------------------------------------------------------------------------


def process_space() -> str:
    """An id of the space in which this process's id is unique: a boot of a host, and a namespace of process
    ids in it.

    Within one such space, a process id means the same process to everyone. Host names don't guarantee that
    (containers may share them). Empty if the system has no such names.
    """
    boot = boot_id()
    try:
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}" if boot else ""
    except OSError:
        return ""


# --- starting ----------------------------------------------------------------------------------------


def popen_bound(
    argv: Sequence[str],
    *,
    pid_file: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.STDOUT,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that dies with this one, from any thread.

    Args:
        argv: the command. A command that can't be started shows as exit code 127 and a line on stderr.
        pid_file: written by the child itself before the command starts.
        env: the whole environment (None: ours).

    Its standard input is empty.
    """
    if not _KERNEL_BINDS:
        return _popen_guarded(argv, pid_file, env, cwd, stdout, stderr, pass_fds)
    shim = _shim("bound", str(os.getpid()), pid_file, argv)
    return _in_starting_thread(lambda: _popen(shim, env, cwd, stdout, stderr, pass_fds))


def start_detached(
    argv: Sequence[str], *, pid_file: Path, log_file: Path, pass_fds: Sequence[int] = ()
) -> None:
    """Start a process that survives this one. `pid_file` gets its process id, `log_file` its output."""
    shim = _shim("detached", str(log_file), pid_file, argv)
    process = _popen(shim, None, None, subprocess.DEVNULL, subprocess.DEVNULL, pass_fds)
    process.wait()


def _shim(mode: str, target: str, pid_file: Path | None, argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-I", "-S", _SHIM, mode, target, str(pid_file or ""), "--", *argv]


def _popen(
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    cwd: Path | None,
    stdout: int | IO[bytes] | None,
    stderr: int | IO[bytes] | None,
    pass_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )


class _StartingThread:
    """Runs calls in one thread that lives as long as the process."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="process-starter", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._calls.get()()

    def call(self, function: Callable[[], _T]) -> _T:
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  (raised again in the calling thread)
                future.set_exception(error)

        self._calls.put(run)
        return future.result()


_starting_lock = threading.Lock()
_starting_thread: _StartingThread | None = None


def _in_starting_thread(function: Callable[[], _T]) -> _T:
    global _starting_thread
    with _starting_lock:
        # A forked child inherits the object but not its thread.
        if _starting_thread is None or _starting_thread.owner_pid != os.getpid():
            _starting_thread = _StartingThread()
        thread = _starting_thread
    return thread.call(function)


class _Guard:
    """The process that kills our children when our end of its standard input closes."""

    def __init__(self) -> None:
        self.owner_pid = os.getpid()
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _SHIM, "guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.close)

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with self._lock:
            if not pipe.closed:
                pipe.write(line.encode())
                pipe.flush()

    def close(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with self._lock:
            pipe.close()
        self._process.wait()


class _GuardedPopen(subprocess.Popen[bytes]):
    """Removes itself from the guard's list as soon as it is reaped, before its process id can be reused."""

    guard: _Guard | None = None

    def poll(self) -> int | None:
        return self._tell_if_ended(super().poll())

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self._tell_if_ended(code)
        return code

    def _tell_if_ended(self, code: int | None) -> int | None:
        if code is not None and self.guard is not None:
            self.guard.forget(self.pid)
            self.guard = None
        return code


_guard: _Guard | None = None


def _popen_guarded(
    argv: Sequence[str],
    pid_file: Path | None,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    stdout: int | IO[bytes] | None,
    stderr: int | IO[bytes] | None,
    pass_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    global _guard
    with _starting_lock:
        if _guard is None or _guard.owner_pid != os.getpid():
            _guard = _Guard()
        guard = _guard
    process = _GuardedPopen(
        argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    process.guard = guard
    guard.watch(process.pid)
    if pid_file is not None:
        pid_file.write_text(f"{process.pid}\n", encoding="ascii")
    return process


# --- output ------------------------------------------------------------------------------------------


class LineSplitter:
    """Splits a stream of bytes into lines of bounded length. It does no I/O.

    A longer line is returned once, cut, with a note of how much is missing. The rest of it is dropped.
    """

    def __init__(self, line_bytes_max: int = LINE_BYTES_MAX) -> None:
        self._line_bytes_max = line_bytes_max
        self._kept = bytearray()
        self._dropped_bytes = 0

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes, without their line ends."""
        lines: list[str] = []
        *complete, rest = data.split(b"\n")
        for part in complete:
            self._keep(part)
            lines.append(self._take())
        self._keep(rest)
        return lines

    def end(self) -> list[str]:
        """The last line, if the stream didn't end with a line end."""
        return [self._take()] if self._kept or self._dropped_bytes else []

    def _keep(self, part: bytes) -> None:
        room = self._line_bytes_max - len(self._kept)
        self._kept += part[:room]
        self._dropped_bytes += max(0, len(part) - room)

    def _take(self) -> str:
        line = self._kept.removesuffix(b"\r").decode("utf-8", errors="replace")
        if self._dropped_bytes:
            line += f" [... {self._dropped_bytes} bytes cut]"
        self._kept.clear()
        self._dropped_bytes = 0
        return line


class BoundedLog:
    """A log file that is moved to `NAME.1` when it has grown to `bytes_max`; at most two such files exist."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        self._path = path
        self._bytes_max = bytes_max
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._size_bytes = self._file.tell()

    def write(self, line: str) -> None:
        data = line.encode("utf-8", errors="replace") + b"\n"
        if self._size_bytes and self._size_bytes + len(data) > self._bytes_max:
            self._file.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file = self._path.open("ab", buffering=0)
            self._size_bytes = 0
        self._file.write(data)
        self._size_bytes += len(data)

    def close(self) -> None:
        self._file.close()


# --- a child -----------------------------------------------------------------------------------------


class ChildProcess:
    """A running child of this process; made by `spawn`. Its methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        log: BoundedLog | None,
        on_line: Callable[[str], None] | None,
        line_bytes_max: int,
    ) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log
        self._on_line = on_line
        self._lines = LineSplitter(line_bytes_max)
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end of the process. Returns None if it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal. Does nothing if the process has ended."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def stop(self, grace_s: float) -> int:
        """Ask it to exit, kill it after `grace_s`, and return the exit code."""
        self.terminate()
        if self.wait(grace_s) is None:
            # A stopped process (SIGSTOP) runs no handler of SIGTERM; SIGKILL always works.
            self.kill()
        code = self._process.wait()
        self.join_output()
        return code

    def join_output(self, timeout_s: float = 2.0) -> bool:
        """Wait until its last lines were passed on. Returns False if another process still holds its output
        open.
        """
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        descriptor = pipe.fileno()
        try:
            while data := os.read(descriptor, 65536):
                self._pass_on(self._lines.feed(data))
            self._pass_on(self._lines.end())
        finally:
            pipe.close()
            if self._log is not None:
                self._log.close()

    def _pass_on(self, lines: list[str]) -> None:
        # Neither a full disk nor a failing callback may stop the reading, because the child would block on
        # its output.
        for line in lines:
            if self._log is not None:
                try:
                    self._log.write(line)
                except OSError as error:
                    _log.warning("can't write the log of %s, continuing without it: %s", self.name, error)
                    self._log.close()
                    self._log = None
            if self._on_line is not None:
                try:
                    self._on_line(line)
                except Exception:  # noqa: BLE001  (the reading goes on, whatever it is)
                    _log.exception("the thread that reads the output of %s failed", self.name)


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    log_file: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    line_bytes_max: int = LINE_BYTES_MAX,
) -> ChildProcess:
    """Start a child that dies with this process; its stdout and stderr become one stream of lines.

    Args:
        name: for messages and threads.
        log_file: gets every line (appended, bounded: see `BoundedLog`).
        on_line: gets every line, in a thread of its own for each child.
        env: the whole environment (None: ours).
        line_bytes_max: longer lines are cut.
    """
    log = None if log_file is None else BoundedLog(log_file)
    process = popen_bound(argv, env=env, cwd=cwd, stdout=subprocess.PIPE, pass_fds=pass_fds)
    return ChildProcess(name, process, log, on_line, line_bytes_max)


def describe_exit(code: int) -> str:
    """An exit code in words: `exit code 1`, `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


# --- restarting --------------------------------------------------------------------------------------


class RestartBackoff:
    """How long to wait before a process that ended is restarted (no clock of its own).

    The delays double from `first_ms` up to `max_ms`. A process that ran for `healthy_after_ms` starts over.
    """

    def __init__(self, first_ms: int = 200, max_ms: int = 10_000, healthy_after_ms: int = 30_000) -> None:
        assert 0 < first_ms <= max_ms
        assert healthy_after_ms > 0
        self._first_ms = first_ms
        self._max_ms = max_ms
        self._healthy_after_ms = healthy_after_ms
        self.failures = 0
        """Consecutive ends without a healthy period between them."""

    def delay_ms(self, ran_for_ms: float) -> int:
        """The delay before the next start. Call it once for each end of the process."""
        if ran_for_ms >= self._healthy_after_ms:
            self.failures = 0
        # The exponent is bounded too: a process may end forever.
        delay_ms = min(self._max_ms, self._first_ms * 2 ** min(self.failures, 32))
        self.failures += 1
        return delay_ms
