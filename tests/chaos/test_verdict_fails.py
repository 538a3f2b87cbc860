"""The verdict on a run can fail: each rule is broken on purpose, and the verdict has to name it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer

from fcluster.common.ids import journal_topic
from fcluster.storage.manifest import MANIFEST_FORMAT, Manifest, SnapshotFile
from tests.chaos import leftovers
from tests.chaos.runner import Chaos, Complaints
from tests.chaos.tally import WORKER_KILLED
from tests.checker.reading import READ_UNCOMMITTED, committed_offsets, end_offsets
from tests.harness import wait_until

pytestmark = pytest.mark.timeout(200)


def outputs_ahead(run: Chaos) -> int:
    """Let a run without transactions write outputs before their inputs are committed, so that a kill leaves
    repeats."""
    offsets = committed_offsets(run.brokers, run.job)
    committed = sum(offset for (topic, _), offset in offsets.items() if topic == run.source)
    return sum(end_offsets(run.brokers, [run.output], READ_UNCOMMITTED).values()) - committed


def leave_a_transaction_open(run: Chaos) -> Producer:
    """Leave a transaction open, in the name of an id that looks like one of the job's."""
    producer = Producer({"bootstrap.servers": run.brokers, "transactional.id": f"{run.job}-stranger"})
    producer.list_topics(timeout=30)
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(journal_topic(run.job), b"x", key=b"stranger", partition=0)
    assert producer.flush(30) == 0
    return producer


def test_at_least_once_leaked_process_and_open_transaction_each_fail_the_verdict(
    chaos_unjudged: Callable[..., AbstractContextManager[Chaos]],
) -> None:
    # Offsets are committed a second after the outputs, so a kill leaves repeats.
    settings = {
        "processing.guarantee": "at-least-once",
        "commit.interval.min.ms": 1000,
        "commit.interval.max.ms": 1000,
    }
    with chaos_unjudged(workers=2, settings=settings) as run:
        for _ in range(2):
            wait_until(lambda: outputs_ahead(run) > 500, "outputs ahead of the committed offsets", 30, 0.02)
            run.cluster.kill("worker-0")
            run.note(WORKER_KILLED, "kill -9 worker-0")  # aborts nothing: nothing was in a transaction
            run.start("worker-0")
            run.await_flow()
        command = [sys.executable, "-c", "import time; time.sleep(300)", str(run.data_dir)]
        leaked = subprocess.Popen(command)
        producer = leave_a_transaction_open(run)
        try:
            with pytest.raises(AssertionError) as objection:
                run.finish("at-least-once, with a leaked process and an open transaction")
        finally:
            leaked.kill()
            leaked.wait()
            producer.abort_transaction(30)
    said = str(objection.value)
    for words in (
        "NOT exactly once",
        "  repeated: ",
        "  open: 1",
        "last stable offset",
        f"processes are left: [{leaked.pid}]",
        f"transactional ids that no slot has: {{'{run.job}-stranger'}}",
        f"transactions are left: {{'{run.job}-stranger': 'Ongoing'}}",
        "hit no open epoch: ['kill -9 worker-0', 'kill -9 worker-0']",
    ):
        assert words in said, f"{words!r} isn't in {said}"


class FakeCluster:
    """One worker with these open files."""

    def __init__(self, targets: list[str]) -> None:
        self.targets = targets

    def pids(self) -> dict[str, int]:
        return {"worker-0": 1}

    def open_files(self) -> dict[str, list[str]]:
        return {"worker-0": self.targets}

    def log(self, name: str, lines: int) -> str:
        return "joined as slot 0"

    def status(self) -> dict[str, Any]:
        shard = {"stage": "in", "partition": 1, "slot": 0, "moving_to": -1, "standbys": []}
        return {"workers": [{"slot": 0}], "shards": [shard]}


def descriptors_of(cluster: FakeCluster) -> leftovers.Descriptors:
    return leftovers.Descriptors(cluster)  # type: ignore[arg-type]


def test_leaked_descriptors_fail_the_verdict() -> None:
    cluster = FakeCluster(["socket:[1]"])
    descriptors = descriptors_of(cluster)
    descriptors.remember()
    cluster.targets = ["socket:[1]", "/d/state/job/slot-0/in/1/db/000012.sst"]
    descriptors.judge(timeout_s=0)
    cluster.targets = [f"socket:[{number}]" for number in range(40)]
    with pytest.raises(TimeoutError, match="descriptors"):
        descriptors.judge(timeout_s=0)


def test_store_that_stays_open_after_its_shard_left_fails_the_verdict() -> None:
    cluster = FakeCluster(["/d/state/job/slot-0/in/2/db/LOG"])
    descriptors = descriptors_of(cluster)
    descriptors.remember()
    with pytest.raises(TimeoutError, match=r"\('in', 2\)"):
        descriptors.judge(timeout_s=0)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """The folder of a shard in a snapshot store, with one snapshot of one file."""
    folder = tmp_path / "snapshots" / "job" / "in" / "0"
    for kind in ("files", "manifests"):
        (folder / kind).mkdir(parents=True)
    put_snapshot(folder, 1)
    return folder


def put_snapshot(folder: Path, epoch: int) -> Path:
    name = f"{epoch:064x}"
    (folder / "files" / name).write_bytes(b"x")
    manifest = Manifest(MANIFEST_FORMAT, "in", 0, epoch, 0, "", 0, [SnapshotFile("1.sst", 1, name)])
    (folder / "manifests" / f"{epoch:020}-{0:020}.json").write_bytes(msgspec.json.encode(manifest))
    return folder / "files" / name


def test_leaked_snapshots_fail_the_verdict(shard: Path, tmp_path: Path) -> None:
    leftovers.judge_files(tmp_path)
    put_snapshot(shard, 2)
    leftovers.judge_files(tmp_path)
    put_snapshot(shard, 3)
    with pytest.raises(AssertionError, match="more snapshots than 2"):
        leftovers.judge_files(tmp_path)


def test_manifest_without_its_files_fails_the_verdict(shard: Path, tmp_path: Path) -> None:
    put_snapshot(shard, 2).unlink()
    with pytest.raises(AssertionError, match="name files that aren't there"):
        leftovers.judge_files(tmp_path)


def test_file_that_no_manifest_names_fails_the_verdict(shard: Path, tmp_path: Path) -> None:
    leftovers.await_snapshots_collected(tmp_path / "snapshots", timeout_s=0)
    (shard / "files" / f"{7:064x}").write_bytes(b"x")
    with pytest.raises(TimeoutError, match="snapshots that nobody needs"):
        leftovers.await_snapshots_collected(tmp_path / "snapshots", timeout_s=0)


@pytest.mark.parametrize("name", ["checkpoint-1", "restoring-1", "removed-1"])
def test_unfinished_snapshot_or_restore_fails_the_verdict(tmp_path: Path, name: str) -> None:
    (tmp_path / "state" / "job" / "slot-0" / "in" / "0" / name).mkdir(parents=True)
    with pytest.raises(AssertionError, match=f"left behind.*{name}"):
        leftovers.judge_files(tmp_path)


def test_all_complaints_are_reported_and_other_errors_are_not_caught() -> None:
    complaints = Complaints()
    with complaints:
        raise AssertionError("one")
    with complaints:
        raise TimeoutError("two")
    with pytest.raises(AssertionError, match="one\ntwo"):
        complaints.finish()
    with pytest.raises(OSError, match="three"), complaints:
        raise OSError("three")
    Complaints().finish()
