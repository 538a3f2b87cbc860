"""The embedded broker. Each test starts its own, so there are only a few tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from fcluster.common import processes
from fcluster.common.errors import DirectoryInUse
from fcluster.kafka import embedded as embedded_kafka
from fcluster.kafka.embedded import EmbeddedKafka, EmbeddedKafkaError
from tests.harness import wait_until, wait_until_equal

REPOSITORY = Path(__file__).parents[2]
HEAP_MB = 256


def write(servers: str, topic: str, values: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": servers})
    for value in values:
        producer.produce(topic, value)
    assert producer.flush(30) == 0


def read(servers: str, topic: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "reader", "auto.offset.reset": "earliest"})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        return [message.value() for message in consumer.consume(count, timeout=30)]
    finally:
        consumer.close()


def create(servers: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": servers})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)


def started_by_another_process(data_dir: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process that runs a broker in `data_dir`, and the broker's process id."""
    program = (
        "import time\n"
        "from fcluster.kafka.embedded import EmbeddedKafka\n"
        f"broker = EmbeddedKafka({str(data_dir)!r}, heap_mb={HEAP_MB})\n"
        "broker.start()\n"
        "print(broker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_broker_creates_no_topic_by_itself(kafka: str, topic_prefix: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    assert len(admin.list_topics(timeout=10).brokers) == 1
    topic = f"{topic_prefix}missing"
    assert admin.list_topics(topic, timeout=10).topics[topic].error is not None
    assert topic not in admin.list_topics(timeout=10).topics


def test_restarted_broker_keeps_data_and_address(tmp_path: Path) -> None:
    broker = EmbeddedKafka(tmp_path / "a broker's dïrectory", heap_mb=HEAP_MB)
    said: list[str] = []
    with broker:
        servers = broker.start(said.append)
        assert said == []  # it was already running
        create(servers, "flights")
        write(servers, "flights", [b"UA1545"])
        assert embedded_kafka.status(broker.data_dir).state == "running"
    assert broker.pid is None
    assert embedded_kafka.status(broker.data_dir).state == "stopped"
    with broker:
        assert broker.start() == servers
        assert read(servers, "flights", 1) == [b"UA1545"]
        write(servers, "flights", [b"DL461"])
        # After a crash, everything that was acknowledged is recovered.
        broker.kill()
        assert broker.start() == servers
        assert read(servers, "flights", 2) == [b"UA1545", b"DL461"]


def test_broker_ends_with_its_killed_parent_and_frees_the_directory(tmp_path: Path) -> None:
    parent, broker_pid = started_by_another_process(tmp_path)
    with parent:
        found = embedded_kafka.status(tmp_path)
        assert (found.state, found.pid, found.owner_pid) == ("running", broker_pid, parent.pid)
        with pytest.raises(DirectoryInUse, match=f"belongs to process {parent.pid}"):
            EmbeddedKafka(tmp_path).start()
        with pytest.raises(DirectoryInUse):
            embedded_kafka.stop_detached(tmp_path)
        parent.kill()
    wait_until_equal(lambda: embedded_kafka.status(tmp_path).state, "stopped", "the broker has stopped")
    wait_until(lambda: not Path(f"/proc/{broker_pid}/fd/0").exists(), "its process has ended")
    with EmbeddedKafka(tmp_path, heap_mb=HEAP_MB) as broker:
        assert broker.start() == found.bootstrap_servers


def test_detached_broker_outlives_its_starter_and_is_used_by_others(tmp_path: Path) -> None:
    program = (
        "from fcluster.kafka.embedded import start_detached\n"
        f"print(start_detached({str(tmp_path)!r}, heap_mb={HEAP_MB}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=REPOSITORY, check=True)
    servers = done.stdout.decode().strip()
    try:
        found = embedded_kafka.status(tmp_path)
        assert (found.state, found.bootstrap_servers, found.detached) == ("running", servers, True)
        assert embedded_kafka.start_detached(tmp_path) == servers
        with EmbeddedKafka(tmp_path) as attached:
            assert attached.start() == servers
            assert attached.attached
            assert attached.pid is None
        assert embedded_kafka.status(tmp_path).pid == found.pid
    finally:
        assert embedded_kafka.stop_detached(tmp_path) is True
    assert embedded_kafka.status(tmp_path).state == "stopped"
    assert embedded_kafka.stop_detached(tmp_path) is False


def test_detached_broker_that_hangs_is_killed_by_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_kafka, "STOP_TIMEOUT_S", 0.5)
    embedded_kafka.start_detached(tmp_path, heap_mb=HEAP_MB)
    os.kill(embedded_kafka.status(tmp_path).pid, signal.SIGSTOP)
    assert embedded_kafka.stop_detached(tmp_path) is True
    assert embedded_kafka.status(tmp_path).state == "stopped"


def test_broker_that_cannot_start_says_why_and_leaves_the_directory_free(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # looks formatted, but isn't
    with pytest.raises(EmbeddedKafkaError, match=r"it stopped while starting: .*meta\.properties") as caught:
        EmbeddedKafka(tmp_path, heap_mb=HEAP_MB).start()
    assert str(tmp_path / "logs" / "server.log") in caught.value.remedy
    with pytest.raises(EmbeddedKafkaError, match="it stopped while starting"):
        embedded_kafka.start_detached(tmp_path, heap_mb=HEAP_MB)
    assert embedded_kafka.status(tmp_path).state == "stopped"


def test_empty_path_is_reported_with_what_to_install(tmp_path: Path) -> None:
    program = (
        "from fcluster.common.errors import FclusterError\n"
        "from fcluster.kafka.embedded import EmbeddedKafka\n"
        "try:\n"
        f"    EmbeddedKafka({str(tmp_path)!r}).start()\n"
        "except FclusterError as error:\n"
        "    print(error.message)\n"
        "    print(error.remedy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={"PATH": ""},
        check=True,
    )
    message, remedy = done.stdout.decode().splitlines()
    assert "needs Java 17 or newer" in message
    assert "--brokers" in remedy


def test_another_port_is_chosen_if_one_is_taken_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kafka: str
) -> None:
    taken = int(kafka.rpartition(":")[2])
    choose = embedded_kafka._choose_ports
    answers = iter([(taken, choose(tmp_path)[1])])
    monkeypatch.setattr(embedded_kafka, "_choose_ports", lambda directory: next(answers, choose(directory)))
    monkeypatch.setattr(embedded_kafka, "_listens", lambda launch: launch.port != taken)
    with EmbeddedKafka(tmp_path, heap_mb=HEAP_MB) as broker:
        assert broker.start() != kafka


def test_guard_runs_the_broker_on_other_systems_than_linux_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_KERNEL_BINDS", False)
    monkeypatch.setenv(embedded_kafka.JVM_OPTIONS_VARIABLE, "-server -XX:+UseSerialGC")
    with EmbeddedKafka(tmp_path, heap_mb=HEAP_MB) as broker:
        assert embedded_kafka.status(tmp_path).pid == broker.pid
        command = Path(f"/proc/{broker.pid}/cmdline").read_text().split("\0")
    assert {"-server", "-XX:+UseSerialGC"} <= {*command}, "the variable of Kafka's own scripts is heeded"
    assert embedded_kafka.COMPILED_QUICKLY not in command
