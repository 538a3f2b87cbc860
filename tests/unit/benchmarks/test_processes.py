"""What a lane's processes have used, those that it has started included."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks import processes
from benchmarks.lanes import Running
from fcluster.common.processes import spawn
from tests.harness import cpu_seconds, wait_until

PARENT = """
import subprocess, sys, time
burn = "import time\\nwhile time.process_time() < 0.3: pass"
subprocess.run([sys.executable, "-c", burn], check=True)
child = subprocess.Popen([sys.executable, "-c", "import time; print('running', flush=True); time.sleep(600)"])
child.wait()
"""


def test_a_process_is_read_whatever_its_name_is() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"17 (a) b (c) S 3 17 5 0 -1 4194304 9 9 0 0 {ticks} {2 * ticks} {4 * ticks} {8 * ticks} 20 0 1 0"
    assert processes.Process.parse(stat) == processes.Process(17, 5, 15.0)


def test_a_session_has_its_children_and_the_time_of_those_that_have_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    parent = spawn("parent", [sys.executable, "-c", PARENT], log_file=log)
    try:
        wait_until(lambda: "running" in log.read_text(), "the second child")
        found = processes.of_session(parent.pid)
        assert len(found) == 2
        assert parent.pid in {process.pid for process in found}
        running = Running((parent.pid,), None, lambda: None, start_others=True)
        alone = Running((parent.pid,), None, lambda: None)
        assert running.cpu_s() >= cpu_seconds(parent.pid) + 0.25
        assert running.peak_bytes() > alone.peak_bytes() > 0
    finally:
        processes.kill_session(parent.pid)
        parent.stop(0)
    assert all(process.ended for process in processes.of_session(parent.pid))
    assert not log.read_text().count("Traceback")


def test_a_process_that_has_ended_has_no_peak() -> None:
    gone = processes.Process(2**22 + 1, 1, 0.0)
    assert processes.peak_bytes([gone]) == 0
