from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcluster.common import processes
from fcluster.common.processes import (
    BoundedLog,
    ChildProcess,
    LineSplitter,
    RestartBackoff,
    describe_exit,
    spawn,
)
from tests.harness import wait_until, wait_until_equal

PYTHON = [sys.executable, "-I", "-S", "-c"]
SLEEPER = [*PYTHON, "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [*PYTHON, f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER[-1]}"]
POLITE = [
    *PYTHON,
    f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); {SLEEPER[-1]}",
]
REPOSITORY = Path(__file__).parents[3]

needs_kernel_binding = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux")
MECHANISMS = [pytest.param(True, id="kernel", marks=needs_kernel_binding), pytest.param(False, id="guard")]


def runs(pid: int) -> bool:
    """Whether the process still runs. One that has ended, but isn't reaped yet, doesn't."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def collect(argv: list[str], **options: object) -> tuple[ChildProcess, list[str]]:
    lines: list[str] = []
    return spawn("child", argv, on_line=lines.append, **options), lines  # type: ignore[arg-type]


def parent_of_sleeper(kernel_binds: bool, code: str) -> tuple[subprocess.Popen[bytes], int]:
    """A Python process that runs `code`. The code must print the process id of a child that it started."""
    program = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from fcluster.common import processes\n"
        f"processes._KERNEL_BINDS = {kernel_binds}\n"
        f"SLEEPER = {SLEEPER!r}\n"
        f"{code}\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


# --- processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_binds", MECHANISMS)
def test_child_of_a_killed_parent_dies(kernel_binds: bool) -> None:
    parent, child_pid = parent_of_sleeper(
        kernel_binds,
        "ready = threading.Event()\n"
        "child = processes.spawn('c', SLEEPER, on_line=lambda line: ready.set())\n"
        "ready.wait(); print(child.pid, flush=True)",
    )
    with parent:
        assert runs(child_pid)
        parent.kill()
    wait_until(lambda: not runs(child_pid), "the child has ended")


@pytest.mark.parametrize("kernel_binds", MECHANISMS)
def test_child_dies_when_its_parent_ends_normally(kernel_binds: bool) -> None:
    parent, child_pid = parent_of_sleeper(
        kernel_binds,
        "ready = threading.Event()\n"
        "child = processes.spawn('c', SLEEPER, on_line=lambda line: ready.set())\n"
        "ready.wait(); print(child.pid, flush=True)\n"
        "sys.exit()",
    )
    with parent:
        assert parent.wait(20) == 0
    wait_until(lambda: not runs(child_pid), "the child has ended")


@pytest.mark.parametrize("kernel_binds", MECHANISMS)
def test_child_survives_the_thread_that_started_it(
    kernel_binds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_KERNEL_BINDS", kernel_binds)
    started: list[tuple[ChildProcess, list[str]]] = []
    thread = threading.Thread(target=lambda: started.append(collect(SLEEPER)))
    thread.start()
    thread.join()
    child, lines = started[0]
    try:
        wait_until_equal(lambda: lines, ["up"], "its output")
        assert child.wait(0.2) is None
    finally:
        child.kill()
        assert child.wait(20) == -signal.SIGKILL
        assert child.join_output()


def test_detached_process_outlives_its_parent(tmp_path: Path) -> None:
    pid_file, log_file = tmp_path / "pid", tmp_path / "log"
    parent, child_pid = parent_of_sleeper(
        True,
        f"log = Path({str(log_file)!r}); pid = Path({str(pid_file)!r})\n"
        "processes.start_detached(SLEEPER, pid_file=pid, log_file=log)\n"
        "while not (log.exists() and log.read_text()): time.sleep(0.01)\n"
        "print(pid.read_text(), end='', flush=True)",
    )
    try:
        with parent:
            parent.kill()
        assert runs(child_pid)
        assert log_file.read_text() == "up\n"
    finally:
        os.kill(child_pid, signal.SIGKILL)
    wait_until(lambda: not runs(child_pid), "the child has ended")


def test_output_goes_to_file_and_callback(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "child.log"
    child, lines = collect(["sh", "-c", "echo out; echo err >&2; printf 'no end'"], log_file=log_file)
    assert child.wait(20) == 0
    assert child.join_output()
    assert lines == ["out", "err", "no end"]
    assert log_file.read_text() == "out\nerr\nno end\n"


def test_reading_continues_after_a_callback_fails(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    log_file = tmp_path / "child.log"
    child = spawn("child", [sys.executable, "-c", "print(1); print(2)"], log_file=log_file, on_line=fail)
    assert child.wait(20) == 0
    assert child.join_output()
    assert log_file.read_text() == "1\n2\n"


def test_environment_and_directory_are_passed_on(tmp_path: Path) -> None:
    code = "import os; print(os.environ['FLIGHT'], os.getcwd())"
    child, lines = collect([sys.executable, "-c", code], env={**os.environ, "FLIGHT": "UA1545"}, cwd=tmp_path)
    assert child.wait(20) == 0
    assert child.join_output()
    assert lines == [f"UA1545 {tmp_path}"]


def test_broken_pipe_signal_kills_a_command_as_in_a_shell() -> None:
    # Python ignores SIGPIPE. A command that inherited that would never notice a closed pipe.
    child, lines = collect(["sh", "-c", "kill -s PIPE $$; echo survived"])
    assert child.wait(20) == -signal.SIGPIPE
    assert child.join_output()
    assert lines == []


def test_missing_command_is_reported_by_exit_code_and_line() -> None:
    child, lines = collect(["no-such-command-anywhere"])
    assert child.wait(20) == 127
    assert child.join_output()
    assert lines == ["cannot start no-such-command-anywhere: No such file or directory"]


def test_stop_kills_a_child_that_ignores_sigterm() -> None:
    child, lines = collect(STUBBORN)
    wait_until_equal(lambda: lines, ["up"], "its output")
    assert child.stop(grace_s=0.1) == -signal.SIGKILL


def test_stop_lets_a_child_end_by_itself() -> None:
    child, lines = collect(POLITE)
    wait_until_equal(lambda: lines, ["up"], "its output")
    assert child.stop(grace_s=20) == 7


def test_stop_kills_a_suspended_child() -> None:
    child, lines = collect(POLITE)
    wait_until_equal(lambda: lines, ["up"], "its output")
    child.send_signal(signal.SIGSTOP)
    assert child.stop(grace_s=0.1) == -signal.SIGKILL


def test_signal_to_an_ended_child_is_harmless() -> None:
    child, _ = collect([sys.executable, "-c", ""])
    assert child.wait(20) == 0
    child.terminate()
    child.kill()
    assert child.join_output()


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "killed by SIGKILL"), (-200, "killed by signal 200")],
)
def test_exit_code_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


# --- output ------------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.text(alphabet=st.characters(exclude_characters="\n\r"), max_size=20), max_size=10),
    cuts=st.lists(st.integers(0, 500), max_size=10),
)
def test_stream_in_any_pieces_gives_the_same_lines(lines: list[str], cuts: list[int]) -> None:
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")
    expected = [line.encode("utf-8", errors="replace").decode() for line in lines]
    splitter = LineSplitter()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    got = [line for start, end in itertools.pairwise(edges) for line in splitter.feed(data[start:end])]
    assert got + splitter.end() == expected


def test_long_line_is_truncated_and_the_next_is_whole() -> None:
    splitter = LineSplitter(line_bytes_max=4)
    assert splitter.feed(b"abc") == []
    assert splitter.feed(b"defgh") == []
    assert splitter.feed(b"ij\nnext\r\n") == ["abcd [... 6 bytes cut]", "next [... 1 bytes cut]"]
    assert splitter.feed(b"tail") == []
    assert splitter.end() == ["tail"]
    assert splitter.end() == []


def test_large_log_is_rotated_and_only_two_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    log = BoundedLog(path, bytes_max=20)
    for number in range(10):
        log.write(f"line {number:03}")
    log.close()
    assert path.read_text() == "line 008\nline 009\n"
    assert (tmp_path / "worker.log.1").read_text() == "line 006\nline 007\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_log_is_appended_to_over_restarts(tmp_path: Path) -> None:
    for line in ("first", "second"):
        log = BoundedLog(tmp_path / "worker.log")
        log.write(line)
        log.close()
    assert (tmp_path / "worker.log").read_text() == "first\nsecond\n"


# --- restarting --------------------------------------------------------------------------------------


def test_delay_doubles_up_to_its_limit_after_quick_ends() -> None:
    backoff = RestartBackoff(first_ms=100, max_ms=1000, healthy_after_ms=5000)
    assert [backoff.delay_ms(10) for _ in range(6)] == [100, 200, 400, 800, 1000, 1000]
    assert backoff.failures == 6


def test_delay_is_reset_after_a_healthy_period() -> None:
    backoff = RestartBackoff(first_ms=100, max_ms=1000, healthy_after_ms=5000)
    for _ in range(4):
        backoff.delay_ms(4999)
    assert backoff.delay_ms(5000) == 100
    assert backoff.delay_ms(10) == 200


@given(runs_ms=st.lists(st.floats(0, 1e9), max_size=200), first_ms=st.integers(1, 500))
def test_delay_stays_within_its_bounds(runs_ms: list[float], first_ms: int) -> None:
    backoff = RestartBackoff(first_ms=first_ms, max_ms=500)
    assert all(first_ms <= backoff.delay_ms(ran_for_ms) <= 500 for ran_for_ms in runs_ms)
