"""How a worker's death is noticed, and that the take-over is reported step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.checker.generate import create_topic
from tests.harness import COORDINATOR, Cluster, wait_until, worker_name
from tests.pauses import status_of, wait_settled

pytestmark = pytest.mark.timeout(180)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
NOTICED_MS_MAX = 300
WORKERS = 2


@pytest.fixture
def cluster(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Cluster]:
    source, output = f"{topic_prefix}in", f"{topic_prefix}out"
    create_topic(kafka, source, 4)
    create_topic(kafka, output, 4)
    env = {
        "FCLUSTER_TEST_JOB": job_of(topic_prefix),
        "FCLUSTER_TEST_SOURCE": source,
        "FCLUSTER_TEST_OUTPUT": output,
    }
    with Cluster(JOB_FILE, kafka, tmp_path, workers=WORKERS, env=env) as cluster:
        yield cluster.start()


def job_of(topic_prefix: str) -> str:
    return f"{topic_prefix}job"


def takeovers(cluster: Cluster, job: str) -> list[dict[str, Any]]:
    return status_of(cluster.brokers, job).get("takeovers", [])


def moment_of(line: str) -> float:
    """The time of a log line, in seconds of this host's clock."""
    return datetime.fromisoformat(line.split(" ", 1)[0]).timestamp()


def test_killed_worker_on_this_host_is_noticed_within_300_ms(cluster: Cluster, topic_prefix: str) -> None:
    job = job_of(topic_prefix)
    noticed_ms: list[float] = []
    for number in range(3):
        slot = number % WORKERS
        wait_settled(cluster, job, 0)
        pid = cluster.pids()[worker_name(slot)]
        killed_s = time.time()
        cluster.kill(worker_name(slot))
        wait_until(lambda: len(takeovers(cluster, job)) > len(noticed_ms), "its shards run elsewhere", 30)
        takeover = takeovers(cluster, job)[-1]
        assert (takeover["slot"], takeover["shards"]) == (slot, 2)
        assert takeover["reason"] == "its process exited"
        assert list(takeover["steps_ms"]) == ["noticed", "journalled", "fenced", "assigned", "restored"]
        (line,) = [
            line
            for line in cluster.log(COORDINATOR, 200).splitlines()
            if f"-{pid}-" in line and "is over: its process exited" in line
        ]
        noticed_ms.append((moment_of(line) - killed_s) * 1000)
        cluster.start_worker(slot)
    # The median, because a busy host may have delayed one of the processes.
    assert statistics.median(noticed_ms) <= NOTICED_MS_MAX, noticed_ms
