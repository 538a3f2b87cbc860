"""Three embedded brokers, used through the command line. All tests share one cluster."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from fcluster.kafka import embedded_cluster
from fcluster.kafka.durability import look_for_risks
from tests import brokers
from tests.harness import REPOSITORY, process_state, wait_until, wait_until_equal

pytestmark = pytest.mark.timeout(400)


def kafka(data_dir: Path, *arguments: str, code: int = 0) -> str:
    """Run `fcluster kafka`. Returns its standard output, and standard error as well if it should fail."""
    command = [sys.executable, "-m", "fcluster", "kafka", *arguments, "--data-dir", str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, check=False)
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


def replicas_of(servers: str, topic: str) -> set[int]:
    return {len(found.replicas) for found in brokers.metadata(servers).topics[topic].partitions.values()}


def setting_of(admin: AdminClient, topic: str, name: str) -> str | None:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    return admin.describe_configs([resource])[resource].result(30)[name].value


JOB = """
from fcluster import Job

job = Job("careful")
source, output = job.topic("lone", value="json"), job.topic("made", value="json")


def count(ctx, record):
    ctx.state["count"] = ctx.state.get("count", 0) + 1
    return {"count": ctx.state["count"]}


job.stream(source).key_by("origin").process(count, to=output)
"""


def what_can_lose_data_is_named(admin: AdminClient, servers: str, data_dir: Path) -> None:
    """Check that `fcluster up` names what can lose data: one topic for each kind of risk, and no safe
    topic. The
    topics that it creates (journal, changelog, repartition, output) have three replicas by default."""
    careless = [
        NewTopic("lone", 1, 1),
        NewTopic("thin", 1, 3, config={"min.insync.replicas": "1"}),
        NewTopic("unclean", 1, 3, config={"unclean.leader.election.enable": "true"}),
    ]
    for future in admin.create_topics(careless).values():
        future.result(30)
    wait_until(lambda: brokers.metadata(servers).topics.keys() >= {"lone", "thin", "unclean"}, "the topics")
    brokers.wait_whole(servers)
    names = ["flights", "lone", "thin", "unclean", "not-there"]

    def named() -> list[str]:
        return [line.partition(":")[0] for line in look_for_risks(admin, names)]

    # Each broker learns of new topics at its own time.
    wait_until_equal(named, ["lone", "thin", "unclean"], "each risk is named")
    job = data_dir / "job.py"
    job.write_text(JOB)
    command = [sys.executable, "-m", "fcluster", "up", str(job), "--brokers", servers, "--until-caught-up"]
    done = subprocess.run(
        [*command, "--data-dir", str(data_dir / "up")],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("WARNING committed data can be lost on these brokers (docs/kafka.md):") == 1
    assert "  lone: only one replica" in done.stderr
    assert done.stderr.count("Remedy: ") == 1
    created = [name for name in brokers.metadata(servers).topics if name == "made" or "careful" in name]
    assert len(created) == 4, created
    for topic in created:
        assert replicas_of(servers, topic) == {3}, topic
        assert setting_of(admin, topic, "min.insync.replicas") == "2", topic


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if embedded_cluster.is_cluster(tmp_path / "kafka"):
        embedded_cluster.kill_detached(tmp_path / "kafka")


def test_three_brokers_of_which_one_is_killed_and_restarted_lose_nothing(data_dir: Path) -> None:
    servers = kafka(data_dir, "start", "--nodes", "3", "--broker-config", "broker.session.timeout.ms=5000")
    servers = servers.strip()
    assert len(set(servers.split(","))) == 3

    # Topics get three replicas by default, and need two of them in sync.
    admin = AdminClient({"bootstrap.servers": servers})
    admin.create_topics([NewTopic("flights", 3)])["flights"].result(30)
    brokers.wait_whole(servers)
    partitions = brokers.metadata(servers).topics["flights"].partitions.values()
    assert all(sorted(partition.replicas) == [1, 2, 3] for partition in partitions)
    resource = ConfigResource(ConfigResource.Type.TOPIC, "flights")
    assert admin.describe_configs([resource])[resource].result(30)["min.insync.replicas"].value == "2"
    resource = ConfigResource(ConfigResource.Type.BROKER, "2")
    settings = admin.describe_configs([resource])[resource].result(30)
    assert settings["broker.session.timeout.ms"].value == "5000"

    what_can_lose_data_is_named(admin, servers, data_dir)

    # The heap of each broker is limited, and `status` names all brokers.
    running = kafka(data_dir, "status")
    pids = [int(pid) for pid in re.findall(r"process (\d+), on its own", running)]
    assert len(set(pids)) == 3
    for pid in pids:
        assert b"-Xmx256m" in Path(f"/proc/{pid}/cmdline").read_bytes()

    # kill -9: the others continue. When the broker is back, it has what was written in the meantime.
    victim = brokers.leader_of(servers, "flights", 0)
    assert kafka(data_dir, "kill", "--node", str(victim)).strip() == "killed"
    assert process_state(pids[victim - 1]) in "XZ"  # not our child, so it may take time until it is reaped
    assert f"broker {victim}: stopped" in kafka(data_dir, "status", code=1)
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "log_level": 0})
    for number in range(30):
        producer.produce("flights", b"UA%d" % number, partition=number % 3)
    assert producer.flush(60) == 0
    assert brokers.leader_of(servers, "flights", 0) != victim
    assert kafka(data_dir, "start", "--node", str(victim)).strip() == servers
    brokers.wait_whole(servers)

    # One broker is stopped cleanly, then the controller is killed, then all are stopped and started again.
    assert kafka(data_dir, "stop", "--node", "1").strip() == "stopped"
    assert kafka(data_dir, "start", "--node", "1").strip() == servers
    brokers.wait_whole(servers)
    controller = brokers.controller_of(servers)
    assert kafka(data_dir, "kill", "--node", str(controller)).strip() == "killed"
    assert brokers.controller_of(servers) != controller
    assert kafka(data_dir, "start").strip() == servers
    brokers.wait_whole(servers)
    assert "there is no broker 4" in kafka(data_dir, "stop", "--node", "4", code=2)
    assert "has 3 brokers, not 5" in kafka(data_dir, "start", "--nodes", "5", code=2)
    assert kafka(data_dir, "stop").strip() == "stopped"
    assert "not running" in kafka(data_dir, "status", code=1)
    assert not any(process_state(pid) not in "XZ" for pid in pids)
