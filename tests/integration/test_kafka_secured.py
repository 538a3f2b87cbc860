"""A job on a broker that requires TLS, a login and ACLs; what is said if one is wrong, and what is not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AclOperation, NewTopic, ResourceType

from fcluster.common.settings import REDACTED
from tests.checker.reading import READ_COMMITTED, READ_UNCOMMITTED, read_topic
from tests.harness import REPOSITORY, Up, wait_until
from tests.secured_kafka import Rule, SecuredKafka

pytestmark = pytest.mark.timeout(300)

JOB_FILE = REPOSITORY / "tests/jobs/running_totals.py"
USER, PASSWORD, WRONG = "flights", "S3cret-of-the-job", "S3cret-but-another"
PLAIN_USER, PLAIN_PASSWORD = "flights-plain", "S3cret-in-plain"
RECORDS = 200
SOON_S = 20.0
"""Some seconds, even on a busy machine. librdkafka alone would try for 60 s or without end."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    directory = tmp_path_factory.mktemp("secured")
    with SecuredKafka(directory, {PLAIN_USER: PLAIN_PASSWORD}) as started:
        started.add_user(USER, PASSWORD)
        yield started


class SecuredJob:
    """A job with its own topics. Its user may do what docs/security.md lists, and nothing else."""

    def __init__(self, broker: SecuredKafka, prefix: str, directory: Path) -> None:
        self.broker = broker
        self.name, self.source, self.output = (prefix + what for what in ("job", "numbers", "totals"))
        self.directory = directory
        topics = [NewTopic(self.source, 2), NewTopic(self.output, 2)]
        for future in broker.admin.create_topics(topics).values():
            future.result(30)
        producer = Producer({"bootstrap.servers": broker.admin_servers})
        for number in range(RECORDS):
            value = json.dumps({"id": number, "seq": number, "value": 1, "at": 0})
            producer.produce(self.source, value, str(number % 10))
        assert producer.flush(30) == 0

    def config(
        self, *, authority: Path | None = None, user: str = USER, mechanism: str = "SCRAM-SHA-512"
    ) -> Path:
        """A settings file without the password."""
        path = self.directory / "fcluster.toml"
        path.write_text(
            "[kafka]\n"
            'security.protocol = "SASL_SSL"\n'
            f'sasl.mechanism = "{mechanism}"\n'
            f'sasl.username = "{user}"\n'
            f'ssl.ca.location = "{authority or self.broker.authority}"\n'
        )
        return path

    def environment(self, password: str) -> dict[str, str]:
        return {
            "FCLUSTER_TEST_JOB": self.name,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
            "FCLUSTER_KAFKA_SASL_PASSWORD": password,
        }

    def allow(self, user: str, *, but: ResourceType | None = None, may_write: bool = True) -> None:
        """Give the user the documented permissions, except for one kind of resource, or for writing
        outputs."""
        rules = documented_acls({"<job>": self.name, "source": self.source, "output": self.output})
        if not may_write:
            seen: Rule = (ResourceType.TOPIC, self.output, False, [AclOperation.READ])
            rules = [seen if rule[1] == self.output else rule for rule in rules]
        self.broker.allow(user, [rule for rule in rules if rule[0] is not but])

    def outputs(self) -> int:
        records = read_topic(self.broker.admin_servers, self.output, READ_COMMITTED, whole)
        return sum(map(len, records.values()))


@pytest.fixture
def job(broker: SecuredKafka, topic_prefix: str, tmp_path: Path) -> SecuredJob:
    return SecuredJob(broker, topic_prefix, tmp_path)


def documented_acls(names: Mapping[str, str]) -> list[Rule]:
    """The table in docs/security.md, filled in for one job."""
    text = (REPOSITORY / "docs/security.md").read_text()
    table = text.partition("| resource | name | pattern | operations |\n")[2].partition("\n\n")[0]
    rules: list[Rule] = []
    for line in table.splitlines()[1:]:
        resource, name, pattern, operations = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        kind = {
            "topic": ResourceType.TOPIC,
            "group": ResourceType.GROUP,
            "transactional id": ResourceType.TRANSACTIONAL_ID,
        }[resource]
        if "source" in name or "output" in name:
            name = names["source" if "source" in name else "output"]
        allowed = [AclOperation[operation.strip().upper()] for operation in operations.split(",")]
        rules.append((kind, name.replace("<job>", names["<job>"]), pattern == "prefixed", allowed))
    assert len(rules) == 5
    return rules


def run(job: SecuredJob, config: Path, password: str, *arguments: str) -> tuple[int, str, float]:
    """Run a command to its end. Returns the exit code, the output, and the seconds that it took."""
    command = [sys.executable, "-m", "fcluster", *arguments, "--brokers", job.broker.servers]
    command += ["--config", str(config), "--data-dir", str(job.directory / "data")]
    began_s = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **job.environment(password)},
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began_s


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_job_runs_over_tls_with_a_login_and_the_acls_of_the_documentation(
    job: SecuredJob, mechanism: str
) -> None:
    user, password = (USER, PASSWORD) if mechanism != "PLAIN" else (PLAIN_USER, PLAIN_PASSWORD)
    job.allow(user)
    config = job.config(user=user, mechanism=mechanism)
    code, said, _ = run(job, config, password, "up", str(JOB_FILE), "--until-caught-up", "--workers", "2")
    assert code == 0, said
    assert job.outputs() == RECORDS
    assert password not in said


def test_password_is_visible_nowhere_while_the_job_runs(job: SecuredJob) -> None:
    job.allow(USER)
    data = job.directory / "data"
    more = ("--config", str(job.config()), "--log-level", "debug", "--set", "snapshot.interval.ms=200")
    environment = job.environment(PASSWORD)
    with Up(JOB_FILE, job.broker.servers, data, *more, workers=2, env=environment) as up:
        up.wait_until(lambda: job.outputs() == RECORDS, "all records are processed")
        up.wait_until(lambda: any((data / "snapshots").rglob("*.json")), "a snapshot is taken")
        document = status(job)
        assert document["settings"]["kafka.sasl.password"] == REDACTED
        assert document["settings"]["kafka.sasl.username"] == USER
        assert PASSWORD not in json.dumps(document)
        pids = [up.pid(name) for name in ("coordinator", "worker-0", "worker-1")]
        for pid in pids:
            # The password is in the environment, which only its owner can read.
            assert PASSWORD in Path(f"/proc/{pid}/environ").read_text(errors="replace")
            assert Path(f"/proc/{pid}/environ").stat().st_mode & 0o077 == 0
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            assert PASSWORD not in read_if_there(command), command
        for topic in sorted(job.broker.admin.list_topics(timeout=15).topics):
            if topic.startswith(job.name):
                for records in read_topic(job.broker.admin_servers, topic, READ_UNCOMMITTED, whole).values():
                    assert not any(PASSWORD.encode() in record for record in records), topic
        up.interrupt()
        said = up.wait(60).text
    assert PASSWORD not in said
    files = [path for path in data.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert any("snapshots" in path.parts for path in files)
    for path in files:
        assert PASSWORD.encode() not in path.read_bytes(), path


WRONG_LOGIN = r"accepts this client: .*Authentication failed[\s\S]*remedy: .*FCLUSTER_KAFKA_SASL_PASSWORD"
WRONG_AUTHORITY = r"accepts this client: .*certificate verify failed[\s\S]*remedy: .*ssl\.ca\.location"


@pytest.mark.parametrize("what", ["password", "authority"])
def test_wrong_password_or_authority_ends_commands_with_what_to_correct(job: SecuredJob, what: str) -> None:
    job.allow(USER)
    wrong_authority = what == "authority"
    config = job.config(authority=job.broker.stranger if wrong_authority else None)
    password, expected = (PASSWORD, WRONG_AUTHORITY) if wrong_authority else (WRONG, WRONG_LOGIN)
    for command in (
        ("up", str(JOB_FILE)),
        ("coordinator", str(JOB_FILE)),
        ("status", "--job", job.name),
        ("consume", job.output, "--max", "1"),
    ):
        code, said, seconds = run(job, config, password, *command)
        assert code != 0
        assert re.search(expected, said), said
        assert "Traceback" not in said
        assert password not in said
        assert seconds < SOON_S, said


@pytest.mark.parametrize("what", ["password", "authority"])
def test_worker_with_a_wrong_password_or_authority_logs_what_to_correct_and_ends_when_told(
    job: SecuredJob, what: str
) -> None:
    wrong_authority = what == "authority"
    config = job.config(authority=job.broker.stranger if wrong_authority else None)
    log = job.directory / "worker.log"
    command = [sys.executable, "-m", "fcluster", "worker", str(JOB_FILE), "--brokers", job.broker.servers]
    command += ["--config", str(config), "--data-dir", str(job.directory / "data")]
    environment = {**os.environ, **job.environment(PASSWORD if wrong_authority else WRONG)}
    hint = "ssl.ca.location" if wrong_authority else "FCLUSTER_KAFKA_SASL_PASSWORD"
    with log.open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment)
        try:
            wait_until(lambda: hint in log.read_text(), "the worker says so", SOON_S)
            assert worker.poll() is None
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
        finally:
            worker.kill()
            worker.wait()
    said = log.read_text()
    assert WRONG not in said
    assert PASSWORD not in said
    assert said.count("can't be read") <= 2, "it is logged once, not at each attempt"


@pytest.mark.parametrize("missing", [ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID])
def test_missing_acl_is_reported(job: SecuredJob, missing: ResourceType) -> None:
    """Each permission in the table is needed."""
    job.allow(USER, but=missing)
    code, said, seconds = run(job, job.config(), PASSWORD, "coordinator", str(JOB_FILE))
    assert code != 0
    assert re.search(r"(?i)authorization", said), said
    assert "ACL" in said
    assert seconds < 60


def test_output_that_may_not_be_written_stops_the_job_with_its_topic_and_what_to_allow(
    job: SecuredJob,
) -> None:
    job.allow(USER, may_write=False)
    code, said, seconds = run(job, job.config(), PASSWORD, "up", str(JOB_FILE), "--until-caught-up")
    assert code != 0
    assert "Kafka refuses what the job writes" in said
    assert f"remedy: Let the job's Kafka user write to {job.output}" in said
    assert seconds < 60


def test_check_finds_nothing_wrong_with_the_acls_of_the_documentation(job: SecuredJob) -> None:
    job.allow(USER)
    code, said, _ = run(job, job.config(), PASSWORD, "check", str(JOB_FILE))
    assert code == 0, said
    assert "ok       this Kafka user may do what the job does" in said
    assert f"'{job.name}-journal' will be created" in said


def test_check_names_the_right_that_lacks(job: SecuredJob) -> None:
    job.allow(USER, may_write=False)
    code, said, _ = run(job, job.config(), PASSWORD, "check", str(JOB_FILE))
    assert code == 1, said
    assert f"error    this Kafka user lacks the right Write on the output topic '{job.output}'" in said
    assert "1 error" in said.splitlines()[-1]


def test_check_finds_that_the_group_may_not_be_used(job: SecuredJob) -> None:
    job.allow(USER, but=ResourceType.GROUP)
    code, said, seconds = run(job, job.config(), PASSWORD, "check", str(JOB_FILE))
    assert code == 1, said
    assert (
        f"error    A request to Kafka failed (reading the committed offsets of the group '{job.name}')"
        in said
    )
    assert "GROUP_AUTHORIZATION_FAILED" in said
    assert "docs/security.md lists the ACLs" in said
    assert seconds < 60
    assert "no state yet" not in said


def status(job: SecuredJob) -> dict[str, Any]:
    code, said, _ = run(job, job.config(), PASSWORD, "status", "--json", "--job", job.name)
    assert code == 0, said
    document: dict[str, Any] = json.loads(said)
    return document


def whole(message: Any) -> bytes:
    return (message.key() or b"") + b"\n" + (message.value() or b"")


def read_if_there(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
