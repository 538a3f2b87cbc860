"""Failpoints do what they are told to, once, at the right passing, and leave a mark."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from fcluster.common import failpoints
from fcluster.common.failpoints import POINTS, REACHED, Arm, Failpoints
from tests.harness import process_state, wait_until

POINT = "worker.committed"
PACKAGE = Path(failpoints.__file__).parents[1]


class Armed:
    """Failpoints with a directory. Their signals are recorded and not sent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.signals: list[int] = []
        self.sent = threading.Event()
        self.reach = Failpoints(directory, self._note).reach

    def _note(self, number: int) -> None:
        self.signals.append(number)
        self.sent.set()

    def arm(self, arm: Arm) -> None:
        (self.directory / POINT).write_bytes(msgspec.json.encode(arm))

    @property
    def mark(self) -> Path:
        return self.directory / f"{POINT}{REACHED}"


@pytest.fixture
def armed(tmp_path: Path) -> Armed:
    return Armed(tmp_path)


def test_points_have_no_effect_without_the_variable() -> None:
    assert failpoints.reach is failpoints._nothing
    failpoints.reach(POINT, 1)


def test_point_without_an_arm_does_nothing(armed: Armed) -> None:
    armed.reach(POINT)
    assert armed.signals == []
    assert not armed.mark.exists()


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_armed_point_signals_once_and_leaves_a_mark(armed: Armed, action: str, number: int) -> None:
    armed.arm(Arm(action))  # type: ignore[arg-type]
    armed.reach(POINT, 7)
    armed.reach(POINT, 8)
    assert armed.signals == [number]
    assert msgspec.json.decode(armed.mark.read_bytes())["detail"] == "7"


def test_arm_for_a_later_passing_waits_for_that_passing(armed: Armed) -> None:
    armed.arm(Arm("kill", passing=3))
    for _ in range(2):
        armed.reach(POINT, "same")
    assert armed.signals == []
    armed.reach(POINT, "same")
    assert armed.signals == [signal.SIGKILL]


def test_passings_of_different_epochs_do_not_add_up(armed: Armed) -> None:
    armed.arm(Arm("kill", passing=2))
    for epoch in (1, 2, 3):
        armed.reach(POINT, epoch)
    assert armed.signals == []
    armed.reach(POINT, 3)
    assert armed.signals == [signal.SIGKILL]


def test_passings_before_the_arm_do_not_count(armed: Armed) -> None:
    for _ in range(5):
        armed.reach(POINT)
    armed.arm(Arm("kill", passing=2))
    armed.reach(POINT)
    assert armed.signals == []


def test_raising_point_raises_the_named_error(armed: Armed) -> None:
    armed.arm(Arm("raise", errno=errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device") as caught:
        armed.reach(POINT)
    assert caught.value.errno == errno.ENOSPC


def test_lasting_arm_acts_until_its_mark_is_removed(armed: Armed) -> None:
    armed.arm(Arm("kill", every=True))
    for _ in range(3):
        armed.reach(POINT)
    assert len(armed.signals) == 3
    armed.mark.unlink()
    armed.reach(POINT)
    assert len(armed.signals) == 3


def test_action_in_the_background_does_not_block_the_thread(armed: Armed) -> None:
    armed.arm(Arm("kill", in_background=True, after_ms=20))
    armed.reach(POINT)
    assert armed.mark.exists()
    assert armed.sent.wait(10)


def test_unknown_point_or_arm_is_an_error(armed: Armed) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        armed.reach("worker.commited")
    (armed.directory / POINT).write_text('{"action": "explode"}')
    with pytest.raises(msgspec.ValidationError):
        armed.reach(POINT)


def test_every_point_of_the_table_is_in_the_code_exactly_once() -> None:
    calls = re.compile(r'(?:failpoints\.reach\(\s*|\bfailpoint=)"([^"]+)"')
    found = [name for path in PACKAGE.rglob("*.py") for name in calls.findall(path.read_text("utf-8"))]
    assert sorted(found) == sorted(POINTS)


STOPPED = """
import sys, threading, time
from pathlib import Path
from fcluster.common import failpoints

def turn():
    while True:
        sum(range(200))

def stop():
    failpoints._send_self(19)
    Path(sys.argv[1]).touch()  # the step behind the point

for _ in range(3):
    threading.Thread(target=turn, daemon=True).start()
threading.Thread(target=stop, daemon=True).start()
time.sleep(60)
"""


def test_thread_that_stops_its_process_gets_no_further_although_others_run(tmp_path: Path) -> None:
    """A signal to the process, rather than to the thread, comes too late in most cases."""
    for number in range(5):
        step = tmp_path / str(number)
        process = subprocess.Popen([sys.executable, "-c", STOPPED, str(step)])
        try:
            wait_until(lambda pid=process.pid: process_state(pid) == "T", "the process stops", 30, 0.002)
            assert not step.exists()
            process.send_signal(signal.SIGCONT)
            wait_until(step.exists, "it goes on", 30, 0.002)
        finally:
            process.kill()
            process.wait()
