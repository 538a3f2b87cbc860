"""What is measured: fcluster of this tree or of another one, and its peers. Each is a lane of a scenario."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from benchmarks import peers, processes
from benchmarks.support import Names, Place, delete_topics
from fcluster.common.processes import ChildProcess, describe_exit, spawn
from tests.checker.generate import create_topic
from tests.harness import COORDINATOR, REPOSITORY, Cluster, cpu_seconds, memory_bytes

JOBS = {
    "totals": "running_totals_job.py",
    "regrouped": "regrouped_totals_job.py",
    "stateless": "stateless_job.py",
}
EXACTLY_ONCE, AT_LEAST_ONCE = "exactly-once", "at-least-once"
FLINK_CHECKPOINT_MS, FLINK_QUICK_CHECKPOINT_MS = 1000, 50
"""From one checkpoint to the next. Flink allows 10 ms, but each takes about 15 ms of processor time, even
if empty: 10 ms would make it do nothing else."""


class WrongTreeError(Exception):
    """The other checkout's fcluster can't be run; the message says why."""


@dataclass(frozen=True)
class Task:
    """What a job does, and how.

    Attributes:
        job: one of `JOBS`.
        partitions: of source and output.
        workers: processes that work.
        guarantee: exactly-once or at-least-once.
        peers: how many processes a peer has that uses two cores with each. None: as many as workers.
        quick: latency counts. Peers then commit every 10 ms (PyFlink: see `FLINK_QUICK_CHECKPOINT_MS`);
            fcluster chooses that by itself.
    """

    job: str = "totals"
    partitions: int = 4
    workers: int = 1
    guarantee: str = EXACTLY_ONCE
    peers: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Running:
    """A job that was started.

    Attributes:
        workers: process ids of those that process records.
        coordinator: the process id of the one that doesn't. None: there is none.
        assert_alive: raises AssertionError if a process has ended.
        start_others: the workers start others, which process records, too. They may come and go; each worker
            leads a session, and all that it starts stay in it.
    """

    workers: tuple[int, ...]
    coordinator: int | None
    assert_alive: Callable[[], None]
    start_others: bool = False

    def cpu_s(self) -> float:
        """Seconds of processor time of the workers, and of what they have started, since they started."""
        if not self.start_others:
            return sum(map(cpu_seconds, self.workers))
        return sum(process.cpu_s for pid in self.workers for process in processes.of_session(pid))

    def peak_bytes(self) -> int:
        """The peaks of resident memory of the same processes, as far as they still run, added up."""
        if not self.start_others:
            return sum(memory_bytes(pid, "VmHWM") for pid in self.workers)
        return sum(processes.peak_bytes(processes.of_session(pid)) for pid in self.workers)


class Lane(Protocol):
    """Runs jobs. Its name is unique in a run of the suite."""

    @property
    def name(self) -> str:
        """In figures and plots."""
        ...

    def run(self, place: Place, names: Names, task: Task) -> AbstractContextManager[Running]:
        """The job, started; it is ended with the block."""
        ...


@dataclass(frozen=True)
class Fcluster:
    """fcluster of a checkout, on real processes.

    Attributes:
        settings: given with --set.
        tree: the checkout.
    """

    name: str = "fcluster"
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    tree: Path = REPOSITORY

    @contextmanager
    def run(self, place: Place, names: Names, task: Task) -> Iterator[Running]:
        """See `Lane`."""
        directory = place.directory / names.job
        with Cluster(
            Path(__file__).with_name(JOBS[task.job]),
            place.brokers,
            directory,
            workers=task.workers,
            env=names.env() | self.environment(),
            settings={"processing.guarantee": task.guarantee, **self.settings},
            tree=self.tree,
        ) as cluster:
            cluster.start()
            pids = cluster.pids()
            coordinator = pids.pop(COORDINATOR)
            yield Running(tuple(pids.values()), coordinator, cluster.assert_alive)
        shutil.rmtree(directory)

    def environment(self) -> dict[str, str]:
        """What lets a Python process import the tree's fcluster."""
        return {"PYTHONPATH": str(self.tree)}

    def check(self) -> None:
        """Raises WrongTreeError if that isn't the fcluster that would run."""
        done = subprocess.run(
            [sys.executable, "-m", "fcluster", "--version"],
            cwd=self.tree,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode or not (self.tree / "fcluster" / "__init__.py").is_file():
            raise WrongTreeError(f"{self.tree} holds no fcluster that runs: {done.stderr[-500:]}")


@dataclass(frozen=True)
class KafkaStreams:
    """The same jobs for Kafka Streams, on its newest exactly-once and a RocksDB with its record cache.

    Attributes:
        jars: see `peers.resolve`.
        store: "rocksdb" or "memory".
        heap_mb: the most that Java's heap may take.
    """

    jars: Path
    store: str = "rocksdb"
    heap_mb: int = 512
    name: str = "Kafka Streams"

    @contextmanager
    def run(self, place: Place, names: Names, task: Task) -> Iterator[Running]:
        """See `Lane`."""
        guarantee = "exactly_once_v2" if task.guarantee == EXACTLY_ONCE else "at_least_once"
        settings = [
            f"bench.job={task.job}",
            f"bench.store={self.store}",
            "replication.factor=-1",
            f"processing.guarantee={guarantee}",
        ]
        if task.quick:
            settings.append("commit.interval.ms=10")
        directory = place.directory / names.job

        def start(slot: int) -> ChildProcess:
            return peers.start(
                self.jars,
                place.brokers,
                names.job,
                names.source,
                names.output,
                directory / str(slot),
                *settings,
                heap=f"-Xmx{self.heap_mb}m",
            )

        with _children(start, task.workers if task.peers is None else task.peers) as running:
            yield running
        shutil.rmtree(directory)


@dataclass(frozen=True)
class BareTransactions:
    """No job: the loop of `bare_transactions`. It takes only the benchmark's records, and ends with none."""

    name: str = "bare loop"

    @contextmanager
    def run(self, place: Place, names: Names, task: Task) -> Iterator[Running]:
        """See `Lane`."""
        changelog = f"{names.job}-changelog"
        create_topic(place.brokers, changelog, task.partitions)
        command = [sys.executable, "-m", "benchmarks.bare_transactions", place.brokers, names.job]
        command += [names.source, names.output, changelog, str(task.partitions)]
        log_file = place.directory / f"{names.job}.log"
        try:
            with _children(lambda _slot: spawn("bare loop", command, log_file=log_file), 1) as running:
                yield running
        finally:
            delete_topics(place.brokers, changelog)
        log_file.unlink()


@dataclass(frozen=True)
class QuixStreams:
    """The same jobs for Quix Streams.

    Attributes:
        python: see `peers.resolve_quix`.
    """

    python: Path
    name: str = "Quix Streams"

    @contextmanager
    def run(self, place: Place, names: Names, task: Task) -> Iterator[Running]:
        """See `Lane`."""
        directory = place.directory / names.job
        commit_interval_s = "0.01" if task.quick else "1"

        def start(slot: int) -> ChildProcess:
            return peers.start_quix(
                self.python,
                place.brokers,
                names.job,
                names.source,
                names.output,
                directory / str(slot),
                task.job,
                task.guarantee,
                commit_interval_s,
            )

        with _children(start, task.workers) as running:
            yield running
        shutil.rmtree(directory)
        for kind in ("changelog", "repartition"):
            delete_topics(place.brokers, f"{kind}__{names.job}-")


@dataclass(frozen=True)
class PyFlink:
    """The same jobs for PyFlink: one process holds a cluster of Flink, with as many slots as the task has
    workers, and a RocksDB.

    Attributes:
        flink: see `peers.resolve_flink`.
        mode: "thread": records are processed by Pythons within that process; "process": by others.
        heap_mb: the most that Java's heap may take.
    """

    flink: peers.Flink
    mode: str = "thread"
    heap_mb: int = 512
    name: str = "PyFlink"

    @contextmanager
    def run(self, place: Place, names: Names, task: Task) -> Iterator[Running]:
        """See `Lane`."""
        directory = place.directory / names.job

        def start(_slot: int) -> ChildProcess:
            return peers.start_flink(
                self.flink,
                place.brokers,
                names.job,
                names.source,
                names.output,
                directory,
                task.job,
                task.guarantee,
                str(FLINK_QUICK_CHECKPOINT_MS if task.quick else FLINK_CHECKPOINT_MS),
                str(task.workers),
                self.mode,
                heap_mb=self.heap_mb,
            )

        with _children(start, 1) as running:
            yield replace(running, start_others=True)
        shutil.rmtree(directory)


@contextmanager
def _children(start: Callable[[int], ChildProcess], number: int) -> Iterator[Running]:
    """So many processes of a peer, killed in the end with all that they have started."""
    children: list[ChildProcess] = []

    def assert_alive() -> None:
        for child in children:
            code = child.poll()
            assert code is None, f"{child.name} ended: {describe_exit(code)}"

    try:
        children += map(start, range(number))
        yield Running(tuple(child.pid for child in children), None, assert_alive)
    finally:
        for child in children:
            processes.kill_session(child.pid)
            child.stop(0)
