"""Topics and offsets that change under a job: nothing is skipped silently, and each change is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import NewPartitions, NewTopic

from fcluster.api.loader import load_job
from fcluster.cli.reset import carry_out, plan_reset
from fcluster.common import failpoints
from fcluster.common.offset_targets import Target
from fcluster.common.positions import decode_position
from fcluster.common.settings import resolve
from fcluster.coordinator.checks import RESETTING_KEY
from fcluster.wire.discovery import read_journal
from tests.checker.generate import PARTITIONER, create_topic, delete_topic
from tests.checker.reading import (
    READ_COMMITTED,
    admin_of,
    committed_positions,
    new_consumer,
    partitions_of,
    read_topic,
    topics_with_prefix,
)
from tests.harness import REPOSITORY, Ended, Up, processes_with, wait_until, wait_until_equal

pytestmark = pytest.mark.timeout(300)

JOB = """
from fcluster import Job

job = Job("{prefix}job")
source = job.topic("{prefix}in")
output = job.topic("{prefix}out")
grouped = job.topic("{prefix}grouped")

@job.process(source, to=output)
def count(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"id": record["id"], "n": ctx.state["n"]}}

def by_group(ctx, record):
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return {{"id": record["id"], "n": ctx.state["n"]}}

job.stream(source).key_by("group").process(by_group, to=grouped)
"""
RELAY = """
from fcluster import Job

job = Job("{prefix}job")
source = job.topic("{prefix}in")
output = job.topic("{prefix}out")
job.stream(source).map(lambda record: {{"id": record["id"], "mapped": True}}).to(output)
"""
QUICK = ("--set", "initial.rebalance.delay.ms=0", "--plain")


class Place:
    """A job with state on both sides of a repartition, and commands for it."""

    def __init__(self, brokers: str, prefix: str, directory: Path, text: str = JOB) -> None:
        self.brokers, self.prefix = brokers, prefix
        self.job, self.source, self.output = f"{prefix}job", f"{prefix}in", f"{prefix}out"
        self.data_dir = directory / "data"
        self.file = directory / "job.py"
        self.file.write_text(text.format(prefix=prefix))

    def start(self, *more: str) -> Up:
        return Up(self.file, self.brokers, self.data_dir, *QUICK, *more)

    def run(self, *more: str) -> Ended:
        """Run `fcluster up --until-caught-up` to its end."""
        with self.start("--until-caught-up", *more) as up:
            return up.wait(90)

    def reset(self, *arguments: str) -> Ended:
        command = [sys.executable, "-m", "fcluster", "reset", str(self.file), *arguments]
        command += ["--brokers", self.brokers]
        if "--data-dir" not in arguments:
            command += ["--data-dir", str(self.data_dir)]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "fcluster", "status", "--json", "--data-dir", str(self.data_dir)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def produce(self, ids: Iterable[int], topic: str = "", partition: int = 0) -> None:
        producer = Producer({"bootstrap.servers": self.brokers, "partitioner": PARTITIONER})
        for number in ids:
            value = json.dumps({"id": number, "group": f"g{number % 3}"})
            producer.produce(topic or self.source, value, "k", partition=partition)
        assert producer.flush(30) == 0

    def outputs(self, topic: str = "") -> list[tuple[int, int]]:
        """Id and count of each committed output. Partition 0 comes first."""
        if not topics_with_prefix(self.brokers, topic or self.output):
            return []
        parts = read_topic(
            self.brokers, topic or self.output, READ_COMMITTED, lambda message: message.value()
        )
        values = [json.loads(value or b"{}") for partition in sorted(parts) for value in parts[partition]]
        return [(value["id"], value.get("n", 0)) for value in values]

    def position(self, partition: int = 0) -> Any:
        offset, metadata = committed_positions(self.brokers, self.job)[self.source, partition]
        return decode_position(offset, metadata)

    def commit_as_somebody_else(self, offset: int) -> None:
        consumer = new_consumer(self.brokers, READ_COMMITTED, **{"group.id": self.job})
        consumer.commit(offsets=[TopicPartition(self.source, 0, offset)], asynchronous=False)
        consumer.close()


@pytest.fixture
def place(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(kafka, topic_prefix, tmp_path)
    yield place
    assert not processes_with(str(tmp_path)), "processes are left"


def assert_refused(ended: Ended, *parts: str) -> None:
    print(ended.text)
    assert ended.code not in (0, 70), ended.text
    for part in parts:
        assert part in ended.text, ended.text


def test_offsets_set_by_another_program_are_reported_and_a_killed_reset_can_be_run_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(place.brokers, place.source, 2)
    place.produce(range(5))
    with place.start("--set", "snapshot.interval.ms=200") as up:
        up.wait_until(lambda: len(place.outputs()) == 5, "all is counted")
        up.wait_until(lambda: list(place.data_dir.glob("snapshots/*/*/*/manifests/*")), "a snapshot is there")
        up.interrupt()
        assert up.wait(60).code == 0
    assert place.outputs() == [(number, number + 1) for number in range(5)]
    before = topics_with_prefix(place.brokers, place.prefix)

    place.commit_as_somebody_else(0)
    assert_refused(place.run(), f"{place.source}/0", "fcluster did not commit", "fcluster reset")

    dry = place.reset("--to", "earliest", "--dry-run")
    print(dry.text)
    assert dry.code == 0
    assert f"{place.source}/0: 0 (not committed by fcluster) -> 0, of 5" in dry.stdout
    for gone in (
        "changelog",
        "repartition",
        str(place.data_dir / "state"),
        str(place.data_dir / "snapshots"),
    ):
        assert gone in dry.stdout
    assert topics_with_prefix(place.brokers, place.prefix) == before
    assert_refused(place.reset("--to", "earliest"), "--yes")

    settings = resolve({}, None, {}, {"brokers": place.brokers, "state.dir": str(place.data_dir)})
    topology = load_job(str(place.file)).build(settings)

    def do_reset() -> None:
        plan = plan_reset(settings, topology, Target("earliest"), keep_state=False)
        carry_out(plan, settings, topology, print)

    for point in [name for name in failpoints.POINTS if name.startswith("reset.")]:

        def die_there(name: str, _detail: object = "", *, point: str = point) -> None:
            if name == point:
                raise KeyboardInterrupt(point)

        with monkeypatch.context() as patched:
            patched.setattr(failpoints, "reach", die_there)
            with pytest.raises(KeyboardInterrupt, match=point):
                do_reset()
        assert RESETTING_KEY in read_journal(settings, place.job)
    assert_refused(place.run(), "started and then interrupted", "Run it again")
    assert place.reset("--to", "earliest", "--yes").code == 0
    assert read_journal(settings, place.job).get(RESETTING_KEY) is None
    assert not (place.data_dir / "state" / place.job).exists()

    assert place.run().code == 0
    assert place.outputs() == [(number, number + 1) for number in [*range(5)]] * 2
    assert sorted(place.outputs(f"{place.prefix}grouped")) == sorted(
        [(number, number // 3 + 1) for number in range(5)] * 2
    )

    # The reset only removes offsets. The state is kept, whoever committed the offsets last.
    place.commit_as_somebody_else(1)
    assert (
        place.reset(
            "--to", f"{place.source}/0=3", "--to", f"{place.source}/1=0", "--keep-state", "--yes"
        ).code
        == 0
    )
    assert place.run().code == 0
    assert place.outputs()[10:] == [(3, 6), (4, 7)]
    # After a reset to the end, old records aren't read again, and new ones are counted from 1.
    assert place.reset("--to", "latest", "--yes").code == 0
    place.produce([5])
    assert place.run().code == 0
    assert place.outputs()[12:] == [(5, 1)]


def test_source_recreated_while_the_job_is_down_stops_it_with_a_choice(place: Place) -> None:
    create_topic(place.brokers, place.source, 1)
    place.produce(range(50))
    assert place.run().code == 0
    former = place.position().topic_id
    assert former
    delete_topic(place.brokers, place.source)
    create_topic(place.brokers, place.source, 1)
    place.produce(range(1000, 1080))

    ended = place.run()
    assert_refused(
        ended, repr(place.source), former, "deleted and created again", "fcluster reset", "--keep-state"
    )
    assert len(place.outputs()) == 50
    assert place.reset("--to", "earliest", "--keep-state", "--yes").code == 0
    assert place.run().code == 0
    assert place.outputs()[50:] == [(1000 + number, 51 + number) for number in range(80)]
    assert place.position().topic_id not in ("", former)


def recreate(brokers: str, topic: str) -> None:
    """Delete the topic and create it again at once, as a script would."""
    admin = admin_of(brokers)
    admin.delete_topics([topic])[topic].result(30)

    def made() -> bool:
        try:
            admin.create_topics([NewTopic(topic, 1)])[topic].result(30)
        except KafkaException:
            return False
        return True

    wait_until(made, "the topic is created again", 30, 0.02)


@pytest.mark.parametrize("text", [JOB, RELAY], ids=["with-state", "without-state"])
def test_source_recreated_under_a_running_job_stops_it_and_none_of_its_records_are_processed(
    kafka: str, topic_prefix: str, tmp_path: Path, text: str
) -> None:
    place = Place(kafka, topic_prefix, tmp_path, text)
    create_topic(place.brokers, place.source, 1)
    place.produce(range(50))
    with place.start() as up:
        up.wait_until(lambda: len(place.outputs()) == 50, "all is processed")
        recreate(place.brokers, place.source)
        place.produce(range(1000, 1080))
        assert_refused(up.wait(30), repr(place.source), "deleted and created again", "fcluster reset")
    assert [number for number, _ in place.outputs()] == [*range(50)]
    assert_refused(place.run(), repr(place.source), "deleted and created again", "fcluster reset")


def test_partitions_added_to_a_source_without_state_are_read_at_once_and_after_a_restart(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    place = Place(kafka, topic_prefix, tmp_path, RELAY)
    create_topic(place.brokers, place.source, 1)
    place.produce(range(10))
    admin = admin_of(kafka)
    with place.start() as up:
        up.wait_until(lambda: len(place.outputs()) == 10, "the first partition is read")
        admin.create_partitions([NewPartitions(place.source, 3)])[place.source].result(30)
        wait_until_equal(lambda: len(partitions_of(kafka, place.source)), 3, "the partitions are there")
        place.produce(range(100, 110), partition=2)
        up.wait_until(lambda: len(place.outputs()) == 20, "the new partition is read", 20)
        assert len(place.status()["shards"]) == 3
        assert place.status()["notices"] == []
        up.interrupt()
        assert up.wait(60).code == 0
    admin.create_partitions([NewPartitions(place.source, 4)])[place.source].result(30)
    wait_until_equal(lambda: len(partitions_of(kafka, place.source)), 4, "the partition is there")
    place.produce(range(200, 205), partition=3)
    assert place.run().code == 0
    assert sorted(number for number, _ in place.outputs()) == [*range(10), *range(100, 110), *range(200, 205)]


def test_partitions_added_to_a_source_with_state_and_foreign_group_members_are_reported_by_the_running_job(
    place: Place,
) -> None:
    create_topic(place.brokers, place.source, 1)
    place.produce(range(3))
    with place.start() as up:
        up.wait_until(lambda: len(place.outputs()) == 3, "the first records are counted")
        admin_of(place.brokers).create_partitions([NewPartitions(place.source, 2)])[place.source].result(30)

        def said() -> str:
            return " ".join(place.status().get("notices", []))

        up.wait_until(lambda: "has 2 partitions now" in said(), "the new partition is reported", 15)
        assert "fcluster reset" in said()
        place.produce([3])
        up.wait_until(lambda: len(place.outputs()) == 4, "the job goes on")

        place.commit_as_somebody_else(1)
        up.wait_until(lambda: f"{place.source}/0 at 1" in said(), "the foreign offset is reported", 15)
        place.produce([4])
        up.wait_until(lambda: len(place.outputs()) == 5, "the next commit replaces it")
        up.wait_until(
            lambda: "a program other than fcluster committed offsets" not in said(),
            "the warning ends",
            15,
        )

        stranger = new_consumer(
            place.brokers, READ_COMMITTED, **{"group.id": place.job, "client.id": "stranger"}
        )
        stranger.subscribe([place.source])

        def joined() -> bool:
            stranger.poll(0.1)
            return "stranger at" in said()

        up.wait_until(joined, "the member of the group is named", 30)
        stranger.close()
        up.wait_until(lambda: "stranger" not in said(), "the warning ends", 15)
        place.produce([5])
        up.wait_until(lambda: len(place.outputs()) == 6, "the job goes on")
        assert_refused(place.reset("--to", "earliest", "--yes"), "in use by process")
        elsewhere = place.reset("--to", "earliest", "--yes", "--data-dir", f"{place.file.parent}/elsewhere")
        assert_refused(elsewhere, f"a cluster of job {place.job!r} is running")
        up.interrupt()
        ended = up.wait(60)
    assert ended.code == 0
    assert "has 2 partitions now" in ended.text
    assert_refused(place.run(), repr(place.source), "2 partitions", "fcluster reset")


def test_output_topic_deleted_under_a_running_job_is_reported_and_recreated_only_if_allowed(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    place = Place(kafka, topic_prefix, tmp_path, RELAY)
    create_topic(place.brokers, place.source, 1)
    place.produce([1])
    with place.start() as up:
        up.wait_until(lambda: len(place.outputs()) == 1, "the first record's output")
        delete_topic(place.brokers, place.output)
        place.produce([2])
        assert_refused(up.wait(20), repr(place.output), "sink.missing=create", "fcluster reset")
    assert_refused(place.run(), repr(place.output), "was deleted", "sink.missing=create")
    with place.start("--set", "sink.missing=create") as up:
        up.wait_until(lambda: [number for number, _ in place.outputs()] == [2], "the second record's output")
        delete_topic(place.brokers, place.output)
        up.wait_until(lambda: topics_with_prefix(kafka, place.output), "it is created again", 30)
        place.produce([3])
        up.wait_until(
            lambda: [number for number, _ in place.outputs()] == [3], "the third record's output", 60
        )
        up.interrupt()
        assert up.wait(60).code == 0
