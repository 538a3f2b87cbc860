"""The commands as a user gives them: `up`, `status`, `consume`, `produce`, `kafka`, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness import REPOSITORY, process_state, processes_with, wait_until, wait_until_equal

pytestmark = pytest.mark.timeout(180)

JOB = """
from fcluster import Job

job = Job("{prefix}job")
source = job.topic("{prefix}in")
output = job.topic("{prefix}out")

@job.process(source, to=output)
def count(ctx, record):
    n = ctx.state.get("n", 0) + 1
    ctx.state["n"] = n
    yield {{"key": ctx.key, "n": n}}
"""


class User:
    """A user in a directory with a job file, who runs commands."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self.directory = directory
        self.prefix = prefix
        self.started: list[subprocess.Popen[bytes]] = []
        (directory / "job.py").write_text(JOB.format(prefix=prefix))

    def popen(
        self, *command: str, output: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.directory / (output or os.devnull)).open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fcluster", *command],
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, *command: str, lines: str = "", code: int = 0) -> str:
        """Run a command, which must end with `code`. Returns its output."""
        done = subprocess.run(
            [sys.executable, "-m", "fcluster", *command],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            input=lines,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def produce(self, count: int, *more: str) -> None:
        lines = "".join(f'{{"key": "k{n % 7}", "n": {n}}}\n' for n in range(count))
        self.run("produce", f"{self.prefix}in", "--key-field", "key", *more, lines=lines)

    def consume(self, count: int) -> list[dict[str, Any]]:
        text = self.run("consume", f"{self.prefix}out", "--from-beginning", "--max", str(count))
        return [json.loads(line) for line in text.splitlines()]

    def output(self) -> str:
        return (self.directory / "up.log").read_text()

    def note(self) -> dict[str, Any]:
        return json.loads((self.directory / ".fcluster" / "cluster.json").read_text())

    def start_cluster(self, *more: str) -> subprocess.Popen[bytes]:
        up = self.popen("up", "job.py", "--workers", "2", *more, output="up.log")
        self.wait_until_running(up)
        return up

    def wait_until_running(self, up: subprocess.Popen[bytes]) -> None:
        def all_run() -> bool:
            assert up.poll() is None, self.output()
            status = self.status()
            return bool(status) and all(
                part["phase"] == "running" for part in (*status["workers"], *status["shards"])
            )

        wait_until(all_run, "all shards run", timeout_s=60)

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "fcluster", "status", "--json"],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            timeout=60,
        )
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@pytest.fixture
def user(tmp_path: Path, topic_prefix: str) -> Iterator[User]:
    user = User(tmp_path, topic_prefix)
    yield user
    user.close()


def assert_counted(outputs: list[dict[str, Any]], count: int) -> None:
    """Check that each key was counted without a gap or a repetition."""
    assert len(outputs) == count
    seen: dict[str, list[int]] = {}
    for line in outputs:
        assert line["key"] == line["value"]["key"]
        seen.setdefault(line["key"], []).append(line["value"]["n"])
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in seen.values())


def test_cluster_is_found_recovers_drains_and_continues_where_it_was(kafka: str, user: User) -> None:
    user.produce(500, "--brokers", kafka, "--partitions", "4")
    up = user.start_cluster("--brokers", kafka)
    # No options from here on: the data directory says where the cluster is.
    assert_counted(user.consume(500), 500)
    assert f"{user.prefix}in/3" in user.run("status")

    worker = user.note()["pids"]["worker-1"]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: user.note()["pids"].get("worker-1", worker) != worker, "the worker is started again")
    user.produce(500)
    assert_counted(user.consume(1000), 1000)

    # Like Ctrl-C in a terminal: sent to all processes in the foreground.
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 0, user.output()
    assert "worker-1 was killed by SIGKILL" in user.output()
    assert not (user.directory / ".fcluster" / "cluster.json").exists()
    assert "no cluster runs in .fcluster" in user.run("status", code=1)

    user.produce(500, "--brokers", kafka)
    user.run("up", "job.py", "--brokers", kafka, "--until-caught-up")
    text = user.run("consume", f"{user.prefix}out", "--from-beginning", "--max", "1500", "--brokers", kafka)
    assert_counted([json.loads(line) for line in text.splitlines()], 1500)


def test_second_cluster_is_refused_in_the_same_directory_and_under_the_same_name(
    kafka: str, user: User
) -> None:
    user.produce(1, "--brokers", kafka, "--partitions", "1")
    up = user.start_cluster("--brokers", kafka)
    text = user.run("up", "job.py", "--brokers", kafka, code=1)
    assert f"the data directory .fcluster is in use by process {up.pid}" in text
    text = user.run("up", "job.py", "--brokers", kafka, "--data-dir", "other", code=1)
    assert f"a cluster of job '{user.prefix}job' already runs" in text
    assert up.poll() is None


def test_killed_cluster_leaves_no_process_and_its_note_is_not_trusted(kafka: str, user: User) -> None:
    user.produce(1, "--brokers", kafka, "--partitions", "2")
    up = user.start_cluster("--brokers", kafka)
    pids = user.note()["pids"]
    assert sorted(pids) == ["coordinator", "worker-0", "worker-1"]
    up.kill()
    up.wait()
    wait_until(lambda: all(process_state(pid) in "ZX" for pid in pids.values()), "no orphans", 10)
    assert "no cluster runs in .fcluster" in user.run("status", code=1)


def test_cluster_starts_its_own_kafka_and_stops_it_at_the_end(user: User) -> None:
    servers = user.run("kafka", "start").splitlines()
    try:
        user.produce(200, "--partitions", "2")
        assert "running: 127.0.0.1:" in user.run("kafka", "status")
    finally:
        assert user.run("kafka", "stop") == "stopped\n"
    assert servers
    user.run("kafka", "status", code=1)

    up = user.start_cluster()
    assert_counted(user.consume(200), 200)
    broker = int((user.directory / ".fcluster" / "kafka" / "broker.pid").read_text())
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: "Kafka died; restarting it" in user.output(), "the death is noticed")
    wait_until_equal(lambda: user.output().count("is ready on"), 2, "Kafka is back", 60)
    user.produce(200)
    assert_counted(user.consume(400), 400)
    pids = user.note()["pids"].values()
    up.kill()
    up.wait()
    wait_until(lambda: all(process_state(pid) in "ZX" for pid in pids), "no worker is left", 10)
    wait_until(lambda: not processes_with(str(user.directory)), "no Kafka process is left", 10)


def test_killed_coordinator_of_a_cluster_is_restarted_and_leads_the_same_workers(
    kafka: str, user: User
) -> None:
    user.produce(300, "--brokers", kafka, "--partitions", "2")
    up = user.start_cluster("--brokers", kafka)
    pids = user.note()["pids"]
    os.kill(pids["coordinator"], signal.SIGKILL)
    wait_until(lambda: user.note()["pids"].get("coordinator", 0) not in (0, pids["coordinator"]), "a restart")
    wait_until_equal(lambda: user.status().get("term"), 2, "the next term")
    user.produce(300)
    assert_counted(user.consume(600), 600)
    assert user.note()["pids"] | {"coordinator": 0} == pids | {"coordinator": 0}, "a worker was restarted"
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 0, user.output()


def test_standby_of_a_cluster_takes_over_and_its_own_coordinator_stands_by(kafka: str, user: User) -> None:
    user.produce(300, "--brokers", kafka, "--partitions", "2")
    up = user.start_cluster("--brokers", kafka)
    standby = user.popen("coordinator", "job.py", "--brokers", kafka, output="standby.log")
    wait_until(lambda: user.status().get("standbys"), "it stands by")
    os.kill(user.note()["pids"]["coordinator"], signal.SIGKILL)
    # No options: the address in the directory doesn't answer, so the journal says which coordinator leads.
    wait_until(lambda: user.status().get("standbys") and user.status()["term"] == 2, "the roles are swapped")
    user.produce(300)
    assert_counted(user.consume(600), 600)
    os.killpg(up.pid, signal.SIGINT)
    assert up.wait(60) == 0, user.output()
    assert standby.wait(30) == 0, "the job was stopped, and its leader didn't end"
