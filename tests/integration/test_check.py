"""`fcluster check` on a broker: before the first run, after it, during one, and after a change of the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from tests.harness import REPOSITORY, Up

pytestmark = pytest.mark.timeout(180)

JOB = """
from fcluster import Job

job = Job("{prefix}job")
source = job.topic("{prefix}in")
output = job.topic("{prefix}out")

@job.process(source, to=output)
def count(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"n": ctx.state["n"]}}
"""


class User:
    """Someone with a job and a broker, who gives commands."""

    def __init__(self, directory: Path, prefix: str, brokers: str) -> None:
        self.directory = directory
        self.prefix = prefix
        self.brokers = brokers
        self.job_file = directory / "job.py"
        self.job_file.write_text(JOB.format(prefix=prefix))

    def run(self, *command: str, lines: str = "", code: int = 0) -> str:
        """What a command prints, which has to end with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", "fcluster", *command, "--brokers", self.brokers],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            input=lines,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def check(self, code: int = 0) -> str:
        return self.run("check", "job.py", code=code)

    def produce(self) -> None:
        self.run("produce", f"{self.prefix}in", "--partitions", "2", "--key-field", "k", lines='{"k": "a"}\n')

    def topics(self) -> set[str]:
        listed = AdminClient({"bootstrap.servers": self.brokers}).list_topics(timeout=30).topics
        return {topic for topic in listed if topic.startswith(self.prefix)}


@pytest.fixture
def user(tmp_path: Path, topic_prefix: str, kafka: str) -> User:
    return User(tmp_path, topic_prefix, kafka)


def test_job_is_checked_before_its_first_run_and_after_it_and_after_a_change(user: User) -> None:
    said = user.check(code=1)
    assert f"error    The topic '{user.prefix}in' doesn't exist." in said
    assert said.endswith("1 error\n")
    assert user.topics() == set()

    user.produce()
    said = user.check()
    assert f"ok       '{user.prefix}in' is there, with 2 partitions" in said
    assert f"'{user.prefix}out' will be created, with 2 partitions" in said
    assert "the job has no state yet" in said
    assert said.endswith("nothing stands in the way of a start\n")
    assert user.topics() == {f"{user.prefix}in"}, "checking creates nothing"

    user.run("up", "job.py", "--workers", "1", "--until-caught-up", "--plain")
    before = user.topics()
    said = user.check()
    assert "ok       state goes on: 'count'" in said
    assert "will be created" not in said
    assert user.topics() == before

    user.job_file.write_text(JOB.format(prefix=user.prefix).replace("def count", "def counted"))
    document = json.loads(user.run("check", "job.py", "--format", "json", code=1))
    (error,) = [finding for finding in document["findings"] if finding["level"] == "error"]
    assert "'count' of stage" in error["message"]
    assert "fcluster reset" in error["remedy"]


def test_job_that_runs_is_checked_without_disturbing_it(user: User) -> None:
    user.produce()
    with Up(user.job_file, user.brokers, user.directory / "data", workers=1) as up:
        up.wait_until(lambda: f"{user.prefix}out" in user.topics(), "the job runs")
        up.wait_until(lambda: "a cluster of the job runs" in user.check(), "check finds it")
        user.produce()
        consumed = ("consume", f"{user.prefix}out", "--from-beginning", "--max", "2")
        values = [json.loads(line)["value"] for line in user.run(*consumed).splitlines()]
        assert values == [{"n": 1}, {"n": 2}]
        up.interrupt()
        assert up.wait(60).code == 0
