"""A cluster of two workers with a job file of the tests or the examples, with its own topics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.checker.generate import create_topic, plain_producer
from tests.harness import Cluster, wait_until

BEGIN_MS = 1_700_000_000_000
"""The first timestamp of a `TimedRun`."""


class JobRun:
    """A cluster with the job, which takes its names from `environment`.

    Args:
        brokers: bootstrap servers.
        prefix: the prefix of all names.
        directory: the cluster's directory.
        job_file: the job file. It reads the names from `FCLUSTER_TEST_JOB`, `FCLUSTER_TEST_SOURCE` and
            `FCLUSTER_TEST_OUTPUT`.
        partitions: the partition count of source and output.
        environment: what else the job file reads.

    Attributes:
        sent: how many records were written to the source.
    """

    def __init__(
        self,
        brokers: str,
        prefix: str,
        directory: Path,
        job_file: Path,
        partitions: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.brokers, self.partitions = brokers, partitions
        self.job, self.source, self.output = f"{prefix}job", f"{prefix}in", f"{prefix}out"
        for topic in (self.source, self.output):
            create_topic(brokers, topic, partitions)
        self.environment = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
            **(environment or {}),
        }
        self.cluster = Cluster(
            job_file,
            brokers,
            directory,
            workers=2,
            env=self.environment,
            settings={"initial.rebalance.delay.ms": 0, "commit.interval.ms": 50},
        )
        self.sent = 0
        self._producer = plain_producer(brokers, linger_ms=5)  # nothing comes in bursts

    def kill_amid(self, count: Callable[[], int], first: int, more: int, what: str) -> None:
        """Kill a worker in an open epoch with outputs, and start it again.

        Args:
            count: how many results there are.
            first: so many results come before.
            more: so many come afterwards.
            what: what they are a sign of, for messages.
        """
        wait_until(lambda: count() >= first, what, 60, 0.5)
        killed, in_flight = self.cluster.kill_mid_epoch(range(2), [self.output])
        assert in_flight > 0
        self.cluster.start_worker(int(killed.rpartition("-")[2]))
        after = count()
        wait_until(lambda: count() >= after + more, f"{what} again", 60, 0.5)


class TimedRun(JobRun):
    """A job whose records have rising timestamps, in all partitions in turn. Their values are their numbers.

    Attributes:
        step_ms: the time between two records.
    """

    step_ms = 10

    def key(self, number: int) -> str:
        """The key of a record."""
        return f"k{number}"

    def send(self) -> None:
        """Write twenty more records."""
        for number in range(self.sent, self.sent + 20):
            self._produce(number, number, number % self.partitions)
        self.sent += 20

    def let_time_pass(self) -> None:
        """Write a record to each partition, so much later that timers and windows of all others are due."""
        for partition in range(self.partitions):
            self._produce(self.sent + partition, self.sent + 10**6 // self.step_ms, partition)
        assert self._producer.flush(30) == 0

    def _produce(self, number: int, step: int, partition: int) -> None:
        self._producer.produce(
            self.source,
            b"%d" % number,
            self.key(number),
            timestamp=BEGIN_MS + step * self.step_ms,
            partition=partition,
        )
        self._producer.poll(0)
