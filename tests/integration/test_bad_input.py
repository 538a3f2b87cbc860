"""Bad input end to end through `fcluster up`: the message names cause and remedy, the exit code isn't 0."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import NewPartitions

from tests.checker.generate import PARTITIONER, create_topic
from tests.checker.reading import READ_COMMITTED, admin_of, committed_offsets, read_topic
from tests.harness import REPOSITORY, processes_with

pytestmark = pytest.mark.timeout(180)
UP_TIMEOUT_S = 60

COUNTING_JOB = """
from fcluster import Job

job = Job("{job}")
source = job.topic("{source}")
output = job.topic("{output}")
dead = job.topic("{output}-dead", value="bytes")

@job.process(source, to=output, on_error={on_error})
def count(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"key": ctx.key, "n": ctx.state["n"], "inverse": 1 / record["value"]}}
"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """All it said."""
        return self.stdout + self.stderr


class Place:
    """A job file with names of its own, and the command to run it."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.source = f"{prefix}in"
        self.output = f"{prefix}out"
        self.directory = directory
        self.data_dir = directory / "data"

    def write_job(self, text: str = COUNTING_JOB, *, on_error: str = '"stop"', name: str = "job.py") -> Path:
        """Write a job file; the names are filled in."""
        path = self.directory / name
        path.write_text(text.format(job=self.job, source=self.source, output=self.output, on_error=on_error))
        return path

    def up(
        self, target: Path | str, *more: str, brokers: str | None = None, data_dir: Path | None = None
    ) -> Ended:
        """`fcluster up TARGET --until-caught-up`, to its end."""
        command = [sys.executable, "-m", "fcluster", "up", str(target), "--workers", "2", "--until-caught-up"]
        command += ["--brokers", brokers or self.brokers, "--data-dir", str(data_dir or self.data_dir), *more]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=UP_TIMEOUT_S,
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert not processes_with(str(self.data_dir)), "processes are left behind"
        return Ended(done.returncode, done.stdout, done.stderr)

    def produce(self, values: list[bytes], key: str = "k") -> None:
        """Write values to partition 0 of the source."""
        producer = Producer({"bootstrap.servers": self.brokers, "partitioner": PARTITIONER})
        for value in values:
            producer.produce(self.source, value, key, partition=0)
        assert producer.flush(30) == 0

    def outputs(self, topic: str | None = None) -> list[bytes | None]:
        """The committed output."""
        parts = read_topic(
            self.brokers, topic or self.output, READ_COMMITTED, lambda message: message.value()
        )
        return [value for partition in sorted(parts) for value in parts[partition]]

    def committed(self) -> int:
        """The committed offset of the source's partition 0."""
        return committed_offsets(self.brokers, self.job).get((self.source, 0), 0)


@pytest.fixture
def place(kafka: str, topic_prefix: str, tmp_path: Path) -> Place:
    return Place(kafka, topic_prefix, tmp_path)


@pytest.fixture
def source(place: Place) -> str:
    create_topic(place.brokers, place.source, 2)
    return place.source


def numbers(*values: int) -> list[bytes]:
    return [orjson.dumps({"value": value}) for value in values]


def assert_refused(ended: Ended, *parts: str) -> None:
    """Not 0, cause and remedy named, no traceback of ours."""
    assert ended.code not in (0, 70), ended.text
    for part in parts:
        assert part in ended.text, ended.text
    assert "error: " in ended.stderr
    assert "remedy: " in ended.stderr


def test_job_file_missing_is_named(place: Place) -> None:
    assert_refused(place.up(place.directory / "nowhere.py"), "nowhere.py")


def test_job_file_not_importable_shows_the_line(place: Place) -> None:
    path = place.write_job("import json\n1 / 0\n")
    assert_refused(place.up(path), "job.py", "ZeroDivisionError")


def test_file_without_a_job_is_refused(place: Place) -> None:
    assert_refused(place.up(place.write_job("number = 1\n")), "job.py", "job")


def test_file_with_two_jobs_is_refused(place: Place) -> None:
    text = "from fcluster import Job\nfirst = Job('a')\nsecond = Job('b')\n"
    assert_refused(place.up(place.write_job(text)), "first", "second")


def test_source_topic_missing_is_named(place: Place) -> None:
    assert_refused(place.up(place.write_job()), place.source)


def test_brokers_unreachable_are_named(place: Place) -> None:
    assert_refused(place.up(place.write_job(), brokers="127.0.0.1:9"), "127.0.0.1:9")


def test_misspelled_setting_offers_the_near_one(place: Place, source: str) -> None:
    ended = place.up(place.write_job(), "--set", "comit.interval.ms=50")
    assert_refused(ended, "comit.interval.ms", "commit.interval.ms")


@pytest.mark.parametrize(
    ("bad", "cause"), [(b"{not json", "can't be decoded"), (b'{"value": 0}', "ZeroDivisionError")]
)
def test_bad_record_stops_the_job_there_and_commits_nothing_beyond(
    place: Place, source: str, bad: bytes, cause: str
) -> None:
    place.produce([*numbers(1, 2, 3), bad, *numbers(4, 5)])
    ended = place.up(place.write_job())
    assert_refused(ended, place.source, cause)
    assert "offset 3" in ended.text
    assert place.committed() <= 3
    assert len(place.outputs()) == place.committed()


def test_bad_record_is_skipped_where_the_job_says_so(place: Place, source: str) -> None:
    place.produce([*numbers(1, 2), b"{not json", b'{"value": 0}', *numbers(4)])
    ended = place.up(place.write_job(on_error='"skip"'))
    assert ended.code == 0, ended.text
    assert place.committed() == 5
    counts = [orjson.loads(value or b"")["n"] for value in place.outputs()]
    assert counts == [1, 2, 3], "a failing handler's changes to state are undone"


def test_bad_record_goes_to_the_dead_letter_topic(place: Place, source: str) -> None:
    place.produce([*numbers(1), b"{not json", *numbers(2)])
    ended = place.up(place.write_job(on_error="dead"))
    assert ended.code == 0, ended.text
    assert place.outputs(f"{place.output}-dead") == [b"{not json"]
    assert len(place.outputs()) == 2


def test_more_partitions_than_at_the_last_run_are_refused(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    admin_of(place.brokers).create_partitions([NewPartitions(source, 4)])[source].result(30)
    assert_refused(place.up(path), source, "partition")
    assert place.committed() == 3


def test_records_deleted_before_they_were_processed_are_named_as_a_gap(place: Place, source: str) -> None:
    from confluent_kafka import TopicPartition

    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    place.produce(numbers(4, 5, 6, 7))
    admin_of(place.brokers).delete_records([TopicPartition(source, 0, 6)])[TopicPartition(source, 0)].result(
        30
    )
    ended = place.up(path)
    assert_refused(ended, source, "3", "6", "source.gap")
    assert place.committed() == 3
    assert place.up(path, "--set", "source.gap=continue").code == 0
    assert place.committed() == 7
    assert len(place.outputs()) == 4


def test_state_of_an_incompatible_topology_is_refused(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    assert place.up(place.write_job()).code == 0
    other = COUNTING_JOB.replace("def count(", "def counted(")
    place.produce(numbers(4))
    assert_refused(place.up(place.write_job(other)), place.job)
    assert place.committed() == 3


def test_second_cluster_of_the_same_job_is_refused(place: Place, source: str) -> None:
    path = place.write_job()
    with running_up(place, path):
        ended = place_beside(place, path)
        assert_refused(ended, place.job)


def test_data_directory_in_use_is_refused(place: Place, source: str) -> None:
    path = place.write_job()
    with running_up(place, path):
        command = [sys.executable, "-m", "fcluster", "up", str(path), "--brokers", place.brokers]
        done = subprocess.run(
            [*command, "--data-dir", str(place.data_dir)],
            capture_output=True,
            text=True,
            timeout=UP_TIMEOUT_S,
            cwd=REPOSITORY,
        )
        assert_refused(Ended(done.returncode, done.stdout, done.stderr), str(place.data_dir), "in use")


def place_beside(place: Place, path: Path) -> Ended:
    """`fcluster up` of the same job with another data directory."""
    beside = Place(place.brokers, "", place.directory)
    beside.data_dir = place.directory / "beside"
    return beside.up(path)


class running_up:  # noqa: N801
    """`fcluster up` in the background until its job answers `fcluster status`."""

    def __init__(self, place: Place, path: Path) -> None:
        self._place = place
        self._command = [sys.executable, "-m", "fcluster", "up", str(path), "--workers", "1"]
        self._command += ["--brokers", place.brokers, "--data-dir", str(place.data_dir)]

    def __enter__(self) -> None:
        from tests.harness import wait_until

        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY
        )
        wait_until(self._answers, "fcluster up answers", 30, 0.3)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        assert self._process.poll() is None, "fcluster up ended"
        status = [
            sys.executable,
            "-m",
            "fcluster",
            "status",
            "--json",
            "--data-dir",
            str(self._place.data_dir),
        ]
        return subprocess.run(status, capture_output=True, timeout=20, cwd=REPOSITORY).returncode == 0
