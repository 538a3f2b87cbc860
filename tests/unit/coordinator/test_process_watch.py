"""Ends of processes are noticed at once, and only real ends."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fcluster.common.processes import process_space
from fcluster.coordinator.process_watch import ProcessWatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has descriptors of processes")


@pytest.fixture
def ended() -> queue.Queue[str]:
    return queue.Queue()


@pytest.fixture
def watch(ended: queue.Queue[str]) -> Iterator[ProcessWatch]:
    watch = ProcessWatch(ended.put)
    yield watch
    watch.close()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def test_killed_process_is_noticed_before_it_is_reaped(watch: ProcessWatch, ended: queue.Queue[str]) -> None:
    first, second = sleeper(), sleeper()
    try:
        watch.watch("first", first.pid)
        watch.watch("first", first.pid)
        watch.watch("second", second.pid)
        first.kill()
        assert ended.get(timeout=5) == "first"
        assert ended.empty()
    finally:
        second.kill()
        first.wait()
        second.wait()
    assert ended.get(timeout=5) == "second"


def test_process_that_has_already_ended_is_noticed(watch: ProcessWatch, ended: queue.Queue[str]) -> None:
    process = sleeper()
    process.kill()
    process.wait()
    watch.watch("gone", process.pid)
    assert ended.get(timeout=5) == "gone"


def test_processes_on_this_host_have_the_same_process_space() -> None:
    command = "from fcluster.common.processes import process_space; print(process_space())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == process_space() != ""
