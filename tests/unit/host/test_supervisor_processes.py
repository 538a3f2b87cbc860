"""The supervisor with real processes and real signals, and scripts in place of coordinator and worker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 20.0
ROOT = str(Path(__file__).parents[3])

# A coordinator that drains when a file appears, instead of a message; and a worker that waits.
COORDINATOR = """
import pathlib, sys, time
print("coordinator up", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
print("drained", flush=True)
"""
WORKER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: print("got a SIGINT of my own", flush=True))
print("worker up", flush=True)
while True:
    time.sleep(60)
"""
SUPERVISOR = f"""
import pathlib, sys
from fcluster.host.job_processes import SpawnedChild
from fcluster.common.processes import spawn
from fcluster.cli.live_view import PlainView
from fcluster.host.supervisor import ProcessSpec, Supervisor

request, drain_s = pathlib.Path(sys.argv[1]), sys.argv[2]
python = (sys.executable, "-u", "-c")
outcome = Supervisor(
    [ProcessSpec("coordinator", (*python, {COORDINATOR!r}, str(request), drain_s)),
     ProcessSpec("worker-0", (*python, {WORKER!r}))],
    spawn=lambda spec, on_line: SpawnedChild(spawn(spec.name, spec.argv, on_line=on_line)),
    view=PlainView(sys.stdout),
    ask_drain=request.touch,
    on_change=lambda pids: print("pids", pids, flush=True),
    exit_grace_s=1.0,
).run()
print("outcome", outcome.exit_code, flush=True)
sys.exit(outcome.exit_code)
"""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


class Running:
    def __init__(self, directory: Path, drain_s: float) -> None:
        self.output = directory / "output"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, str(directory / "drain"), str(drain_s)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": ROOT},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, part: str, count: int = 1) -> None:
        wait_until(lambda: self.text().count(part) >= count, f"{part!r} in:\n{self.text()}")

    def pid_of(self, name: str) -> int:
        return int(re.findall(rf"pids .*'{name}': (\d+)", self.text())[-1])

    def pids(self) -> set[int]:
        return {
            int(pid) for line in re.findall(r"pids (.*)", self.text()) for pid in re.findall(r": (\d+)", line)
        }

    def interrupt_as_a_terminal_would(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[float], Running]]:
    started: list[Running] = []

    def start(drain_s: float) -> Running:
        running = Running(tmp_path, drain_s)
        started.append(running)
        running.wait_for("coordinator up")
        running.wait_for("worker up")
        return running

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


def test_worker_killed_by_kill_9_is_restarted(start: Callable[[float], Running]) -> None:
    running = start(0.0)
    first = running.pid_of("worker-0")
    os.kill(first, signal.SIGKILL)
    running.wait_for("worker up", 2)
    assert running.pid_of("worker-0") != first
    assert "worker-0 was killed by SIGKILL; restart in" in running.text()


def test_ctrl_c_drains_and_reaches_the_children_only_through_the_supervisor(
    start: Callable[[float], Running],
) -> None:
    running = start(0.2)
    running.interrupt_as_a_terminal_would()
    assert running.exit_code() == 0
    text = running.text()
    assert "draining" in text
    assert text.index("draining") < text.index("drained")
    assert "got a SIGINT of my own" not in text
    assert not any(map(is_alive, running.pids()))


def test_sigterm_drains_as_well(start: Callable[[float], Running]) -> None:
    running = start(0.0)
    running.process.terminate()
    assert running.exit_code() == 0
    assert "drained" in running.text()


def test_second_ctrl_c_kills_at_once(start: Callable[[float], Running]) -> None:
    running = start(3600.0)
    running.interrupt_as_a_terminal_would()
    running.wait_for("draining")
    running.interrupt_as_a_terminal_would()
    began = time.monotonic()
    assert running.exit_code() == 130
    assert time.monotonic() - began < 5.0
    assert not any(map(is_alive, running.pids()))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kill_9_of_the_supervisor_leaves_no_orphan(start: Callable[[float], Running]) -> None:
    running = start(3600.0)
    children = running.pids()
    assert len(children) == 2
    assert all(map(is_alive, children))
    running.process.kill()
    running.process.wait()
    wait_until(lambda: not any(map(is_alive, children)), "the children are gone")
