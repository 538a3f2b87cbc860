"""What the benchmarks share: a broker, topics, a cluster of the job, figures."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.checker.generate import create_topic
from tests.checker.reading import forget_admins
from tests.harness import Cluster

JOB_FILE = Path(__file__).with_name("running_totals_job.py")


@dataclass(frozen=True)
class Names:
    """The names of one run, unlike those of any other. `source` is its own, unless another run's is given."""

    job: str
    source: str

    @classmethod
    def new(cls, source: str | None = None) -> Names:
        """Fresh names."""
        job = f"bench-{uuid.uuid4().hex[:8]}"
        return cls(job, source or f"{job}-in")

    @property
    def output(self) -> str:
        """The topic that the job writes."""
        return f"{self.job}-out"

    def env(self) -> dict[str, str]:
        """The environment that the job file reads."""
        return {
            "BENCH_JOB": self.job,
            "BENCH_SOURCE": self.source,
            "BENCH_OUTPUT": self.output,
        }


def parser(description: str | None, partitions: int | None = 4) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have.

    Args:
        partitions: the default. None: there is no such option.
    """
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--brokers", help="Bootstrap servers; without it an embedded broker is started.")
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    if partitions is not None:
        made.add_argument("--partitions", type=int, default=partitions)
    return made


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that were given with --set."""
    return dict(item.split("=", 1) for item in arguments.settings)


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: brokers, and a directory of its own.

    Attributes:
        broker_pid: of the embedded broker. None: the brokers were given.
    """

    brokers: str
    directory: Path
    broker_pid: int | None = None


def compile_fully() -> None:
    """Let the embedded brokers that are started from now on use Java's second compiler, as other brokers do.

    It takes minutes until it is done. For brokers on which several jobs are compared.
    """
    from fcluster.kafka.embedded import JVM_OPTIONS_VARIABLE

    os.environ.setdefault(JVM_OPTIONS_VARIABLE, "-server")


@contextmanager
def place(brokers: str | None) -> Iterator[Place]:
    """Brokers and an empty directory; both are gone afterwards, unless the brokers were given."""
    directory = Path(tempfile.mkdtemp(prefix="fcluster-bench-"))
    broker = None
    try:
        if not brokers:
            from fcluster.kafka.embedded import EmbeddedKafka

            compile_fully()
            broker = EmbeddedKafka(directory / "kafka")
            brokers = broker.start()
        yield Place(brokers, directory, None if broker is None else broker.pid)
    finally:
        if broker is not None:
            forget_admins()  # or they complain
            broker.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def workplace(brokers: str | None) -> Iterator[tuple[str, Path]]:
    """Bootstrap servers and directory of a `place`."""
    with place(brokers) as made:
        yield made.brokers, made.directory


@contextmanager
def topics(brokers: str, names: Names, partitions: int) -> Iterator[None]:
    """Source (if it is the run's own) and output. All topics of the run are deleted afterwards."""
    if names.source.startswith(names.job):
        create_topic(brokers, names.source, partitions)
    create_topic(brokers, names.output, partitions)
    try:
        yield
    finally:
        delete_topics(brokers, names.job)


def delete_topics(brokers: str, prefix: str) -> None:
    """Delete all topics whose names begin with this."""
    admin = AdminClient({"bootstrap.servers": brokers})
    mine = [name for name in admin.list_topics(timeout=30).topics if name.startswith(prefix)]
    for future in admin.delete_topics(mine, operation_timeout=30).values() if mine else ():
        future.result(30)


def cluster(
    brokers: str, directory: Path, names: Names, workers: int, settings: dict[str, str] | None = None
) -> Cluster:
    """The benchmarks' job as real processes, not started yet."""
    data_dir = directory / names.job
    return Cluster(JOB_FILE, brokers, data_dir, workers=workers, env=names.env(), settings=settings)


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)
