"""`fcluster up` reachable from other hosts, and that secrets are visible nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient as KafkaAdmin
from confluent_kafka.admin import NewTopic

from fcluster.common.settings import HANDED_FLAGS, REDACTED, Settings
from fcluster.wire.discovery import read_journal
from fcluster.wire.keys import Keyring, Role
from tests.harness import REPOSITORY, Up, wait_until

JOB = REPOSITORY / "tests/jobs/running_totals.py"
FROM_FLAGS, FROM_FILE, FROM_ENVIRONMENT = "S3cret-from-flags", "S3cret-from-file", "S3cret-from-environment"


@pytest.fixture
def job(kafka: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    source = topic_prefix + "numbers"
    admin = KafkaAdmin({"bootstrap.servers": kafka})
    admin.create_topics([NewTopic(source, 2)])[source].result()
    monkeypatch.setenv("FCLUSTER_TEST_JOB", topic_prefix + "job")
    monkeypatch.setenv("FCLUSTER_TEST_SOURCE", source)
    monkeypatch.setenv("FCLUSTER_TEST_OUTPUT", topic_prefix + "totals")
    return topic_prefix + "job"


def fcluster(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "fcluster", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def running(data_dir: Path) -> dict[str, Any]:
    document = json.loads(fcluster("status", "--json", "--data-dir", str(data_dir)))
    return document if document["phase"] == "running" else {}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    # Settings for TLS, which isn't used here: librdkafka reads them and does nothing.
    config = tmp_path / "fcluster.toml"
    config.write_text(f'[kafka]\nssl.keystore.password = "{FROM_FILE}"\n')
    monkeypatch.setenv("FCLUSTER_KAFKA_SASL_PASSWORD", FROM_ENVIRONMENT)
    return config


def test_up_for_other_hosts_creates_keys_and_its_own_commands_find_them(
    kafka: str, job: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with Up(JOB, kafka, data, "--set", "coordinator.bind=tcp://0.0.0.0:0") as up:
        up.wait_until_it_answers()
        document = wait_until(lambda: running(data), "the worker has joined")
        assert document["settings"]["security.keys.dir"] == str(data / "keys")
        leader = read_journal(Settings(bootstrap_servers=kafka), job)["leader"]
        assert leader["public_key"] == Keyring(data / "keys").pair(Role.COORDINATOR)[0].decode()
        first = (data / "keys" / "worker.key").read_bytes()
        # Without keys, nobody is let in.
        said = fcluster("status", "--brokers", kafka, "--job", job, "--data-dir", str(tmp_path / "x"), code=1)
        assert "requires a key" in said
        fcluster("status", "--brokers", kafka, "--job", job, "--keys", str(data / "keys"))
    with Up(JOB, kafka, data, "--set", "coordinator.bind=tcp://0.0.0.0:0") as up:
        up.wait_until_it_answers()
        assert (data / "keys" / "worker.key").read_bytes() == first


def test_no_secret_is_visible_in_arguments_status_logs_journal_or_notes(
    kafka: str, job: str, tmp_path: Path, secrets: Path
) -> None:
    data = tmp_path / "data"
    more = ("--config", str(secrets), "--set", f"kafka.ssl.key.password={FROM_FLAGS}", "--log-level", "debug")
    with Up(JOB, kafka, data, *more) as up:
        up.wait_until_it_answers()
        document = wait_until(lambda: running(data), "the worker has joined")
        for name in ("coordinator", "worker-0"):
            process = Path("/proc") / str(up.pid(name))
            assert b"S3cret" not in (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes().decode()
            assert FROM_FLAGS in environment
            assert HANDED_FLAGS in environment
            assert (process / "environ").stat().st_mode & 0o077 == 0
        # All three secrets did reach the processes.
        for name in ("kafka.ssl.key.password", "kafka.ssl.keystore.password", "kafka.sasl.password"):
            assert document["settings"][name] == REDACTED
        assert "S3cret" not in json.dumps(document)
        journal = read_journal(Settings(bootstrap_servers=kafka), job)
        assert journal
        assert "S3cret" not in json.dumps(journal)
        for path in data.rglob("*"):
            if path.is_file() and path.suffix in (".log", ".json"):
                assert "S3cret" not in path.read_text(errors="replace"), path
        assert "S3cret" not in "".join(up._said()).replace(FROM_FLAGS + " on the command line", "")


@pytest.mark.parametrize("command", ["coordinator", "worker", "up", "status"])
def test_failed_login_is_reported_without_the_password(
    kafka: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("FCLUSTER_KAFKA_SASL_PASSWORD", FROM_ENVIRONMENT)
    monkeypatch.setenv("FCLUSTER_KAFKA_SASL_USERNAME", "me")
    monkeypatch.setenv("FCLUSTER_KAFKA_SASL_MECHANISM", "PLAIN")
    monkeypatch.setenv("FCLUSTER_KAFKA_SECURITY_PROTOCOL", "sasl_nonsense")
    target = ["--job", job] if command == "status" else [str(JOB)]
    arguments = [
        command,
        *target,
        "--brokers",
        kafka,
        "--data-dir",
        str(tmp_path / "d"),
        "--log-level",
        "debug",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fcluster", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env=os.environ,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "error: " in said
    assert "security.protocol" in said
    assert "S3cret" not in said


def test_broker_without_logins_is_distinguished_from_one_that_is_down(
    kafka: str, job: str, tmp_path: Path
) -> None:
    config = tmp_path / "fcluster.toml"
    config.write_text(
        '[kafka]\nsecurity.protocol = "SASL_PLAINTEXT"\nsasl.mechanism = "PLAIN"\n'
        f'sasl.username = "me"\nsasl.password = "{FROM_FILE}"\n'
    )
    said = fcluster(
        *("status", "--job", job, "--brokers", kafka, "--config", str(config)),
        *("--data-dir", str(tmp_path / "d"), "--log-level", "debug"),
        code=1,
    )
    assert "S3cret" not in said
    assert "error: " in said
