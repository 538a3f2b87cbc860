"""Bad input to `fcluster up`: the message names cause and remedy, and the exit code isn't 0."""

from __future__ import annotations

import base64
import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Message, Producer, TopicPartition
from confluent_kafka.admin import NewPartitions

from tests.checker.generate import PARTITIONER, create_topic, delete_topic
from tests.checker.reading import READ_COMMITTED, admin_of, committed_offsets, read_topic
from tests.harness import Ended, Up, processes_with

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


class Place:
    """A job file with its own names, and commands that run it."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job = f"{prefix}job"
        self.source = f"{prefix}in"
        self.output = f"{prefix}out"
        self.directory = directory
        self.data_dir = directory / "data"

    def write_job(self, text: str = COUNTING_JOB, *, on_error: str = '"stop"', name: str = "job.py") -> Path:
        """Write a job file with the names filled in."""
        path = self.directory / name
        path.write_text(text.format(job=self.job, source=self.source, output=self.output, on_error=on_error))
        return path

    def up(self, target: Path | str, *more: str, brokers: str | None = None, workers: int = 2) -> Ended:
        """Run `fcluster up TARGET --until-caught-up` to its end."""
        with self.start(target, "--until-caught-up", *more, brokers=brokers, workers=workers) as up:
            ended = up.wait(UP_TIMEOUT_S)
        assert not processes_with(str(self.data_dir)), "processes are left"
        return ended

    def start(self, target: Path | str, *more: str, brokers: str | None = None, workers: int = 1) -> Up:
        """`fcluster up TARGET`, to be used in a `with` block."""
        return Up(target, brokers or self.brokers, self.data_dir, *more, workers=workers)

    def produce(self, values: Iterable[bytes], keys: Iterable[str] = itertools.repeat("k")) -> None:
        """Write values to partition 0 of the source."""
        producer = Producer({"bootstrap.servers": self.brokers, "partitioner": PARTITIONER})
        for key, value in zip(keys, values, strict=False):
            producer.produce(self.source, value, key, partition=0)
        assert producer.flush(30) == 0

    def outputs(self, topic: str | None = None) -> list[bytes | None]:
        """The committed output."""
        parts = read_topic(
            self.brokers, topic or self.output, READ_COMMITTED, lambda message: message.value()
        )
        return [value for partition in sorted(parts) for value in parts[partition]]

    def counts(self) -> list[int]:
        """The running counts in the committed output of the counting job."""
        return [orjson.loads(value or b"")["n"] for value in self.outputs()]

    def delete_before(self, offset: int) -> None:
        """Delete the records before `offset` from the source's partition 0, as retention would."""
        at = TopicPartition(self.source, 0, offset)
        admin_of(self.brokers).delete_records([at])[at].result(30)

    def committed(self) -> int:
        """The committed offset of the source's partition 0."""
        return committed_offsets(self.brokers, self.job).get((self.source, 0), 0)


@pytest.fixture
def place(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(kafka, topic_prefix, tmp_path)
    yield place
    assert not processes_with(str(tmp_path)), "processes are left"


@pytest.fixture
def source(place: Place) -> str:
    create_topic(place.brokers, place.source, 2)
    return place.source


def numbers(*values: int) -> list[bytes]:
    return [orjson.dumps({"value": value}) for value in values]


def assert_refused(ended: Ended, *parts: str) -> None:
    """Check that the command failed and named cause and remedy, without a traceback of fcluster's own
    code."""
    print(ended.text)
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


def test_misspelled_setting_suggests_the_right_one(place: Place, source: str) -> None:
    ended = place.up(place.write_job(), "--set", "comit.interval.ms=50")
    assert_refused(ended, "comit.interval.ms", "commit.interval.ms")


@pytest.mark.parametrize(
    ("bad", "cause", "remedy"),
    [
        (b"{not json", "can't be decoded", "on_error=...)"),
        (b'{"value": 0}', "ZeroDivisionError", "Correct the job, or give the step an on_error"),
    ],
)
def test_bad_record_stops_the_job_and_nothing_after_it_is_committed(
    place: Place, source: str, bad: bytes, cause: str, remedy: str
) -> None:
    place.produce([*numbers(1, 2, 3), bad, *numbers(4, 5)])
    ended = place.up(place.write_job())
    assert_refused(ended, place.source, cause, remedy)
    assert "offset 3" in ended.text
    assert place.committed() == 3
    assert place.counts() == [1, 2, 3]
    # Nothing is lost: with a new on_error, the job continues at that record.
    ended = place.up(place.write_job(on_error='"skip"'))
    assert ended.code == 0, ended.text
    assert place.committed() == 6
    assert place.counts() == [1, 2, 3, 4, 5]


def test_bad_record_is_skipped_if_the_job_says_so(place: Place, source: str) -> None:
    place.produce([*numbers(1, 2), b"{not json", b'{"value": 0}', *numbers(4)])
    ended = place.up(place.write_job(on_error='"skip"'))
    assert ended.code == 0, ended.text
    assert place.committed() == 5
    assert place.counts() == [1, 2, 3], "a failing handler's changes to state are undone"


def test_dead_letters_of_all_workers_together_stop_the_job(place: Place, source: str) -> None:
    producer = Producer({"bootstrap.servers": place.brokers})
    for partition in (0, 1):
        for value in numbers(1, 0, 0, 0, 2):
            producer.produce(source, value, f"k{partition}", partition=partition)
    assert producer.flush(30) == 0
    job = place.write_job(on_error="dead")
    ended = place.up(job, "--set", "dead.letters.max=3", "--set", "initial.rebalance.delay.ms=5000")
    assert_refused(
        ended, f"'{place.output}-dead' since the job has started", "dead.letters.max", "ZeroDivision"
    )
    written = len(place.outputs(f"{place.output}-dead"))
    assert 3 <= written <= 6
    ended = place.up(job, "--set", "dead.letters.max=6")
    assert ended.code == 0, ended.text
    assert len(place.outputs(f"{place.output}-dead")) == 6, "it goes on where it was, and counts anew"


def test_bad_records_go_to_the_dead_letter_topic_with_their_errors(place: Place, source: str) -> None:
    place.produce([*numbers(1), b"{not json", *numbers(2, 0, 4)])
    ended = place.up(place.write_job(on_error="dead"))
    assert ended.code == 0, ended.text
    assert place.committed() == 5
    assert place.counts() == [1, 2, 3]

    def row(message: Message) -> tuple[object, ...]:
        headers = {name: (value or b"").decode() for name, value in message.headers() or []}
        return message.value(), message.key(), headers

    rows = read_topic(place.brokers, f"{place.output}-dead", READ_COMMITTED, row)
    (_, _, undecodable), (_, _, failing) = dead = [row for part in rows.values() for row in part]
    assert [(value, key) for value, key, _ in dead] == [(b"{not json", b"k"), (b'{"value":0}', b"k")]
    for headers, offset in ((undecodable, "1"), (failing, "3")):
        assert headers["fcluster.topic"] == source
        assert (headers["fcluster.partition"], headers["fcluster.offset"]) == ("0", offset)
        assert headers["fcluster.handler"] == "count"
    assert "JSONDecodeError" in undecodable["fcluster.error"]
    assert failing["fcluster.error"] == "ZeroDivisionError: division by zero"


def test_more_partitions_than_at_the_last_run_are_refused(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    admin_of(place.brokers).create_partitions([NewPartitions(source, 4)])[source].result(30)
    assert_refused(place.up(path), source, "partition")
    assert place.committed() == 3


def test_records_deleted_before_they_were_processed_are_named_as_a_gap(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    place.produce(numbers(4, 5, 6, 7))
    place.delete_before(6)
    gap = (f"3 to 5 of {source}/0", "were deleted before they were processed")
    assert_refused(place.up(path), *gap, "source.gap=continue")
    assert place.committed() == 3
    assert place.up(path, "--set", "source.gap=continue").code == 0
    assert place.committed() == 7
    assert place.counts() == [1, 2, 3, 4]


@pytest.mark.parametrize("gap", ["fail", "continue"])
def test_records_deleted_under_a_running_job_are_reported_as_a_gap(
    place: Place, source: str, gap: str
) -> None:
    place.produce(numbers(1, 2, 3))
    with place.start(place.write_job(), "--set", f"source.gap={gap}") as up:
        up.wait_until(lambda: place.committed() == 3, "the first records' commit")
        worker = up.pid("worker-0")
        os.kill(worker, signal.SIGSTOP)
        time.sleep(1.0)  # its last fetch waits at the broker for up to half a second
        place.produce(numbers(4, 5, 6, 7))
        place.delete_before(6)
        os.kill(worker, signal.SIGCONT)
        if gap == "fail":
            assert_refused(up.wait(UP_TIMEOUT_S), f"3 to 5 of {source}/0", "source.gap=continue")
            assert place.committed() == 3
        else:
            up.wait_until(lambda: place.committed() == 7, "the last record's commit")
            assert place.counts() == [1, 2, 3, 4]


def test_topic_that_was_deleted_and_created_again_is_recognised_as_another_one(
    place: Place, source: str
) -> None:
    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    delete_topic(place.brokers, source)  # the broker deletes the group's offsets with it
    create_topic(place.brokers, source, 2)
    place.produce(numbers(4, 5))
    assert_refused(place.up(path), repr(source), "deleted and created again", "fcluster reset")
    assert place.counts() == [1, 2, 3]


def test_source_that_ends_before_the_committed_offset_is_refused(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    path = place.write_job()
    assert place.up(path).code == 0
    move_committed_offset(place, 3, 5)
    assert_refused(place.up(path), f"{source}/0", "offset 5", "ends at 3")
    assert place.counts() == [1, 2, 3]


def move_committed_offset(place: Place, former: int, offset: int) -> None:
    """Set another offset, with the epoch that was committed with the former one."""
    admin = admin_of(place.brokers)
    group = ConsumerGroupTopicPartitions(place.job)
    found = admin.list_consumer_group_offsets([group])[place.job].result(30).topic_partitions
    (at,) = (at for at in found if (at.topic, at.partition) == (place.source, 0))
    assert at.offset == former
    moved = [TopicPartition(at.topic, at.partition, offset, metadata=at.metadata)]
    altered = admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(place.job, moved)])
    altered[place.job].result(30)


def test_state_of_an_incompatible_topology_is_refused(place: Place, source: str) -> None:
    place.produce(numbers(1, 2, 3))
    assert place.up(place.write_job()).code == 0
    other = COUNTING_JOB.replace("def count(", "def counted(")
    place.produce(numbers(4))
    assert_refused(place.up(place.write_job(other)), "'count'", "'counted'", "another name")
    assert place.committed() == 3


def test_second_cluster_of_the_same_job_is_refused(place: Place, source: str) -> None:
    path = place.write_job()
    with place.start(path) as up:
        up.wait_until_it_answers()
        beside = Place(place.brokers, "", place.directory)
        beside.data_dir = place.directory / "beside"
        assert_refused(beside.up(path), place.job, "already runs")
        assert up.poll() is None


def test_data_directory_in_use_is_refused(place: Place, source: str) -> None:
    path = place.write_job()
    with place.start(path) as up:
        up.wait_until_it_answers()
        with place.start(path) as second:
            assert_refused(second.wait(UP_TIMEOUT_S), str(place.data_dir), "in use")
        assert up.poll() is None


# --- disk full ------------------------------------------------------------------------------------------

KEEPING_JOB = """
from fcluster import Job

job = Job("{job}")

@job.process(job.topic("{source}"), to=job.topic("{output}"))
def keep(ctx, record):
    ctx.state["kept"] = record["filler"]
    return {{"value": record["value"]}}
"""
SMALL_DISK_BYTES = 6_000_000
"""Less than RocksDB's write buffer, so the first flush fills the disk."""
DISK_FULL_RECORDS_MAX = 50_000
"""200 MB: the job has to end before that."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on its own file system of SMALL_DISK_BYTES. Mounting it needs root."""
    directory = tmp_path / "small-disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("disk full: not tested, there is no mount command here")
    if mounted.returncode != 0:
        pytest.skip(f"disk full: not tested, no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True, timeout=30)


def test_disk_that_becomes_full_ends_the_job_and_nothing_is_lost(place: Place, small_disk: Path) -> None:
    create_topic(place.brokers, place.source, 1)
    place.data_dir = small_disk / "data"
    path = place.write_job(KEEPING_JOB)
    draw = random.Random(1)
    written = 0
    with place.start(path) as up:
        while up.poll() is None and written < DISK_FULL_RECORDS_MAX:
            fillers = [base64.b64encode(draw.randbytes(3000)).decode() for _ in range(300)]
            values = (
                orjson.dumps({"value": number, "filler": filler})
                for number, filler in enumerate(fillers, start=written)
            )
            place.produce(values, map(str, itertools.count(written)))
            written += len(fillers)
            time.sleep(0.05)  # a steady stream: the disk is full long before the limit on records
        ended = up.wait(30)
    assert_refused(ended, str(small_disk), "full", "state.dir")
    committed = place.committed()
    assert 0 < committed < written
    assert len(place.outputs()) == committed
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True, timeout=30)
    ended = place.up(path, workers=1)
    assert ended.code == 0, ended.text
    assert place.committed() == written
    assert [orjson.loads(value or b"")["value"] for value in place.outputs()] == list(range(written))


def fill(path: Path) -> None:
    """Write to a file until that fails."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_disk_that_is_full_from_the_start_is_named(place: Place, source: str, small_disk: Path) -> None:
    place.data_dir = small_disk / "data"
    place.produce(numbers(1))
    with pytest.raises(OSError, match="No space left"):
        fill(small_disk / "filler")
    assert_refused(place.up(place.write_job()), str(small_disk), "full")
    assert place.committed() == 0
