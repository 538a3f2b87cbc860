"""A job whose stages are connected by a topic of its user, on a broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import REPOSITORY

pytestmark = pytest.mark.timeout(180)

JOB = """
from fcluster import Job

job = Job("{prefix}job")
between = job.topic("{prefix}between")

def count(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"n": ctx.state["n"]}}

counted = job.stream(job.topic("{prefix}in")).process(count).through(between)
one, others = counted.branch(lambda value: value["n"] == 1)
one.to(job.topic("{prefix}firsts"))
others.to(job.topic("{prefix}others"))
"""
RECORDS = 500
KEYS = 7


def test_until_caught_up_also_processes_what_the_job_has_written_for_itself(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(JOB.format(prefix=topic_prefix))

    def run(*command: str, lines: str = "") -> None:
        done = subprocess.run(
            [sys.executable, "-m", "fcluster", *command, "--brokers", kafka],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            input=lines,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    lines = "".join(json.dumps({"k": f"k{number % KEYS}"}) + "\n" for number in range(RECORDS))
    run("produce", f"{topic_prefix}in", "--partitions", "2", "--key-field", "k", lines=lines)
    run("up", "job.py", "--workers", "2", "--until-caught-up", "--plain")
    counts = {
        topic: sum(
            map(len, read_topic(kafka, topic_prefix + topic, READ_COMMITTED, lambda one: one).values())
        )
        for topic in ("between", "firsts", "others")
    }
    assert counts == {"between": RECORDS, "firsts": KEYS, "others": RECORDS - KEYS}
