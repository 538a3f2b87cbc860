"""Tests of your own jobs: the real engine in the test's process, without Kafka, ports or threads.

    from fcluster.testing import Driver

    def test_flights_are_counted():
        with Driver(job) as driver:
            driver.send(flights, {"dep_delay": 5}, key="AA")
            assert driver.read_values(totals) == [{"carrier": "AA", "flights": 1}]

docs/testing.md shows what else it can do. For pytest there is the fixture `fcluster_driver`.
"""

from __future__ import annotations

from fcluster.testing.driver import DeadLetter, Driver, JobStopped
from fcluster.testing.topics import TopicRecord

__all__ = ["DeadLetter", "Driver", "JobStopped", "TopicRecord"]
