"""Handlers that use threads and processes: each way to start one works, and none outlives the worker."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import OFFSET_BEGINNING, Producer, TopicPartition

from tests.checker.generate import create_topic
from tests.checker.reading import READ_COMMITTED, committed_offsets, new_consumer
from tests.harness import REPOSITORY, Cluster, wait_until, worker_name

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="processes of handlers are supervised on Linux only"),
]
METHODS = ("fork", "spawn", "forkserver")
STAYING = ("subprocess", "daemon", "grandchild", "fork-in-fork", "os.fork", "executor", "thread", *METHODS)
WORKER = worker_name(0)


class Run:
    """A cluster of one worker. Its handler does what the records tell it to do."""

    def __init__(self, brokers: str, prefix: str, directory: Path) -> None:
        self.brokers = brokers
        self.job, self.source, self.output = f"{prefix}job", f"{prefix}in", f"{prefix}out"
        for topic in (self.source, self.output):
            create_topic(brokers, topic, 1)
        self.mark = f"FCLUSTER_TEST_MARK={prefix}"
        name, _, value = self.mark.partition("=")
        self.cluster = Cluster(
            REPOSITORY / "tests" / "jobs" / "processes.py",
            brokers,
            directory,
            workers=1,
            env={
                "FCLUSTER_TEST_JOB": self.job,
                "FCLUSTER_TEST_SOURCE": self.source,
                "FCLUSTER_TEST_OUTPUT": self.output,
                name: value,
            },
            settings={"initial.rebalance.delay.ms": 0},
        )
        self._read = 0

    def do(self, *ways: str, timeout_s: float = 60) -> dict[str, Any]:
        """Let the handler do all of these. Returns each result, once it is committed."""
        producer = Producer({"bootstrap.servers": self.brokers})
        for how in ways:
            producer.produce(self.source, orjson.dumps({"how": how}), "k")
        assert producer.flush(30) == 0
        wanted = self._read + len(ways)
        self._await_committed(wanted, timeout_s)
        rows = self._outputs(wanted)[self._read :]
        self._read = wanted
        return {row["how"]: row for row in rows}

    def _await_committed(self, count: int, timeout_s: float) -> None:
        """Wait until this many records of the source are committed."""

        def done() -> bool:
            self.cluster.assert_alive()
            return committed_offsets(self.brokers, self.job).get((self.source, 0), 0) >= count

        wait_until(done, f"{count} records are done", timeout_s, 0.2)

    def _outputs(self, count: int) -> list[dict[str, Any]]:
        consumer = new_consumer(self.brokers, READ_COMMITTED)
        rows: list[dict[str, Any]] = []

        def all_read() -> bool:
            values = [message.value() for message in consumer.consume(100, 0.5) if message.error() is None]
            rows.extend(orjson.loads(value or b"") for value in values)
            return len(rows) >= count

        try:
            consumer.assign([TopicPartition(self.output, 0, OFFSET_BEGINNING)])
            wait_until(all_read, f"{count} outputs", 30, 0)
        finally:
            consumer.close()
        return rows

    def left_behind(self) -> list[str]:
        """The command lines of processes that the worker started, and of the worker itself."""
        found: list[str] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.cluster.pids().get("coordinator"):
                continue
            try:
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"{entry.name} {(entry / 'cmdline').read_bytes().decode()!r}")
            except OSError:
                continue
        return found


@pytest.fixture
def run(kafka: str, topic_prefix: str, tmp_path: Path) -> Iterator[Run]:
    run = Run(kafka, topic_prefix, tmp_path)
    with run.cluster as cluster:
        cluster.start()
        yield run


def test_threads_and_all_kinds_of_processes_work_and_share_nothing_with_the_worker(run: Run) -> None:
    ways = [
        "subprocess",
        "threads",
        "state",
        *(f"{kind} {method}" for kind in ("pool", "executor", "threaded-pool", "look") for method in METHODS),
    ]
    # One at a time: together they take longer than the handler's time limit on a busy machine.
    done = {how: run.do(how)[how] for how in ways}
    got = {how: row["got"] for how, row in done.items()}
    # 0, 1, 2, and the descriptor that lists them.
    assert len(json.loads(got["subprocess"])) == 4
    assert got["threads"] == 30
    assert got["state"] == {"n": 1}
    for method in METHODS:
        assert got[f"pool {method}"] == got[f"executor {method}"] == got[f"threaded-pool {method}"] == 30
        seen = got[f"look {method}"]
        assert seen["tcp"] == [], f"a child by {method} has connections of the worker"
        assert seen["stores"] == [], f"a child by {method} has files of the worker's state"
        assert "request_termination" not in "".join(seen["handlers"])
        assert seen["handlers"][0] == repr(signal.Handlers.SIG_DFL)
    assert run.cluster.terminate()[WORKER] == 0


@pytest.mark.parametrize("end", ["killed", "asked to leave"])
def test_nothing_that_a_handler_started_outlives_the_worker(run: Run, end: str) -> None:
    for how in STAYING:
        assert run.do(f"stay {how}")[f"stay {how}"]["got"] == how
    before = run.left_behind()
    assert len(before) > len(STAYING), before
    if end == "killed":
        run.cluster.kill(WORKER)
    else:
        run.cluster.child(WORKER).terminate()
        assert run.cluster.child(WORKER).wait(60) == 0
    wait_until(lambda: not run.left_behind(), "all are gone", 20)


def test_forked_child_that_returns_from_its_handler_does_not_become_a_second_worker(run: Run) -> None:
    done = run.do("comes-back", "threads")
    assert done["comes-back"]["got"] == "worker"
    assert done["threads"]["pid"] == run.cluster.pids()[WORKER]
    workers = [line for line in run.left_behind() if "\\x00worker\\x00" in line]
    assert len(workers) == 1, workers
