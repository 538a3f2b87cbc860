"""How long the output of a dead worker's shards pauses.

Responsible for: killing workers of a cluster under load, one at a time, and finding the pause in what a live
reader saw; for tests and benchmarks. Outputs keep their input's key and so its partition: a shard's output is
one partition.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fcluster.common.errors import FclusterError
from fcluster.common.settings import resolve
from fcluster.wire.admin_client import AdminClient
from fcluster.wire.discovery import find_leader
from tests.checker.live import LiveReader
from tests.harness import Cluster, wait_until, worker_name


@dataclass(frozen=True)
class Kill:
    """One death. `pauses_ms`: by partition of the dead worker, the longest time without output around it."""

    slot: int
    pauses_ms: dict[int, float]

    @property
    def longest_ms(self) -> float:
        """The longest of all its shards."""
        return max(self.pauses_ms.values())


def status_of(brokers: str, job: str) -> dict[str, Any]:
    """The coordinator's status document. Empty while there is none."""
    leader = find_leader(resolve({}, None, {}, {"bootstrap.servers": brokers}), job)
    if leader is None:
        return {}
    with AdminClient(leader.address) as client:
        try:
            return client.status()
        except FclusterError:
            return {}


def settled(status: dict[str, Any], workers: int, replicas: int) -> bool:
    """Whether all shards run, evenly distributed, none is about to move, and all copies are warm."""
    shards = status.get("shards", [])
    loads = [sum(shard["slot"] == slot for shard in shards) for slot in range(workers)]
    return (
        bool(shards)
        and len(status["workers"]) == workers
        and max(loads) - min(loads) <= 1
        and all(shard["phase"] == "running" and shard["moving_to"] < 0 for shard in shards)
        and all(len(shard["standbys"]) == replicas for shard in shards)
        and all(0 <= copy["lag"] <= 100 for shard in shards for copy in shard["standbys"])
    )


def wait_settled(cluster: Cluster, job: str, replicas: int, timeout_s: float = 60) -> dict[str, Any]:
    """Wait for `settled`. Returns the status."""
    found: dict[str, Any] = {}

    def look() -> bool:
        cluster.assert_alive()
        found.clear()
        found.update(status_of(cluster.brokers, job))
        return settled(found, cluster.workers, replicas)

    wait_until(look, f"a settled cluster (last: {found.get('shards')})", timeout_s, 0.25)
    return found


def kill_and_measure(cluster: Cluster, job: str, slot: int, reader: LiveReader, replicas: int) -> Kill:
    """`kill -9` the worker of `slot` in a settled cluster under load, and start it again.

    Args:
        reader: a running reader of the job's output.
    """
    status = wait_settled(cluster, job, replicas)
    partitions = [shard["partition"] for shard in status["shards"] if shard["slot"] == slot]
    assert partitions, f"slot {slot} has no shards"
    flowing_ns = time.time_ns()

    def flows() -> bool:
        newest_ns = reader.newest_ns()
        return all(newest_ns[partition] > flowing_ns + 1_000_000_000 for partition in partitions)

    # Without output before the kill, there would be no pause to see.
    wait_until(flows, "steady output", 30, 0.05)
    killed_ns = time.time_ns()
    cluster.kill(worker_name(slot))

    def resumed() -> bool:
        newest_ns = reader.newest_ns()
        return all(newest_ns[partition] > killed_ns + 150_000_000 for partition in partitions)

    wait_until(resumed, "output of the dead worker's shards", 30, 0.05)
    time.sleep(1.0)  # if output pauses again, that belongs to the pause
    seen: dict[int, list[int]] = {partition: [] for partition in partitions}
    for (partition, _), seen_ns in reader.times_ns().items():
        if partition in seen and seen_ns > killed_ns - 500_000_000:
            seen[partition].append(seen_ns)
    assert all(min(times_ns) < killed_ns for times_ns in seen.values()), "nothing was seen before the kill"
    cluster.start_worker(slot)
    return Kill(slot, {partition: longest_pause_ms(times_ns) for partition, times_ns in seen.items()})


def longest_pause_ms(times_ns: list[int]) -> float:
    """The longest time between two records."""
    ordered = sorted(times_ns)
    return max(later - sooner for sooner, later in pairwise(ordered)) / 1e6
