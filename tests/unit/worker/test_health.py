"""What a worker reports at its HTTP port."""

from __future__ import annotations

from fcluster.common.ids import ShardId
from fcluster.common.positions import CommittedPosition
from fcluster.wire.messages import Assign, Welcome, WorkerStats
from fcluster.worker.core import events, model
from fcluster.worker.core import worker as core
from fcluster.worker.health import WorkerHealth
from tests.harness import wait_until

A, B = ShardId("in", 0), ShardId("in", 1)


def test_worker_is_ready_when_all_its_shards_run() -> None:
    identity = model.Identity("w", "host", 1, -1, "topology", "store", "1")
    worker = core.WorkerCore(identity, model.Bounds(1000, 30_000, 1_000_000), 0)
    health = WorkerHealth("job", "w")

    def happens(*happened: events.Event) -> None:
        for event in happened:
            worker.handle(event, 0)
            health.publish(worker.state)

    def why_not() -> str:
        verdict = health.ready()
        return "" if verdict.ok else verdict.text

    assert "no session" in why_not()
    happens(events.Connected(), events.MessageReceived(Welcome(1, 7, 0, 0, adopted=False)))
    assert "producers" in why_not()
    happens(events.ProducersOpened(7))
    assert not why_not(), "a worker without shards is ready"
    happens(events.MessageReceived(Assign(1, 7, [A, B], 1)))
    health.note_stats(WorkerStats(restoring=2, restore_bytes=1234, restore_ms_left=5600))
    assert "2 of 2 shards" in why_not()
    assert "1234 bytes, 5.6 s left" in why_not()
    position = CommittedPosition(0, 0, 0, "topology")
    happens(events.ShardRestored(7, A, position))
    assert "in/1 is restoring" in why_not()
    happens(events.ShardRestored(7, B, position))
    assert not why_not()
    status = health.status()
    assert status["session"] == 7
    assert [shard["phase"] for shard in status["shards"]] == ["running", "running"]
    happens(events.StopRecordReached(7, A, 3, "not JSON"))
    assert "in/0 is blocked" in why_not()
    assert health.live().ok


def test_worker_whose_loop_or_heartbeats_stop_is_not_live() -> None:
    health = WorkerHealth("job", "w")
    assert health.live().ok
    health.turned(0.01)
    wait_until(lambda: "main loop" in health.live().text, "the stopped loop is noticed", 5)
    health.turned(60)
    assert health.live().ok
    health.sent_heartbeat(-100)
    assert "heartbeats" in health.live().text
