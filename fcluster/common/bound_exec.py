"""The first program that a child process of fcluster runs: it binds itself to its parent, then becomes the
command.

Responsible for: the steps that the child has to take between fork and exec, which Python's `preexec_fn` can't
do safely in a parent with threads. It runs as a script by its path (`python -I -S bound_exec.py ...`), starts
in about 10 ms, and must import only the standard library.

    bound_exec.py bound PARENT_PID PID_FILE -- COMMAND...    the kernel kills it when the parent dies (Linux)
    bound_exec.py detached LOG_FILE PID_FILE -- COMMAND...    a session of its own, survives its parent
    bound_exec.py guard                                      kills the processes named on its standard
                                                             input when that ends (where no kernel helps)

The command's process id is written to PID_FILE before the command starts, so that a process that holds a lock
can always be identified. An empty PID_FILE means that no file is written.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 125
EXIT_NOT_STARTED = 127


def main(arguments: list[str]) -> int:
    mode = arguments[0]
    if mode == "guard":
        return guard()
    _, target, pid_file, separator, *command = arguments
    assert separator == "--", arguments
    if mode == "bound":
        bind_to_parent(int(target))
    else:
        assert mode == "detached", mode
        detach(target)
    if pid_file:
        write_pid(pid_file)
    return become(command)


def bind_to_parent(parent_pid: int) -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the call above, which then never fires.
    if os.getppid() != parent_pid:
        sys.exit(EXIT_ORPHANED)


def detach(log_file: str) -> None:
    """Continues in a grandchild that init adopts. The process that was started prints nothing and exits."""
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)


def write_pid(pid_file: str) -> None:
    partial = f"{pid_file}.partial"
    with open(partial, "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    os.replace(partial, pid_file)


def become(command: list[str]) -> int:
    # Python ignores these two signals. They would stay ignored in the command.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
    return EXIT_NOT_STARTED


def guard() -> int:
    """Reads `+PID` and `-PID` lines until the parent's end of the pipe is closed, then kills the
    remaining processes.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watched: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            watched.add(pid)
        else:
            watched.discard(pid)
    for pid in watched:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
