"""The Procfile with honcho, as a user would run it: all processes start, work, and end with Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fcluster.common.processes import popen_bound
from tests.checker.check import check_totals, wait_until_committed
from tests.checker.generate import create_topic, write_records
from tests.checker.records import generate_records
from tests.harness import processes_with, wait_until

REPOSITORY = Path(__file__).parents[2]
JOB_FILE = REPOSITORY / "tests" / "jobs" / "running_totals.py"
ENDED_BY_CTRL_C = 130  # the code that shells use, which honcho returns

pytestmark = pytest.mark.timeout(180)


def test_honcho_runs_coordinator_and_two_workers_and_ctrl_c_ends_them_in_order(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    job, source, output = (f"{topic_prefix}{name}" for name in ("job", "in", "out"))
    for topic in (source, output):
        create_topic(kafka, topic, 4)
    job_file = tmp_path / JOB_FILE.name  # a path that appears in no other test's command lines
    shutil.copy(JOB_FILE, job_file)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JOB": str(job_file),
        "FCLUSTER_BOOTSTRAP_SERVERS": kafka,
        "FCLUSTER_STATE_DIR": str(tmp_path / "state"),
        "FCLUSTER_WORKERS": "2",
        "FCLUSTER_TEST_JOB": job,
        "FCLUSTER_TEST_SOURCE": source,
        "FCLUSTER_TEST_OUTPUT": output,
    }
    log = tmp_path / "honcho.log"
    command = [sys.executable, "-m", "honcho", "--no-colour", "start", "--concurrency", "worker=2"]
    with log.open("wb") as written:
        honcho = popen_bound(command, env=environment, cwd=REPOSITORY, stdout=written)
    try:
        write_records(kafka, source, generate_records(5_000, keys=100, seed=1))
        wait_until_committed(kafka, job, [source], 90)
        assert log.read_text().count("joined as slot") == 2
        honcho.send_signal(signal.SIGINT)
        assert honcho.wait(30) == ENDED_BY_CTRL_C
        wait_until(lambda: not processes_with(str(job_file)), "all processes have ended", 10)
        verdict = check_totals(kafka, job, source, output)
        assert verdict.ok, verdict.report()
        text = log.read_text()
        assert "SIGKILL" not in text
        assert "Traceback" not in text
        stopped = [line for line in text.splitlines() if "stopped (rc=" in line]
        assert len(stopped) == 3, text
        assert [line for line in stopped if "(rc=0)" not in line] == []
    finally:
        if honcho.poll() is None:
            honcho.kill()
        honcho.wait(10)
        print(log.read_text())


def test_honcho_accepts_the_procfile() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "honcho", "check"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stdout
    assert "coordinator, worker" in done.stdout
