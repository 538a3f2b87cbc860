"""Jobs whose names and topics look alike when joined, and state from before the names were unambiguous."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from fcluster.common.ids import (
    changelog_topic,
    former_changelog_topic,
    former_repartition_topic,
    repartition_topic,
)
from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, read_topic
from tests.harness import Ended, Up

JOB = """
from fcluster import Job
{before}
job = Job({name!r})
orders, counts = job.topic({source!r}), job.topic({output!r})

def count(ctx, value):
    ctx.state["n"] = ctx.state.get("n", 0) + {step}
    return {{"n": ctx.state["n"], "by": "key"}}

def total(ctx, value):
    ctx.state["n"] = ctx.state.get("n", 0) + {step}
    return {{"n": ctx.state["n"], "by": "group"}}

job.stream(orders).process(count, to=counts)
job.stream(orders).key_by(lambda value: value["group"]).process(total, to=counts)
"""
# With this, the current version names and describes its topics as earlier versions did.
AS_BEFORE = """
import fcluster.api.builder
from fcluster.common import ids
from fcluster.graph.topology import Topology
fcluster.api.builder.changelog_topic = ids.former_changelog_topic
fcluster.api.builder.repartition_topic = ids.former_repartition_topic
present_describe = Topology.describe
def describe(self):
    description = present_describe(self)
    for stage in description["stages"].values():
        stage.pop("changelog", None)
        stage.get("key_by", {}).pop("identity", None)
    return description
Topology.describe = describe
"""


class Orders:
    """A job on a source with one partition. It has its own data directory."""

    def __init__(self, brokers: str, name: str, source: str, step: int, directory: Path) -> None:
        self.name, self.source, self.output = name, source, f"{name}.out"
        self.directory = directory / name
        self.directory.mkdir()
        self._brokers, self._step = brokers, step
        create_topic(brokers, source, 1)
        create_topic(brokers, self.output, 1)

    def run(self, *, as_before: bool = False) -> Ended:
        """Write four more records, and run the job until it has caught up."""
        producer = Producer({"bootstrap.servers": self._brokers})
        for number in range(4):
            producer.produce(self.source, orjson.dumps({"group": "g"}), f"k{number}")
        assert producer.flush(30) == 0
        path = self.directory / "job.py"
        before = AS_BEFORE if as_before else ""
        path.write_text(
            JOB.format(before=before, name=self.name, source=self.source, output=self.output, step=self._step)
        )
        with Up(path, self._brokers, self.directory / "data", "--until-caught-up") as up:
            return up.wait(60)

    def lose_disk(self) -> None:
        shutil.rmtree(self.directory / "data")

    def results(self) -> tuple[list[int], list[int]]:
        """The counts of one key, and the totals of the group, in order."""
        (records,) = read_topic(
            self._brokers,
            self.output,
            READ_COMMITTED,
            lambda message: (message.key(), orjson.loads(message.value() or b"")),
        ).values()
        counts = [value["n"] for key, value in records if value["by"] == "key" and key == b"k1"]
        return counts, [value["n"] for _, value in records if value["by"] == "group"]

    def expect_runs(self, count: int) -> None:
        """Check that the results are those of this many runs in a row."""
        assert self.results() == (
            [self._step * (number + 1) for number in range(count)],
            [self._step * (number + 1) for number in range(4 * count)],
        )


def test_jobs_whose_names_look_alike_keep_their_state_and_that_of_earlier_versions(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    """One job is older than the present names. The other is new, and would have had the same topics
    before."""
    name = f"{topic_prefix}billing"
    old = Orders(kafka, name, f"{topic_prefix}eu-orders", 1, tmp_path)
    new = Orders(kafka, f"{name}-{topic_prefix}eu", "orders", 100, tmp_path)
    former = former_changelog_topic(old.name, old.source)
    assert former == former_changelog_topic(new.name, new.source), "before, they would have shared it"
    assert old.run(as_before=True).code == 0
    assert former in topics(kafka)

    for orders, runs in ((new, 1), (old, 2), (new, 2)):
        ended = orders.run()
        assert ended.code == 0, ended.text
        orders.expect_runs(runs)
    for orders in (old, new):
        orders.lose_disk()
        ended = orders.run()
        assert ended.code == 0, ended.text
        orders.expect_runs(3)

    there = topics(kafka)
    assert {former, former_repartition_topic(old.name, "total")} <= there
    assert changelog_topic(old.name, old.source) not in there
    assert repartition_topic(old.name, "total") not in there
    assert {changelog_topic(new.name, new.source), repartition_topic(new.name, "total")} <= there


def test_topic_that_is_not_known_to_be_the_jobs_is_refused_by_name(
    kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    orders = Orders(kafka, f"{topic_prefix}job", f"{topic_prefix}in", 1, tmp_path)
    changelog = changelog_topic(orders.name, orders.source)
    create_topic(kafka, changelog, 1)
    producer = Producer({"bootstrap.servers": kafka})
    producer.produce(changelog, b"a stranger's")
    assert producer.flush(30) == 0
    ended = orders.run()
    assert ended.code != 0
    assert f"The job {orders.name!r} needs the topic {changelog!r} for itself, but" in ended.text
    assert f"fcluster reset {orders.name}" in ended.text


def topics(brokers: str) -> set[str]:
    return set(AdminClient({"bootstrap.servers": brokers}).list_topics(timeout=30).topics)
