"""What the coordinator tells workers of the partitions that are the farthest behind."""

from __future__ import annotations

from typing import Any

from fcluster.coordinator.core.drift import COUNT_GAP_MS, SlowestInputs
from fcluster.wire import messages
from fcluster.wire.messages import SlowestInput, WorkerStats
from tests.unit.coordinator.coordinator_harness import FakeWorker, Harness, one_stage


class Sessions:
    """The part of the cluster's state that is needed."""

    def __init__(self, *numbers: int) -> None:
        self.sessions: dict[int, Any] = dict.fromkeys(numbers)
        self.now_ms = 0.0


def at(time_ms: int | None, partition: str = "a/0", group: str = "a") -> SlowestInput:
    return SlowestInput(group, time_ms, partition)


def test_worker_is_told_the_slowest_partition_of_the_others_in_each_group() -> None:
    cluster: Any = Sessions(1, 2, 3)
    slowest = SlowestInputs(cluster)
    assert slowest.elsewhere(1) == []
    slowest.learn(1, [at(100, "a/1"), at(7, "b/1", "b")])
    slowest.learn(2, [at(50, "a/2")])
    slowest.learn(3, [at(70, "a/3")])
    assert slowest.elsewhere(1) == [at(50, "a/2")]
    assert slowest.elsewhere(2) == [at(70, "a/3"), at(7, "b/1", "b")]
    assert slowest.elsewhere(3) == [at(50, "a/2"), at(7, "b/1", "b")]
    slowest.learn(3, [at(None, "a/3")])
    cluster.now_ms += COUNT_GAP_MS
    assert slowest.elsewhere(1) == [at(None, "a/3")], "one that hasn't begun is the slowest"


def test_session_that_is_over_or_waits_for_nobody_is_forgotten() -> None:
    cluster: Any = Sessions(1, 2, 3)
    slowest = SlowestInputs(cluster)
    for number, time_ms in ((1, 100), (2, 50), (3, 70)):
        slowest.learn(number, [at(time_ms)])
    del cluster.sessions[2]
    slowest.learn(3, [])
    assert slowest.elsewhere(1) == []
    assert slowest.elsewhere(3) == [at(100)]


def test_it_is_told_with_the_answer_to_a_heartbeat() -> None:
    topology = one_stage()
    harness = Harness(topology, workers=2)
    workers = [FakeWorker(harness, f"w{number}") for number in range(2)]
    for worker in workers:
        worker.hello(topology=topology.fingerprint)
    for worker in workers:
        worker.learn()
        worker.running()
    for worker, slowest in ((workers[0], [at(100, "in/0")]), (workers[1], [at(200, "in/1")])):
        harness.say(
            worker.peer,
            messages.Heartbeat(worker.session, WorkerStats(slowest=slowest), worker.orders_heard),
        )
    assert harness.messages_to(workers[1].peer, messages.HeartbeatAck)[-1].slowest == [at(100, "in/0")]
