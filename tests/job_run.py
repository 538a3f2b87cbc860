"""A cluster of two workers with a job file of the tests or the examples, with its own topics."""

from __future__ import annotations

from pathlib import Path

from tests.checker.generate import create_topic, plain_producer
from tests.harness import Cluster


class JobRun:
    """A cluster with the job, which takes its names from `environment`.

    Args:
        brokers: bootstrap servers.
        prefix: the prefix of all names.
        directory: the cluster's directory.
        job_file: the job file. It reads the names from `FCLUSTER_TEST_JOB`, `FCLUSTER_TEST_SOURCE` and
            `FCLUSTER_TEST_OUTPUT`.
        partitions: the partition count of source and output.

    Attributes:
        sent: how many records were written to the source.
    """

    def __init__(self, brokers: str, prefix: str, directory: Path, job_file: Path, partitions: int) -> None:
        self.brokers = brokers
        self.job, self.source, self.output = f"{prefix}job", f"{prefix}in", f"{prefix}out"
        for topic in (self.source, self.output):
            create_topic(brokers, topic, partitions)
        self.environment = {
            "FCLUSTER_TEST_JOB": self.job,
            "FCLUSTER_TEST_SOURCE": self.source,
            "FCLUSTER_TEST_OUTPUT": self.output,
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
        self._producer = plain_producer(brokers)
