"""Processes that handlers start: they are isolated from the worker, and don't outlive it.

Responsible for: making a forked child independent (default signal handlers, none of the worker's connections
and files); and the guard (`process_guard`), which kills leftover processes when the worker has ended for
whatever reason. The guard is started together with the first process that a handler starts, so a job that
starts none has no guard.

Handlers may use `subprocess`, `multiprocessing` with any start method, `concurrent.futures`, threads, and
`os.fork`. Python and the libraries announce each start: forks by `os.register_at_fork`, the others by audit
events (PEP 578). Must not know records or sessions.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fcluster.worker import process_guard

_GUARD_FILE = str(Path(process_guard.__file__))
_STARTS = frozenset({"subprocess.Popen", "os.posix_spawn", "os.system", "os.fork", "os.forkpty"})
_STARTERS = (
    "multiprocessing.popen_fork",
    "multiprocessing.popen_forkserver",
    "multiprocessing.popen_spawn_posix",
    "multiprocessing.resource_tracker",
)
"""Modules that start processes without an audit event, and that are imported only when needed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger("fcluster.worker")

is_forked = False
"""Whether this process is a forked child of a worker, and not the worker."""

_worker_pid = 0
_guard: subprocess.Popen[bytes] | None = None
"""Kept, because dropping it while it runs causes a ResourceWarning."""
_guard_input = -1
_guard_wanted = threading.Lock()
_ports: set[int] = set()
_directories: list[str] = []


def prepare() -> None:
    """Prepare this process to be a worker. Call it once, before the job is loaded."""
    global _worker_pid
    if sys.platform != "linux" or _worker_pid:
        return
    _worker_pid = os.getpid()
    os.environ[process_guard.ENVIRONMENT_VARIABLE] = f"{_worker_pid}-{uuid.uuid4().hex}"
    os.register_at_fork(before=_before_fork, after_in_parent=_let_signals_in, after_in_child=_become_child)
    sys.addaudithook(_audit)
    if any(name in sys.modules for name in _STARTERS):
        _start_guard()


def keep_from_children(*, addresses: Iterable[str] = (), directory: Path | None = None) -> None:
    """Note what forked children must not hold open: TCP connections from or to the ports of these addresses
    (``host:port``, with or without a scheme), and files in that directory.
    """
    for address in addresses:
        port = address.rpartition(":")[2]
        if port.isdigit() and int(port):
            _ports.add(int(port))
    if directory is not None:
        _directories.append(f"{directory.resolve()}{os.sep}")


def leave_within(timeout_s: float, code: int) -> None:
    """Exit with `code` after this time, whatever the threads and children are still doing.

    Call this when all work is done: at exit, Python waits for the threads and children of handlers, however
    long they take.
    """

    def leave() -> None:
        time.sleep(timeout_s)
        _log.warning("threads or processes of a handler don't exit; exiting without them")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    threading.Thread(target=leave, name="leaving", daemon=True).start()


# --- the guard ----------------------------------------------------------------------------------------


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS or (event == "import" and arguments and arguments[0] in _STARTERS):
        _start_guard()


def _start_guard() -> None:
    global _guard, _guard_input
    if os.getpid() != _worker_pid or not _guard_wanted.acquire(blocking=False):
        return  # the guard runs or is being started; its own start triggers an event too
    reading, _guard_input = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(_guard_input, False)
    leads_session = os.getsid(0) == _worker_pid
    mark = os.environ[process_guard.ENVIRONMENT_VARIABLE]
    try:
        _guard = subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARD_FILE, str(_worker_pid), mark, "1" if leads_session else "0"],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        _log.warning("processes of handlers may outlive this worker: can't start their guard: %s", error)
    finally:
        os.close(reading)


# --- forks ---------------------------------------------------------------------------------------------


class _ForkingThread(threading.local):
    """State of the thread that forks. It is the child's only thread."""

    mask: set[int] | None = None


_forking = _ForkingThread()


def _before_fork() -> None:
    """Block signals until the child has its own handlers. Otherwise the worker's handler would take the
    signal, and `Pool.terminate`, for example, would wait for the child forever.
    """
    _start_guard()
    _forking.mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS))


def _let_signals_in() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)
    _forking.mask = None


# --- in a forked child --------------------------------------------------------------------------------


def _become_child() -> None:
    global is_forked
    is_forked = True
    facts = process_guard.start_of(os.getpid())
    if facts is not None and _guard_input >= 0:
        with contextlib.suppress(OSError):
            os.write(_guard_input, f"{os.getpid()} {facts[2]}\n".encode())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Clients of Kafka and RocksDB can't be destroyed here: they would wait for threads that don't exist.
    gc.freeze()
    _let_go_of_descriptors()
    _let_signals_in()


def _let_go_of_descriptors() -> None:
    """The descriptors' numbers stay in use, so that no other file gets them while an object still refers to
    them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if _is_the_workers(int(name)):
                os.dup2(null, int(name), inheritable=False)
    os.close(null)


def _is_the_workers(descriptor: int) -> bool:
    target = os.readlink(f"/proc/self/fd/{descriptor}")
    if not re.match(r"socket:", target):
        return any(target.startswith(directory) for directory in _directories)
    shared = socket.socket(fileno=descriptor)
    try:
        if shared.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        ports = {shared.getsockname()[1]}
        with contextlib.suppress(OSError):
            ports.add(shared.getpeername()[1])
        return not ports.isdisjoint(_ports)
    finally:
        shared.detach()
