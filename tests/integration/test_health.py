"""The HTTP port of real processes: which are live, which are ready, and what the status says."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fcluster.common import failpoints
from fcluster.common.failpoints import Arm
from tests.checker.check import wait_until_committed
from tests.checker.generate import create_topic, generate_records, write_records
from tests.harness import COORDINATOR, Cluster, wait_until, wait_until_equal, worker_name
from tests.integration.test_failover import STANDBY, CoordinatorsCluster

pytestmark = pytest.mark.timeout(180)
JOB_FILE = Path(__file__).parents[1] / "jobs" / "running_totals.py"
PARTITIONS = 4
RESTORE_HELD_MS = 10_000


class Probed:
    """A cluster whose processes have HTTP ports."""

    def __init__(self, brokers: str, prefix: str, data_dir: Path) -> None:
        self.brokers, self.job, self.source = brokers, prefix + "job", prefix + "in"
        output = prefix + "out"
        for topic in (self.source, output):
            create_topic(brokers, topic, PARTITIONS)
        self.points = data_dir / "points"
        self.points.mkdir(parents=True)
        env = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": output,
            failpoints.ENVIRONMENT_VARIABLE: str(self.points),
        }
        settings: dict[str, object] = {"http.bind": "127.0.0.1:0", "session.timeout.ms": 3000}
        self.cluster: Cluster = CoordinatorsCluster(
            JOB_FILE, brokers, data_dir, workers=1, env=env, settings=settings
        )

    def url(self, name: str) -> str:
        """The URL of the port that the process announced last."""

        def announced() -> str:
            found = re.findall(r"health at (http://\S+)", self.cluster.log(name, 100_000))
            return found[-1] if found else ""

        return wait_until(announced, f"{name} announces its port")

    def ask(self, name: str, path: str, timeout_s: float = 5) -> tuple[int, str]:
        """The answer's code and body."""
        try:
            with urllib.request.urlopen(self.url(name) + path, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_ready(self, name: str) -> str:
        """Wait until the process is ready. Returns what it says."""

        def ready() -> str:
            try:
                code, body = self.ask(name, "/ready")
            except (OSError, http.client.HTTPException):
                return ""
            return body if code == 200 else ""

        return wait_until(ready, f"{name} is ready")

    def status(self, name: str) -> dict[str, Any]:
        """The status document of the process."""
        code, body = self.ask(name, "/status")
        assert code == 200, body
        return json.loads(body)

    def process(self, count: int, seed: int) -> None:
        """Write records, and wait until they are processed."""
        write_records(self.brokers, self.source, generate_records(count, keys=100, seed=seed))
        wait_until_committed(self.brokers, self.job, [self.source], 60)


@pytest.fixture
def probed(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Probed]:
    probed = Probed(kafka, topic_prefix, tmp_path / "data")
    with probed.cluster:
        yield probed


def test_leader_standby_and_worker_report_what_they_do(probed: Probed) -> None:
    probed.cluster.start()
    worker = worker_name(0)
    assert "leads job" in probed.wait_ready(COORDINATOR)
    probed.process(2_000, seed=1)
    assert "runs 4 shards" in probed.wait_ready(worker)
    probed.cluster.start_coordinator(STANDBY)
    assert "standing by" in probed.wait_ready(STANDBY)
    for name in (COORDINATOR, STANDBY, worker):
        assert probed.ask(name, "/live")[0] == 200
    leader = probed.status(COORDINATOR)
    assert (leader["role"], leader["job"], len(leader["workers"])) == ("leader", probed.job, 1)
    assert leader["workers"][0]["records_in"] == 2_000
    standby = probed.status(STANDBY)
    assert standby["role"] == "standby"
    assert standby["leader"]["pid"] == probed.cluster.pids()[COORDINATOR]
    own = probed.status(worker)
    assert (own["role"], own["stats"]["records_in"]) == ("worker", 2_000)
    assert {shard["phase"] for shard in own["shards"]} == {"running"}
    # The worker stays live and ready without its coordinator. The standby becomes the leader.
    probed.cluster.kill(COORDINATOR)
    assert probed.ask(worker, "/ready")[0] == 200
    wait_until(lambda: "leads job" in probed.wait_ready(STANDBY), "the standby leads")
    assert probed.ask(worker, "/live")[0] == 200
    wait_until_equal(lambda: probed.status(worker)["term"], 2, "the worker has found it")
    assert probed.ask(worker, "/ready")[0] == 200


def test_suspended_worker_answers_no_probe_and_is_live_again_when_it_continues(probed: Probed) -> None:
    probed.cluster.start()
    worker = worker_name(0)
    probed.process(500, seed=1)
    probed.wait_ready(worker)
    probed.cluster.pause(worker)
    try:
        with pytest.raises(TimeoutError):
            probed.ask(worker, "/live", timeout_s=1)
    finally:
        probed.cluster.resume(worker)
    wait_until_equal(lambda: probed.ask(worker, "/live")[0], 200, "it is live again")
    probed.wait_ready(worker)


def test_worker_that_restores_is_live_and_not_ready(probed: Probed) -> None:
    probed.cluster.start()
    worker = worker_name(0)
    probed.process(2_000, seed=1)
    probed.cluster.kill(worker)
    os.unlink(probed.cluster.data_dir / "test-logs" / f"{worker}.log")
    arm = Arm("hold", after_ms=RESTORE_HELD_MS)
    (probed.points / "worker.mid-restore").write_bytes(msgspec.json.encode(arm))
    probed.cluster.start_worker(0)
    mark = probed.points / ("worker.mid-restore" + failpoints.REACHED)
    wait_until(mark.exists, "the restore is held")

    def refusal() -> str:
        code, body = probed.ask(worker, "/ready")
        assert code == 503, f"ready during a restore: {body}"
        return body if "shards aren't running" in body else ""  # perhaps its producers aren't ready yet

    assert "restoring" in wait_until(refusal, "all but the shards is ready", RESTORE_HELD_MS / 2000)
    assert probed.ask(worker, "/live")[0] == 200
    assert "runs 4 shards" in probed.wait_ready(worker)
